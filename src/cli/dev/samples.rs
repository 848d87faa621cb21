//! The sample jobs and their expected results.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use super::{TASK, python};
use crate::record::{Job, JobState};

/// UCI's handwritten digits, embedded so that `dev` works anywhere.
const DIGITS: &[u8] = include_bytes!("../../../examples/data/digits.csv.gz");

/// A linear model reaches more on the digits.
const MIN_ACCURACY: f64 = 0.93;

pub(super) struct Sample {
    pub(super) title: String,
    pub(super) topic: &'static str,
    pub(super) payload: Value,
    pub(super) delivered_twice: bool,
}

/// Writes the data set to a file for the samples.
pub(super) fn write_dataset(dir: &Path) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let path = dir.join("digits.csv.gz");
    std::fs::write(&path, DIGITS).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// All samples, with the Python program if `with_python`.
pub(super) fn all(dataset: &Path, dir: &Path, with_python: bool) -> Vec<Sample> {
    let builtin = [
        ("heavy-task", 1, 300, true),
        ("heavy-task", 2, 300, false),
        ("light-task", 3, 100, false),
        ("light-task", 4, 100, false),
    ]
    .into_iter()
    .map(|(topic, seed, max_iterations, delivered_twice)| Sample {
        title: format!("digits, seed {seed}"),
        topic,
        payload: request(dataset, dir, seed, max_iterations),
        delivered_twice,
    });
    let program = with_python.then(|| Sample {
        title: "digits, Python".to_owned(),
        topic: "heavy-task",
        payload: python::request(dataset),
        delivered_twice: false,
    });
    builtin.chain(program).collect()
}

/// A request that differs from the samples.
pub(super) fn another(dataset: &Path, dir: &Path) -> Value {
    request(dataset, dir, 5, 300)
}

fn request(dataset: &Path, dir: &Path, seed: u64, max_iterations: u64) -> Value {
    json!({
        "name": TASK,
        "dataset": dataset,
        "target": "digit",
        "seed": seed,
        "max_iterations": max_iterations,
        "output": dir.join(format!("models/digits-{seed}")),
    })
}

/// The differences between the jobs and the expected results.
pub(super) fn mismatches<'a>(
    jobs: &[Job],
    samples: impl ExactSizeIterator<Item = &'a Sample>,
) -> Vec<String> {
    if jobs.len() != samples.len() {
        return vec![format!(
            "{} of {} jobs are on record",
            jobs.len(),
            samples.len()
        )];
    }
    jobs.iter()
        .zip(samples)
        .filter_map(|(job, sample)| {
            let reason = mismatch(job, sample)?;
            Some(format!("{}: {reason}", sample.title))
        })
        .collect()
}

fn mismatch(job: &Job, sample: &Sample) -> Option<String> {
    if job.state != JobState::Succeeded {
        let error = job.error.as_deref().unwrap_or("no error on record");
        return Some(format!("it is {}: {error}", job.state));
    }
    let Some(result) = &job.result else {
        return Some("no result is on record".to_owned());
    };
    let result = result.to_value().unwrap_or_default();
    let accuracy = result["accuracy"].as_f64().unwrap_or_default();
    if accuracy < MIN_ACCURACY {
        return Some(format!(
            "its accuracy is {accuracy:.3}, below {MIN_ACCURACY}"
        ));
    }
    let duplicates = u32::from(sample.delivered_twice);
    (job.attempts != 1 || job.duplicates != duplicates).then(|| {
        format!(
            "it ran {} times and had {} duplicates; 1 and {duplicates} were expected",
            job.attempts, job.duplicates
        )
    })
}
