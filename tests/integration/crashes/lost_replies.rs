//! The database executes a statement, and its answer is lost.

use nix::sys::signal::Signal;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use trainyard::guard::Guard;
use trainyard::job::Claim;
use trainyard::record::JobState;

use super::{Scene, Settings};
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::jobs::{ENDED, LONG, acquire, pass_the_lease, request, send, terms};
use crate::support::proxy::{Loss, LossyProxy};
use crate::support::runs::RunEvent;
use crate::support::scene::CALM;

/// Parts of statements that identify them.
const CLAIM: Loss = Loss::OfCommitAfter("INSERT INTO processed_messages");
const FINISH: Loss = Loss::OfStatement("SET state = ended.state");
const TAKE: Loss = Loss::OfStatement("'taken_over'");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_whose_answer_is_lost_is_found_to_be_ones_own() {
    the_job_runs_once_though_a_reply_is_lost(CLAIM).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ending_whose_answer_is_lost_is_confirmed() {
    the_job_runs_once_though_a_reply_is_lost(FINISH).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_taking_was_not_answered_starts_without_a_crash() {
    let settings = Settings {
        backoff: "{ initial = \"10ms\", max = \"10ms\" }",
        ..CALM
    };
    let Some((proxy, scene)) = Scene::behind_a_proxy(&settings).await else {
        return;
    };
    let _worker = scene.start_worker("worker");
    proxy.arm(TAKE);
    let fails_once = json!({"fail": "transient", "fail_attempts": 1});
    let id = scene.publish(scene.runs.rehearsal(fails_once)).await;
    let job = scene.only_job_ends(JobState::Succeeded).await;
    scene.nothing_is_left_to_deliver().await;
    assert_eq!((proxy.happened(), job.attempts), (1, 2));
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 2);
    let story = ["claimed", "failed", "claimed", "finished"];
    let told = scene.is_explained_by(&id, &story).await;
    assert!(!told.contains("taken_over"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_was_given_up_though_it_had_committed_is_given_back() {
    let Some((proxy, scene)) = Scene::behind_a_proxy(&CALM).await else {
        return;
    };
    let worker = scene.ready_worker("worker").await;
    proxy.arm_and_take_away(CLAIM);
    let id = scene.publish_run(0.0).await;
    worker.says("the delivery is handed back").await;
    assert_eq!(scene.runs.lines(), []);
    proxy.bring_back();
    let job = scene.only_job_ends(JobState::Succeeded).await;
    scene.nothing_is_left_to_deliver().await;
    assert_eq!((proxy.happened(), job.attempts), (1, 1));
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 1);
    let story = ["claimed", "released", "claimed", "finished"];
    let told = scene.is_explained_by(&id, &story).await;
    assert!(!told.contains("taken_over"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stops_first_gives_a_claim_back_whose_answer_was_lost() {
    let settings = Settings {
        shutdown_grace: "60s",
        ..CALM
    };
    let Some((proxy, scene)) = Scene::behind_a_proxy(&settings).await else {
        return;
    };
    let worker = scene.ready_worker("stops").await;
    proxy.arm_and_take_away(CLAIM);
    let id = scene.publish_run(0.0).await;
    worker.says("the delivery is handed back").await;
    worker.signal(Signal::SIGTERM);
    worker.says("pulling has stopped").await;
    proxy.bring_back();
    assert!(worker.stops().await.success());

    let _next = scene.start_worker("next");
    let job = scene.only_job_ends(JobState::Succeeded).await;
    assert_eq!((proxy.happened(), job.attempts), (1, 1));
    let story = ["claimed", "released", "claimed", "finished"];
    scene.is_explained_by(&id, &story).await;
}

/// By the second try, the workers of lost jobs may not have renewed yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_tried_again_takes_no_lost_job_over() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let store = database.open_migrated().await;
    acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    let proxy = LossyProxy::in_front_of(&database.url).await;
    let behind = Database::at(proxy.url.clone()).open().await;
    let guard = Guard::new(behind, terms(LONG));
    proxy.arm(Loss::OfStatement("INSERT INTO processed_messages"));
    let claim = guard.claim(request("1")).await.unwrap();
    assert_eq!(proxy.happened(), 1);
    assert!(matches!(claim, Claim::RunningUntil { .. }), "{claim:?}");
    let claim = guard.claim(request("1")).await.unwrap();
    assert!(matches!(claim, Claim::Acquired(_)), "{claim:?}");
}

/// Who is cancelled while giving claims back leaves them to the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_whose_giving_back_was_cancelled_is_still_given_back() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let store = database.open_migrated().await;
    let proxy = LossyProxy::in_front_of(&database.url).await;
    let behind = Database::at(proxy.url.clone()).open().await;
    let guard = Guard::new(behind, terms(LONG));
    proxy.arm_and_take_away(CLAIM);
    guard.claim(request("1")).await.unwrap_err();
    let mut somebody = PgConnection::connect(&database.url).await.unwrap();
    let mut transaction = somebody.begin().await.unwrap();
    let lock = "SELECT FROM processed_messages JOIN leases USING (subscription, key) FOR UPDATE";
    sqlx::query(lock).execute(&mut *transaction).await.unwrap();
    proxy.bring_back();
    let watching = guard.clone();
    let watch = tokio::spawn(async move { watching.watch_over_the_database().await });
    let mut observer = PgConnection::connect(&database.url).await.unwrap();
    let waiting = "FROM pg_stat_activity
                  WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("giving back waits for the lock", async || {
        let waits = AssertSqlSafe(format!("SELECT EXISTS (SELECT {waiting})"));
        let waits: bool = sqlx::query_scalar(waits)
            .fetch_one(&mut observer)
            .await
            .unwrap();
        waits.then_some(())
    })
    .await;
    watch.abort();
    // The server would execute it even though nobody asks any more.
    let end = AssertSqlSafe(format!("SELECT pg_terminate_backend(pid) {waiting}"));
    sqlx::query(end).execute(&mut observer).await.unwrap();
    transaction.rollback().await.unwrap();
    guard.give_back_unanswered().await;
    let claim = send(&store, &request("1"), &terms(LONG)).await;
    assert!(matches!(claim, Claim::Acquired(_)), "{claim:?}");
}

async fn the_job_runs_once_though_a_reply_is_lost(loss: Loss) {
    let Some((proxy, scene)) = Scene::behind_a_proxy(&CALM).await else {
        return;
    };
    // Two workers, so that one could run a job that the other gave back.
    let workers = ["one", "other"].map(|name| scene.start_worker(name));
    proxy.arm(loss);
    let id = scene.publish_run(0.0).await;
    eventually("the reply is lost", async || {
        (proxy.happened() == 1).then_some(())
    })
    .await;
    let job = scene.only_job_ends(JobState::Succeeded).await;
    scene.nothing_is_left_to_deliver().await;
    assert_eq!(job.attempts, 1);
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 1);
    assert_eq!(scene.runs.of(RunEvent::End).len(), 1);
    let told = scene
        .is_explained_by(&id, &["claimed", "finished", "acked"])
        .await;
    assert_eq!(told.matches(" finished ").count(), 1, "{told}");
    for worker in &workers {
        assert!(!worker.log().contains("0 rows"), "it doubts its writing");
    }
}
