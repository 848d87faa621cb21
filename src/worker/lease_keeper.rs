//! Renews the leases of everything that runs here.
//!
//! Invariant: a run is asked to stop before its lease can have ended, going by
//! this process's own clock from before the last successful renewal was sent,
//! less a margin. The database's clock is never compared with it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use uuid::Uuid;

use crate::guard::Guard;
use crate::job::{Acquired, Fence};
use crate::retry::jittered;

/// About so long after somebody asked for it a run is told to stop.
const CANCEL_LOOK: Duration = Duration::from_secs(1);

/// Keeps the leases of one worker. Clones keep the same ones.
#[derive(Clone)]
pub(super) struct LeaseKeeper {
    guard: Guard,
    stop_grace: Duration,
    kept: Arc<Mutex<HashMap<Uuid, Kept>>>,
}

struct Kept {
    fence: Fence,
    /// Until when the run may go on, by this process's clock.
    valid_until: watch::Sender<Instant>,
    /// Somebody asked for the job to be cancelled.
    cancelled: CancellationToken,
}

/// A lease that is being renewed for as long as this exists.
pub(super) struct KeptLease {
    token: Uuid,
    valid_until: watch::Receiver<Instant>,
    cancelled: CancellationToken,
    kept: Arc<Mutex<HashMap<Uuid, Kept>>>,
}

impl KeptLease {
    /// Until when the run may go on, as it changes.
    pub(super) fn validity(&self) -> watch::Receiver<Instant> {
        self.valid_until.clone()
    }

    /// Cancelled when somebody asks for the job to be cancelled.
    pub(super) fn cancelled(&self) -> CancellationToken {
        self.cancelled.clone()
    }

    /// Completes when the run must stop: its lease was taken over, or could
    /// not be renewed in time.
    pub(super) async fn lost(&mut self) {
        loop {
            let valid_until = *self.valid_until.borrow_and_update();
            tokio::select! {
                () = sleep_until(valid_until) => return,
                renewed = self.valid_until.changed() => if renewed.is_err() { return },
            }
        }
    }
}

impl Drop for KeptLease {
    fn drop(&mut self) {
        lock(&self.kept).remove(&self.token);
    }
}

impl LeaseKeeper {
    pub(super) fn new(guard: Guard, stop_grace: Duration) -> Self {
        Self {
            guard,
            stop_grace,
            kept: Arc::default(),
        }
    }

    /// Begins to renew an acquired claim's lease.
    pub(super) fn keep(&self, acquired: &Acquired) -> KeptLease {
        let token = acquired.fence.token;
        let (sender, valid_until) = watch::channel(self.valid_from(acquired.claimed_at));
        let cancelled = CancellationToken::new();
        lock(&self.kept).insert(
            token,
            Kept {
                fence: acquired.fence.clone(),
                valid_until: sender,
                cancelled: cancelled.clone(),
            },
        );
        KeptLease {
            token,
            valid_until,
            cancelled,
            kept: Arc::clone(&self.kept),
        }
    }

    /// Looks now and then whether somebody wants a job cancelled that runs here.
    pub(super) async fn watch_for_cancels(self) {
        loop {
            sleep(jittered(CANCEL_LOOK)).await;
            if lock(&self.kept).is_empty() {
                continue;
            }
            match self.guard.cancelled_runs().await {
                Ok(tokens) => self.cancel(&tokens),
                Err(error) => debug!(%error, "no look for jobs to cancel"),
            }
        }
    }

    fn cancel(&self, tokens: &[Uuid]) {
        let kept = lock(&self.kept);
        for token in tokens {
            if let Some(kept) = kept.get(token) {
                kept.cancelled.cancel();
            }
        }
    }

    /// Renews every quarter of a lease, and sooner after a try that failed: the
    /// configuration keeps the margin to about a third of a lease, so that two
    /// tries may fail, slowly even.
    pub(super) async fn run(self) {
        let lease = self.guard.lease();
        let mut pause = lease / 4;
        loop {
            sleep(pause).await;
            pause = match self.renew_all().await {
                true => lease / 4,
                false => lease / 32,
            };
        }
    }

    /// False where the database did not answer in time.
    async fn renew_all(&self) -> bool {
        let fences: Vec<Fence> = lock(&self.kept)
            .values()
            .map(|kept| kept.fence.clone())
            .collect();
        if fences.is_empty() {
            return true;
        }
        let sent_at = Instant::now();
        let renewed = match self.guard.renew(&fences).await {
            Ok(renewed) => renewed,
            Err(error) => {
                warn!(%error, leases = fences.len(), "leases were not renewed");
                return false;
            }
        };
        debug!(leases = fences.len(), "leases were renewed");
        let kept = lock(&self.kept);
        for (fence, renewed) in fences.iter().zip(renewed) {
            let Some(lease) = kept.get(&fence.token) else {
                continue;
            };
            lease.valid_until.send_replace(match renewed {
                true => self.valid_from(sent_at),
                false => Instant::now(),
            });
        }
        true
    }

    /// A run must be over, not only asked to stop, when its lease ends: hence
    /// the stop grace within the margin. The rest allows for two clocks that
    /// run at slightly different speeds.
    fn valid_from(&self, asked_at: Instant) -> Instant {
        let lease = self.guard.lease();
        let margin = self.stop_grace + lease / 100;
        asked_at + lease.saturating_sub(margin)
    }
}

fn lock(kept: &Mutex<HashMap<Uuid, Kept>>) -> MutexGuard<'_, HashMap<Uuid, Kept>> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}
