//! The launcher: the process that becomes the command. Before that, it sets what
//! the command inherits: the resource limits, and the signal that kills it when
//! its keeper dies.

use std::ffi::OsStr;
use std::fs::File;
use std::hint::black_box;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::super::lifeline::{self, ResourceLimits, Spec};
use super::launch::Failure;

const SCRIPT: &[u8] = b"#!";
/// ELF, and the formats of macOS in either byte order.
const BINARIES: &[&[u8]] = &[
    b"\x7fELF",
    b"\xfe\xed\xfa\xce",
    b"\xfe\xed\xfa\xcf",
    b"\xca\xfe\xba\xbe",
];

/// Becomes the command. Returns only on failure, after telling the keeper why.
pub(super) fn run(keeper_pid: &OsStr) -> io::Result<()> {
    // The copy is close-on-exec: it closes when this becomes the command.
    let mut control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let failure = match receive(&mut control) {
        Ok((spec, stdin)) => become_command(&spec, stdin, keeper_pid),
        Err(error) => Failure::transient("the launcher failed", &error),
    };
    control.write_all(&lifeline::line(&failure.into_notice())?)
}

/// The command to become, and its stdin.
fn receive(control: &mut UnixStream) -> io::Result<(Spec, OwnedFd)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    recvmsg(&*control, &mut data, &mut ancillary, RecvFlags::empty())?;
    let stdin = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let stdin = stdin.ok_or_else(|| io::Error::other("the command's stdin is missing"))?;
    fcntl_setfd(&stdin, FdFlags::CLOEXEC)?;
    let mut spec = Vec::new();
    control.read_to_end(&mut spec)?;
    Ok((serde_json::from_slice(&spec)?, stdin))
}

fn become_command(spec: &Spec, stdin: OwnedFd, keeper_pid: &OsStr) -> Failure {
    if let Err(error) = die_with(keeper_pid) {
        return Failure::transient("cannot bind the command to its keeper", &error);
    }
    let mut command = Command::new(&spec.program);
    if let Some((name, arguments)) = spec.argv.split_first() {
        command.arg0(name).args(arguments);
    }
    command
        .env_clear()
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::from(stdin));
    if let Some(cwd) = &spec.cwd {
        command.current_dir(cwd);
    }
    match apply_limits(&spec.limits) {
        Ok(()) if is_program(&spec.program) => Failure::of_exec(spec, &command.exec()),
        Ok(()) => Failure::of_exec(spec, &Errno::NOEXEC.into()),
        Err(failure) => failure,
    }
}

/// Whether the kernel can execute the file. The C library would pass any other
/// file to a shell. A file that cannot be read counts as a program.
fn is_program(path: &Path) -> bool {
    let mut magic = Vec::new();
    let read = File::open(path).and_then(|file| file.take(4).read_to_end(&mut magic));
    let known = |beginning: &[u8]| {
        magic.starts_with(beginning)
            || magic
                .iter()
                .rev()
                .copied()
                .take(4)
                .eq(beginning.iter().copied())
    };
    read.is_err() || magic.starts_with(SCRIPT) || BINARIES.iter().any(|magic| known(magic))
}

/// Makes the kernel kill the command when its keeper dies. The kernel exempts
/// programs that gain privileges when they start (set-user-ID).
#[cfg(target_os = "linux")]
fn die_with(keeper_pid: &OsStr) -> io::Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The keeper may have died before the call.
    let parent = getppid().map(|parent| parent.as_raw_pid().to_string());
    match parent.is_some_and(|parent| keeper_pid == parent.as_str()) {
        true => Ok(()),
        false => Err(io::Error::other("the keeper is gone")),
    }
}

#[cfg(not(target_os = "linux"))]
#[expect(clippy::unnecessary_wraps, reason = "it can fail on Linux")]
fn die_with(_: &OsStr) -> io::Result<()> {
    Ok(())
}

fn apply_limits(limits: &ResourceLimits) -> Result<(), Failure> {
    if let Some(nice) = limits.nice {
        rustix::process::nice(nice)
            .map_err(|error| Failure::transient("cannot set `nice`", &error.into()))?;
    }
    if let Some(files) = limits.open_files {
        lower(Resource::Nofile, files)
            .map_err(|error| Failure::transient("cannot set `open_files`", &error))?;
    }
    if let Some(memory) = limits.memory {
        // The limit may be below what this process uses already, so memory for
        // the exec is reserved first.
        drop(black_box(Vec::<u8>::with_capacity(100 << 10)));
        lower(Resource::As, memory)
            .map_err(|error| Failure::transient("cannot set `memory`", &error))?;
    }
    Ok(())
}

fn lower(resource: Resource, limit: u64) -> io::Result<()> {
    let most = getrlimit(resource).maximum;
    let limit = Some(most.map_or(limit, |most| most.min(limit)));
    let both = Rlimit {
        current: limit,
        maximum: limit,
    };
    Ok(setrlimit(resource, both)?)
}
