//! `train-classifier`: trains a linear classifier on a table of numbers.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, anyhow};
use async_trait::async_trait;
use ndarray::{Array1, Array2};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::task::{Progress, Run, Task, TaskError};

mod fit;
mod model;
mod objective;
mod split;
mod table;

use fit::{Examples, Fitted, Limits, Step};
pub use model::{Hyperparameters, Model, Origin, Scaling};
use split::Split;
use table::Table;

/// The name that requests use for this task.
pub const NAME: &str = "train-classifier";

/// Trains a multinomial logistic regression on a CSV file and writes the model.
///
/// The payload's fields:
///
/// | field            | meaning                                                        | default    |
/// |------------------|----------------------------------------------------------------|------------|
/// | `dataset`        | path of a CSV file with a header row, gzipped or not           | (required) |
/// | `target`         | the column to predict, of any text; all others must be numbers | (required) |
/// | `output`         | directory for `model.json`, made if missing                    | (required) |
/// | `test_fraction`  | share of the rows held out to measure accuracy, within (0, 1)  | 0.2        |
/// | `seed`           | decides which rows are held out                                | 1          |
/// | `max_iterations` | the solver's limit, 1 to 100000                                | 100        |
/// | `l2`             | penalty on large weights, 0 or more                            | 1.0        |
///
/// Any other field is refused. The same payload and file give the same split
/// and, on one kind of machine, the same model.
///
/// The result is an object: `accuracy` (held out) and `train_accuracy`, 0 to 1;
/// `rows` and `test_rows`; `classes`, their number; `iterations` made;
/// `converged`; and `model`, the file's path.
/// While it trains it reports the `step` (iteration) and the metrics `loss`
/// (mean cross-entropy, nats) and `train_accuracy`.
#[derive(Debug, Clone, Copy, Default)]
pub struct TrainClassifier;

#[async_trait]
impl Task for TrainClassifier {
    async fn run(&self, run: Run) -> Result<Value, TaskError> {
        let request: Request = run.payload_as()?;
        request.check()?;
        tokio::task::spawn_blocking(move || train(&request, &run))
            .await
            .context("the training thread did not end well")?
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    #[serde(rename = "name")]
    _name: Option<IgnoredAny>,
    dataset: PathBuf,
    target: String,
    output: PathBuf,
    #[serde(default = "default_test_fraction")]
    test_fraction: f64,
    #[serde(default = "default_seed")]
    seed: u64,
    #[serde(default = "default_max_iterations")]
    max_iterations: u64,
    #[serde(default = "default_l2")]
    l2: f64,
}

fn default_test_fraction() -> f64 {
    0.2
}

fn default_seed() -> u64 {
    1
}

fn default_max_iterations() -> u64 {
    100
}

fn default_l2() -> f64 {
    1.0
}

const MAX_ITERATIONS: u64 = 100_000;

impl Request {
    fn check(&self) -> Result<(), TaskError> {
        let refuse = |field: &str, rule: &str, found: &dyn std::fmt::Display| {
            let reason = format!("the payload's `{field}` must be {rule}, not {found}");
            Err(TaskError::permanent(reason))
        };
        if !(self.test_fraction > 0.0 && self.test_fraction < 1.0) {
            let rule = "between 0 and 1, both excluded";
            return refuse("test_fraction", rule, &self.test_fraction);
        }
        if !(1..=MAX_ITERATIONS).contains(&self.max_iterations) {
            return refuse("max_iterations", "from 1 to 100000", &self.max_iterations);
        }
        if self.l2.is_nan() || self.l2 < 0.0 {
            return refuse("l2", "0 or more", &self.l2);
        }
        if self.output.as_os_str().is_empty() {
            return refuse("output", "a directory", &"empty");
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits {
            max_iterations: self.max_iterations,
            l2: self.l2,
        }
    }
}

/// The one answer to a stop, wherever it is noticed.
fn stopped_on_request() -> TaskError {
    TaskError::Transient(anyhow!("stopped on request"))
}

/// The whole of one attempt, on a blocking thread.
fn train(request: &Request, run: &Run) -> Result<Value, TaskError> {
    let stopped = || run.should_stop();
    if stopped() {
        return Err(stopped_on_request());
    }
    let table = Table::read(&request.dataset, &request.target, &stopped)?;
    let split = split(request, &table)?;
    let scaling = Scaling::measure(&table, &split.train)?;
    std::fs::create_dir_all(&request.output)
        .with_context(|| format!("cannot make the directory {}", request.output.display()))?;

    let examples = examples(&table, &split.train, &scaling)?;
    let fitted = fit::fit(&examples, request.limits(), &stopped, &mut |step| {
        watch(run, request, step)
    })?
    .ok_or_else(stopped_on_request)?;

    let last = fitted.last;
    let mut model = assemble(request, &table, &split, scaling, &fitted);
    model.accuracy = model.accuracy_on(&table, &split.test, &stopped)?;
    let path = model.save(&request.output, &stopped)?;

    let mut end = progress(last, 1.0);
    end.metrics.insert("accuracy".to_owned(), model.accuracy);
    run.report(end);
    Ok(json!({
        "accuracy": model.accuracy,
        "train_accuracy": model.train_accuracy,
        "rows": table.rows(),
        "test_rows": split.test.len(),
        "classes": table.classes.len(),
        "iterations": model.iterations,
        "converged": model.converged,
        "model": path.to_string_lossy(),
    }))
}

fn split(request: &Request, table: &Table) -> Result<Split, TaskError> {
    let (rows, classes) = (table.rows(), table.classes.len());
    split::stratified(&table.labels, classes, request.test_fraction, request.seed).ok_or_else(
        || {
            let path = request.dataset.display();
            TaskError::permanent(format!(
                "{path}: too few rows to hold any out: {rows} for {classes} classes"
            ))
        },
    )
}

fn examples(table: &Table, rows: &[usize], scaling: &Scaling) -> Result<Examples, TaskError> {
    let shape = (rows.len(), table.features.len());
    let mut cells = Vec::with_capacity(shape.0 * shape.1);
    for row in rows {
        cells.extend(scaling.apply(table.row(*row)));
    }
    Ok(Examples {
        features: Array2::from_shape_vec(shape, cells).map_err(anyhow::Error::from)?,
        labels: rows.iter().map(|row| table.labels[*row]).collect(),
        classes: table.classes.len(),
    })
}

/// Reports a step, and breaks the training off once the run is asked to stop.
fn watch(run: &Run, request: &Request, step: Step) -> ControlFlow<()> {
    // 1.0 is for when the model is in place.
    let share = step.iteration as f64 / request.max_iterations as f64;
    run.report(progress(step, share.min(0.99)));
    match run.should_stop() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

fn progress(step: Step, fraction: f64) -> Progress {
    Progress {
        fraction: Some(fraction),
        step: Some(step.iteration),
        metrics: BTreeMap::from([
            ("loss".to_owned(), step.loss),
            ("train_accuracy".to_owned(), step.accuracy),
        ]),
    }
}

/// The model of these weights, its held-out accuracy not yet measured.
fn assemble(
    request: &Request,
    table: &Table,
    split: &Split,
    scaling: Scaling,
    fitted: &Fitted,
) -> Model {
    let (format, version) = Model::stamp();
    let by_class = fitted.weights.columns().into_iter();
    Model {
        format,
        version,
        task: NAME.to_owned(),
        target: request.target.clone(),
        features: table.features.clone(),
        classes: table.classes.clone(),
        weights: by_class.map(|column| column.to_vec()).collect(),
        intercepts: Array1::to_vec(&fitted.intercepts),
        scaling,
        hyperparameters: Hyperparameters {
            test_fraction: request.test_fraction,
            seed: request.seed,
            max_iterations: request.max_iterations,
            l2: request.l2,
        },
        accuracy: 0.0,
        train_accuracy: fitted.last.accuracy,
        iterations: fitted.last.iteration,
        converged: fitted.converged,
        dataset: Origin {
            path: request.dataset.clone(),
            sha256: table.sha256.clone(),
            rows: table.rows(),
            test_rows: split.test.len(),
        },
    }
}

#[cfg(test)]
mod tests;
