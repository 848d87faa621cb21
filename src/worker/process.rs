//! The life of one delivery: decode → admit → claim → run or hold.

mod decode;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, error, error_span, info, warn};
use uuid::Uuid;

use super::admission::{Load, Place, Room};
use super::attempt::{Assignment, Attempt, Context};
use super::events::EventKind;
use super::hold::Holding;
use super::intake::Intake;
use super::key_turns::{FETCHED_BEFORE, Turn};
use crate::config::AckTiming;
use crate::failpoint::{self, Step};
use crate::job::{AckTerms, Acquired, Can, Claim, ClaimRequest, Fence, Limits, Taken};
use crate::message::{Message, Request};
use crate::outcome::{DeadReason, Ending};
use crate::pubsub::{Delivery, Receipt};
use crate::registry::ConfiguredTasks;
use crate::store::{Finish, Refusal, Refused, Release, Released};
use decode::Wish;

/// Takes deliveries, and jobs from the queue, through their lives.
pub(super) struct Processor {
    pub(super) context: Arc<Context>,
    pub(super) tasks: ConfiguredTasks,
    pub(super) intakes: BTreeMap<String, Arc<Intake>>,
    pub(super) unknown_task_patience: Duration,
    pub(super) running: TaskTracker,
}

/// A decoded delivery: what it asks for, and the room for it.
struct Arrival {
    intake: Arc<Intake>,
    message: Message,
    delivery: Receipt,
    turn: Option<Turn>,
    wish: Result<Wish, Box<Refusal>>,
    load: Load,
    /// Room to run it, or a place to hold it.
    space: Space,
}

enum Space {
    Room(Room),
    Place(Place),
}

/// A delivery whose job the guard has answered for.
struct Claimed {
    intake: Arc<Intake>,
    message: Message,
    delivery: Receipt,
    wish: Wish,
    space: Space,
}

impl Claimed {
    /// Whether its claim asked for no run although this worker knows the task.
    fn only_records(&self) -> bool {
        self.wish.task.is_some() && matches!(self.space, Space::Place(_))
    }
}

impl Processor {
    /// Begins with a delivery. Returns once it has its room, or none, since that decides
    /// whether more is pulled.
    pub(super) fn begin(self: &Arc<Self>, intake: &Arc<Intake>, delivery: Delivery) {
        let span = error_span!("delivery", message.id = %delivery.message.id, delivery.attempt = delivery.attempt);
        let (message, delivery) = delivery.into_parts();
        failpoint::reach(Step::AfterReceive);
        let is_ordered = !message.ordering_key.is_empty();
        let turn = is_ordered.then(|| intake.turns.next(&message.ordering_key, &message.id));
        let wish = self.wish(intake, &message);
        let room = match &wish {
            Ok(Wish {
                key,
                task: Some(task),
                ..
            }) => self.context.admission.admit(key, &task.name),
            _ => None,
        };
        let space = room.map_or_else(
            || Space::Place(self.context.admission.hold(&intake.name)),
            Space::Room,
        );
        let load = self.context.admission.load(message.data.len());
        let arrival = Arrival {
            intake: Arc::clone(intake),
            message,
            delivery,
            turn,
            wish,
            load,
            space,
        };
        let processor = Arc::clone(self);
        self.running
            .spawn(async move { processor.process(arrival).await }.instrument(span));
    }

    /// Runs a job from the queue, with its delivery if that is held here.
    pub(super) async fn run_taken(&self, taken: Taken, room: Room) {
        let fence = taken.acquired.fence.clone();
        let Some(intake) = self.intakes.get(&*fence.key.subscription) else {
            return self.give_back(&fence).await;
        };
        if let Err(error) = Request::decode(&taken.payload) {
            let error = error.to_string();
            return self.end_unreadable(intake, &fence, &error).await;
        }
        let Some(task) = self.tasks.get(&taken.task) else {
            return self.give_back(&fence).await;
        };
        let job = Assignment {
            intake: Arc::clone(intake),
            task: Arc::clone(task),
            message_id: taken.message_id.as_str().into(),
            is_ordered: !taken.ordering_key.is_empty(),
            data: taken.payload,
        };
        let delivery = self.context.held.take(&fence.key);
        let attempt = Attempt::new(&self.context, job, taken.acquired, delivery, room);
        attempt.run().await;
    }

    async fn process(&self, arrival: Arrival) {
        let Arrival {
            intake,
            message,
            delivery,
            mut turn,
            wish,
            load,
            space,
        } = arrival;
        if let Some(turn) = &mut turn
            && !turn.comes().await
        {
            info!("an earlier message of its ordering key is not on record: handed back later");
            // Not at once, or it would come again and again before the earlier message.
            return self.context.held.hand_back_in(FETCHED_BEFORE, delivery);
        }
        let wish = match wish {
            Ok(wish) => wish,
            Err(refusal) => {
                let place = space.into_place(&self.context, &intake);
                let is_recorded = self.refuse(*refusal, delivery, place).await;
                if let (true, Some(turn)) = (is_recorded, turn) {
                    turn.recorded();
                }
                return;
            }
        };
        let request = self.claim_request(&intake, &wish, message.clone(), &space);
        let claim = match self.context.guard.claim(request).await {
            Ok(claim) => claim,
            Err(error) => {
                error!(%error, "the delivery is handed back");
                // An ordered one at once, before those behind it.
                return match turn {
                    Some(_) => delivery.nack(),
                    None => self.context.held.hand_back_later(delivery),
                };
            }
        };
        drop(load);
        if let Some(turn) = turn {
            turn.recorded();
        }
        let claimed = Claimed {
            intake,
            message,
            delivery,
            wish,
            space,
        };
        match claim {
            Claim::Acquired(acquired) => self.run_claimed(claimed, acquired).await,
            other => self.settle_or_hold(claimed, other),
        }
    }

    async fn run_claimed(&self, claimed: Claimed, acquired: Acquired) {
        failpoint::reach(Step::AfterClaim);
        let Claimed {
            intake,
            message,
            delivery,
            wish,
            space,
        } = claimed;
        let (Some(task), Space::Room(room)) = (wish.task, space) else {
            // Only a delivery with room asks to run.
            return self.give_back(&acquired.fence).await;
        };
        let job = Assignment {
            intake,
            task,
            message_id: message.id.as_str().into(),
            is_ordered: !message.ordering_key.is_empty(),
            data: message.data,
        };
        let attempt = Attempt::new(&self.context, job, acquired, Some(delivery), room);
        attempt.run().await;
    }

    /// Acks a delivery that is not needed any more; holds one whose job could still be
    /// lost, since an ack of any delivery settles the message.
    fn settle_or_hold(&self, claimed: Claimed, claim: Claim) {
        let id: Arc<str> = claimed.message.id.as_str().into();
        let tell = |kind| self.context.events.tell(&id, kind);
        match claim {
            // A claim that was acquired is run.
            Claim::Acquired(_) => {}
            Claim::AlreadyFinished(state) => {
                info!(state = state.as_str(), "duplicate of a finished message");
                tell(EventKind::Suppressed);
                claimed.delivery.ack();
            }
            Claim::RunningUntil { until, acked } => {
                info!("duplicate of a message that is running");
                tell(EventKind::Suppressed);
                match acked {
                    // The queue brings the job back, so no delivery is needed.
                    true => claimed.delivery.ack(),
                    false => self.hold(claimed, until),
                }
            }
            Claim::Waiting { acked: true, .. } => {
                info!("duplicate of a message whose job waits in the queue");
                claimed.delivery.ack();
            }
            Claim::Waiting { until, .. } => {
                info!("its job waits in the queue");
                tell(EventKind::Queued);
                let recorded_only = claimed.only_records();
                let intake = Arc::clone(&claimed.intake);
                self.hold(claimed, until);
                if recorded_only {
                    self.context.admission.queued(&intake.name);
                }
            }
        }
    }

    fn hold(&self, claimed: Claimed, until: Instant) {
        let holding = Holding {
            key: claimed.wish.key,
            place: claimed.space.into_place(&self.context, &claimed.intake),
            until,
        };
        self.context.held.hold(claimed.delivery, holding);
    }

    fn claim_request(
        &self,
        intake: &Intake,
        wish: &Wish,
        message: Message,
        space: &Space,
    ) -> ClaimRequest {
        let task = wish.task.as_ref();
        // An attempt here that could not renew for a while must renew first.
        let may_take_over =
            self.context.guard.may_take_over() && !self.context.keeper.has(&wish.key);
        ClaimRequest {
            key: wish.key.clone(),
            job_id: Uuid::now_v7(),
            token: Uuid::new_v4(),
            task: wish.request.task.clone(),
            message,
            can: match (task, space) {
                (None, _) => Can::RecordUnknown,
                (_, Space::Place(_)) => Can::Record,
                _ if may_take_over => Can::Run,
                _ => Can::RunUnlessLost,
            },
            ack: AckTerms {
                with_claim: task.is_some_and(|task| task.settings.ack == AckTiming::BeforeRun),
                deadline: intake.settings.ack_deadline,
            },
            limits: Limits {
                max_attempts: task.map_or(u32::MAX, |task| task.settings.max_attempts),
                dead_letter_topic: intake.dead_letter_topic.clone(),
            },
        }
    }

    /// Records a message that will never run; only then acks it. False if it could not be
    /// recorded.
    async fn refuse(&self, refusal: Refusal, delivery: Receipt, place: Place) -> bool {
        let Context {
            guard,
            events,
            held,
            wake_dead_letters,
            ..
        } = &*self.context;
        let id: Arc<str> = refusal.message.id.as_str().into();
        match guard.refuse(&refusal).await {
            Ok(Refused::Recorded) => {
                warn!(reason = %refusal.error, "refused");
                let reason = refusal.error;
                events.tell(&id, EventKind::Refused { reason });
                wake_dead_letters.notify_one();
                delivery.ack();
            }
            Ok(Refused::AlreadyFinished(state)) => {
                info!(state = state.as_str(), "duplicate of a finished message");
                events.tell(&id, EventKind::Suppressed);
                delivery.ack();
            }
            Ok(Refused::Claimed) => {
                info!("the message's job is claimed by a worker that knows its task");
                events.tell(&id, EventKind::Suppressed);
                // Held like any other duplicate of an unfinished job.
                let holding = Holding {
                    key: refusal.key,
                    place,
                    until: Instant::now(),
                };
                held.hold(delivery, holding);
            }
            Err(error) => {
                error!(%error, "the delivery is handed back after a pause");
                held.hand_back_later(delivery);
                return false;
            }
        }
        true
    }

    /// The payload was readable when the job was recorded, so no other worker can read it
    /// either.
    async fn end_unreadable(&self, intake: &Intake, fence: &Fence, error: &str) {
        error!(job = %fence.key, error, "the stored payload of a job cannot be read");
        let error = format!("the stored payload cannot be read: {error}");
        let finish = Finish {
            fence: fence.clone(),
            ending: Ending::dead(DeadReason::Malformed, error),
            checkpoint: None,
            dead_letter_topic: intake.dead_letter_topic.clone(),
        };
        let Context {
            guard,
            held,
            shutdown,
            wake_dead_letters,
            ..
        } = &*self.context;
        guard.finish(&finish, &shutdown.giving_up).await;
        wake_dead_letters.notify_one();
        // Its held delivery is acked once the ending is seen.
        held.look_now(&fence.key);
    }

    async fn give_back(&self, fence: &Fence) {
        let release = Release {
            fence: fence.clone(),
            why: Released::Interrupted,
            checkpoint: None,
        };
        let Context {
            guard, shutdown, ..
        } = &*self.context;
        if guard.release(&release, &shutdown.giving_up).await.is_none() {
            warn!(job = %fence.key, "the claim could not be given back; its lease will expire");
        }
    }
}

impl Space {
    /// A place to hold the delivery; frees its job's room.
    fn into_place(self, context: &Context, intake: &Intake) -> Place {
        match self {
            Self::Place(place) => place,
            Self::Room(_) => context.admission.hold(&intake.name),
        }
    }
}
