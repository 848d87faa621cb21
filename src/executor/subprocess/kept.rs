//! The daemon's side of a keeper: starts it, tells it what to do, hears how the
//! command ended, and sees to it that nothing is left where the keeper itself
//! was ended.

mod leftovers;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, OnceLock};
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

use super::lifeline::{self, MARK, Order, Spec, Word};
use crate::devices::DeviceSet;

/// For a program on a slow disk.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A little longer than the keeper tries to end what is left of a job.
const LAST_WORDS: Duration = Duration::from_secs(15);

/// For a keeper whose job should have ended before.
const LAST_CHANCE: Duration = Duration::from_secs(3);

/// A running keeper. Dropping it makes the keeper kill everything and go.
pub(super) struct Kept {
    words: Lines<BufReader<OwnedReadHalf>>,
    orders: OwnedWriteHalf,
    group: Arc<OnceLock<Pid>>,
    gone: JoinHandle<()>,
    /// Tells the task behind `gone` that there is no time left.
    over: DropGuard,
}

impl Kept {
    /// Starts a keeper. `fence` is in the environment of what it will run,
    /// which has `devices` to itself until all of it is gone.
    pub(super) fn start(
        keeper: Option<&Path>,
        fence: String,
        devices: Option<Arc<DeviceSet>>,
    ) -> io::Result<(Self, ChildStdout, ChildStderr)> {
        if std::env::var_os(MARK).is_some() {
            return Err(io::Error::other(
                "this program was started to keep a job and did not: its `main` must call `trainyard::keep_if_asked` first",
            ));
        }
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let (words, orders) = UnixStream::from_std(ours)?.into_split();
        let mut keeper = spawn(keeper, theirs)?;
        let streams = keeper.stdout.take().zip(keeper.stderr.take());
        let (stdout, stderr) = streams.ok_or(io::ErrorKind::BrokenPipe)?;
        let group = Arc::new(OnceLock::new());
        let over = CancellationToken::new();
        let seen_out = see_out(keeper, over.clone(), Arc::clone(&group), fence);
        let seen_out = async move {
            seen_out.await;
            drop(devices);
        };
        let kept = Self {
            words: BufReader::new(words).lines(),
            orders,
            group,
            gone: tokio::spawn(seen_out),
            over: over.drop_guard(),
        };
        Ok((kept, stdout, stderr))
    }

    /// Has the keeper start the command. What it says next is for
    /// [`Kept::next_word`].
    ///
    /// # Errors
    /// It did not answer, or is gone.
    pub(super) async fn launch(&mut self, spec: &Spec, payload: &[u8]) -> io::Result<Word> {
        let start = async {
            self.orders.write_all(&lifeline::line(spec)?).await?;
            self.orders.write_all(payload).await?;
            self.next_word().await
        };
        let word = timeout(START_LIMIT, start).await.map_err(|_| {
            io::Error::other(
                "it did not answer; a program that embeds trainyard must call `trainyard::keep_if_asked` first in its `main`",
            )
        })??;
        if let Word::Started(leader) = word
            && let Some(leader) = Pid::from_raw(leader)
        {
            let _ = self.group.set(leader);
        }
        Ok(word)
    }

    /// May be dropped and called again: no word is lost.
    pub(super) async fn next_word(&mut self) -> io::Result<Word> {
        match self.words.next_line().await? {
            Some(word) => Ok(serde_json::from_str(&word)?),
            None => Err(io::Error::other("it was killed")),
        }
    }

    /// Sends an order, if there is room for it: a keeper that does not read is
    /// stopped, and will find the lifeline closed when it goes on.
    pub(super) fn order(&self, order: Order) {
        let sent = lifeline::line(&order).and_then(|line| self.orders.try_write(&line));
        if let Err(error) = sent {
            warn!(%error, ?order, "the keeper of a job could not be told");
        }
    }

    /// Closes the lifeline and waits until nothing of the job is left.
    pub(super) async fn close(self) {
        let Self {
            words,
            orders,
            mut gone,
            over,
            ..
        } = self;
        drop((words, orders));
        if timeout(LAST_WORDS, &mut gone).await.is_err() {
            drop(over);
            // It ends by itself also where nobody waits for it.
            let _ = timeout(LAST_WORDS, gone).await;
        }
    }

    /// The same for a keeper that has failed: what it kept is killed at once.
    pub(super) async fn end(self) {
        let Self { gone, over, .. } = self;
        drop(over);
        let _ = timeout(LAST_WORDS, gone).await;
    }
}

/// The command inherits the keeper's stdout and stderr. The keeper has its own
/// process group, so that a terminal's Ctrl-C does not reach it.
fn spawn(keeper: Option<&Path>, lifeline: StdUnixStream) -> io::Result<Child> {
    let program = match keeper {
        Some(program) => program.to_owned(),
        None => lifeline::this_program()?,
    };
    let mut command = Command::new(program);
    command
        .arg0("trainyard-keeper")
        .env_clear()
        .env(MARK, "1")
        .process_group(0)
        .stdin(Stdio::from(OwnedFd::from(lifeline)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(libraries) = std::env::var_os("LD_LIBRARY_PATH") {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    command.spawn()
}

/// Waits for the keeper's end. A keeper that was ended itself, or that is too
/// slow, could not end its job; then this does, for as long as it takes.
async fn see_out(
    mut keeper: Child,
    over: CancellationToken,
    group: Arc<OnceLock<Pid>>,
    fence: String,
) {
    let status = tokio::select! {
        biased;
        status = keeper.wait() => status.ok(),
        () = over.cancelled() => None,
    };
    if status.is_some_and(|status| status.success()) {
        return;
    }
    if let Some(status) = status {
        warn!(%status, "the keeper of a job failed; what it kept is killed");
    }
    if let Some(group) = group.get() {
        let _ = kill_process_group(*group, Signal::KILL);
    }
    if status.is_none() {
        leftovers::kill_once(&fence).await;
        // It finds its lifeline closed, and also kills what hides its origin.
        match timeout(LAST_CHANCE, keeper.wait()).await {
            Ok(Ok(status)) if status.success() => return,
            _ => warn!("the keeper of a job does not end; it is killed"),
        }
    }
    // Only now the rest, so that it does not begin anything in between.
    let _ = keeper.kill().await;
    leftovers::kill(&fence).await;
}
