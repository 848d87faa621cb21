//! One attempt of a job, from its claim to the settled delivery.
//!
//! An attempt owns its claim, its lease, its delivery and its room. Invariant: the lease
//! is renewed until the ending is written or given up; only then is the delivery settled,
//! once; only then are lease and room released.

mod watched;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{TimeDelta, Utc};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error_span, info, warn};

use super::admission::{Admission, Room};
use super::events::{EventKind, Events};
use super::hold::{HeldDeliveries, Holding};
use super::intake::Intake;
use super::lease_keeper::{Lease, LeaseKeeper};
use super::supervise::supervise;
use crate::config::AckTiming;
use crate::executor;
use crate::failpoint::{self, Step};
use crate::guard::Guard;
use crate::job::{Acquired, Fence};
use crate::outcome::{Ending, Outcome, Verdict};
use crate::pubsub::Receipt;
use crate::record::NoteKind;
use crate::registry::ConfiguredTask;
use crate::report::{Checkpoint, Reports};
use crate::shutdown::Shutdown;
use crate::store::{Finish, Release, Released};
use watched::{Watched, ack_early, report_so_far};

/// A failing job blocks those behind it in its ordering key, so it is retried after at
/// most this long, even if its task's backoff is longer.
const LONGEST_ORDERED_WAIT: Duration = Duration::from_secs(10);

/// The parts of a worker that its attempts share.
pub(super) struct Context {
    pub(super) guard: Guard,
    pub(super) keeper: LeaseKeeper,
    pub(super) admission: Admission,
    pub(super) held: HeldDeliveries,
    pub(super) stop_grace: Duration,
    pub(super) shutdown: Shutdown,
    pub(super) events: Events,
    pub(super) wake_dead_letters: Arc<Notify>,
}

/// A job with what is needed to run it.
pub(super) struct Assignment {
    pub(super) intake: Arc<Intake>,
    pub(super) task: Arc<ConfiguredTask>,
    pub(super) message_id: Arc<str>,
    pub(super) is_ordered: bool,
    /// The message's data: the request.
    pub(super) data: Bytes,
}

/// An acquired job while it runs.
pub(super) struct Attempt {
    context: Arc<Context>,
    job: Assignment,
    acquired: Acquired,
    reports: Reports,
    /// None once it is acked, or if the job came from the queue.
    delivery: Option<Receipt>,
    lease: Lease,
    room: Room,
}

/// What to tell the broker once the ending is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Settling {
    Ack,
    /// Another worker may go on, or somebody must claim the job anew.
    Nack,
    /// Hold the delivery, and look at its job then.
    HoldUntil(Instant),
}

impl Attempt {
    /// Starts renewing the lease.
    pub(super) fn new(
        context: &Arc<Context>,
        job: Assignment,
        acquired: Acquired,
        delivery: Option<Receipt>,
        room: Room,
    ) -> Self {
        Self {
            context: Arc::clone(context),
            lease: context.keeper.begin(&acquired),
            job,
            acquired,
            reports: Reports::default(),
            delivery,
            room,
        }
    }

    fn fence(&self) -> &Fence {
        &self.acquired.fence
    }

    /// Runs the job, records its ending and settles its delivery.
    pub(super) async fn run(self) {
        let span = error_span!("job", job.id = %self.acquired.job_id, task.name = self.job.task.name, attempt = self.fence().attempt);
        self.run_to_the_end().instrument(span).await;
    }

    async fn run_to_the_end(mut self) {
        // A job that has not started when the worker drains is given back.
        let starts = !self.context.shutdown.draining.is_cancelled();
        if starts && self.job.task.settings.ack == AckTiming::BeforeRun {
            // The claim has committed, payload included.
            ack_early(
                &self.context.guard,
                &self.acquired.fence,
                &mut self.delivery,
            );
        }
        let outcome = match self.acquired.cancel_requested {
            true => Outcome::Cancelled,
            false if !starts => Outcome::Interrupted,
            false => self.execute().await,
        };
        failpoint::reach(Step::AfterRun);
        let settling = self.write_ending(outcome).await;
        // Only for a job that has ended.
        if settling == Settling::Ack {
            let executor = &self.job.task.executor;
            executor.forget(self.acquired.job_id).await;
        }
        if self.job.is_ordered {
            // The next job of its key may run now, before anything is pulled.
            self.context.admission.sweep_first();
        }
        self.settle(settling);
        self.let_go();
    }

    async fn execute(&mut self) -> Outcome {
        info!("started");
        let started = EventKind::Started {
            job_id: self.acquired.job_id,
            task: self.job.task.name.clone(),
            attempt: self.fence().attempt,
        };
        self.context.events.tell(&self.job.message_id, started);
        let execution = self.execution();
        let task = Arc::clone(&self.job.task);
        let context = Arc::clone(&self.context);
        let watched = Watched {
            context: &context,
            fence: self.acquired.fence.clone(),
            message_id: Arc::clone(&self.job.message_id),
            reports: self.reports.clone(),
        };
        let (progress, checkpoints) = (
            self.reports.watch_progress(),
            self.reports.watch_checkpoint(),
        );
        let patience = task.stop_patience(context.stop_grace);
        let stopping = &context.shutdown.stopping;
        failpoint::reach(Step::DuringRun);
        let outcome = tokio::select! {
            outcome = supervise(&task, execution, &mut self.lease, stopping, patience) => outcome,
            never = watched.relay_progress(progress) => never,
            never = watched.store_checkpoints(task.settings.ack, checkpoints, &mut self.delivery) => never,
            never = watched.record_now_and_then() => never,
        };
        match outcome {
            // Whoever stops this worker may have signalled its programs, too.
            Outcome::Failed {
                error,
                permanent: false,
            } if context.shutdown.draining.is_cancelled() => {
                info!(%error, "failed while the worker stops: that counts as interrupted");
                Outcome::Interrupted
            }
            outcome => outcome,
        }
    }

    fn execution(&self) -> executor::Attempt {
        let timeout = self.job.task.settings.timeout.map(TimeDelta::from_std);
        executor::Attempt {
            job_id: self.acquired.job_id,
            task: self.job.task.name.as_str().into(),
            fence: self.acquired.fence.clone(),
            message_id: Arc::clone(&self.job.message_id),
            data: self.job.data.clone(),
            checkpoint: self.acquired.checkpoint.clone(),
            deadline: timeout
                .and_then(Result::ok)
                .and_then(|timeout| Utc::now().checked_add_signed(timeout)),
            devices: self.room.begin(),
            reports: self.reports.clone(),
            valid_until: self.lease.validity(),
            stop: CancellationToken::new(),
        }
    }

    /// Writes what becomes of the job; retries until the worker gives up.
    async fn write_ending(&self, outcome: Outcome) -> Settling {
        let name = outcome.name();
        let policy = self.job.task.settings.retry_policy();
        let mut verdict = outcome.verdict(&policy, self.acquired.counted_attempts);
        if let Verdict::Retry { after, .. } = &mut verdict
            && self.job.is_ordered
        {
            *after = (*after).min(LONGEST_ORDERED_WAIT);
        }
        let retry_in = match &verdict {
            Verdict::Retry { after, .. } => Some(*after),
            _ => None,
        };
        let report = report_so_far(name, &self.reports);
        let (settling, ()) = tokio::join!(
            self.write(verdict, name),
            self.context.guard.record_attempt(self.fence(), &report),
        );
        let ended = EventKind::Ended {
            outcome: name,
            retry_in,
        };
        self.context.events.tell(&self.job.message_id, ended);
        settling
    }

    async fn write(&self, verdict: Verdict, outcome: &str) -> Settling {
        match verdict {
            Verdict::Finish(ending) => self.finish(ending, outcome).await,
            Verdict::Retry { error, after } => {
                let delay = humantime::format_duration(Duration::from_secs(after.as_secs()));
                warn!(outcome, %error, retry_in = %delay, "failed; it is tried again");
                self.release(Released::Failed {
                    error,
                    retry_in: after,
                })
                .await;
                Settling::HoldUntil(Instant::now() + after)
            }
            Verdict::Release => {
                info!("interrupted by the shutdown; another worker may go on");
                self.release(Released::Interrupted).await;
                Settling::Nack
            }
            Verdict::Abandon => {
                warn!("the lease is lost: the run was stopped and its outcome is not written");
                let guard = &self.context.guard;
                guard.note(self.fence(), NoteKind::LeaseLost, None);
                // If nobody has taken it over, the job goes on from here.
                self.release(Released::Failed {
                    error: "its worker lost the lease, and stopped the run".to_owned(),
                    retry_in: Duration::ZERO,
                })
                .await;
                Settling::HoldUntil(Instant::now())
            }
        }
    }

    async fn finish(&self, ending: Ending, outcome: &str) -> Settling {
        match &ending.error {
            Some(error) => warn!(outcome, %error, "ended"),
            None => info!(outcome, "ended"),
        }
        let finish = Finish {
            fence: self.fence().clone(),
            ending,
            checkpoint: self.last_checkpoint(),
            dead_letter_topic: self.job.intake.dead_letter_topic.clone(),
        };
        failpoint::reach(Step::BeforeFinish);
        let giving_up = &self.context.shutdown.giving_up;
        let finished = self.context.guard.finish(&finish, giving_up).await;
        failpoint::reach(Step::AfterFinish);
        match finished {
            Some(true) => {
                self.context.wake_dead_letters.notify_one();
                Settling::Ack
            }
            Some(false) => {
                warn!("another worker has taken the job over: finishing changed 0 rows");
                Settling::HoldUntil(Instant::now())
            }
            None if giving_up.is_cancelled() => {
                warn!("stopped before the outcome could be written; the job will run again");
                Settling::Nack
            }
            None => {
                warn!(
                    "the outcome cannot be written; the job will run again once its lease expires"
                );
                Settling::HoldUntil(Instant::now())
            }
        }
    }

    async fn release(&self, why: Released) {
        let release = Release {
            fence: self.fence().clone(),
            why,
            checkpoint: self.last_checkpoint(),
        };
        let giving_up = &self.context.shutdown.giving_up;
        match self.context.guard.release(&release, giving_up).await {
            Some(true) => info!("the claim is given back"),
            Some(false) => warn!("another worker has taken the job over: 0 rows changed"),
            None => warn!("the claim could not be given back; its lease will expire"),
        }
    }

    fn last_checkpoint(&self) -> Option<Checkpoint> {
        self.reports.watch_checkpoint().borrow().clone()
    }

    fn settle(&mut self, settling: Settling) {
        let Some(delivery) = self.delivery.take() else {
            return;
        };
        let Context {
            guard,
            admission,
            held,
            ..
        } = &*self.context;
        match settling {
            Settling::Ack => {
                guard.note(self.fence(), NoteKind::Acked, Some("after the run"));
                failpoint::reach(Step::BeforeFinalAck);
                match admission.wants_a_successor() {
                    true => delivery.ack(),
                    false => delivery.ack_without_a_successor(),
                }
            }
            Settling::Nack => delivery.nack(),
            Settling::HoldUntil(until) => held.hold(
                delivery,
                Holding {
                    key: self.fence().key.clone(),
                    place: admission.hold(&self.job.intake.name),
                    until,
                },
            ),
        }
    }

    /// Stops renewing the lease and frees the room: the ending is written or given up.
    fn let_go(self) {
        let Self {
            context,
            acquired,
            lease,
            room,
            ..
        } = self;
        drop(lease);
        context.held.look_now(&acquired.fence.key);
        drop(room);
    }
}
