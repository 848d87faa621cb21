//! The processes of a job: the command, its process group, and whatever they
//! have left behind.

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

use super::super::lifeline::Exit;

/// A process that the kernel cannot end (it hangs in a driver) must not keep
/// its job's slot forever.
const SWEEP_LIMIT: Duration = Duration::from_secs(10);

/// The command's process group, for as long as its id is surely its own.
pub(super) struct Group {
    leader: Pid,
    /// The leader has ended, and its id may go to another process soon.
    over: Mutex<bool>,
    expired: AtomicBool,
}

impl Group {
    pub(super) fn new(leader: Pid) -> Self {
        Self {
            leader,
            over: Mutex::new(false),
            expired: AtomicBool::new(false),
        }
    }

    pub(super) fn leader(&self) -> Pid {
        self.leader
    }

    pub(super) fn signal(&self, signal: Signal) {
        let over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        if !*over {
            // It fails only if the group is gone, or not ours to signal.
            let _ = kill_process_group(self.leader, signal);
        }
    }

    /// The word of the daemon has run out.
    pub(super) fn expire(&self) {
        self.expired.store(true, Ordering::Relaxed);
    }

    /// From here on nothing is signalled. Whether the word had run out.
    pub(super) fn close(&self) -> bool {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.expired.load(Ordering::Relaxed)
    }
}

/// Processes that lose their parent come to this one instead of to init.
#[cfg(target_os = "linux")]
pub(super) fn adopt_orphans() -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(Some(
        rustix::process::getpid(),
    ))?)
}

#[cfg(not(target_os = "linux"))]
#[expect(clippy::unnecessary_wraps, reason = "it can fail on Linux")]
pub(super) fn adopt_orphans() -> io::Result<()> {
    Ok(())
}

/// Waits for the command's end and leaves it unreaped, so that its id stays
/// its own. Adopted processes that end meanwhile are reaped; the leader never,
/// as its exit status would be gone with it.
pub(super) fn wait_for(leader: Pid) {
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
        // The leader may have become one since it was looked at.
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

/// Kills what is left of the job and reaps it, the ended leader included. Says
/// how the leader ended, if that can be known, and which of the others do not
/// end.
pub(super) fn sweep(leader: Pid) -> (Exit, Vec<i32>) {
    // The unreaped leader keeps the group's id from being anybody else's.
    let _ = kill_process_group(leader, Signal::KILL);
    // Whatever comes of it, the rest of the family must not outlive this.
    let exit = status_of(leader).map(exit_of).unwrap_or_default();
    let started = Instant::now();
    let mut pause = Duration::from_millis(1);
    while started.elapsed() < SWEEP_LIMIT {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => continue,
            Ok(None) => {}
            Err(_) => return (exit, Vec::new()),
        }
        // Those of theirs come here when they are dead, for the next round.
        for child in children() {
            let _ = kill_process(child.pid, Signal::KILL);
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    let left = children().into_iter().filter(|child| !child.zombie);
    (exit, left.map(|child| child.pid.as_raw_pid()).collect())
}

fn status_of(leader: Pid) -> Option<WaitStatus> {
    loop {
        match waitpid(Some(leader), WaitOptions::empty()) {
            Ok(ended) => return ended.map(|(_, status)| status),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

fn exit_of(status: WaitStatus) -> Exit {
    Exit {
        code: status.exit_status(),
        signal: status.terminating_signal(),
        expired: false,
    }
}

struct ChildProcess {
    pid: Pid,
    zombie: bool,
}

/// This process's children. Empty where there is no /proc.
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

/// Out of `PID (NAME) STATE PARENT …`, where the name may hold anything.
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
