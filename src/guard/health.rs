//! Whether the database answers: while it does not, nothing is pulled.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::retry::Backoff;
use crate::store::{Store, StoreError};

/// Pauses between pings of a database that is away.
const PING: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// What is known about the database. Clones know the same.
#[derive(Debug, Clone)]
pub(super) struct Health {
    up: Arc<watch::Sender<bool>>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            up: Arc::new(watch::Sender::new(true)),
        }
    }
}

impl Health {
    pub(super) fn watch(&self) -> watch::Receiver<bool> {
        self.up.subscribe()
    }

    /// Takes note of an answer, or of there being none.
    pub(super) fn heard(&self, failure: Option<&StoreError>) {
        if let Some(failure) = failure.filter(|failure| failure.is_passing())
            && self.up.send_replace(false)
        {
            warn!(%failure, "the database is away: pulling pauses");
        }
    }

    /// Pings the database whenever it is away, until it is back. Never ends.
    pub(super) async fn keep_looking(&self, store: &dyn Store) {
        let mut up = self.watch();
        let mut backoff = Backoff::new(PING.0, PING.1);
        loop {
            // The sender lives in self, so waiting cannot fail.
            let _ = up.wait_for(|up| !up).await;
            sleep(backoff.next_delay()).await;
            if let Ok(Ok(())) = timeout(PING_TIMEOUT, store.ping()).await {
                backoff.reset();
                info!("the database is back: pulling goes on");
                self.up.send_replace(true);
            }
        }
    }
}
