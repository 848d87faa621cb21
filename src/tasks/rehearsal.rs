//! A task that trains nothing, for trying out a deployment and for tests.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use async_trait::async_trait;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::task::{Progress, Run, Task, TaskError};

pub const NAME: &str = "rehearsal";

/// How often a run reports progress.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// How often a run checks for the `until` file.
const POLL_EVERY: Duration = Duration::from_millis(10);

/// Runs for a given time, then succeeds or fails as requested.
///
/// Payload: `{"name":"rehearsal","seconds":1.5,"until":PATH,"log":PATH,
/// "label":"a","fail":"transient","fail_attempts":2,"checkpoint_after":0.5}`.
/// All fields except `name` are optional.
pub struct Rehearsal;

#[derive(Debug, Deserialize)]
struct Request {
    /// How long the run takes.
    #[serde(default)]
    seconds: f64,
    /// After that the run waits until this file exists.
    until: Option<PathBuf>,
    /// A file to which each run appends a line at its start and at its end.
    log: Option<PathBuf>,
    /// The run's label in the log.
    label: Option<String>,
    /// How the run fails at its end.
    fail: Option<Failure>,
    /// Attempts after this one succeed.
    fail_attempts: Option<u32>,
    /// When the run saves a checkpoint, in seconds from its start.
    checkpoint_after: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Failure {
    Permanent,
    Transient,
    Panic,
}

#[async_trait]
impl Task for Rehearsal {
    async fn run(&self, run: Run) -> Result<Value, TaskError> {
        let request: Request = run.payload_as()?;
        let length = seconds("seconds", request.seconds)?;
        let checkpoint = request.checkpoint_after;
        let mut checkpoint_after = checkpoint
            .map(|after| seconds("checkpoint_after", after))
            .transpose()?;
        let log = |event: &str| append(&request, &run, event);
        log("start")?;
        let began = Instant::now();
        let end = began + length;
        while let Some(pause) = pause_before(end, request.until.as_deref()) {
            tokio::select! {
                () = run.stop_requested() => {
                    log("stopped")?;
                    return Err(anyhow::anyhow!("stopped on request").into());
                }
                () = sleep(pause) => {}
            }
            if checkpoint_after.is_some_and(|after| began.elapsed() >= after) {
                run.save_checkpoint(&format!("rehearsal of attempt {}", run.attempt()));
                checkpoint_after = None;
            }
            let left = end.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                run.report(Progress {
                    fraction: Some(1.0 - left.as_secs_f64() / length.as_secs_f64()),
                    ..Progress::default()
                });
            }
        }
        log("end")?;
        let fails = request
            .fail_attempts
            .is_none_or(|last| run.attempt() <= last);
        match request.fail.as_ref().filter(|_| fails) {
            None => Ok(json!({ "seconds": request.seconds })),
            Some(Failure::Permanent) => Err(TaskError::permanent("told to fail for good")),
            Some(Failure::Transient) => Err(anyhow::anyhow!("told to fail").into()),
            #[expect(clippy::panic, reason = "to rehearse a task that panics")]
            Some(Failure::Panic) => panic!("told to panic"),
        }
    }
}

/// The time until the next check, or `None` if the run is over.
fn pause_before(end: Instant, until: Option<&Path>) -> Option<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        return Some(left.min(REPORT_EVERY));
    }
    until.filter(|file| !file.exists()).map(|_| POLL_EVERY)
}

fn seconds(field: &str, value: f64) -> Result<Duration, TaskError> {
    Duration::try_from_secs_f64(value)
        .map_err(|error| TaskError::permanent(format!("`{field}`: {error}")))
}

/// Appends the line in one write, so that processes can share the file.
fn append(request: &Request, run: &Run, event: &str) -> Result<(), TaskError> {
    let Some(log) = &request.log else {
        return Ok(());
    };
    let at = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let line = json!({
        "job": run.job_id(),
        "label": request.label,
        "resumed_from": run.checkpoint(),
        "attempt": run.attempt(),
        "pid": std::process::id(),
        "event": event,
        "at_micros": u64::try_from(at.as_micros()).unwrap_or(u64::MAX),
    });
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open the log {}", log.display()))?;
    file.write_all(format!("{line}\n").as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::report::Reports;

    async fn rehearse(payload: Value, stop: CancellationToken) -> Result<Value, TaskError> {
        let run = Run::new("j", 2, payload.to_string(), Reports::default(), stop);
        Rehearsal.run(run).await
    }

    #[tokio::test(start_paused = true)]
    async fn it_runs_for_the_given_time_and_logs_start_and_end() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let began = Instant::now();
        let payload = json!({"seconds": 3600, "log": log});
        rehearse(payload, CancellationToken::new()).await.unwrap();
        assert!(began.elapsed() >= Duration::from_secs(3600));
        let lines = std::fs::read_to_string(log).unwrap();
        let events: Vec<Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(events[0]["event"], "start");
        assert_eq!(events[1]["event"], "end");
        assert_eq!(events[1]["attempt"], 2);
    }

    #[tokio::test(start_paused = true)]
    async fn it_waits_until_a_file_exists() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let run = tokio::spawn(rehearse(json!({"until": file}), CancellationToken::new()));
        sleep(Duration::from_secs(3600)).await;
        assert!(!run.is_finished());
        std::fs::write(file, "").unwrap();
        run.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn it_stops_when_asked() {
        let stop = CancellationToken::new();
        stop.cancel();
        let stopped = rehearse(json!({"seconds": 3600}), stop).await;
        assert!(matches!(stopped, Err(TaskError::Transient(_))));
    }

    #[tokio::test]
    async fn it_fails_as_requested() {
        let go = CancellationToken::new;
        let failed = rehearse(json!({"fail": "permanent"}), go()).await;
        assert!(matches!(failed, Err(TaskError::Permanent(_))));
        let failed = rehearse(json!({"fail": "transient"}), go()).await;
        assert!(matches!(failed, Err(TaskError::Transient(_))));
        let failed = rehearse(json!({"seconds": -1}), go()).await;
        assert!(matches!(failed, Err(TaskError::Permanent(_))));
    }
}
