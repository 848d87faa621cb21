use std::io;

use tokio::io::{copy, copy_bidirectional, sink};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// A proxy whose connections can die without a sign, as after the failover of a firewall.
pub struct Silencer {
    pub address: String,
    silenced: watch::Sender<()>,
    _stop: DropGuard,
}

impl Silencer {
    pub async fn in_front_of(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, silenced) = (CancellationToken::new(), watch::Sender::new(()));
        let accepting = accept(listener, server.to_owned(), silenced.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(accepting));
        Self {
            address,
            silenced,
            _stop: stop.drop_guard(),
        }
    }

    /// Passes nothing on any more in the connections of now. They stay open. New
    /// connections work.
    pub fn silence_connections(&self) {
        self.silenced.send_replace(());
    }
}

async fn accept(listener: TcpListener, server: String, silenced: watch::Sender<()>) {
    while let Ok((client, _)) = listener.accept().await {
        tokio::spawn(pass_on(client, server.clone(), silenced.subscribe()));
    }
}

/// Ends, and with it both connections, when the client has closed its own.
async fn pass_on(
    mut client: TcpStream,
    server: String,
    mut silenced: watch::Receiver<()>,
) -> io::Result<()> {
    let mut server = TcpStream::connect(server).await?;
    tokio::select! {
        biased;
        _ = silenced.changed() => {}
        ended = copy_bidirectional(&mut client, &mut server) => return ended.map(drop),
    }
    copy(&mut client, &mut sink()).await.map(drop)
}
