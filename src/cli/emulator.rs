use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Context;
use clap::Args;

use crate::emulator::{self, Options};
use crate::shutdown::Shutdown;

/// Run the built-in Pub/Sub emulator alone.
///
/// It speaks Pub/Sub's API over gRPC and REST on one port, keeps everything in
/// memory, and forgets it when it stops. Any Pub/Sub client that knows
/// PUBSUB_EMULATOR_HOST can use it.
#[derive(Debug, Args)]
pub(super) struct Emulator {
    /// Where to listen; 0 chooses a free port
    #[arg(long, default_value_t = 8085)]
    port: u16,
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
        println!("export PUBSUB_EMULATOR_HOST={}", emulator.address());
        std::io::stdout().flush()?;
        emulator.serve(shutdown.draining).await?;
        Ok(())
    }
}
