//! Dead jobs whose message is still to be published to its topic.

use chrono::DateTime;
use sqlx::sqlite::{SqlitePool, SqliteRow};
use sqlx::{Connection, Row};

use super::entry::{Entry, add_to_ledger};
use super::{BEGIN, milliseconds};
use crate::job::{DeadLetter, JobKey};
use crate::message::Message;
use crate::store::values::{from_json, json_text};
use crate::store::{DeadLettersDue, StoreError};

const DEAD_LETTERS: &str = "
SELECT job_id, subscription, key, message_id, publish_time, ordering_key, attributes, payload,
       task, attempts, reason, error, dead_letter_topic, finished_at
FROM processed_messages
WHERE dead_letter_topic IS NOT NULL
  AND (dead_letter_due IS NULL
       OR dead_letter_due <= CAST(unixepoch('subsec') * 1000 AS INTEGER))
  AND finished_at <= CAST(unixepoch('subsec') * 1000 AS INTEGER) - $1
  AND ($3 IS NULL OR worker = $3)
  AND dead_letter_topic NOT IN (SELECT value FROM json_each($4))
ORDER BY finished_at
LIMIT $2";

/// A dead letter given to one worker is withheld from others for a while, so that each is
/// normally published once.
const GIVE: &str = "
UPDATE processed_messages
SET dead_letter_due = CAST(unixepoch('subsec') * 1000 AS INTEGER) + $2
WHERE job_id = $1";

pub(super) async fn dead_letters(
    pool: &SqlitePool,
    due: &DeadLettersDue,
) -> Result<Vec<DeadLetter>, StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let rows = sqlx::query(DEAD_LETTERS)
        .bind(milliseconds(due.at_least))
        .bind(due.limit)
        .bind(due.worker.as_deref())
        .bind(json_text(&due.not_to)?)
        .fetch_all(&mut *transaction)
        .await?;
    let letters = rows
        .iter()
        .map(read_dead_letter)
        .collect::<Result<Vec<DeadLetter>, StoreError>>()?;
    for letter in &letters {
        sqlx::query(GIVE)
            .bind(letter.job_id)
            .bind(milliseconds(due.time_to_publish))
            .execute(&mut *transaction)
            .await?;
    }
    transaction.commit().await?;
    Ok(letters)
}

fn read_dead_letter(row: &SqliteRow) -> Result<DeadLetter, StoreError> {
    let payload: Option<Vec<u8>> = row.try_get("payload")?;
    Ok(DeadLetter {
        job_id: row.try_get("job_id")?,
        key: JobKey::new(row.try_get("subscription")?, row.try_get("key")?),
        topic: row.try_get("dead_letter_topic")?,
        message: Message {
            id: row.try_get("message_id")?,
            publish_time: DateTime::from_timestamp_millis(row.try_get("publish_time")?)
                .unwrap_or_default(),
            data: payload.unwrap_or_default().into(),
            attributes: from_json(row.try_get("attributes")?)?,
            ordering_key: row.try_get("ordering_key")?,
        },
        reason: row.try_get("reason")?,
        error: row.try_get("error")?,
        task: row.try_get("task")?,
        attempts: row.try_get("attempts")?,
        died_at: DateTime::from_timestamp_millis(row.try_get("finished_at")?).unwrap_or_default(),
    })
}

/// Changes nothing if the job was retried meanwhile.
const DEAD_LETTER_SETTLED: &str = "
UPDATE processed_messages SET dead_letter_topic = NULL, dead_letter_due = NULL
WHERE job_id = $1 AND state = 'dead' AND dead_letter_topic = $2 AND finished_at = $3";

pub(super) async fn dead_letter_settled(
    pool: &SqlitePool,
    letter: &DeadLetter,
    worker: &str,
    detail: &str,
) -> Result<(), StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let settled = sqlx::query(DEAD_LETTER_SETTLED)
        .bind(letter.job_id)
        .bind(&letter.topic)
        .bind(letter.died_at.timestamp_millis())
        .execute(&mut *transaction)
        .await?;
    if settled.rows_affected() == 0 {
        return Ok(());
    }
    let entry = Entry {
        worker,
        kind: "dead_lettered",
        detail: Some(detail),
        ..Entry::default()
    };
    add_to_ledger(&mut transaction, &letter.key, &entry).await?;
    transaction.commit().await?;
    Ok(())
}
