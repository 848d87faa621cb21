//! Starts the command, by way of a launcher.

use std::io::{self, IoSlice, PipeReader, PipeWriter, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::super::lifeline::{self, KEEPER_VARIABLE, LAUNCHER_VARIABLE, Notice, Spec};

/// Why a command did not start.
pub(super) struct Failure {
    pub(super) reason: String,
    pub(super) permanent: bool,
}

impl Failure {
    pub(super) fn transient(what: &str, error: &io::Error) -> Self {
        Self {
            reason: format!("{what}: {error}"),
            permanent: false,
        }
    }

    /// Permanent if the error lies in the program or its arguments.
    pub(super) fn of_exec(spec: &Spec, error: &io::Error) -> Self {
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

    pub(super) fn into_notice(self) -> Notice {
        let Self { reason, permanent } = self;
        Notice::NotStarted { reason, permanent }
    }
}

/// Starts the command, and returns it with the other end of its stdin. The
/// calling thread must live as long as the keeper: the kernel takes the end of
/// the thread that started a process for the death of the parent.
pub(super) fn launch(spec: &Spec) -> Result<(Child, PipeWriter), Failure> {
    let cannot = |error| Failure::transient("cannot start a launcher", &error);
    let (control, theirs) = UnixStream::pair().map_err(cannot)?;
    let (stdin, feed) = io::pipe().map_err(cannot)?;
    let mut child = spawn(theirs).map_err(cannot)?;
    let failure = match hand_over(spec, control, stdin) {
        Ok(None) => return Ok((child, feed)),
        Ok(Some(failure)) => failure,
        Err(error) => cannot(error),
    };
    let _ = child.kill();
    let _ = child.wait();
    Err(failure)
}

/// The launcher is this program once more. It becomes the command, so it leads
/// the command's process group from the start.
fn spawn(control: UnixStream) -> io::Result<Child> {
    let program = lifeline::this_program()?;
    Command::new(program)
        .arg0("trainyard-launcher")
        .env_remove(KEEPER_VARIABLE)
        .env(LAUNCHER_VARIABLE, std::process::id().to_string())
        .process_group(0)
        .stdin(Stdio::from(OwnedFd::from(control)))
        .spawn()
}

/// Sends the launcher the command to become, and waits until it has. Returns
/// the failure, if any.
fn hand_over(
    spec: &Spec,
    mut control: UnixStream,
    stdin: PipeReader,
) -> io::Result<Option<Failure>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [stdin.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    // A descriptor can be sent only along with data.
    let data = [IoSlice::new(b" ")];
    sendmsg(&control, &data, &mut ancillary, SendFlags::empty())?;
    drop(stdin);
    control.write_all(&lifeline::line(spec)?)?;
    control.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    // Its end closes when the launcher has become the command.
    control.read_to_end(&mut answer)?;
    if answer.is_empty() {
        return Ok(None);
    }
    match serde_json::from_slice(&answer)? {
        Notice::NotStarted { reason, permanent } => Ok(Some(Failure { reason, permanent })),
        other => Err(io::Error::other(format!("unexpected answer: {other:?}"))),
    }
}
