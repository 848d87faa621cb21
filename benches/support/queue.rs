//! The unfinished jobs for the bench of the queue.

use trainyard::job::JobKey;

use super::database::{Database, Outcome};

/// How many jobs a database has.
#[derive(Clone, Copy)]
pub struct Size {
    pub ended: u64,
    pub waiting: u64,
    /// Without those that have an ordering key.
    pub running: u64,
}

/// Half of the waiting jobs have ordering keys, ten jobs to a key. The first job of a
/// key may run, and in one key of a hundred it runs; the others wait for their turn. A
/// quarter of the jobs wait for their next attempt, and the rest may run. There are 20
/// tasks. No job of the last three tasks may run, and no worker knows `task-16`. The
/// jobs that run without an ordering key are the oldest.
const FILL: &str = "
WITH job AS (
    SELECT n, (20000000000000 + n)::text AS message_id,
           (20000000000000 + n) || '@1700000000000000' AS key,
           (lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - 3600000
                        + (n + $2) % ($1 + $2)), 12, '0')
            || '70009000' || lpad(to_hex(n), 12, '0'))::uuid AS job_id,
           CASE WHEN n <= $1 / 2 THEN 'k' || (n - 1) / 10 END AS ordering_key,
           CASE WHEN n > $1 OR n <= $1 / 200 AND n % 10 = 1 THEN 'running'
                WHEN n <= $1 / 2 AND n % 10 <> 1 THEN 'behind'
                WHEN n > $1 / 2 AND n <= $1 * 3 / 4 THEN 'later'
                ELSE 'free' END AS kind
    FROM generate_series(1, $1 + $2) AS n
), named AS (
    SELECT *, 'task-' || CASE kind WHEN 'free' THEN (n + n / 10) % 17 ELSE n % 20 END AS task,
           (kind IN ('running', 'later'))::int AS attempt
    FROM job
), recorded AS (
    INSERT INTO processed_messages
           (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
            task, state)
    SELECT 's', key, job_id, message_id, now(), coalesce(ordering_key, ''), '{\"team\":\"vision\"}',
           convert_to(repeat('x', 200), 'UTF8'), task, 'open'
    FROM named
), queued AS (
    INSERT INTO leases
           (subscription, key, job_id, task, ordering_key, attempt, token, worker, started_at,
            run_after, lease_until, last_error)
    SELECT 's', key, job_id, task, ordering_key, attempt,
           CASE kind WHEN 'running' THEN gen_random_uuid() END,
           CASE attempt WHEN 1 THEN 'w' || n % 50 END, CASE attempt WHEN 1 THEN now() END,
           CASE kind WHEN 'behind' THEN 'infinity'
                     WHEN 'later' THEN now() + interval '1 hour' + make_interval(secs => n / 1000.0)
                     ELSE now() - make_interval(secs => ($1 + $2 - n) / 1000.0) END,
           CASE kind WHEN 'running' THEN now() + interval '3 hours' ELSE now() END,
           CASE kind WHEN 'later' THEN 'the loss is not finite' END
    FROM named
    ORDER BY n
)
INSERT INTO ledger (subscription, key, worker, kind)
SELECT 's', key, 'w0', 'queued' FROM named";

/// Tasks of the worker that have jobs to run.
pub const BUSY: [&str; 3] = ["task-0", "task-1", "task-2"];
/// Tasks whose jobs all run or wait for something else.
pub const IDLE: [&str; 3] = ["task-17", "task-18", "task-19"];

pub async fn make(server: &str, size: Size) -> Outcome<Database> {
    let database = Database::make(server, size.ended).await?;
    database
        .execute(FILL, &[size.waiting, size.running])
        .await?;
    database.vacuum().await?;
    Ok(database)
}

/// The message id of the nth ended job.
pub fn ended_message(nth: u64) -> String {
    (10_000_000_000_000 + nth).to_string()
}

/// The last eight digits of the ids of the nth ended and of the nth unfinished job, as
/// people copy them from a list.
pub fn last_digits(nth: u64) -> String {
    format!("{nth:08x}")
}

pub fn ended_key(nth: u64) -> JobKey {
    JobKey::new("s", &format!("{}@1700000000000000", ended_message(nth)))
}

/// The waiting jobs come first, then the running ones.
pub fn unfinished_key(nth: u64) -> JobKey {
    JobKey::new(
        "s",
        &format!("{}@1700000000000000", 20_000_000_000_000 + nth),
    )
}
