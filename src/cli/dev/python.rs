//! The sample that runs as a Python program.

use std::path::Path;
use std::process::Stdio;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::config::{AckTiming, Task};

/// The task's name.
pub(super) const NAME: &str = "train-digits-python";

const PROGRAM: &str = include_str!("../../../examples/python/train_digits.py");

/// The example needs 3.9.
const IS_NEW_ENOUGH: &str = "import sys; sys.exit(sys.version_info < (3, 9))";

/// Whether `python3` is installed and new enough.
pub(super) async fn is_there() -> bool {
    let status = Command::new("python3")
        .args(["-c", IS_NEW_ENOUGH])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .await;
    status.is_ok_and(|status| status.success())
}

/// Writes the program to a file, and returns the task that runs it.
pub(super) fn task(dir: &Path) -> anyhow::Result<Task> {
    let program = dir.join("train_digits.py");
    std::fs::write(&program, PROGRAM)
        .with_context(|| format!("cannot write {}", program.display()))?;
    let checkpoints = text(&dir.join("checkpoints"))?;
    std::fs::create_dir_all(&checkpoints)
        .with_context(|| format!("cannot create {checkpoints}"))?;
    Ok(Task {
        command: Some(vec!["python3".to_owned(), text(&program)?]),
        env: [("CHECKPOINT_DIR".to_owned(), checkpoints)].into(),
        ack: AckTiming::AfterCheckpoint,
        ..Task::default()
    })
}

/// A request with enough epochs for a good accuracy.
pub(super) fn request(dataset: &Path) -> Value {
    json!({"name": NAME, "data": dataset, "epochs": 8})
}

fn text(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.with_context(|| format!("{} is not UTF-8", path.display()))
}
