use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Context;
use clap::Args;

use crate::emulator::{self, Options};
use crate::pubsub::Connection;
use crate::shutdown::Shutdown;

/// Run the built-in Pub/Sub emulator alone.
///
/// It speaks Pub/Sub's API over gRPC and REST on one port, keeps everything in
/// memory, and forgets it when it stops. Any Pub/Sub client that knows
/// PUBSUB_EMULATOR_HOST can use it.
///
/// Example: trainyard emulator --subscription heavy-task
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
}

impl Emulator {
    pub(super) async fn execute(self) -> anyhow::Result<()> {
        let shutdown = Shutdown::on_signals()?;
        let address = SocketAddr::new(self.host, self.port);
        let emulator = emulator::Emulator::bind(address, Options::default())
            .await
            .with_context(|| format!("cannot listen on {address}; --port chooses another"))?;
        let address = emulator.address();
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
