//! The life of one delivery, whole: decode → claim → run → finish → settle.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, error_span, info, warn};

use super::events::{EventKind, Events};
use super::hold::HeldDeliveries;
use super::lease_keeper::LeaseKeeper;
use super::slots::Slot;
use super::supervise::supervise;
use crate::config::{self, AckTiming, WithoutDedupeKey};
use crate::executor::Attempt;
use crate::guard::Guard;
use crate::job::{Acquired, Claim, Fence, JobKey, NoteKind, Orphan};
use crate::message::{Message, Payload, Request};
use crate::outcome::{Disposition, Outcome, Verdict};
use crate::pubsub::{Delivery, Receipt};
use crate::registry::{ConfiguredTask, ConfiguredTasks};
use crate::report::{Progress, Reports};
use crate::shutdown::Shutdown;
use crate::store::{Refused, StoreError};

pub(super) struct Processor {
    pub(super) guard: Guard,
    pub(super) tasks: ConfiguredTasks,
    pub(super) keeper: LeaseKeeper,
    pub(super) held: HeldDeliveries,
    pub(super) stop_grace: Duration,
    pub(super) shutdown: Shutdown,
    pub(super) events: Events,
}

impl Processor {
    /// Takes one delivery through its life. The slot comes free at the end.
    pub(super) async fn process(
        &self,
        subscription: &str,
        settings: &config::Subscription,
        delivery: Delivery,
        slot: Slot,
    ) {
        let span = error_span!("delivery", message.id = %delivery.message.id, delivery.attempt = delivery.attempt);
        let (message, receipt) = delivery.into_parts();
        self.process_message(subscription, settings, message, receipt)
            .instrument(span)
            .await;
        drop(slot);
    }

    /// Takes a job that was left behind to its end, without a delivery.
    pub(super) async fn process_orphan(&self, orphan: Orphan, slot: Slot) {
        let id: Arc<str> = orphan.message_id.as_str().into();
        let fence = &orphan.acquired.fence;
        match (
            Request::decode(&orphan.payload),
            self.tasks.get(&orphan.task),
        ) {
            (Ok(request), Some(task)) => {
                self.run(&id, task, request.payload, orphan.acquired, None)
                    .await;
            }
            // Both were fine when it was claimed, and it was asked for by task.
            (request, _) => {
                error!(job = %fence.key, error = ?request.err(), "an orphaned job cannot be read; it is given back");
                self.give_back(fence).await;
            }
        }
        drop(slot);
    }

    async fn process_message(
        &self,
        subscription: &str,
        settings: &config::Subscription,
        message: Message,
        receipt: Receipt,
    ) {
        let id: Arc<str> = message.id.as_str().into();
        let by_id = JobKey::of_message_id(subscription, &message);
        let request = match Request::decode(&message.data) {
            Ok(request) => request,
            Err(reason) => {
                let reason = reason.to_string();
                return self.refuse(by_id, None, message, reason, receipt).await;
            }
        };
        let key = match settings
            .dedupe_key
            .of(subscription, &message, &request.payload)
        {
            Ok(key) => key,
            Err(missing) => match settings.without_dedupe_key {
                WithoutDedupeKey::MessageId => by_id.clone(),
                WithoutDedupeKey::DeadLetter => {
                    let (task, reason) = (Some(request.task), missing.to_string());
                    return self.refuse(by_id, task, message, reason, receipt).await;
                }
            },
        };
        let Some(task) = self.tasks.get(&request.task) else {
            let known: Vec<&str> = self.tasks.names().collect();
            let reason = format!(
                "no task `{}` is known here; known: {}",
                request.task,
                known.join(", ")
            );
            // By its id: a corrected request may come under the same key.
            return self
                .refuse(by_id, Some(request.task), message, reason, receipt)
                .await;
        };
        // Once the message is acked only the table can bring its job back.
        let reap_delay = match task.settings.ack {
            AckTiming::BeforeRun => Duration::ZERO,
            AckTiming::AfterRun => settings.ack_deadline,
        };
        let claim = self
            .guard
            .claim(key.clone(), &task.name, message, reap_delay);
        match claim.await {
            Ok(Claim::Acquired(acquired)) => {
                self.run(&id, task, request.payload, acquired, Some(receipt))
                    .await;
            }
            Ok(Claim::AlreadyFinished(state)) => {
                info!(state = state.as_str(), "duplicate of a finished message");
                self.events.tell(&id, EventKind::Suppressed);
                receipt.ack();
            }
            Ok(Claim::HeldUntil(until)) => {
                info!("duplicate of a message that is running");
                self.events.tell(&id, EventKind::Suppressed);
                match duplicate_of_a_running_job(task.settings.ack) {
                    Disposition::Ack => receipt.ack(),
                    Disposition::Nack => receipt.nack(),
                    Disposition::Hold => {
                        self.held
                            .hold(self.guard.clone(), key, until, receipt, self.draining());
                    }
                }
            }
            Err(error) => self.try_later(&error, receipt),
        }
    }

    async fn run(
        &self,
        id: &Arc<str>,
        task: &ConfiguredTask,
        payload: Payload,
        acquired: Acquired,
        receipt: Option<Receipt>,
    ) {
        let span = error_span!("job", job.id = %acquired.job_id, task.name = task.name, attempt = acquired.fence.attempt);
        let fence = acquired.fence.clone();
        // The claim, payload included, has committed: that is what before_run
        // asks of an ack.
        let receipt = match (task.settings.ack, receipt) {
            (AckTiming::BeforeRun, Some(receipt)) => {
                receipt.ack_early();
                self.guard
                    .note(&fence, NoteKind::Acked, Some("before the run"));
                None
            }
            (_, receipt) => receipt,
        };
        let disposition = self
            .run_to_the_end(id, task, payload, acquired)
            .instrument(span)
            .await;
        match (receipt, disposition) {
            (Some(receipt), Disposition::Ack) => {
                receipt.ack();
                self.guard
                    .note(&fence, NoteKind::Acked, Some("after the run"));
            }
            (Some(receipt), Disposition::Nack) => receipt.nack(),
            (Some(receipt), Disposition::Hold) => self.held.pause(receipt, self.draining()),
            (None, _) => {}
        }
    }

    async fn run_to_the_end(
        &self,
        id: &Arc<str>,
        task: &ConfiguredTask,
        payload: Payload,
        acquired: Acquired,
    ) -> Disposition {
        let mut lease = self.keeper.keep(&acquired);
        let fence = acquired.fence;
        info!("started");
        self.events.tell(
            id,
            EventKind::Started {
                job_id: acquired.job_id,
                task: task.name.clone(),
                attempt: fence.attempt,
            },
        );
        let reports = Reports::default();
        let progress = reports.watch_progress();
        let attempt = Attempt {
            job_id: acquired.job_id,
            task: task.name.as_str().into(),
            fence: fence.clone(),
            message_id: Arc::clone(id),
            payload: Arc::new(payload),
            checkpoint: None,
            deadline: None,
            devices: Vec::new(),
            reports,
            valid_until: lease.validity(),
            stop: CancellationToken::new(),
        };
        let stopping = &self.shutdown.stopping;
        let outcome = tokio::select! {
            outcome = supervise(task, attempt, &mut lease, stopping, self.stop_grace) => outcome,
            never = self.relay_progress(id, progress) => never,
        };
        let name = outcome.name();
        let disposition = match outcome.verdict() {
            Verdict::Finish(ending) => {
                match &ending.error {
                    Some(error) => warn!(outcome = name, %error, "ended"),
                    None => info!(outcome = name, "ended"),
                }
                let finished = self
                    .guard
                    .finish(&fence, &ending, &self.shutdown.giving_up)
                    .await;
                after_finish(finished)
            }
            Verdict::Release => {
                info!("interrupted by the shutdown; another worker may go on");
                self.give_back(&fence).await;
                Disposition::Nack
            }
            Verdict::Abandon => {
                warn!("the lease is lost: the run was stopped and its outcome is not written");
                self.guard.note(&fence, NoteKind::LeaseLost, None);
                // What the database says when it is back decides.
                self.give_back(&fence).await;
                Disposition::Hold
            }
        };
        self.events.tell(id, EventKind::Ended { outcome: name });
        disposition
    }

    async fn give_back(&self, fence: &Fence) {
        match self.guard.release(fence, &self.shutdown.giving_up).await {
            Some(true) => info!("the claim is given back"),
            Some(false) => warn!("another worker has taken the job over: 0 rows changed"),
            None => warn!("the claim could not be given back; its lease will end"),
        }
    }

    /// Passes reports on until the run ends. Never completes.
    async fn relay_progress(
        &self,
        id: &Arc<str>,
        mut reports: watch::Receiver<Progress>,
    ) -> Outcome {
        while reports.changed().await.is_ok() {
            let report = reports.borrow_and_update().clone();
            self.events.tell(id, EventKind::Progressed(report));
        }
        std::future::pending().await
    }

    /// A message that will never run is put on record; only then is it acked.
    async fn refuse(
        &self,
        key: JobKey,
        task: Option<String>,
        message: Message,
        reason: String,
        receipt: Receipt,
    ) {
        let id: Arc<str> = message.id.as_str().into();
        match self.guard.refuse(key, task, message, reason.clone()).await {
            Ok(Refused::Recorded) => {
                warn!(%reason, "refused");
                self.events.tell(&id, EventKind::Refused { reason });
                receipt.ack();
            }
            Ok(Refused::AlreadyFinished(state)) => {
                info!(state = state.as_str(), "duplicate of a finished message");
                self.events.tell(&id, EventKind::Suppressed);
                receipt.ack();
            }
            Ok(Refused::Claimed) => {
                info!("the message's job is claimed by a worker that knows its task");
                self.events.tell(&id, EventKind::Suppressed);
                self.held.pause(receipt, self.draining());
            }
            Err(error) => self.try_later(&error, receipt),
        }
    }

    /// Nothing is known about the message, so it must not be acked.
    fn try_later(&self, error: &StoreError, receipt: Receipt) {
        error!(%error, "the delivery is handed back after a pause");
        self.held.pause(receipt, self.draining());
    }

    fn draining(&self) -> CancellationToken {
        self.shutdown.draining.clone()
    }
}

/// With an early ack the claim holds all that an ack promises, and the running
/// job's own delivery has been acked already. With a late one, acking any
/// delivery of the message would settle it while its job can still die.
fn duplicate_of_a_running_job(ack: AckTiming) -> Disposition {
    match ack {
        AckTiming::BeforeRun => Disposition::Ack,
        AckTiming::AfterRun => Disposition::Hold,
    }
}

fn after_finish(finished: Option<bool>) -> Disposition {
    match finished {
        Some(true) => Disposition::Ack,
        Some(false) => {
            warn!("another worker has taken the job over: finishing changed 0 rows");
            Disposition::Hold
        }
        None => {
            warn!("stopped before the outcome could be written; the job will run again");
            Disposition::Nack
        }
    }
}
