//! The processed-message guard: lets a message through one time.
//!
//! Invariant: for one (subscription, key) at most one run holds a fence that the store
//! accepts, and at most one ending is ever written.
//!
//! While the database is away, a claim is tried a few times and then given up: its
//! message stays unacknowledged. Endings, releases and checkpoints are retried until the
//! database answers. All of them are idempotent: the token of a claim and the
//! `finished_by` of an ending show whose they are.

mod batch;
mod clock_steps;
mod health;

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};
use uuid::Uuid;

use crate::job::{Claim, ClaimRequest, Fence, JobKey};
use crate::record::{AttemptReport, Note, NoteKind};
use crate::retry::Backoff;
use crate::store::{
    ClaimTerms, Finish, Finished, Refusal, Refused, Release, Requests, Store, StoreError, in_time,
};
use batch::Batcher;
use clock_steps::ClockSteps;

pub use health::Health;

/// Pauses between tries of a write that must succeed once the database is back.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How often a claim is sent before its delivery is put off. All tries carry one token,
/// so a claim whose answer was lost is recognised.
const CLAIM_TRIES: u32 = 3;

/// How long workers take to reconnect once the database is back.
const RECONNECTED: Duration = Duration::from_secs(2);

/// Notes are only for people, so nobody waits long for them.
const NOTE_TIMEOUT: Duration = Duration::from_secs(5);

/// At most this many notes wait to be written; more are lost.
const MAX_NOTES: usize = 1024;

/// The guard of one worker.
#[derive(Clone)]
pub struct Guard {
    store: Arc<dyn Store>,
    terms: ClaimTerms,
    claims: Batcher<ClaimRequest, Claim>,
    /// Claims with an ordering key: they may have to wait for another session.
    ordered_claims: Batcher<ClaimRequest, Claim>,
    finishes: Batcher<Finish, Finished>,
    notes: mpsc::Sender<Note>,
    health: Health,
    clock_steps: Arc<ClockSteps>,
    /// Claims that were given up. If one was acquired after all, nobody runs its job.
    unanswered: Arc<Mutex<Vec<(JobKey, Uuid)>>>,
    /// They send the statements, and end with the last clone.
    loops: Arc<tokio::sync::Mutex<JoinSet<()>>>,
}

impl Guard {
    /// Must be called within a runtime, on which it spawns its statements.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, terms: ClaimTerms) -> Self {
        let mut loops = JoinSet::new();
        let mut claims = || {
            let (store, terms) = (Arc::clone(&store), terms.clone());
            let bytes = |request: &ClaimRequest| request.message.data.len();
            let (claims, answering) = Batcher::new(bytes, move |requests: Vec<ClaimRequest>| {
                let (store, terms) = (Arc::clone(&store), terms.clone());
                async move { store.claim(&requests, &terms).await }.boxed()
            });
            loops.spawn(answering);
            claims
        };
        let (claims, ordered_claims) = (claims(), claims());
        let finishes = {
            let store = Arc::clone(&store);
            let (finishes, answering) = Batcher::new(
                |_| 0,
                move |finishes: Vec<Finish>| {
                    let store = Arc::clone(&store);
                    async move { store.finish(&finishes).await }.boxed()
                },
            );
            loops.spawn(answering);
            finishes
        };
        let (notes, noted) = mpsc::channel(MAX_NOTES);
        let ledger: Arc<dyn Requests> = store.clone();
        loops.spawn(write_notes(ledger, Arc::clone(&terms.worker), noted));
        Self {
            store,
            terms,
            claims,
            ordered_claims,
            finishes,
            notes,
            health: Health::default(),
            clock_steps: Arc::new(ClockSteps::new()),
            unanswered: Arc::default(),
            loops: Arc::new(tokio::sync::Mutex::new(loops)),
        }
    }

    /// Never ends.
    ///
    /// # Panics
    /// One of the guard's loops has panicked: it sends no statement any more.
    pub async fn watch_over_its_loops(&self) {
        pass_a_panic_on(&mut *self.loops.lock().await).await;
        std::future::pending().await
    }

    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    #[must_use]
    pub fn terms(&self) -> &ClaimTerms {
        &self.terms
    }

    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Whether jobs with an expired lease may be taken over. Not while the database is
    /// away, nor just after, nor just after the start: their workers, which retry every
    /// 1/32 of a lease, renew first. If leases are measured by this machine's clock, not for a
    /// lease after that was set, since it may have made all leases look expired.
    #[must_use]
    pub fn may_take_over(&self) -> bool {
        let lease = self.terms.lease;
        let renewed = (lease / 16 + RECONNECTED).min(lease / 4);
        self.health.is_up_for(renewed) && !self.clock_was_set_within(lease)
    }

    /// Whether this worker has had the database for this long, and the clock that the
    /// database goes by was not set meanwhile.
    #[must_use]
    pub fn has_seen(&self, time: Duration) -> bool {
        self.health.is_up_for(time) && !self.clock_was_set_within(time)
    }

    fn clock_was_set_within(&self, time: Duration) -> bool {
        self.store.uses_this_machines_clock() && self.clock_steps.stepped_within(time)
    }

    /// Waits for the database to come back, then first gives back claims that were
    /// acquired but whose answer was lost. Never ends.
    pub async fn watch_over_the_database(&self) {
        loop {
            self.health.answers_again(&*self.store).await;
            self.disown_unanswered().await;
            // Under the lock: a claim that is given up later marks the database as away.
            let unanswered = self.unanswered();
            if unanswered.is_empty() {
                self.health.is_back();
            }
        }
    }

    /// Gives back the claims whose answer was lost, retrying while the database is away.
    pub async fn give_back_unanswered(&self) {
        let mut backoff = Backoff::new(TRY_AGAIN.0, TRY_AGAIN.1);
        loop {
            self.disown_unanswered().await;
            if self.unanswered().is_empty() {
                return;
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// They stay on the list until the database has answered: this may be cancelled at any
    /// point, and to give a claim back twice does no harm.
    async fn disown_unanswered(&self) {
        let claims = self.unanswered().clone();
        if claims.is_empty() {
            return;
        }
        match in_time(self.store.disown(&claims)).await {
            Ok(()) => self.unanswered().retain(|claim| !claims.contains(claim)),
            Err(error) => {
                warn!(%error, claims = claims.len(), "unanswered claims are not given back yet");
            }
        }
    }

    fn unanswered(&self) -> MutexGuard<'_, Vec<(JobKey, Uuid)>> {
        self.unanswered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims a message's job.
    ///
    /// # Errors
    /// The database did not answer: nothing is known about the job, and the message must
    /// stay unacknowledged.
    pub async fn claim(&self, mut request: ClaimRequest) -> Result<Claim, Arc<StoreError>> {
        let claims = match request.message.ordering_key.is_empty() {
            true => &self.claims,
            false => &self.ordered_claims,
        };
        let mut backoff = Backoff::new(TRY_AGAIN.0, TRY_AGAIN.1);
        let mut no_answer = None;
        let mut tries = 0;
        loop {
            let error = match claims.ask(request.clone()).await {
                Err(error) => error,
                answer => return self.noted(answer),
            };
            if error.is_away() {
                no_answer = Some(Arc::clone(&error));
                // By the next try the workers of lost jobs may not have renewed yet.
                request.can = request.can.unless_lost();
            }
            tries += 1;
            if tries == CLAIM_TRIES || !error.is_passing() {
                return match no_answer {
                    // One of the tries may have acquired the job.
                    Some(no_answer) => {
                        self.unanswered().push((request.key, request.token));
                        self.noted(Err(no_answer))
                    }
                    None => Err(error),
                };
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// Stores a run's checkpoint, retrying while the database is away; `acked` as in
    /// [`crate::store::Claims::save_checkpoint`]. False: the run no longer holds the job,
    /// or the database rejects the text.
    pub async fn save_checkpoint(&self, fence: &Fence, checkpoint: &str, acked: bool) -> bool {
        let asking = || async {
            let saving = self.store.save_checkpoint(fence, checkpoint, acked);
            self.noted(in_time(saving).await.map_err(Arc::new))
        };
        let never = CancellationToken::new();
        let saved = until_answered("the checkpoint is not stored yet", fence, &never, asking).await;
        saved == Some(true)
    }

    /// Writes how a job ended, retrying while the database is away. Returns whether this
    /// run ended the job; None if `give_up` came first, and then the job still belongs to
    /// the lease's holder.
    pub async fn finish(&self, finish: &Finish, give_up: &CancellationToken) -> Option<bool> {
        let finished = self.try_to_finish(finish, give_up).await;
        if finished.is_some() || give_up.is_cancelled() {
            return finished;
        }
        // Words that cannot be stored must not keep the job from ending as it did.
        let finish = Finish {
            ending: finish.ending.without_words(),
            checkpoint: None,
            ..finish.clone()
        };
        self.try_to_finish(&finish, give_up).await
    }

    async fn try_to_finish(&self, finish: &Finish, give_up: &CancellationToken) -> Option<bool> {
        let asking = || async {
            let finished = self.finishes.ask(finish.clone()).await;
            match self.noted(finished)? {
                Finished::Ended => Ok(true),
                Finished::NotMine => Ok(false),
                Finished::Locked => Err(Arc::new(StoreError::Locked)),
            }
        };
        let not_yet = "the outcome is not written yet";
        until_answered(not_yet, &finish.fence, give_up, asking).await
    }

    /// Gives a claim back, retrying while the database is away. Some(false): another
    /// worker has it by now.
    pub async fn release(&self, release: &Release, give_up: &CancellationToken) -> Option<bool> {
        let released = self.try_to_release(release, give_up).await;
        if released.is_some() || give_up.is_cancelled() {
            return released;
        }
        let release = Release {
            why: release.why.without_words(),
            checkpoint: None,
            ..release.clone()
        };
        self.try_to_release(&release, give_up).await
    }

    async fn try_to_release(&self, release: &Release, give_up: &CancellationToken) -> Option<bool> {
        let asking = || async {
            let releasing = in_time(self.store.release(release));
            self.noted(releasing.await.map_err(Arc::new))
        };
        let not_yet = "the claim is not given back yet";
        until_answered(not_yet, &release.fence, give_up, asking).await
    }

    /// Records a message that will never run.
    ///
    /// # Errors
    /// The database did not answer; the message must stay unacknowledged.
    pub async fn refuse(&self, refusal: &Refusal) -> Result<Refused, Arc<StoreError>> {
        self.noted(in_time(self.store.refuse(refusal)).await.map_err(Arc::new))
    }

    /// Stores an attempt's report. Best effort, like a note; an attempt that reported
    /// nothing leaves no record.
    pub async fn record_attempt(&self, fence: &Fence, report: &AttemptReport) {
        if report.log.is_empty() && report.series.is_empty() {
            return;
        }
        let recording = self.store.record_attempt(fence, &self.terms.worker, report);
        match timeout(NOTE_TIMEOUT, recording).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(job = %fence.key, %error, "an attempt's record is lost"),
            Err(_) => debug!(job = %fence.key, "an attempt's record is lost: no answer"),
        }
    }

    /// Adds a note to a job's ledger, some time soon. Best effort: no state is read from
    /// it.
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

    fn noted<T>(&self, answer: Result<T, Arc<StoreError>>) -> Result<T, Arc<StoreError>> {
        self.health
            .note(answer.as_ref().err().map(|error| &**error));
        answer
    }
}

async fn pass_a_panic_on(loops: &mut JoinSet<()>) {
    while let Some(ended) = loops.join_next().await {
        if let Err(ended) = ended
            && let Ok(panic) = ended.try_into_panic()
        {
            resume_unwind(panic);
        }
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

/// Writes notes in batches; ends with the guard.
async fn write_notes(ledger: Arc<dyn Requests>, worker: Arc<str>, mut noted: mpsc::Receiver<Note>) {
    let mut notes = Vec::new();
    while noted.recv_many(&mut notes, MAX_NOTES).await > 0 {
        if let Err(error) = in_time(ledger.note(&worker, &notes)).await {
            debug!(%error, lost = notes.len(), "notes for the ledger are lost");
        }
        notes.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::panic::AssertUnwindSafe;

    use super::*;

    #[tokio::test]
    async fn a_panic_in_a_loop_is_passed_on_although_others_have_ended() {
        let mut loops = JoinSet::new();
        loops.spawn(async {});
        pass_a_panic_on(&mut loops).await;
        loops.spawn(async {});
        loops.spawn(async { panic!("for the test") });
        loops.spawn(std::future::pending());
        let passed_on = AssertUnwindSafe(pass_a_panic_on(&mut loops)).catch_unwind();
        let panic = passed_on.await.unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"for the test"));
    }
}
