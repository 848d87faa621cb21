//! The keeper: a process between the daemon and one job's command.
//!
//! It is this same program, started anew by the daemon, and it does one thing:
//! see to it that no process of the job outlives the daemon or its lease. It
//! learns that the daemon is gone when its lifeline closes, and it inherits
//! every process that the command leaves behind. It is synchronous and small
//! on purpose.

mod family;
mod launch;
mod launcher;
mod watchdog;

use std::io::{self, BufRead, BufReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use rustix::process::{Pid, Resource, Rlimit, Signal, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::lifeline::{self, Exit, LAUNCHER_MARK, MARK, Spec, Word};
use family::Group;

/// Becomes a keeper, and never returns, if this process was started as one.
///
/// The daemon starts its own program again for each job that runs a command,
/// and that one once more, to become the command.
/// A program that embeds trainyard therefore calls this first of all in its
/// `main`; [`crate::run`] does it too, but what comes before that would be
/// repeated for each job.
pub fn keep_if_asked() {
    let code = if let Some(keeper) = std::env::var_os(LAUNCHER_MARK) {
        match launcher::launch(&keeper) {
            Ok(()) => 1,
            Err(error) => failed("launcher", &error),
        }
    } else if std::env::var_os(MARK).is_some() {
        match keep() {
            Ok(()) => 0,
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

fn keep() -> io::Result<()> {
    outlive_signals()?;
    family::adopt_orphans()?;
    // A core of a training process would fill the disk.
    let no_core = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, no_core)?;
    let mut lifeline = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut orders = BufReader::new(lifeline.try_clone()?);
    let Some((spec, payload)) = read_spec(&mut orders)? else {
        return Ok(());
    };
    let (child, stdin) = match launch::launch(&spec) {
        Ok(started) => started,
        Err(failure) => return say(&mut lifeline, &failure.into_word()),
    };
    let leader = Pid::from_child(&child);
    let group = Arc::new(Group::new(leader));
    let begun = begin(stdin, payload, &mut lifeline, orders, &spec, &group);
    if begun.is_err() {
        group.signal(Signal::KILL);
    }
    family::wait_for(leader);
    let expired = group.close();
    let (exit, left) = family::sweep(leader);
    begun?;
    // A daemon that is gone need not know.
    if !left.is_empty() {
        let _ = say(&mut lifeline, &Word::Left(left.clone()));
    }
    let _ = say(&mut lifeline, &Word::Ended(Exit { expired, ..exit }));
    match left.is_empty() {
        true => Ok(()),
        // The daemon goes on killing what a keeper that has failed left.
        false => Err(io::Error::other("processes are left")),
    }
}

/// A service manager may signal every process of the service, and a terminal
/// every process on it. The daemon alone decides what becomes of its jobs. The
/// command starts with the default handlers again.
fn outlive_signals() -> io::Result<()> {
    for signal in [SIGTERM, SIGINT, SIGQUIT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    Ok(())
}

/// `None` when the daemon was gone before it had said everything.
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

/// What goes on beside the running command: it is fed, and watched.
fn begin(
    stdin: PipeWriter,
    payload: Vec<u8>,
    lifeline: &mut UnixStream,
    orders: BufReader<UnixStream>,
    spec: &Spec,
    group: &Arc<Group>,
) -> io::Result<()> {
    let (grace, valid_until) = (spec.stop_grace, spec.valid_until);
    let watched = Arc::clone(group);
    thread::Builder::new().spawn(move || watchdog::watch(orders, &watched, grace, valid_until))?;
    // Held here too they would stay open when the command has closed them.
    let nowhere = std::fs::File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    rustix::stdio::dup2_stderr(&nowhere)?;
    say(lifeline, &Word::Started(group.leader().as_raw_pid()))?;
    thread::Builder::new().spawn(move || feed(stdin, &payload))?;
    Ok(())
}

/// A command need not read its payload, and may close its stdin at any time.
fn feed(mut stdin: PipeWriter, payload: &[u8]) {
    let _ = stdin.write_all(payload);
}

fn say(lifeline: &mut UnixStream, word: &Word) -> io::Result<()> {
    lifeline.write_all(&lifeline::line(word)?)
}
