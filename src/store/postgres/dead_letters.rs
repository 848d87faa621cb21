//! Dead jobs whose message is still to be published to its topic.

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::sessions::Sessions;
use crate::job::{DeadLetter, JobKey};
use crate::message::Message;
use crate::store::values::from_json;
use crate::store::{DeadLettersDue, StoreError};

/// A dead letter given to one worker is withheld from others for a while, so that each is
/// normally published once.
const DEAD_LETTERS: &str = "
WITH due AS (
    SELECT subscription, key FROM processed_messages
    WHERE dead_letter_topic IS NOT NULL AND finished_at <= now() - make_interval(secs => $1)
      AND (dead_letter_due IS NULL OR dead_letter_due <= now())
      AND ($3::text IS NULL OR worker = $3) AND dead_letter_topic <> ALL ($4)
    ORDER BY finished_at
    LIMIT $2
    FOR UPDATE SKIP LOCKED
), given AS (
    UPDATE processed_messages SET dead_letter_due = now() + make_interval(secs => $5)
    FROM due
    WHERE processed_messages.subscription = due.subscription
      AND processed_messages.key = due.key
    RETURNING processed_messages.*
)
SELECT job_id, subscription, key, message_id, publish_time, ordering_key, attributes::text,
       payload, task, attempts, reason, error, dead_letter_topic, finished_at
FROM given
ORDER BY finished_at";

pub(super) async fn dead_letters(
    sessions: &Sessions,
    due: &DeadLettersDue,
) -> Result<Vec<DeadLetter>, StoreError> {
    let rows = sqlx::query(DEAD_LETTERS)
        .bind(due.at_least.as_secs_f64())
        .bind(i64::from(due.limit))
        .bind(due.worker.as_deref())
        .bind(&due.not_to)
        .bind(due.time_to_publish.as_secs_f64())
        .fetch_all(sessions)
        .await?;
    rows.iter().map(read_dead_letter).collect()
}

fn read_dead_letter(row: &PgRow) -> Result<DeadLetter, StoreError> {
    let payload: Option<Vec<u8>> = row.try_get("payload")?;
    Ok(DeadLetter {
        job_id: row.try_get("job_id")?,
        key: JobKey::new(row.try_get("subscription")?, row.try_get("key")?),
        topic: row.try_get("dead_letter_topic")?,
        message: Message {
            id: row.try_get("message_id")?,
            publish_time: row.try_get("publish_time")?,
            data: payload.unwrap_or_default().into(),
            attributes: from_json(row.try_get("attributes")?)?,
            ordering_key: row.try_get("ordering_key")?,
        },
        reason: row.try_get("reason")?,
        error: row.try_get("error")?,
        task: row.try_get("task")?,
        attempts: row.try_get::<i32, _>("attempts")?.unsigned_abs(),
        died_at: row.try_get("finished_at")?,
    })
}

/// Changes nothing if the job was retried meanwhile.
const DEAD_LETTER_SETTLED: &str = "
WITH settled AS (
    UPDATE processed_messages SET dead_letter_topic = NULL, dead_letter_due = NULL
    WHERE job_id = $1 AND state = 'dead' AND dead_letter_topic = $2 AND finished_at = $5
    RETURNING subscription, key
)
INSERT INTO ledger (subscription, key, worker, kind, detail)
SELECT subscription, key, $3, 'dead_lettered', $4 FROM settled";

pub(super) async fn dead_letter_settled(
    sessions: &Sessions,
    letter: &DeadLetter,
    worker: &str,
    detail: &str,
) -> Result<(), StoreError> {
    sqlx::query(DEAD_LETTER_SETTLED)
        .bind(letter.job_id)
        .bind(&letter.topic)
        .bind(worker)
        .bind(detail)
        .bind(letter.died_at)
        .execute(sessions)
        .await?;
    Ok(())
}
