//! Child processes of a bench, and the processor time that processes use.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::database::Outcome;

/// What Linux counts processor time in.
const TICK: Duration = Duration::from_millis(10);

/// A child process. Killed when dropped.
pub struct Process(Child);

impl Process {
    /// Starts a command; what it prints goes to a file.
    pub fn start(command: &mut Command, output: &Path) -> Outcome<Self> {
        let output = fs::File::create(output)?;
        let command = command.stdin(Stdio::null()).stderr(output.try_clone()?);
        Ok(Self(command.stdout(output).spawn()?))
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Fails if the process has ended.
    pub fn check(&mut self) -> Outcome {
        match self.0.try_wait()? {
            None => Ok(()),
            Some(status) => Err(format!("a process that is measured has ended: {status}").into()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program that is measured, without the environment's own settings for it.
pub fn trainyard() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainyard"));
    for (name, _) in std::env::vars() {
        if name.starts_with("TRAINYARD_") || name.starts_with("PUBSUB_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command
}

/// Processor time of a process and its ended children.
pub fn processor_time(pid: u32) -> Outcome<Duration> {
    let fields = stat(pid)?;
    // utime, stime, cutime, cstime: fields 14 to 17 of proc(5), counted from the state.
    let ticks: u32 = fields[11..15]
        .iter()
        .map(|ticks| ticks.parse().unwrap_or(0))
        .sum();
    Ok(TICK * ticks)
}

/// Processor time of a process and all its children, alive or ended.
pub fn processor_time_of_family(pid: u32) -> Outcome<Duration> {
    let mut total = processor_time(pid)?;
    for entry in fs::read_dir("/proc")? {
        let Some(child) = number(&entry?.file_name()) else {
            continue;
        };
        // One that has just ended is counted by its parent.
        if parent(child).is_ok_and(|parent| parent == pid) {
            total += processor_time(child).unwrap_or_default();
        }
    }
    Ok(total)
}

pub fn parent(pid: u32) -> Outcome<u32> {
    Ok(stat(pid)?[1].parse()?)
}

fn number(name: &OsStr) -> Option<u32> {
    name.to_str()?.parse().ok()
}

/// The fields of /proc/PID/stat from the state on.
fn stat(pid: u32) -> Outcome<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = text.rsplit_once(") ").ok_or("an odd /proc/PID/stat")?;
    Ok(fields.split(' ').map(str::to_owned).collect())
}
