//! The history of a message, in order.

use trainyard::record::{Note, NoteKind};
use trainyard::store::{ClaimTerms, Refusal};
use uuid::Uuid;

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acquire, claim, finish, interrupted, kinds, pass_the_lease, refusal, request,
    request_of, story_of, succeeded, terms,
};

on_every_store!(
    a_story_tells_what_happened_in_order,
    a_duplicate_by_a_business_key_is_found_by_its_own_id,
    a_refused_duplicate_is_found_by_its_own_id,
    a_message_of_two_subscriptions_has_two_stories,
    an_unknown_message_has_no_story,
    fifty_suppressed_deliveries_are_told_and_all_are_counted,
    fifty_of_a_batch_of_suppressed_deliveries_are_told,
    a_workers_notes_are_in_the_story,
);

async fn a_story_tells_what_happened_in_order(database: Database) {
    let store = database.open_migrated().await;
    acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    let other = ClaimTerms {
        worker: "w2".into(),
        ..terms(LONG)
    };
    store.claim(&[request("1")], &other).await.unwrap();
    claim(&store, "1", LONG).await;
    let story = story_of(&store, "1").await;
    let taker = trainyard::job::Fence {
        key: trainyard::job::JobKey::new("s", "1"),
        attempt: 2,
        token: current_token(&database).await,
    };
    assert!(story.ledger[1].detail.as_deref().unwrap().contains("w1"));
    store.release(&interrupted(&taker)).await.unwrap();
    let last = acquire(&store, "1", LONG).await;
    finish(&store, &last.fence, succeeded()).await;
    claim(&store, "1", LONG).await;

    let story = story_of(&store, "1").await;
    assert_eq!(
        kinds(&story),
        [
            ("claimed", Some(1)),
            ("taken_over", Some(2)),
            ("suppressed", None),
            ("released", Some(2)),
            ("claimed", Some(3)),
            ("finished", Some(3)),
            ("suppressed", None),
        ]
    );
    let workers: Vec<&str> = story.ledger.iter().map(|e| e.worker.as_str()).collect();
    assert_eq!(workers, ["w1", "w2", "w1", "w2", "w1", "w1", "w1"]);
    let detail = |n: usize| story.ledger[n].detail.as_deref();
    assert_eq!(detail(2), Some("it is running"));
    assert_eq!(detail(5), Some("succeeded"));
    assert_eq!(detail(6), Some("it is succeeded"));
    assert!(story.ledger.iter().all(|entry| entry.message_id.is_none()));
    assert!(story.ledger.is_sorted_by_key(|entry| entry.at));
}

async fn current_token(database: &Database) -> Uuid {
    let tables = database.tables().await;
    let rows: Vec<(Uuid,)> = tables.fetch("SELECT token FROM leases".to_owned()).await;
    rows[0].0
}

async fn a_duplicate_by_a_business_key_is_found_by_its_own_id(database: Database) {
    let store = database.open_migrated().await;
    let mut first = request("order-7");
    first.message.id = "m1".to_owned();
    let mut second = request("order-7");
    second.message.id = "m2".to_owned();
    for request in [first.clone(), second, first] {
        let request = trainyard::job::ClaimRequest {
            token: Uuid::new_v4(),
            ..request
        };
        store.claim(&[request], &terms(LONG)).await.unwrap();
    }
    let story = story_of(&store, "m2").await;
    assert_eq!(story.job.message_id, "m1");
    assert_eq!(story.job.duplicates, 2);
    let ids: Vec<_> = story
        .ledger
        .iter()
        .map(|e| e.message_id.as_deref())
        .collect();
    assert_eq!(ids, [None, Some("m2"), None]);
    assert_eq!(story_of(&store, "m1").await, story);
}

async fn a_refused_duplicate_is_found_by_its_own_id(database: Database) {
    let store = database.open_migrated().await;
    let first = refusal("same content");
    let mut second = Refusal {
        job_id: Uuid::now_v7(),
        ..first.clone()
    };
    second.message.id = "m2".to_owned();
    store.refuse(&first).await.unwrap();
    store.refuse(&second).await.unwrap();
    let story = story_of(&store, "m2").await;
    assert_eq!(story.job.id, first.job_id);
    assert_eq!(kinds(&story), [("refused", None), ("suppressed", None)]);
    let reason = story.ledger[0].detail.as_deref();
    assert_eq!(reason, Some("the data is not valid JSON"));
}

async fn a_message_of_two_subscriptions_has_two_stories(database: Database) {
    let store = database.open_migrated().await;
    let requests = [request_of("a", "1"), request_of("b", "1")];
    store.claim(&requests, &terms(LONG)).await.unwrap();
    let stories = store.stories("1").await.unwrap();
    let mut subscriptions: Vec<_> = stories.iter().map(|s| &s.job.subscription).collect();
    subscriptions.sort();
    assert_eq!(subscriptions, ["a", "b"]);
    assert!(stories.iter().all(|story| story.ledger.len() == 1));
}

async fn an_unknown_message_has_no_story(database: Database) {
    let store = database.open_migrated().await;
    acquire(&store, "1", LONG).await;
    assert_eq!(store.stories("2").await.unwrap(), []);
}

async fn fifty_suppressed_deliveries_are_told_and_all_are_counted(database: Database) {
    let store = database.open_migrated().await;
    let acquired = acquire(&store, "1", LONG).await;
    for _ in 0..60 {
        claim(&store, "1", LONG).await;
    }
    finish(&store, &acquired.fence, succeeded()).await;
    let story = story_of(&store, "1").await;
    assert_eq!(story.job.duplicates, 60);
    assert_eq!(suppressed(&story), 50);
    assert_eq!(kinds(&story).last(), Some(&("finished", Some(1))));
}

async fn fifty_of_a_batch_of_suppressed_deliveries_are_told(database: Database) {
    let store = database.open_migrated().await;
    acquire(&store, "1", LONG).await;
    for size in [30, 30, 30] {
        let batch: Vec<_> = (0..size).map(|_| request("1")).collect();
        store.claim(&batch, &terms(LONG)).await.unwrap();
    }
    let story = story_of(&store, "1").await;
    assert_eq!((story.job.duplicates, suppressed(&story)), (90, 50));
}

fn suppressed(story: &trainyard::record::Story) -> usize {
    let kinds = kinds(story);
    kinds
        .iter()
        .filter(|(kind, _)| *kind == "suppressed")
        .count()
}

async fn a_workers_notes_are_in_the_story(database: Database) {
    let store = database.open_migrated().await;
    let fence = acquire(&store, "1", LONG).await.fence;
    let note = |kind, attempt, detail: Option<&str>| Note {
        key: fence.key.clone(),
        kind,
        attempt,
        detail: detail.map(str::to_owned),
    };
    let notes = [
        note(NoteKind::LeaseLost, Some(1), Some("not\0renewed")),
        note(NoteKind::Acked, None, None),
    ];
    store.note("w2", &notes).await.unwrap();
    store.note("w2", &[]).await.unwrap();
    let story = story_of(&store, "1").await;
    assert_eq!(
        kinds(&story)[1..],
        [("lease_lost", Some(1)), ("acked", None)]
    );
    assert_eq!(story.ledger[1].worker, "w2");
    assert!(
        story.ledger[1]
            .detail
            .as_deref()
            .unwrap()
            .ends_with("renewed")
    );
}
