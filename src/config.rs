//! The configuration, in typed sections. Each part of the program gets only its
//! own section.

mod duration;
mod environment;
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

use crate::database_url::{self, Pooler};
use crate::dedupe::DedupeKey;
use crate::devices::Gpus;
use crate::retry::RetryPolicy;

pub(crate) use duration::in_days;
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
    /// By the `name` in a request's payload.
    pub tasks: BTreeMap<String, Task>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pubsub {
    /// The Google Cloud project. Unset: `GOOGLE_CLOUD_PROJECT`.
    pub project: Option<String>,
    /// `host:port` of an emulator. Unset: `PUBSUB_EMULATOR_HOST`, or else Google
    /// Cloud with Application Default Credentials.
    pub emulator_host: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Database {
    /// `postgres://…` or `sqlite://PATH`.
    pub url: String,
    /// PostgreSQL only.
    pub max_connections: u32,
    /// The pooler between trainyard and PostgreSQL. Unset: it is found out.
    pub pooler: Option<Pooler>,
}

impl Default for Database {
    fn default() -> Self {
        Self {
            url: "sqlite://.trainyard/trainyard.db".to_owned(),
            max_connections: 10,
            pooler: None,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Worker {
    /// How many jobs run concurrently in this process.
    pub slots: usize,
    /// How long a claim lasts without renewal. If a worker dies, another one can
    /// take over its jobs after this time. At least three times `stop_grace`.
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
    /// How long runs may go on after SIGTERM, including `stop_grace`. Set a pod's
    /// termination grace period about twenty seconds longer.
    #[serde(with = "humantime_serde")]
    pub shutdown_grace: Duration,
    /// How long a run may take to end when it is asked to stop. At a shutdown
    /// this is the last part of `shutdown_grace`.
    #[serde(with = "humantime_serde")]
    pub stop_grace: Duration,
    /// How long a message waits for a worker that knows its task before it is
    /// refused. Zero: it is refused at once.
    #[serde(with = "humantime_serde")]
    pub unknown_task_patience: Duration,
    /// The GPUs for jobs: "auto", 0 for none, or a list.
    pub gpus: Gpus,
    /// When the oldest job that waits for GPUs has waited this long, what comes
    /// free is reserved for it.
    #[serde(with = "humantime_serde")]
    pub reserve_after: Duration,
    /// The folder for the directories of jobs that run a command. Unset:
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
            reserve_after: Duration::from_secs(30),
            work_dir: None,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Guard {
    /// How long the row of an ended job is retained. While it exists, its message
    /// is recognized as processed. Must exceed Pub/Sub's message retention.
    #[serde(with = "humantime_serde")]
    pub retention: Duration,
    /// A job is dead when its worker has crashed this many times while running it.
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
    /// The ack deadline, which is extended while a message is held. If this
    /// worker dies, Pub/Sub redelivers after this time. 10 s to 10 min.
    #[serde(with = "humantime_serde")]
    pub ack_deadline: Duration,
    /// Messages with the same key are one job: `message_id`, `attribute:NAME`,
    /// `json:/pointer` or `content`.
    pub dedupe_key: DedupeKey,
    /// What happens to a message without that attribute or field.
    pub without_dedupe_key: WithoutDedupeKey,
    /// The topic for the messages of dead jobs, by its short name. Unset: dead
    /// jobs stay in the database only.
    pub dead_letter_topic: Option<String>,
    /// How many messages a worker holds beyond those that it can start now.
    /// 0: none, so that they go to workers with a free slot.
    pub prefetch: usize,
    /// How many jobs of the subscription run concurrently in one worker.
    /// Unset: no limit but the slots.
    pub concurrency: Option<usize>,
    /// How many messages a worker may hold while their jobs do not run in it: they
    /// wait in the queue, or run elsewhere. At this number it pulls no more.
    pub max_waiting: usize,
    /// A stream that delivers nothing for this long is reopened over a new
    /// connection, as it may be dead.
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
            max_waiting: 500,
            quiet_limit: Duration::from_secs(300),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", try_from = "String")]
pub enum WithoutDedupeKey {
    /// The message is deduplicated by its message id.
    #[default]
    MessageId,
    /// The message is refused.
    DeadLetter,
}

impl TryFrom<String> for WithoutDedupeKey {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        match name.as_str() {
            "message_id" => Ok(Self::MessageId),
            "dead_letter" => Ok(Self::DeadLetter),
            _ => Err(format!(
                "`{name}` is not known: write message_id or dead_letter"
            )),
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Task {
    /// The name of a built-in task.
    pub builtin: Option<String>,
    /// The program to run and its arguments; no shell. With neither this nor
    /// `builtin`, the embedding program registers a task of this name.
    pub command: Option<Vec<String>>,
    pub ack: AckTiming,
    /// A run longer than this is stopped. Unset: no limit.
    #[serde(with = "humantime_serde")]
    pub timeout: Option<Duration>,
    /// How many attempts a job has in all. A permanent error ends it earlier.
    pub max_attempts: u32,
    pub backoff: Backoff,
    /// How many jobs of the task run concurrently in one worker. Unset: no limit
    /// but the slots.
    pub concurrency: Option<usize>,
    /// How long a run may take to end when it is asked to stop. Unset: the
    /// worker's value.
    #[serde(with = "humantime_serde")]
    pub stop_grace: Option<Duration>,
    /// A run that reports nothing for this long is stopped as stuck. Unset: never.
    #[serde(with = "humantime_serde")]
    pub stall_timeout: Option<Duration>,
    /// The command's working directory. Unset: the worker's.
    pub cwd: Option<PathBuf>,
    /// Exit codes that are not retried. Unset: 65 and 78.
    pub permanent_exit_codes: Option<Vec<u8>>,
    /// The address space of each of the command's processes.
    pub memory: Option<Size>,
    /// Added to the worker's niceness.
    pub nice: Option<i32>,
    /// How many files each of the command's processes may have open.
    pub open_files: Option<u64>,
    /// How many GPUs each job has to itself.
    pub gpus: usize,
    /// Keep a job's directory after the job has ended.
    pub keep_work_dir: bool,
    /// Names of variables that are passed on from the worker's environment, for
    /// secrets that should not be in this file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pass_env: Vec<String>,
    /// Additional variables for the command.
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

/// How long a job waits before its next attempt: a random time up to a ceiling,
/// which grows from `initial` by `multiplier` up to `max`.
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
    /// Once the claim, with the payload, has committed. For long jobs: Pub/Sub
    /// does not hold the message while they run.
    BeforeRun,
    /// Once the run's first checkpoint has committed, or its outcome if there is
    /// none. For long jobs that can resume.
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
                "`{name}` is not an ack timing: write before_run, after_checkpoint or after_run"
            )),
        }
    }
}

impl Config {
    /// A copy without secrets, for display.
    #[must_use]
    pub fn masked(&self) -> Self {
        let mut masked = self.clone();
        masked.database.url = database_url::masked(&self.database.url);
        // Any variable may hold a secret.
        for task in masked.tasks.values_mut() {
            for value in task.env.values_mut() {
                "***".clone_into(value);
            }
        }
        masked
    }
}

#[cfg(test)]
mod tests;
