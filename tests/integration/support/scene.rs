//! A broker with one subscription, a database, and a folder for workers.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use google_cloud_pubsub::model::Subscription;
use serde_json::Value;
use trainyard::record::{Job, JobFilter, JobState};
use trainyard::store::Store;
use trainyard_emulator::Faults;
use uuid::Uuid;

use super::broker::Broker;
use super::database::Database;
use super::eventually;
use super::proxy::LossyProxy;
use super::runs::{RunEvent, RunLine, RunsLog};
use super::worker::{Output, WorkerProcess, Yard};

/// The name of a scene's subscription and of its topic.
pub const SUBSCRIPTION: &str = "training";

/// The configuration of a scene's workers.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub slots: usize,
    pub lease: &'static str,
    pub stop_grace: &'static str,
    pub shutdown_grace: &'static str,
    pub max_crashes: u32,
    pub prefetch: usize,
    pub quiet_limit: &'static str,
    pub ack: &'static str,
    pub ack_deadline: &'static str,
    pub backoff: &'static str,
    /// More lines of [worker].
    pub worker: &'static str,
    /// More lines of the subscription's section.
    pub subscription: &'static str,
    /// More lines of [tasks.rehearsal], and sections after it.
    pub task: &'static str,
}

/// Shortens the recovery from a crash.
pub const FAST: Settings = Settings {
    slots: 1,
    lease: "3s",
    stop_grace: "500ms",
    shutdown_grace: "5s",
    max_crashes: 3,
    prefetch: 0,
    quiet_limit: "10m",
    ack: "after_run",
    ack_deadline: "10s",
    backoff: "{ initial = \"10ms\", max = \"50ms\" }",
    worker: "",
    subscription: "",
    task: "",
};

/// For tests without a crash: no lease expires, however slow the machine is.
pub const CALM: Settings = Settings {
    lease: "60s",
    ..FAST
};

/// For runs that may take long to stop.
pub const PATIENT: Settings = Settings {
    slots: 2,
    stop_grace: "10s",
    shutdown_grace: "10s",
    ..CALM
};

/// Settings of a worker whose jobs can soon be taken over.
const SHORT_LEASE: [(&str, &str); 2] = [
    ("TRAINYARD__WORKER__LEASE", "6s"),
    ("TRAINYARD__WORKER__STOP_GRACE", "1s"),
];

impl Settings {
    fn toml(&self, name: &str) -> String {
        let Self {
            slots,
            lease,
            stop_grace,
            shutdown_grace,
            max_crashes,
            prefetch,
            quiet_limit,
            ack,
            ack_deadline,
            backoff,
            worker,
            subscription,
            task,
        } = self;
        format!(
            "[worker]\nslots = {slots}\nlease = \"{lease}\"\nstop_grace = \"{stop_grace}\"\nshutdown_grace = \"{shutdown_grace}\"\n{worker}\n\
             [guard]\nmax_crashes = {max_crashes}\n\
             [subscriptions.{name}]\nack_deadline = \"{ack_deadline}\"\nprefetch = {prefetch}\nquiet_limit = \"{quiet_limit}\"\n{subscription}\n\
             [tasks.rehearsal]\nbuiltin = \"rehearsal\"\nack = \"{ack}\"\nbackoff = {backoff}\n{task}\n"
        )
    }
}

pub struct Scene {
    pub broker: Broker,
    subscription: String,
    pub store: Arc<dyn Store>,
    pub yard: Yard,
    pub runs: RunsLog,
    /// Jobs of earlier scenes in the same database.
    others: BTreeSet<Uuid>,
}

impl Scene {
    /// None without Postgres.
    pub async fn on_postgres(settings: &Settings) -> Option<Self> {
        Self::subscribed(Subscription::new(), settings).await
    }

    /// As [`Scene::on_postgres`], with a subscription like the given one plus the
    /// broker's dead-letter policy.
    pub async fn subscribed(subscription: Subscription, settings: &Settings) -> Option<Self> {
        let database = Database::postgres().await?;
        let broker = Broker::builtin().await.unwrap();
        let policy = broker.dead_letter_policy().await;
        let subscription = subscription.set_dead_letter_policy(policy);
        broker.subscribe_like(SUBSCRIPTION, subscription).await;
        Some(Self::set(broker, SUBSCRIPTION, &database, &database, settings).await)
    }

    /// Workers reach the database through a proxy. None without Postgres.
    pub async fn behind_a_proxy(settings: &Settings) -> Option<(LossyProxy, Self)> {
        let database = Database::postgres().await?;
        let proxy = LossyProxy::in_front_of(&database.url).await;
        let behind = Database::at(proxy.url.clone());
        let scene = Self::reached_by(&database, &behind, settings).await;
        Some((proxy, scene))
    }

    /// On the built-in emulator, with the broker's dead-letter policy.
    pub async fn new(database: &Database, settings: &Settings) -> Self {
        Self::reached_by(database, database, settings).await
    }

    /// The test uses `database` itself; workers reach it as `workers_see`.
    pub async fn reached_by(
        database: &Database,
        workers_see: &Database,
        settings: &Settings,
    ) -> Self {
        let broker = Broker::builtin().await.unwrap();
        broker.subscribe_with_policy(SUBSCRIPTION).await;
        Self::set(broker, SUBSCRIPTION, database, workers_see, settings).await
    }

    /// On any broker, without its dead-letter policy.
    pub async fn on(broker: Broker, database: &Database, settings: &Settings) -> Self {
        broker.subscribe(SUBSCRIPTION).await;
        Self::set(broker, SUBSCRIPTION, database, database, settings).await
    }

    /// On a broker that has the subscription.
    pub async fn set(
        broker: Broker,
        subscription: &str,
        database: &Database,
        workers_see: &Database,
        settings: &Settings,
    ) -> Self {
        let store = database.open_migrated().await;
        let yard = Yard::new(&broker, workers_see, &settings.toml(subscription));
        let runs = RunsLog::in_folder(yard.folder.path());
        let mut scene = Self {
            broker,
            subscription: subscription.to_owned(),
            store,
            yard,
            runs,
            others: BTreeSet::new(),
        };
        scene.others = scene.jobs().await.iter().map(|job| job.id).collect();
        scene
    }

    pub fn start_worker(&self, name: &str) -> WorkerProcess {
        self.yard.start_worker(name)
    }

    pub fn start_worker_with(&self, name: &str, variables: &[(&str, &str)]) -> WorkerProcess {
        self.yard.start_worker_with(name, variables)
    }

    /// A worker that will be killed or frozen, and whose jobs can then soon be taken over.
    pub fn start_doomed_worker(&self, name: &str) -> WorkerProcess {
        self.start_worker_with(name, &SHORT_LEASE)
    }

    /// A worker that pulls already.
    pub async fn ready_worker(&self, name: &str) -> WorkerProcess {
        let worker = self.start_worker(name);
        worker.says("ready").await;
        worker
    }

    /// Sets the faults of the broker, which must be the built-in one.
    pub fn misbehaves(&self, faults: Faults) {
        self.broker.builtin.as_ref().unwrap().set_faults(faults);
    }

    pub async fn publish(&self, request: String) -> String {
        self.broker.publish(&self.subscription, request).await
    }

    pub async fn publish_all(&self, requests: Vec<String>) -> Vec<String> {
        self.broker.publish_all(&self.subscription, requests).await
    }

    /// Publishes a rehearsal with these fields that writes to the scene's log.
    pub async fn publish_rehearsal(&self, fields: Value) -> String {
        self.publish(self.runs.rehearsal(fields)).await
    }

    pub async fn publish_run(&self, seconds: f64) -> String {
        self.publish(self.runs.request(seconds)).await
    }

    /// Waits until this many runs have started, and returns those starts.
    pub async fn runs_have_started(&self, how_many: usize) -> Vec<RunLine> {
        self.runs_have_come_to(RunEvent::Start, how_many).await
    }

    pub async fn runs_have_come_to(&self, event: RunEvent, how_many: usize) -> Vec<RunLine> {
        eventually(
            &format!("{how_many} runs have come to {event:?}"),
            async || {
                let lines = self.runs.of(event);
                (lines.len() >= how_many).then_some(lines)
            },
        )
        .await
    }

    pub async fn jobs(&self) -> Vec<Job> {
        let filter = JobFilter {
            limit: 10_000,
            ..JobFilter::default()
        };
        let mut jobs = self.store.jobs(&filter).await.unwrap();
        jobs.retain(|job| job.subscription == self.subscription && !self.others.contains(&job.id));
        jobs
    }

    /// The job of a message, once it is in that state.
    pub async fn job(&self, message_id: &str, state: JobState) -> Job {
        eventually(&format!("message {message_id} is {state}"), async || {
            let mut jobs = self.jobs().await.into_iter();
            jobs.find(|job| job.message_id == message_id && job.state == state)
        })
        .await
    }

    pub async fn only_job_ends(&self, state: JobState) -> Job {
        eventually(&format!("the only job is {state}"), async || {
            let mut jobs = self.jobs().await;
            assert!(jobs.len() <= 1, "{jobs:#?}");
            jobs.pop().filter(|job| job.state == state)
        })
        .await
    }

    /// Waits until there are this many jobs and all have succeeded.
    pub async fn all_succeed(&self, how_many: usize) -> Vec<Job> {
        eventually(&format!("all {how_many} jobs have succeeded"), async || {
            let jobs = self.jobs().await;
            let done = jobs.iter().filter(|job| job.state == JobState::Succeeded);
            (done.count() == how_many && jobs.len() == how_many).then_some(jobs)
        })
        .await
    }

    /// Waits until there are this many jobs and all have ended, however.
    pub async fn all_end(&self, how_many: usize) -> Vec<Job> {
        eventually(&format!("all {how_many} jobs have ended"), async || {
            let jobs = self.jobs().await;
            let ended = |job: &&Job| !matches!(job.state, JobState::Running | JobState::Waiting);
            (jobs.iter().filter(ended).count() == how_many).then_some(jobs)
        })
        .await
    }

    /// The labels of the runs that began, in order.
    pub fn started(&self) -> Vec<String> {
        let starts = self.runs.of(RunEvent::Start).into_iter();
        starts.filter_map(|line| line.label).collect()
    }

    /// How many of the published messages are outstanding at workers or acknowledged.
    pub fn taken(&self, published: usize) -> usize {
        let backlog = self.broker.backlog(&self.subscription);
        published + self.broker.outstanding(&self.subscription) - backlog
    }

    pub fn failed_deliveries(&self) -> u64 {
        self.broker.failed_deliveries(&self.subscription)
    }

    /// Waits until every message is acknowledged; the broker must have given up none.
    pub async fn nothing_is_left_to_deliver(&self) {
        eventually("every message is acknowledged", async || {
            (self.broker.backlog(&self.subscription) == 0).then_some(())
        })
        .await;
        let given_up = self.broker.given_up();
        assert_eq!(given_up, 0, "messages that the broker gave up");
    }

    /// Waits until `trainyard explain` shows all these events, in this order.
    pub async fn is_explained_by(&self, message_id: &str, events: &[&str]) -> String {
        eventually(&format!("explain tells {events:?}"), async || {
            let told = self.yard.output(&["explain", message_id]).await.stdout;
            appear_in_order(&told, events).then_some(told)
        })
        .await
    }

    pub async fn command(&self, arguments: &[&str]) -> Output {
        self.yard.output(arguments).await
    }

    pub fn folder(&self) -> &Path {
        self.yard.folder.path()
    }
}

fn appear_in_order(text: &str, parts: &[&str]) -> bool {
    let mut rest = text;
    parts.iter().all(|part| {
        let found = rest.find(part);
        rest = found.map_or("", |at| &rest[at + part.len()..]);
        found.is_some()
    })
}
