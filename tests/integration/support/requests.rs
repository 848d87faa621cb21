use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// Writes a data set so small that training takes milliseconds.
pub fn write_tiny_dataset(folder: &Path) -> PathBuf {
    let path = folder.join("tiny.csv");
    let rows: String = (0..40)
        .map(|row| {
            let class = row % 2;
            format!("{},{},c{class}\n", class * 10 + row % 3, row % 5)
        })
        .collect();
    std::fs::write(&path, format!("a,b,class\n{rows}")).unwrap();
    path
}

/// A request that trains on the data set of [`write_tiny_dataset`].
pub fn tiny_training(dataset: &Path, output: &Path) -> Value {
    json!({
        "name": "train-classifier",
        "dataset": dataset,
        "target": "class",
        "max_iterations": 5,
        "output": output,
    })
}
