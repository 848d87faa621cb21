//! Races, batches, and lost answers.

use std::sync::Arc;

use futures::future::join_all;
use trainyard::job::{Claim, ClaimRequest, FinalState};
use trainyard::record::JobState;
use trainyard::store::{Finish, Finished};

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acquire, claim, dead, finish, interrupted, job_of, kinds, pass_the_lease, request,
    story_of, succeeded, terms,
};

on_every_store!(
    of_32_claims_at_a_leases_end_one_wins,
    a_claim_sent_again_is_confirmed_with_the_same_attempt,
    a_claim_sent_again_after_a_takeover_is_confirmed,
    a_claim_sent_again_beside_another_delivery_is_confirmed,
    a_batch_of_finishes_is_answered_in_its_order,
);

async fn of_32_claims_at_a_leases_end_one_wins(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    let claims = join_all((0..32).map(|_| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { claim(&store, "1", LONG).await })
    }))
    .await;
    let mut winners = Vec::new();
    for claim in claims {
        match claim.unwrap() {
            Claim::Acquired(acquired) => winners.push(acquired),
            Claim::RunningUntil { .. } => {}
            other => panic!("neither acquired nor held: {other:?}"),
        }
    }
    assert_eq!(winners.len(), 1);
    assert_eq!(winners[0].fence.attempt, first.fence.attempt + 1);
    assert_eq!(job_of(&store, &first).await.duplicates, 31);
    assert!(!finish(&store, &first.fence, succeeded()).await);
    assert!(finish(&store, &winners[0].fence, succeeded()).await);
}

async fn a_claim_sent_again_is_confirmed_with_the_same_attempt(database: Database) {
    let store = database.open_migrated().await;
    let request = request("1");
    for _ in 0..3 {
        let claims = store
            .claim(std::slice::from_ref(&request), &terms(LONG))
            .await
            .unwrap();
        let Claim::Acquired(acquired) = &claims[0] else {
            panic!("not confirmed: {claims:?}");
        };
        assert_eq!(acquired.fence.attempt, 1);
        assert_eq!(acquired.fence.token, request.token);
        let job = job_of(&store, acquired).await;
        assert_eq!((job.duplicates, job.attempts), (0, 1));
    }
    assert_eq!(kinds(&story_of(&store, "1").await), [("claimed", Some(1))]);
}

async fn a_claim_sent_again_after_a_takeover_is_confirmed(database: Database) {
    let store = database.open_migrated().await;
    acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    let request = request("1");
    for _ in 0..2 {
        let claims = store
            .claim(std::slice::from_ref(&request), &terms(LONG))
            .await
            .unwrap();
        assert!(matches!(&claims[0], Claim::Acquired(a) if a.fence.attempt == 2));
    }
    let told = story_of(&store, "1").await;
    assert_eq!(
        kinds(&told),
        [("claimed", Some(1)), ("taken_over", Some(2))]
    );
}

/// Holds whichever of the two comes first in the batch.
async fn a_claim_sent_again_beside_another_delivery_is_confirmed(database: Database) {
    let store = database.open_migrated().await;
    let mine = request("1");
    let send = async |batch: &[ClaimRequest]| store.claim(batch, &terms(LONG)).await.unwrap();
    send(std::slice::from_ref(&mine)).await;
    let before = send(&[request("1"), mine.clone()]).await;
    assert!(matches!(before[0], Claim::RunningUntil { .. }));
    assert!(matches!(before[1], Claim::Acquired(_)), "{before:?}");
    let after = send(&[mine, request("1")]).await;
    assert!(matches!(after[0], Claim::Acquired(_)), "{after:?}");
    assert!(matches!(after[1], Claim::RunningUntil { .. }));
}

async fn a_batch_of_finishes_is_answered_in_its_order(database: Database) {
    let store = database.open_migrated().await;
    let stale = acquire(&store, "stale", ENDED).await.fence;
    pass_the_lease().await;
    let taken = acquire(&store, "stale", LONG).await;
    let earlier = acquire(&store, "earlier", LONG).await;
    assert!(finish(&store, &earlier.fence, succeeded()).await);
    let released = acquire(&store, "released", LONG).await;
    store.release(&interrupted(&released.fence)).await.unwrap();
    let (one, two) = (
        acquire(&store, "z", LONG).await,
        acquire(&store, "a", LONG).await,
    );
    let batch = [
        (stale, succeeded()),
        (one.fence.clone(), succeeded()),
        (released.fence.clone(), succeeded()),
        (earlier.fence.clone(), dead("too late")),
        (two.fence.clone(), dead("it is broken")),
    ];
    let finishes = batch.map(|(fence, ending)| Finish {
        fence,
        ending,
        checkpoint: None,
        dead_letter_topic: None,
    });
    let answers = store.finish(&finishes).await.unwrap();
    let ended = answers.iter().map(|answer| *answer == Finished::Ended);
    assert_eq!(ended.collect::<Vec<_>>(), [false, true, false, true, true]);
    let states = [
        (&taken, JobState::Running),
        (&released, JobState::Waiting),
        (&earlier, JobState::Succeeded),
        (&one, JobState::Succeeded),
        (&two, JobState::Dead),
    ];
    for (acquired, state) in states {
        assert_eq!(job_of(&store, acquired).await.state, state);
    }
    assert_eq!(
        claim(&store, "a", LONG).await,
        Claim::AlreadyFinished(FinalState::Dead)
    );
    assert_eq!(store.finish(&[]).await.unwrap(), []);
}
