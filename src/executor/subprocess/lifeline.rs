//! The protocol between the daemon and a keeper: lines of JSON over a socket,
//! which is the keeper's stdin. The kernel closes the daemon's end when the
//! daemon dies.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// The exit code of a keeper that could not kill all processes of its job.
pub(super) const PROCESSES_LEFT: i32 = 3;

/// Set in the environment of a keeper.
pub(super) const KEEPER_VARIABLE: &str = "TRAINYARD_KEEPER";

/// Set in the environment of a launcher: its keeper's process id.
pub(super) const LAUNCHER_VARIABLE: &str = "TRAINYARD_LAUNCHER";

/// The first line to the keeper: the command to run. The payload's bytes
/// follow it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Spec {
    /// An absolute path.
    pub(super) program: PathBuf,
    /// The program's name comes first.
    pub(super) argv: Vec<String>,
    pub(super) cwd: Option<PathBuf>,
    pub(super) env: Vec<(OsString, OsString)>,
    pub(super) limits: ResourceLimits,
    /// From SIGTERM to SIGKILL.
    pub(super) stop_grace: Duration,
    pub(super) valid_until: Moment,
    /// Its length in bytes.
    pub(super) payload: usize,
}

/// The resource limits of a command. `None`: the daemon's limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceLimits {
    /// Address space of each process, in bytes.
    pub memory: Option<u64>,
    /// Added to the daemon's niceness.
    pub nice: Option<i32>,
    /// File descriptors of each process.
    pub open_files: Option<u64>,
}

/// A line to the keeper while the command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// Send SIGTERM, and SIGKILL after the stop grace.
    Terminate,
    /// Stop the command at this time, unless a later one follows.
    ValidUntil(Moment),
}

/// A line from the keeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Notice {
    /// The command runs and leads the process group of this id.
    Started(i32),
    NotStarted {
        reason: String,
        /// It would not start at a later attempt either.
        permanent: bool,
    },
    /// These processes do not end. `Ended` follows.
    Left(Vec<i32>),
    /// The command has ended, and the processes that it started are gone.
    Ended(ExitStatus),
}

/// How the command's process ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ExitStatus {
    pub(super) code: Option<i32>,
    pub(super) signal: Option<i32>,
    /// It was stopped because `ValidUntil` had passed.
    pub(super) expired: bool,
}

/// A time in milliseconds on a clock that all processes of the machine share.
/// The clock goes on while the machine is suspended, as leases do.
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

    /// Zero if it is past.
    pub(super) fn left(self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(Self::now().0))
    }
}

/// Serializes a message as one line.
pub(super) fn line(message: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// On Linux this is the running program, even if its file has been replaced.
pub(super) fn this_program() -> std::io::Result<PathBuf> {
    match cfg!(target_os = "linux") {
        true => Ok(PathBuf::from("/proc/self/exe")),
        false => std::env::current_exe(),
    }
}
