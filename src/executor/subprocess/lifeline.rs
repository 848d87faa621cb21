//! What the daemon and the keeper of a job say to each other: JSON, one line
//! each, over the socket that is the keeper's stdin. Its other end closes when
//! the daemon dies, however it dies.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Set for a process that is to be a keeper.
pub(super) const MARK: &str = "TRAINYARD_KEEPER";

/// Set for a process that is to become a command: its keeper's process id.
pub(super) const LAUNCHER_MARK: &str = "TRAINYARD_LAUNCHER";

/// The first line to the keeper: what to run. The payload's bytes follow it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Spec {
    /// With a path, so that nothing is looked up any more.
    pub(super) program: PathBuf,
    /// The program's own name for itself first.
    pub(super) argv: Vec<String>,
    pub(super) cwd: Option<PathBuf>,
    pub(super) env: Vec<(OsString, OsString)>,
    pub(super) limits: Limits,
    /// From SIGTERM to SIGKILL.
    pub(super) stop_grace: Duration,
    pub(super) valid_until: Moment,
    /// In bytes.
    pub(super) payload: usize,
}

/// What a command may use. `None`: as much as the daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Address space of each of its processes, in bytes.
    pub memory: Option<u64>,
    /// Added to the daemon's own niceness.
    pub nice: Option<i32>,
    /// File descriptors of each of its processes.
    pub open_files: Option<u64>,
}

/// What the keeper is told while the command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// SIGTERM, and after the stop grace SIGKILL.
    Terminate,
    /// Until then the command may run without another word.
    ValidUntil(Moment),
}

/// What the keeper tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Word {
    /// The command runs, as the leader of the process group of this id.
    Started(i32),
    NotStarted {
        reason: String,
        /// It would not start another time either.
        permanent: bool,
    },
    /// These processes do not end; said before the next.
    Left(Vec<i32>),
    /// The command has ended, and nothing else that it started is left.
    Ended(Exit),
}

/// How a command's process ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Exit {
    pub(super) code: Option<i32>,
    pub(super) signal: Option<i32>,
    /// The daemon did not say in time that it may go on.
    pub(super) expired: bool,
}

/// Milliseconds of a clock of the machine's that all its processes share: a
/// deadline sent as one does not move while the message is on its way. A
/// suspended machine's leases run out too, so the clock goes on meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Moment(u64);

#[cfg(target_os = "linux")]
const CLOCK: ClockId = ClockId::Boottime;
#[cfg(not(target_os = "linux"))]
const CLOCK: ClockId = ClockId::Monotonic;

impl Moment {
    pub(super) fn now() -> Self {
        let now = clock_gettime(CLOCK);
        let milliseconds = now.tv_sec.saturating_mul(1000) + now.tv_nsec / 1_000_000;
        Self(u64::try_from(milliseconds).unwrap_or_default())
    }

    pub(super) fn after(self, time: Duration) -> Self {
        let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(milliseconds))
    }

    /// Nothing when it is past.
    pub(super) fn left(self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(Self::now().0))
    }
}

/// A message as a line. None of ours can fail to become JSON.
pub(super) fn line(message: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// On Linux this is the program that runs, even when its file has been replaced
/// by a newer one.
pub(super) fn this_program() -> std::io::Result<PathBuf> {
    match cfg!(target_os = "linux") {
        true => Ok(PathBuf::from("/proc/self/exe")),
        false => std::env::current_exe(),
    }
}
