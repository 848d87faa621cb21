//! One broker with one subscription, one database, a folder for workers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use trainyard::record::{Job, JobFilter, JobState};
use trainyard::store::Store;
use uuid::Uuid;

use super::broker::Broker;
use super::database::Database;
use super::eventually;
use super::runs::{RunEvent, RunsLog};
use super::worker::{Output, WorkerProcess, Yard};

/// The name of a scene's subscription and of its topic.
pub const TRAINING: &str = "training";

pub struct Scene {
    pub broker: Broker,
    pub store: Arc<dyn Store>,
    pub yard: Yard,
    pub runs: RunsLog,
    log: PathBuf,
    /// Jobs of other scenes in the same database.
    others: BTreeSet<Uuid>,
}

/// Settings of a worker whose jobs can soon be taken over.
const SHORT_LEASE: [(&str, &str); 2] = [
    ("TRAINYARD__WORKER__LEASE", "6s"),
    ("TRAINYARD__WORKER__STOP_GRACE", "1s"),
];

/// The configuration of workers whose jobs are retried at once. Their leases are so long
/// that none expires, however slow the machine is.
#[derive(Clone)]
pub struct Sections {
    pub slots: usize,
    /// More lines of [worker].
    pub worker: &'static str,
    /// More lines of [subscriptions.training].
    pub subscription: &'static str,
    /// More lines of [tasks.rehearsal].
    pub task: &'static str,
}

impl Default for Sections {
    fn default() -> Self {
        Self {
            slots: 2,
            worker: "",
            subscription: "",
            task: "",
        }
    }
}

impl Sections {
    fn toml(&self) -> String {
        let Self {
            slots,
            worker,
            subscription,
            task,
        } = self;
        format!(
            "[worker]\nslots = {slots}\nlease = \"60s\"\nstop_grace = \"10s\"\nshutdown_grace = \"10s\"\n{worker}\n\
             [subscriptions.{TRAINING}]\nack_deadline = \"10s\"\n{subscription}\n\
             [tasks.rehearsal]\nbuiltin = \"rehearsal\"\nbackoff = {{ initial = \"10ms\", max = \"50ms\" }}\n{task}\n"
        )
    }
}

impl Scene {
    /// On the built-in emulator.
    pub async fn new(database: &Database, sections: &Sections) -> Self {
        let broker = Broker::builtin().await.unwrap();
        Self::on(broker, database, sections).await
    }

    pub async fn on(broker: Broker, database: &Database, sections: &Sections) -> Self {
        broker.subscribe(TRAINING).await;
        Self::on_subscribed(broker, database, sections).await
    }

    /// On a broker that has the subscription already.
    pub async fn on_subscribed(broker: Broker, database: &Database, sections: &Sections) -> Self {
        let store = database.open_migrated().await;
        let yard = Yard::new(&broker, database, &sections.toml());
        let log = yard.folder.path().join("runs.jsonl");
        let mut scene = Self {
            broker,
            store,
            runs: RunsLog::in_folder(yard.folder.path()),
            yard,
            log,
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

    /// A worker that will be killed or frozen.
    pub fn start_doomed_worker(&self, name: &str) -> WorkerProcess {
        self.start_worker_with(name, &SHORT_LEASE)
    }

    /// A rehearsal with these fields that writes to the scene's log.
    pub fn rehearsal(&self, fields: Value) -> Value {
        let mut request = json!({"name": "rehearsal", "log": self.log});
        let fields = fields.as_object().unwrap().clone();
        request.as_object_mut().unwrap().extend(fields);
        request
    }

    /// Publishes such a rehearsal and returns the message's id.
    pub async fn publish(&self, fields: Value) -> String {
        let request = self.rehearsal(fields).to_string();
        self.broker.publish(TRAINING, request).await
    }

    pub async fn jobs(&self) -> Vec<Job> {
        let filter = JobFilter {
            limit: 10_000,
            ..JobFilter::default()
        };
        let mut jobs = self.store.jobs(&filter).await.unwrap();
        jobs.retain(|job| !self.others.contains(&job.id));
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

    pub async fn all_succeed(&self, how_many: usize) -> Vec<Job> {
        eventually(&format!("{how_many} jobs have succeeded"), async || {
            let jobs = self.jobs().await;
            let done = jobs.iter().filter(|job| job.state == JobState::Succeeded);
            (done.count() == how_many && jobs.len() == how_many).then_some(jobs)
        })
        .await
    }

    /// The labels of the runs that began, in order.
    pub fn started(&self) -> Vec<String> {
        let starts = self.runs.of(RunEvent::Start).into_iter();
        starts.filter_map(|line| line.label).collect()
    }

    pub async fn nothing_is_left_to_deliver(&self) {
        eventually("every message is acknowledged", async || {
            (self.broker.backlog(TRAINING) == 0).then_some(())
        })
        .await;
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
