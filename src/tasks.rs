//! The tasks that come with the worker.

use std::sync::Arc;

use crate::task::Task;

pub mod rehearsal;
pub mod train_classifier;

use self::train_classifier::TrainClassifier;
use rehearsal::Rehearsal;

/// The names that [`builtin`] knows, sorted.
pub const BUILTIN_NAMES: &[&str] = &[rehearsal::NAME, train_classifier::NAME];

/// The built-in task of that name, or `None` when there is none.
#[must_use]
pub fn builtin(name: &str) -> Option<Arc<dyn Task>> {
    match name {
        rehearsal::NAME => Some(Arc::new(Rehearsal)),
        train_classifier::NAME => Some(Arc::new(TrainClassifier)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_name_is_a_task_and_no_other_is() {
        assert!(BUILTIN_NAMES.iter().all(|name| builtin(name).is_some()));
        assert!(builtin("train-classifer").is_none());
    }
}
