use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::report::Reports;

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/digits.csv.gz");

/// A payload for the digits with these fields put in.
fn digits(output: &Path, fields: Value) -> Value {
    let mut payload = json!({
        "name": NAME, "dataset": DIGITS, "target": "digit", "output": output,
    });
    let fields = fields.as_object().unwrap().clone();
    payload.as_object_mut().unwrap().extend(fields);
    payload
}

/// A run of this payload, its progress, and what stops it.
fn run_of(payload: Value) -> (Run, watch::Receiver<Progress>, CancellationToken) {
    let reports = Reports::default();
    let seen = reports.watch_progress();
    let stop = CancellationToken::new();
    let run = Run::new("job", 1, payload.to_string(), reports, stop.clone());
    (run, seen, stop)
}

async fn outcome(payload: Value) -> Result<Value, TaskError> {
    TrainClassifier.run(run_of(payload).0).await
}

async fn refusal(payload: Value) -> String {
    match outcome(payload).await {
        Err(TaskError::Permanent(reason)) => reason,
        other => panic!("not refused for good: {other:?}"),
    }
}

#[tokio::test]
async fn the_result_is_that_of_the_model() {
    let output = tempfile::tempdir().unwrap();
    let result = outcome(digits(output.path(), json!({}))).await.unwrap();
    let path = output.path().join("model.json");
    let model = train_classifier::Model::load(&path).unwrap();
    assert!(model.accuracy >= 0.93, "{result}");
    let expected = json!({
        "accuracy": model.accuracy,
        "train_accuracy": model.train_accuracy,
        "rows": 1797,
        "test_rows": 359,
        "classes": 10,
        "iterations": model.iterations,
        "converged": true,
        "model": path,
    });
    assert_eq!(result, expected);
}

#[tokio::test]
async fn the_fields_of_the_payload_are_the_parameters() {
    let output = tempfile::tempdir().unwrap();
    let wanted = json!({ "test_fraction": 0.5, "seed": 7, "max_iterations": 3, "l2": 0.25 });
    outcome(digits(output.path(), wanted)).await.unwrap();
    let model = train_classifier::Model::load(output.path().join("model.json")).unwrap();
    let expected = Hyperparameters {
        test_fraction: 0.5,
        seed: 7,
        max_iterations: 3,
        l2: 0.25,
    };
    assert_eq!(model.hyperparameters, expected);
}

#[tokio::test]
async fn progress_only_grows_and_ends_at_1() {
    let output = tempfile::tempdir().unwrap();
    let (run, mut seen, _stop) = run_of(digits(output.path(), json!({})));
    let task = tokio::spawn(async move { TrainClassifier.run(run).await });
    let mut reports = Vec::new();
    while seen.changed().await.is_ok() {
        reports.push(seen.borrow_and_update().clone());
    }
    let result = task.await.unwrap().unwrap();

    assert!(reports.is_sorted_by_key(|report| report.fraction));
    assert!(reports.is_sorted_by_key(|report| report.step));
    assert!(reports.iter().all(|report| report.metrics["loss"] > 0.0));
    let last = reports.last().unwrap();
    assert_eq!(last.fraction, Some(1.0));
    assert_eq!(last.step, result["iterations"].as_u64());
    assert_eq!(last.metrics["accuracy"], result["accuracy"]);
    assert_eq!(last.metrics["train_accuracy"], result["train_accuracy"]);
}

/// Stops a run in the middle of the report that it wakes for, which comes before the first
/// iteration: the training cannot go on meanwhile.
struct Stops(CancellationToken);

impl Wake for Stops {
    fn wake(self: Arc<Self>) {
        self.0.cancel();
    }
}

#[tokio::test]
async fn a_stop_during_training_is_a_transient_failure() {
    let output = tempfile::tempdir().unwrap();
    let (run, mut seen, stop) = run_of(digits(output.path(), json!({})));
    let waker = Waker::from(Arc::new(Stops(stop)));
    let mut first_report = pin!(seen.changed());
    let polled = first_report.as_mut().poll(&mut Context::from_waker(&waker));
    assert!(polled.is_pending());
    let error = TrainClassifier.run(run).await.unwrap_err();
    assert!(matches!(&error, TaskError::Transient(_)));
    assert_eq!(error.to_string(), "stopped on request");
    assert!(std::fs::read_dir(output.path()).unwrap().next().is_none());
}

#[tokio::test]
async fn a_run_already_stopped_reports_nothing() {
    let output = tempfile::tempdir().unwrap();
    let (run, seen, stop) = run_of(digits(output.path(), json!({})));
    stop.cancel();
    let error = TrainClassifier.run(run).await.unwrap_err();
    assert_eq!(error.to_string(), "stopped on request");
    assert!(!seen.has_changed().unwrap_or(false));
}

#[tokio::test]
async fn a_dataset_that_is_not_there_is_refused_for_good() {
    let output = tempfile::tempdir().unwrap();
    let reason = refusal(digits(output.path(), json!({ "dataset": "/no/where.csv" }))).await;
    assert_eq!(reason, "the dataset /no/where.csv does not exist");
}

#[tokio::test]
async fn an_output_that_cannot_be_made_is_a_transient_failure_with_its_cause() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = file.join("below");
    let error = outcome(digits(&output, json!({}))).await.unwrap_err();
    assert!(matches!(&error, TaskError::Transient(_)));
    let expected = format!("cannot make the directory {}: ", output.display());
    let error = error.to_string();
    assert!(
        error.starts_with(&expected) && error.contains("Not a directory"),
        "{error}"
    );
}

#[tokio::test]
async fn a_field_out_of_range_is_named() {
    let output = tempfile::tempdir().unwrap();
    for (field, value) in [
        ("test_fraction", json!(0)),
        ("test_fraction", json!(1.0)),
        ("max_iterations", json!(0)),
        ("max_iterations", json!(100_001)),
        ("max_iterations", json!(-3)),
        ("l2", json!(-0.1)),
        ("output", json!("")),
        ("seed", json!("one")),
        ("dataset", json!(null)),
    ] {
        let reason = refusal(digits(output.path(), json!({ field: value }))).await;
        assert!(
            reason.starts_with(&format!("the payload's `{field}` ")),
            "{reason}"
        );
    }
}

#[tokio::test]
async fn an_unknown_or_missing_field_is_named() {
    let output = tempfile::tempdir().unwrap();
    let reason = refusal(digits(output.path(), json!({ "max_iteration": 5 }))).await;
    assert!(reason.contains("unknown field `max_iteration`"), "{reason}");
    let reason = refusal(json!({ "name": NAME, "dataset": DIGITS, "output": "out" })).await;
    assert!(reason.contains("missing field `target`"), "{reason}");
}
