//! The life of one delivery, whole: decode → claim → run → finish → settle.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{Instrument, error, error_span, info, warn};
use uuid::Uuid;

use super::events::{EventKind, Events};
use super::hold::Unknown;
use super::intake::Intake;
use super::key_turns::Turn;
use super::lease_keeper::LeaseKeeper;
use super::run::{Assignment, Settling};
use super::slots::{Slot, Slots};
use crate::config::{AckTiming, WithoutDedupeKey};
use crate::failpoint::{self, Step};
use crate::guard::{Guard, Unrunnable};
use crate::job::{Can, Claim, ClaimRequest, JobKey, Limits, Reaped};
use crate::message::{Message, Request};
use crate::outcome::DeadReason;
use crate::pubsub::{Delivery, Receipt};
use crate::registry::{ConfiguredTask, ConfiguredTasks};
use crate::shutdown::Shutdown;
use crate::store::{Refused, StoreError};

pub(super) struct Processor {
    pub(super) guard: Guard,
    pub(super) tasks: ConfiguredTasks,
    pub(super) intakes: BTreeMap<String, Arc<Intake>>,
    pub(super) slots: Slots,
    pub(super) keeper: LeaseKeeper,
    pub(super) stop_grace: Duration,
    pub(super) unknown_task_patience: Duration,
    pub(super) shutdown: Shutdown,
    pub(super) events: Events,
    /// Told when the table may have something to run, or to publish.
    pub(super) wake_reaper: Arc<Notify>,
    pub(super) wake_dead_letters: Arc<Notify>,
}

/// A request with all that is needed to claim its job.
struct Wish {
    request: Request,
    key: JobKey,
    can: Can,
    /// None where the task is not known here.
    task: Option<Arc<ConfiguredTask>>,
}

impl Processor {
    /// Takes one delivery through its life. The slot comes free at the end, or
    /// as soon as it is clear that there is nothing to run.
    pub(super) async fn process(
        &self,
        intake: &Intake,
        delivery: Delivery,
        slot: Slot,
        turn: Option<Turn>,
    ) {
        let span = error_span!("delivery", message.id = %delivery.message.id, delivery.attempt = delivery.attempt);
        let (message, receipt) = delivery.into_parts();
        failpoint::reach(Step::AfterReceive);
        self.process_message(intake, message, receipt, slot, turn)
            .instrument(span)
            .await;
    }

    /// Runs a job from the table, without a delivery.
    pub(super) async fn process_reaped(&self, reaped: Reaped, slot: Slot) {
        let fence = reaped.acquired.fence.clone();
        let Some(intake) = self.intakes.get(&*fence.key.subscription) else {
            return self.give_back(&fence).await;
        };
        match (
            Request::decode(&reaped.payload),
            self.tasks.get(&reaped.task),
        ) {
            (Ok(request), Some(task)) => {
                let assignment = Assignment {
                    message_id: reaped.message_id.as_str().into(),
                    is_ordered: !reaped.ordering_key.is_empty(),
                    task,
                    payload: request.payload,
                    data: reaped.payload,
                    acquired: reaped.acquired,
                    devices: slot.devices(),
                };
                self.run(intake, assignment, None, slot).await;
            }
            // Both were fine when it was claimed, and it was asked for by task.
            (request, _) => {
                error!(job = %fence.key, error = ?request.err(), "a job from the table cannot be read; it is given back");
                self.give_back(&fence).await;
            }
        }
    }

    async fn process_message(
        &self,
        intake: &Intake,
        message: Message,
        receipt: Receipt,
        mut slot: Slot,
        mut turn: Option<Turn>,
    ) {
        if let Some(turn) = &mut turn
            && !turn.comes().await
        {
            info!("an earlier message of its ordering key is not on record: handed back");
            return receipt.nack();
        }
        let wish = match self.wish(intake, &message, &mut slot) {
            Ok(wish) => wish,
            Err(unrunnable) => {
                drop(slot);
                if self.refuse(intake, message, unrunnable, receipt).await
                    && let Some(turn) = turn
                {
                    turn.recorded();
                }
                return;
            }
        };
        let slot = (wish.can == Can::Run).then_some(slot);
        let id: Arc<str> = message.id.as_str().into();
        let is_ordered = !message.ordering_key.is_empty();
        let data = message.data.clone();
        let request = self.claim_request(intake, &wish, message);
        let claim = match self.guard.claim(request).await {
            Ok(claim) => claim,
            // Before those behind it in its ordering key.
            Err(error) if is_ordered => {
                error!(%error, "the delivery is handed back");
                receipt.nack();
                return drop(turn);
            }
            Err(error) => return self.try_later(intake, &error, receipt),
        };
        failpoint::reach(Step::AfterClaim);
        if let Some(turn) = turn {
            turn.recorded();
        }
        match (claim, wish.task, slot) {
            (Claim::Acquired(acquired), Some(task), Some(slot)) => {
                let assignment = Assignment {
                    message_id: id,
                    is_ordered,
                    task: &task,
                    payload: wish.request.payload,
                    data,
                    acquired,
                    devices: slot.devices(),
                };
                self.run(intake, assignment, Some(receipt), slot).await;
            }
            // Only what can run is acquired.
            (Claim::Acquired(acquired), _, _) => self.give_back(&acquired.fence).await,
            (Claim::AlreadyFinished(state), _, _) => {
                info!(state = state.as_str(), "duplicate of a finished message");
                self.events.tell(&id, EventKind::Suppressed);
                receipt.ack();
            }
            (Claim::HeldUntil { until, acked }, _, _) => {
                info!("duplicate of a message that is running");
                self.events.tell(&id, EventKind::Suppressed);
                keep_or_ack(intake, wish.key, until, acked, receipt, None);
            }
            (Claim::Waiting { until, acked }, task, _) => {
                info!("its job waits in the table");
                self.events.tell(&id, EventKind::Queued);
                let unknown = task.is_none().then(|| {
                    intake.unknown(
                        self.unknown_task_patience,
                        self.unknown_task(&wish.request.task),
                    )
                });
                keep_or_ack(intake, wish.key, until, acked, receipt, unknown);
            }
        }
    }

    /// What a message asks for and what can be done about it here.
    fn wish(
        &self,
        intake: &Intake,
        message: &Message,
        slot: &mut Slot,
    ) -> Result<Wish, Box<Reason>> {
        let request = Request::decode(&message.data)
            .map_err(|error| Reason::new(DeadReason::Malformed, None, error))?;
        let settings = &intake.settings;
        let key = match settings
            .dedupe_key
            .of(&intake.name, message, &request.payload)
        {
            Ok(key) => key,
            Err(missing) => match settings.without_dedupe_key {
                WithoutDedupeKey::MessageId => JobKey::of_message_id(&intake.name, message),
                WithoutDedupeKey::DeadLetter => {
                    let task = Some(request.task);
                    return Err(Reason::new(DeadReason::NoDedupeKey, task, missing));
                }
            },
        };
        let task = self.tasks.get(&request.task).cloned();
        let can = match &task {
            // By its id: a corrected request may come under the same key.
            None if self.unknown_task_patience.is_zero() => {
                let error = self.unknown_task(&request.task);
                return Err(Reason::new(
                    DeadReason::UnknownTask,
                    Some(request.task),
                    error,
                ));
            }
            None => Can::RecordUnknown,
            Some(task) if self.slots.admit_task(slot, &task.name) => Can::Run,
            Some(_) => Can::Record,
        };
        Ok(Wish {
            request,
            key,
            can,
            task,
        })
    }

    fn claim_request(&self, intake: &Intake, wish: &Wish, message: Message) -> ClaimRequest {
        // Once the message is acked only the table can bring its job back.
        let acks_early = wish
            .task
            .as_ref()
            .is_some_and(|task| task.settings.ack == AckTiming::BeforeRun);
        ClaimRequest {
            key: wish.key.clone(),
            job_id: Uuid::now_v7(),
            token: Uuid::new_v4(),
            task: wish.request.task.clone(),
            message,
            reap_delay: match acks_early {
                true => Duration::ZERO,
                false => intake.settings.ack_deadline,
            },
            can: wish.can,
            limits: Limits {
                max_attempts: wish
                    .task
                    .as_ref()
                    .map_or(u32::MAX, |task| task.settings.max_attempts),
                dead_letter_topic: intake.dead_letter_topic.clone(),
            },
        }
    }

    fn unknown_task(&self, name: &str) -> String {
        let known: Vec<&str> = self.tasks.names().collect();
        let known = known.join(", ");
        format!("no task `{name}` is known here; known: {known}")
    }

    /// A message that will never run is put on record; only then is it acked.
    /// False where it could not be.
    async fn refuse(
        &self,
        intake: &Intake,
        message: Message,
        reason: Box<Reason>,
        receipt: Receipt,
    ) -> bool {
        let id: Arc<str> = message.id.as_str().into();
        let error = reason.error.clone();
        let unrunnable = Unrunnable {
            key: JobKey::of_message_id(&intake.name, &message),
            task: reason.task,
            message,
            reason: reason.reason,
            error: reason.error,
            dead_letter_topic: intake.dead_letter_topic.clone(),
        };
        match self.guard.refuse(unrunnable).await {
            Ok(Refused::Recorded) => {
                warn!(reason = %error, "refused");
                self.events.tell(&id, EventKind::Refused { reason: error });
                self.wake_dead_letters.notify_one();
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
                intake.held.pause(receipt);
            }
            Err(error) => {
                self.try_later(intake, &error, receipt);
                return false;
            }
        }
        true
    }

    /// Nothing is known about the message, so it must not be acked.
    fn try_later(&self, intake: &Intake, error: &StoreError, receipt: Receipt) {
        error!(%error, "the delivery is handed back after a pause");
        intake.held.pause(receipt);
    }

    /// What the broker is told about a delivery whose run has ended.
    pub(super) fn settle(&self, intake: &Intake, key: JobKey, receipt: Receipt, how: Settling) {
        match how {
            Settling::Ack => {
                failpoint::reach(Step::BeforeFinalAck);
                receipt.ack();
            }
            Settling::Nack => receipt.nack(),
            Settling::HoldUntil(until) => intake.held.hold(key, until, receipt, None),
        }
    }
}

/// Why a message is refused.
struct Reason {
    reason: DeadReason,
    task: Option<String>,
    error: String,
}

impl Reason {
    fn new(reason: DeadReason, task: Option<String>, error: impl ToString) -> Box<Self> {
        Box::new(Self {
            reason,
            task,
            error: error.to_string(),
        })
    }
}

/// Where the table is to bring the job back, a delivery of it is not needed any
/// more. Otherwise acking any delivery of the message would settle it while its
/// job can still be lost.
fn keep_or_ack(
    intake: &Intake,
    key: JobKey,
    until: Instant,
    acked: bool,
    receipt: Receipt,
    unknown: Option<Unknown>,
) {
    match acked {
        true => receipt.ack(),
        false => intake.held.hold(key, until, receipt, unknown),
    }
}
