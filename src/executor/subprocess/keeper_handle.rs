//! The daemon's handle of a keeper process: starts it, sends it orders, reads
//! its notices, and cleans up after it.

mod leftovers;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::warn;

use super::lifeline::{self, KEEPER_VARIABLE, Notice, Order, PROCESSES_LEFT, Spec};
use crate::devices::DeviceSet;

/// Generous, for a program on a slow disk.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Slightly longer than the keeper takes to kill a job's processes.
const CLOSE_LIMIT: Duration = Duration::from_secs(15);

/// For a keeper that should have exited already.
const EXIT_LIMIT: Duration = Duration::from_secs(3);

/// A running keeper. When dropped, the keeper kills the job's processes and
/// exits.
pub(super) struct KeeperHandle {
    notices: Lines<BufReader<OwnedReadHalf>>,
    orders: OwnedWriteHalf,
    group: Group,
    cleanup: JoinHandle<()>,
    /// When dropped, the cleanup stops waiting for the keeper to exit.
    hurry: DropGuard,
}

/// The command's process group, while its leader is not reaped: after that the
/// kernel may give its id to somebody else's group.
#[derive(Clone, Default)]
struct Group(Arc<Mutex<Option<Pid>>>);

impl Group {
    fn set(&self, leader: Option<Pid>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = leader;
    }

    fn kill(&self) {
        let leader = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leader) = leader {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

impl KeeperHandle {
    /// Starts a keeper. `fence` marks the environment of the job's processes;
    /// `devices` come free when the last of them is gone.
    pub(super) fn start(
        program: Option<&Path>,
        fence: String,
        devices: Option<Arc<DeviceSet>>,
    ) -> io::Result<(Self, ChildStdout, ChildStderr)> {
        if std::env::var_os(KEEPER_VARIABLE).is_some() {
            return Err(io::Error::other(
                "this process was started as a keeper but runs as a worker: its `main` must call `trainyard::run_as_keeper_if_asked` first",
            ));
        }
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let (notices, orders) = UnixStream::from_std(ours)?.into_split();
        let mut keeper = spawn(program, theirs)?;
        let streams = keeper.stdout.take().zip(keeper.stderr.take());
        let (stdout, stderr) = streams.ok_or(io::ErrorKind::BrokenPipe)?;
        let group = Group::default();
        let hurry = CancellationToken::new();
        let cleanup = clean_up(keeper, hurry.clone(), group.clone(), fence);
        let cleanup = async move {
            cleanup.await;
            drop(devices);
        };
        let handle = Self {
            notices: BufReader::new(notices).lines(),
            orders,
            group,
            cleanup: tokio::spawn(cleanup),
            hurry: hurry.drop_guard(),
        };
        Ok((handle, stdout, stderr))
    }

    /// Makes the keeper start the command, and returns its first notice.
    ///
    /// # Errors
    /// The keeper does not answer, or has exited.
    pub(super) async fn launch(&mut self, spec: &Spec, payload: &[u8]) -> io::Result<Notice> {
        let start = async {
            self.orders.write_all(&lifeline::line(spec)?).await?;
            self.orders.write_all(payload).await?;
            self.next_notice().await
        };
        let notice = timeout(START_LIMIT, start).await.map_err(|_| {
            io::Error::other(
                "it did not answer; a program that embeds trainyard must call `trainyard::run_as_keeper_if_asked` first in its `main`",
            )
        })??;
        if let Notice::Started(leader) = notice {
            self.group.set(Pid::from_raw(leader));
        }
        Ok(notice)
    }

    /// Cancel safe: no notice is lost.
    pub(super) async fn next_notice(&mut self) -> io::Result<Notice> {
        match self.notices.next_line().await? {
            Some(notice) => {
                let notice = serde_json::from_str(&notice)?;
                // The keeper reaps the leader before it tells of either.
                if matches!(notice, Notice::Left(_) | Notice::Ended(_)) {
                    self.group.set(None);
                }
                Ok(notice)
            }
            None => Err(io::Error::other("it was killed")),
        }
    }

    /// Sends an order without waiting. If the buffer is full, the keeper is
    /// frozen, and the order is dropped.
    pub(super) fn order(&self, order: Order) {
        let sent = lifeline::line(&order).and_then(|line| self.orders.try_write(&line));
        if let Err(error) = sent {
            warn!(%error, ?order, "cannot send an order to a keeper");
        }
    }

    /// Closes the lifeline and waits until no process of the job is left.
    pub(super) async fn close(self) {
        let Self {
            notices,
            orders,
            mut cleanup,
            hurry,
            ..
        } = self;
        drop((notices, orders));
        if timeout(CLOSE_LIMIT, &mut cleanup).await.is_err() {
            drop(hurry);
            // The cleanup goes on in the background after this.
            let _ = timeout(CLOSE_LIMIT, cleanup).await;
        }
    }

    /// Kills the job's processes at once, because the keeper has failed.
    pub(super) async fn kill(self) {
        let Self { cleanup, hurry, .. } = self;
        drop(hurry);
        let _ = timeout(CLOSE_LIMIT, cleanup).await;
    }
}

/// The command inherits the keeper's stdout and stderr. The keeper gets its own
/// process group, so that a terminal's Ctrl-C does not reach it.
fn spawn(program: Option<&Path>, lifeline: StdUnixStream) -> io::Result<Child> {
    let program = match program {
        Some(program) => program.to_owned(),
        None => lifeline::this_program()?,
    };
    let mut command = Command::new(program);
    command
        .arg0("trainyard-keeper")
        .env_clear()
        .env(KEEPER_VARIABLE, "1")
        .process_group(0)
        .stdin(Stdio::from(OwnedFd::from(lifeline)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(libraries) = std::env::var_os("LD_LIBRARY_PATH") {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    command.spawn()
}

/// Waits for the keeper to exit. If it fails, or is too slow, this kills the
/// job's processes instead, however long that takes.
async fn clean_up(mut keeper: Child, hurry: CancellationToken, group: Group, fence: String) {
    let status = tokio::select! {
        biased;
        status = keeper.wait() => status.ok(),
        () = hurry.cancelled() => None,
    };
    if status.is_some_and(|status| status.success()) {
        return;
    }
    if let Some(status) = status {
        warn!(%status, "a keeper failed; its job's processes are killed");
    }
    // A keeper that leaves processes has reaped their leader, which it may not have told.
    if status.and_then(|status| status.code()) != Some(PROCESSES_LEFT) {
        group.kill();
    }
    if status.is_none() {
        leftovers::kill_once(&fence).await;
        // The keeper sees its lifeline closed, and also kills processes that
        // have removed the fence from their environment.
        match timeout(EXIT_LIMIT, keeper.wait()).await {
            Ok(Ok(status)) if status.success() => return,
            _ => warn!("a keeper does not exit; it is killed"),
        }
    }
    // The keeper dies first, so that it cannot start anything in between.
    let _ = keeper.kill().await;
    leftovers::kill(&fence).await;
}
