//! The keeper: a process between the daemon and one job's command.
//!
//! The daemon starts this program again as the keeper. The keeper kills the
//! job's processes when the daemon dies or the lease expires. It notices the
//! daemon's death because its lifeline closes. As a subreaper it inherits the
//! processes that the command leaves behind. It is synchronous and small on
//! purpose.
//!
//! The keeper starts the program once more as a launcher, which becomes the
//! command. The command stays unreaped until its group has been killed, so that
//! no signal reaches another group with the same id. The keeper tells of the end
//! only when no process is left, so the output's pipes are closed by then.
//!
//! The limits: only Linux has subreapers, parent-death signals and /proc;
//! elsewhere only the process group is killed. A process with another user's
//! rights cannot be killed. If daemon and keeper are killed at the same moment,
//! the kernel kills the command, but its helper processes may be left.

mod launch;
mod launcher;
mod process_tree;
mod watchdog;

use std::io::{self, BufRead, BufReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use rustix::process::{Pid, Resource, Rlimit, Signal, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::lifeline::{
    self, ExitStatus, KEEPER_VARIABLE, LAUNCHER_VARIABLE, Notice, PROCESSES_LEFT, Spec,
};
use process_tree::ProcessGroup;

/// If this process was started as a keeper, runs it and does not return.
///
/// For each job with a command the daemon starts its own program again as the
/// keeper, and the keeper starts it once more to become the command. So a
/// program that embeds trainyard calls this first in its `main`. [`crate::run`]
/// calls it too, but any code before that would run again for each job.
pub fn run_as_keeper_if_asked() {
    let code = if let Some(keeper_pid) = std::env::var_os(LAUNCHER_VARIABLE) {
        match launcher::run(&keeper_pid) {
            Ok(()) => 1,
            Err(error) => failed("launcher", &error),
        }
    } else if std::env::var_os(KEEPER_VARIABLE).is_some() {
        match run() {
            Ok(code) => code,
            Err(error) => failed("keeper", &error),
        }
    } else {
        return;
    };
    std::process::exit(code);
}

fn failed(who: &str, error: &io::Error) -> i32 {
    eprintln!("trainyard: the {who} of a job failed: {error}");
    1
}

/// Returns the exit code.
fn run() -> io::Result<i32> {
    ignore_signals()?;
    process_tree::become_subreaper()?;
    // The core dump of a training process could fill the disk.
    let no_core = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, no_core)?;
    let mut lifeline = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut orders = BufReader::new(lifeline.try_clone()?);
    let Some((spec, payload)) = read_spec(&mut orders)? else {
        return Ok(0);
    };
    let (child, stdin) = match launch::launch(&spec) {
        Ok(started) => started,
        Err(failure) => {
            notify(&mut lifeline, &failure.into_notice())?;
            return Ok(0);
        }
    };
    let leader = Pid::from_child(&child);
    let group = Arc::new(ProcessGroup::new(leader));
    let attended = attend(stdin, payload, &mut lifeline, orders, &spec, &group);
    if attended.is_err() {
        group.signal(Signal::KILL);
    }
    process_tree::wait_for_exit(leader);
    let expired = group.close();
    let (exit, left) = process_tree::kill_all(leader);
    attended?;
    // The daemon may be gone; then nobody reads these.
    if !left.is_empty() {
        let _ = notify(&mut lifeline, &Notice::Left(left.clone()));
    }
    let _ = notify(
        &mut lifeline,
        &Notice::Ended(ExitStatus { expired, ..exit }),
    );
    Ok(match left.is_empty() {
        true => 0,
        false => PROCESSES_LEFT,
    })
}

/// A service manager may signal every process of the service, and a terminal
/// every process on it, but only the daemon stops jobs. These are handlers, as the
/// command would inherit SIG_IGN.
fn ignore_signals() -> io::Result<()> {
    for signal in [SIGTERM, SIGINT, SIGQUIT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    Ok(())
}

/// `None` if the daemon died before it had sent everything.
fn read_spec(orders: &mut BufReader<UnixStream>) -> io::Result<Option<(Spec, Vec<u8>)>> {
    let mut line = Vec::new();
    orders.read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Ok(None);
    }
    let spec: Spec = serde_json::from_slice(&line)?;
    let mut payload = vec![0; spec.payload];
    match orders.read_exact(&mut payload) {
        Ok(()) => Ok(Some((spec, payload))),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Starts the threads that feed the command and watch the lifeline.
fn attend(
    stdin: PipeWriter,
    payload: Vec<u8>,
    lifeline: &mut UnixStream,
    orders: BufReader<UnixStream>,
    spec: &Spec,
    group: &Arc<ProcessGroup>,
) -> io::Result<()> {
    let (grace, valid_until) = (spec.stop_grace, spec.valid_until);
    let watched = Arc::clone(group);
    thread::Builder::new().spawn(move || watchdog::watch(orders, &watched, grace, valid_until))?;
    // Otherwise they would stay open after the command has closed them.
    let null = std::fs::File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    notify(lifeline, &Notice::Started(group.leader().as_raw_pid()))?;
    thread::Builder::new().spawn(move || feed(stdin, &payload))?;
    Ok(())
}

/// Errors do not count: a command need not read its payload.
fn feed(mut stdin: PipeWriter, payload: &[u8]) {
    let _ = stdin.write_all(payload);
}

fn notify(lifeline: &mut UnixStream, notice: &Notice) -> io::Result<()> {
    lifeline.write_all(&lifeline::line(notice)?)
}
