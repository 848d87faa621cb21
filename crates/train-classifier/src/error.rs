//! Why there is no model, or why it cannot predict.

use std::io;
use std::path::{Path, PathBuf};

/// Why a training produced no model.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A parameter is out of its range.
    #[error("`{name}` must be {rule}, not {found}")]
    Parameter {
        name: &'static str,
        rule: &'static str,
        found: String,
    },
    /// The dataset does not exist or cannot be trained on; retrying would fail too.
    #[error("{0}")]
    Dataset(String),
    /// Reading or writing failed.
    #[error("{doing}")]
    Io { doing: String, source: io::Error },
    /// Training was asked to stop.
    #[error("stopped on request")]
    Stopped,
}

impl TrainError {
    /// For `map_err`: which action failed on which file.
    pub(crate) fn io<'a>(doing: &'a str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io {
            doing: format!("{doing} {}", path.display()),
            source,
        }
    }
}

/// Why a model cannot be loaded, or cannot predict.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file cannot be read.
    #[error("cannot read the model {}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    /// The file is no model of this version.
    #[error("cannot load the model {}: {reason}", .path.display())]
    Invalid { path: PathBuf, reason: String },
    /// A row does not have one cell for each feature.
    #[error("the row has {found} cells where the model has {expected} features")]
    Width { found: usize, expected: usize },
}
