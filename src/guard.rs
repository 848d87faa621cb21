//! The processed-message guard: lets a message through one time.
//!
//! Invariant: for one (subscription, key) at most one run holds a fence that
//! the store accepts, and at most one ending is ever written.

mod batch;
mod health;

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};
use uuid::Uuid;

use crate::job::{Claim, ClaimRequest, DeadLetter, Fence, JobKey, Note, NoteKind, Reaped, Told};
use crate::message::Message;
use crate::outcome::{DeadReason, Ending};
use crate::retry::Backoff;
use crate::store::{
    ClaimTerms, DeadLettersDue, Finish, GivenUp, Reach, Refusal, Refused, Release, Standing, Store,
    StoreError,
};
use batch::{Batcher, in_time};
use health::Health;

/// Pauses between tries of what has to be written once the database is back.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How often a claim is sent before its delivery is put off. The tries carry
/// one token, so that a claim whose answer was lost is found to be one's own.
const CLAIM_TRIES: u32 = 3;

/// Nobody waits for long for what only people read.
const NOTE_TIMEOUT: Duration = Duration::from_secs(5);

/// After so long another worker tries to publish a dead letter.
const TIME_TO_PUBLISH: Duration = Duration::from_secs(60);

/// Notes for the ledger that may wait to be written; more are lost.
const MAX_NOTES: usize = 1024;

/// A message that will never run, and why.
#[derive(Debug)]
pub struct Unrunnable {
    pub key: JobKey,
    /// None when the message named no task that could be read.
    pub task: Option<String>,
    pub message: Message,
    pub reason: DeadReason,
    /// The reason in full, for people.
    pub error: String,
    pub dead_letter_topic: Option<Arc<str>>,
}

/// Which dead letters are asked for.
#[derive(Debug, Clone, Copy)]
pub enum Whose {
    Mine,
    /// Their own worker has had its time.
    Anybodys {
        at_least: Duration,
    },
}

/// The guard of one worker.
#[derive(Clone)]
pub struct Guard {
    store: Arc<dyn Store>,
    terms: ClaimTerms,
    claims: Batcher<ClaimRequest, Claim>,
    finishes: Batcher<Finish, bool>,
    notes: mpsc::Sender<Note>,
    health: Health,
}

impl Guard {
    /// Must be called within a runtime: it sends its statements from there.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, terms: ClaimTerms) -> Self {
        let claims = {
            let (store, terms) = (Arc::clone(&store), terms.clone());
            let bytes = |request: &ClaimRequest| request.message.data.len();
            Batcher::new(bytes, move |requests: Vec<ClaimRequest>| {
                let (store, terms) = (Arc::clone(&store), terms.clone());
                async move { store.claim(&requests, &terms).await }.boxed()
            })
        };
        let finishes = {
            let store = Arc::clone(&store);
            Batcher::new(
                |_| 0,
                move |finishes: Vec<Finish>| {
                    let store = Arc::clone(&store);
                    async move { store.finish(&finishes).await }.boxed()
                },
            )
        };
        let (notes, noted) = mpsc::channel(MAX_NOTES);
        tokio::spawn(write_notes(
            Arc::clone(&store),
            Arc::clone(&terms.worker),
            noted,
        ));
        Self {
            store,
            terms,
            claims,
            finishes,
            notes,
            health: Health::default(),
        }
    }

    #[must_use]
    pub fn lease(&self) -> Duration {
        self.terms.lease
    }

    /// Whether the database answers. While it does not, a worker must not pull,
    /// and is not ready.
    #[must_use]
    pub fn database_is_up(&self) -> watch::Receiver<bool> {
        self.health.watch()
    }

    /// Notices when the database is back. Never ends.
    pub async fn keep_looking(&self) {
        self.health.keep_looking(&*self.store).await;
    }

    /// Asks to run a message's job.
    ///
    /// # Errors
    /// The database did not answer; nothing is known about the job, and the
    /// message must stay unacknowledged.
    pub async fn claim(&self, request: ClaimRequest) -> Result<Claim, Arc<StoreError>> {
        let mut backoff = Backoff::new(TRY_AGAIN.0, TRY_AGAIN.1);
        let mut tries = 1;
        loop {
            let answer = self.heard(self.claims.ask(request.clone()).await);
            match answer {
                Err(error) if error.is_passing() && tries < CLAIM_TRIES => {
                    tries += 1;
                    tokio::time::sleep(backoff.next_delay()).await;
                }
                answer => return answer,
            }
        }
    }

    /// How a held delivery's job stands by now.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn look(&self, key: &JobKey) -> Result<Standing, StoreError> {
        in_time(self.store.look(key)).await
    }

    /// Extends leases; false for each fence that no longer holds. No answer
    /// within an eighth of a lease is none: there is time for another try.
    ///
    /// # Errors
    /// The database did not answer; every lease is as it was, or longer.
    pub async fn renew(&self, fences: &[Fence]) -> Result<Vec<bool>, StoreError> {
        let patience = self.terms.lease / 8;
        let renewed = timeout(patience, self.store.renew(fences, self.terms.lease))
            .await
            .unwrap_or(Err(StoreError::NoAnswer(patience)));
        self.health.heard(renewed.as_ref().err());
        renewed
    }

    /// How many jobs could be taken from the table now, counted up to `limit`.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn due(&self, reach: &Reach, limit: usize) -> Result<usize, StoreError> {
        in_time(self.store.due(reach, limit)).await
    }

    /// Tells which tasks this worker knows.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn know(&self, reach: &Reach) -> Result<(), StoreError> {
        in_time(self.store.know(reach)).await
    }

    /// Takes what waits in the table, and what workers have left behind. That a
    /// sweep takes too long says nothing about claims and renewals, so pulling
    /// goes on.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn reap(&self, reach: &Reach, limit: usize) -> Result<Vec<Reaped>, StoreError> {
        in_time(self.store.reap(reach, &self.terms, limit)).await
    }

    /// Keeps a run's checkpoint, trying again for as long as the database is
    /// away; `acked` as in [`Store::save_checkpoint`]. False: the run is not
    /// the job's any more, or the database does not take the text.
    pub async fn save_checkpoint(&self, fence: &Fence, checkpoint: &str, acked: bool) -> bool {
        let asking = || async {
            let saving = self.store.save_checkpoint(fence, checkpoint, acked);
            self.heard(in_time(saving).await.map_err(Arc::new))
        };
        let never = CancellationToken::new();
        let saved = until_answered("the checkpoint is not kept yet", fence, &never, asking).await;
        saved == Some(true)
    }

    /// Keeps what an attempt has told about itself. Best effort, like a note;
    /// an attempt that told nothing leaves no record.
    pub async fn keep_attempt(&self, fence: &Fence, told: &Told) {
        if told.log.is_empty() && told.series.is_empty() {
            return;
        }
        let keeping = self.store.keep_attempt(fence, &self.terms.worker, told);
        match timeout(NOTE_TIMEOUT, keeping).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(job = %fence.key, %error, "an attempt's record is lost"),
            Err(_) => debug!(job = %fence.key, "an attempt's record is lost: no answer"),
        }
    }

    /// The lease tokens of this worker's runs that are to be cancelled.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn cancelled_runs(&self) -> Result<Vec<Uuid>, StoreError> {
        in_time(self.store.cancelled_runs(&self.terms.worker)).await
    }

    /// Writes how a job ended, trying again for as long as the database is
    /// away. Returns whether this run ended the job; None when `give_up` came
    /// first, and then the job is still the lease's holder's.
    pub async fn finish(&self, finish: &Finish, give_up: &CancellationToken) -> Option<bool> {
        let finished = self.try_to_finish(finish, give_up).await;
        if finished.is_some() || give_up.is_cancelled() {
            return finished;
        }
        // A result that cannot be stored must not keep the job from ending.
        let error = "its outcome could not be stored; the worker's log says why";
        let finish = Finish {
            ending: Ending::dead(DeadReason::Permanent, error),
            checkpoint: None,
            ..finish.clone()
        };
        self.try_to_finish(&finish, give_up).await
    }

    async fn try_to_finish(&self, finish: &Finish, give_up: &CancellationToken) -> Option<bool> {
        let asking = || async {
            let finished = self.finishes.ask(finish.clone()).await;
            self.heard(finished)
        };
        let not_yet = "the outcome is not written yet";
        until_answered(not_yet, &finish.fence, give_up, asking).await
    }

    /// Gives a claim back, trying again for as long as the database is away.
    /// Some(false): it is another worker's by now.
    pub async fn release(&self, release: &Release, give_up: &CancellationToken) -> Option<bool> {
        let asking = || async { in_time(self.store.release(release)).await.map_err(Arc::new) };
        let not_yet = "the claim is not given back yet";
        until_answered(not_yet, &release.fence, give_up, asking).await
    }

    /// Puts a message on record that will never run.
    ///
    /// # Errors
    /// The database did not answer; the message must stay unacknowledged.
    pub async fn refuse(&self, refused: Unrunnable) -> Result<Refused, Arc<StoreError>> {
        let refusal = Refusal {
            key: refused.key,
            job_id: Uuid::now_v7(),
            task: refused.task,
            message: refused.message,
            reason: refused.reason,
            error: refused.error,
            worker: Arc::clone(&self.terms.worker),
            dead_letter_topic: refused.dead_letter_topic,
        };
        self.heard(in_time(self.store.refuse(&refusal)).await.map_err(Arc::new))
    }

    /// Ends a job for which no worker has known the task for `patience`;
    /// returns whether it did.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn give_up_unknown(
        &self,
        key: &JobKey,
        patience: Duration,
        error: &str,
        dead_letter_topic: Option<Arc<str>>,
    ) -> Result<bool, StoreError> {
        let given_up = GivenUp {
            error: error.to_owned(),
            worker: Arc::clone(&self.terms.worker),
            dead_letter_topic,
        };
        in_time(self.store.give_up_unknown(key, patience, &given_up)).await
    }

    /// Dead jobs whose message is still to be published, but not to one of
    /// these topics: this worker's own, or anybody's.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn dead_letters(
        &self,
        whose: Whose,
        not_to: &[String],
        limit: u32,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let (worker, at_least) = match whose {
            Whose::Mine => (Some(Arc::clone(&self.terms.worker)), Duration::ZERO),
            Whose::Anybodys { at_least } => (None, at_least),
        };
        let due = DeadLettersDue {
            worker,
            at_least,
            not_to: not_to.to_vec(),
            time_to_publish: TIME_TO_PUBLISH,
            limit,
        };
        in_time(self.store.dead_letters(&due)).await
    }

    /// A dead letter needs no more publishing; `detail` goes into the ledger.
    ///
    /// # Errors
    /// The database did not answer; it will be published again.
    pub async fn dead_letter_settled(
        &self,
        letter: &DeadLetter,
        detail: &str,
    ) -> Result<(), StoreError> {
        let worker = &self.terms.worker;
        in_time(self.store.dead_letter_settled(letter, worker, detail)).await
    }

    /// Adds to a job's ledger, some time soon. Best effort: no state is read
    /// from it.
    pub fn note(&self, fence: &Fence, kind: NoteKind, detail: Option<&str>) {
        let note = Note {
            key: fence.key.clone(),
            kind,
            attempt: Some(fence.attempt),
            detail: detail.map(str::to_owned),
        };
        if self.notes.try_send(note).is_err() {
            debug!(job = %fence.key, "a note for the ledger is lost");
        }
    }

    /// Deletes jobs that ended more than `retention` ago, a batch at a time.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn purge(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        in_time(self.store.purge(retention, limit)).await
    }

    fn heard<T>(&self, answer: Result<T, Arc<StoreError>>) -> Result<T, Arc<StoreError>> {
        self.health
            .heard(answer.as_ref().err().map(|error| &**error));
        answer
    }
}

async fn until_answered<F: Future<Output = Result<bool, Arc<StoreError>>>>(
    not_yet: &str,
    fence: &Fence,
    give_up: &CancellationToken,
    asking: impl Fn() -> F,
) -> Option<bool> {
    let mut backoff = Backoff::new(TRY_AGAIN.0, TRY_AGAIN.1);
    loop {
        tokio::select! {
            answer = asking() => match answer {
                Ok(answer) => return Some(answer),
                Err(error) if error.is_passing() => warn!(job = %fence.key, %error, "{not_yet}"),
                Err(error) => {
                    error!(job = %fence.key, %error, "the database does not take what is written");
                    return None;
                }
            },
            () = give_up.cancelled() => return None,
        }
        tokio::select! {
            () = give_up.cancelled() => return None,
            () = tokio::time::sleep(backoff.next_delay()) => {}
        }
    }
}

/// Writes notes in batches that form by themselves; ends with the guard.
async fn write_notes(store: Arc<dyn Store>, worker: Arc<str>, mut noted: mpsc::Receiver<Note>) {
    let mut notes = Vec::new();
    while noted.recv_many(&mut notes, MAX_NOTES).await > 0 {
        if let Err(error) = in_time(store.note(&worker, &notes)).await {
            debug!(%error, lost = notes.len(), "notes for the ledger are lost");
        }
        notes.clear();
    }
}
