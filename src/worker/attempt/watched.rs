//! What goes on beside a run: its progress is passed on, its checkpoints are stored, its
//! reports recorded.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, warn};

use super::Context;
use crate::config::AckTiming;
use crate::failpoint::{self, Step};
use crate::guard::Guard;
use crate::job::Fence;
use crate::outcome::Outcome;
use crate::pubsub::Receipt;
use crate::record::{AttemptReport, NoteKind};
use crate::report::{Checkpoint, Progress, Reports};
use crate::worker::events::EventKind;

/// A run may report checkpoints as often as it likes; one is written this often.
const BETWEEN_CHECKPOINTS: Duration = Duration::from_secs(1);
/// How often a run's reports are recorded while it goes on.
const BETWEEN_RECORDS: Duration = Duration::from_secs(30);

/// A run, seen from beside it.
pub(super) struct Watched<'a> {
    pub(super) context: &'a Context,
    pub(super) fence: Fence,
    pub(super) message_id: Arc<str>,
    pub(super) reports: Reports,
}

impl Watched<'_> {
    /// Passes progress reports on until the run ends. Never completes.
    pub(super) async fn relay_progress(&self, mut reports: watch::Receiver<Progress>) -> Outcome {
        while reports.changed().await.is_ok() {
            let report = reports.borrow_and_update().clone();
            let progressed = EventKind::Progressed(report);
            self.context.events.tell(&self.message_id, progressed);
        }
        std::future::pending().await
    }

    /// Stores checkpoints as they come, only the newest of several. With
    /// `after_checkpoint`, the first one acks the message. Never completes.
    pub(super) async fn store_checkpoints(
        &self,
        ack: AckTiming,
        mut checkpoints: watch::Receiver<Option<Checkpoint>>,
        delivery: &mut Option<Receipt>,
    ) -> Outcome {
        let guard = &self.context.guard;
        let acks = ack == AckTiming::AfterCheckpoint;
        let mut stored: Option<Checkpoint> = None;
        while checkpoints.changed().await.is_ok() {
            let newest = checkpoints.borrow_and_update().clone();
            let Some(checkpoint) = newest.filter(|newest| stored.as_ref() != Some(newest)) else {
                continue;
            };
            if !guard.save_checkpoint(&self.fence, &checkpoint, acks).await {
                warn!("a checkpoint is not stored: the job is another worker's by now");
                continue;
            }
            debug!("a checkpoint is stored");
            if stored.replace(checkpoint).is_none() {
                let detail = stored.as_deref();
                guard.note(&self.fence, NoteKind::Checkpointed, detail);
            }
            if acks {
                ack_early(guard, &self.fence, delivery);
            }
            // The last one is written with the run's end in any case.
            sleep(BETWEEN_CHECKPOINTS).await;
        }
        std::future::pending().await
    }

    /// Records the run's reports now and then, so that they survive the worker. Never
    /// completes.
    pub(super) async fn record_now_and_then(&self) -> Outcome {
        loop {
            sleep(BETWEEN_RECORDS).await;
            let report = report_so_far("running", &self.reports);
            let guard = &self.context.guard;
            guard.record_attempt(&self.fence, &report).await;
        }
    }
}

/// Acks while the job still has its room.
pub(super) fn ack_early(guard: &Guard, fence: &Fence, delivery: &mut Option<Receipt>) {
    let Some(delivery) = delivery.take() else {
        return;
    };
    failpoint::reach(Step::BeforeAck);
    delivery.ack_without_a_successor();
    failpoint::reach(Step::AfterAck);
    guard.note(fence, NoteKind::Acked, Some("before the run's end"));
}

pub(super) fn report_so_far(outcome: &'static str, reports: &Reports) -> AttemptReport {
    AttemptReport {
        outcome,
        log: reports.tail(),
        series: reports.series(),
    }
}
