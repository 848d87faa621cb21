//! What a message asks for, or why it is refused.

use std::sync::Arc;

use uuid::Uuid;

use super::Processor;
use crate::config::WithoutDedupeKey;
use crate::job::JobKey;
use crate::message::{Message, Request};
use crate::outcome::DeadReason;
use crate::registry::ConfiguredTask;
use crate::store::Refusal;
use crate::worker::intake::Intake;

/// What is needed to claim a job.
pub(super) struct Wish {
    pub(super) request: Request,
    pub(super) key: JobKey,
    /// None if this worker does not know the task.
    pub(super) task: Option<Arc<ConfiguredTask>>,
}

impl Processor {
    /// What a message asks for, or why it will never run.
    pub(super) fn wish(&self, intake: &Intake, message: &Message) -> Result<Wish, Box<Refusal>> {
        let refusal = |reason, task, error| self.refusal(intake, message, reason, task, error);
        let request = Request::decode(&message.data)
            .map_err(|error| refusal(DeadReason::Malformed, None, error.to_string()))?;
        let settings = &intake.settings;
        let key = match settings.dedupe_key.of(&intake.name, message) {
            Ok(key) => key,
            Err(missing) => match settings.without_dedupe_key {
                WithoutDedupeKey::MessageId => JobKey::of_message_id(&intake.name, message),
                WithoutDedupeKey::DeadLetter => {
                    let task = Some(request.task);
                    return Err(refusal(DeadReason::NoDedupeKey, task, missing.to_string()));
                }
            },
        };
        let task = self.tasks.get(&request.task).cloned();
        if task.is_none() && self.unknown_task_patience.is_zero() {
            let error = self.unknown_task(&request.task);
            let task = Some(request.task);
            return Err(refusal(DeadReason::UnknownTask, task, error));
        }
        Ok(Wish { request, key, task })
    }

    fn refusal(
        &self,
        intake: &Intake,
        message: &Message,
        reason: DeadReason,
        task: Option<String>,
        error: String,
    ) -> Box<Refusal> {
        Box::new(Refusal {
            // Keyed by message id: a corrected request may use the same key.
            key: JobKey::of_message_id(&intake.name, message),
            job_id: Uuid::now_v7(),
            task,
            message: message.clone(),
            reason,
            error,
            worker: Arc::clone(&self.context.guard.terms().worker),
            dead_letter_topic: intake.dead_letter_topic.clone(),
        })
    }

    fn unknown_task(&self, name: &str) -> String {
        let known: Vec<&str> = self.tasks.names().collect();
        let known = known.join(", ");
        format!("no task `{name}` is known here; known: {known}")
    }
}
