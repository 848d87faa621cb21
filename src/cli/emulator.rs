use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Context;
use clap::Args;
use trainyard_emulator::{Faults, Options};

use super::print;
use crate::pubsub::Connection;
use crate::shutdown::Shutdown;

/// Run only the built-in Pub/Sub emulator.
///
/// It serves Pub/Sub's API over gRPC and REST on one port. All data is in memory
/// and lost when it stops. Any Pub/Sub client that supports PUBSUB_EMULATOR_HOST
/// can use it.
///
/// --faults injects faults. At run time, PUT /emulator/faults replaces them with a
/// JSON object of the same names, GET shows them, and
/// POST /emulator/streams/reset?status=UNAVAILABLE ends all streams. GET / answers
/// 200, for health checks.
///
/// Example: trainyard emulator --subscription heavy-task --faults duplicates=0.1
#[derive(Debug, Args)]
pub(super) struct Emulator {
    /// The port to listen on; 0 takes any free port
    #[arg(long, default_value_t = 8085)]
    port: u16,
    /// Create this topic and a subscription of the same name; may be repeated
    #[arg(long = "subscription", value_name = "NAME")]
    subscriptions: Vec<String>,
    /// The project of the topics and subscriptions
    #[arg(long, value_name = "PROJECT", default_value = "trainyard-dev")]
    project: String,
    /// The address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// The faults to inject, such as duplicates=0.1,latency=200ms
    ///
    /// Separated by commas:
    ///   duplicates=0.1          probability that a message is delivered twice
    ///   dropped-acks=0.1        probability that an ack is ignored
    ///   resets=0.1:UNAVAILABLE  probability that a stream ends after messages, and
    ///                           its status
    ///   out-of-order=0.1        probability that a message comes after another
    ///   latency=50ms..200ms     delay of deliveries
    ///   silence                 streams stay open but deliver nothing
    #[arg(long, value_name = "FAULTS", verbatim_doc_comment)]
    faults: Option<Faults>,
    /// The seed of --faults; if it is not given, a random one is taken and printed
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
}

impl Emulator {
    pub(super) async fn execute(self) -> anyhow::Result<()> {
        let shutdown = Shutdown::on_signals()?;
        let address = SocketAddr::new(self.host, self.port);
        let faults = self.faults.unwrap_or_default();
        let options = Options {
            faults: Faults {
                seed: self.seed.or(faults.seed),
                ..faults
            },
            ..Options::default()
        };
        let emulator = trainyard_emulator::Emulator::bind(address, options)
            .await
            .with_context(|| format!("cannot listen on {address}; --port sets another port"))?;
        let address = emulator.address();
        let faults = emulator.broker().faults();
        if let (true, Some(seed)) = (faults.any(), faults.seed) {
            // Stdout is for the shell.
            eprintln!("faults: {faults}; --seed {seed} repeats them");
        }
        let connection = Connection::new(&self.project, Some(&address.to_string()));
        let serving = tokio::spawn(emulator.serve(shutdown.draining));
        for name in &self.subscriptions {
            connection.ensure_topic(name).await?;
            connection.ensure_subscription(name, name).await?;
        }
        print(&format!("export PUBSUB_EMULATOR_HOST={address}"))?;
        if !self.subscriptions.is_empty() {
            print(&format!("export GOOGLE_CLOUD_PROJECT={}", self.project))?;
        }
        std::io::stdout().flush()?;
        serving.await??;
        Ok(())
    }
}
