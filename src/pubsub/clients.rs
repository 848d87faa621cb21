//! The client for streaming pull, one for all subscriptions of a process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use google_cloud_auth::credentials::anonymous;
use google_cloud_pubsub::client::Subscriber;

use super::{Connection, PubsubError};

/// An HTTP/2 connection usually carries a hundred streams; acks need some of them.
const STREAMS_PER_CHANNEL: usize = 80;

/// Creates the client when it is first needed, and a new one when its connections seem
/// dead. Clones share it.
#[derive(Debug, Clone)]
pub struct Clients {
    connection: Connection,
    channels: usize,
    newest: Arc<Mutex<Newest>>,
}

#[derive(Debug, Default)]
struct Newest {
    generation: u64,
    subscriber: Option<Subscriber>,
}

impl Newest {
    fn client(&self) -> Option<Client> {
        Some(Client {
            subscriber: self.subscriber.clone()?,
            generation: self.generation,
        })
    }
}

/// A client and its generation.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pub(super) subscriber: Subscriber,
    pub(super) generation: u64,
}

impl Clients {
    pub(super) fn new(connection: Connection, streams: usize) -> Self {
        Self {
            connection,
            channels: streams.div_ceil(STREAMS_PER_CHANNEL).max(1),
            newest: Arc::default(),
        }
    }

    pub(super) fn are_for_an_emulator(&self) -> bool {
        self.connection.emulator.is_some()
    }

    pub(super) async fn newest(&self) -> Result<Client, PubsubError> {
        if let Some(client) = self.lock().client() {
            return Ok(client);
        }
        let made = self.make().await?;
        let mut newest = self.lock();
        // If another task was quicker, all use its client.
        let subscriber = newest.subscriber.get_or_insert(made).clone();
        Ok(Client {
            subscriber,
            generation: newest.generation,
        })
    }

    /// Replaces the client of that generation, whose connections may be dead without a
    /// sign. Its open streams go on; the next stream gets a new connection.
    pub(super) fn replace(&self, generation: u64) {
        let mut newest = self.lock();
        if newest.generation == generation {
            newest.generation += 1;
            newest.subscriber = None;
        }
    }

    async fn make(&self) -> Result<Subscriber, PubsubError> {
        let mut builder = Subscriber::builder().with_grpc_subchannel_count(self.channels);
        if let Some(endpoint) = &self.connection.emulator {
            builder = builder
                .with_endpoint(endpoint)
                .with_credentials(anonymous::Builder::new().build());
        }
        builder.build().await.map_err(PubsubError::not_connected)
    }

    fn lock(&self) -> MutexGuard<'_, Newest> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
