//! A broker of a bench: the built-in emulator in a process of its own.

use std::fs;
use std::path::Path;
use std::time::Duration;

use futures::future::try_join_all;
use tokio::time::sleep;
use trainyard::pubsub::{Connection, Outgoing, Publishers};

use super::database::Outcome;
use super::processes::{Process, trainyard};

pub const PROJECT: &str = "bench";
pub const SUBSCRIPTION: &str = "jobs";
/// As many as the client publishes side by side without a queue of its own growing.
const AT_ONCE: usize = 2_000;

pub struct Broker {
    pub process: Process,
    pub host: String,
    publishers: Publishers,
}

impl Broker {
    /// Starts it with one topic and its subscription.
    pub async fn start(folder: &Path) -> Outcome<Self> {
        let output = folder.join("emulator.log");
        let mut command = trainyard();
        command.args(["emulator", "--port", "0", "--project", PROJECT]);
        command.args(["--subscription", SUBSCRIPTION]);
        let mut process = Process::start(command.env("RUST_LOG", "error"), &output)?;
        let host = loop {
            let printed = fs::read_to_string(&output)?;
            let line = printed
                .lines()
                .find_map(|line| line.strip_prefix("export PUBSUB_EMULATOR_HOST="));
            if let Some(host) = line {
                break host.to_owned();
            }
            process.check()?;
            sleep(Duration::from_millis(20)).await;
        };
        let connection = Connection::new(PROJECT, Some(&host));
        Ok(Self {
            process,
            host,
            publishers: Publishers::new(connection),
        })
    }

    pub fn subscription_path(&self) -> String {
        self.publishers.subscription_path(SUBSCRIPTION)
    }

    /// Publishes requests for a run of no length, with `keys` ordering keys; 0: without.
    pub async fn publish(&self, messages: u64, keys: u64) -> Outcome {
        let all: Vec<u64> = (0..messages).collect();
        for some in all.chunks(AT_ONCE) {
            let publishing = some.iter().map(|nth| {
                let message = Outgoing {
                    data: br#"{"name":"rehearsal","seconds":0}"#.to_vec(),
                    ordering_key: match keys {
                        0 => String::new(),
                        keys => (nth % keys).to_string(),
                    },
                    ..Outgoing::default()
                };
                self.publishers.publish(SUBSCRIPTION, message)
            });
            try_join_all(publishing).await?;
        }
        Ok(())
    }
}
