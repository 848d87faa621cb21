//! Measures how many requests for a job of no length a worker takes from Pub/Sub, guards,
//! runs and acknowledges per second, and how soon it starts one:
//!
//!     tests/services/run.sh cargo bench --bench throughput
//!     tests/services/run.sh cargo bench --bench throughput -- --messages 50000 --rounds 5
//!
//! Beside it, in the same run, on the same broker and database server: a subscriber in
//! Python that inserts the message id and acks (`benches/peers/handler.py`), and `pgbench`
//! with the same rows, which shows what the database can do at most. It compares within one
//! run, because absolute figures differ by machine. It needs Linux, Python and `pgbench`.

mod support {
    #[expect(dead_code, reason = "other benches claim jobs by themselves")]
    pub mod database;
    pub mod messages;
    pub mod peers;
    pub mod processes;
}

use std::fs;
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use support::database::{Database, Outcome, asked, median};
use support::messages::{Broker, PROJECT, SUBSCRIPTION};
use support::peers;
use support::processes::{Process, parent, processor_time, processor_time_of_family, trainyard};
use tokio::time::sleep;

/// What is put into the worker's configuration.
struct Settings {
    name: &'static str,
    slots: usize,
    task: &'static str,
    subscription: &'static str,
    ordering_keys: u64,
}

const SETTINGS: [Settings; 6] = [
    Settings {
        name: "defaults, 4 slots",
        ..DEFAULTS
    },
    Settings {
        name: "64 slots",
        slots: 64,
        ..DEFAULTS
    },
    Settings {
        name: "64 slots, before_run",
        slots: 64,
        task: "ack = \"before_run\"",
        ..DEFAULTS
    },
    Settings {
        name: "64 slots, 100 ordering keys",
        slots: 64,
        ordering_keys: 100,
        ..DEFAULTS
    },
    Settings {
        name: "200 slots, prefetch 2000",
        slots: 200,
        subscription: "prefetch = 2000",
        ..DEFAULTS
    },
    Settings {
        name: "64 slots, no prefetch",
        slots: 64,
        subscription: "prefetch = 0",
        ..DEFAULTS
    },
];

const DEFAULTS: Settings = Settings {
    name: "",
    slots: 4,
    task: "",
    subscription: "",
    ordering_keys: 0,
};

/// How long a contestant may be without progress.
const PATIENCE: Duration = Duration::from_secs(60);
/// A rate is taken over the part of the jobs between these, so that neither the start nor
/// the last few count.
const FROM: f64 = 0.1;
const TO: f64 = 0.9;

/// What was measured of one contestant.
#[derive(Clone, Copy)]
struct Figures {
    per_second: f64,
    /// Microseconds of processor time per message.
    own: f64,
    of_postgres: f64,
    of_broker: f64,
    /// Bytes of write-ahead log per message.
    wal: f64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let given = [
        ("--messages", "how many messages each takes", 20_000),
        ("--rounds", "how often each is measured", 3),
        (
            "--only",
            "measure only this one of the settings, from 1 on; 0: all",
            0,
        ),
    ];
    let Some((server, [messages, rounds, only])) = asked("throughput", given) else {
        return Ok(());
    };
    let bench = Bench { server, messages };
    let mut rows: Vec<(&str, Vec<Figures>)> =
        vec![("the handler in Python, 10 threads", Vec::new())];
    let settings: Vec<&Settings> = SETTINGS
        .iter()
        .enumerate()
        .filter(|(nth, _)| only == 0 || *nth as u64 + 1 == only)
        .map(|(_, settings)| settings)
        .collect();
    rows.extend(settings.iter().map(|settings| (settings.name, Vec::new())));
    let mut of_pgbench = Vec::new();
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        // Alternately, so that what else the machine does hits all alike.
        rows[0].1.push(bench.handler().await?);
        for (settings, (_, figures)) in settings.iter().zip(&mut rows[1..]) {
            figures.push(bench.worker(settings).await?);
        }
        of_pgbench.push(bench.pgbench().await?);
    }
    print(&rows, median(of_pgbench));
    println!();
    bench.latency().await
}

fn print(rows: &[(&str, Vec<Figures>)], of_pgbench: f64) {
    let middle =
        |figures: &[Figures], of: fn(&Figures) -> f64| median(figures.iter().map(of).collect());
    let handler = middle(&rows[0].1, |figures| figures.per_second);
    println!(
        "{:<36} {:>10} {:>9} {:>9} | {:>8} {:>9} {:>8} {:>8}",
        "", "messages/s", "x handler", "x pgbench", "own µs", "Postgres", "broker", "WAL B"
    );
    for (name, figures) in rows {
        let per_second = middle(figures, |figures| figures.per_second);
        println!(
            "{name:<36} {per_second:>10.0} {:>9.2} {:>9.2} | {:>8.0} {:>9.0} {:>8.0} {:>8.0}",
            per_second / handler,
            per_second / of_pgbench,
            middle(figures, |figures| figures.own),
            middle(figures, |figures| figures.of_postgres),
            middle(figures, |figures| figures.of_broker),
            middle(figures, |figures| figures.wal),
        );
    }
    println!(
        "{:<36} {of_pgbench:>10.0} {:>9.2} {:>9.2} |",
        "pgbench, batches of 200",
        of_pgbench / handler,
        1.0
    );
}

struct Bench {
    server: String,
    messages: u64,
}

impl Bench {
    async fn handler(&self) -> Outcome<Figures> {
        let scene = Scene::set(&self.server).await?;
        scene.database.execute(peers::TABLE, &[]).await?;
        scene.broker.publish(self.messages, 0).await?;
        let start = || {
            let url = peers::plain(&scene.database.url)?;
            let output = scene.folder.path().join("handler.log");
            let subscription = scene.broker.subscription_path();
            peers::start_handler(&scene.broker.host, &subscription, &url, &output)
        };
        let figures = self
            .measure(&scene, start, "SELECT at FROM processed")
            .await;
        scene.strike(&self.server).await?;
        figures
    }

    async fn worker(&self, settings: &Settings) -> Outcome<Figures> {
        let scene = Scene::set(&self.server).await?;
        scene
            .broker
            .publish(self.messages, settings.ordering_keys)
            .await?;
        let start = || scene.start_worker(settings);
        let ended = "SELECT finished_at AS at FROM processed_messages WHERE state = 'succeeded'";
        let figures = self.measure(&scene, start, ended).await;
        scene.strike(&self.server).await?;
        figures.map_err(|error| format!("{}: {error}", settings.name).into())
    }

    async fn pgbench(&self) -> Outcome<f64> {
        let database = Database::make(&self.server, 1_000).await?;
        let folder = tempfile::tempdir()?;
        let rate = peers::pgbench(&peers::plain(&database.url)?, folder.path(), 5);
        database.remove(&self.server).await?;
        rate
    }

    /// Starts a contestant, waits until it has ended all, and computes its figures from the
    /// times that it has written.
    async fn measure(
        &self,
        scene: &Scene,
        start: impl FnOnce() -> Outcome<Process>,
        ended: &str,
    ) -> Outcome<Figures> {
        let mut connection = PgConnection::connect(&scene.database.url).await?;
        let before = Usage::of(&mut connection, scene).await?;
        let mut contestant = start()?;
        let mut done = 0;
        let mut patience = PATIENCE;
        while done < self.messages {
            // Rarely, since counting costs the server something.
            sleep(Duration::from_millis(500)).await;
            contestant.check()?;
            let count = format!("SELECT count(*) FROM ({ended}) AS ended");
            let counted: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(count))
                .fetch_one(&mut connection)
                .await?;
            let counted = counted.unsigned_abs();
            patience = match counted > done {
                true => PATIENCE,
                false => patience.saturating_sub(Duration::from_millis(500)),
            };
            if patience.is_zero() {
                return Err(
                    format!("{counted} of {} ended, and then no more", self.messages).into(),
                );
            }
            done = counted;
        }
        let own = processor_time(contestant.id())?;
        let after = Usage::of(&mut connection, scene).await?;
        let part = format!(
            "SELECT extract(epoch FROM max(at) - min(at))::float8 FROM (
                 SELECT at, percent_rank() OVER (ORDER BY at) AS rank FROM ({ended}) AS ended
             ) AS ranked WHERE rank BETWEEN {FROM} AND {TO}"
        );
        let seconds: f64 = sqlx::query_scalar(sqlx::AssertSqlSafe(part))
            .fetch_one(&mut connection)
            .await?;
        let messages = self.messages as f64;
        let micros = |time: Duration| time.as_secs_f64() * 1e6 / messages;
        Ok(Figures {
            per_second: messages * (TO - FROM) / seconds,
            own: micros(own),
            of_postgres: micros(after.postgres - before.postgres),
            of_broker: micros(after.broker - before.broker),
            wal: (after.wal - before.wal) / messages,
        })
    }

    /// Publishes one message at a time to an idle worker.
    async fn latency(&self) -> Outcome {
        const SAMPLES: u32 = 300;
        let scene = Scene::set(&self.server).await?;
        let _worker = scene.start_worker(&DEFAULTS)?;
        for _ in 0..SAMPLES {
            scene.broker.publish(1, 0).await?;
            sleep(Duration::from_millis(30)).await;
        }
        sleep(Duration::from_secs(1)).await;
        let mut connection = PgConnection::connect(&scene.database.url).await?;
        let row: (i64, Option<Vec<f64>>) = sqlx::query_as(
            "SELECT count(*), percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (
                 ORDER BY extract(epoch FROM started_at - publish_time)::float8 * 1000)
             FROM processed_messages WHERE state = 'succeeded'",
        )
        .fetch_one(&mut connection)
        .await?;
        let (count, percentiles) = row;
        let percentiles = percentiles.ok_or("no job has ended")?;
        println!(
            "published → started, one at a time ({count} of {SAMPLES}): median {:.1} ms, 95th percentile {:.1} ms, 99th {:.1} ms",
            percentiles[0], percentiles[1], percentiles[2]
        );
        scene.strike(&self.server).await
    }
}

/// A broker and a database of one contestant's own.
struct Scene {
    broker: Broker,
    database: Database,
    folder: tempfile::TempDir,
    /// The server's main process.
    postgres: u32,
}

impl Scene {
    async fn set(server: &str) -> Outcome<Self> {
        let folder = tempfile::tempdir()?;
        let database = Database::make(server, 1_000).await?;
        database.execute("DELETE FROM ledger", &[]).await?;
        database
            .execute("DELETE FROM processed_messages", &[])
            .await?;
        database.vacuum().await?;
        database.execute("CHECKPOINT", &[]).await.ok();
        let mut connection = PgConnection::connect(&database.url).await?;
        let backend: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
            .fetch_one(&mut connection)
            .await?;
        Ok(Self {
            broker: Broker::start(folder.path()).await?,
            database,
            folder,
            postgres: parent(backend.cast_unsigned())?,
        })
    }

    fn start_worker(&self, settings: &Settings) -> Outcome<Process> {
        let config = self.folder.path().join("trainyard.toml");
        fs::write(&config, self.config(settings))?;
        let mut command = trainyard();
        command.args(["run", "--config"]).arg(&config);
        command
            .env("RUST_LOG", "warn")
            .current_dir(self.folder.path());
        Process::start(&mut command, &self.folder.path().join("worker.log"))
    }

    fn config(&self, settings: &Settings) -> String {
        let Settings {
            slots,
            task,
            subscription,
            ..
        } = settings;
        let (host, url) = (&self.broker.host, &self.database.url);
        format!(
            "[pubsub]\nproject = {PROJECT:?}\nemulator_host = {host:?}\n\
             [database]\nurl = {url:?}\n\
             [worker]\nslots = {slots}\n\
             [subscriptions.{SUBSCRIPTION}]\n{subscription}\n\
             [tasks.rehearsal]\nbuiltin = \"rehearsal\"\n{task}\n"
        )
    }

    async fn strike(self, server: &str) -> Outcome {
        self.database.remove(server).await
    }
}

/// Processor time and write-ahead log used so far.
struct Usage {
    postgres: Duration,
    broker: Duration,
    wal: f64,
}

impl Usage {
    async fn of(connection: &mut PgConnection, scene: &Scene) -> Outcome<Self> {
        let wal = sqlx::query_scalar("SELECT (pg_current_wal_lsn() - '0/0')::float8")
            .fetch_one(connection)
            .await?;
        Ok(Self {
            postgres: processor_time_of_family(scene.postgres)?,
            broker: processor_time(scene.broker.process.id())?,
            wal,
        })
    }
}
