//! The emulator from outside: as Google's official Rust client sees it, and as
//! the bare protocols do.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use google_cloud_auth::credentials::{Credentials, anonymous};
use google_cloud_pubsub::client::{Publisher, Subscriber, SubscriptionAdmin, TopicAdmin};
use google_cloud_pubsub::model::{Message, Subscription};
use google_cloud_pubsub::subscriber::MessageStream;
use google_cloud_pubsub::subscriber::handler::Handler;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use trainyard_emulator::{Broker, Emulator, Options};

mod exactly_once;
mod faults;
mod grpc;
mod official_client;
mod policies;
mod rest;
mod restart;

const TOPIC: &str = "projects/test/topics/requests";
const SUBSCRIPTION: &str = "projects/test/subscriptions/worker";

/// Only against hanging; nothing here takes long.
const PATIENCE: Duration = Duration::from_secs(60);

struct Running {
    address: SocketAddr,
    endpoint: String,
    broker: Broker,
    shutdown: CancellationToken,
    served: JoinHandle<std::io::Result<()>>,
}

impl Running {
    async fn start() -> Self {
        Self::with(Options::default()).await
    }

    async fn with(options: Options) -> Self {
        // Fails if another test of this process was first.
        let _first = rustls::crypto::ring::default_provider().install_default();
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self::serve(Emulator::bind(any_port, options).await.unwrap())
    }

    fn serve(emulator: Emulator) -> Self {
        let shutdown = CancellationToken::new();
        Self {
            address: emulator.address(),
            endpoint: format!("http://{}", emulator.address()),
            broker: emulator.broker(),
            served: tokio::spawn(emulator.serve(shutdown.clone())),
            shutdown,
        }
    }

    /// With the topic and the subscription.
    async fn prepared(subscription: Subscription) -> Self {
        Self::prepared_with(Options::default(), subscription).await
    }

    async fn prepared_with(options: Options, subscription: Subscription) -> Self {
        let running = Self::with(options).await;
        let topics = running.topic_admin().await;
        topics.create_topic().set_name(TOPIC).send().await.unwrap();
        let policy = subscription.dead_letter_policy.iter();
        for policy in policy.filter(|policy| policy.dead_letter_topic != TOPIC) {
            let create = topics.create_topic().set_name(&policy.dead_letter_topic);
            create.send().await.unwrap();
        }
        let request = running.subscription_admin().await.create_subscription();
        let subscription = subscription.set_name(SUBSCRIPTION).set_topic(TOPIC);
        request.with_request(subscription).send().await.unwrap();
        running
    }

    async fn topic_admin(&self) -> TopicAdmin {
        let builder = TopicAdmin::builder().with_endpoint(&self.endpoint);
        builder.with_credentials(anonymous()).build().await.unwrap()
    }

    async fn subscription_admin(&self) -> SubscriptionAdmin {
        let builder = SubscriptionAdmin::builder().with_endpoint(&self.endpoint);
        builder.with_credentials(anonymous()).build().await.unwrap()
    }

    async fn publisher(&self) -> Publisher {
        let builder = Publisher::builder(TOPIC).with_endpoint(&self.endpoint);
        builder.with_credentials(anonymous()).build().await.unwrap()
    }

    async fn subscriber(&self) -> Subscriber {
        let builder = Subscriber::builder().with_endpoint(&self.endpoint);
        builder.with_credentials(anonymous()).build().await.unwrap()
    }

    async fn stream(&self, max_outstanding_messages: i64) -> MessageStream {
        let subscriber = self.subscriber().await;
        subscriber
            .subscribe(SUBSCRIPTION)
            .set_max_outstanding_messages(max_outstanding_messages)
            .build()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        let served = in_time(self.served).await;
        served.unwrap().unwrap();
    }

    /// Until the acks sent so far have arrived.
    async fn backlog_of(&self, expected: usize) {
        in_time(async {
            while self.broker.backlog_len(SUBSCRIPTION).unwrap() != expected {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

fn anonymous() -> Credentials {
    anonymous::Builder::new().build()
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    let result = tokio::time::timeout(PATIENCE, future).await;
    result.expect("it took too long")
}

async fn next(stream: &mut MessageStream) -> (Message, Handler) {
    let next = in_time(stream.next()).await;
    next.expect("the stream ended").expect("the stream failed")
}

async fn publish(publisher: &Publisher, message: Message) -> String {
    in_time(publisher.publish(message)).await.unwrap()
}
