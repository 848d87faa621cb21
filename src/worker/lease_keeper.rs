//! Renews the leases of all attempts of this worker.
//!
//! Invariant: a run is asked to stop before its lease can have expired. Expiry is
//! measured by this process's own clock, from just before the last successful renewal was
//! sent, less a margin. It is never compared with the database's clock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use uuid::Uuid;

use crate::guard::Health;
use crate::job::{Acquired, Fence, JobKey, Renewal};
use crate::retry::jittered;
use crate::store::{ClaimTerms, Claims, StoreError, in_time};

/// A run is told to stop about this long after somebody asked for it.
const CANCEL_LOOK: Duration = Duration::from_secs(1);

/// The leases of one worker. Clones share them.
#[derive(Clone)]
pub(super) struct LeaseKeeper {
    claims: Arc<dyn Claims>,
    health: Health,
    terms: ClaimTerms,
    stop_grace: Duration,
    leases: Arc<Mutex<HashMap<Uuid, Entry>>>,
}

struct Entry {
    fence: Fence,
    /// Until when the run may go on, by this process's clock.
    valid_until: watch::Sender<Instant>,
    /// Cancelled when somebody asks to cancel the job.
    cancelled: CancellationToken,
}

/// A lease that is renewed for as long as this exists.
pub(super) struct Lease {
    token: Uuid,
    valid_until: watch::Receiver<Instant>,
    cancelled: CancellationToken,
    leases: Arc<Mutex<HashMap<Uuid, Entry>>>,
}

impl Lease {
    /// Until when the run may go on, as it changes.
    pub(super) fn validity(&self) -> watch::Receiver<Instant> {
        self.valid_until.clone()
    }

    /// Cancelled when somebody asks to cancel the job.
    pub(super) fn cancelled(&self) -> CancellationToken {
        self.cancelled.clone()
    }

    /// Completes when the run must stop: its lease was taken over, or could not be
    /// renewed in time.
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

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.leases).remove(&self.token);
    }
}

impl LeaseKeeper {
    pub(super) fn new(
        claims: Arc<dyn Claims>,
        health: Health,
        terms: ClaimTerms,
        stop_grace: Duration,
    ) -> Self {
        Self {
            claims,
            health,
            terms,
            stop_grace,
            leases: Arc::default(),
        }
    }

    /// Starts renewing an acquired claim's lease.
    pub(super) fn begin(&self, acquired: &Acquired) -> Lease {
        let token = acquired.fence.token;
        let (sender, valid_until) = watch::channel(self.valid_from(acquired.claimed_at));
        let cancelled = CancellationToken::new();
        lock(&self.leases).insert(
            token,
            Entry {
                fence: acquired.fence.clone(),
                valid_until: sender,
                cancelled: cancelled.clone(),
            },
        );
        Lease {
            token,
            valid_until,
            cancelled,
            leases: Arc::clone(&self.leases),
        }
    }

    /// Whether an attempt of this worker has the job. If so, nobody here takes it over,
    /// even if its lease has expired.
    pub(super) fn has(&self, key: &JobKey) -> bool {
        let leases = lock(&self.leases);
        leases.values().any(|entry| entry.fence.key == *key)
    }

    /// Checks now and then whether a job that runs here is to be cancelled.
    pub(super) async fn watch_for_cancels(self) {
        loop {
            sleep(jittered(CANCEL_LOOK)).await;
            if lock(&self.leases).is_empty() {
                continue;
            }
            match in_time(self.claims.cancelled_runs(&self.terms.worker)).await {
                Ok(tokens) => self.cancel(&tokens),
                Err(error) => debug!(%error, "no look for jobs to cancel"),
            }
        }
    }

    fn cancel(&self, tokens: &[Uuid]) {
        let leases = lock(&self.leases);
        for token in tokens {
            if let Some(entry) = leases.get(token) {
                entry.cancelled.cancel();
            }
        }
    }

    /// Renews every quarter of a lease, and sooner after a try that left a lease
    /// unrenewed. The configuration limits the margin to about a third of a lease, so
    /// that two tries may fail, even slowly.
    pub(super) async fn run(self) {
        let lease = self.terms.lease;
        let mut pause = lease / 4;
        loop {
            sleep(pause).await;
            pause = match self.renew_all().await {
                true => lease / 4,
                false => lease / 32,
            };
        }
    }

    /// False if a lease could not be renewed but still may be.
    async fn renew_all(&self) -> bool {
        let fences: Vec<Fence> = lock(&self.leases)
            .values()
            .map(|entry| entry.fence.clone())
            .collect();
        if fences.is_empty() {
            return true;
        }
        let sent_at = Instant::now();
        let answer = self.renew(&fences).await;
        self.health.note(answer.as_ref().err());
        let renewals = match answer {
            Ok(renewals) => renewals,
            Err(error) => {
                warn!(%error, leases = fences.len(), "leases were not renewed");
                return false;
            }
        };
        let count = |what| renewals.iter().filter(|renewal| **renewal == what).count();
        let (renewed, lost) = (count(Renewal::Renewed), count(Renewal::Lost));
        let unknown = count(Renewal::Unknown);
        debug!(renewed, lost, unknown, "leases were renewed");
        if unknown > 0 {
            warn!(
                leases = unknown,
                "leases were not renewed: another session has locked their rows"
            );
        }
        let leases = lock(&self.leases);
        for (fence, renewal) in fences.iter().zip(&renewals) {
            let Some(entry) = leases.get(&fence.token) else {
                continue;
            };
            match renewal {
                Renewal::Renewed => entry.valid_until.send_replace(self.valid_from(sent_at)),
                Renewal::Lost => entry.valid_until.send_replace(Instant::now()),
                Renewal::Unknown => continue,
            };
        }
        unknown == 0
    }

    /// No answer within an eighth of a lease counts as a failure, which leaves time for
    /// another try.
    async fn renew(&self, fences: &[Fence]) -> Result<Vec<Renewal>, StoreError> {
        let patience = self.terms.lease / 8;
        timeout(patience, self.claims.renew(fences, self.terms.lease))
            .await
            .unwrap_or(Err(StoreError::NoAnswer(patience)))
    }

    /// A run must be over, not only asked to stop, when its lease expires: hence the
    /// margin includes the stop grace. The rest allows for two clocks that run at
    /// slightly different speeds.
    fn valid_from(&self, asked_at: Instant) -> Instant {
        let lease = self.terms.lease;
        let margin = self.stop_grace + lease / 100;
        asked_at + lease.saturating_sub(margin)
    }
}

fn lock(leases: &Mutex<HashMap<Uuid, Entry>>) -> MutexGuard<'_, HashMap<Uuid, Entry>> {
    leases.lock().unwrap_or_else(PoisonError::into_inner)
}
