//! The configuration, in typed sections. Each part of the program receives
//! only its own section.

mod error;
mod load;
mod nearest;
mod problems;
mod size;
mod timeline;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::dedupe::DedupeKey;
use crate::devices::Gpus;
use crate::retry::RetryPolicy;

pub use error::ConfigError;
pub use load::load;
pub use size::Size;
pub use timeline::timeline;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub pubsub: Pubsub,
    pub database: Database,
    pub worker: Worker,
    pub guard: Guard,
    /// By the subscription's short name, as in `projects/P/subscriptions/NAME`.
    pub subscriptions: BTreeMap<String, Subscription>,
    /// By the `name` that a request's payload carries.
    pub tasks: BTreeMap<String, Task>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pubsub {
    /// The Google Cloud project. Unset: `GOOGLE_CLOUD_PROJECT`.
    pub project: Option<String>,
    /// `host:port` of an emulator. Unset: `PUBSUB_EMULATOR_HOST`, and without
    /// that Google Cloud itself, with Application Default Credentials.
    pub emulator_host: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Database {
    /// `postgres://…` or `sqlite://PATH`.
    pub url: String,
    /// To Postgres; SQLite has few of its own.
    pub max_connections: u32,
}

impl Default for Database {
    fn default() -> Self {
        Self {
            url: "sqlite://.trainyard/trainyard.db".to_owned(),
            max_connections: 10,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Worker {
    /// How many jobs run side by side in this process.
    pub slots: usize,
    /// How long a claim lasts without renewal: the time after which another
    /// worker may take over from one that died. At least three times
    /// `stop_grace`.
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
    /// How long runs may go on after SIGTERM, their stop included. Keep a pod's
    /// termination grace period some twenty seconds longer.
    #[serde(with = "humantime_serde")]
    pub shutdown_grace: Duration,
    /// How long a run may take to end once it is asked to stop; the last part
    /// of `shutdown_grace` is kept for it.
    #[serde(with = "humantime_serde")]
    pub stop_grace: Duration,
    /// How long a message may wait for a worker that knows its task, before it
    /// is refused. Nothing: it is refused at once.
    #[serde(with = "humantime_serde")]
    pub unknown_task_patience: Duration,
    /// The GPUs that its jobs share: "auto", 0 for none, or a list.
    pub gpus: Gpus,
    /// Where jobs that run a command have their directories. Unset: a folder
    /// `trainyard` in the system's folder for temporary files.
    pub work_dir: Option<PathBuf>,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            slots: 1,
            lease: Duration::from_secs(120),
            shutdown_grace: Duration::from_secs(25),
            stop_grace: Duration::from_secs(10),
            unknown_task_patience: Duration::from_secs(300),
            gpus: Gpus::default(),
            work_dir: None,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Guard {
    /// How long an ended job stays on record, and with it the knowledge that
    /// its message has been processed. Longer than Pub/Sub keeps messages.
    #[serde(with = "humantime_serde")]
    pub retention: Duration,
    /// A job whose worker was lost so many times while running it is dead.
    pub max_crashes: u32,
}

impl Default for Guard {
    fn default() -> Self {
        Self {
            retention: Duration::from_secs(32 * 24 * 60 * 60),
            max_crashes: 3,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Subscription {
    /// The ack deadline asked for, and extended while a message is held:
    /// how soon Pub/Sub sends it again after this worker died. 10 s to 10 min.
    #[serde(with = "humantime_serde")]
    pub ack_deadline: Duration,
    /// What makes two messages the same job: `message_id`, `attribute:NAME`,
    /// `json:/pointer` or `content`.
    pub dedupe_key: DedupeKey,
    /// What becomes of a message without that attribute or field.
    pub without_dedupe_key: WithoutDedupeKey,
    /// The topic to which the messages of dead jobs are published, by its short
    /// name. Unset: they stay in the database only.
    pub dead_letter_topic: Option<String>,
    /// How many messages a worker may hold beyond those that it can start now.
    /// 0: none, so that an idle worker elsewhere gets them.
    pub prefetch: usize,
    /// How many jobs of the subscription run side by side in one worker.
    /// Unset: as many as it has slots.
    pub concurrency: Option<usize>,
    /// A stream that has brought nothing for so long is replaced, over a new
    /// connection: it may be dead without a sign.
    #[serde(with = "humantime_serde")]
    pub quiet_limit: Duration,
}

impl Default for Subscription {
    fn default() -> Self {
        Self {
            ack_deadline: Duration::from_secs(30),
            dedupe_key: DedupeKey::default(),
            without_dedupe_key: WithoutDedupeKey::default(),
            dead_letter_topic: None,
            prefetch: 0,
            concurrency: None,
            quiet_limit: Duration::from_secs(300),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WithoutDedupeKey {
    /// It is deduplicated by its message id.
    #[default]
    MessageId,
    /// It is refused.
    DeadLetter,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Task {
    /// One of the tasks that come with trainyard.
    pub builtin: Option<String>,
    /// The program to run and its arguments; no shell. With neither this nor
    /// `builtin` the task is one that the program embedding trainyard registers
    /// under this name.
    pub command: Option<Vec<String>>,
    pub ack: AckTiming,
    /// A run longer than this is stopped. Unset: no limit.
    #[serde(with = "humantime_serde")]
    pub timeout: Option<Duration>,
    /// How many attempts a job gets in all, unless an error is permanent.
    pub max_attempts: u32,
    pub backoff: Backoff,
    /// How many jobs of the task run side by side in one worker. Unset: as many
    /// as it has slots.
    pub concurrency: Option<usize>,
    /// How long a run that is asked to stop may take to end. Unset: the
    /// worker's.
    #[serde(with = "humantime_serde")]
    pub stop_grace: Option<Duration>,
    /// A run that tells nothing for so long is stopped as stuck. Unset: never.
    #[serde(with = "humantime_serde")]
    pub stall_timeout: Option<Duration>,
    /// The command's working directory. Unset: the worker's own.
    pub cwd: Option<PathBuf>,
    /// With these exit codes a request can never succeed. Unset: 65 and 78.
    pub permanent_exit_codes: Option<Vec<u8>>,
    /// Address space of each of the command's processes.
    pub memory: Option<Size>,
    /// Added to the niceness of the worker.
    pub nice: Option<i32>,
    /// File descriptors of each of the command's processes.
    pub open_files: Option<u64>,
    /// How many GPUs each of its jobs has to itself.
    pub gpus: usize,
    /// Keep a job's directory after it has ended.
    pub keep_work_dir: bool,
    /// Names of variables that the command gets as the worker has them: for
    /// secrets, which are not to stand here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pass_env: Vec<String>,
    /// Variables for the command, besides those that every command gets.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

impl Default for Task {
    fn default() -> Self {
        Self {
            builtin: None,
            ack: AckTiming::default(),
            timeout: None,
            max_attempts: RetryPolicy::default().max_attempts,
            backoff: Backoff::default(),
            concurrency: None,
            command: None,
            stop_grace: None,
            stall_timeout: None,
            cwd: None,
            permanent_exit_codes: None,
            memory: None,
            nice: None,
            open_files: None,
            gpus: 0,
            keep_work_dir: false,
            pass_env: Vec::new(),
            env: BTreeMap::new(),
        }
    }
}

impl Task {
    #[must_use]
    pub fn retry_policy(&self) -> RetryPolicy {
        RetryPolicy {
            max_attempts: self.max_attempts,
            initial: self.backoff.initial,
            max: self.backoff.max,
            multiplier: self.backoff.multiplier,
        }
    }
}

/// How long a job waits before its next attempt: anything from nothing to a
/// ceiling that grows from `initial` by `multiplier` up to `max`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Backoff {
    #[serde(with = "humantime_serde")]
    pub initial: Duration,
    #[serde(with = "humantime_serde")]
    pub max: Duration,
    pub multiplier: f64,
}

impl Default for Backoff {
    fn default() -> Self {
        let policy = RetryPolicy::default();
        Self {
            initial: policy.initial,
            max: policy.max,
            multiplier: policy.multiplier,
        }
    }
}

/// When a task's message is acknowledged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", try_from = "String")]
pub enum AckTiming {
    /// Once the claim, payload included, has committed. For long jobs: Pub/Sub
    /// need not hold the message while they run.
    BeforeRun,
    /// Once the run's first checkpoint has committed; its outcome, if it has
    /// none. For long jobs that can go on from where they left off.
    AfterCheckpoint,
    /// Once the outcome has committed.
    #[default]
    AfterRun,
}

impl AckTiming {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BeforeRun => "before_run",
            Self::AfterCheckpoint => "after_checkpoint",
            Self::AfterRun => "after_run",
        }
    }
}

impl TryFrom<String> for AckTiming {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        match name.as_str() {
            "before_run" => Ok(Self::BeforeRun),
            "after_checkpoint" => Ok(Self::AfterCheckpoint),
            "after_run" => Ok(Self::AfterRun),
            _ => Err(format!(
                "`{name}` is no ack timing: write before_run, after_checkpoint or after_run"
            )),
        }
    }
}

impl Config {
    /// The configuration with passwords masked, for people to read.
    #[must_use]
    pub fn masked(&self) -> Self {
        let mut masked = self.clone();
        masked.database.url = mask_password(&self.database.url);
        // Any of them may be a key to something.
        for task in masked.tasks.values_mut() {
            for value in task.env.values_mut() {
                "***".clone_into(value);
            }
        }
        masked
    }
}

/// `postgres://user:secret@host/db?password=x` without what must not be seen.
#[must_use]
pub fn mask_password(url: &str) -> String {
    let Ok(mut parsed) = url::Url::parse(url) else {
        // Not a URL that can be taken apart, so nothing of it is safe to show.
        return match url.split_once("://") {
            Some((scheme, rest)) if !rest.contains(['@', '?']) => format!("{scheme}://{rest}"),
            Some((scheme, _)) => format!("{scheme}://***"),
            None => "***".to_owned(),
        };
    };
    if parsed.password().is_some() && parsed.set_password(Some("***")).is_err() {
        return format!("{}://***", parsed.scheme());
    }
    if parsed.query().is_some() {
        let pairs: Vec<(String, String)> = parsed
            .query_pairs()
            .map(|(name, value)| match name.as_ref() {
                "password" | "sslpassword" => (name.into_owned(), "***".to_owned()),
                _ => (name.into_owned(), value.into_owned()),
            })
            .collect();
        parsed.query_pairs_mut().clear().extend_pairs(pairs);
    }
    parsed.to_string()
}

#[cfg(test)]
mod tests;
