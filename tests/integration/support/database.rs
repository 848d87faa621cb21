use std::str::FromStr;
use std::sync::Arc;

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tempfile::TempDir;
use trainyard::store::{self, Store};
use uuid::Uuid;

use super::not_tested;

/// A database of a test's own.
pub struct Database {
    pub url: String,
    /// The folder of a SQLite file, removed at the end.
    _folder: Option<TempDir>,
}

impl Database {
    pub async fn sqlite() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        Some(Self {
            url: format!("sqlite://{}/test.db", folder.path().display()),
            _folder: Some(folder),
        })
    }

    /// A new, empty database on the server that `make test` starts.
    pub async fn postgres() -> Option<Self> {
        let Ok(server) = std::env::var("TRAINYARD_TEST_DATABASE_URL") else {
            not_tested("PostgreSQL (TRAINYARD_TEST_DATABASE_URL)");
            return None;
        };
        let name = format!("test_{}", Uuid::new_v4().simple());
        let mut connection = PgConnection::connect(&server).await.unwrap();
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}")))
            .execute(&mut connection)
            .await
            .unwrap();
        let mut url = url::Url::from_str(&server).unwrap();
        url.set_path(&name);
        Some(Self::at(url.to_string()))
    }

    /// A database that somebody else keeps.
    pub fn at(url: String) -> Self {
        Self { url, _folder: None }
    }

    pub async fn open(&self) -> Arc<dyn Store> {
        store::open(&self.url, 10).await.unwrap()
    }

    pub async fn open_migrated(&self) -> Arc<dyn Store> {
        let store = self.open().await;
        store.migrate().await.unwrap();
        store
    }
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
