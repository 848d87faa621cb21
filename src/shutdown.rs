//! Turns signals into cancellation tokens.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// The phases of a shutdown. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// No new work starts.
    pub draining: CancellationToken,
    /// Runs are asked to stop.
    pub stopping: CancellationToken,
    /// Unfinished writes are given up.
    pub giving_up: CancellationToken,
}

impl Shutdown {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Handles SIGTERM, SIGINT, SIGHUP and SIGQUIT: the first one drains, the second asks
    /// runs to stop now, the third ends the process. SIGHUP stays ignored if it was, as
    /// under `nohup`.
    ///
    /// # Errors
    /// The signal handlers cannot be installed.
    pub fn on_signals() -> io::Result<Self> {
        let shutdown = Self::new();
        let mut signals = Signals::install()?;
        let following = shutdown.clone();
        tokio::spawn(async move {
            loop {
                let name = signals.next().await;
                if following.stopping.is_cancelled() {
                    warn!(
                        signal = name,
                        "another signal while stopping: the process exits now"
                    );
                    std::process::exit(1);
                }
                if following.draining.is_cancelled() {
                    warn!(
                        signal = name,
                        "second signal: what still runs is asked to stop now"
                    );
                    following.stopping.cancel();
                    continue;
                }
                info!(
                    signal = name,
                    "stopping; a second signal does not wait for what still runs"
                );
                following.draining.cancel();
            }
        });
        Ok(shutdown)
    }

    /// Starts a graceful shutdown.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Asks runs to stop when `grace` has passed since the drain started, or at the
    /// second signal. Gives up unfinished writes when `write_limit` has passed after
    /// that.
    pub async fn stop_after(&self, grace: Duration, write_limit: Duration) {
        self.draining.cancelled().await;
        tokio::select! {
            () = self.stopping.cancelled() => {}
            () = tokio::time::sleep(grace) => self.stopping.cancel(),
        }
        tokio::time::sleep(write_limit).await;
        self.giving_up.cancel();
    }
}

/// The signals that stop the process.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    /// None if it was ignored when the process started.
    hangup: Option<Signal>,
}

impl Signals {
    fn install() -> io::Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let hangup = match ignores_hangup(&status) {
            true => None,
            false => Some(signal(SignalKind::hangup())?),
        };
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            hangup,
        })
    }

    /// The name of the next one.
    async fn next(&mut self) -> &'static str {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.quit.recv() => "SIGQUIT",
            _ = hangup => "SIGHUP",
        }
    }
}

/// Whether `/proc/self/status` says that the process ignores SIGHUP, number 1. Without
/// `/proc` it counts as not ignored.
fn ignores_hangup(status: &str) -> bool {
    let mut lines = status.lines();
    let mask = lines.find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_bit_of_the_mask_means_hangup() {
        for (mask, ignored) in [("0000000000001001", true), ("0000000000001002", false)] {
            let status = format!("Name:\ttrainyard\nSigBlk:\t01\nSigIgn:\t{mask}\n");
            assert_eq!(ignores_hangup(&status), ignored);
        }
    }
}
