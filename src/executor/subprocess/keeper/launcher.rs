//! The launcher: what a command's process is until it becomes the command. It
//! takes on itself what the command is to inherit: its limits, and to die with
//! its keeper.

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

use super::super::lifeline::{self, Limits, Spec};
use super::launch::Failure;

const SCRIPT: &[u8] = b"#!";
/// ELF, and what macOS has, in either order of bytes.
const BINARIES: &[&[u8]] = &[
    b"\x7fELF",
    b"\xfe\xed\xfa\xce",
    b"\xfe\xed\xfa\xcf",
    b"\xca\xfe\xba\xbe",
];

/// Becomes the command, and returns only if it cannot; the keeper knows why
/// then. `keeper` is its process id.
pub(super) fn launch(keeper: &OsStr) -> io::Result<()> {
    // A copy, which closes by itself when this becomes the command.
    let mut control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let failure = match receive(&mut control) {
        Ok((spec, stdin)) => become_command(&spec, stdin, keeper),
        Err(error) => Failure::transient("its launcher failed", &error),
    };
    control.write_all(&lifeline::line(&failure.into_word())?)
}

/// What to become, and the command's stdin.
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
    let stdin = stdin.ok_or_else(|| io::Error::other("no stdin came for the command"))?;
    fcntl_setfd(&stdin, FdFlags::CLOEXEC)?;
    let mut spec = Vec::new();
    control.read_to_end(&mut spec)?;
    Ok((serde_json::from_slice(&spec)?, stdin))
}

fn become_command(spec: &Spec, stdin: OwnedFd, keeper: &OsStr) -> Failure {
    if let Err(error) = die_with(keeper) {
        return Failure::transient("cannot bind it to its keeper", &error);
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
    match take_limits(&spec.limits) {
        Ok(()) if is_program(&spec.program) => Failure::of_start(spec, &command.exec()),
        Ok(()) => Failure::of_start(spec, &Errno::NOEXEC.into()),
        Err(failure) => failure,
    }
}

/// What the kernel does not take for a program the C library hands to a shell,
/// which would make something else of it. A file that can be run and not read
/// is taken for one.
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

/// The command is killed when its keeper dies. A program that gains privileges
/// when it starts (set-user-ID) is exempt; so the kernel has it.
#[cfg(target_os = "linux")]
fn die_with(keeper: &OsStr) -> io::Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died before that.
    let parent = getppid().map(|parent| parent.as_raw_pid().to_string());
    match parent.is_some_and(|parent| keeper == parent.as_str()) {
        true => Ok(()),
        false => Err(io::Error::other("it is gone")),
    }
}

#[cfg(not(target_os = "linux"))]
#[expect(clippy::unnecessary_wraps, reason = "it can fail on Linux")]
fn die_with(_: &OsStr) -> io::Result<()> {
    Ok(())
}

fn take_limits(limits: &Limits) -> Result<(), Failure> {
    if let Some(nice) = limits.nice {
        rustix::process::nice(nice)
            .map_err(|error| Failure::transient("cannot set `nice`", &error.into()))?;
    }
    if let Some(files) = limits.open_files {
        lower(Resource::Nofile, files)
            .map_err(|error| Failure::transient("cannot set `open_files`", &error))?;
    }
    if let Some(memory) = limits.memory {
        // It may be less than this process has already; then what it needs to
        // become the command must be at hand.
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
