//! Everything at once: many messages, duplicates, workers killed every two seconds, and
//! restarts of the database and the broker.
//!
//! `make test` runs it with 600 messages, or as many as TRAINYARD_TEST_MARATHON says.
//! docs/operations.md has the command and the figures of a run with 50,000.

mod fleet;
mod load;
mod verdict;

use std::sync::Arc;
use std::time::{Duration, Instant};

use google_cloud_pubsub::model::Subscription;
use sqlx::{Connection, PgConnection};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use self::fleet::Fleet;
use self::load::Load;
use self::verdict::Verdict;
use crate::support::broker::Broker;
use crate::support::private_postgres::PrivatePostgres;
use crate::support::runs::RunsLog;
use crate::support::worker::Yard;
use crate::support::{PATIENCE, eventually, seeded};

/// Each is a topic, a subscription and a task, named after when it acks.
const EARLY: &str = "early";
const LATE: &str = "late";

const MESSAGES: usize = 600;
const WAVE: usize = 50;
/// The most messages that are published and have not succeeded.
const MOST_AHEAD: usize = 2000;
/// No more kills once at most this many messages are left. A killed worker's messages
/// are redelivered only after the ack deadline of 10 s, so the end would drag on.
const STRAGGLERS: usize = 60;
/// How long the database or the broker stays down, besides the time it takes to start.
const AWAY: Duration = Duration::from_secs(1);

/// The maximum of delivery attempts per subscription. Every kill costs each message that
/// is unacked at that worker one attempt, and a worker lives for about six seconds.
///
/// - An `early` message is unacked for about half a second: its stream is closed before
///   the ack, and the client sends acks in batches. Up to one delivery in ten is hit. With
///   Pub/Sub's minimum of 5, a few of 50,000 messages would be given up by the kills alone,
///   so it is 20, the minimum for which `run` has no warning.
/// - A `late` message is unacked while it is prefetched, runs, or is held until a dead
///   worker's lease expires. On a slow machine most deliveries are hit, so it is 100,
///   Pub/Sub's maximum.
const DELIVERIES: [(&str, i32); 2] = [(EARLY, 20), (LATE, 100)];

/// Crashes and failures never make a job dead here.
const SECTIONS: &str = r#"
[worker]
slots = 16
lease = "3s"
stop_grace = "500ms"
shutdown_grace = "5s"
[guard]
max_crashes = 1000
[subscriptions.early]
ack_deadline = "10s"
[subscriptions.late]
ack_deadline = "10s"
prefetch = 16
[tasks.early]
builtin = "rehearsal"
ack = "before_run"
max_attempts = 1000
backoff = { initial = "20ms", max = "100ms" }
[tasks.late]
builtin = "rehearsal"
ack = "after_run"
max_attempts = 1000
backoff = { initial = "20ms", max = "100ms" }
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_message_is_lost_or_ends_twice_whatever_is_killed_and_restarted() {
    let Some(marathon) = Marathon::prepared().await else {
        return;
    };
    let began = Instant::now();
    let mut random = seeded();
    let fleet = Fleet::start(&marathon.yard, random.fork());
    let enough = CancellationToken::new();
    let (load, fleet) = tokio::join!(
        marathon.run(Load::new(random), &enough),
        fleet.kill_in_turn(&enough)
    );
    let took = began.elapsed();
    marathon.nothing_is_left_to_deliver().await;
    let verdict = Verdict::of(&marathon, &load, &fleet.deaths).await;
    verdict.print(took, fleet.false_starts);
    verdict.is_clean();
    fleet.stop().await;
}

struct Marathon {
    messages: usize,
    broker: Broker,
    postgres: Arc<PrivatePostgres>,
    yard: Yard,
    runs: RunsLog,
}

/// The restarts, after one, two, three and four fifths of the messages have succeeded.
const RESTARTS: [Restart; 4] = [
    Restart::Database,
    Restart::Broker,
    Restart::Database,
    Restart::Broker,
];

#[derive(Clone, Copy)]
enum Restart {
    Database,
    Broker,
}

impl Marathon {
    async fn prepared() -> Option<Self> {
        let postgres = PrivatePostgres::start()?;
        let broker = Broker::builtin().await?;
        let policy = broker.dead_letter_policy().await;
        for (name, deliveries) in DELIVERIES {
            let policy = policy.clone().set_max_delivery_attempts(deliveries);
            let subscription = Subscription::new()
                .set_enable_message_ordering(true)
                .set_dead_letter_policy(policy);
            broker.subscribe_like(name, subscription).await;
        }
        let database = postgres.database();
        database.open_migrated().await;
        let yard = Yard::new(&broker, &database, SECTIONS);
        yard.config_is_good().await;
        let messages = std::env::var("TRAINYARD_TEST_MARATHON");
        Some(Self {
            messages: messages.map_or(MESSAGES, |messages| messages.parse().unwrap()),
            broker,
            postgres: Arc::new(postgres),
            runs: RunsLog::in_folder(yard.folder.path()),
            yard,
        })
    }

    /// Publishes and restarts until every message has succeeded.
    async fn run(&self, mut load: Load, enough: &CancellationToken) -> Load {
        let ahead = MOST_AHEAD.min(self.messages / 3);
        let mut restarts = RESTARTS.into_iter().zip(1..).peekable();
        let (mut most, mut since) = (0, Instant::now());
        loop {
            let succeeded = self.succeeded().await;
            if succeeded > most {
                (most, since) = (succeeded, Instant::now());
            }
            self.goes_on(most, since);
            if succeeded + STRAGGLERS >= self.messages {
                enough.cancel();
            }
            let is_due = |(_, fifths): &(Restart, usize)| succeeded * 5 >= self.messages * fifths;
            let published = load.published.len();
            if let Some((restart, _)) = restarts.next_if(is_due) {
                self.restart(restart).await;
            } else if published < self.messages && published < succeeded + ahead {
                let wave = WAVE.min(self.messages - published);
                load.publish_wave(wave, &self.broker, &self.runs).await;
            } else if succeeded >= self.messages {
                load.finish(&self.broker).await;
                return load;
            } else {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    async fn restart(&self, what: Restart) {
        if let Restart::Broker = what {
            return self.broker.restart(AWAY).await;
        }
        let postgres = Arc::clone(&self.postgres);
        spawn_blocking(move || postgres.crash()).await.unwrap();
        tokio::time::sleep(AWAY).await;
        let postgres = Arc::clone(&self.postgres);
        spawn_blocking(move || postgres.start_again())
            .await
            .unwrap();
    }

    async fn succeeded(&self) -> usize {
        let mut connection = self.connection().await;
        let counted: i64 =
            sqlx::query_scalar("SELECT count(*) FROM processed_messages WHERE state = 'succeeded'")
                .fetch_one(&mut connection)
                .await
                .unwrap();
        usize::try_from(counted).unwrap()
    }

    async fn connection(&self) -> PgConnection {
        PgConnection::connect(&self.postgres.url).await.unwrap()
    }

    fn goes_on(&self, succeeded: usize, since: Instant) {
        assert_eq!(self.broker.given_up(), 0, "messages the broker gave up");
        let backlogs = [EARLY, LATE].map(|name| self.broker.backlog(name));
        assert!(
            since.elapsed() < PATIENCE,
            "{succeeded} messages have succeeded, and no more do; to be delivered: {backlogs:?}"
        );
    }

    async fn nothing_is_left_to_deliver(&self) {
        eventually("every message is acknowledged", async || {
            let backlogs = [EARLY, LATE].map(|name| self.broker.backlog(name));
            (backlogs == [0, 0]).then_some(())
        })
        .await;
        assert_eq!(self.broker.given_up(), 0, "messages the broker gave up");
    }
}
