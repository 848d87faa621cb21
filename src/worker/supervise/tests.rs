use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use serde_json::{Value, json};
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

/// A store that only renews, by a script; when that is used up, it is away.
#[derive(Default)]
struct Renewing {
    /// None: no answer.
    script: Mutex<VecDeque<Option<Renewal>>>,
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
        unreachable!()
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
        Outcome::Succeeded(json!("done"))
    }
}

const HOURS: Duration = Duration::from_secs(36_000);

struct Scene {
    runs_for: Duration,
    stops_within: Duration,
    timeout: Option<Duration>,
    renewals: Vec<Option<Renewal>>,
    stopping: CancellationToken,
}

impl Default for Scene {
    fn default() -> Self {
        Self {
            runs_for: HOURS,
            stops_within: Duration::ZERO,
            timeout: None,
            renewals: Vec::new(),
            stopping: CancellationToken::new(),
        }
    }
}

/// Plays the scene; returns the outcome and how long it took.
async fn play(scene: Scene) -> (Outcome, Duration) {
    let store = Arc::new(Renewing {
        script: Mutex::new(scene.renewals.into()),
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
        token: Uuid::nil(),
    };
    let mut lease = keeper.begin(&Acquired {
        fence,
        job_id: Uuid::nil(),
        claimed_at: Instant::now(),
        counted_attempts: 1,
        checkpoint: None,
        cancel_requested: false,
    });
    let keeping = tokio::spawn(keeper.run());
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
    keeping.abort();
    (outcome, began.elapsed())
}

fn done() -> Outcome {
    Outcome::Succeeded(Value::from("done"))
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

#[tokio::test(start_paused = true)]
async fn a_run_that_succeeds_within_the_stop_grace_has_succeeded() {
    let scene = Scene {
        stops_within: STOP_GRACE / 2,
        ..Scene::default()
    };
    scene.stopping.cancel();
    assert_eq!(play(scene).await.0, done());
}

#[tokio::test(start_paused = true)]
async fn a_run_that_ignores_the_stop_is_abandoned_after_the_grace() {
    let scene = Scene {
        stops_within: HOURS,
        ..Scene::default()
    };
    scene.stopping.cancel();
    let (outcome, took) = play(scene).await;
    assert_eq!(outcome, Outcome::Interrupted);
    assert_eq!(took.as_secs(), STOP_GRACE.as_secs());
}
