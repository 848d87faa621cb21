//! A worker with its own task. Configure a project and a subscription as in
//! `config/example.toml`, then run `cargo run --example embed -- FILE`.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Value, json};
use trainyard::{Progress, Registry, Run, Task, TaskError};

#[derive(Deserialize)]
struct Request {
    epochs: u64,
}

/// Runs requests such as `{"name": "count-epochs", "epochs": 3}`.
struct CountEpochs;

#[async_trait::async_trait]
impl Task for CountEpochs {
    async fn run(&self, run: Run) -> Result<Value, TaskError> {
        let Request { epochs } = run.payload_as()?;
        for epoch in 1..=epochs {
            let fraction = Some(epoch as f64 / epochs as f64);
            run.report(Progress {
                fraction,
                step: Some(epoch),
                ..Progress::default()
            });
        }
        Ok(json!({ "epochs": epochs }))
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = std::env::args().nth(1).map(PathBuf::from);
    let registry = Registry::new().with("count-epochs", CountEpochs);
    trainyard::run(config.as_deref(), registry).await
}
