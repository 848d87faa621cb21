//! Random interleavings of what several workers do with a few keys, compared
//! with a small model after every step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::runtime::Runtime;
use trainyard::job::{Claim, ClaimRequest, Fence, FinalState, Job, JobKey};
use trainyard::outcome::Ending;
use trainyard::store::{ClaimTerms, Finish, Reach, Store};
use uuid::Uuid;

use crate::support::database::{Database, Tables};
use crate::support::jobs::{LONG, interrupted, pass_the_lease, request_of};

const KEYS: [&str; 2] = ["a", "b"];
const WORKERS: usize = 3;
const MAX_CRASHES: u32 = 3;
const STEPS: usize = 30;

#[test]
fn sqlite_keeps_to_the_model() {
    run_cases(64, Database::sqlite);
}

#[test]
fn postgres_keeps_to_the_model() {
    run_cases(24, Database::postgres);
}

/// All cases in one database, each in a subscription of its own.
fn run_cases(cases: u32, database: impl AsyncFn() -> Option<Database>) {
    let runtime = Runtime::new().unwrap();
    let Some(database) = runtime.block_on(database()) else {
        return;
    };
    let store = runtime.block_on(database.open_migrated());
    let tables = runtime.block_on(database.tables());
    // A failure prints its smallest steps; they are the seed to keep.
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

#[derive(Debug, Clone)]
enum Step {
    Claim {
        worker: usize,
        key: usize,
    },
    /// The holder sends its claim again, as after a lost answer.
    ClaimAgain {
        key: usize,
    },
    Expire {
        key: usize,
    },
    Reap {
        worker: usize,
    },
    /// With the worker's fence that is so many claims old.
    Write {
        write: Write,
        worker: usize,
        key: usize,
        age: usize,
    },
}

#[derive(Debug, Clone, Copy)]
enum Write {
    Renew,
    Finish(FinalState),
    Release,
}

fn step() -> impl Strategy<Value = Step> {
    let (worker, key) = (0..WORKERS, 0..KEYS.len());
    let write = prop_oneof![
        3 => Just(Write::Renew),
        1 => prop_oneof![Just(FinalState::Succeeded), Just(FinalState::Dead)].prop_map(Write::Finish),
        2 => Just(Write::Release),
    ];
    let age = prop_oneof![3 => Just(0_usize), 1 => 1..4_usize];
    prop_oneof![
        4 => (worker.clone(), key.clone()).prop_map(|(worker, key)| Step::Claim { worker, key }),
        1 => key.clone().prop_map(|key| Step::ClaimAgain { key }),
        3 => key.clone().prop_map(|key| Step::Expire { key }),
        2 => worker.clone().prop_map(|worker| Step::Reap { worker }),
        6 => (write, worker, key, age)
            .prop_map(|(write, worker, key, age)| Step::Write { write, worker, key, age }),
    ]
}

/// What the model knows of one key that has been claimed.
#[derive(Debug, Clone, PartialEq)]
struct Known {
    job_id: Uuid,
    state: Option<FinalState>,
    attempt: u32,
    interruptions: u32,
    crashes: u32,
    duplicates: u32,
    /// The fence that writes are accepted of.
    holder: Option<Fence>,
    expired: bool,
    /// The fence that ended the job, if a run did.
    ended_by: Option<Fence>,
}

impl Known {
    fn is_free(&self) -> bool {
        self.state.is_none() && (self.holder.is_none() || self.expired)
    }

    /// What a claim does to a free job: whether it is acquired.
    fn take_over(&mut self) -> bool {
        self.crashes += u32::from(self.holder.is_some());
        if self.crashes >= MAX_CRASHES {
            self.end(FinalState::Dead);
            return false;
        }
        self.attempt += 1;
        self.expired = false;
        true
    }

    fn end(&mut self, state: FinalState) {
        assert_eq!(self.state, None, "a job ends once");
        self.state = Some(state);
        self.holder = None;
    }
}

struct Case<'a> {
    store: &'a Arc<dyn Store>,
    tables: &'a Tables,
    subscription: String,
    known: BTreeMap<usize, Known>,
    /// Every fence that a worker was ever given.
    given: Vec<(usize, Fence)>,
    /// Jobs as they were when first seen ended.
    ended: BTreeMap<usize, Job>,
}

impl<'a> Case<'a> {
    fn new(store: &'a Arc<dyn Store>, tables: &'a Tables) -> Self {
        Self {
            store,
            tables,
            subscription: Uuid::new_v4().to_string(),
            known: BTreeMap::new(),
            given: Vec::new(),
            ended: BTreeMap::new(),
        }
    }

    fn key(&self, key: usize) -> JobKey {
        JobKey::new(&self.subscription, KEYS[key])
    }

    async fn take(&mut self, step: &Step) {
        match *step {
            Step::Claim { worker, key } => self.claim(worker, key).await,
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
        }
    }

    async fn send(&self, request: &ClaimRequest, worker: usize) -> Claim {
        let requests = std::slice::from_ref(request);
        let claims = self.store.claim(requests, &terms(worker)).await.unwrap();
        claims.into_iter().next().unwrap()
    }

    async fn claim(&mut self, worker: usize, key: usize) {
        let request = request_of(&self.subscription, KEYS[key]);
        let answer = self.send(&request, worker).await;
        let known = self.known.entry(key).or_insert_with(|| Known {
            job_id: request.job_id,
            state: None,
            attempt: 0,
            interruptions: 0,
            crashes: 0,
            duplicates: 0,
            holder: None,
            expired: false,
            ended_by: None,
        });
        if known.is_free() && known.take_over() {
            let Claim::Acquired(acquired) = answer else {
                panic!("a free job was not acquired: {answer:?}");
            };
            assert_eq!(acquired.job_id, known.job_id);
            assert_eq!(
                acquired.fence.attempt, known.attempt,
                "attempts grow by one"
            );
            assert_eq!(acquired.fence.token, request.token);
            known.holder = Some(acquired.fence.clone());
            self.given.push((worker, acquired.fence));
            return;
        }
        known.duplicates += 1;
        match known.state {
            Some(state) => assert_eq!(answer, Claim::AlreadyFinished(state)),
            None => assert!(matches!(answer, Claim::HeldUntil { .. }), "{answer:?}"),
        }
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
            ..request_of(&self.subscription, KEYS[key])
        };
        let owner = self.given.iter().find(|(_, given)| *given == fence);
        let answer = self.send(&request, owner.unwrap().0).await;
        assert!(matches!(answer, Claim::Acquired(acquired) if acquired.fence == fence));
        if let Some(known) = self.known.get_mut(&key) {
            known.expired = false;
        }
    }

    async fn expire(&mut self, key: usize) {
        self.tables
            .end_lease(&self.key(key), Duration::from_secs(1))
            .await;
        if let Some(known) = self.known.get_mut(&key) {
            known.expired = true;
        }
    }

    async fn reap(&mut self, worker: usize) {
        let reach = Reach {
            subscriptions: BTreeMap::from([(self.subscription.clone(), None)]),
            tasks: BTreeMap::from([("train".to_owned(), 100)]),
        };
        let reaped = self.store.reap(&reach, &terms(worker), KEYS.len()).await;
        let mut reaped: BTreeMap<JobKey, Fence> = reaped
            .unwrap()
            .into_iter()
            .map(|orphan| (orphan.acquired.fence.key.clone(), orphan.acquired.fence))
            .collect();
        for (key, known) in &mut self.known {
            if !known.is_free() || !known.take_over() {
                continue;
            }
            let name = JobKey::new(&self.subscription, KEYS[*key]);
            let fence = reaped.remove(&name).unwrap();
            assert_eq!(fence.attempt, known.attempt, "attempts grow by one");
            known.holder = Some(fence.clone());
            self.given.push((worker, fence));
        }
        assert!(reaped.is_empty(), "reaped, though not free: {reaped:?}");
    }

    /// A write is accepted of the holder alone (I3). That its fence changes
    /// nothing otherwise is checked against the tables after the step.
    async fn write(&mut self, write: Write, key: usize, fence: Fence) {
        let Some(known) = self.known.get_mut(&key) else {
            return;
        };
        let holds = known.holder.as_ref() == Some(&fence);
        match write {
            Write::Renew => {
                let renewed = self.store.renew(&[fence], LONG).await.unwrap();
                assert_eq!(renewed, [holds]);
                known.expired &= !holds;
            }
            Write::Release => {
                assert_eq!(
                    self.store.release(&interrupted(&fence)).await.unwrap(),
                    holds
                );
                if holds {
                    known.holder = None;
                    known.interruptions += 1;
                }
                // Times are whole milliseconds on SQLite.
                pass_the_lease().await;
            }
            Write::Finish(state) => {
                let ending = Ending {
                    state,
                    reason: None,
                    error: None,
                    result: None,
                };
                let finishes = [Finish {
                    fence: fence.clone(),
                    ending,
                    checkpoint: None,
                    dead_letter_topic: None,
                }];
                let confirmed = known.ended_by.as_ref() == Some(&fence);
                let answers = self.store.finish(&finishes).await.unwrap();
                assert_eq!(answers, [holds || confirmed]);
                if holds {
                    known.end(state);
                    known.ended_by = Some(fence);
                }
            }
        }
    }

    async fn check(&mut self) {
        let rows = self.rows().await;
        assert_eq!(rows.len(), self.known.len());
        for (key, known) in &self.known {
            let row = rows.iter().find(|row| row.key == KEYS[*key]).unwrap();
            assert_eq!(*row, Row::expected(KEYS[*key], known));
            let Some(state) = known.state else { continue };
            let mut job = self.store.job(known.job_id).await.unwrap().unwrap();
            assert_eq!(job.attempts, known.attempt - known.interruptions);
            assert_eq!(job.state.as_str(), state.as_str());
            // Duplicates go on being counted; nothing else changes (I2).
            job.duplicates = 0;
            assert_eq!(self.ended.entry(*key).or_insert(job.clone()), &job);
        }
    }

    async fn rows(&self) -> Vec<Row> {
        let (now, subscription) = (self.tables.ago(Duration::ZERO), &self.subscription);
        let sql = format!(
            "SELECT m.key, m.job_id, m.state, m.duplicates, m.finished_by,
                    l.key IS NOT NULL AS leased, l.attempt, l.interruptions, l.crashes, l.token,
                    coalesce(l.token IS NOT NULL AND l.lease_until < {now}, false) AS expired
             FROM processed_messages m LEFT JOIN leases l USING (subscription, key)
             WHERE subscription = '{subscription}'"
        );
        self.tables.fetch(sql).await
    }
}

/// What the tables hold of one key.
#[derive(Debug, PartialEq, sqlx::FromRow)]
struct Row {
    key: String,
    job_id: Uuid,
    state: String,
    duplicates: i32,
    finished_by: Option<Uuid>,
    leased: bool,
    attempt: Option<i32>,
    interruptions: Option<i32>,
    crashes: Option<i32>,
    token: Option<Uuid>,
    expired: bool,
}

impl Row {
    /// The state is open exactly while there is a lease row.
    fn expected(key: &str, known: &Known) -> Self {
        let open = known.state.is_none();
        let live = |number: u32| open.then_some(number.cast_signed());
        Self {
            key: key.to_owned(),
            job_id: known.job_id,
            state: known.state.map_or("open", FinalState::as_str).to_owned(),
            duplicates: known.duplicates.cast_signed(),
            finished_by: known.ended_by.as_ref().map(|fence| fence.token),
            leased: open,
            attempt: live(known.attempt),
            interruptions: live(known.interruptions),
            crashes: live(known.crashes),
            token: known.holder.as_ref().map(|fence| fence.token),
            expired: known.holder.is_some() && known.expired,
        }
    }
}

fn terms(worker: usize) -> ClaimTerms {
    ClaimTerms {
        worker: format!("w{worker}").into(),
        lease: LONG,
        max_crashes: MAX_CRASHES,
    }
}
