//! Claims and what follows them, in few words.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{SubsecRound, Utc};
use serde_json::json;
use trainyard::job::{Acquired, Can, Claim, ClaimRequest, Fence, Job, JobKey, Limits, Story};
use trainyard::message::Message;
use trainyard::outcome::{DeadReason, Ending};
use trainyard::store::{ClaimTerms, Finish, Reach, Refusal, Release, Released, Store};
use uuid::Uuid;

pub const LONG: Duration = Duration::from_secs(600);
/// A lease that has ended by the time the next statement runs.
pub const ENDED: Duration = Duration::ZERO;

pub fn message(id: &str) -> Message {
    Message {
        id: id.to_owned(),
        publish_time: Utc::now().trunc_subsecs(3),
        data: Bytes::from_static(b"{\"name\":\"train\"}"),
        attributes: BTreeMap::from([("team".to_owned(), "vision".to_owned())]),
        ordering_key: String::new(),
    }
}

pub fn request(key: &str) -> ClaimRequest {
    request_of("s", key)
}

pub fn request_of(subscription: &str, key: &str) -> ClaimRequest {
    ClaimRequest {
        key: JobKey::new(subscription, key),
        job_id: Uuid::now_v7(),
        token: Uuid::new_v4(),
        task: "train".to_owned(),
        message: message(key),
        reap_delay: Duration::ZERO,
        can: Can::Run,
        limits: Limits {
            max_attempts: 100,
            dead_letter_topic: None,
        },
    }
}

/// What a run writes when it gives its claim back at no cost.
pub fn interrupted(fence: &Fence) -> Release {
    Release {
        fence: fence.clone(),
        why: Released::Interrupted,
        checkpoint: None,
    }
}

/// A worker that could run `train` from subscription `s`.
pub fn reach() -> Reach {
    Reach {
        subscriptions: BTreeMap::from([("s".to_owned(), None)]),
        tasks: BTreeMap::from([("train".to_owned(), 100)]),
    }
}

/// An ending in which the job is dead.
pub fn dead(error: &str) -> Ending {
    Ending::dead(DeadReason::Permanent, error)
}

pub fn terms(lease: Duration) -> ClaimTerms {
    ClaimTerms {
        worker: "w1".into(),
        lease,
        max_crashes: 3,
    }
}

pub async fn claim(store: &Arc<dyn Store>, key: &str, lease: Duration) -> Claim {
    let claims = store.claim(&[request(key)], &terms(lease)).await.unwrap();
    claims.into_iter().next().unwrap()
}

pub async fn acquire(store: &Arc<dyn Store>, key: &str, lease: Duration) -> Acquired {
    match claim(store, key, lease).await {
        Claim::Acquired(acquired) => acquired,
        other => panic!("not acquired: {other:?}"),
    }
}

/// Passes the millisecond in which a lease of no length ends.
pub async fn pass_the_lease() {
    tokio::time::sleep(Duration::from_millis(5)).await;
}

pub async fn finish(store: &Arc<dyn Store>, fence: &Fence, ending: Ending) -> bool {
    let finish = Finish {
        fence: fence.clone(),
        ending,
        checkpoint: None,
        dead_letter_topic: None,
    };
    store.finish(&[finish]).await.unwrap()[0]
}

pub fn succeeded() -> Ending {
    Ending::succeeded(json!({"accuracy": 0.5}))
}

pub async fn job_of(store: &Arc<dyn Store>, acquired: &Acquired) -> Job {
    store.job(acquired.job_id).await.unwrap().unwrap()
}

pub fn refusal(key: &str) -> Refusal {
    Refusal {
        key: JobKey::new("s", key),
        job_id: Uuid::now_v7(),
        task: None,
        message: message(key),
        reason: DeadReason::Malformed,
        error: "the data is not valid JSON".to_owned(),
        worker: "w1".into(),
        dead_letter_topic: None,
    }
}

/// The only story about a message.
pub async fn story_of(store: &Arc<dyn Store>, message_id: &str) -> Story {
    let mut stories = store.stories(message_id).await.unwrap();
    assert_eq!(stories.len(), 1);
    stories.remove(0)
}

/// A ledger's kinds and attempts, in order.
pub fn kinds(story: &Story) -> Vec<(&str, Option<u32>)> {
    let entries = story.ledger.iter();
    entries
        .map(|entry| (entry.kind.as_str(), entry.attempt))
        .collect()
}
