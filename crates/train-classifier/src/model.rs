//! The trained model: predicting, saving and loading.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::{ModelError, TrainError};
use super::table::Table;

const FORMAT: &str = "trainyard-linear-classifier";
const VERSION: u32 = 1;
const MAKER: &str = "train-classifier";
const FILE_NAME: &str = "model.json";

/// A trained linear classifier, as stored in `model.json`.
///
/// A row's score for a class is the sum of the row's standardised features times the
/// class's weights, plus its intercept; the class with the highest score is predicted.
/// With `F` features and `C` classes:
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Always `trainyard-linear-classifier`.
    pub format: String,
    /// The version of the format, 1.
    pub version: u32,
    /// The program that made the model: `train-classifier`.
    pub task: String,
    /// The predicted column.
    pub target: String,
    /// The columns that the prediction uses, in the order of [`Model::predict`]'s row
    /// (`F`).
    pub features: Vec<String>,
    /// The labels that can be predicted (`C`).
    pub classes: Vec<String>,
    /// One row of weights for each class (`C × F`).
    pub weights: Vec<Vec<f64>>,
    /// One for each class (`C`).
    pub intercepts: Vec<f64>,
    pub scaling: Scaling,
    pub hyperparameters: Hyperparameters,
    /// Share of the held-out rows predicted right, 0 to 1.
    pub accuracy: f64,
    /// Share of the training rows predicted right, 0 to 1.
    pub train_accuracy: f64,
    /// Iterations that the solver made.
    pub iterations: u64,
    /// Whether the solver met a tolerance. If not, its iterations ran out or it could not
    /// improve; the model is its best.
    pub converged: bool,
    pub dataset: Origin,
}

/// How features are standardised: `(value - mean) / scale`, feature by feature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scaling {
    pub mean: Vec<f64>,
    /// The standard deviation over the training rows; 1 for a constant column.
    pub scale: Vec<f64>,
}

/// The training settings of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hyperparameters {
    /// Share of the rows held out to measure accuracy, within (0, 1).
    pub test_fraction: f64,
    /// Determines which rows are held out.
    pub seed: u64,
    /// The solver's limit, 1 to 100000.
    pub max_iterations: u64,
    /// Penalty on large weights, 0 or more.
    pub l2: f64,
}

impl Default for Hyperparameters {
    fn default() -> Self {
        Self {
            test_fraction: 0.2,
            seed: 1,
            max_iterations: 100,
            l2: 1.0,
        }
    }
}

/// The table that a model was trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    pub path: PathBuf,
    /// Of the file as stored, in hexadecimal.
    pub sha256: String,
    pub rows: usize,
    /// How many of the rows were held out.
    pub test_rows: usize,
}

/// A model file's format and version, checked before the rest is used.
#[derive(Deserialize)]
struct Stamp {
    format: String,
    version: u32,
}

impl Model {
    /// The `format`, `version` and `task` of every model of this version.
    pub(super) fn stamp() -> (String, u32, String) {
        (FORMAT.to_owned(), VERSION, MAKER.to_owned())
    }

    /// Reads a model from the `model.json` at `path`.
    ///
    /// # Errors
    /// [`ModelError::Io`] when the file cannot be read; [`ModelError::Invalid`] when it
    /// is not such a model, has another version, or is inconsistent.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        let path = path.as_ref().to_owned();
        match fs::read(&path) {
            Ok(text) => Self::parse(&text).map_err(|reason| ModelError::Invalid { path, reason }),
            Err(source) => Err(ModelError::Io { path, source }),
        }
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let unreadable = |error: serde_json::Error| error.to_string();
        let Stamp { format, version } = serde_json::from_slice(text).map_err(unreadable)?;
        if format != FORMAT || version != VERSION {
            return Err(format!(
                "it is of format `{format}` version {version}, not `{FORMAT}` version {VERSION}"
            ));
        }
        let model: Self = serde_json::from_slice(text).map_err(unreadable)?;
        model.check_shapes()?;
        Ok(model)
    }

    fn check_shapes(&self) -> Result<(), String> {
        let (features, classes) = (self.features.len(), self.classes.len());
        let scaled = self.scaling.mean.len() == features && self.scaling.scale.len() == features;
        let weighted = self.weights.iter().all(|row| row.len() == features);
        if classes == 0 {
            return Err("it has no classes".to_owned());
        }
        if !(scaled && weighted)
            || self.weights.len() != classes
            || self.intercepts.len() != classes
        {
            return Err(format!(
                "its weights do not fit its {features} features and {classes} classes"
            ));
        }
        Ok(())
    }

    /// The label predicted for a row of raw cells, in the order of `features`.
    ///
    /// # Errors
    /// [`ModelError::Width`] when the row does not have one cell for each feature.
    pub fn predict(&self, row: &[f64]) -> Result<&str, ModelError> {
        let (found, expected) = (row.len(), self.features.len());
        if found != expected {
            return Err(ModelError::Width { found, expected });
        }
        Ok(&self.classes[self.predicted_class(row)])
    }

    fn predicted_class(&self, row: &[f64]) -> usize {
        let standardised: Vec<f64> = self.scaling.apply(row).collect();
        let scores = self.weights.iter().zip(&self.intercepts);
        best_class(scores.map(|(weights, intercept)| {
            let products = weights.iter().zip(&standardised).map(|(w, x)| w * x);
            products.sum::<f64>() + intercept
        }))
    }

    /// Share of these rows of the table predicted right.
    ///
    /// # Errors
    /// [`TrainError::Stopped`] when `stopped` turns true.
    pub(super) fn accuracy_on(
        &self,
        table: &Table,
        rows: &[usize],
        stopped: &dyn Fn() -> bool,
    ) -> Result<f64, TrainError> {
        let mut right = 0;
        for part in rows.chunks(1_024) {
            if stopped() {
                return Err(TrainError::Stopped);
            }
            let hit = |row: &&usize| self.predicted_class(table.row(**row)) == table.labels[**row];
            right += part.iter().filter(hit).count();
        }
        Ok(right as f64 / rows.len() as f64)
    }

    /// Writes `model.json` into the directory atomically: a reader sees the whole old
    /// file or the whole new one. Returns its path.
    ///
    /// # Errors
    /// [`TrainError::Io`] when writing fails; [`TrainError::Stopped`] when `stopped`
    /// returns true before the new file is in place, of which then nothing is left.
    pub(super) fn save(
        &self,
        directory: &Path,
        stopped: &dyn Fn() -> bool,
    ) -> Result<PathBuf, TrainError> {
        let path = directory.join(FILE_NAME);
        let failed = || TrainError::io("cannot write the model", &path);
        let draft = Draft::beside(&path);
        draft.write(self).map_err(failed())?;
        if stopped() {
            return Err(TrainError::Stopped);
        }
        fs::rename(&draft.path, &path).map_err(failed())?;
        // The rename is durable once its directory is synced.
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(failed())?;
        Ok(path)
    }
}

impl Scaling {
    /// Measures the features over these rows of the table.
    ///
    /// # Errors
    /// [`TrainError::Dataset`], naming the column, when its numbers are too large for a
    /// standard deviation.
    pub(super) fn measure(table: &Table, rows: &[usize]) -> Result<Self, TrainError> {
        // Welford's method: exactly 0 for a constant column, and no large sums.
        let mut mean = vec![0.0; table.features.len()];
        let mut squares = mean.clone();
        for (seen, row) in rows.iter().enumerate() {
            let count = (seen + 1) as f64;
            for (column, value) in table.row(*row).iter().enumerate() {
                let from_old = value - mean[column];
                mean[column] += from_old / count;
                squares[column] += from_old * (value - mean[column]);
            }
        }
        let deviations = squares.iter().map(|sum| (sum / rows.len() as f64).sqrt());
        let scale: Vec<f64> = deviations
            .map(|deviation| if deviation == 0.0 { 1.0 } else { deviation })
            .collect();
        let wild = |column: &usize| !mean[*column].is_finite() || !scale[*column].is_finite();
        if let Some(column) = (0..table.features.len()).find(wild) {
            let name = &table.features[column];
            let reason = format!("the numbers in column `{name}` are too large to standardise");
            return Err(TrainError::Dataset(reason));
        }
        Ok(Self { mean, scale })
    }

    /// Standardises one row.
    pub(super) fn apply<'a>(&'a self, row: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
        let factors = self.mean.iter().zip(&self.scale);
        row.iter()
            .zip(factors)
            .map(|(value, (mean, scale))| (value - mean) / scale)
    }
}

/// The index of the highest score; the first of equals.
pub(super) fn best_class(scores: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (class, score) in scores.enumerate() {
        if score > best.1 {
            best = (class, score);
        }
    }
    best.0
}

/// A temporary file, removed when dropped. After a rename there is nothing left to
/// remove.
struct Draft {
    path: PathBuf,
}

impl Draft {
    fn beside(path: &Path) -> Self {
        let name = format!(".{FILE_NAME}.{}.tmp", Uuid::new_v4().simple());
        Self {
            path: path.with_file_name(name),
        }
    }

    fn write(&self, model: &Model) -> io::Result<()> {
        let mut file = BufWriter::new(File::create_new(&self.path)?);
        serde_json::to_writer_pretty(&mut file, model)?;
        file.write_all(b"\n")?;
        file.into_inner()?.sync_all()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Either it was renamed or the error has no one to go to.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests;
