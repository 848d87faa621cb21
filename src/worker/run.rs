//! One attempt, from its claim to what is written about its end.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{TimeDelta, Utc};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error_span, info, warn};

use super::events::EventKind;
use super::intake::Intake;
use super::lease_keeper::KeptLease;
use super::process::Processor;
use super::slots::Slot;
use super::supervise::supervise;
use crate::config::AckTiming;
use crate::devices::DeviceSet;
use crate::executor::Attempt;
use crate::failpoint::{self, Step};
use crate::job::{Acquired, Fence, NoteKind, Told};
use crate::message::Payload;
use crate::outcome::{Ending, Outcome, Verdict};
use crate::pubsub::Receipt;
use crate::registry::ConfiguredTask;
use crate::report::{Checkpoint, Progress, Reports};
use crate::store::{Finish, Release, Released};

/// A failing job of an ordering key keeps those behind it waiting, so it is
/// tried again sooner than its task's backoff may say.
const LONGEST_ORDERED_WAIT: Duration = Duration::from_secs(10);

/// A run may tell of checkpoints as often as it likes; so often one is written.
const BETWEEN_CHECKPOINTS: Duration = Duration::from_secs(1);
/// So often what a run has told is put on record while it goes on.
const BETWEEN_TELLINGS: Duration = Duration::from_secs(30);

/// An acquired job with what is needed to run it.
pub(super) struct Assignment<'a> {
    pub(super) message_id: Arc<str>,
    pub(super) is_ordered: bool,
    pub(super) task: &'a Arc<ConfiguredTask>,
    pub(super) payload: Payload,
    /// The message's, which the payload is read from.
    pub(super) data: Bytes,
    pub(super) acquired: Acquired,
    /// The GPUs that it has to itself.
    pub(super) devices: Option<Arc<DeviceSet>>,
}

/// What the broker is told once the run has ended.
#[derive(Debug, Clone, Copy)]
pub(super) enum Settling {
    Ack,
    Nack,
    /// Keep it, unsettled, and look at its job then.
    HoldUntil(Instant),
}

impl Processor {
    /// Runs the job and settles its delivery, if it came by one that is still
    /// unsettled then.
    pub(super) async fn run(
        &self,
        intake: &Intake,
        assignment: Assignment<'_>,
        receipt: Option<Receipt>,
        slot: Slot,
    ) {
        let acquired = &assignment.acquired;
        let fence = acquired.fence.clone();
        let span = error_span!("job", job.id = %acquired.job_id, task.name = assignment.task.name, attempt = fence.attempt);
        let running = async {
            // The claim, payload included, has committed: that is what
            // before_run asks of an ack.
            let mut receipt = receipt;
            if assignment.task.settings.ack == AckTiming::BeforeRun
                && let Some(receipt) = receipt.take()
            {
                self.ack_early(&fence, receipt);
            }
            let settling = self.run_to_the_end(intake, assignment, &mut receipt).await;
            (receipt, settling)
        };
        let (receipt, settling) = running.instrument(span).await;
        if let Some(receipt) = receipt {
            if matches!(settling, Settling::Ack) {
                let detail = Some("after the run");
                self.guard.note(&fence, NoteKind::Acked, detail);
            }
            self.settle(intake, fence.key.clone(), receipt, settling);
        }
        drop(slot);
        intake.held.tell_of_the_end(&fence.key);
    }

    fn ack_early(&self, fence: &Fence, receipt: Receipt) {
        failpoint::reach(Step::BeforeAck);
        receipt.ack_early();
        failpoint::reach(Step::AfterAck);
        let detail = Some("before the run's end");
        self.guard.note(fence, NoteKind::Acked, detail);
    }

    async fn run_to_the_end(
        &self,
        intake: &Intake,
        assignment: Assignment<'_>,
        receipt: &mut Option<Receipt>,
    ) -> Settling {
        let id = Arc::clone(&assignment.message_id);
        let (task, is_ordered) = (Arc::clone(assignment.task), assignment.is_ordered);
        let attempts = assignment.acquired.counted_attempts;
        let fence = assignment.acquired.fence.clone();
        let job_id = assignment.acquired.job_id;
        let reports = Reports::default();
        let (checkpoints, told) = (reports.watch_checkpoint(), reports.clone());
        let outcome = match assignment.acquired.cancel_requested {
            true => Outcome::Cancelled,
            false => self.attempt(assignment, reports, receipt).await,
        };
        failpoint::reach(Step::AfterRun);
        let name = outcome.name();
        let verdict = outcome.verdict(&task.settings.retry_policy(), attempts);
        let checkpoint = checkpoints.borrow().clone();
        let retry_in = match &verdict {
            Verdict::Retry { after, .. } if is_ordered => Some((*after).min(LONGEST_ORDERED_WAIT)),
            Verdict::Retry { after, .. } => Some(*after),
            _ => None,
        };
        let told = told_so_far(name, &told);
        let (settling, ()) = tokio::join!(
            self.write(intake, &fence, verdict, retry_in, checkpoint, name),
            self.guard.keep_attempt(&fence, &told),
        );
        if is_ordered || self.has_limits(intake, &task) {
            self.wake_reaper.notify_one();
        }
        let ended = EventKind::Ended {
            outcome: name,
            retry_in,
        };
        self.events.tell(&id, ended);
        // That is said only of a job that has ended.
        if matches!(settling, Settling::Ack) {
            task.executor.forget(job_id).await;
        }
        settling
    }

    /// Whether jobs may wait in the table for this one's room.
    fn has_limits(&self, intake: &Intake, task: &ConfiguredTask) -> bool {
        task.settings.concurrency.is_some()
            || task.settings.gpus > 0
            || intake.settings.concurrency.is_some()
    }

    async fn attempt(
        &self,
        assignment: Assignment<'_>,
        reports: Reports,
        receipt: &mut Option<Receipt>,
    ) -> Outcome {
        let Assignment {
            message_id: id,
            task,
            payload,
            data,
            acquired,
            devices,
            ..
        } = assignment;
        let mut lease = self.keeper.keep(&acquired);
        info!("started");
        let started = EventKind::Started {
            job_id: acquired.job_id,
            task: task.name.clone(),
            attempt: acquired.fence.attempt,
        };
        self.events.tell(&id, started);
        let (progress, checkpoints) = (reports.watch_progress(), reports.watch_checkpoint());
        let told = reports.clone();
        let fence = acquired.fence.clone();
        let stop_patience = task.stop_patience(self.stop_grace);
        let attempt = Attempt {
            data,
            devices,
            ..attempt_of(task, acquired, &id, payload, reports, &lease)
        };
        let stopping = &self.shutdown.stopping;
        failpoint::reach(Step::DuringRun);
        let outcome = tokio::select! {
            outcome = supervise(task, attempt, &mut lease, stopping, stop_patience) => outcome,
            never = self.relay_progress(&id, progress) => never,
            never = self.keep_checkpoints(&fence, task, checkpoints, receipt) => never,
            never = self.keep_telling(&fence, told) => never,
        };
        match outcome {
            // Whoever stops this worker may have told its programs, too.
            Outcome::Failed {
                error,
                permanent: false,
            } if self.shutdown.draining.is_cancelled() => {
                info!(%error, "failed while the worker stops: that counts as interrupted");
                Outcome::Interrupted
            }
            outcome => outcome,
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

    /// Writes checkpoints down as they come, the newest where several come at
    /// once; the first one is what `after_checkpoint` acks after. Never
    /// completes.
    async fn keep_checkpoints(
        &self,
        fence: &Fence,
        task: &ConfiguredTask,
        mut checkpoints: watch::Receiver<Option<Checkpoint>>,
        receipt: &mut Option<Receipt>,
    ) -> Outcome {
        let mut kept: Option<Checkpoint> = None;
        while checkpoints.changed().await.is_ok() {
            let newest = checkpoints.borrow_and_update().clone();
            let Some(checkpoint) = newest.filter(|newest| kept.as_ref() != Some(newest)) else {
                continue;
            };
            let acks = task.settings.ack == AckTiming::AfterCheckpoint;
            if !self.guard.save_checkpoint(fence, &checkpoint, acks).await {
                warn!("a checkpoint is not kept: the job is another worker's by now");
                continue;
            }
            debug!("a checkpoint is kept");
            if kept.replace(checkpoint).is_none() {
                let detail = kept.as_deref();
                self.guard.note(fence, NoteKind::Checkpointed, detail);
            }
            if acks && let Some(receipt) = receipt.take() {
                self.ack_early(fence, receipt);
            }
            // The last one is written with the run's end in any case.
            sleep(BETWEEN_CHECKPOINTS).await;
        }
        std::future::pending().await
    }

    /// Puts on record now and then what the run has told so far: were its worker
    /// lost, that would stay. Never completes.
    async fn keep_telling(&self, fence: &Fence, reports: Reports) -> Outcome {
        loop {
            sleep(BETWEEN_TELLINGS).await;
            let told = told_so_far("running", &reports);
            self.guard.keep_attempt(fence, &told).await;
        }
    }

    async fn write(
        &self,
        intake: &Intake,
        fence: &Fence,
        verdict: Verdict,
        retry_in: Option<Duration>,
        checkpoint: Option<Checkpoint>,
        outcome: &str,
    ) -> Settling {
        match verdict {
            Verdict::Finish(ending) => {
                self.finish(intake, fence, ending, checkpoint, outcome)
                    .await
            }
            Verdict::Retry { error, .. } => {
                let retry_in = retry_in.unwrap_or_default();
                let delay = humantime::format_duration(Duration::from_secs(retry_in.as_secs()));
                warn!(outcome, %error, retry_in = %delay, "failed; it is tried again");
                let why = Released::Failed { error, retry_in };
                self.release(fence, why, checkpoint).await;
                Settling::HoldUntil(Instant::now() + retry_in)
            }
            Verdict::Release => {
                info!("interrupted by the shutdown; another worker may go on");
                self.release(fence, Released::Interrupted, checkpoint).await;
                Settling::Nack
            }
            Verdict::Abandon => {
                warn!("the lease is lost: the run was stopped and its outcome is not written");
                self.guard.note(fence, NoteKind::LeaseLost, None);
                // Where nobody has taken it over, the job goes on from here.
                let why = Released::Failed {
                    error: "its worker lost the lease, and stopped the run".to_owned(),
                    retry_in: Duration::ZERO,
                };
                self.release(fence, why, checkpoint).await;
                Settling::HoldUntil(Instant::now())
            }
        }
    }

    async fn finish(
        &self,
        intake: &Intake,
        fence: &Fence,
        ending: Ending,
        checkpoint: Option<Checkpoint>,
        outcome: &str,
    ) -> Settling {
        match &ending.error {
            Some(error) => warn!(outcome, %error, "ended"),
            None => info!(outcome, "ended"),
        }
        let finish = Finish {
            fence: fence.clone(),
            ending,
            checkpoint,
            dead_letter_topic: intake.dead_letter_topic.clone(),
        };
        failpoint::reach(Step::BeforeFinish);
        let finished = self.guard.finish(&finish, &self.shutdown.giving_up).await;
        failpoint::reach(Step::AfterFinish);
        match finished {
            Some(true) => {
                self.wake_dead_letters.notify_one();
                Settling::Ack
            }
            Some(false) => {
                warn!("another worker has taken the job over: finishing changed 0 rows");
                Settling::HoldUntil(Instant::now())
            }
            None => {
                warn!("stopped before the outcome could be written; the job will run again");
                Settling::Nack
            }
        }
    }

    pub(super) async fn give_back(&self, fence: &Fence) {
        self.release(fence, Released::Interrupted, None).await;
    }

    async fn release(&self, fence: &Fence, why: Released, checkpoint: Option<Checkpoint>) {
        let release = Release {
            fence: fence.clone(),
            why,
            checkpoint,
        };
        match self.guard.release(&release, &self.shutdown.giving_up).await {
            Some(true) => info!("the claim is given back"),
            Some(false) => warn!("another worker has taken the job over: 0 rows changed"),
            None => warn!("the claim could not be given back; its lease will end"),
        }
    }
}

fn told_so_far(outcome: &'static str, reports: &Reports) -> Told {
    Told {
        outcome,
        log: reports.tail(),
        series: reports.series(),
    }
}

fn attempt_of(
    task: &ConfiguredTask,
    acquired: Acquired,
    message_id: &Arc<str>,
    payload: Payload,
    reports: Reports,
    lease: &KeptLease,
) -> Attempt {
    let timeout = task.settings.timeout.map(TimeDelta::from_std);
    Attempt {
        job_id: acquired.job_id,
        task: task.name.as_str().into(),
        fence: acquired.fence,
        message_id: Arc::clone(message_id),
        payload: Arc::new(payload),
        checkpoint: acquired.checkpoint,
        deadline: timeout
            .and_then(Result::ok)
            .and_then(|timeout| Utc::now().checked_add_signed(timeout)),
        data: Bytes::new(),
        devices: None,
        reports,
        valid_until: lease.validity(),
        stop: CancellationToken::new(),
    }
}
