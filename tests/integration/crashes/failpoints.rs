//! Workers that die at each step of a message's life, for each ack timing.

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZero;
use std::panic::AssertUnwindSafe;
use std::sync::LazyLock;
use std::time::Duration;

use futures::FutureExt;
use futures::future::join_all;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::sleep;
use trainyard::failpoint::Step;
use trainyard::record::Job;
use uuid::Uuid;

use super::checker::violations;
use super::{FAST, Scene, Settings, start_heir};
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::runs::RunEvent;
use crate::support::worker::{Death, WorkerProcess};
use crate::support::{eventually, has_failpoints, seeded};

const MESSAGES: usize = 6;
/// With `after_checkpoint`, the other messages have no checkpoint and are acked at their
/// end.
const CHECKPOINTED: usize = 3;
/// A step's first hit, and other hits drawn at random.
const ROUNDS: usize = 3;
/// Scenes mostly wait for leases and ack deadlines to end, but a slow machine cannot start
/// the workers of all at once.
static SCENES_AT_A_TIME: LazyLock<Semaphore> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    Semaphore::new((10 * cores).min(40))
});
/// Shorter than the ack deadline. A slow worker can renew it too, until it dies.
const LEASE: &str = "6s";
const SIGABRT: i32 = 6;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_run_survives_a_death_at_each_step() {
    every_step_is_survived("before_run").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_checkpoint_survives_a_death_at_each_step() {
    every_step_is_survived("after_checkpoint").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_run_survives_a_death_at_each_step() {
    every_step_is_survived("after_run").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_steps_between_two_writes_are_survived_on_sqlite() {
    if !has_failpoints() {
        return;
    }
    let scenes = CORE.into_iter().map(|(ack, step)| {
        let playing = async move {
            let database = Database::sqlite().await.unwrap();
            let broker = Broker::builtin().await.unwrap();
            play(Plan::first(ack, step), broker, &database).await;
        };
        playing.boxed_local()
    });
    all_end_well(scenes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_steps_between_two_writes_are_survived_on_googles_emulator() {
    if !has_failpoints() {
        return;
    }
    let scenes = CORE.into_iter().map(|(ack, step)| {
        let playing = async move {
            let places = (Broker::google().await, Database::postgres().await);
            if let (Some(broker), Some(database)) = places {
                play(Plan::first(ack, step), broker, &database).await;
            }
        };
        playing.boxed_local()
    });
    all_end_well(scenes).await;
}

/// Steps at which the database knows something that the broker does not know yet.
const CORE: [(&str, Step); 5] = [
    ("before_run", Step::AfterClaim),
    ("before_run", Step::AfterAck),
    ("after_checkpoint", Step::BeforeAck),
    ("after_run", Step::BeforeFinish),
    ("after_run", Step::BeforeFinalAck),
];

/// How often workers pass a step until all messages have run: never if the ack timing has
/// no such step.
fn passes(ack: &str, step: Step) -> usize {
    let acked_early = match ack {
        "before_run" => MESSAGES,
        "after_checkpoint" => CHECKPOINTED,
        _ => 0,
    };
    match step {
        Step::BeforeAck | Step::AfterAck => acked_early,
        Step::BeforeFinalAck => MESSAGES - acked_early,
        _ => MESSAGES,
    }
}

/// Whether a worker that dies at this step leaves a job that it began.
fn has_begun(step: Step) -> bool {
    !matches!(
        step,
        Step::AfterReceive | Step::AfterFinish | Step::BeforeFinalAck
    )
}

/// Where a worker dies.
#[derive(Debug, Clone, Copy)]
struct Plan {
    ack: &'static str,
    step: Step,
    nth: usize,
    slots: usize,
}

impl Plan {
    fn first(ack: &'static str, step: Step) -> Self {
        Self {
            ack,
            step,
            nth: 1,
            slots: 1,
        }
    }

    fn drawn(ack: &'static str, step: Step, random: &mut fastrand::Rng) -> Self {
        Self {
            ack,
            step,
            nth: random.usize(1..=passes(ack, step).max(1)),
            slots: random.usize(1..=3),
        }
    }

    fn is_passed(self) -> bool {
        passes(self.ack, self.step) > 0
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = self.step.as_str();
        write!(f, "{}, {step}@{}, {} slots", self.ack, self.nth, self.slots)
    }
}

async fn every_step_is_survived(ack: &'static str) {
    if !has_failpoints() {
        return;
    }
    let mut random = seeded();
    let mut plans = Vec::new();
    for step in Step::ALL {
        plans.push(Plan::first(ack, step));
        if passes(ack, step) > 0 {
            plans.extend((1..ROUNDS).map(|_| Plan::drawn(ack, step, &mut random)));
        }
    }
    let Some(database) = Database::postgres().await else {
        return;
    };
    let database = &database;
    database.open_migrated().await;
    let scenes = plans.into_iter().map(|plan| {
        let playing = async move {
            let _place = SCENES_AT_A_TIME.acquire().await.unwrap();
            let broker = Broker::builtin().await.unwrap();
            play(plan, broker, database).await;
        };
        playing.boxed_local()
    });
    all_end_well(scenes).await;
}

/// Runs the scenes concurrently, each to its end, even if others fail.
async fn all_end_well(scenes: impl IntoIterator<Item = impl Future<Output = ()>>) {
    let scenes = scenes.into_iter().map(AssertUnwindSafe);
    let ended = join_all(scenes.map(FutureExt::catch_unwind)).await;
    let failed = ended.iter().filter(|ended| ended.is_err()).count();
    assert_eq!(failed, 0, "scenes that failed; each says above why");
}

/// Reports which scene a panic belongs to.
struct Narrator(Plan);

impl Drop for Narrator {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("that was: {}", self.0);
        }
    }
}

async fn play(plan: Plan, broker: Broker, database: &Database) {
    let _narrator = Narrator(plan);
    // Its own, since other scenes may use the same database.
    let subscription = format!("rehearsals-{}", Uuid::new_v4().simple());
    broker.subscribe_with_policy(&subscription).await;
    let settings = Settings {
        slots: plan.slots,
        ack: plan.ack,
        lease: LEASE,
        ..FAST
    };
    let scene = Scene::set(broker, &subscription, database, database, &settings).await;
    let published = scene.publish_all(requests(&scene, plan.ack)).await;
    let failpoint = format!("{}@{}", plan.step.as_str(), plan.nth);
    let environment = [("TRAINYARD_FAILPOINT", failpoint.as_str())];
    let victim = scene.start_worker_with("victim", &environment);
    match plan.is_passed() {
        true => dies_and_is_replaced(&scene, plan, &published, victim).await,
        false => lives(&scene, &published, victim).await,
    }
}

/// Requests the runs; the checkpointed ones go on until they are released.
fn requests(scene: &Scene, ack: &str) -> Vec<String> {
    let request = |number: usize| match is_checkpointed(ack, number) {
        true => {
            let more = json!({"checkpoint_after": 0});
            scene.runs.waiting(&number.to_string(), more)
        }
        false => scene.runs.request(0.02),
    };
    (0..MESSAGES).map(request).collect()
}

fn is_checkpointed(ack: &str, number: usize) -> bool {
    ack == "after_checkpoint" && number < 2 * CHECKPOINTED && number.is_multiple_of(2)
}

async fn dies_and_is_replaced(
    scene: &Scene,
    plan: Plan,
    published: &[String],
    mut victim: WorkerProcess,
) {
    let (death, status) = tokio::select! {
        died = victim.dies() => died,
        never = release_what_is_acked(scene, published) => never,
    };
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, Some(SIGABRT), "{status}");
    (0..MESSAGES).for_each(|number| scene.runs.release(&number.to_string()));

    let heir = start_heir(scene, "heir");
    let jobs = all_succeed(scene).await;
    if scene.broker.builtin.is_some() {
        scene.nothing_is_left_to_deliver().await;
    }
    check(scene, &jobs, published, &[death]).await;
    let again = jobs.iter().filter(|job| job.attempts == 2).count();
    let (least, most) = match has_begun(plan.step) {
        true => (1, plan.slots),
        false => (0, plan.slots - 1),
    };
    assert!((least..=most).contains(&again), "{again} jobs ran again");
    assert!(heir.stop().await.success());
}

async fn lives(scene: &Scene, published: &[String], mut worker: WorkerProcess) {
    let jobs = all_succeed(scene).await;
    scene.nothing_is_left_to_deliver().await;
    check(scene, &jobs, published, &[]).await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert!(worker.is_alive());
    assert!(worker.stop().await.success());
}

/// With this many scenes, polling the runs' log is cheaper than polling the tables.
async fn all_succeed(scene: &Scene) -> Vec<Job> {
    eventually("every job has come to an end", async || {
        let ends = scene.runs.of(RunEvent::End);
        let jobs: BTreeSet<Uuid> = ends.iter().map(|end| end.job).collect();
        (jobs.len() == MESSAGES).then_some(())
    })
    .await;
    scene.all_succeed(MESSAGES).await
}

/// A run that ended before its early ack would not pass the steps around it.
async fn release_what_is_acked<T>(scene: &Scene, published: &[String]) -> T {
    loop {
        for (number, id) in published.iter().enumerate() {
            let stories = scene.store.stories(id).await.unwrap();
            let mut ledger = stories.iter().flat_map(|story| &story.ledger);
            if ledger.any(|entry| entry.kind == "acked") {
                scene.runs.release(&number.to_string());
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
}

async fn check(scene: &Scene, jobs: &[Job], published: &[String], deaths: &[Death]) {
    let on_record: BTreeSet<&String> = jobs.iter().map(|job| &job.message_id).collect();
    assert_eq!(on_record, published.iter().collect(), "no message is lost");
    let attempts: Vec<(Uuid, u32)> = jobs.iter().map(|job| (job.id, job.attempts)).collect();
    let wrong = violations(&scene.runs.lines(), deaths, &attempts);
    assert!(wrong.is_empty(), "{wrong:#?}");
    for id in published {
        let stories = scene.store.stories(id).await.unwrap();
        let ledger = &stories[0].ledger;
        let endings = ledger.iter().filter(|entry| entry.kind == "finished");
        assert_eq!(endings.count(), 1, "{ledger:#?}");
    }
}
