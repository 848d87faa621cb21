//! Runs a task as a command: any program, in any language.
//!
//! Each command has its own keeper process ([`keeper`]). The command reads the
//! payload from stdin and gets its environment from an allow-list. Its stdout
//! and stderr are read here.

mod command;
mod environment;
mod exit;
mod keeper;
mod keeper_handle;
mod lifeline;
mod lines;
mod output;
mod report_line;
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
use environment::{environment, fence};
use exit::CommandExit;
use keeper_handle::KeeperHandle;
use lifeline::{ExitStatus, Moment, Notice, Order, Spec};
use output::Output;

pub use command::check_command;
pub use keeper::run_as_keeper_if_asked;
pub use lifeline::ResourceLimits;
pub use work_dir::{probe as probe_work_dir, tidy as tidy_work_dir};

/// `EX_DATAERR` and `EX_CONFIG` of `sysexits.h`.
pub const PERMANENT_EXIT_CODES: &[u8] = &[65, 78];

/// How long the output is still read after the last process has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

/// How long after the stop grace a keeper counts as failed.
const KEEPER_DELAY: Duration = Duration::from_secs(5);

/// How a task's command is run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The program and its arguments. No shell, and nothing from the message.
    pub command: Vec<String>,
    /// Unset: the daemon's.
    pub cwd: Option<PathBuf>,
    /// Variables passed on from the daemon's environment.
    pub pass_env: Vec<String>,
    /// Additional variables.
    pub env: BTreeMap<String, String>,
    /// Exit codes that are not retried.
    pub permanent_exit_codes: Vec<u8>,
    /// From SIGTERM to SIGKILL.
    pub stop_grace: Duration,
    /// A run that reports nothing for this long is stuck. Unset: never.
    pub stall_timeout: Option<Duration>,
    pub limits: ResourceLimits,
    /// The folder of the jobs' directories. A directory's name is its job's id.
    pub work_dir: PathBuf,
    /// Keep a job's directory after the job has ended.
    pub keep_work_dir: bool,
    /// The program to start as the keeper; it must call
    /// [`run_as_keeper_if_asked`]. Unset: this program.
    pub keeper_program: Option<PathBuf>,
}

impl Settings {
    /// The default settings for a command.
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
            limits: ResourceLimits::default(),
            work_dir: default_work_dir(),
            keep_work_dir: false,
            keeper_program: None,
        }
    }
}

/// The default of [`Settings::work_dir`].
#[must_use]
pub fn default_work_dir() -> PathBuf {
    std::env::temp_dir().join("trainyard")
}

/// The executor of a task with a command.
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
            Err(error) => {
                return Outcome::failed(format!("cannot create the work directory: {error}"));
            }
        };
        self.run(attempt, &folder.path).await
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
        let program = self.settings.keeper_program.as_deref();
        let started = KeeperHandle::start(program, fence(&attempt), attempt.devices.clone());
        let (mut keeper, stdout, stderr) = match started {
            Ok(started) => started,
            Err(error) => return Outcome::failed(format!("cannot start a keeper: {error}")),
        };
        let output = Arc::new(Output::new(attempt.reports.clone()));
        let reader = Arc::clone(&output);
        let reading = async move { reader.read(stdout, stderr).await };
        let reading = AbortOnDropHandle::new(tokio::spawn(reading.instrument(Span::current())));

        let end = match keeper.launch(&spec, &attempt.data).await {
            Ok(Notice::NotStarted { reason, permanent }) => {
                RunEnd::NotStarted { reason, permanent }
            }
            Ok(Notice::Ended(status)) => RunEnd::Exited(status, StopRequest::default()),
            Ok(Notice::Started(_) | Notice::Left(_)) => {
                self.follow(&mut keeper, attempt, &output).await
            }
            Err(error) => RunEnd::KeeperFailed(error),
        };
        match end {
            RunEnd::KeeperFailed(_) => keeper.kill().await,
            _ => keeper.close().await,
        }
        if timeout(LAST_OUTPUT, reading).await.is_err() {
            warn!("another process holds the run's output open; the rest is not read");
        }
        output.close();
        self.outcome(end, &output)
    }

    /// The command as the keeper gets it.
    ///
    /// # Errors
    /// The program or the working directory is missing, which is permanent.
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

    /// Follows the command to its end.
    async fn follow(
        &self,
        keeper: &mut KeeperHandle,
        mut attempt: Attempt,
        output: &Output,
    ) -> RunEnd {
        let mut stop = StopRequest::default();
        let mut renewing = true;
        loop {
            tokio::select! {
                // The command's end comes before any reason to stop it.
                biased;
                notice = keeper.next_notice() => match notice {
                    Ok(Notice::Ended(status)) => return RunEnd::Exited(status, stop),
                    Ok(Notice::Left(pids)) => warn!(?pids, "processes of the run do not end"),
                    Ok(_) => {}
                    Err(error) => return RunEnd::KeeperFailed(error),
                },
                () = attempt.stop.cancelled(), if stop.asked_at.is_none() => {
                    stop.asked_at = Some(Instant::now());
                    keeper.order(Order::Terminate);
                }
                () = self.stalled(output), if stop.asked_at.is_none() => {
                    stop.asked_at = Some(Instant::now());
                    stop.stalled = true;
                    keeper.order(Order::Terminate);
                }
                () = stop_overdue(stop, self.settings.stop_grace) => {
                    return RunEnd::KeeperFailed(io::Error::other("it did not stop the command in time"));
                }
                renewed = attempt.valid_until.changed(), if renewing => match renewed {
                    Ok(()) => {
                        let until = *attempt.valid_until.borrow_and_update();
                        keeper.order(Order::ValidUntil(moment(until)));
                    }
                    // No more renewals: the last limit stays in force.
                    Err(_) => renewing = false,
                },
            }
        }
    }

    /// Completes when the run has reported nothing for its stall timeout.
    async fn stalled(&self, output: &Output) {
        let Some(limit) = self.settings.stall_timeout else {
            return std::future::pending().await;
        };
        loop {
            let due = output.last_report_at() + limit;
            if due <= Instant::now() {
                return;
            }
            sleep_until(due).await;
        }
    }

    fn outcome(&self, end: RunEnd, output: &Output) -> Outcome {
        let settings = &self.settings;
        match end {
            RunEnd::NotStarted { reason, permanent } => Outcome::Failed {
                error: reason,
                permanent,
            },
            RunEnd::KeeperFailed(error) => {
                Outcome::failed(format!("the job's keeper failed: {error}"))
            }
            RunEnd::Exited(status, stop) => CommandExit {
                status,
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

/// How a run ended, as far as the daemon knows.
enum RunEnd {
    NotStarted { reason: String, permanent: bool },
    Exited(ExitStatus, StopRequest),
    KeeperFailed(io::Error),
}

/// Whether and why a command was asked to stop.
#[derive(Clone, Copy, Default)]
struct StopRequest {
    asked_at: Option<Instant>,
    stalled: bool,
}

/// Completes when a command that was asked to stop should have ended by now.
async fn stop_overdue(stop: StopRequest, grace: Duration) {
    match stop.asked_at {
        Some(asked_at) => sleep_until(asked_at + grace + KEEPER_DELAY).await,
        None => std::future::pending().await,
    }
}

/// Converts to the clock that the daemon and the keeper share.
fn moment(at: Instant) -> Moment {
    Moment::now().after(at.saturating_duration_since(Instant::now()))
}
