//! Shorthands for claims and what follows them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{SubsecRound, Utc};
use serde_json::json;
use trainyard::job::{
    AckTerms, Acquired, Can, Claim, ClaimRequest, DeadLetter, Fence, JobKey, Limits, Pick, Renewal,
    Taken,
};
use trainyard::message::Message;
use trainyard::outcome::{DeadReason, Ending};
use trainyard::record::{Job, Story};
use trainyard::store::{
    ClaimTerms, DeadLettersDue, Finish, Finished, Patience, Reach, Refusal, Release, Released,
    Standing, Store, TaskTerms,
};
use uuid::Uuid;

pub const LONG: Duration = Duration::from_secs(600);
/// A lease that has expired by the time the next statement runs.
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
        can: Can::Run,
        ack: acked_after(ENDED),
        limits: Limits {
            max_attempts: 100,
            dead_letter_topic: None,
        },
    }
}

/// A sweep takes the job over this long after its lease expires: at once if the message
/// is acked with the claim.
pub fn acked_after(delay: Duration) -> AckTerms {
    AckTerms {
        with_claim: delay.is_zero(),
        deadline: delay,
    }
}

/// A request whose message has the ordering key `k`.
pub fn ordered(key: &str) -> ClaimRequest {
    let mut request = request(key);
    request.message.ordering_key = "k".to_owned();
    request
}

/// A run's write when it failed and the job goes on.
pub fn failed(fence: &Fence, error: &str, retry_in: Duration) -> Release {
    Release {
        fence: fence.clone(),
        why: Released::Failed {
            error: error.to_owned(),
            retry_in,
        },
        checkpoint: None,
    }
}

/// A run's write when it gives its claim back without costing an attempt.
pub fn interrupted(fence: &Fence) -> Release {
    Release {
        fence: fence.clone(),
        why: Released::Interrupted,
        checkpoint: None,
    }
}

/// A task whose messages are acked after the run.
pub fn task_terms(max_attempts: u32) -> TaskTerms {
    TaskTerms {
        max_attempts,
        acked_when_claimed: false,
    }
}

/// A worker that could run `train` from subscription `s`.
pub fn reach() -> Reach {
    Reach {
        subscriptions: BTreeMap::from([("s".to_owned(), None)]),
        tasks: BTreeMap::from([("train".to_owned(), task_terms(100))]),
    }
}

/// An ending in which the job is dead.
pub fn dead(error: &str) -> Ending {
    Ending::dead(DeadReason::Permanent, error)
}

/// Gives jobs of every unknown task up after this time.
pub fn patience(lasts: Duration) -> Patience {
    Patience {
        lasts,
        forgotten: true,
    }
}

pub fn terms(lease: Duration) -> ClaimTerms {
    ClaimTerms {
        worker: "w1".into(),
        lease,
        max_crashes: 3,
    }
}

pub fn terms_of(worker: &str) -> ClaimTerms {
    ClaimTerms {
        worker: worker.into(),
        ..terms(LONG)
    }
}

pub async fn claim(store: &Arc<dyn Store>, key: &str, lease: Duration) -> Claim {
    send(store, &request(key), &terms(lease)).await
}

pub async fn acquire(store: &Arc<dyn Store>, key: &str, lease: Duration) -> Acquired {
    acquired(claim(store, key, lease).await)
}

pub async fn send(store: &Arc<dyn Store>, request: &ClaimRequest, terms: &ClaimTerms) -> Claim {
    let requests = std::slice::from_ref(request);
    let claims = store.claim(requests, terms).await.unwrap();
    claims.into_iter().next().unwrap()
}

pub fn acquired(claim: Claim) -> Acquired {
    match claim {
        Claim::Acquired(acquired) => acquired,
        other => panic!("not acquired: {other:?}"),
    }
}

pub fn assert_waits(claim: &Claim) {
    assert!(matches!(claim, Claim::Waiting { .. }), "{claim:?}");
}

/// Takes due jobs, like a worker without other jobs.
pub async fn reap(store: &Arc<dyn Store>, limit: usize) -> Vec<Taken> {
    reap_within(store, &reach(), &terms(LONG), limit).await
}

pub async fn reap_within(
    store: &Arc<dyn Store>,
    reach: &Reach,
    terms: &ClaimTerms,
    limit: usize,
) -> Vec<Taken> {
    let mut due = store.due(reach, limit.try_into().unwrap()).await.unwrap();
    due.truncate(limit);
    let picks: Vec<Pick> = due
        .into_iter()
        .map(|job| Pick {
            token: Uuid::new_v4(),
            acked_when_claimed: reach.acked_when_claimed(&job.task),
            limits: reach.limits(&job.key.subscription, &job.task),
            key: job.key,
        })
        .collect();
    store.take(&picks, terms).await.unwrap()
}

pub async fn look(store: &Arc<dyn Store>, key: &JobKey) -> Standing {
    let standings = store.look(std::slice::from_ref(key)).await.unwrap();
    standings[0]
}

pub fn reaped_keys(reaped: &[Taken]) -> Vec<&str> {
    let fences = reaped.iter().map(|reaped| &reaped.acquired.fence);
    fences.map(|fence| &*fence.key.key).collect()
}

/// Reaps the only job that can be reaped, which must have this key.
pub async fn reap_one(store: &Arc<dyn Store>, key: &str) -> Acquired {
    let mut reaped = reap(store, 10).await;
    assert_eq!(reaped_keys(&reaped), [key]);
    reaped.remove(0).acquired
}

pub async fn assert_none_to_reap(store: &Arc<dyn Store>) {
    assert_eq!(reaped_keys(&reap(store, 10).await), [""; 0]);
}

/// Waits until a lease of zero length has expired.
pub async fn pass_the_lease() {
    tokio::time::sleep(Duration::from_millis(5)).await;
}

/// Retries while another transaction has locked the row, as a worker does.
pub async fn finish(store: &Arc<dyn Store>, fence: &Fence, ending: Ending) -> bool {
    let finishes = [Finish {
        fence: fence.clone(),
        ending,
        checkpoint: None,
        dead_letter_topic: None,
    }];
    loop {
        match store.finish(&finishes).await.unwrap()[0] {
            Finished::Ended => return true,
            Finished::NotMine => return false,
            Finished::Locked => pass_the_lease().await,
        }
    }
}

pub fn succeeded() -> Ending {
    Ending::succeeded(json!({"accuracy": 0.5}))
}

pub async fn job_of(store: &Arc<dyn Store>, acquired: &Acquired) -> Job {
    job_at(store, acquired.job_id).await
}

pub async fn job_at(store: &Arc<dyn Store>, id: Uuid) -> Job {
    store.job(id).await.unwrap().unwrap()
}

/// Tries every write of a run under a stale fence.
pub async fn assert_is_stale(store: &Arc<dyn Store>, fence: &Fence) {
    let fences = std::slice::from_ref(fence);
    assert_eq!(store.renew(fences, LONG).await.unwrap(), [Renewal::Lost]);
    assert!(!store.save_checkpoint(fence, "stale", true).await.unwrap());
    assert!(!store.release(&interrupted(fence)).await.unwrap());
    let failed = failed(fence, "stale", LONG);
    assert!(!store.release(&failed).await.unwrap());
    assert!(!finish(store, fence, dead("stale")).await);
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

/// All dead letters, of any worker.
pub fn due() -> DeadLettersDue {
    DeadLettersDue {
        worker: None,
        at_least: ENDED,
        not_to: Vec::new(),
        time_to_publish: ENDED,
        limit: 100,
    }
}

/// All dead letters, however short they have waited.
pub async fn letters(store: &Arc<dyn Store>) -> Vec<DeadLetter> {
    store.dead_letters(&due()).await.unwrap()
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
