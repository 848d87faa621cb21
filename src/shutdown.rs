//! Stopping: a signal becomes a token, a second one means at once.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How far a stop has come. Clones see the same stop.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// No new work is begun.
    pub draining: CancellationToken,
    /// What still runs is asked to stop.
    pub stopping: CancellationToken,
    /// What still has to be written is given up.
    pub giving_up: CancellationToken,
}

impl Shutdown {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Follows SIGTERM and SIGINT: the first drains, the second stops at once.
    ///
    /// # Errors
    /// The process may not install signal handlers.
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
                        "signalled again while stopping: the process ends now"
                    );
                    std::process::exit(1);
                }
                if following.draining.is_cancelled() {
                    warn!(signal = name, "second signal: stopping at once");
                    following.stopping.cancel();
                    continue;
                }
                info!(signal = name, "stopping; a second signal stops at once");
                following.draining.cancel();
            }
        });
        Ok(shutdown)
    }

    /// Asks for a clean stop.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Lets what runs run for `patience` after the drain began, then asks it
    /// to stop; earlier when the second signal comes. `last_words` later it
    /// gives up what could not be written.
    pub async fn stop_after(&self, patience: Duration, last_words: Duration) {
        self.draining.cancelled().await;
        tokio::select! {
            () = self.stopping.cancelled() => {}
            () = tokio::time::sleep(patience) => self.stopping.cancel(),
        }
        tokio::time::sleep(last_words).await;
        self.giving_up.cancel();
    }
}
