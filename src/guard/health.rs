//! Whether the database answers. While it does not, nothing is pulled; for a while after
//! it is back, nothing is taken over.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use crate::retry::Backoff;
use crate::store::{Schema, StoreError};

/// Pauses between pings of a database that is away.
const PING: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// What is known about the database. Clones share it.
#[derive(Debug, Clone)]
pub struct Health {
    up: Arc<watch::Sender<bool>>,
    /// When it began to answer, as far as this worker knows.
    up_since: Arc<Mutex<Instant>>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            up: Arc::new(watch::Sender::new(true)),
            // It may have been away just before.
            up_since: Arc::new(Mutex::new(Instant::now())),
        }
    }
}

impl Health {
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.up.subscribe()
    }

    /// Whether the database has answered for at least this long, as far as this worker
    /// knows.
    #[must_use]
    pub fn is_up_for(&self, at_least: Duration) -> bool {
        let up_since = *self.up_since.lock().unwrap_or_else(PoisonError::into_inner);
        *self.up.borrow() && up_since.elapsed() >= at_least
    }

    /// Records whether the database has answered.
    pub fn note(&self, failure: Option<&StoreError>) {
        if let Some(failure) = failure.filter(|failure| failure.is_away())
            && self.up.send_replace(false)
        {
            warn!(%failure, "the database is away: pulling pauses");
        }
    }

    /// Completes when the database was away and answers again. Work resumes only after
    /// [`Health::is_back`].
    pub async fn answers_again(&self, schema: &dyn Schema) {
        let mut backoff = Backoff::new(PING.0, PING.1);
        // The sender lives in self, so waiting cannot fail.
        let _ = self.watch().wait_for(|up| !up).await;
        loop {
            sleep(backoff.next_delay()).await;
            if let Ok(Ok(())) = timeout(PING_TIMEOUT, schema.ping()).await {
                return;
            }
        }
    }

    /// Lets work resume.
    pub fn is_back(&self) {
        info!("the database is back: pulling goes on");
        *self.up_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.up.send_replace(true);
    }
}
