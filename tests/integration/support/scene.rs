//! A broker, a database and a folder for workers, with one subscription.

use std::sync::Arc;

use google_cloud_pubsub::model::Subscription;
use trainyard::record::{Job, JobFilter, JobState};
use trainyard::store::Store;
use trainyard_emulator::Faults;

use super::broker::Broker;
use super::database::Database;
use super::eventually;
use super::proxy::LossyProxy;
use super::runs::{RunEvent, RunLine, RunsLog};
use super::worker::{WorkerProcess, Yard};

pub const SUBSCRIPTION: &str = "rehearsals";

/// Worker settings that shorten the recovery from a crash.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub slots: usize,
    pub lease: &'static str,
    pub shutdown_grace: &'static str,
    pub max_crashes: u32,
    pub prefetch: usize,
    pub quiet_limit: &'static str,
    pub ack: &'static str,
    pub ack_deadline: &'static str,
    /// More lines of the subscription's section.
    pub subscription: &'static str,
    /// More lines of [tasks.rehearsal], and sections after it.
    pub task: &'static str,
}

pub const FAST: Settings = Settings {
    slots: 1,
    lease: "3s",
    shutdown_grace: "5s",
    max_crashes: 3,
    prefetch: 0,
    quiet_limit: "10m",
    ack: "after_run",
    ack_deadline: "10s",
    subscription: "",
    task: "",
};

/// For tests without a crash: no lease expires, however slow the machine is.
pub const CALM: Settings = Settings {
    lease: "60s",
    ..FAST
};

impl Settings {
    fn toml(&self, name: &str) -> String {
        let Self {
            slots,
            lease,
            shutdown_grace,
            max_crashes,
            prefetch,
            quiet_limit,
            ack,
            ack_deadline,
            subscription,
            task,
        } = self;
        format!(
            "[worker]\nslots = {slots}\nlease = \"{lease}\"\nstop_grace = \"500ms\"\nshutdown_grace = \"{shutdown_grace}\"\n\
             [guard]\nmax_crashes = {max_crashes}\n\
             [subscriptions.{name}]\nack_deadline = \"{ack_deadline}\"\nprefetch = {prefetch}\nquiet_limit = \"{quiet_limit}\"\n{subscription}\n\
             [tasks.rehearsal]\nbuiltin = \"rehearsal\"\nack = \"{ack}\"\n{task}\n"
        )
    }
}

pub struct Scene {
    pub broker: Broker,
    subscription: String,
    pub store: Arc<dyn Store>,
    pub yard: Yard,
    pub runs: RunsLog,
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
        let scene = Self::new(&database, &behind, settings).await;
        Some((proxy, scene))
    }

    /// The test uses `database` itself; workers reach it as `workers_see`.
    pub async fn new(database: &Database, workers_see: &Database, settings: &Settings) -> Self {
        let broker = Broker::builtin().await.unwrap();
        broker.subscribe_with_policy(SUBSCRIPTION).await;
        Self::set(broker, SUBSCRIPTION, database, workers_see, settings).await
    }

    /// On a broker that has the subscription and its dead-letter policy. Scenes with
    /// differently named subscriptions can share a database.
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
        Self {
            broker,
            subscription: subscription.to_owned(),
            store,
            yard,
            runs,
        }
    }

    /// A worker that pulls already.
    pub async fn ready_worker(&self, name: &str) -> WorkerProcess {
        let worker = self.yard.start_worker(name);
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
        jobs.retain(|job| job.subscription == self.subscription);
        jobs
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
}

fn appear_in_order(text: &str, parts: &[&str]) -> bool {
    let mut rest = text;
    parts.iter().all(|part| {
        let found = rest.find(part);
        rest = found.map_or("", |at| &rest[at + part.len()..]);
        found.is_some()
    })
}
