//! Turns signals into cancellation tokens.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
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

    /// Handles SIGTERM and SIGINT: the first drains, the second asks runs to stop
    /// now, the third ends the process.
    ///
    /// # Errors
    /// The signal handlers cannot be installed.
    pub fn on_signals() -> std::io::Result<Self> {
        let shutdown = Self::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let following = shutdown.clone();
        tokio::spawn(async move {
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
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
