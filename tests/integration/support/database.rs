use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Connection, FromRow, PgConnection, PgPool, SqlitePool};
use tempfile::TempDir;
use trainyard::job::JobKey;
use trainyard::store::{self, Missing, Pooler, Store};
use uuid::Uuid;

use super::{eventually, not_tested};

/// The test's own database.
pub struct Database {
    /// Where stores and workers find it.
    pub url: String,
    /// Without the pooler between.
    pub direct_url: String,
    /// The folder of a SQLite file, removed at the end.
    _folder: Option<TempDir>,
}

impl Database {
    pub async fn sqlite() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/test.db", folder.path().display());
        Some(Self {
            _folder: Some(folder),
            ..Self::at(url)
        })
    }

    /// A new, empty database on the server that `make test` starts.
    pub async fn postgres() -> Option<Self> {
        Self::postgres_with("").await
    }

    /// As [`Database::postgres`], behind a pooler in transaction mode that `make test`
    /// starts.
    pub async fn behind_a_pooler() -> Option<Self> {
        let Ok(pooler) = std::env::var("TRAINYARD_TEST_POOLER_URL") else {
            not_tested("PgBouncer (TRAINYARD_TEST_POOLER_URL)");
            return None;
        };
        Some(Self::postgres().await?.behind(&pooler))
    }

    /// The same database, which stores and workers reach through the pooler at the URL.
    pub fn behind(self, pooler: &str) -> Self {
        let mut url = url::Url::from_str(pooler).unwrap();
        url.set_path(url::Url::from_str(&self.direct_url).unwrap().path());
        Self {
            url: url.to_string(),
            ..self
        }
    }

    /// With options of `CREATE DATABASE`.
    pub async fn postgres_with(options: &str) -> Option<Self> {
        let Ok(server) = std::env::var("TRAINYARD_TEST_DATABASE_URL") else {
            not_tested("PostgreSQL (TRAINYARD_TEST_DATABASE_URL)");
            return None;
        };
        let name = format!("test_{}", Uuid::new_v4().simple());
        let mut connection = PgConnection::connect(&server).await.unwrap();
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name} {options}")))
            .execute(&mut connection)
            .await
            .unwrap();
        let mut url = url::Url::from_str(&server).unwrap();
        url.set_path(&name);
        Some(Self::at(url.to_string()))
    }

    /// A database that somebody else manages.
    pub fn at(url: String) -> Self {
        Self {
            direct_url: url.clone(),
            url,
            _folder: None,
        }
    }

    pub async fn tables(&self) -> Tables {
        if self.url.starts_with("sqlite:") {
            return Tables::Sqlite(SqlitePool::connect(&self.direct_url).await.unwrap());
        }
        Tables::Postgres(PgPool::connect(&self.direct_url).await.unwrap())
    }

    pub async fn open(&self) -> Arc<dyn Store> {
        open(&self.url, None).await
    }

    pub async fn open_migrated(&self) -> Arc<dyn Store> {
        let store = self.open().await;
        store.migrate(|_| {}).await.unwrap();
        store
    }
}

pub async fn open(url: &str, pooler: Option<Pooler>) -> Arc<dyn Store> {
    // On a busy machine a server may take longer than a worker waits for it.
    eventually("the database answers", async || {
        match store::open(url, 10, pooler, Missing::Create).await {
            Err(error) if error.is_away() => None,
            store => Some(store.unwrap()),
        }
    })
    .await
}

/// Direct access to the tables, without a store.
pub enum Tables {
    Postgres(PgPool),
    Sqlite(SqlitePool),
}

impl Tables {
    /// The database's clock, this long ago, as these tables store times.
    pub fn ago(&self, duration: Duration) -> String {
        self.clock('-', duration)
    }

    /// The database's clock, this far ahead.
    pub fn ahead(&self, duration: Duration) -> String {
        self.clock('+', duration)
    }

    fn clock(&self, sign: char, duration: Duration) -> String {
        let milliseconds = duration.as_millis();
        match self {
            Self::Postgres(_) => format!("(now() {sign} interval '{milliseconds} milliseconds')"),
            Self::Sqlite(_) => {
                format!("(CAST(unixepoch('subsec') * 1000 AS INTEGER) {sign} {milliseconds})")
            }
        }
    }

    pub async fn execute(&self, sql: String) -> u64 {
        let sql = AssertSqlSafe(sql);
        match self {
            Self::Postgres(pool) => {
                let done = sqlx::query(sql).execute(pool).await.unwrap();
                done.rows_affected()
            }
            Self::Sqlite(pool) => {
                let done = sqlx::query(sql).execute(pool).await.unwrap();
                done.rows_affected()
            }
        }
    }

    pub async fn fetch<T>(&self, sql: String) -> Vec<T>
    where
        T: Send + Unpin + for<'r> FromRow<'r, PgRow> + for<'r> FromRow<'r, SqliteRow>,
    {
        let sql = AssertSqlSafe(sql);
        match self {
            Self::Postgres(pool) => sqlx::query_as(sql).fetch_all(pool).await.unwrap(),
            Self::Sqlite(pool) => sqlx::query_as(sql).fetch_all(pool).await.unwrap(),
        }
    }

    /// Makes the key's lease look expired for that long, or its waiting job due for that
    /// long unless it waits for its turn.
    pub async fn end_lease(&self, key: &JobKey, ago: Duration) {
        let JobKey { subscription, key } = key;
        let then = self.ago(ago);
        let never = match self {
            Self::Postgres(_) => "'infinity'",
            Self::Sqlite(_) => "9223372036854775807",
        };
        self.execute(format!(
            "UPDATE leases
             SET lease_until = {then},
                 run_after = CASE WHEN run_after < {never} THEN {then} ELSE run_after END
             WHERE subscription = '{subscription}' AND key = '{key}'"
        ))
        .await;
    }
}

/// Makes three tests of each function: on both databases, and on Postgres behind a pooler.
#[macro_export]
macro_rules! on_every_store {
    ($($test:ident),* $(,)?) => {
        $crate::on_both_databases!($($test),*);
        mod pooled {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    if let Some(database) = $crate::support::database::Database::behind_a_pooler().await {
                        super::$test(database).await;
                    }
                }
            )*
        }
    };
}

/// Makes two tests of each function: on Postgres and on SQLite.
#[macro_export]
macro_rules! on_both_databases {
    ($($test:ident),* $(,)?) => {
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    if let Some(database) = $crate::support::database::Database::postgres().await {
                        super::$test(database).await;
                    }
                }
            )*
        }
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    if let Some(database) = $crate::support::database::Database::sqlite().await {
                        super::$test(database).await;
                    }
                }
            )*
        }
    };
}
