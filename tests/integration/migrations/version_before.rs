//! What the version before the queue writes and reads: its statements, one job at a time,
//! on the schema that it made.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use trainyard::job::{Fence, JobKey};
use uuid::Uuid;

use crate::support::database::{Database, Tables};

/// Its last migration.
const VERSION: i64 = 20_261_122_001_000;

pub struct VersionBefore {
    tables: Tables,
    jobs: Mutex<HashMap<String, Uuid>>,
}

impl VersionBefore {
    /// Migrates a new database as far as that version did.
    pub async fn install(database: &Database) -> Self {
        // Creates SQLite's file.
        database.open().await;
        let tables = database.tables().await;
        match &tables {
            Tables::Postgres(pool) => sqlx::migrate!("migrations/postgres")
                .run_to(VERSION, pool)
                .await
                .unwrap(),
            Tables::Sqlite(pool) => sqlx::migrate!("migrations/sqlite")
                .run_to(VERSION, pool)
                .await
                .unwrap(),
        }
        Self {
            tables,
            jobs: Mutex::default(),
        }
    }

    pub fn job_id(&self, key: &str) -> Uuid {
        self.jobs.lock().unwrap()[key]
    }

    /// Claims a new message; the lease expires after this time.
    pub async fn record_running(&self, key: &str, lease: Duration) -> Fence {
        let token = Uuid::new_v4();
        let lease_until = self.tables.ahead(lease);
        let columns = format!(
            "1, {}, 'old', {}, {lease_until}",
            self.uuid(token),
            self.now()
        );
        self.record(key, None, &columns, "NULL").await;
        fence(key, 1, token)
    }

    /// Puts a message on record that has to wait.
    pub async fn record_waiting(&self, key: &str, ordering_key: Option<&str>) {
        let columns = format!("0, NULL, NULL, NULL, {}", self.now());
        self.record(key, ordering_key, &columns, "NULL").await;
    }

    /// Puts a message on record whose task it does not know. As
    /// [`VersionBefore::would_give_up`].
    pub async fn record_unknown(&self, key: &str) -> bool {
        let columns = format!("0, NULL, NULL, NULL, {}", self.now());
        self.record(key, None, &columns, &self.now()).await;
        self.would_give_up(key).await
    }

    /// Whether it would give the job up later.
    pub async fn would_give_up(&self, key: &str) -> bool {
        let later = self.tables.ahead(Duration::from_secs(600));
        let given_up = format!(
            "SELECT count(*) FROM leases
             WHERE key = '{key}' AND token IS NULL AND attempt = 0 AND unknown_since <= {later}"
        );
        let rows: Vec<(i64,)> = self.tables.fetch(given_up).await;
        rows[0].0 == 1
    }

    async fn record(
        &self,
        key: &str,
        ordering_key: Option<&str>,
        lease: &str,
        unknown_since: &str,
    ) {
        let job = Uuid::now_v7();
        self.jobs.lock().unwrap().insert(key.to_owned(), job);
        let (job, now) = (self.uuid(job), self.now());
        let ordering_key = ordering_key.unwrap_or_default();
        let message = format!(
            "INSERT INTO processed_messages
                    (subscription, key, job_id, message_id, publish_time, ordering_key, attributes,
                     payload, task, state, received_at)
             VALUES ('s', '{key}', {job}, '{key}', {now}, '{ordering_key}', '{{}}',
                     {payload}, 'train', 'open', {now})",
            payload = match self.tables {
                Tables::Postgres(_) => "convert_to('{\"name\":\"train\"}', 'UTF8')",
                Tables::Sqlite(_) => "CAST('{\"name\":\"train\"}' AS BLOB)",
            }
        );
        let columns = "subscription, key, ordering_key, attempt, token, worker, started_at,
                       lease_until, reap_delay, unknown_since";
        // In one statement, where the database can.
        match self.tables {
            Tables::Postgres(_) => {
                let statement = format!(
                    "WITH inserted AS ({message} RETURNING subscription, key)
                     INSERT INTO leases ({columns})
                     SELECT subscription, key, nullif('{ordering_key}', ''), {lease}, 0, {unknown_since}
                     FROM inserted"
                );
                self.changes_one(statement).await;
            }
            Tables::Sqlite(_) => {
                self.changes_one(message).await;
                let statement = format!(
                    "INSERT INTO leases ({columns}, position)
                     VALUES ('s', '{key}', nullif('{ordering_key}', ''), {lease}, 0, {unknown_since},
                             (SELECT coalesce(max(position), 0) + 1 FROM leases
                              WHERE subscription = 's' AND ordering_key = '{ordering_key}'))"
                );
                self.changes_one(statement).await;
            }
        }
    }

    /// Lets a run go that was interrupted or has failed.
    pub async fn give_back(&self, run: &Fence, retry_in: Duration) {
        let until = self.tables.ahead(retry_in);
        let statement = format!(
            "UPDATE leases SET token = NULL, lease_until = {until} WHERE {}",
            self.of(run)
        );
        self.changes_one(statement).await;
    }

    /// `trainyard retry` of a waiting job.
    pub async fn hurry(&self, key: &str) {
        let statement = format!(
            "UPDATE leases SET lease_until = {}
             WHERE subscription = 's' AND key = '{key}' AND token IS NULL",
            self.now()
        );
        self.changes_one(statement).await;
    }

    /// The jobs that its sweep finds.
    pub async fn due(&self) -> Vec<String> {
        let statement = format!(
            "SELECT leases.key FROM leases JOIN processed_messages USING (subscription, key)
             WHERE leases.lease_until <= {} AND processed_messages.task = 'train'
               AND (leases.ordering_key IS NULL OR leases.position = (
                       SELECT min(head.position) FROM leases head
                       WHERE head.subscription = leases.subscription
                         AND head.ordering_key = leases.ordering_key))
             ORDER BY leases.lease_until, leases.position",
            self.now()
        );
        let rows: Vec<(String,)> = self.tables.fetch(statement).await;
        rows.into_iter().map(|(key,)| key).collect()
    }

    /// Runs a job that waits or was lost.
    pub async fn take_over(&self, key: &str) -> Fence {
        let token = Uuid::new_v4();
        let statement = format!(
            "UPDATE leases
             SET attempt = attempt + 1, token = {}, worker = 'old', started_at = {now},
                 lease_until = {}, unknown_since = NULL
             WHERE subscription = 's' AND key = '{key}' AND lease_until <= {now}",
            self.uuid(token),
            self.tables.ahead(Duration::from_secs(600)),
            now = self.now(),
        );
        self.changes_one(statement).await;
        let attempt = format!("SELECT attempt FROM leases WHERE key = '{key}'");
        let rows: Vec<(i32,)> = self.tables.fetch(attempt).await;
        fence(key, rows[0].0.try_into().unwrap(), token)
    }

    /// Ends a run with success.
    pub async fn finish(&self, run: &Fence) {
        let delete = format!("DELETE FROM leases WHERE {}", self.of(run));
        self.changes_one(delete).await;
        let update = format!(
            "UPDATE processed_messages
             SET state = 'succeeded', finished_at = {}, finished_by = {}, attempts = {attempt},
                 last_attempt = {attempt}, worker = 'old'
             WHERE subscription = 's' AND key = '{}'",
            self.now(),
            self.uuid(run.token),
            run.key.key,
            attempt = run.attempt,
        );
        self.changes_one(update).await;
    }

    async fn changes_one(&self, statement: String) {
        assert_eq!(
            self.tables.execute(statement.clone()).await,
            1,
            "{statement}"
        );
    }

    fn of(&self, run: &Fence) -> String {
        format!(
            "subscription = 's' AND key = '{}' AND attempt = {} AND token = {}",
            run.key.key,
            run.attempt,
            self.uuid(run.token)
        )
    }

    fn uuid(&self, id: Uuid) -> String {
        match self.tables {
            Tables::Postgres(_) => format!("'{id}'::uuid"),
            Tables::Sqlite(_) => format!("x'{}'", id.simple()),
        }
    }

    fn now(&self) -> String {
        self.tables.ago(Duration::ZERO)
    }
}

fn fence(key: &str, attempt: u32, token: Uuid) -> Fence {
    Fence {
        key: JobKey::new("s", key),
        attempt,
        token,
    }
}
