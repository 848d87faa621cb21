//! Why the tables could not be read or written, and what that means for the message.

use std::time::Duration;

use tokio::time::timeout;

/// Why the tables could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be reached, or refuses to work now. The message stays
    /// unacknowledged; the same call may succeed later.
    #[error("the database is not available: {}", told(.0))]
    Unavailable(sqlx::Error),
    /// Another session is in the way: it holds a lock for too long, or the database broke a
    /// deadlock. The database is up; the same call may succeed later.
    #[error("another session is in the way: {}", told(.0))]
    InTheWay(sqlx::Error),
    /// Another session has locked the job's row. Nothing has happened; the same
    /// call may succeed later.
    #[error("another session has locked the job's row")]
    Locked,
    /// The database rejects the values, and always will. The message stays unacknowledged; a
    /// job ends as it did, without its result or its error's text.
    #[error("the database refused a statement: {}", told(.0))]
    Refused(sqlx::Error),
    /// The database did not answer in time. The call may or may not have taken effect;
    /// repeating it shows which.
    #[error("the database did not answer within {} ms", .0.as_millis())]
    NoAnswer(Duration),
    /// This version cannot read a row. The message stays unacknowledged.
    #[error("a stored row cannot be read: {0}")]
    Unreadable(String),
}

/// What the database or the system said, once. The driver puts words in front of it and a
/// line of the server's source code behind it.
fn told(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(said) if is_mixed_up(said.code().as_deref()) => {
            format!("{} ({ASK_FOR_POOLER})", said.message())
        }
        sqlx::Error::Database(said) => said.message().to_owned(),
        sqlx::Error::Io(failed) => failed.to_string(),
        sqlx::Error::PoolTimedOut => "no connection could be made in time".to_owned(),
        other => other.to_string(),
    }
}

const ASK_FOR_POOLER: &str =
    "if a connection pooler is in between, set [database] pooler = \"transaction\"";

/// A prepared statement that exists already, or does not: the session is not the one in which
/// it was prepared.
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
fn is_mixed_up(code: Option<&str>) -> bool {
    matches!(code, Some("42P05" | "26000"))
}

impl StoreError {
    /// Whether the database rolled the transaction back in favour of another one.
    /// <https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html>
    pub(super) fn was_rolled_back(&self) -> bool {
        let Self::InTheWay(sqlx::Error::Database(error)) = self else {
            return false;
        };
        matches!(error.code().as_deref(), Some("40001" | "40P01"))
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        self.is_away() || matches!(self, Self::InTheWay(_) | Self::Locked)
    }

    /// Whether the database itself does not answer.
    #[must_use]
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::NoAnswer(_))
    }
}

/// Why the schema cannot be used. Nothing has been claimed yet.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    #[error(
        "the database has no trainyard tables; run `trainyard migrate`, or start with `--migrate`"
    )]
    Missing,
    #[error(
        "the database's schema is {behind} migration(s) behind this version; run `trainyard migrate`, or start with `--migrate`"
    )]
    Old { behind: usize },
    #[error("the database cannot hold trainyard's tables: {0}")]
    Unfit(String),
    #[error("a migration failed: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<sqlx::Error> for SchemaError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

impl From<sqlx::Error> for StoreError {
    /// An error counts as passing unless it is known to be about the values: it may be a full
    /// disk, a failover to a read-only standby, or a schema in the middle of a change. The
    /// same call may succeed later, and giving up would lose the message.
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(refusal) if is_about_values(refusal.code().as_deref()) => {
                Self::Refused(error)
            }
            sqlx::Error::Database(refusal) if is_in_the_way(refusal.code().as_deref()) => {
                Self::InTheWay(error)
            }
            sqlx::Error::Encode(_) => Self::Refused(error),
            sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::ColumnNotFound(_)
            | sqlx::Error::Decode(_) => Self::Unreadable(error.to_string()),
            _ => Self::Unavailable(error),
        }
    }
}

/// Serialization failure, deadlock, lock timeout, statement timeout.
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
fn is_in_the_way(code: Option<&str>) -> bool {
    matches!(code, Some("40001" | "40P01" | "55P03" | "57014"))
}

/// Postgres's error classes about the written values: data exceptions (22), constraints (23),
/// program limits (54); SQLite's too big (18) and constraint (19).
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
fn is_about_values(code: Option<&str>) -> bool {
    let Some(code) = code else {
        return false;
    };
    match code.len() {
        5 => ["22", "23", "54"]
            .iter()
            .any(|class| code.starts_with(class)),
        // The low byte of SQLite's extended codes is the primary code.
        _ => code
            .parse::<u32>()
            .is_ok_and(|code| matches!(code & 0xff, 18 | 19)),
    }
}

/// A database that takes longer counts as not answering.
const PATIENCE: Duration = Duration::from_secs(20);

/// The database's answer, or an error if it takes too long.
///
/// # Errors
/// The database's, or [`StoreError::NoAnswer`].
pub async fn in_time<A>(
    asking: impl Future<Output = Result<A, StoreError>>,
) -> Result<A, StoreError> {
    timeout(PATIENCE, asking)
        .await
        .unwrap_or(Err(StoreError::NoAnswer(PATIENCE)))
}
