//! Starts the command, within its limits.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::super::lifeline::Spec;

/// Why a command did not start.
pub(super) struct Failure {
    pub(super) reason: String,
    pub(super) permanent: bool,
}

impl Failure {
    fn transient(what: &str, error: &io::Error) -> Self {
        Self {
            reason: format!("{what}: {error}"),
            permanent: false,
        }
    }

    /// What the program and its arguments are does not change by itself.
    fn of_start(spec: &Spec, error: &io::Error) -> Self {
        let kind = error.kind();
        let permanent = matches!(
            kind,
            io::ErrorKind::NotFound
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::ArgumentListTooLong
                | io::ErrorKind::InvalidInput
        ) || error.raw_os_error() == Some(Errno::NOEXEC.raw_os_error());
        let hint = match (kind, spec.program.is_file()) {
            (io::ErrorKind::NotFound, true) => " (it, or the interpreter in its first line)",
            _ => "",
        };
        Self {
            reason: format!("cannot run {}{hint}: {error}", spec.program.display()),
            permanent,
        }
    }
}

pub(super) fn launch(spec: &Spec) -> Result<Child, Failure> {
    // The keeper takes these two limits on itself, and the command inherits.
    if let Some(nice) = spec.limits.nice {
        rustix::process::nice(nice)
            .map_err(|error| Failure::transient("cannot set `nice`", &error.into()))?;
    }
    if let Some(files) = spec.limits.open_files {
        limit_open_files(files)
            .map_err(|error| Failure::transient("cannot set `open_files`", &error))?;
    }
    let mut command = Command::new(&spec.program);
    if let Some((name, arguments)) = spec.argv.split_first() {
        command.arg0(name).args(arguments);
    }
    command
        .env_clear()
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .process_group(0)
        .stdin(Stdio::piped());
    if let Some(cwd) = &spec.cwd {
        command.current_dir(cwd);
    }
    match spec.limits.memory {
        None => command
            .spawn()
            .map_err(|error| Failure::of_start(spec, &error)),
        Some(memory) => within_memory(memory, spec, command),
    }
}

fn limit_open_files(files: u64) -> io::Result<()> {
    let most = getrlimit(Resource::Nofile).maximum;
    let files = most.map_or(files, |most| most.min(files));
    Ok(setrlimit(Resource::Nofile, both(files))?)
}

/// The command inherits the keeper's own limit. One that is too small for the
/// keeper itself is set for the command alone, a moment after it has begun.
fn within_memory(memory: u64, spec: &Spec, mut command: Command) -> Result<Child, Failure> {
    let cannot = |error| Failure::transient("cannot set `memory`", &error);
    let most = getrlimit(Resource::As).maximum;
    let memory = most.map_or(memory, |most| most.min(memory));
    let inherited = memory.max(keepers_own());
    let inherited = most.map_or(inherited, |most| most.min(inherited));
    setrlimit(Resource::As, both(inherited)).map_err(|error| cannot(error.into()))?;
    let started = command.spawn();
    let mut child = started.map_err(|error| Failure::of_start(spec, &error))?;
    if memory < inherited
        && let Err(error) = limit_child(&child, memory)
    {
        let _ = child.kill();
        let _ = child.wait();
        return Err(cannot(error));
    }
    Ok(child)
}

fn both(limit: u64) -> Rlimit {
    Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    }
}

#[cfg(target_os = "linux")]
fn limit_child(child: &Child, memory: u64) -> io::Result<()> {
    let pid = rustix::process::Pid::from_child(child);
    match rustix::process::prlimit(Some(pid), Resource::As, both(memory)) {
        // It has ended already.
        Ok(_) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(target_os = "linux"))]
#[expect(clippy::unnecessary_wraps, reason = "it can fail on Linux")]
fn limit_child(_: &Child, _: u64) -> io::Result<()> {
    Ok(())
}

/// The address space that this process has, and what its threads will need, in
/// bytes.
fn keepers_own() -> u64 {
    const THREADS: u64 = 64 << 20;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kilobytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSize:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok());
    kilobytes.map_or(0, |kilobytes: u64| kilobytes * 1024 + THREADS)
}
