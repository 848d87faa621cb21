//! What dies, stalls or is cut off, and what becomes of the messages.

mod checker;
mod database_away;
mod frozen;
mod killed;
mod killed_often;
mod lost_replies;
mod same_job;

use std::sync::Arc;

use trainyard::job::{Job, JobFilter, JobState};
use trainyard::store::Store;

use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::runs::{RunEvent, RunsLog};
use crate::support::worker::Yard;

const SUBSCRIPTION: &str = "rehearsals";

/// Workers' settings that make a crash's aftermath short.
struct Settings {
    slots: usize,
    lease: &'static str,
    max_crashes: u32,
    ack: &'static str,
}

const FAST: Settings = Settings {
    slots: 1,
    lease: "3s",
    max_crashes: 3,
    ack: "after_run",
};

impl Settings {
    fn toml(&self) -> String {
        let Self {
            slots,
            lease,
            max_crashes,
            ack,
        } = self;
        format!(
            "[worker]\nslots = {slots}\nlease = \"{lease}\"\nstop_grace = \"500ms\"\nshutdown_grace = \"5s\"\n\
             [guard]\nmax_crashes = {max_crashes}\n\
             [subscriptions.{SUBSCRIPTION}]\nack_deadline = \"10s\"\n\
             [tasks.rehearsal]\nbuiltin = \"rehearsal\"\nack = \"{ack}\"\n"
        )
    }
}

/// A broker, a database and a folder for workers, with one subscription.
struct Scene {
    broker: Broker,
    store: Arc<dyn Store>,
    yard: Yard,
    runs: RunsLog,
}

impl Scene {
    /// None where there is no Postgres.
    async fn on_postgres(settings: &Settings) -> Option<Self> {
        let database = Database::postgres().await?;
        Some(Self::new(&database, &database, settings).await)
    }

    /// The test looks at the database itself, the workers see it their way.
    async fn new(database: &Database, workers_see: &Database, settings: &Settings) -> Self {
        let store = database.open_migrated().await;
        let broker = Broker::builtin().await.unwrap();
        broker.subscribe(SUBSCRIPTION).await;
        let yard = Yard::new(&broker, workers_see, &settings.toml());
        let runs = RunsLog::in_folder(yard.folder.path());
        Self {
            broker,
            store,
            yard,
            runs,
        }
    }

    async fn publish_run(&self, seconds: f64) -> String {
        let request = self.runs.request(seconds);
        self.broker.publish(SUBSCRIPTION, request).await
    }

    async fn runs_have_started(&self, how_many: usize) {
        eventually(&format!("{how_many} runs have started"), async || {
            (self.runs.of(RunEvent::Start).len() >= how_many).then_some(())
        })
        .await;
    }

    async fn jobs(&self) -> Vec<Job> {
        let filter = JobFilter {
            limit: 10_000,
            ..JobFilter::default()
        };
        self.store.jobs(&filter).await.unwrap()
    }

    async fn only_job_ends(&self, state: JobState) -> Job {
        eventually(&format!("the only job is {state}"), async || {
            let mut jobs = self.jobs().await;
            assert!(jobs.len() <= 1, "{jobs:#?}");
            jobs.pop().filter(|job| job.state == state)
        })
        .await
    }

    async fn nothing_is_left_to_deliver(&self) {
        eventually("every message is acknowledged", async || {
            (self.broker.backlog(SUBSCRIPTION) == 0).then_some(())
        })
        .await;
    }

    /// Waits until `trainyard explain` tells of all these, in this order.
    async fn is_explained_by(&self, message_id: &str, events: &[&str]) -> String {
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
