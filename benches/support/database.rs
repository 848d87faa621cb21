//! The databases that every bench makes, with ended jobs in them.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use trainyard::job::{AckTerms, Can, ClaimRequest, JobKey, Limits};
use trainyard::message::Message;
use trainyard::store::{self, Missing, Store};
use url::Url;
use uuid::Uuid;

pub type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const VARIABLE: &str = "TRAINYARD_TEST_DATABASE_URL";

/// A number that the command line may give: its name, what it is, its default.
pub type Given = (&'static str, &'static str, u64);

/// The server to measure on, and the numbers. If nothing is to be measured, prints why
/// and returns None.
pub fn asked<const N: usize>(bench: &str, given: [Given; N]) -> Option<(String, [u64; N])> {
    let command = format!("tests/services/run.sh cargo bench --bench {bench}");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Only `cargo bench` passes it. `cargo test` may run this program, too.
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("not measured; run it by `{command}`");
        return None;
    }
    if let (Ok(server), Some(numbers)) = (std::env::var(VARIABLE), numbers(&arguments, given)) {
        return Some((server, numbers));
    }
    println!("usage: {command} -- [OPTION N]...\n");
    for (name, what, default) in given {
        println!("  {name} N   {what} (default {default})");
    }
    println!("\nIt makes databases of its own on the server that {VARIABLE} names.");
    None
}

/// None if the arguments cannot be read.
fn numbers<const N: usize>(arguments: &[String], given: [Given; N]) -> Option<[u64; N]> {
    let mut numbers = given.map(|(_, _, default)| default);
    let mut words = arguments.iter().filter(|word| *word != "--bench");
    while let Some(word) = words.next() {
        let nth = given.iter().position(|(name, ..)| name == word)?;
        numbers[nth] = words.next()?.parse().ok()?;
    }
    Some(numbers)
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A database with ended jobs.
pub struct Database {
    name: String,
    pub url: String,
    pub store: Arc<dyn Store>,
}

/// Ended jobs, spread evenly over the last thirty days without the last hour. One in a
/// hundred is dead, and one in a hundred was cancelled.
const FILL: &str = "
INSERT INTO processed_messages
       (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
        task, state, attempts, worker, started_at, finished_at, finished_by)
SELECT 's', (10000000000000 + n) || '@1700000000000000',
       (lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - 2592000000
                    + n * 2588400000 / $1), 12, '0')
        || '70008000' || lpad(to_hex(n), 12, '0'))::uuid,
       (10000000000000 + n)::text, now(), '', '{\"team\":\"vision\"}',
       convert_to(repeat('x', 200), 'UTF8'), 'train',
       CASE n % 100 WHEN 0 THEN 'dead' WHEN 1 THEN 'cancelled' ELSE 'succeeded' END,
       1, 'w0', now(), now(), gen_random_uuid()
FROM generate_series(1, $1) AS n";

const FILL_LEDGER: &str = "
INSERT INTO ledger (subscription, key, worker, kind, attempt)
SELECT 's', (10000000000000 + n) || '@1700000000000000', 'w0', 'claimed', 1
FROM generate_series(1, $1) AS n";

impl Database {
    pub async fn make(server: &str, ended: u64) -> Outcome<Self> {
        let name = format!("bench_{}", Uuid::new_v4().simple());
        execute(server, &format!("CREATE DATABASE {name}"), &[]).await?;
        let mut url = Url::parse(server)?;
        url.set_path(&name);
        let url = url.to_string();
        let store = store::open(&url, 1, None, Missing::Create).await?;
        store.migrate(|_| {}).await?;
        let database = Self { name, url, store };
        database.execute(FILL, &[ended]).await?;
        database.execute(FILL_LEDGER, &[ended]).await?;
        Ok(database)
    }

    /// Executes a statement with these numbers as its arguments.
    pub async fn execute(&self, statement: &str, numbers: &[u64]) -> Outcome {
        execute(&self.url, statement, numbers).await
    }

    /// Does what autovacuum would have done by now.
    pub async fn vacuum(&self) -> Outcome {
        self.execute("VACUUM ANALYZE", &[]).await
    }

    pub async fn remove(&self, server: &str) -> Outcome {
        let statement = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        execute(server, &statement, &[]).await
    }
}

async fn execute(url: &str, statement: &str, numbers: &[u64]) -> Outcome {
    let mut connection = PgConnection::connect(url).await?;
    let mut query = sqlx::query(AssertSqlSafe(statement));
    for number in numbers {
        query = query.bind(i64::try_from(*number)?);
    }
    query.execute(&mut connection).await?;
    Ok(())
}

/// A request with a new message. Message ids roughly grow, as Pub/Sub's do.
pub fn request() -> ClaimRequest {
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
