//! Runs a task as a command of its own: any program, in any language.
//!
//! The command is started by a keeper ([`keeper`]), which ends with it. The
//! payload goes to its stdin, its environment is made from an allow-list, and
//! what it prints on stdout and stderr comes here.

mod command;
mod ending;
mod environment;
mod keeper;
mod kept;
mod lifeline;
mod lines;
mod output;
mod said;
mod work_dir;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, Span, warn};
use uuid::Uuid;

use super::{Attempt, Executor};
use crate::outcome::Outcome;
use ending::Ending;
use environment::{environment, fence};
use kept::Kept;
use lifeline::{Exit, Moment, Order, Spec, Word};
use output::Output;

pub use command::check_command;
pub use keeper::keep_if_asked;
pub use lifeline::Limits;
pub use work_dir::{probe as probe_work_dir, tidy as tidy_work_dir};

/// By convention: bad input data, and a bad configuration (`sysexits.h`).
pub const PERMANENT_EXIT_CODES: &[u8] = &[65, 78];

/// All that could hold the output open is dead by then.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

/// Beyond the stop grace, for a keeper that does not do its work.
const KEEPER_DELAY: Duration = Duration::from_secs(5);

/// How a task's command is run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The program and its arguments. No shell, and nothing from the message.
    pub command: Vec<String>,
    /// Unset: the daemon's own.
    pub cwd: Option<PathBuf>,
    /// Variables that it gets as the daemon has them.
    pub pass_env: Vec<String>,
    /// Besides what every command gets.
    pub env: BTreeMap<String, String>,
    /// With these the job is dead at once.
    pub permanent_exit_codes: Vec<u8>,
    /// From SIGTERM to SIGKILL.
    pub stop_grace: Duration,
    /// A run that tells nothing for so long is stuck. Unset: never.
    pub stall_timeout: Option<Duration>,
    pub limits: Limits,
    /// Where jobs have their directories, by their ids.
    pub work_dir: PathBuf,
    /// Keep a job's directory also when the job has ended.
    pub keep_work_dir: bool,
    /// The program that keeps jobs: one that calls [`keep_if_asked`]. Unset:
    /// this one.
    pub keeper: Option<PathBuf>,
}

impl Settings {
    /// A command with nothing special about it.
    #[must_use]
    pub fn new(command: Vec<String>) -> Self {
        Self {
            command,
            cwd: None,
            pass_env: Vec::new(),
            env: BTreeMap::new(),
            permanent_exit_codes: PERMANENT_EXIT_CODES.to_vec(),
            stop_grace: Duration::from_secs(10),
            stall_timeout: None,
            limits: Limits::default(),
            work_dir: default_work_dir(),
            keep_work_dir: false,
            keeper: None,
        }
    }
}

/// Where jobs have their directories unless it is configured.
#[must_use]
pub fn default_work_dir() -> PathBuf {
    std::env::temp_dir().join("trainyard")
}

/// An executor of a task that is a command.
pub struct Subprocess {
    settings: Settings,
}

impl Subprocess {
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }
}

#[async_trait]
impl Executor for Subprocess {
    async fn execute(&self, attempt: Attempt) -> Outcome {
        let root = &self.settings.work_dir;
        let folder = match work_dir::create(root, attempt.job_id).await {
            Ok(folder) => folder,
            Err(error) => return Outcome::failed(format!("no work directory: {error}")),
        };
        self.run(attempt, &folder).await
    }

    async fn forget(&self, job_id: Uuid) {
        if !self.settings.keep_work_dir {
            work_dir::remove(self.settings.work_dir.join(job_id.to_string())).await;
        }
    }
}

impl Subprocess {
    async fn run(&self, attempt: Attempt, folder: &Path) -> Outcome {
        let spec = match self.spec(&attempt, folder) {
            Ok(spec) => spec,
            Err(error) => {
                return Outcome::Failed {
                    error,
                    permanent: true,
                };
            }
        };
        let keeper = self.settings.keeper.as_deref();
        let started = Kept::start(keeper, fence(&attempt), attempt.devices.clone());
        let (mut kept, stdout, stderr) = match started {
            Ok(started) => started,
            Err(error) => return Outcome::failed(format!("cannot start a keeper: {error}")),
        };
        let output = Arc::new(Output::new(attempt.reports.clone()));
        let listening = Arc::clone(&output);
        let reading = async move { listening.read(stdout, stderr).await };
        let reading = AbortOnDropHandle::new(tokio::spawn(reading.instrument(Span::current())));

        let end = match kept.launch(&spec, &attempt.data).await {
            Ok(Word::NotStarted { reason, permanent }) => End::NotStarted { reason, permanent },
            Ok(Word::Ended(exit)) => End::Exited(exit, Stop::default()),
            Ok(Word::Started(_) | Word::Left(_)) => self.follow(&mut kept, attempt, &output).await,
            Err(error) => End::Unknown(error),
        };
        match end {
            End::Unknown(_) => kept.end().await,
            _ => kept.close().await,
        }
        if timeout(LAST_OUTPUT, reading).await.is_err() {
            warn!("something else holds the run's output open; it is read no further");
        }
        output.close();
        self.outcome(end, &output)
    }

    /// What the keeper is told to run.
    ///
    /// # Errors
    /// It cannot be run, now or later.
    fn spec(&self, attempt: &Attempt, folder: &Path) -> Result<Spec, String> {
        let settings = &self.settings;
        let passed = |name: &OsStr| settings.pass_env.iter().any(|passed| name == &**passed);
        let own = std::env::vars_os();
        let env = environment(own, passed, &settings.env, attempt, folder);
        let path = env.iter().find(|(name, _)| name == OsStr::new("PATH"));
        let path = path.map(|(_, value)| value.as_os_str());
        let program = command::find_program(&settings.command, settings.cwd.as_deref(), path)
            .map_err(|reason| format!("the task cannot be run: {reason}"))?;
        Ok(Spec {
            program,
            argv: settings.command.clone(),
            cwd: settings.cwd.clone(),
            env,
            limits: settings.limits,
            stop_grace: settings.stop_grace,
            valid_until: moment(*attempt.valid_until.borrow()),
            payload: attempt.data.len(),
        })
    }

    /// Sees the command to its end, however it comes.
    async fn follow(&self, kept: &mut Kept, mut attempt: Attempt, output: &Output) -> End {
        let mut stop = Stop::default();
        let mut renewing = true;
        loop {
            tokio::select! {
                // A command that has ended has ended, whatever else happens.
                biased;
                word = kept.next_word() => match word {
                    Ok(Word::Ended(exit)) => return End::Exited(exit, stop),
                    Ok(Word::Left(pids)) => warn!(?pids, "processes of the run do not end"),
                    Ok(_) => {}
                    Err(error) => return End::Unknown(error),
                },
                () = attempt.stop.cancelled(), if stop.asked_at.is_none() => {
                    stop.asked_at = Some(Instant::now());
                    kept.order(Order::Terminate);
                }
                () = self.stalled(output), if stop.asked_at.is_none() => {
                    stop.asked_at = Some(Instant::now());
                    stop.stalled = true;
                    kept.order(Order::Terminate);
                }
                () = over(stop, self.settings.stop_grace) => {
                    return End::Unknown(io::Error::other("it did not stop its job"));
                }
                renewed = attempt.valid_until.changed(), if renewing => match renewed {
                    Ok(()) => {
                        let until = *attempt.valid_until.borrow_and_update();
                        kept.order(Order::ValidUntil(moment(until)));
                    }
                    // Nobody renews any more; what was said last holds.
                    Err(_) => renewing = false,
                },
            }
        }
    }

    /// Completes when the run has told nothing for its stall timeout.
    async fn stalled(&self, output: &Output) {
        let Some(limit) = self.settings.stall_timeout else {
            return std::future::pending().await;
        };
        loop {
            let due = output.sign_of_life() + limit;
            if due <= Instant::now() {
                return;
            }
            sleep_until(due).await;
        }
    }

    fn outcome(&self, end: End, output: &Output) -> Outcome {
        let settings = &self.settings;
        match end {
            End::NotStarted { reason, permanent } => Outcome::Failed {
                error: reason,
                permanent,
            },
            End::Unknown(error) => Outcome::failed(format!("the job's keeper failed: {error}")),
            End::Exited(exit, stop) => Ending {
                exit,
                stopped: stop.asked_at.is_some(),
                stalled: settings.stall_timeout.filter(|_| stop.stalled),
                result: output.result(),
                errors: &output.last_errors(),
                permanent_exit_codes: &settings.permanent_exit_codes,
                memory: settings.limits.memory,
            }
            .outcome(),
        }
    }
}

/// How a run came to its end, as far as it is known.
enum End {
    NotStarted { reason: String, permanent: bool },
    Exited(Exit, Stop),
    Unknown(io::Error),
}

/// Whether and why a command was asked to stop.
#[derive(Clone, Copy, Default)]
struct Stop {
    asked_at: Option<Instant>,
    stalled: bool,
}

/// Completes when a command that was asked to stop must long have ended.
async fn over(stop: Stop, grace: Duration) {
    match stop.asked_at {
        Some(asked_at) => sleep_until(asked_at + grace + KEEPER_DELAY).await,
        None => std::future::pending().await,
    }
}

/// The same point in time on the clock that the keeper sees too.
fn moment(at: Instant) -> Moment {
    Moment::now().after(at.saturating_duration_since(Instant::now()))
}
