//! `train-classifier`: trains a linear classifier on a table of numbers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context;
use async_trait::async_trait;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use train_classifier::{Hyperparameters, Parameters, Step, TrainError, Trained};

use crate::task::{Progress, Run, Task, TaskError};

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
/// `converged`; and `model`, the path of the file, which
/// [`train_classifier::Model::load`] reads.
/// While it trains it reports the `step` (iteration) and the metrics `loss`
/// (mean cross-entropy, nats) and `train_accuracy`.
#[derive(Debug, Clone, Copy, Default)]
pub struct TrainClassifier;

#[async_trait]
impl Task for TrainClassifier {
    async fn run(&self, run: Run) -> Result<Value, TaskError> {
        let request: Request = run.payload_as()?;
        let parameters = request.into_parameters();
        tokio::task::spawn_blocking(move || train(&parameters, &run))
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
    Hyperparameters::default().test_fraction
}

fn default_seed() -> u64 {
    Hyperparameters::default().seed
}

fn default_max_iterations() -> u64 {
    Hyperparameters::default().max_iterations
}

fn default_l2() -> f64 {
    Hyperparameters::default().l2
}

impl Request {
    fn into_parameters(self) -> Parameters {
        Parameters {
            dataset: self.dataset,
            target: self.target,
            output: self.output,
            hyperparameters: Hyperparameters {
                test_fraction: self.test_fraction,
                seed: self.seed,
                max_iterations: self.max_iterations,
                l2: self.l2,
            },
        }
    }
}

/// The whole of one attempt, on a blocking thread.
fn train(parameters: &Parameters, run: &Run) -> Result<Value, TaskError> {
    let watch = |step: Step| {
        // 1.0 is for when the model is in place.
        let share = step.iteration as f64 / parameters.hyperparameters.max_iterations as f64;
        run.report(progress(step, share.min(0.99)));
    };
    let Trained { model, path, last } =
        train_classifier::train(parameters, watch, || run.should_stop()).map_err(failure)?;

    let mut end = progress(last, 1.0);
    end.metrics.insert("accuracy".to_owned(), model.accuracy);
    run.report(end);
    Ok(json!({
        "accuracy": model.accuracy,
        "train_accuracy": model.train_accuracy,
        "rows": model.dataset.rows,
        "test_rows": model.dataset.test_rows,
        "classes": model.classes.len(),
        "iterations": model.iterations,
        "converged": model.converged,
        "model": path.to_string_lossy(),
    }))
}

fn failure(error: TrainError) -> TaskError {
    match error {
        TrainError::Parameter { .. } => TaskError::permanent(format!("the payload's {error}")),
        TrainError::Dataset(reason) => TaskError::Permanent(reason),
        TrainError::Io { .. } | TrainError::Stopped => TaskError::Transient(error.into()),
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

#[cfg(test)]
mod tests;
