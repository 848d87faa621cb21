use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use super::*;
use crate::config;
use crate::executor::Executor;
use crate::guard::Health;
use crate::job::{Acquired, Claim, ClaimRequest, Fence, JobKey, Renewal};
use crate::store::{
    ClaimTerms, Claims, DatabaseError, Finish, Finished, Refusal, Refused, Release, StoreError,
};
use crate::worker::lease_keeper::LeaseKeeper;

const LEASE: Duration = Duration::from_secs(100);
const STOP_GRACE: Duration = Duration::from_secs(10);
const TOKEN: Uuid = Uuid::nil();

/// A store that renews by a script, and is away when that is used up. It also knows whose
/// job is to be cancelled.
struct Renewing {
    /// None: no answer.
    script: Mutex<VecDeque<Option<Renewal>>>,
    cancelled: Vec<Uuid>,
}

#[async_trait]
impl Claims for Renewing {
    async fn renew(&self, fences: &[Fence], _: Duration) -> Result<Vec<Renewal>, StoreError> {
        let next = self.script.lock().unwrap().pop_front();
        match next {
            Some(Some(renewal)) => Ok(vec![renewal; fences.len()]),
            Some(None) => std::future::pending().await,
            None => Err(StoreError::Unavailable(DatabaseError::PoolTimedOut)),
        }
    }

    async fn claim(&self, _: &[ClaimRequest], _: &ClaimTerms) -> Result<Vec<Claim>, StoreError> {
        unreachable!()
    }
    async fn cancelled_runs(&self, _: &str) -> Result<Vec<Uuid>, StoreError> {
        Ok(self.cancelled.clone())
    }
    async fn save_checkpoint(&self, _: &Fence, _: &str, _: bool) -> Result<bool, StoreError> {
        unreachable!()
    }
    async fn finish(&self, _: &[Finish]) -> Result<Vec<Finished>, StoreError> {
        unreachable!()
    }
    async fn release(&self, _: &Release) -> Result<bool, StoreError> {
        unreachable!()
    }
    async fn disown(&self, _: &[(JobKey, Uuid)]) -> Result<(), StoreError> {
        unreachable!()
    }
    async fn refuse(&self, _: &Refusal) -> Result<Refused, StoreError> {
        unreachable!()
    }
}

/// Runs for `runs_for`, and stops `stops_within` after it was asked to.
struct Timed {
    runs_for: Duration,
    stops_within: Duration,
}

#[async_trait]
impl Executor for Timed {
    async fn execute(&self, attempt: Attempt) -> Outcome {
        tokio::select! {
            () = sleep(self.runs_for) => {}
            () = attempt.stop.cancelled() => sleep(self.stops_within).await,
        }
        Outcome::Succeeded(json!("done").into())
    }
}

const HOURS: Duration = Duration::from_secs(36_000);

struct Scene {
    runs_for: Duration,
    stops_within: Duration,
    timeout: Option<Duration>,
    renewals: Vec<Option<Renewal>>,
    is_cancelled: bool,
    stopping: CancellationToken,
}

impl Default for Scene {
    fn default() -> Self {
        Self {
            runs_for: HOURS,
            stops_within: Duration::ZERO,
            timeout: None,
            renewals: Vec::new(),
            is_cancelled: false,
            stopping: CancellationToken::new(),
        }
    }
}

/// Plays the scene; returns the outcome and how long it took.
async fn play(scene: Scene) -> (Outcome, Duration) {
    let store = Arc::new(Renewing {
        script: Mutex::new(scene.renewals.into()),
        cancelled: scene.is_cancelled.then_some(TOKEN).into_iter().collect(),
    });
    let terms = ClaimTerms {
        worker: "w".into(),
        lease: LEASE,
        max_crashes: 3,
    };
    let keeper = LeaseKeeper::new(store, Health::default(), terms, STOP_GRACE);
    let fence = Fence {
        key: JobKey::new("s", "k"),
        attempt: 1,
        token: TOKEN,
    };
    let mut lease = keeper.begin(&Acquired {
        fence,
        job_id: Uuid::nil(),
        claimed_at: Instant::now(),
        counted_attempts: 1,
        checkpoint: None,
        cancel_requested: false,
    });
    let mut keeping = JoinSet::new();
    keeping.spawn(keeper.clone().watch_for_cancels());
    keeping.spawn(keeper.run());
    let task = ConfiguredTask {
        name: "t".to_owned(),
        settings: config::Task {
            timeout: scene.timeout,
            ..config::Task::default()
        },
        executor: Arc::new(Timed {
            runs_for: scene.runs_for,
            stops_within: scene.stops_within,
        }),
    };
    let attempt = Attempt::of(json!({}));
    let began = Instant::now();
    let outcome = supervise(&task, attempt, &mut lease, &scene.stopping, STOP_GRACE).await;
    (outcome, began.elapsed())
}

fn done() -> Outcome {
    Outcome::Succeeded(Value::from("done").into())
}

#[tokio::test(start_paused = true)]
async fn a_run_that_ends_in_time_keeps_its_outcome() {
    let scene = Scene {
        runs_for: Duration::from_secs(50),
        ..Scene::default()
    };
    assert_eq!(play(scene).await.0, done());
}

#[tokio::test(start_paused = true)]
async fn a_run_is_over_before_a_lease_that_cannot_be_renewed() {
    let scene = Scene {
        stops_within: HOURS,
        ..Scene::default()
    };
    let (outcome, took) = play(scene).await;
    assert_eq!(outcome, Outcome::LeaseLost);
    assert!(took < LEASE, "{took:?}");
    assert!(took > LEASE / 2, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_renewed_lease_keeps_the_run_going() {
    let scene = Scene {
        runs_for: LEASE * 3,
        renewals: std::iter::repeat_with(|| Some(Renewal::Renewed))
            .take(20)
            .collect(),
        ..Scene::default()
    };
    assert_eq!(play(scene).await.0, done());
}

#[tokio::test(start_paused = true)]
async fn renewals_that_get_no_answer_are_tried_again_in_time() {
    let scene = Scene {
        runs_for: LEASE * 2,
        renewals: [None, None, Some(Renewal::Renewed), None]
            .into_iter()
            .chain(std::iter::repeat_with(|| Some(Renewal::Renewed)).take(20))
            .collect(),
        ..Scene::default()
    };
    assert_eq!(play(scene).await.0, done());
}

#[tokio::test(start_paused = true)]
async fn a_lease_whose_row_is_locked_lasts_as_long_as_it_did() {
    let locked = || Some(Renewal::Unknown);
    let scene = Scene {
        runs_for: LEASE * 2,
        renewals: std::iter::repeat_with(locked)
            .take(8)
            .chain(std::iter::repeat_with(|| Some(Renewal::Renewed)).take(20))
            .collect(),
        ..Scene::default()
    };
    assert_eq!(play(scene).await.0, done());
    let scene = Scene {
        renewals: std::iter::repeat_with(locked).take(100).collect(),
        ..Scene::default()
    };
    let (outcome, took) = play(scene).await;
    assert_eq!(outcome, Outcome::LeaseLost);
    assert!(took > LEASE / 2 && took < LEASE, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_was_taken_over_stops_the_run_at_once() {
    let scene = Scene {
        renewals: vec![Some(Renewal::Lost)],
        ..Scene::default()
    };
    let (outcome, took) = play(scene).await;
    assert_eq!(outcome, Outcome::LeaseLost);
    assert!(took <= LEASE / 4, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_run_over_its_timeout_is_stopped_and_timed_out() {
    let scene = Scene {
        timeout: Some(Duration::from_secs(20)),
        stops_within: HOURS,
        ..Scene::default()
    };
    let (outcome, took) = play(scene).await;
    assert_eq!(outcome, Outcome::TimedOut);
    assert_eq!(took.as_secs(), 20 + STOP_GRACE.as_secs());
}

/// Scenes in which a timeout, a person or the shutdown asks the run to stop.
fn asked_to_stop(stops_within: Duration) -> [(Outcome, Scene); 3] {
    let stopping = CancellationToken::new();
    stopping.cancel();
    let scene = || Scene {
        stops_within,
        ..Scene::default()
    };
    let timed_out = Scene {
        timeout: Some(Duration::from_secs(20)),
        ..scene()
    };
    let cancelled = Scene {
        is_cancelled: true,
        ..scene()
    };
    let interrupted = Scene {
        stopping,
        ..scene()
    };
    [
        (Outcome::TimedOut, timed_out),
        (Outcome::Cancelled, cancelled),
        (Outcome::Interrupted, interrupted),
    ]
}

#[tokio::test(start_paused = true)]
async fn a_run_that_succeeds_within_the_stop_grace_has_succeeded() {
    for (early, scene) in asked_to_stop(STOP_GRACE / 2) {
        let (outcome, took) = play(scene).await;
        assert_eq!(outcome, done(), "{early:?}");
        assert!(took < HOURS, "{early:?}: it was asked to stop");
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_ignores_the_stop_is_abandoned_after_the_grace() {
    for (early, scene) in asked_to_stop(HOURS) {
        let (outcome, took) = play(scene).await;
        assert_eq!(outcome, early);
        assert!(took >= STOP_GRACE && took < LEASE, "{early:?}: {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_success_after_the_lease_was_lost_does_not_count() {
    let scene = Scene {
        renewals: vec![Some(Renewal::Lost)],
        stops_within: STOP_GRACE / 2,
        ..Scene::default()
    };
    assert_eq!(play(scene).await.0, Outcome::LeaseLost);
}
