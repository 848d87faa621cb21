//! Measures what claims and renewals cost on Postgres:
//!
//!     tests/services/run.sh cargo bench --bench guard
//!     tests/services/run.sh cargo bench --bench guard -- --rows 200000
//!
//! It compares within one run, because absolute figures differ by machine.

mod support {
    pub mod database;
}

use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use support::database::{Database, Outcome, asked, median, request};
use trainyard::job::{Claim, ClaimRequest, Fence};
use trainyard::store::ClaimTerms;

const SMALL: u64 = 10_000;
const LARGE: u64 = 2_000_000;
const BATCH: usize = 200;
const ROUNDS: usize = 20;
const SINGLES: usize = 100;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let rows = ("--rows", "how many ended jobs the large table has", LARGE);
    let Some((server, [rows])) = asked("guard", [rows]) else {
        return Ok(());
    };
    let small = Bench::make(&server, SMALL).await?;
    let large = Bench::make(&server, rows).await?;
    let measured = measure(&small, &large, rows).await;
    small.database.remove(&server).await?;
    large.database.remove(&server).await?;
    measured
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

/// The share of renewals that touched no index.
async fn renewals(bench: &Bench) -> Outcome<f64> {
    let fences: Vec<Fence> = bench.claim(BATCH).await?;
    let before = bench.updates().await?;
    for _ in 0..ROUNDS {
        bench
            .database
            .store
            .renew(&fences, Duration::from_secs(600))
            .await?;
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

struct Bench {
    database: Database,
}

impl Bench {
    async fn make(server: &str, rows: u64) -> Outcome<Self> {
        let database = Database::make(server, rows).await?;
        database.vacuum().await?;
        Ok(Self { database })
    }

    /// Claims `size` new keys in each of `batches` batches, and returns the time.
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
        let claims = self.database.store.claim(&requests, &terms).await?;
        claims
            .into_iter()
            .map(|claim| match claim {
                Claim::Acquired(acquired) => Ok(acquired.fence),
                other => Err(format!("a new key was not acquired: {other:?}").into()),
            })
            .collect()
    }

    /// How many updates of leases there were, and how many of these were heap-only.
    async fn updates(&self) -> Outcome<(i64, i64)> {
        let mut connection = PgConnection::connect(&self.database.url).await?;
        let counts = sqlx::query_as(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'leases'",
        );
        Ok(counts.fetch_one(&mut connection).await?)
    }
}
