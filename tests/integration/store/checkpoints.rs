//! Checkpoints: a run's work, stored for the job's next attempt.

use std::sync::Arc;
use std::time::Duration;

use trainyard::job::{Acquired, Claim, Fence, Renewal};
use trainyard::record::{Cancelling, JobState, Retrying};
use trainyard::report::Checkpoint;
use trainyard::store::{Finish, Finished, Release, Released, Standing, Store};

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acked_after, acquire, acquired, assert_none_to_reap, claim, finish, interrupted,
    job_of, look, pass_the_lease, reap_one, request, send, succeeded, terms,
};

on_every_store!(
    a_first_attempt_has_no_checkpoint,
    a_later_checkpoint_replaces_an_earlier_one,
    only_the_holder_saves_checkpoints,
    a_run_that_has_ended_saves_no_checkpoint,
    the_next_attempt_gets_the_checkpoint_however_the_last_one_stopped,
    a_claim_sent_again_gets_the_checkpoint_too,
    a_released_runs_last_checkpoint_counts,
    a_finished_runs_last_checkpoint_counts,
    a_parked_and_a_cancelled_job_keep_their_checkpoint,
    a_retried_job_goes_on_from_its_checkpoint,
    a_retried_job_tells_its_newest_checkpoint,
    a_checkpoint_that_acks_leaves_the_job_to_the_table,
    a_checkpoint_with_nul_characters_can_be_stored,
);

async fn save(store: &Arc<dyn Store>, fence: &Fence, checkpoint: &str) -> bool {
    let saved = store.save_checkpoint(fence, checkpoint, false).await;
    saved.unwrap()
}

/// A run that has saved the checkpoint.
async fn run_to(store: &Arc<dyn Store>, checkpoint: &str, lease: Duration) -> Acquired {
    let run = acquire(store, "1", lease).await;
    assert!(save(store, &run.fence, checkpoint).await);
    run
}

async fn kept(store: &Arc<dyn Store>, acquired: &Acquired) -> Option<String> {
    job_of(store, acquired).await.checkpoint
}

async fn a_first_attempt_has_no_checkpoint(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    assert_eq!(run.checkpoint, None);
    assert_eq!(kept(&store, &run).await, None);
}

async fn a_later_checkpoint_replaces_an_earlier_one(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    for checkpoint in ["step 1", "step 2", "step 2"] {
        assert!(save(&store, &run.fence, checkpoint).await);
        let kept = kept(&store, &run).await;
        assert_eq!(kept.as_deref(), Some(checkpoint));
    }
    assert_eq!(job_of(&store, &run).await.state, JobState::Running);
}

async fn only_the_holder_saves_checkpoints(database: Database) {
    let store = database.open_migrated().await;
    let stale = run_to(&store, "step 1", ENDED).await.fence;
    pass_the_lease().await;
    let holder = acquire(&store, "1", LONG).await;
    let wrong_attempt = Fence {
        attempt: 9,
        ..holder.fence.clone()
    };
    let another = Fence {
        key: acquire(&store, "2", LONG).await.fence.key,
        ..holder.fence.clone()
    };
    for fence in [&stale, &wrong_attempt, &another] {
        assert!(!save(&store, fence, "not its own").await);
    }
    assert_eq!(kept(&store, &holder).await.as_deref(), Some("step 1"));
    assert!(save(&store, &holder.fence, "step 2").await);
}

async fn a_run_that_has_ended_saves_no_checkpoint(database: Database) {
    let store = database.open_migrated().await;
    let released = run_to(&store, "step 1", LONG).await;
    let given_back = interrupted(&released.fence);
    assert!(store.release(&given_back).await.unwrap());
    assert!(!save(&store, &released.fence, "too late").await);
    let finished = acquire(&store, "1", LONG).await;
    assert!(finish(&store, &finished.fence, succeeded()).await);
    assert!(!save(&store, &finished.fence, "too late").await);
    assert_eq!(kept(&store, &finished).await.as_deref(), Some("step 1"));
}

async fn the_next_attempt_gets_the_checkpoint_however_the_last_one_stopped(database: Database) {
    let store = database.open_migrated().await;
    run_to(&store, "lost", ENDED).await;
    pass_the_lease().await;
    let second = acquire(&store, "1", LONG).await;
    assert_eq!(second.checkpoint.as_deref(), Some("lost"));

    assert!(save(&store, &second.fence, "interrupted").await);
    let given_back = interrupted(&second.fence);
    assert!(store.release(&given_back).await.unwrap());
    assert_eq!(kept(&store, &second).await.as_deref(), Some("interrupted"));
    pass_the_lease().await;
    let third = reap_one(&store, "1").await;
    assert_eq!(third.checkpoint.as_deref(), Some("interrupted"));

    assert!(save(&store, &third.fence, "failed").await);
    let failed = crate::support::jobs::failed(&third.fence, "disk full", ENDED);
    assert!(store.release(&failed).await.unwrap());
    pass_the_lease().await;
    let fourth = acquire(&store, "1", ENDED).await;
    assert_eq!(fourth.checkpoint.as_deref(), Some("failed"));
    pass_the_lease().await;
    let fifth = reap_one(&store, "1").await;
    assert_eq!(fifth.checkpoint.as_deref(), Some("failed"));
}

async fn a_claim_sent_again_gets_the_checkpoint_too(database: Database) {
    let store = database.open_migrated().await;
    run_to(&store, "step 1", ENDED).await;
    pass_the_lease().await;
    let request = request("1");
    for _ in 0..2 {
        let run = acquired(send(&store, &request, &terms(LONG)).await);
        assert_eq!(run.checkpoint.as_deref(), Some("step 1"));
    }
}

fn released(fence: &Fence, why: Released, checkpoint: Option<&str>) -> Release {
    Release {
        fence: fence.clone(),
        why,
        checkpoint: checkpoint.map(Checkpoint::from),
    }
}

/// It may not have been saved before; without one, the saved checkpoint stays.
async fn a_released_runs_last_checkpoint_counts(database: Database) {
    let store = database.open_migrated().await;
    let failed = Released::Failed {
        error: "disk full".to_owned(),
        retry_in: ENDED,
    };
    for why in [Released::Interrupted, failed] {
        for (last, expected) in [(Some("last"), "last"), (None, "saved")] {
            let run = run_to(&store, "saved", LONG).await;
            let release = released(&run.fence, why.clone(), last);
            assert!(store.release(&release).await.unwrap());
            let late = released(&run.fence, why.clone(), Some("late"));
            assert!(!store.release(&late).await.unwrap());
            assert_eq!(kept(&store, &run).await.as_deref(), Some(expected));
            pass_the_lease().await;
        }
    }
}

async fn a_finished_runs_last_checkpoint_counts(database: Database) {
    let store = database.open_migrated().await;
    for (key, last, expected) in [("1", Some("last"), "last"), ("2", None, "saved")] {
        let run = acquire(&store, key, LONG).await;
        assert!(save(&store, &run.fence, "saved").await);
        let finish = |checkpoint: Option<&str>| Finish {
            fence: run.fence.clone(),
            ending: succeeded(),
            checkpoint: checkpoint.map(Checkpoint::from),
            dead_letter_topic: None,
        };
        assert_eq!(
            store.finish(&[finish(last)]).await.unwrap(),
            [Finished::Ended]
        );
        // Confirmed, and nothing else changes.
        let again = finish(Some("late"));
        assert_eq!(store.finish(&[again]).await.unwrap(), [Finished::Ended]);
        assert_eq!(kept(&store, &run).await.as_deref(), Some(expected));
    }
}

async fn a_parked_and_a_cancelled_job_keep_their_checkpoint(database: Database) {
    let store = database.open_migrated().await;
    for _ in 0..3 {
        run_to(&store, "step 1", ENDED).await;
        pass_the_lease().await;
    }
    claim(&store, "1", LONG).await;
    let waiting = acquire(&store, "2", LONG).await;
    assert!(save(&store, &waiting.fence, "step 1").await);
    let given_back = interrupted(&waiting.fence);
    assert!(store.release(&given_back).await.unwrap());
    let cancelled = store.cancel(waiting.job_id, "anna").await.unwrap();
    assert_eq!(cancelled, Some(Cancelling::Cancelled));
    for (key, state) in [("1", JobState::Dead), ("2", JobState::Cancelled)] {
        let job = crate::support::jobs::story_of(&store, key).await.job;
        assert_eq!(job.state, state);
        assert_eq!(job.checkpoint.as_deref(), Some("step 1"));
    }
}

async fn retry(store: &Arc<dyn Store>, acquired: &Acquired) {
    let retrying = store.retry(acquired.job_id, "anna").await.unwrap();
    assert_eq!(retrying, Some(Retrying::Queued));
}

async fn a_retried_job_goes_on_from_its_checkpoint(database: Database) {
    let store = database.open_migrated().await;
    let first = run_to(&store, "step 1", LONG).await;
    assert!(finish(&store, &first.fence, succeeded()).await);
    retry(&store, &first).await;
    assert_eq!(kept(&store, &first).await.as_deref(), Some("step 1"));
    let second = acquire(&store, "1", LONG).await;
    assert_eq!(second.checkpoint.as_deref(), Some("step 1"));
    assert!(finish(&store, &second.fence, succeeded()).await);
    retry(&store, &second).await;
    let third = reap_one(&store, "1").await;
    assert_eq!(third.checkpoint.as_deref(), Some("step 1"));
}

async fn a_retried_job_tells_its_newest_checkpoint(database: Database) {
    let store = database.open_migrated().await;
    let first = run_to(&store, "before", LONG).await;
    assert!(finish(&store, &first.fence, succeeded()).await);
    retry(&store, &first).await;
    let second = run_to(&store, "after", LONG).await;
    assert_eq!(kept(&store, &second).await.as_deref(), Some("after"));
    assert!(finish(&store, &second.fence, succeeded()).await);
    assert_eq!(kept(&store, &second).await.as_deref(), Some("after"));
}

/// `after_checkpoint` acks the message then, so Pub/Sub no longer brings the job back.
async fn a_checkpoint_that_acks_leaves_the_job_to_the_table(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    let mut unacked = request("1");
    unacked.ack = acked_after(Duration::from_secs(60));
    let run = acquired(send(&store, &unacked, &terms(LONG)).await);
    let key = &run.fence.key;
    for (acked, checkpoint) in [(false, "1"), (true, "2"), (false, "3")] {
        let saved = store.save_checkpoint(&run.fence, checkpoint, acked).await;
        assert!(saved.unwrap());
        let expected = checkpoint != "1";
        let Standing::Running { acked, .. } = look(&store, key).await else {
            panic!("not held");
        };
        assert_eq!(acked, expected, "at checkpoint {checkpoint}");
        let held = claim(&store, "1", LONG).await;
        assert!(matches!(held, Claim::RunningUntil { acked, .. } if acked == expected));
        tables.end_lease(key, Duration::from_secs(1)).await;
        if !expected {
            assert_none_to_reap(&store).await;
        }
        let fences = std::slice::from_ref(&run.fence);
        assert_eq!(store.renew(fences, LONG).await.unwrap(), [Renewal::Renewed]);
    }
    tables.end_lease(key, Duration::from_secs(1)).await;
    let second = reap_one(&store, "1").await;
    assert_eq!(second.checkpoint.as_deref(), Some("3"));
}

async fn a_checkpoint_with_nul_characters_can_be_stored(database: Database) {
    let store = database.open_migrated().await;
    let run = run_to(&store, "a\0b", LONG).await;
    let release = released(&run.fence, Released::Interrupted, Some("c\0d"));
    assert!(store.release(&release).await.unwrap());
    pass_the_lease().await;
    let second = acquire(&store, "1", LONG).await;
    let checkpoint = second.checkpoint.as_deref().unwrap();
    assert!(checkpoint.starts_with('c') && checkpoint.ends_with('d'));
    let finish = Finish {
        fence: second.fence.clone(),
        ending: succeeded(),
        checkpoint: Some("e\0f".into()),
        dead_letter_topic: None,
    };
    assert_eq!(store.finish(&[finish]).await.unwrap(), [Finished::Ended]);
}
