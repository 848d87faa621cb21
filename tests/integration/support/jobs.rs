//! Claims and what follows them, in few words.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{SubsecRound, Utc};
use serde_json::json;
use trainyard::job::{Acquired, Claim, ClaimRequest, Fence, FinalState, Job, JobKey, Story};
use trainyard::message::Message;
use trainyard::outcome::Ending;
use trainyard::store::{ClaimTerms, Finish, Refusal, Store};
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
        ordering_key: "k".to_owned(),
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
    }
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
    };
    store.finish(&[finish]).await.unwrap()[0]
}

pub fn succeeded() -> Ending {
    Ending {
        state: FinalState::Succeeded,
        error: None,
        result: Some(json!({"accuracy": 0.5})),
    }
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
        reason: "the data is not valid JSON".to_owned(),
        worker: "w1".into(),
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
