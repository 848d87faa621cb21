use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Context;
use clap::Args;
use trainyard_emulator::{Faults, Options};

use crate::pubsub::Connection;
use crate::shutdown::Shutdown;

/// Run the built-in Pub/Sub emulator alone.
///
/// It speaks Pub/Sub's API over gRPC and REST on one port, keeps everything in
/// memory, and forgets it when it stops. Any Pub/Sub client that knows
/// PUBSUB_EMULATOR_HOST can use it.
///
/// With --faults it misbehaves. While it runs, PUT /emulator/faults replaces the
/// faults, by a JSON object of the same names, GET shows them, and
/// POST /emulator/streams/reset?status=UNAVAILABLE ends all streams.
///
/// Example: trainyard emulator --subscription heavy-task --faults duplicates=0.1
#[derive(Debug, Args)]
pub(super) struct Emulator {
    /// Where to listen; 0 chooses a free port
    #[arg(long, default_value_t = 8085)]
    port: u16,
    /// Make this topic, with a subscription of the same name; may be given
    /// several times
    #[arg(long = "subscription", value_name = "NAME")]
    subscriptions: Vec<String>,
    /// The project that they are made in
    #[arg(long, value_name = "PROJECT", default_value = "trainyard-dev")]
    project: String,
    /// The address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// What to do wrong, such as duplicates=0.1,latency=200ms
    ///
    /// Joined by commas:
    ///   duplicates=0.1          how likely a delivery is followed by a second one
    ///   dropped-acks=0.1        how likely an ack is ignored
    ///   resets=0.1:UNAVAILABLE  how likely a stream ends after messages, and with
    ///                           which status
    ///   out-of-order=0.1        how likely a redelivered message is put behind
    ///                           another one
    ///   latency=50ms..200ms     how much later messages are delivered
    ///   silence                 streams stay open, and nothing is sent on them
    #[arg(long, value_name = "FAULTS", verbatim_doc_comment)]
    faults: Option<Faults>,
    /// The seed of all chances of --faults; without it one is drawn, and printed
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
            .with_context(|| format!("cannot listen on {address}; --port chooses another"))?;
        let address = emulator.address();
        let faults = emulator.broker().faults();
        if let (true, Some(seed)) = (faults.any(), faults.seed) {
            // Not on stdout, which is for the shell.
            eprintln!("faults: {faults}; --seed {seed} repeats them");
        }
        let connection = Connection::new(&self.project, Some(&address.to_string()));
        let serving = tokio::spawn(emulator.serve(shutdown.draining));
        for name in &self.subscriptions {
            connection.ensure_topic(name).await?;
            connection.ensure_subscription(name, name).await?;
        }
        println!("export PUBSUB_EMULATOR_HOST={address}");
        if !self.subscriptions.is_empty() {
            println!("export GOOGLE_CLOUD_PROJECT={}", self.project);
        }
        std::io::stdout().flush()?;
        serving.await??;
        Ok(())
    }
}
