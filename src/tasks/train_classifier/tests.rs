use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::message::Payload;
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
    let Value::Object(payload) = payload else {
        panic!("a payload is an object");
    };
    let payload: Payload = payload;
    let reports = Reports::default();
    let seen = reports.watch_progress();
    let stop = CancellationToken::new();
    let run = Run::new("job", 1, Arc::new(payload), reports, stop.clone());
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

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).unwrap().next().is_none()
}

#[tokio::test]
async fn the_digits_are_told_apart_whatever_the_seed() {
    for seed in 1..=4 {
        let output = tempfile::tempdir().unwrap();
        let payload = digits(output.path(), json!({ "seed": seed }));
        let result = outcome(payload).await.unwrap();
        assert!(result["accuracy"].as_f64().unwrap() >= 0.93, "{result}");
        assert_eq!(result["rows"], 1797);
        assert_eq!(result["test_rows"], 359);
        assert_eq!(result["classes"], 10);
    }
}

#[tokio::test]
async fn the_saved_model_reproduces_the_accuracy() {
    let output = tempfile::tempdir().unwrap();
    let result = outcome(digits(output.path(), json!({}))).await.unwrap();
    let model = Model::load(result["model"].as_str().unwrap()).unwrap();

    let table = Table::read(Path::new(DIGITS), "digit", &|| false).unwrap();
    let split = split::stratified(&table.labels, 10, 0.2, 1).unwrap();
    let right = |rows: &[usize]| {
        let hits = rows.iter().filter(|row| {
            let label = &table.classes[table.labels[**row]];
            model.predict(table.row(**row)).unwrap() == label
        });
        hits.count() as f64 / rows.len() as f64
    };
    assert_eq!(result["accuracy"], right(&split.test));
    assert_eq!(result["train_accuracy"], right(&split.train));
    assert_eq!(model.accuracy, right(&split.test));
    assert_eq!(model.dataset.sha256, table.sha256);
    assert_eq!(model.hyperparameters.max_iterations, 100);
}

#[tokio::test]
async fn the_same_seed_gives_the_same_model() {
    let mut models = Vec::new();
    for seed in [4, 4, 5] {
        let output = tempfile::tempdir().unwrap();
        let fields = json!({ "seed": seed, "max_iterations": 20 });
        let result = outcome(digits(output.path(), fields)).await.unwrap();
        models.push(std::fs::read(result["model"].as_str().unwrap()).unwrap());
    }
    assert!(models[0] == models[1]);
    assert!(models[0] != models[2]);
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

#[tokio::test]
async fn a_stop_during_training_ends_it_without_a_model() {
    let output = tempfile::tempdir().unwrap();
    let fields = json!({ "max_iterations": 100_000, "l2": 0 });
    let (run, mut seen, stop) = run_of(digits(output.path(), fields));
    let task = tokio::spawn(async move { TrainClassifier.run(run).await });
    // The first report comes before the first iteration.
    seen.changed().await.unwrap();
    stop.cancel();
    let error = task.await.unwrap().unwrap_err();
    assert!(matches!(&error, TaskError::Transient(_)));
    assert_eq!(error.to_string(), "stopped on request");
    assert!(is_empty(output.path()));
}

#[tokio::test]
async fn a_run_already_stopped_does_nothing() {
    let output = tempfile::tempdir().unwrap();
    let (run, seen, stop) = run_of(digits(output.path(), json!({})));
    stop.cancel();
    let error = TrainClassifier.run(run).await.unwrap_err();
    assert_eq!(error.to_string(), "stopped on request");
    assert!(!seen.has_changed().unwrap_or(false) && is_empty(output.path()));
}

#[tokio::test]
async fn two_classes_and_constant_columns_train_too() {
    let directory = tempfile::tempdir().unwrap();
    let dataset = directory.path().join("two.csv");
    let row = |n: usize| format!("{n},7,{}\n", if n < 20 { "low" } else { "high" });
    let rows: String = (0..40).map(row).collect();
    std::fs::write(&dataset, format!("x,constant,level\n{rows}")).unwrap();
    let output = directory.path().join("made/for/it");
    let payload = json!({ "dataset": dataset, "target": "level", "output": output });
    let result = outcome(payload).await.unwrap();
    assert_eq!(result["classes"], 2);
    let model = Model::load(output.join("model.json")).unwrap();
    assert_eq!(model.predict(&[2.0, 7.0]).unwrap(), "low");
    assert_eq!(model.predict(&[38.0, 7.0]).unwrap(), "high");
}

#[tokio::test]
async fn a_table_too_small_to_split_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let dataset = directory.path().join("tiny.csv");
    std::fs::write(&dataset, "x,kind\n1,a\n2,b\n").unwrap();
    let payload = json!({ "dataset": dataset, "target": "kind", "output": directory.path() });
    let reason = refusal(payload).await;
    assert!(reason.ends_with("tiny.csv: too few rows to hold any out: 2 for 2 classes"));
}

#[tokio::test]
async fn an_output_that_cannot_be_made_is_a_transient_failure() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = outcome(digits(&file.join("below"), json!({})))
        .await
        .unwrap_err();
    assert!(matches!(&error, TaskError::Transient(_)));
    assert!(error.to_string().starts_with("cannot make the directory "));
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
