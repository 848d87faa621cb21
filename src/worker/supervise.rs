//! Sees one attempt to its end: timeout, lost lease, cancel, shutdown.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::lease_keeper::Lease;
use crate::executor::Attempt;
use crate::outcome::Outcome;
use crate::registry::ConfiguredTask;

/// Runs the attempt. Anything that ends it early asks it to stop, waits the stop grace,
/// and then abandons it; the outcome says what ended it.
pub(super) async fn supervise(
    task: &ConfiguredTask,
    attempt: Attempt,
    lease: &mut Lease,
    stopping: &CancellationToken,
    stop_grace: Duration,
) -> Outcome {
    let stop = attempt.stop.clone();
    let cancelled = lease.cancelled();
    let mut run = task.executor.execute(attempt);
    let early = tokio::select! {
        // A run that has ended takes precedence over everything else.
        biased;
        outcome = &mut run => return outcome,
        () = lease.lost() => Outcome::LeaseLost,
        () = cancelled.cancelled() => Outcome::Cancelled,
        () = over(task.settings.timeout) => Outcome::TimedOut,
        () = stopping.cancelled() => Outcome::Interrupted,
    };
    stop.cancel();
    let last_word = timeout(stop_grace, run).await;
    if last_word.is_err() {
        warn!(
            reason = early.name(),
            "the run did not stop in time and is abandoned"
        );
    }
    match (early, last_word) {
        // It succeeded before it stopped, and its lease still holds.
        (
            Outcome::Interrupted | Outcome::TimedOut | Outcome::Cancelled,
            Ok(done @ Outcome::Succeeded(_)),
        ) => done,
        (early, _) => early,
    }
}

async fn over(limit: Option<Duration>) {
    match limit {
        Some(limit) => sleep(limit).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
