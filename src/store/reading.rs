//! Records that people read, written once for every database: the views have the same
//! names and columns.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::{
    ColumnIndex, Database, Decode, Encode, Executor, FromRow, IntoArguments, Type, query_as,
    query_scalar,
};
use uuid::Uuid;

use super::values::from_json;
use super::{Records, StoreError};
use crate::record::{AttemptRecord, Job, JobFilter, JobState, LedgerEntry, Story, UnknownTask};

/// A store that reads from some source of connections.
pub(super) trait Reading: Send + Sync + 'static {
    type Database: Database;
    type Source: Send + Sync;
    fn source(&self) -> &Self::Source;
}

#[derive(FromRow)]
struct JobRow {
    job_id: Uuid,
    subscription: String,
    key: String,
    message_id: String,
    publish_time: i64,
    ordering_key: Option<String>,
    task: Option<String>,
    state: String,
    attempts: i32,
    duplicates: i32,
    worker: Option<String>,
    received_at: i64,
    started_at: Option<i64>,
    finished_at: Option<i64>,
    error: Option<String>,
    reason: Option<String>,
    checkpoint: Option<String>,
    waits_until: Option<i64>,
    waits_for: Option<String>,
    result: Option<String>,
}

#[derive(FromRow)]
struct LedgerRow {
    at: i64,
    worker: String,
    kind: String,
    attempt: Option<i32>,
    message_id: Option<String>,
    detail: Option<String>,
}

#[derive(FromRow)]
struct AttemptRow {
    attempt: i32,
    worker: String,
    ended_at: i64,
    outcome: String,
    log: String,
    series: String,
}

#[derive(FromRow)]
struct UnknownTaskRow {
    subscription: String,
    task: String,
    jobs: i64,
}

/// Job ids are UUIDs of version 7, so they sort by first arrival. An empty task matches
/// any.
const NEWEST: &str = "
SELECT * FROM jobs
WHERE ($1 = '' OR task = $1) ORDER BY job_id DESC LIMIT $2";

const NEWEST_ENDED: &str = "
SELECT * FROM jobs
WHERE ($1 = '' OR task = $1) AND stored_state = $3 ORDER BY job_id DESC LIMIT $2";

/// Running ones are held, which Postgres has an index of.
const NEWEST_UNFINISHED: &str = "
SELECT * FROM jobs
WHERE job_id IN (SELECT job_id FROM unfinished_jobs
                 WHERE ($1 = '' OR task = $1) AND state = $3 AND (is_claimed OR $3 = 'waiting')
                 ORDER BY job_id DESC LIMIT $2)
ORDER BY job_id DESC";

const JOB: &str = "SELECT * FROM jobs WHERE job_id = $1";
const PAYLOAD: &str = "SELECT payload FROM processed_messages WHERE job_id = $1";

const JOB_IDS_ENDING_WITH: &str = "
SELECT job_id FROM jobs
WHERE last_digits = $1 AND digits LIKE '%' || $2 LIMIT $3";

const JOBS_OF_MESSAGE: &str = "
SELECT * FROM jobs
WHERE job_id IN (
    SELECT job_id FROM processed_messages WHERE message_id = $1
    UNION
    SELECT m.job_id FROM ledger JOIN processed_messages m USING (subscription, key)
    WHERE ledger.message_id = $1)
ORDER BY job_id";

const LEDGER: &str = "
SELECT at, worker, kind, attempt, message_id, detail FROM job_ledger
WHERE subscription = $1 AND key = $2
ORDER BY id";

const ATTEMPTS: &str = "
SELECT attempt, worker, ended_at, outcome, log, series FROM job_attempts
WHERE job_id = $1
ORDER BY attempt";

const UNKNOWN_TASKS: &str =
    "SELECT subscription, task, jobs FROM unknown_tasks ORDER BY subscription, task";

/// How many digits of a job id are indexed.
const INDEXED_DIGITS: usize = 4;

#[async_trait]
impl<S, DB> Records for S
where
    S: Reading<Database = DB>,
    DB: Database,
    for<'c> &'c S::Source: Executor<'c, Database = DB>,
    DB::Arguments: IntoArguments<DB>,
    for<'r> JobRow: FromRow<'r, DB::Row>,
    for<'r> LedgerRow: FromRow<'r, DB::Row>,
    for<'r> AttemptRow: FromRow<'r, DB::Row>,
    for<'r> UnknownTaskRow: FromRow<'r, DB::Row>,
    for<'q> &'q str: Encode<'q, DB>,
    str: Type<DB>,
    for<'q> i64: Encode<'q, DB> + Type<DB>,
    for<'q> Uuid: Encode<'q, DB> + Decode<'q, DB> + Type<DB>,
    for<'q> Option<Vec<u8>>: Decode<'q, DB>,
    Vec<u8>: Type<DB>,
    usize: ColumnIndex<DB::Row>,
{
    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<Job>, StoreError> {
        let statement = match filter.state {
            None => NEWEST,
            Some(JobState::Running | JobState::Waiting) => NEWEST_UNFINISHED,
            Some(_) => NEWEST_ENDED,
        };
        let mut query = query_as::<DB, JobRow>(statement)
            .bind(filter.task.as_deref().unwrap_or(""))
            .bind(i64::from(filter.limit));
        if let Some(state) = filter.state {
            query = query.bind(state.as_str());
        }
        let rows = query.fetch_all(self.source()).await?;
        rows.into_iter().map(Job::try_from).collect()
    }

    async fn job(&self, id: Uuid) -> Result<Option<Job>, StoreError> {
        let row = query_as::<DB, JobRow>(JOB)
            .bind(id)
            .fetch_optional(self.source())
            .await?;
        let Some(row) = row else {
            return Ok(None);
        };
        let payload: Option<Option<Vec<u8>>> = query_scalar(PAYLOAD)
            .bind(id)
            .fetch_optional(self.source())
            .await?;
        let mut job = Job::try_from(row)?;
        job.payload = payload.flatten().map(Into::into);
        Ok(Some(job))
    }

    async fn job_ids_ending_with(&self, end: &str, limit: u32) -> Result<Vec<Uuid>, StoreError> {
        let Some(indexed) = end.len().checked_sub(INDEXED_DIGITS) else {
            return Ok(Vec::new());
        };
        let ids = query_scalar(JOB_IDS_ENDING_WITH)
            .bind(&end[indexed..])
            .bind(end)
            .bind(i64::from(limit))
            .fetch_all(self.source())
            .await?;
        Ok(ids)
    }

    async fn unknown_tasks(&self) -> Result<Vec<UnknownTask>, StoreError> {
        let rows = query_as::<DB, UnknownTaskRow>(UNKNOWN_TASKS)
            .fetch_all(self.source())
            .await?;
        Ok(rows.into_iter().map(UnknownTask::from).collect())
    }

    async fn stories(&self, message_id: &str) -> Result<Vec<Story>, StoreError> {
        let rows = query_as::<DB, JobRow>(JOBS_OF_MESSAGE)
            .bind(message_id)
            .fetch_all(self.source())
            .await?;
        let mut stories = Vec::with_capacity(rows.len());
        for row in rows {
            let job = Job::try_from(row)?;
            let ledger = query_as::<DB, LedgerRow>(LEDGER)
                .bind(job.subscription.as_str())
                .bind(job.key.as_str())
                .fetch_all(self.source())
                .await?;
            let ledger = ledger.into_iter().map(LedgerEntry::from).collect();
            stories.push(Story { job, ledger });
        }
        Ok(stories)
    }

    async fn attempts(&self, id: Uuid) -> Result<Vec<AttemptRecord>, StoreError> {
        let rows = query_as::<DB, AttemptRow>(ATTEMPTS)
            .bind(id)
            .fetch_all(self.source())
            .await?;
        rows.into_iter().map(AttemptRecord::try_from).collect()
    }
}

impl TryFrom<JobRow> for Job {
    type Error = StoreError;

    fn try_from(row: JobRow) -> Result<Self, StoreError> {
        let state: JobState = row.state.parse().map_err(StoreError::Unreadable)?;
        Ok(Self {
            id: row.job_id,
            subscription: row.subscription,
            key: row.key,
            message_id: row.message_id,
            publish_time: time(row.publish_time),
            ordering_key: row.ordering_key,
            task: row.task,
            state,
            attempts: row.attempts.unsigned_abs(),
            duplicates: row.duplicates.unsigned_abs(),
            worker: row.worker,
            received_at: time(row.received_at),
            started_at: row.started_at.map(time),
            finished_at: row.finished_at.map(time),
            error: row.error,
            reason: row.reason,
            checkpoint: row.checkpoint,
            waits_until: row.waits_until.map(time),
            waits_for: row.waits_for,
            result: row.result.as_deref().map(from_json).transpose()?,
            payload: None,
        })
    }
}

impl From<LedgerRow> for LedgerEntry {
    fn from(row: LedgerRow) -> Self {
        Self {
            at: time(row.at),
            worker: row.worker,
            kind: row.kind,
            attempt: row.attempt.map(i32::unsigned_abs),
            message_id: row.message_id,
            detail: row.detail,
        }
    }
}

impl From<UnknownTaskRow> for UnknownTask {
    fn from(row: UnknownTaskRow) -> Self {
        Self {
            subscription: row.subscription,
            task: row.task,
            jobs: row.jobs.unsigned_abs(),
        }
    }
}

impl TryFrom<AttemptRow> for AttemptRecord {
    type Error = StoreError;

    fn try_from(row: AttemptRow) -> Result<Self, StoreError> {
        Ok(Self {
            attempt: row.attempt.unsigned_abs(),
            worker: row.worker,
            ended_at: time(row.ended_at),
            outcome: row.outcome,
            log: from_json(&row.log)?,
            series: from_json(&row.series)?,
        })
    }
}

fn time(milliseconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(milliseconds).unwrap_or_default()
}
