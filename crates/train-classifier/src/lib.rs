//! Trains a multinomial logistic regression on a CSV file, by L-BFGS, and writes
//! the model as JSON. A training can be watched and stopped at any time.
//!
//! ```no_run
//! use train_classifier::{Hyperparameters, Parameters, TrainError, train};
//!
//! let parameters = Parameters {
//!     dataset: "digits.csv.gz".into(),
//!     target: "digit".to_owned(),
//!     output: "models/digits".into(),
//!     hyperparameters: Hyperparameters::default(),
//! };
//! let watch = |step: train_classifier::Step| println!("{}: loss {}", step.iteration, step.loss);
//! let trained = train(&parameters, watch, || false)?;
//! println!("accuracy {} on held-out rows", trained.model.accuracy);
//! # Ok::<(), TrainError>(())
//! ```

use std::path::PathBuf;

use ndarray::{Array1, Array2};

mod error;
mod fit;
mod model;
mod objective;
mod split;
mod table;

pub use error::{ModelError, TrainError};
pub use fit::Step;
pub use model::{Hyperparameters, Model, Origin, Scaling};

use fit::{Fitted, Limits};
use objective::Examples;
use split::Split;
use table::Table;

const MAX_ITERATIONS: u64 = 100_000;

/// What to train on, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    /// A CSV file with a header row, gzipped or not.
    pub dataset: PathBuf,
    /// The column to predict, of any text; all others must be numbers.
    pub target: String,
    /// The directory for `model.json`, made if missing.
    pub output: PathBuf,
    pub hyperparameters: Hyperparameters,
}

/// The result of a training.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    pub model: Model,
    /// The file that holds the model.
    pub path: PathBuf,
    /// Where the training ended.
    pub last: Step,
}

impl Parameters {
    fn check(&self) -> Result<(), TrainError> {
        let Hyperparameters {
            test_fraction,
            max_iterations,
            l2,
            ..
        } = self.hyperparameters;
        let refuse = |name, rule, found: &dyn std::fmt::Display| {
            Err(TrainError::Parameter {
                name,
                rule,
                found: found.to_string(),
            })
        };
        if !(test_fraction > 0.0 && test_fraction < 1.0) {
            let rule = "between 0 and 1, both excluded";
            return refuse("test_fraction", rule, &test_fraction);
        }
        if !(1..=MAX_ITERATIONS).contains(&max_iterations) {
            return refuse("max_iterations", "from 1 to 100000", &max_iterations);
        }
        if l2.is_nan() || l2 < 0.0 {
            return refuse("l2", "0 or more", &l2);
        }
        if self.output.as_os_str().is_empty() {
            return refuse("output", "a directory", &"empty");
        }
        Ok(())
    }
}

/// Trains a model and writes it. Keeps a core busy until it returns.
///
/// `watch` is called before the first iteration and after each. `should_stop` is called many
/// times a second; once true it must stay so. The same parameters and file give the same split
/// and, on one kind of machine, the same model.
///
/// # Errors
/// See [`TrainError`]. Never leaves a half-written model.
pub fn train(
    parameters: &Parameters,
    mut watch: impl FnMut(Step),
    should_stop: impl Fn() -> bool,
) -> Result<Trained, TrainError> {
    parameters.check()?;
    if should_stop() {
        return Err(TrainError::Stopped);
    }
    let table = Table::read(&parameters.dataset, &parameters.target, &should_stop)?;
    let split = split(parameters, &table)?;
    let scaling = Scaling::measure(&table, &split.train)?;
    std::fs::create_dir_all(&parameters.output).map_err(TrainError::io(
        "cannot make the directory",
        &parameters.output,
    ))?;

    let examples = examples(&table, &split.train, &scaling);
    let limits = Limits {
        max_iterations: parameters.hyperparameters.max_iterations,
        l2: parameters.hyperparameters.l2,
    };
    let fitted = fit::fit(&examples, limits, &should_stop, &mut watch)?;

    let mut model = assemble(parameters, &table, &split, scaling, &fitted);
    model.accuracy = model.accuracy_on(&table, &split.test, &should_stop)?;
    let path = model.save(&parameters.output, &should_stop)?;
    Ok(Trained {
        model,
        path,
        last: fitted.last,
    })
}

fn split(parameters: &Parameters, table: &Table) -> Result<Split, TrainError> {
    let (rows, classes) = (table.rows(), table.classes.len());
    let Hyperparameters {
        test_fraction,
        seed,
        ..
    } = parameters.hyperparameters;
    split::stratified(&table.labels, classes, test_fraction, seed).ok_or_else(|| {
        let path = parameters.dataset.display();
        TrainError::Dataset(format!(
            "{path}: too few rows to hold any out: {rows} for {classes} classes"
        ))
    })
}

fn examples(table: &Table, rows: &[usize], scaling: &Scaling) -> Examples {
    let mut features = Array2::zeros((rows.len(), table.features.len()));
    for (mut standardised, row) in features.rows_mut().into_iter().zip(rows) {
        let cells = scaling.apply(table.row(*row));
        standardised
            .iter_mut()
            .zip(cells)
            .for_each(|(to, from)| *to = from);
    }
    Examples {
        features,
        labels: rows.iter().map(|row| table.labels[*row]).collect(),
        classes: table.classes.len(),
    }
}

/// Builds the model from these weights; its held-out accuracy is not measured yet.
fn assemble(
    parameters: &Parameters,
    table: &Table,
    split: &Split,
    scaling: Scaling,
    fitted: &Fitted,
) -> Model {
    let (format, version, task) = Model::stamp();
    let by_class = fitted.weights.columns().into_iter();
    Model {
        format,
        version,
        task,
        target: parameters.target.clone(),
        features: table.features.clone(),
        classes: table.classes.clone(),
        weights: by_class.map(|column| column.to_vec()).collect(),
        intercepts: Array1::to_vec(&fitted.intercepts),
        scaling,
        hyperparameters: parameters.hyperparameters.clone(),
        accuracy: 0.0,
        train_accuracy: fitted.last.accuracy,
        iterations: fitted.last.iteration,
        converged: fitted.converged,
        dataset: Origin {
            path: parameters.dataset.clone(),
            sha256: table.sha256.clone(),
            rows: table.rows(),
            test_rows: split.test.len(),
        },
    }
}

#[cfg(test)]
mod tests;
