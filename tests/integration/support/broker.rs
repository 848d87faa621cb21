use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Mutex;
use std::time::Duration;

use futures::future::try_join_all;
use google_cloud_auth::credentials::anonymous;
use google_cloud_pubsub::client::{Publisher, SubscriptionAdmin, TopicAdmin};
use google_cloud_pubsub::model::{self, DeadLetterPolicy, Message, PushConfig};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use trainyard::pubsub::{Connection, Outgoing, Pulling, Subscription};
use trainyard_emulator::{Emulator, Options};
use uuid::Uuid;

use super::{PATIENCE, not_tested};

/// The topic, and its subscription, for messages that the broker gives up.
const GIVEN_UP: &str = "given-up";
/// The minimum that Pub/Sub allows.
const DELIVERIES: i32 = 5;

/// Ports below the ephemeral range, so that no outgoing connection takes the port of a
/// broker that restarts, and apart from those of `tests/services`.
const PORTS: std::ops::Range<u16> = 10_000..20_000;

/// A broker with the test's own project.
pub struct Broker {
    pub host: String,
    pub project: String,
    pub connection: Connection,
    /// The built-in emulator itself, for operations that clients lack.
    pub builtin: Option<trainyard_emulator::Broker>,
    server: Mutex<Option<Server>>,
    _port: Option<Reserved>,
}

/// A port that no other test takes, not even while nothing listens on it.
#[cfg(target_os = "linux")]
struct Reserved {
    port: u16,
    /// Its name is taken on the whole machine, whatever folders a test run has.
    _name: std::os::unix::net::UnixListener,
}

#[cfg(target_os = "linux")]
impl Reserved {
    fn any() -> Self {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::net::{SocketAddr, UnixListener};
        loop {
            let port = fastrand::u16(PORTS);
            let name = SocketAddr::from_abstract_name(format!("trainyard-test-port-{port}"));
            match UnixListener::bind_addr(&name.unwrap()) {
                Err(taken) if taken.kind() == ErrorKind::AddrInUse => {}
                name => {
                    let _name = name.unwrap();
                    return Self { port, _name };
                }
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
struct Reserved {
    port: u16,
}

#[cfg(not(target_os = "linux"))]
impl Reserved {
    fn any() -> Self {
        let port = fastrand::u16(PORTS);
        Self { port }
    }
}

/// A running server of the built-in emulator. Dropping it stops the server.
struct Server {
    stop: DropGuard,
    served: JoinHandle<std::io::Result<()>>,
}

impl Server {
    fn of(emulator: Emulator) -> Self {
        let stop = CancellationToken::new();
        Self {
            served: tokio::spawn(emulator.serve(stop.clone())),
            stop: stop.drop_guard(),
        }
    }

    async fn stop(self) {
        drop(self.stop);
        self.served.await.unwrap().unwrap();
    }
}

impl Broker {
    /// The built-in emulator, inside the test's process.
    pub async fn builtin() -> Option<Self> {
        let (port, emulator) = loop {
            let port = Reserved::any();
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.port));
            match Emulator::bind(address, Options::default()).await {
                Err(taken) if taken.kind() == ErrorKind::AddrInUse => {}
                emulator => break (port, emulator.unwrap()),
            }
        };
        let host = emulator.address().to_string();
        Some(Self {
            builtin: Some(emulator.broker()),
            server: Mutex::new(Some(Server::of(emulator))),
            _port: Some(port),
            ..Self::at(host)
        })
    }

    /// Restarts the built-in emulator's server: all streams and connections end, the port
    /// stays closed for `away`, and the state is kept.
    pub async fn restart(&self, away: Duration) {
        let server = self.server.lock().unwrap().take();
        server.unwrap().stop().await;
        tokio::time::sleep(away).await;
        let inside = self.builtin.as_ref().unwrap();
        let emulator = Emulator::bind_again(self.host.parse().unwrap(), inside).await;
        *self.server.lock().unwrap() = Some(Server::of(emulator.unwrap()));
    }

    /// Google's emulator, which `make test` starts.
    pub async fn google() -> Option<Self> {
        let Ok(host) = std::env::var("TRAINYARD_TEST_PUBSUB_EMULATOR") else {
            not_tested("Google's emulator (TRAINYARD_TEST_PUBSUB_EMULATOR)");
            return None;
        };
        Some(Self::at(host))
    }

    fn at(host: String) -> Self {
        let project = format!("test-{}", &Uuid::new_v4().simple().to_string()[..12]);
        let connection = Connection::new(&project, Some(&host));
        Self {
            host,
            project,
            connection,
            builtin: None,
            server: Mutex::default(),
            _port: None,
        }
    }

    /// Creates a topic and a subscription of that name.
    pub async fn subscribe(&self, name: &str) {
        let wanted = self.wanted(name, name).await;
        self.make(wanted).await;
    }

    /// Creates a topic and a subscription of that name, with
    /// [`Broker::dead_letter_policy`].
    pub async fn subscribe_with_policy(&self, name: &str) {
        let policy = self.dead_letter_policy().await;
        let wanted = self.wanted(name, name).await;
        self.make(wanted.set_dead_letter_policy(policy)).await;
    }

    /// Pub/Sub's own policy: it gives a message up after five failed deliveries. Call
    /// once per broker; subscriptions may share it.
    pub async fn dead_letter_policy(&self) -> DeadLetterPolicy {
        let wanted = self.wanted(GIVEN_UP, GIVEN_UP).await;
        self.make(wanted).await;
        DeadLetterPolicy::new()
            .set_dead_letter_topic(self.connection.topic_path(GIVEN_UP))
            .set_max_delivery_attempts(DELIVERIES)
    }

    /// Deletes the topic; its subscriptions stay.
    pub async fn delete_topic(&self, name: &str) {
        let admin = TopicAdmin::builder()
            .with_endpoint(format!("http://{}", self.host))
            .with_credentials(anonymous::Builder::new().build());
        let admin = admin.build().await.unwrap();
        let path = self.connection.topic_path(name);
        admin.delete_topic().set_topic(path).send().await.unwrap();
    }

    /// Creates a topic and a push subscription of that name.
    pub async fn subscribe_with_push(&self, name: &str) {
        let push = PushConfig::new().set_push_endpoint("http://127.0.0.1:9/");
        let wanted = self.wanted(name, name).await;
        self.make(wanted.set_push_config(push)).await;
    }

    /// Creates a topic and a subscription of that name that keeps the order of messages
    /// with one ordering key.
    pub async fn subscribe_in_order(&self, name: &str) {
        let wanted = self.wanted(name, name).await;
        self.make(wanted.set_enable_message_ordering(true)).await;
    }

    /// Creates a topic of that name and a subscription like the given one.
    pub async fn subscribe_like(&self, name: &str, like: model::Subscription) {
        self.connection.ensure_topic(name).await.unwrap();
        let wanted = like
            .set_name(self.connection.subscription_path(name))
            .set_topic(self.connection.topic_path(name))
            .set_ack_deadline_seconds(10);
        self.make(wanted).await;
    }

    /// A subscription to create; creates its topic.
    pub async fn wanted(&self, topic: &str, name: &str) -> model::Subscription {
        self.connection.ensure_topic(topic).await.unwrap();
        model::Subscription::new()
            .set_name(self.connection.subscription_path(name))
            .set_topic(self.connection.topic_path(topic))
            .set_ack_deadline_seconds(10)
            // Google's emulator redelivers from the messages it retains.
            .set_retain_acked_messages(self.builtin.is_none())
    }

    pub async fn make(&self, subscription: model::Subscription) {
        let admin = self.subscription_admin().await;
        let create = admin.create_subscription().with_request(subscription);
        create.send().await.unwrap();
    }

    /// A subscription that asks for one message at a time.
    pub fn pulled(&self, name: &str) -> Subscription {
        let pulling = Pulling {
            ack_deadline: Duration::from_secs(10),
            slots: 1,
            prefetch: 0,
            quiet_limit: Duration::from_secs(600),
        };
        let path = self.connection.subscription_path(name);
        Subscription::new(self.connection.clients(1), path, pulling)
    }

    /// The next messages on the test's own subscription.
    pub async fn receive(&self, name: &str, how_many: usize) -> Vec<trainyard::message::Message> {
        let mut subscription = self.pulled(name);
        let mut received = Vec::new();
        while received.len() < how_many {
            subscription.listen().await.unwrap();
            let next = tokio::time::timeout(PATIENCE, subscription.next()).await;
            let (message, receipt) = next.unwrap().unwrap().into_parts();
            receipt.ack();
            received.push(message);
        }
        subscription.flush().await;
        received
    }

    /// Delivers messages a second time under their ids: at least these with the built-in
    /// emulator, all that were ever published with Google's.
    pub async fn deliver_again(&self, name: &str, ids: &[String]) {
        if let Some(inside) = &self.builtin {
            let topic = self.connection.topic_path(name);
            for id in ids {
                inside.duplicate(&topic, id).unwrap();
            }
            return;
        }
        let admin = self.subscription_admin().await;
        let seek = admin
            .seek()
            .set_subscription(self.connection.subscription_path(name))
            .set_time(google_cloud_wkt::Timestamp::clamp(0, 0));
        seek.send().await.unwrap();
    }

    async fn subscription_admin(&self) -> SubscriptionAdmin {
        let builder = SubscriptionAdmin::builder()
            .with_endpoint(format!("http://{}", self.host))
            .with_credentials(anonymous::Builder::new().build());
        builder.build().await.unwrap()
    }

    /// Publishes all data concurrently and returns the message ids in order.
    pub async fn publish_all(&self, topic: &str, data: Vec<String>) -> Vec<String> {
        let messages = data.into_iter().map(|data| Message::new().set_data(data));
        self.publish_messages(topic, messages.collect()).await
    }

    /// As [`Broker::publish_all`], for messages with other fields than data.
    pub async fn publish_messages(&self, topic: &str, messages: Vec<Message>) -> Vec<String> {
        let publisher = Publisher::builder(self.connection.topic_path(topic))
            .with_endpoint(format!("http://{}", self.host))
            .with_credentials(anonymous::Builder::new().build())
            .build()
            .await
            .unwrap();
        let publishing = messages
            .into_iter()
            .map(|message| publisher.publish(message));
        try_join_all(publishing.collect::<Vec<_>>()).await.unwrap()
    }

    pub fn port(&self) -> u16 {
        let address: SocketAddr = self.host.parse().unwrap();
        address.port()
    }

    /// How many messages of the built-in emulator are unacknowledged.
    pub fn backlog(&self, subscription: &str) -> usize {
        let path = self.connection.subscription_path(subscription);
        self.builtin.as_ref().unwrap().backlog_len(&path).unwrap()
    }

    /// How many messages of the built-in emulator are outstanding at workers.
    pub fn outstanding(&self, subscription: &str) -> usize {
        let path = self.connection.subscription_path(subscription);
        self.builtin.as_ref().unwrap().outstanding(&path).unwrap()
    }

    /// How many deliveries of the built-in emulator were nacked or not acknowledged in
    /// time. Each leads to a redelivery or a dead letter.
    pub fn failed_deliveries(&self, subscription: &str) -> u64 {
        let path = self.connection.subscription_path(subscription);
        let inside = self.builtin.as_ref().unwrap();
        inside.failed_deliveries(&path).unwrap()
    }

    /// How many messages the built-in emulator has given up by
    /// [`Broker::dead_letter_policy`]; 0 without the policy.
    pub fn given_up(&self) -> usize {
        let path = self.connection.subscription_path(GIVEN_UP);
        let inside = self.builtin.as_ref().unwrap();
        inside.backlog_len(&path).unwrap_or(0)
    }

    /// Publishes bytes and returns the message id.
    pub async fn publish(&self, topic: &str, data: impl Into<Vec<u8>>) -> String {
        let message = Outgoing {
            data: data.into(),
            ..Outgoing::default()
        };
        self.connection.publish(topic, message).await.unwrap()
    }
}

/// Makes four tests of each function: every broker with every database.
#[macro_export]
macro_rules! on_every_broker_and_database {
    ($($test:ident),* $(,)?) => {
        $crate::on_every_broker_and_database!(@ builtin_emulator_and_postgres, builtin, postgres, $($test),*);
        $crate::on_every_broker_and_database!(@ builtin_emulator_and_sqlite, builtin, sqlite, $($test),*);
        $crate::on_every_broker_and_database!(@ googles_emulator_and_postgres, google, postgres, $($test),*);
        $crate::on_every_broker_and_database!(@ googles_emulator_and_sqlite, google, sqlite, $($test),*);
    };
    (@ $module:ident, $broker:ident, $database:ident, $($test:ident),*) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    let broker = $crate::support::broker::Broker::$broker().await;
                    let database = $crate::support::database::Database::$database().await;
                    if let (Some(broker), Some(database)) = (broker, database) {
                        super::$test(broker, database).await;
                    }
                }
            )*
        }
    };
}
