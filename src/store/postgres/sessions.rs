//! The connections, and how a statement goes over one.
//!
//! Behind a pooler in transaction mode (PgBouncer and the like) a connection gets another
//! session of the server for each transaction. So nothing outlives a transaction there:
//! each statement is in one, is prepared without a name, and begins with its settings.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryFutureExt, TryStreamExt};
use sqlx::error::BoxDynError;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{
    PgArguments, PgConnectOptions, PgPoolOptions, PgQueryResult, PgRow, PgStatement, PgTypeInfo,
};
use sqlx::{
    AssertSqlSafe, Connection, Describe, Either, Execute, Executor, PgConnection, PgPool, Postgres,
    Row, SqlSafeStr, SqlStr,
};
use tokio::time::timeout;
use tracing::info;

use crate::database_url::Pooler;
use crate::store::StoreError;

/// How long a caller waits for a connection before the database counts as
/// unavailable.
pub(super) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// A released connection must answer a ping within this time, or it is closed. A failover
/// may leave no other sign, and a dead connection would occupy its place in the pool
/// until TCP gives up.
const SILENCE: Duration = Duration::from_secs(5);

const STATEMENT_TIMEOUT: (&str, &str) = ("statement_timeout", "15s");

/// No statement or lock wait may block a worker for long, and no transaction may stay
/// open after its worker is gone.
pub(super) const LIMITS: [(&str, &str); 4] = [
    STATEMENT_TIMEOUT,
    // Compiling a plan takes longer than these statements.
    ("jit", "off"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "15s"),
];

/// The server ends the session of a vanished machine within half a minute.
const KEEPALIVES: [(&str, &str); 3] = [
    ("tcp_keepalives_idle", "15"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
];

/// How poolers refuse a startup parameter that they do not pass on: PgBouncer as a protocol
/// violation, Amazon's RDS Proxy as a feature that it does not support.
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
const REFUSALS_OF_POOLERS: [&str; 2] = ["08P01", "0A000"];

/// A database or a user may have another default, but the later statements of a transaction
/// must see what was committed meanwhile, and none may keep an index build waiting for its
/// snapshot.
const ISOLATION: (&str, &str) = ("default_transaction_isolation", "read committed");
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

/// A pool of connections. A statement that runs on it is a transaction of its own.
#[derive(Debug, Clone)]
pub(in crate::store) struct Sessions {
    pool: PgPool,
    pooler: Pooler,
    /// Begins a transaction, with its settings behind a pooler.
    begin: SqlStr,
}

impl Sessions {
    /// Connects, and finds out whether there is a pooler if that is not known.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when no connection can be made.
    pub(super) async fn open(
        options: &PgConnectOptions,
        max_connections: u32,
        pooler: Option<Pooler>,
    ) -> Result<Self, StoreError> {
        if pooler == Some(Pooler::Transaction) {
            return Self::connect(options, max_connections, Pooler::Transaction).await;
        }
        let direct = Self::connect(options, max_connections, Pooler::None).await;
        let is_direct = match &direct {
            _ if pooler == Some(Pooler::None) => true,
            Ok(sessions) => sessions.have_their_settings().await?,
            Err(error) => !is_refusal_of_a_pooler(error),
        };
        if is_direct {
            return direct;
        }
        info!("the database is behind a connection pooler: each statement is a transaction");
        Self::connect(options, max_connections, Pooler::Transaction).await
    }

    async fn connect(
        options: &PgConnectOptions,
        max_connections: u32,
        pooler: Pooler,
    ) -> Result<Self, StoreError> {
        let pool = pool_of(max_connections, ACQUIRE_TIMEOUT);
        let sessions = Self::with_settings(options, pool, pooler, &LIMITS);
        match sessions.pool.acquire().await {
            Ok(_) => Ok(sessions),
            Err(sqlx::Error::PoolTimedOut) => Err(sessions.why_unreachable().await),
            Err(error) => Err(error.into()),
        }
    }

    /// Connects when the first statement runs.
    pub(super) fn with_settings(
        options: &PgConnectOptions,
        pool: PgPoolOptions,
        pooler: Pooler,
        settings: &[(&str, &str)],
    ) -> Self {
        let (options, begin) = match pooler {
            Pooler::None => {
                let options = options
                    .clone()
                    .options(KEEPALIVES)
                    .options([ISOLATION])
                    .options(settings.iter().copied());
                (options, BEGIN.into_sql_str())
            }
            Pooler::Transaction => {
                let set = settings
                    .iter()
                    .map(|(name, value)| format!("; SET LOCAL {name} = '{value}'"));
                let begin = format!("{BEGIN}{}", set.collect::<String>());
                let options = options.clone().extra_float_digits(None);
                (
                    options,
                    AssertSqlSafe(Arc::<str>::from(begin)).into_sql_str(),
                )
            }
        };
        let pool = pool.connect_lazy_with(options);
        Self {
            pool,
            pooler,
            begin,
        }
    }

    pub(super) fn pooler(&self) -> Pooler {
        self.pooler
    }

    pub(super) async fn begin(&self) -> Result<Transaction, sqlx::Error> {
        // Before the server hears of it, since the caller may give up at any time.
        let mut transaction = Transaction {
            connection: self.pool.acquire().await?,
            is_over: false,
            pooler: self.pooler,
        };
        transaction.connection.execute(self.begin.clone()).await?;
        Ok(transaction)
    }

    /// Runs a statement that cannot be in a transaction. Has no settings behind a pooler.
    pub(super) async fn execute_alone(&self, statement: SqlStr) -> Result<(), sqlx::Error> {
        self.pool.execute(statement).await?;
        Ok(())
    }

    /// Some poolers accept the settings of a connection and drop them.
    async fn have_their_settings(&self) -> Result<bool, StoreError> {
        let row = self.pool.fetch_one("SHOW statement_timeout").await?;
        let timeout: &str = row.try_get(0)?;
        Ok(timeout == STATEMENT_TIMEOUT.1)
    }

    /// The pool tries again while the server refuses connections, and in the end does not
    /// tell.
    async fn why_unreachable(&self) -> StoreError {
        let options = self.pool.connect_options();
        let connecting = PgConnection::connect_with(&options);
        match timeout(ACQUIRE_TIMEOUT, connecting).await {
            Ok(Err(error)) => error.into(),
            Ok(Ok(_)) | Err(_) => sqlx::Error::PoolTimedOut.into(),
        }
    }
}

fn is_refusal_of_a_pooler(error: &StoreError) -> bool {
    let StoreError::Unavailable(sqlx::Error::Database(refusal)) = error else {
        return false;
    };
    let code = refusal.code();
    code.is_some_and(|code| REFUSALS_OF_POOLERS.contains(&&*code))
}

pub(super) fn pool_of(connections: u32, acquire_timeout: Duration) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(acquire_timeout)
        .after_release(|connection, _| {
            Box::pin(async move {
                let answer = timeout(SILENCE, connection.ping()).await;
                answer.unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
                Ok(true)
            })
        })
}

/// Several statements that take effect together.
///
/// Its connection goes back to the pool only when the server has said that it is over. If
/// not, whoever gets the connection next could be inside it, and what it confirms would be
/// rolled back. The driver's own transaction leaves that open when its caller gives up as it
/// begins. So one that is dropped closes its connection, and the server rolls it back.
#[derive(Debug)]
pub(super) struct Transaction {
    connection: PoolConnection<Postgres>,
    is_over: bool,
    pooler: Pooler,
}

impl Transaction {
    pub(super) async fn commit(self) -> Result<(), sqlx::Error> {
        self.end("COMMIT").await
    }

    pub(super) async fn rollback(self) -> Result<(), sqlx::Error> {
        self.end("ROLLBACK").await
    }

    async fn end(mut self, statement: &'static str) -> Result<(), sqlx::Error> {
        self.connection.execute(statement).await?;
        self.is_over = true;
        Ok(())
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if !self.is_over {
            self.connection.close_on_drop();
        }
    }
}

/// A query without a prepared statement that another transaction could meet.
struct Unnamed<Q>(Q);

impl<'q, Q: Execute<'q, Postgres>> Execute<'q, Postgres> for Unnamed<Q> {
    fn sql(self) -> SqlStr {
        self.0.sql()
    }

    fn statement(&self) -> Option<&PgStatement> {
        None
    }

    fn take_arguments(&mut self) -> Result<Option<PgArguments>, BoxDynError> {
        self.0.take_arguments()
    }

    fn persistent(&self) -> bool {
        false
    }
}

type Answers<'e> = BoxStream<'e, sqlx::Result<Either<PgQueryResult, PgRow>>>;

impl<'c> Executor<'c> for &'c mut Transaction {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> Answers<'e>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        match self.pooler {
            Pooler::None => self.connection.fetch_many(query),
            Pooler::Transaction => self.connection.fetch_many(Unnamed(query)),
        }
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        match self.pooler {
            Pooler::None => self.connection.fetch_optional(query),
            Pooler::Transaction => self.connection.fetch_optional(Unnamed(query)),
        }
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [PgTypeInfo],
    ) -> BoxFuture<'e, sqlx::Result<PgStatement>>
    where
        'c: 'e,
    {
        self.connection.prepare_with(sql, parameters)
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, sqlx::Result<Describe<Postgres>>>
    where
        'c: 'e,
    {
        self.connection.describe(sql)
    }
}

impl<'c> Executor<'c> for &'c Sessions {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> Answers<'e>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        if self.pooler == Pooler::None {
            return self.pool.fetch_many(query);
        }
        let answers = async move {
            let mut transaction = self.begin().await?;
            let answers: Vec<_> = transaction.fetch_many(query).try_collect().await?;
            transaction.commit().await?;
            Ok(stream::iter(answers.into_iter().map(Ok)))
        };
        answers.try_flatten_stream().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        if self.pooler == Pooler::None {
            return self.pool.fetch_optional(query);
        }
        Box::pin(async move {
            let mut transaction = self.begin().await?;
            let answer = transaction.fetch_optional(query).await?;
            transaction.commit().await?;
            Ok(answer)
        })
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [PgTypeInfo],
    ) -> BoxFuture<'e, sqlx::Result<PgStatement>>
    where
        'c: 'e,
    {
        self.pool.prepare_with(sql, parameters)
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, sqlx::Result<Describe<Postgres>>>
    where
        'c: 'e,
    {
        self.pool.describe(sql)
    }
}
