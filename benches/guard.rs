//! What claims and renewals cost on Postgres:
//!
//!     tests/services/run.sh cargo bench --bench guard
//!     tests/services/run.sh cargo bench --bench guard -- --rows 200000
//!
//! It compares within one run, because absolute figures differ by machine.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::Utc;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use trainyard::job::{AckTerms, Can, Claim, ClaimRequest, Fence, JobKey, Limits};
use trainyard::message::Message;
use trainyard::store::{self, ClaimTerms, Missing, Store};
use url::Url;
use uuid::Uuid;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const VARIABLE: &str = "TRAINYARD_TEST_DATABASE_URL";
const USAGE: &str = "usage: tests/services/run.sh cargo bench --bench guard [-- --rows N]

  --rows N   how many finished jobs the large table has (default 2000000)

It makes databases of its own on the server that TRAINYARD_TEST_DATABASE_URL names.";

const SMALL: u64 = 10_000;
const LARGE: u64 = 2_000_000;
const BATCH: usize = 200;
const ROUNDS: usize = 20;
const SINGLES: usize = 100;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Cargo passes it from `cargo bench` only; `cargo test` builds this too.
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("not measured; run it by `tests/services/run.sh cargo bench --bench guard`");
        return Ok(());
    }
    let (Ok(server), Some(rows)) = (std::env::var(VARIABLE), rows(&arguments)) else {
        println!("{USAGE}");
        return Ok(());
    };
    let small = Bench::make(&server, SMALL).await?;
    let large = Bench::make(&server, rows).await?;
    let measured = measure(&small, &large, rows).await;
    small.remove(&server).await?;
    large.remove(&server).await?;
    measured
}

/// The size asked for; None where the arguments cannot be read.
fn rows(arguments: &[String]) -> Option<u64> {
    let mut words = arguments.iter().filter(|word| *word != "--bench");
    match (words.next().map(String::as_str), words.next()) {
        (None, _) => Some(LARGE),
        (Some("--rows"), Some(rows)) => rows.parse().ok(),
        _ => None,
    }
}

async fn measure(small: &Bench, large: &Bench, rows: u64) -> Outcome {
    let (single, batch) = batching(small).await?;
    println!("{:<44} {single:>12.0} /s", "claims one by one");
    println!("{:<44} {batch:>12.0} /s", "claims in batches of 200");
    println!("{:<44} {:>12.1}    (at least 8)", "ratio", batch / single);

    let [of_small, of_large] = growth(small, large).await?;
    println!(
        "{:<44} {:>12.0} µs",
        format!("a claim at {SMALL} rows"),
        of_small
    );
    println!(
        "{:<44} {:>12.0} µs",
        format!("a claim at {rows} rows"),
        of_large
    );
    println!(
        "{:<44} {:>12.2}    (at most 1.3)",
        "ratio",
        of_large / of_small
    );

    let hot = renewals(large).await?;
    println!(
        "{:<44} {hot:>12.3}    (at least 0.95)",
        "renewals that are heap-only (HOT)"
    );
    Ok(())
}

/// Claims per second from one connection, one by one and in batches, measured
/// alternately.
async fn batching(bench: &Bench) -> Outcome<(f64, f64)> {
    let (mut single, mut batch) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        single.push(bench.claims(SINGLES, 1).await?.as_secs_f64() / SINGLES as f64);
        batch.push(bench.claims(1, BATCH).await?.as_secs_f64() / BATCH as f64);
    }
    Ok((1.0 / median(single), 1.0 / median(batch)))
}

/// Microseconds per claim in each, measured alternately.
async fn growth(small: &Bench, large: &Bench) -> Outcome<[f64; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        for (bench, times) in [small, large].into_iter().zip(&mut times) {
            let time = bench.claims(SINGLES, 1).await?;
            // The first round only warms the caches.
            if round > 0 {
                times.push(time.as_secs_f64() * 1e6 / SINGLES as f64);
            }
        }
    }
    Ok(times.map(median))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The share of renewals that touched no index.
async fn renewals(bench: &Bench) -> Outcome<f64> {
    let fences: Vec<Fence> = bench.claim(BATCH).await?;
    let before = bench.updates().await?;
    for _ in 0..ROUNDS {
        bench.store.renew(&fences, Duration::from_secs(600)).await?;
    }
    let wanted = before.0 + i64::try_from(BATCH * ROUNDS)?;
    // The server tells the counts of an idle connection within ten seconds.
    for _ in 0..200 {
        let (updates, hot) = bench.updates().await?;
        if updates >= wanted {
            return Ok((hot - before.1) as f64 / (updates - before.0) as f64);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Err("the server did not tell how many updates there were".into())
}

/// A database with so many finished jobs.
struct Bench {
    name: String,
    url: String,
    store: Arc<dyn Store>,
}

const FILL: &str = "
INSERT INTO processed_messages
       (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
        task, state, attempts, worker, started_at, finished_at, finished_by)
SELECT 's', (10000000000000 + n) || '@1700000000000000',
       (lpad(to_hex(1700000000000 + n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid,
       (10000000000000 + n)::text, now(), '', '{\"team\":\"vision\"}',
       convert_to(repeat('x', 200), 'UTF8'), 'train', 'succeeded', 1, 'w0', now(), now(),
       gen_random_uuid()
FROM generate_series(1, $1) AS n";

const FILL_LEDGER: &str = "
INSERT INTO ledger (subscription, key, worker, kind, attempt)
SELECT 's', (10000000000000 + n) || '@1700000000000000', 'w0', 'claimed', 1
FROM generate_series(1, $1) AS n";

impl Bench {
    async fn make(server: &str, rows: u64) -> Outcome<Self> {
        let name = format!("bench_{}", Uuid::new_v4().simple());
        administer(server, format!("CREATE DATABASE {name}")).await?;
        let mut url = Url::parse(server)?;
        url.set_path(&name);
        let url = url.to_string();
        let store = store::open(&url, 1, Missing::Create).await?;
        store.migrate(|_| {}).await?;
        let mut connection = PgConnection::connect(&url).await?;
        for fill in [FILL, FILL_LEDGER] {
            let rows = i64::try_from(rows)?;
            sqlx::query(fill)
                .bind(rows)
                .execute(&mut connection)
                .await?;
        }
        sqlx::query("VACUUM ANALYZE")
            .execute(&mut connection)
            .await?;
        Ok(Self { name, url, store })
    }

    async fn remove(&self, server: &str) -> Outcome {
        administer(server, format!("DROP DATABASE {} WITH (FORCE)", self.name)).await
    }

    /// The time that so many batches of so many new keys take.
    async fn claims(&self, batches: usize, size: usize) -> Outcome<Duration> {
        let started = Instant::now();
        for _ in 0..batches {
            self.claim(size).await?;
        }
        Ok(started.elapsed())
    }

    async fn claim(&self, size: usize) -> Outcome<Vec<Fence>> {
        let terms = ClaimTerms {
            worker: "bench".into(),
            lease: Duration::from_secs(600),
            max_crashes: 3,
        };
        let requests: Vec<ClaimRequest> = (0..size).map(|_| request()).collect();
        let claims = self.store.claim(&requests, &terms).await?;
        claims
            .into_iter()
            .map(|claim| match claim {
                Claim::Acquired(acquired) => Ok(acquired.fence),
                other => Err(format!("a new key was not acquired: {other:?}").into()),
            })
            .collect()
    }

    /// How many updates of leases there were, and how many of them heap-only.
    async fn updates(&self) -> Outcome<(i64, i64)> {
        let mut connection = PgConnection::connect(&self.url).await?;
        let counts = sqlx::query_as(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'leases'",
        );
        Ok(counts.fetch_one(&mut connection).await?)
    }
}

async fn administer(server: &str, statement: String) -> Outcome {
    let mut connection = PgConnection::connect(server).await?;
    sqlx::query(AssertSqlSafe(statement))
        .execute(&mut connection)
        .await?;
    Ok(())
}

/// A message such as Pub/Sub's: its ids grow, roughly.
fn request() -> ClaimRequest {
    let job_id = Uuid::now_v7();
    let id = (job_id.as_u128() >> 64).to_string();
    let message = Message {
        publish_time: Utc::now(),
        data: Bytes::from(vec![b'x'; 200]),
        attributes: [("team".to_owned(), "vision".to_owned())].into(),
        ordering_key: String::new(),
        id,
    };
    ClaimRequest {
        key: JobKey::new("s", &format!("{}-{job_id}", message.id)),
        job_id,
        token: Uuid::new_v4(),
        task: "train".to_owned(),
        message,
        can: Can::Run,
        ack: AckTerms {
            with_claim: true,
            deadline: Duration::from_secs(30),
        },
        limits: Limits {
            max_attempts: 3,
            dead_letter_topic: None,
        },
    }
}
