//! Random interleavings of actions by several workers and people on a few keys, compared
//! with a small model after every step.

mod known;
mod steps;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::collection::vec;
use proptest::test_runner::{Config, TestRunner};
use tokio::runtime::Runtime;
use trainyard::job::{
    Acquired, Can, Claim, ClaimRequest, Fence, FinalState, JobKey, Limits, Renewal,
};
use trainyard::outcome::Ending;
use trainyard::record::{Cancelling, Job, Retrying};
use trainyard::store::{ClaimTerms, Finish, Finished, Reach, Store};
use uuid::Uuid;

use crate::support::database::{Database, Tables};
use crate::support::jobs::{LONG, failed, interrupted, reap_within, request_of, task_terms};
use known::{Known, Row};
use steps::{Step, Write, step};

/// Each with its ordering key.
const KEYS: [(&str, &str); 5] = [
    ("a", ""),
    ("b", "k"),
    ("c", "k"),
    ("d", "k"),
    ("e", "other"),
];
const WORKERS: usize = 3;
const MAX_CRASHES: u32 = 3;
const MAX_ATTEMPTS: u32 = 4;
const STEPS: usize = 60;

#[test]
fn sqlite_keeps_to_the_model() {
    run_cases(64, Database::sqlite);
}

#[test]
fn postgres_keeps_to_the_model() {
    run_cases(24, Database::postgres);
}

#[test]
fn postgres_behind_a_pooler_keeps_to_the_model() {
    run_cases(6, Database::behind_a_pooler);
}

/// All cases share one database, each with its own subscription.
fn run_cases(cases: u32, database: impl AsyncFn() -> Option<Database>) {
    let runtime = Runtime::new().unwrap();
    let Some(database) = runtime.block_on(database()) else {
        return;
    };
    let store = runtime.block_on(database.open_migrated());
    let tables = runtime.block_on(database.tables());
    // A failure prints its smallest steps, which reproduce it.
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 400,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&vec(step(), STEPS), |steps| {
            runtime.block_on(run_case(&store, &tables, &steps));
            Ok(())
        })
        .unwrap();
}

async fn run_case(store: &Arc<dyn Store>, tables: &Tables, steps: &[Step]) {
    let mut case = Case::new(store, tables);
    for step in steps {
        case.take(step).await;
        case.check().await;
    }
}

struct Case<'a> {
    store: &'a Arc<dyn Store>,
    tables: &'a Tables,
    subscription: String,
    known: BTreeMap<usize, Known>,
    /// How many places within ordering keys were given out.
    positions: usize,
    /// Every fence that a worker was ever given.
    given: Vec<(usize, Fence)>,
    /// Jobs as first seen ended.
    ended: BTreeMap<usize, Job>,
}

impl<'a> Case<'a> {
    fn new(store: &'a Arc<dyn Store>, tables: &'a Tables) -> Self {
        Self {
            store,
            tables,
            subscription: Uuid::new_v4().to_string(),
            known: BTreeMap::new(),
            positions: 0,
            given: Vec::new(),
            ended: BTreeMap::new(),
        }
    }

    fn key(&self, key: usize) -> JobKey {
        JobKey::new(&self.subscription, KEYS[key].0)
    }

    fn request(&self, key: usize) -> ClaimRequest {
        let (name, ordering_key) = KEYS[key];
        let mut request = request_of(&self.subscription, name);
        request.message.ordering_key = ordering_key.to_owned();
        request.limits = Limits {
            max_attempts: MAX_ATTEMPTS,
            dead_letter_topic: None,
        };
        request
    }

    fn next_position(&mut self) -> usize {
        self.positions += 1;
        self.positions
    }

    /// Whether a claim may take the job: it is due, and its turn has come.
    fn is_free(&self, key: usize) -> bool {
        let known = &self.known[&key];
        known.state.is_none() && known.is_due && !self.has_to_wait(key)
    }

    /// Whether an earlier job of its ordering key has not ended.
    fn has_to_wait(&self, key: usize) -> bool {
        let known = &self.known[&key];
        let is_earlier = |(other, earlier): (&usize, &Known)| {
            earlier.state.is_none()
                && KEYS[*other].1 == KEYS[key].1
                && earlier.position < known.position
        };
        let is_ordered = !KEYS[key].1.is_empty();
        is_ordered && self.known.iter().any(is_earlier)
    }

    async fn take(&mut self, step: &Step) {
        match *step {
            Step::Claim {
                worker,
                key,
                has_room,
            } => self.claim(worker, key, has_room).await,
            Step::ClaimAgain { key } => self.claim_again(key).await,
            Step::Expire { key } => self.expire(key).await,
            Step::Reap { worker } => self.reap(worker).await,
            Step::Write {
                write,
                worker,
                key,
                age,
            } => {
                let wanted = self.key(key);
                let mut given = self.given.iter().rev();
                let fence = given
                    .by_ref()
                    .filter(|(owner, fence)| *owner == worker && fence.key == wanted)
                    .nth(age);
                if let Some((_, fence)) = fence.cloned() {
                    self.write(write, key, fence).await;
                }
            }
            Step::Cancel { key } => self.cancel(key).await,
            Step::Retry { key } => self.retry(key).await,
        }
    }

    async fn send(&self, request: &ClaimRequest, worker: usize) -> Claim {
        let requests = std::slice::from_ref(request);
        let claims = self.store.claim(requests, &terms(worker)).await.unwrap();
        claims.into_iter().next().unwrap()
    }

    async fn claim(&mut self, worker: usize, key: usize, has_room: bool) {
        let mut request = self.request(key);
        if !has_room {
            request.can = Can::Record;
        }
        let answer = self.send(&request, worker).await;
        if !self.known.contains_key(&key) {
            let position = self.next_position();
            self.known.insert(key, Known::new(request.job_id, position));
        }
        let is_free = has_room && self.is_free(key);
        let known = self.known.get_mut(&key).unwrap();
        if is_free && known.take_over() {
            let Claim::Acquired(acquired) = answer else {
                panic!("a free job was not acquired: {answer:?}");
            };
            assert_eq!(acquired.fence.token, request.token);
            self.acquired(worker, key, acquired);
            return;
        }
        known.duplicates += u32::from(!known.waits());
        match known.state {
            Some(state) => assert_eq!(answer, Claim::AlreadyFinished(state)),
            None if known.waits() => assert!(matches!(answer, Claim::Waiting { .. }), "{answer:?}"),
            None => assert!(matches!(answer, Claim::RunningUntil { .. }), "{answer:?}"),
        }
    }

    /// Checks that a job was taken as in the model.
    fn acquired(&mut self, worker: usize, key: usize, acquired: Acquired) {
        let known = self.known.get_mut(&key).unwrap();
        let fence = acquired.fence;
        assert_eq!(acquired.job_id, known.job_id);
        assert_eq!(fence.attempt, known.attempt, "attempts grow by one");
        assert_eq!(acquired.counted_attempts, known.counted_attempts());
        assert_eq!(acquired.checkpoint.as_deref(), known.checkpoint.as_deref());
        assert_eq!(acquired.cancel_requested, known.cancel_requested);
        known.holder = Some(fence.clone());
        self.given.push((worker, fence));
    }

    async fn claim_again(&mut self, key: usize) {
        let Some(known) = self.known.get(&key) else {
            return;
        };
        let Some(fence) = known.holder.clone() else {
            return;
        };
        let request = ClaimRequest {
            token: fence.token,
            ..self.request(key)
        };
        let owner = self.given.iter().find(|(_, given)| *given == fence);
        let answer = self.send(&request, owner.unwrap().0).await;
        assert!(matches!(answer, Claim::Acquired(acquired) if acquired.fence == fence));
        if let Some(known) = self.known.get_mut(&key) {
            known.is_due = false;
        }
    }

    async fn expire(&mut self, key: usize) {
        self.tables
            .end_lease(&self.key(key), Duration::from_secs(1))
            .await;
        if let Some(known) = self.known.get_mut(&key) {
            known.is_due = true;
        }
    }

    async fn reap(&mut self, worker: usize) {
        let reach = Reach {
            subscriptions: BTreeMap::from([(self.subscription.clone(), None)]),
            tasks: BTreeMap::from([("train".to_owned(), task_terms(MAX_ATTEMPTS))]),
        };
        let reaped = reap_within(self.store, &reach, &terms(worker), KEYS.len()).await;
        let mut reaped: BTreeMap<JobKey, Acquired> = reaped
            .into_iter()
            .map(|reaped| (reaped.acquired.fence.key.clone(), reaped.acquired))
            .collect();
        // A job whose turn comes because this parks another is left to the next take.
        let keys: Vec<usize> = self.known.keys().copied().collect();
        let free: Vec<usize> = keys.into_iter().filter(|key| self.is_free(*key)).collect();
        for key in free {
            if self.known.get_mut(&key).unwrap().take_over() {
                let acquired = reaped.remove(&self.key(key)).unwrap();
                self.acquired(worker, key, acquired);
            }
        }
        assert!(reaped.is_empty(), "reaped, though not free: {reaped:?}");
    }

    /// Only the holder's write is accepted (I3). The step's check against the tables
    /// shows that any other fence changes nothing.
    async fn write(&mut self, write: Write, key: usize, fence: Fence) {
        let Some(known) = self.known.get_mut(&key) else {
            return;
        };
        let store = self.store;
        let holds = known.holder.as_ref() == Some(&fence);
        let confirmed = known.ended_by.as_ref() == Some(&fence);
        match write {
            Write::Renew => {
                let renewed = store.renew(std::slice::from_ref(&fence), LONG).await;
                let expected = match holds {
                    true => Renewal::Renewed,
                    false => Renewal::Lost,
                };
                assert_eq!(renewed.unwrap(), [expected]);
                known.is_due &= !holds;
            }
            Write::SaveCheckpoint => {
                let checkpoint = format!("of attempt {}", fence.attempt);
                let saved = store.save_checkpoint(&fence, &checkpoint, false).await;
                assert_eq!(saved.unwrap(), holds);
                if holds {
                    known.checkpoint = Some(checkpoint);
                }
            }
            Write::Release => {
                let released = store.release(&interrupted(&fence)).await;
                assert_eq!(released.unwrap(), holds);
                if holds {
                    known.wait(true);
                    known.interruptions += 1;
                }
            }
            Write::Fail => {
                let failed = store.release(&failed(&fence, "failed", LONG)).await;
                assert_eq!(failed.unwrap(), holds);
                if holds {
                    known.wait(false);
                }
            }
            Write::Finish(state) => {
                let finished = store.finish(&[finish(&fence, state)]).await;
                let expected = match holds || confirmed {
                    true => Finished::Ended,
                    false => Finished::NotMine,
                };
                assert_eq!(finished.unwrap(), [expected]);
                if holds {
                    known.end(state, Some(fence));
                }
            }
        }
    }

    async fn cancel(&mut self, key: usize) {
        let Some(known) = self.known.get_mut(&key) else {
            return;
        };
        let expected = match known.state {
            Some(state) => Cancelling::AlreadyEnded(state),
            None if known.is_held() => Cancelling::Requested,
            None => Cancelling::Cancelled,
        };
        let cancelling = self.store.cancel(known.job_id, "anna").await.unwrap();
        assert_eq!(cancelling, Some(expected));
        match expected {
            Cancelling::Requested => known.cancel_requested = true,
            Cancelling::Cancelled => known.end(FinalState::Cancelled, None),
            Cancelling::AlreadyEnded(_) => {}
        }
    }

    async fn retry(&mut self, key: usize) {
        let position = self.next_position();
        let Some(known) = self.known.get_mut(&key) else {
            return;
        };
        let expected = match known.state {
            Some(_) => Retrying::Queued,
            None if known.waits() => Retrying::Hurried,
            None => Retrying::Running,
        };
        let retrying = self.store.retry(known.job_id, "anna").await.unwrap();
        assert_eq!(retrying, Some(expected));
        match expected {
            Retrying::Queued => {
                known.reopen(position);
                self.ended.remove(&key);
            }
            Retrying::Hurried => known.is_due = true,
            Retrying::Running | Retrying::NothingToRun => {}
        }
    }

    async fn check(&mut self) {
        let now = self.tables.ago(Duration::ZERO);
        let rows: Vec<Row> = self
            .tables
            .fetch(Row::query(&self.subscription, &now))
            .await;
        assert_eq!(rows.len(), self.known.len());
        for (key, known) in &self.known {
            let row = rows.iter().find(|row| row.key == KEYS[*key].0).unwrap();
            assert_eq!(*row, Row::expected(*key, known, self.has_to_wait(*key)));
            let mut job = self.store.job(known.job_id).await.unwrap().unwrap();
            assert_eq!(job.attempts, known.counted_attempts());
            assert_eq!(job.checkpoint, known.checkpoint);
            let Some(state) = known.state else { continue };
            assert_eq!(job.state.as_str(), state.as_str());
            // Duplicates are still counted; otherwise only a retry changes an ended job
            // (I2).
            job.duplicates = 0;
            assert_eq!(self.ended.entry(*key).or_insert(job.clone()), &job);
        }
        self.check_what_runs();
    }

    /// At most one job of an ordering key runs at any time.
    fn check_what_runs(&self) {
        let mut running: Vec<&str> = self
            .known
            .iter()
            .filter(|(key, known)| known.holder.is_some() && !KEYS[**key].1.is_empty())
            .map(|(key, _)| KEYS[*key].1)
            .collect();
        let all = running.len();
        running.dedup();
        assert_eq!(running.len(), all, "{:?}", self.known);
    }
}

fn finish(fence: &Fence, state: FinalState) -> Finish {
    Finish {
        fence: fence.clone(),
        ending: Ending {
            state,
            reason: None,
            error: None,
            result: None,
        },
        checkpoint: None,
        dead_letter_topic: None,
    }
}

fn terms(worker: usize) -> ClaimTerms {
    ClaimTerms {
        worker: format!("w{worker}").into(),
        lease: LONG,
        max_crashes: MAX_CRASHES,
    }
}
