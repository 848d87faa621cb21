//! Requests to cancel a job.

use std::sync::Arc;

use trainyard::job::{Acquired, Can, Claim, FinalState, Renewal};
use trainyard::outcome::Ending;
use trainyard::record::{Cancelling, JobState};
use trainyard::store::{ClaimTerms, Store};
use uuid::Uuid;

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acquire, acquired, assert_is_stale, assert_none_to_reap, assert_waits, claim,
    dead, failed, finish, interrupted, job_at, job_of, kinds, pass_the_lease, reap_one, refusal,
    request, send, story_of, succeeded, terms, terms_of,
};

on_every_store!(
    a_waiting_job_is_cancelled_at_once,
    a_job_that_never_ran_is_cancelled_at_once,
    a_lost_runs_job_is_cancelled_at_once,
    a_cancelled_job_runs_no_more,
    a_running_job_is_asked_to_stop,
    only_its_own_worker_is_told_to_cancel_a_run,
    a_run_that_is_asked_to_stop_may_still_succeed,
    a_request_to_cancel_outlives_the_worker,
    a_request_to_cancel_outlives_a_release,
    an_ended_job_is_not_cancelled,
    a_job_that_does_not_exist_is_not_cancelled,
    cancelling_is_told_in_the_ledger,
    of_a_claim_and_a_cancellation_at_once_both_are_told_the_truth,
);

/// No runs.
const NONE: [Uuid; 0] = [];

async fn cancel(store: &Arc<dyn Store>, id: Uuid) -> Cancelling {
    store.cancel(id, "anna").await.unwrap().unwrap()
}

async fn told(store: &Arc<dyn Store>, worker: &str) -> Vec<Uuid> {
    store.cancelled_runs(worker).await.unwrap()
}

async fn a_waiting_job_is_cancelled_at_once(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    let waits = failed(&run.fence, "disk full", LONG);
    assert!(store.release(&waits).await.unwrap());
    assert_eq!(cancel(&store, run.job_id).await, Cancelling::Cancelled);
    let job = job_of(&store, &run).await;
    assert_eq!((job.state, job.attempts), (JobState::Cancelled, 1));
    assert_eq!(job.worker.as_deref(), Some("w1"));
    assert_eq!((job.reason.as_deref(), job.waits_until), (None, None));
    assert!(job.started_at.is_some() && job.finished_at.is_some());
    assert_is_stale(&store, &run.fence).await;
    assert_eq!(job_of(&store, &run).await, job);
}

async fn a_job_that_never_ran_is_cancelled_at_once(database: Database) {
    let store = database.open_migrated().await;
    for (key, can) in [("1", Can::Record), ("2", Can::RecordUnknown)] {
        let mut recorded = request(key);
        recorded.can = can;
        assert_waits(&send(&store, &recorded, &terms(LONG)).await);
        let cancelled = cancel(&store, recorded.job_id).await;
        assert_eq!(cancelled, Cancelling::Cancelled);
        let job = job_at(&store, recorded.job_id).await;
        assert_eq!((job.state, job.attempts), (JobState::Cancelled, 0));
        assert_eq!(job.started_at, None);
    }
    assert_none_to_reap(&store).await;
}

async fn a_lost_runs_job_is_cancelled_at_once(database: Database) {
    let store = database.open_migrated().await;
    let lost = acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    assert_eq!(cancel(&store, lost.job_id).await, Cancelling::Cancelled);
    assert_is_stale(&store, &lost.fence).await;
    let job = job_of(&store, &lost).await;
    assert_eq!((job.state, job.attempts), (JobState::Cancelled, 1));
}

async fn a_cancelled_job_runs_no_more(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    assert!(store.release(&interrupted(&run.fence)).await.unwrap());
    cancel(&store, run.job_id).await;
    pass_the_lease().await;
    assert_none_to_reap(&store).await;
    let ended = Claim::AlreadyFinished(FinalState::Cancelled);
    assert_eq!(claim(&store, "1", LONG).await, ended);
    assert_eq!(job_of(&store, &run).await.duplicates, 1);
}

async fn a_running_job_is_asked_to_stop(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    assert!(!run.cancel_requested);
    assert_eq!(told(&store, "w1").await, NONE);
    for _ in 0..2 {
        assert_eq!(cancel(&store, run.job_id).await, Cancelling::Requested);
        assert_eq!(told(&store, "w1").await, [run.fence.token]);
    }
    // Its worker, which still holds the lease, writes its ending.
    assert_eq!(job_of(&store, &run).await.state, JobState::Running);
    let fences = std::slice::from_ref(&run.fence);
    assert_eq!(store.renew(fences, LONG).await.unwrap(), [Renewal::Renewed]);
    assert!(finish(&store, &run.fence, Ending::cancelled()).await);
    assert_eq!(told(&store, "w1").await, NONE);
    let ended = Cancelling::AlreadyEnded(FinalState::Cancelled);
    assert_eq!(cancel(&store, run.job_id).await, ended);
}

async fn only_its_own_worker_is_told_to_cancel_a_run(database: Database) {
    let store = database.open_migrated().await;
    let run_of = async |key: &str, worker: &str| {
        acquired(send(&store, &request(key), &terms_of(worker)).await)
    };
    let (one, two) = (run_of("1", "w1").await, run_of("2", "w2").await);
    run_of("3", "w1").await;
    for run in [&one, &two] {
        cancel(&store, run.job_id).await;
    }
    assert_eq!(told(&store, "w1").await, [one.fence.token]);
    assert_eq!(told(&store, "w2").await, [two.fence.token]);
    assert_eq!(told(&store, "w3").await, NONE);
}

/// Its ending counts, since the run ended by itself.
async fn a_run_that_is_asked_to_stop_may_still_succeed(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    cancel(&store, run.job_id).await;
    assert!(finish(&store, &run.fence, succeeded()).await);
    let ended = Cancelling::AlreadyEnded(FinalState::Succeeded);
    assert_eq!(cancel(&store, run.job_id).await, ended);
    assert_eq!(job_of(&store, &run).await.state, JobState::Succeeded);
}

async fn a_request_to_cancel_outlives_the_worker(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    let lost = acquire(&store, "1", LONG).await;
    cancel(&store, lost.job_id).await;
    tables.end_lease(&lost.fence.key, ENDED).await;
    let taken = acquired(send(&store, &request("1"), &terms_of("w2")).await);
    assert!(taken.cancel_requested);
    assert_eq!(told(&store, "w1").await, NONE);
    assert_eq!(told(&store, "w2").await, [taken.fence.token]);
    tables.end_lease(&taken.fence.key, ENDED).await;
    let reaped = reap_one(&store, "1").await;
    assert!(reaped.cancel_requested);
}

async fn a_request_to_cancel_outlives_a_release(database: Database) {
    let store = database.open_migrated().await;
    let mut run = acquire(&store, "1", LONG).await;
    cancel(&store, run.job_id).await;
    let releases = [
        interrupted(&run.fence),
        failed(&run.fence, "disk full", ENDED),
    ];
    for release in releases {
        let release = trainyard::store::Release {
            fence: run.fence.clone(),
            ..release
        };
        assert!(store.release(&release).await.unwrap());
        // No run, so nobody is told.
        assert_eq!(told(&store, "w1").await, NONE);
        pass_the_lease().await;
        run = acquire(&store, "1", LONG).await;
        assert!(run.cancel_requested);
    }
}

async fn an_ended_job_is_not_cancelled(database: Database) {
    let store = database.open_migrated().await;
    let endings = [
        ("1", succeeded(), FinalState::Succeeded),
        ("2", dead("broken"), FinalState::Dead),
        ("3", Ending::cancelled(), FinalState::Cancelled),
    ];
    for (key, ending, state) in endings {
        let run = acquire(&store, key, LONG).await;
        assert!(finish(&store, &run.fence, ending).await);
        let before = story_of(&store, key).await;
        let ended = Cancelling::AlreadyEnded(state);
        assert_eq!(cancel(&store, run.job_id).await, ended);
        assert_eq!(story_of(&store, key).await, before);
        // An ending whose answer was lost is still confirmed.
        assert!(finish(&store, &run.fence, succeeded()).await);
    }
    let refused = refusal("4");
    store.refuse(&refused).await.unwrap();
    let ended = Cancelling::AlreadyEnded(FinalState::Dead);
    assert_eq!(cancel(&store, refused.job_id).await, ended);
}

async fn a_job_that_does_not_exist_is_not_cancelled(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    let cancelling = store.cancel(Uuid::now_v7(), "anna").await.unwrap();
    assert_eq!(cancelling, None);
    assert_eq!(job_of(&store, &run).await.state, JobState::Running);
    assert_eq!(told(&store, "w1").await, NONE);
}

async fn cancelling_is_told_in_the_ledger(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    cancel(&store, run.job_id).await;
    assert!(store.release(&interrupted(&run.fence)).await.unwrap());
    cancel(&store, run.job_id).await;
    let story = story_of(&store, "1").await;
    let expected = [
        ("claimed", Some(1)),
        ("cancel_requested", None),
        ("released", Some(1)),
        ("cancelled", None),
    ];
    assert_eq!(kinds(&story), expected);
    let by: Vec<&str> = story.ledger.iter().map(|e| e.worker.as_str()).collect();
    assert_eq!(by, ["w1", "anna", "w1", "anna"]);
}

/// One of them is first, and both answers agree on which.
async fn of_a_claim_and_a_cancellation_at_once_both_are_told_the_truth(database: Database) {
    let store = database.open_migrated().await;
    for round in 0..20 {
        let key = round.to_string();
        let run: Acquired = acquire(&store, &key, LONG).await;
        assert!(store.release(&interrupted(&run.fence)).await.unwrap());
        pass_the_lease().await;
        let claiming = tokio::spawn({
            let (store, key) = (Arc::clone(&store), key.clone());
            let terms: ClaimTerms = terms_of(&format!("w{round}"));
            async move { send(&store, &request(&key), &terms).await }
        });
        let cancelling = cancel(&store, run.job_id).await;
        let claim = claiming.await.unwrap();
        let told = told(&store, &format!("w{round}")).await;
        match (cancelling, claim) {
            (Cancelling::Requested, Claim::Acquired(acquired)) => {
                assert_eq!(told, [acquired.fence.token]);
            }
            (Cancelling::Cancelled, Claim::AlreadyFinished(FinalState::Cancelled)) => {
                assert_eq!(told, NONE);
            }
            other => panic!("{other:?} in round {round}"),
        }
    }
}
