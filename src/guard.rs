//! The processed-message guard: lets a message through one time.
//!
//! Invariant: for one (subscription, key) at most one run holds a fence that
//! the store accepts, and at most one ending is ever written.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

use crate::job::{Claim, ClaimRequest, Fence, JobKey};
use crate::message::Message;
use crate::outcome::Ending;
use crate::retry::Backoff;
use crate::store::{ClaimTerms, Refusal, Refused, Standing, Store, StoreError};

/// Pauses between tries to write an ending while the database is away.
const FINISH_BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// The guard of one worker.
#[derive(Clone)]
pub struct Guard {
    store: Arc<dyn Store>,
    terms: ClaimTerms,
}

impl Guard {
    #[must_use]
    pub fn new(store: Arc<dyn Store>, terms: ClaimTerms) -> Self {
        Self { store, terms }
    }

    #[must_use]
    pub fn lease(&self) -> Duration {
        self.terms.lease
    }

    /// Asks to run a message's job.
    ///
    /// # Errors
    /// The database did not answer; nothing is known about the job, and the
    /// message must stay unacknowledged.
    pub async fn claim(
        &self,
        key: JobKey,
        task: &str,
        message: Message,
    ) -> Result<Claim, StoreError> {
        let request = ClaimRequest {
            key,
            job_id: Uuid::now_v7(),
            token: Uuid::new_v4(),
            task: task.to_owned(),
            message,
        };
        let claims = self.store.claim(&[request], &self.terms).await?;
        claims
            .into_iter()
            .next()
            .ok_or_else(|| StoreError::Unreadable("a claim got no answer".to_owned()))
    }

    /// How a held delivery's job stands by now.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn look(&self, key: &JobKey) -> Result<Standing, StoreError> {
        self.store.look(key).await
    }

    /// Extends leases; false for each fence that no longer holds.
    ///
    /// # Errors
    /// The database did not answer; every lease is as it was.
    pub async fn renew(&self, fences: &[Fence]) -> Result<Vec<bool>, StoreError> {
        self.store.renew(fences, self.terms.lease).await
    }

    /// Writes how a job ended, trying again for as long as the database is
    /// away. Returns whether this run ended the job; None when `give_up` came
    /// first, and then the job is still the lease's holder's.
    pub async fn finish(
        &self,
        fence: &Fence,
        ending: &Ending,
        give_up: &CancellationToken,
    ) -> Option<bool> {
        let mut backoff = Backoff::new(FINISH_BACKOFF.0, FINISH_BACKOFF.1);
        loop {
            match self.store.finish(fence, ending).await {
                Ok(finished) => return Some(finished),
                Err(error) => warn!(job = %fence.key, %error, "the outcome is not written yet"),
            }
            tokio::select! {
                () = give_up.cancelled() => return None,
                () = tokio::time::sleep(backoff.next_delay()) => {}
            }
        }
    }

    /// Gives an interrupted run's claim back, at no cost of an attempt.
    ///
    /// # Errors
    /// The database did not answer; the lease will end by itself.
    pub async fn release(&self, fence: &Fence) -> Result<bool, StoreError> {
        self.store.release(fence).await
    }

    /// Puts a message on record that will never run.
    ///
    /// # Errors
    /// The database did not answer; the message must stay unacknowledged.
    pub async fn refuse(
        &self,
        key: JobKey,
        task: Option<String>,
        message: Message,
        reason: String,
    ) -> Result<Refused, StoreError> {
        let refusal = Refusal {
            key,
            job_id: Uuid::now_v7(),
            task,
            message,
            reason,
            worker: Arc::clone(&self.terms.worker),
        };
        self.store.refuse(&refusal).await
    }
}
