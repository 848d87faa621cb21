//! Runs a [`Task`] on this process's runtime.

use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::task::AbortOnDropHandle;

use super::{Attempt, Executor};
use crate::outcome::Outcome;
use crate::task::{Run, Task, TaskError};

/// The executor of a task that is linked into this program.
pub struct InProcess {
    task: Arc<dyn Task>,
}

impl InProcess {
    #[must_use]
    pub fn new(task: Arc<dyn Task>) -> Self {
        Self { task }
    }
}

#[async_trait]
impl Executor for InProcess {
    async fn execute(&self, attempt: Attempt) -> Outcome {
        let task = Arc::clone(&self.task);
        let run = Run::new(
            &attempt.job_id.to_string(),
            attempt.fence.attempt,
            attempt.data,
            attempt.reports,
            attempt.stop,
        )
        .resuming_from(attempt.checkpoint);
        // In a separate tokio task, so that a panic does not end the worker.
        let running = tokio::spawn(async move { task.run(run).await });
        match AbortOnDropHandle::new(running).await {
            Ok(Ok(result)) => Outcome::Succeeded(result.into()),
            Ok(Err(TaskError::Permanent(error))) => Outcome::Failed {
                error,
                permanent: true,
            },
            Ok(Err(TaskError::Transient(error))) => Outcome::failed(format!("{error:#}")),
            Err(panic) => Outcome::failed(match panic.try_into_panic() {
                Ok(panic) => format!("the task panicked: {}", panic_text(&*panic)),
                Err(_) => "the task was aborted".to_owned(),
            }),
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    struct Scripted(fn() -> Result<Value, TaskError>);

    #[async_trait]
    impl Task for Scripted {
        async fn run(&self, _run: Run) -> Result<Value, TaskError> {
            (self.0)()
        }
    }

    async fn outcome_of(script: fn() -> Result<Value, TaskError>) -> Outcome {
        InProcess::new(Arc::new(Scripted(script)))
            .execute(Attempt::of(json!({})))
            .await
    }

    #[tokio::test]
    async fn a_result_is_success() {
        let outcome = outcome_of(|| Ok(json!(1))).await;
        assert_eq!(outcome, Outcome::Succeeded(json!(1).into()));
    }

    #[tokio::test]
    async fn only_a_permanent_error_is_permanent() {
        let outcome = outcome_of(|| Err(TaskError::permanent("no such column"))).await;
        assert!(matches!(
            outcome,
            Outcome::Failed {
                permanent: true,
                ..
            }
        ));
        let outcome = outcome_of(|| Err(anyhow::anyhow!("disk full").into())).await;
        assert_eq!(outcome, Outcome::failed("disk full"));
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_with_its_message() {
        let outcome = outcome_of(|| panic!("index 3")).await;
        assert_eq!(outcome, Outcome::failed("the task panicked: index 3"));
    }
}
