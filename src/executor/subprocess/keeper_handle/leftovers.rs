//! Finds and kills the processes of a run whose keeper is gone, by the fence in
//! their environment.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::warn;

use super::super::environment::FENCE;

/// A process that forks all the time may need several.
const QUICK_ROUNDS: u32 = 50;

/// Kills the processes until none is left. A process that hangs in a driver
/// holds its GPU until it is gone. Does nothing on a system without /proc.
pub(super) async fn kill(fence: &str) {
    let mut rounds = 0_u32;
    loop {
        let found = kill_once(fence).await;
        if found.is_empty() {
            return;
        }
        rounds = rounds.saturating_add(1);
        if rounds == QUICK_ROUNDS {
            warn!(pids = ?found, "processes of a run do not end; its GPUs stay in use until they do");
        }
        sleep(match rounds < QUICK_ROUNDS {
            true => Duration::from_millis(10),
            false => Duration::from_secs(1),
        })
        .await;
    }
}

/// Kills the processes that exist now, and returns their ids.
pub(super) async fn kill_once(fence: &str) -> Vec<i32> {
    let variable = format!("{FENCE}={fence}");
    let killed = spawn_blocking(move || {
        let found = processes_with(&variable);
        for process in &found {
            let _ = kill_process(*process, Signal::KILL);
        }
        found.into_iter().map(Pid::as_raw_pid).collect()
    });
    killed.await.unwrap_or_default()
}

fn processes_with(variable: &str) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let processes = entries.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        let has_variable = environment
            .split(|byte| *byte == 0)
            .any(|found| found == variable.as_bytes());
        has_variable.then(|| Pid::from_raw(pid))?
    });
    processes.collect()
}
