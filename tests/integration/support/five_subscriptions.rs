use std::sync::Arc;

use trainyard::record::{Job, JobFilter};
use trainyard::store::Store;

use super::broker::Broker;
use super::database::Database;
use super::eventually;
use super::runs::RunsLog;
use super::worker::Yard;

pub const SUBSCRIPTIONS: [&str; 5] = ["one", "two", "three", "four", "five"];

/// A broker, a database and workers with five subscriptions.
pub struct FiveSubscriptions {
    pub broker: Broker,
    pub store: Arc<dyn Store>,
    pub yard: Yard,
    pub runs: RunsLog,
}

impl FiveSubscriptions {
    /// None without Postgres. The last subscription has no dead-letter policy.
    pub async fn on_postgres(slots: usize, lease: &str, ack_deadline: &str) -> Option<Self> {
        let database = Database::postgres().await?;
        let broker = Broker::builtin().await?;
        let policy = broker.dead_letter_policy().await;
        for name in &SUBSCRIPTIONS[..4] {
            let wanted = broker.wanted(name, name).await;
            let wanted = wanted.set_dead_letter_policy(policy.clone());
            broker.make(wanted).await;
        }
        broker.subscribe(SUBSCRIPTIONS[4]).await;
        let sections = SUBSCRIPTIONS
            .map(|name| format!("[subscriptions.{name}]\nack_deadline = \"{ack_deadline}\"\n"));
        let sections = format!(
            "[worker]\nslots = {slots}\nstop_grace = \"500ms\"\nlease = \"{lease}\"\n{}[tasks.rehearsal]\nbuiltin = \"rehearsal\"\n",
            sections.concat()
        );
        let yard = Yard::new(&broker, &database, &sections);
        Some(Self {
            store: database.open_migrated().await,
            runs: RunsLog::in_folder(yard.folder.path()),
            broker,
            yard,
        })
    }

    /// Publishes this many runs to each subscription.
    pub async fn publish(&self, each: usize, seconds: f64) {
        for name in SUBSCRIPTIONS {
            let requests = (0..each).map(|_| self.runs.request(seconds));
            self.broker.publish_all(name, requests.collect()).await;
        }
    }

    pub async fn nothing_is_left_to_deliver(&self) {
        eventually("no message is left", async || {
            let mut backlogs = SUBSCRIPTIONS.iter().map(|name| self.broker.backlog(name));
            backlogs.all(|backlog| backlog == 0).then_some(())
        })
        .await;
    }

    pub async fn jobs(&self) -> Vec<Job> {
        let filter = JobFilter {
            limit: 1000,
            ..JobFilter::default()
        };
        self.store.jobs(&filter).await.unwrap()
    }
}
