//! The processes of a job: the command, its process group, and the processes
//! that they leave behind.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, kill_process, kill_process_group,
    wait, waitid, waitpid,
};

use super::super::lifeline::ExitStatus;

/// A process that the kernel cannot end (it hangs in a driver) must not hold
/// its job's slot forever.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// The command's process group. It is closed before its id can be reused.
pub(super) struct ProcessGroup {
    leader: Pid,
    /// The leader has ended, so its id may be reused soon.
    closed: Mutex<bool>,
    expired: AtomicBool,
}

impl ProcessGroup {
    pub(super) fn new(leader: Pid) -> Self {
        Self {
            leader,
            closed: Mutex::new(false),
            expired: AtomicBool::new(false),
        }
    }

    pub(super) fn leader(&self) -> Pid {
        self.leader
    }

    pub(super) fn signal(&self, signal: Signal) {
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        if !*closed {
            // This fails only if the group is gone or belongs to another user.
            let _ = kill_process_group(self.leader, signal);
        }
    }

    /// `ValidUntil` has passed.
    pub(super) fn expire(&self) {
        self.expired.store(true, Ordering::Relaxed);
    }

    /// Sends no more signals. Returns whether `ValidUntil` had passed.
    pub(super) fn close(&self) -> bool {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.expired.load(Ordering::Relaxed)
    }
}

/// Makes this process the parent of its orphaned descendants, instead of init.
#[cfg(target_os = "linux")]
pub(super) fn become_subreaper() -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(Some(
        rustix::process::getpid(),
    ))?)
}

#[cfg(not(target_os = "linux"))]
#[expect(clippy::unnecessary_wraps, reason = "it can fail on Linux")]
pub(super) fn become_subreaper() -> io::Result<()> {
    Ok(())
}

/// Waits until the command has exited, and leaves it unreaped, so that its id
/// is not reused and its exit status stays readable. Reaps orphans that exit
/// meanwhile.
pub(super) fn wait_for_exit(leader: Pid) {
    let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    loop {
        match waitid(WaitId::All, ended) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        match waitid(WaitId::Pid(leader), ended | WaitIdOptions::NOHANG) {
            Ok(None) => {}
            Ok(Some(_)) | Err(_) => return,
        }
        // The leader may be a zombie too by now.
        let zombies = children()
            .into_iter()
            .filter(|child| child.zombie && child.pid != leader);
        let reaped = zombies
            .filter(|child| waitpid(Some(child.pid), WaitOptions::NOHANG).is_ok())
            .count();
        if reaped == 0 {
            sleep(Duration::from_millis(100));
        }
    }
}

/// Kills and reaps the job's processes, and reaps the leader. Returns the
/// leader's exit status, and the processes that do not end.
pub(super) fn kill_all(leader: Pid) -> (ExitStatus, Vec<i32>) {
    // The leader is not reaped yet, so the group's id cannot be reused.
    let _ = kill_process_group(leader, Signal::KILL);
    // An error here must not save the other processes.
    let exit = wait_status(leader).map(exit_status).unwrap_or_default();
    let started = Instant::now();
    let mut pause = Duration::from_millis(1);
    while started.elapsed() < KILL_LIMIT {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => continue,
            Ok(None) => {}
            Err(_) => return (exit, Vec::new()),
        }
        // Their children become this process's, and die in the next round.
        for child in children() {
            let _ = kill_process(child.pid, Signal::KILL);
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    let left = children().into_iter().filter(|child| !child.zombie);
    (exit, left.map(|child| child.pid.as_raw_pid()).collect())
}

fn wait_status(leader: Pid) -> Option<WaitStatus> {
    loop {
        match waitpid(Some(leader), WaitOptions::empty()) {
            Ok(ended) => return ended.map(|(_, status)| status),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    ExitStatus {
        code: status.exit_status(),
        signal: status.terminating_signal(),
        expired: false,
    }
}

struct ChildProcess {
    pid: Pid,
    zombie: bool,
}

/// This process's children. Empty on a system without /proc.
fn children() -> Vec<ChildProcess> {
    let me = std::process::id().to_string();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let numbered = entries.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Some((Pid::from_raw(pid)?, entry.path().join("stat")))
    });
    numbered
        .filter_map(|(pid, stat)| {
            let stat = std::fs::read(stat).ok()?;
            let (state, parent) = state_and_parent(&stat)?;
            let zombie = state == "Z";
            (parent == me).then_some(ChildProcess { pid, zombie })
        })
        .collect()
}

/// Parses `PID (NAME) STATE PARENT …`. The name may contain anything.
fn state_and_parent(stat: &[u8]) -> Option<(&str, &str)> {
    let name_ends = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = std::str::from_utf8(&stat[name_ends + 1..])
        .ok()?
        .split_ascii_whitespace();
    Some((fields.next()?, fields.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_cannot_pass_for_another_parent() {
        let stat = b"7 (a) S 1 (b)) Z 42 7 7 0";
        assert_eq!(state_and_parent(stat), Some(("Z", "42")));
        assert_eq!(state_and_parent(b"7 (\xff) R 1 "), Some(("R", "1")));
        assert_eq!(state_and_parent(b"7"), None);
    }
}
