//! Leases are renewed whatever other sessions do with the tables.

use std::fs::File;
use std::path::Path;
use std::str::FromStr;

use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::process::Child;
use tokio::time::timeout;
use trainyard::job::{Can, Claim, ClaimRequest, Fence, JobKey};
use trainyard::store::{Finish, Finished, PostgresStore, Queue};
use uuid::Uuid;

use crate::support::database::Database;
use crate::support::jobs::{
    LONG, acquire, assert_waits, reap, reaped_keys, request, send, succeeded, terms,
};
use crate::support::private_postgres::PrivatePostgres;
use crate::support::proxy::LossyProxy;
use crate::support::runs::RunEvent;
use crate::support::scene::{FAST, Scene, Settings};
use crate::support::worker::WorkerProcess;
use crate::support::{PATIENCE, eventually};

const RUNS: usize = 3;
const LEASE_SECONDS: f64 = 9.0;
const SETTINGS: Settings = Settings {
    slots: RUNS,
    lease: "9s",
    ack_deadline: "60s",
    ..FAST
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_somebody_has_locked_stops_no_other_run() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let (scene, worker, jobs) = with_runs(&database).await;
    let (locked, others) = jobs.split_first().unwrap();

    let mut somebody = PgConnection::connect(&database.url).await.unwrap();
    let mut transaction = somebody.begin().await.unwrap();
    let lock = "SELECT FROM leases JOIN processed_messages USING (subscription, key)
                WHERE leases.job_id = $1 FOR UPDATE OF leases";
    let lock = sqlx::query(lock).bind(locked);
    lock.execute(&mut *transaction).await.unwrap();
    go_on_for_a_lease_or_are_stopped(&scene, &mut transaction, others).await;
    transaction.rollback().await.unwrap();

    let stopped = stopped(&scene);
    let others_stopped = others.iter().filter(|job| stopped.contains(job)).count();
    assert_eq!(
        others_stopped,
        0,
        "{} runs in all were stopped",
        stopped.len()
    );
    scene.runs.release("all");
    let ended = scene.all_succeed(RUNS).await;
    let mut others_ended = ended.iter().filter(|job| others.contains(&job.id));
    assert!(others_ended.all(|job| job.attempts == 1), "{ended:#?}");
    scene.nothing_is_left_to_deliver().await;
    assert!(worker.stop().await.success());
}

/// A migration that waits for a lock would block all sessions behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_go_on_while_a_migration_waits_for_a_reader() {
    let Some(postgres) = PrivatePostgres::start() else {
        return;
    };
    let database = postgres.database();
    let (scene, worker, jobs) = with_runs(&database).await;
    lack_a_migration_that_locks_leases(&database).await;

    let mut reader = PgConnection::connect(&database.url).await.unwrap();
    let mut transaction = reader.begin().await.unwrap();
    let read = "SELECT FROM leases JOIN processed_messages USING (subscription, key)";
    sqlx::query(read).execute(&mut *transaction).await.unwrap();
    let said = scene.yard.folder.path().join("migrate.log");
    let mut migration = migrate(&scene, &said);
    it_waits_for_a_lock(&database, &said).await;
    go_on_for_a_lease_or_are_stopped(&scene, &mut transaction, &jobs).await;

    assert_eq!(stopped(&scene).len(), 0, "runs that were stopped");
    assert!(migration.try_wait().unwrap().is_none(), "it waits");
    let said_meanwhile = read_to_string(&said);
    assert!(said_meanwhile.contains("lock"), "{said_meanwhile}");
    transaction.rollback().await.unwrap();
    let ended = timeout(PATIENCE, migration.wait()).await.unwrap().unwrap();
    assert!(ended.success(), "{}", read_to_string(&said));
    scene.runs.release("all");
    let ended = scene.all_succeed(RUNS).await;
    assert!(ended.iter().all(|job| job.attempts == 1), "{ended:#?}");
    scene.nothing_is_left_to_deliver().await;
    assert!(worker.stop().await.success());
}

/// As after failovers of databases whose machines vanished.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_go_on_and_end_once_when_all_connections_fall_silent() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let proxy = LossyProxy::in_front_of(&database.url).await;
    let behind = Database::at(proxy.url.clone());
    let (scene, worker, jobs) = with_runs_through(&database, &behind).await;
    let mut session = PgConnection::connect(&database.url).await.unwrap();
    // More often than the worker has connections for renewals.
    for _ in 0..4 {
        proxy.silence_connections();
        go_on_for_a_lease_or_are_stopped(&scene, &mut session, &jobs).await;
        assert_eq!(stopped(&scene).len(), 0, "runs that were stopped");
    }
    scene.runs.release("all");
    let ended = scene.all_succeed(RUNS).await;
    assert!(ended.iter().all(|job| job.attempts == 1), "{ended:#?}");
    scene.nothing_is_left_to_deliver().await;
    assert_eq!(scene.runs.of(RunEvent::Start).len(), RUNS);
    assert!(worker.stop().await.success());
}

/// Statements that are never answered must not occupy the places of the pool for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_fall_silent_in_the_middle_of_a_statement_are_replaced() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let proxy = LossyProxy::in_front_of(&database.url).await;
    database.open_migrated().await;
    let store = PostgresStore::open(&proxy.url, 1, None).await.unwrap();
    let mut somebody = PgConnection::connect(&database.url).await.unwrap();
    let mut transaction = somebody.begin().await.unwrap();
    sqlx::query("LOCK TABLE leases IN ACCESS EXCLUSIVE MODE")
        .execute(&mut *transaction)
        .await
        .unwrap();

    let key = JobKey::new("s", "1");
    let asking = tokio::spawn({
        let (store, key) = (store.clone(), key.clone());
        async move { store.look(&[key]).await }
    });
    eventually("the statement waits for the lock", async || {
        let waits: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM pg_locks
                WHERE NOT granted AND relation = 'leases'::regclass)",
        )
        .fetch_one(&mut *transaction)
        .await
        .unwrap();
        waits.then_some(())
    })
    .await;
    proxy.silence_connections();
    asking.abort();
    asking.await.unwrap_err();
    transaction.rollback().await.unwrap();

    eventually("the only place has a new connection", async || {
        store.look(std::slice::from_ref(&key)).await.ok()
    })
    .await;
}

async fn with_runs(database: &Database) -> (Scene, WorkerProcess, Vec<Uuid>) {
    with_runs_through(database, database).await
}

/// A worker that is busy with some jobs until they are released.
async fn with_runs_through(
    database: &Database,
    workers_see: &Database,
) -> (Scene, WorkerProcess, Vec<Uuid>) {
    let scene = Scene::reached_by(database, workers_see, &SETTINGS).await;
    let worker = scene.start_worker("worker");
    let requests = (0..RUNS).map(|_| scene.runs.waiting("all", json!({})));
    scene.publish_all(requests.collect()).await;
    let started = scene.runs_have_started(RUNS).await;
    let jobs = started.iter().map(|run| run.job).collect();
    (scene, worker, jobs)
}

/// Waits until the leases of the jobs have been renewed beyond a whole lease from now, or
/// one of their runs was stopped. Uses a session that has read these tables already, so
/// that it does not wait behind sessions that want to lock them.
async fn go_on_for_a_lease_or_are_stopped(
    scene: &Scene,
    session: &mut PgConnection,
    jobs: &[Uuid],
) {
    let began: f64 = sqlx::query_scalar("SELECT extract(epoch FROM clock_timestamp())::float8")
        .fetch_one(&mut *session)
        .await
        .unwrap();
    eventually("the leases are renewed, or lost", async || {
        let renewed: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM leases JOIN processed_messages USING (subscription, key)
             WHERE leases.job_id = ANY ($1) AND token IS NOT NULL AND lease_until > to_timestamp($2)",
        )
        .bind(jobs)
        .bind(began + 2.0 * LEASE_SECONDS)
        .fetch_one(&mut *session)
        .await
        .unwrap();
        let all_renewed = usize::try_from(renewed).unwrap() == jobs.len();
        let one_stopped = stopped(scene).iter().any(|job| jobs.contains(job));
        (all_renewed || one_stopped).then_some(())
    })
    .await;
}

fn stopped(scene: &Scene) -> Vec<Uuid> {
    let stopped = scene.runs.of(RunEvent::Stopped);
    stopped.iter().map(|run| run.job).collect()
}

/// Rolls the schema back by one migration, and makes that one lock the leases like a
/// migration that changes their table.
async fn lack_a_migration_that_locks_leases(database: &Database) {
    let mut url = url::Url::from_str(&database.url).unwrap();
    // Only a superuser may create an event trigger.
    url.set_username("postgres").unwrap();
    let mut superuser = PgConnection::connect(url.as_str()).await.unwrap();
    for statement in [
        "DROP INDEX processed_messages_dead_letters",
        "CREATE FUNCTION lock_leases() RETURNS event_trigger LANGUAGE plpgsql
         AS 'BEGIN LOCK TABLE leases IN ACCESS EXCLUSIVE MODE; END'",
        "CREATE EVENT TRIGGER lock_leases ON ddl_command_start WHEN TAG IN ('CREATE INDEX')
         EXECUTE FUNCTION lock_leases()",
    ] {
        sqlx::query(statement)
            .execute(&mut superuser)
            .await
            .unwrap();
    }
    let undo = "DELETE FROM _sqlx_migrations WHERE description = 'index dead letters'";
    let undone = sqlx::query(undo).execute(&mut superuser).await.unwrap();
    assert_eq!(undone.rows_affected(), 1);
}

fn migrate(scene: &Scene, said: &Path) -> Child {
    let output = File::create(said).unwrap();
    let mut command = scene.yard.command(&["migrate"]);
    command.stdout(output.try_clone().unwrap()).stderr(output);
    command.spawn().unwrap()
}

/// Waits until the server shows the migration waiting for a lock, or the migration, whose
/// waits are short, reports it.
async fn it_waits_for_a_lock(database: &Database, said: &Path) {
    let mut connection = PgConnection::connect(&database.url).await.unwrap();
    eventually("the migration waits for a lock", async || {
        let waits: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted
                AND mode = 'AccessExclusiveLock' AND relation = 'leases'::regclass)",
        )
        .fetch_one(&mut connection)
        .await
        .unwrap();
        (waits || read_to_string(said).contains("lock")).then_some(())
    })
    .await;
}

fn read_to_string(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_somebody_has_locked_holds_up_no_other_ending() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let store = database.open_migrated().await;
    for table in ["leases", "processed_messages"] {
        let [locked, other] = [format!("{table}/locked"), format!("{table}/other")];
        let finishes = [
            ending_of(acquire(&store, &locked, LONG).await.fence),
            ending_of(acquire(&store, &other, LONG).await.fence),
        ];
        let mut somebody = PgConnection::connect(&database.url).await.unwrap();
        let mut transaction = somebody.begin().await.unwrap();
        let lock = format!("SELECT FROM {table} WHERE key = $1 FOR UPDATE");
        sqlx::query(AssertSqlSafe(lock))
            .bind(locked)
            .execute(&mut *transaction)
            .await
            .unwrap();
        let answers = store.finish(&finishes).await.unwrap();
        assert_eq!(answers, [Finished::Locked, Finished::Ended], "{table}");
        transaction.rollback().await.unwrap();
        let answers = store.finish(&finishes).await.unwrap();
        assert_eq!(answers, [Finished::Ended, Finished::Ended], "{table}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_job_that_somebody_has_locked_delays_no_other() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let store = database.open_migrated().await;
    for key in ["locked", "other"] {
        let recorded = ClaimRequest {
            can: Can::Record,
            ..request(key)
        };
        assert_waits(&send(&store, &recorded, &terms(LONG)).await);
    }
    let mut somebody = PgConnection::connect(&database.url).await.unwrap();
    let mut transaction = somebody.begin().await.unwrap();
    sqlx::query("SELECT FROM leases WHERE key = 'locked' FOR UPDATE")
        .execute(&mut *transaction)
        .await
        .unwrap();

    // Its message comes again, together with a new one.
    let both = [request("locked"), request("new")];
    let claims = store.claim(&both, &terms(LONG)).await.unwrap();
    assert_waits(&claims[0]);
    assert!(matches!(claims[1], Claim::Acquired(_)), "{claims:?}");
    assert_eq!(reaped_keys(&reap(&store, 10).await), ["other"]);

    transaction.rollback().await.unwrap();
    assert_eq!(reaped_keys(&reap(&store, 10).await), ["locked"]);
}

fn ending_of(fence: Fence) -> Finish {
    Finish {
        fence,
        ending: succeeded(),
        checkpoint: None,
        dead_letter_topic: None,
    }
}
