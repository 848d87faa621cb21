//! The schema is brought forward under running workers: the statements of the version
//! before, with the rows that it has left, beside the store of this one.

mod version_before;

use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use tokio::time::timeout;
use trainyard::job::{JobKey, Renewal};
use trainyard::record::JobState;
use trainyard::store::GivenUp;

use self::version_before::VersionBefore;
use crate::on_both_databases;
use crate::support::database::Database;
use crate::support::jobs::{
    LONG, acquire, acquired, assert_is_stale, assert_none_to_reap, assert_waits, failed, finish,
    interrupted, job_at, ordered, patience, reap, reap_one, reaped_keys, send, succeeded, terms,
};
use crate::support::{PATIENCE, eventually};

on_both_databases!(
    the_jobs_of_the_version_before_go_on_after_the_migration,
    a_job_that_the_version_before_puts_on_record_is_run,
    a_job_that_the_version_before_gives_back_waits_for_its_time,
    the_version_before_runs_what_this_one_gives_back,
    an_ordering_key_goes_on_between_both_versions,
    the_version_before_gives_up_no_job_that_this_one_may_run,
    what_the_version_before_may_run_is_not_given_up_during_a_roll_out,
);

async fn the_jobs_of_the_version_before_go_on_after_the_migration(database: Database) {
    let before = VersionBefore::install(&database).await;
    let running = before.record_running("running", LONG).await;
    before.record_running("lost", Duration::ZERO).await;
    before.record_waiting("waiting", None).await;
    before.record_waiting("first", Some("k")).await;
    before.record_waiting("second", Some("k")).await;
    let later = before.record_running("later", LONG).await;
    before.give_back(&later, LONG).await;
    let ended = before.record_running("ended", LONG).await;
    before.finish(&ended).await;

    let store = database.open_migrated().await;
    let taken = reap(&store, 10).await;
    let mut keys = reaped_keys(&taken);
    keys.sort_unstable();
    assert_eq!(keys, ["first", "lost", "waiting"]);
    assert!(taken.iter().all(|job| job.task == "train"), "{taken:?}");
    let first = taken
        .iter()
        .find(|job| &*job.acquired.fence.key.key == "first");
    assert!(finish(&store, &first.unwrap().acquired.fence, succeeded()).await);
    reap_one(&store, "second").await;

    let renewals = store.renew(slice::from_ref(&running), LONG).await;
    assert!(matches!(renewals.unwrap()[..], [Renewal::Renewed]));
    assert!(finish(&store, &running, succeeded()).await);
    assert_none_to_reap(&store).await;
    let states = [&running, &later, &ended].map(|fence| before.job_id(&fence.key.key));
    let [running, later, ended] = states.map(|id| job_at(&store, id));
    assert_eq!(running.await.state, JobState::Succeeded);
    assert_eq!(later.await.state, JobState::Waiting);
    assert_eq!(ended.await.state, JobState::Succeeded);
}

async fn a_job_that_the_version_before_puts_on_record_is_run(database: Database) {
    let before = VersionBefore::install(&database).await;
    let store = database.open_migrated().await;
    before.record_waiting("1", None).await;
    let taken = reap_one(&store, "1").await;
    assert_eq!(taken.job_id, before.job_id("1"));
    assert!(finish(&store, &taken.fence, succeeded()).await);

    let lost = before.record_running("2", Duration::ZERO).await;
    let taken = reap_one(&store, "2").await;
    assert_eq!(taken.fence.attempt, 2);
    assert_is_stale(&store, &lost).await;
}

async fn a_job_that_the_version_before_gives_back_waits_for_its_time(database: Database) {
    let before = VersionBefore::install(&database).await;
    let store = database.open_migrated().await;
    let theirs = before.record_running("theirs", LONG).await;
    let ours = acquire(&store, "ours", LONG).await;
    before.give_back(&theirs, LONG).await;
    before.give_back(&ours.fence, LONG).await;
    assert_none_to_reap(&store).await;
    let waiting = job_at(&store, ours.job_id).await;
    assert!(waiting.waits_until.is_some());
    before.hurry("theirs").await;
    before.hurry("ours").await;
    let taken = reap(&store, 10).await;
    let mut keys = reaped_keys(&taken);
    keys.sort_unstable();
    assert_eq!(keys, ["ours", "theirs"]);
}

async fn the_version_before_runs_what_this_one_gives_back(database: Database) {
    let before = VersionBefore::install(&database).await;
    let store = database.open_migrated().await;
    let job = acquire(&store, "at once", LONG).await;
    let at_once = job.fence;
    let later = acquire(&store, "later", LONG).await.fence;
    acquire(&store, "running", LONG).await;
    assert!(store.release(&interrupted(&at_once)).await.unwrap());
    let failed = failed(&later, "disk full", LONG);
    assert!(store.release(&failed).await.unwrap());
    assert_eq!(before.due().await, ["at once"]);

    let theirs = before.take_over("at once").await;
    assert_eq!(theirs.attempt, at_once.attempt + 1);
    assert_is_stale(&store, &at_once).await;
    assert_none_to_reap(&store).await;
    before.finish(&theirs).await;
    let job = job_at(&store, job.job_id).await;
    assert_eq!(job.state, JobState::Succeeded);
}

async fn an_ordering_key_goes_on_between_both_versions(database: Database) {
    let before = VersionBefore::install(&database).await;
    let store = database.open_migrated().await;
    let first = acquired(send(&store, &ordered("1"), &terms(LONG)).await);
    before.record_waiting("2", Some("k")).await;
    assert_waits(&send(&store, &ordered("3"), &terms(LONG)).await);
    assert_none_to_reap(&store).await;
    assert_eq!(before.due().await, [""; 0]);

    // This one ends a job, and the version before takes the next one.
    assert!(finish(&store, &first.fence, succeeded()).await);
    assert_eq!(before.due().await, ["2"]);
    let second = before.take_over("2").await;
    assert_none_to_reap(&store).await;
    // And the other way around.
    before.finish(&second).await;
    reap_one(&store, "3").await;
}

async fn the_version_before_gives_up_no_job_that_this_one_may_run(database: Database) {
    let before = VersionBefore::install(&database).await;
    assert!(before.record_unknown("alone").await);
    let store = database.open_migrated().await;
    assert!(!before.record_unknown("beside").await);
    assert!(!before.would_give_up("alone").await);
    let now = patience(Duration::ZERO);
    let unknown = store.unknown(&["s"], now, 10).await.unwrap();
    let given_up: Vec<GivenUp> = unknown.into_iter().map(|job| give_up(job.key)).collect();
    assert_eq!(given_up.len(), 2);
    let ended = store.give_up_unknown(&given_up, now).await.unwrap();
    assert_eq!(ended.len(), 2);
}

async fn what_the_version_before_may_run_is_not_given_up_during_a_roll_out(database: Database) {
    let before = VersionBefore::install(&database).await;
    let ended = before.record_running("ended", LONG).await;
    before.finish(&ended).await;
    let store = database.open_migrated().await;
    // One worker of that version has no room, and another records this.
    before.record_waiting("waiting", None).await;
    before.record_running("lost", Duration::ZERO).await;
    let now = patience(Duration::ZERO);
    assert_eq!(store.unknown(&["s"], now, 10).await.unwrap(), []);
    let given_up = ["waiting", "lost"].map(|key| give_up(JobKey::new("s", key)));
    let ended = store.give_up_unknown(&given_up, now).await.unwrap();
    assert_eq!(ended, []);
}

fn give_up(key: JobKey) -> GivenUp {
    GivenUp {
        key,
        error: "no task `train` is known".to_owned(),
        worker: "w1".into(),
        dead_letter_topic: None,
    }
}

/// A snapshot of the transaction that holds the lock would keep an index build waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_whose_transactions_are_serializable_by_default_is_migrated_and_used() {
    for database in [
        Database::postgres().await,
        Database::behind_a_pooler().await,
    ] {
        let Some(database) = database else {
            continue;
        };
        let mut connection = PgConnection::connect(&database.direct_url).await.unwrap();
        let set = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable', current_database()); END $$";
        sqlx::raw_sql(set).execute(&mut connection).await.unwrap();
        let store = timeout(PATIENCE, database.open_migrated()).await.unwrap();
        let job = acquire(&store, "1", LONG).await;
        assert!(finish(&store, &job.fence, succeeded()).await);
    }
}

static TOLD: AtomicBool = AtomicBool::new(false);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_migration_waits_for_the_first_and_says_so() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let [first, second] = [database.open().await, database.open().await];
    // Its snapshot keeps a concurrent index build waiting.
    let mut reader = PgConnection::connect(&database.url).await.unwrap();
    sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        .execute(&mut reader)
        .await
        .unwrap();
    let first = tokio::spawn(async move { first.migrate(|_| {}).await });
    let mut looking = PgConnection::connect(&database.url).await.unwrap();
    eventually("an index is being built", async || {
        (invalid_indexes(&mut looking).await == 1).then_some(())
    })
    .await;

    let second = tokio::spawn(async move {
        let tell =
            |holders: &str| TOLD.store(holders.contains("trainyard migrate"), Ordering::SeqCst);
        second.migrate(tell).await
    });
    eventually("the second says who it waits for", async || {
        TOLD.load(Ordering::SeqCst).then_some(())
    })
    .await;
    assert_eq!(
        invalid_indexes(&mut looking).await,
        1,
        "it is still being built"
    );
    sqlx::raw_sql("COMMIT").execute(&mut reader).await.unwrap();
    let ended = async { (first.await.unwrap(), second.await.unwrap()) };
    let (first, second) = timeout(PATIENCE, ended).await.unwrap();
    assert!(first.unwrap() > 0);
    second.unwrap();
    assert_eq!(invalid_indexes(&mut looking).await, 0);
    let index = "SELECT to_regclass('processed_messages_by_state') IS NOT NULL";
    let exists: bool = sqlx::query_scalar(index)
        .fetch_one(&mut looking)
        .await
        .unwrap();
    assert!(exists);
}

async fn invalid_indexes(connection: &mut PgConnection) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM pg_index WHERE NOT indisvalid")
        .fetch_one(connection)
        .await
        .unwrap()
}
