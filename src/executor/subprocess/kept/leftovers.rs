//! The processes of a run whose keeper is gone, found by the fence in their
//! environment.

use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::super::environment::FENCE;

/// A process that forks all the time may take some.
const ROUNDS: u32 = 50;

/// Kills them, and looks again until there are none. Does nothing where there
/// is no /proc.
pub(super) fn kill(fence: &str) {
    let mark = format!("{FENCE}={fence}");
    for _ in 0..ROUNDS {
        let found = marked(&mark);
        if found.is_empty() {
            return;
        }
        for process in found {
            let _ = kill_process(process, Signal::KILL);
        }
        sleep(Duration::from_millis(10));
    }
}

fn marked(mark: &str) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let processes = entries.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        let is_marked = environment
            .split(|byte| *byte == 0)
            .any(|variable| variable == mark.as_bytes());
        is_marked.then(|| Pid::from_raw(pid))?
    });
    processes.collect()
}
