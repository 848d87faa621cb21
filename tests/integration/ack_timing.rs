//! When a message is acked, and who brings an interrupted job back.

use serde_json::json;
use trainyard::record::{Job, JobFilter, JobState};
use trainyard::store::Store;

use crate::on_both_databases;
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::worker::Yard;

on_both_databases!(
    before_run_acks_while_the_job_runs,
    after_run_acks_once_the_outcome_is_written,
    an_interrupted_run_moves_to_another_worker_and_costs_no_attempt,
    a_draining_worker_pulls_no_more,
);

/// Longer than any test waits.
const FOR_EVER: f64 = 3600.0;

fn sections(ack: &str, slots: usize) -> String {
    format!(
        "[worker]\nslots = {slots}\nlease = \"6s\"\nstop_grace = \"1s\"\nshutdown_grace = \"1s\"\n\
         [subscriptions.training]\nack_deadline = \"10s\"\n\
         [tasks.rehearsal]\nbuiltin = \"rehearsal\"\nack = \"{ack}\"\n"
    )
}

fn rehearsal(seconds: f64) -> String {
    json!({"name": "rehearsal", "seconds": seconds}).to_string()
}

async fn the_job(store: &dyn Store, state: JobState) -> Job {
    let filter = JobFilter {
        limit: 10,
        ..JobFilter::default()
    };
    eventually(&format!("the job is {state}"), async || {
        let jobs = store.jobs(&filter).await.unwrap();
        jobs.into_iter().find(|job| job.state == state)
    })
    .await
}

/// How many messages the broker still has, including running ones.
fn unacked(broker: &Broker) -> usize {
    let subscription = broker.connection.subscription_path("training");
    let inside = broker.builtin.as_ref().unwrap();
    inside.backlog_len(&subscription).unwrap()
}

async fn broker() -> Broker {
    let broker = Broker::builtin().await.unwrap();
    broker.subscribe("training").await;
    broker
}

async fn nothing_is_left(broker: &Broker) {
    eventually("the message is acked", async || {
        (unacked(broker) == 0).then_some(())
    })
    .await;
}

async fn before_run_acks_while_the_job_runs(database: Database) {
    let (broker, store) = (broker().await, database.open_migrated().await);
    let yard = Yard::new(&broker, &database, &sections("before_run", 1));
    let worker = yard.start_worker("w1");
    broker.publish("training", rehearsal(FOR_EVER)).await;
    the_job(&*store, JobState::Running).await;
    nothing_is_left(&broker).await;
    assert_eq!(
        the_job(&*store, JobState::Running).await.state,
        JobState::Running
    );
    assert_eq!(worker.stop().await.code(), Some(0));
}

async fn after_run_acks_once_the_outcome_is_written(database: Database) {
    let (broker, store) = (broker().await, database.open_migrated().await);
    let yard = Yard::new(&broker, &database, &sections("after_run", 2));
    let worker = yard.start_worker("w1");
    broker.publish("training", rehearsal(FOR_EVER)).await;
    the_job(&*store, JobState::Running).await;
    // The second message starts and ends while the first one runs.
    broker.publish("training", rehearsal(0.0)).await;
    the_job(&*store, JobState::Succeeded).await;
    eventually("only the running job's message is left", async || {
        (unacked(&broker) == 1).then_some(())
    })
    .await;
    assert_eq!(worker.stop().await.code(), Some(0));
    assert_eq!(unacked(&broker), 1);
}

async fn an_interrupted_run_moves_to_another_worker_and_costs_no_attempt(database: Database) {
    for ack in ["before_run", "after_run"] {
        let (broker, store) = (broker().await, database.open_migrated().await);
        let yard = Yard::new(&broker, &database, &sections(ack, 1));
        let first = yard.start_worker("first");
        broker.publish("training", rehearsal(FOR_EVER)).await;
        let interrupted = the_job(&*store, JobState::Running).await;
        let second = yard.start_worker("second");
        assert_eq!(first.stop().await.code(), Some(0));
        let moved = eventually("the second worker runs it", async || {
            let job = store.job(interrupted.id).await.unwrap().unwrap();
            (job.state == JobState::Running && job.worker != interrupted.worker).then_some(job)
        })
        .await;
        assert_eq!(moved.attempts, 1, "{ack}");
        assert_eq!(second.stop().await.code(), Some(0));
    }
}

async fn a_draining_worker_pulls_no_more(database: Database) {
    let (broker, store) = (broker().await, database.open_migrated().await);
    let patient =
        sections("after_run", 2).replace("shutdown_grace = \"1s\"", "shutdown_grace = \"1h\"");
    let yard = Yard::new(&broker, &database, &patient);
    let draining = yard.start_worker("draining");
    broker.publish("training", rehearsal(FOR_EVER)).await;
    let long = the_job(&*store, JobState::Running).await;
    draining.signal(nix::sys::signal::Signal::SIGTERM);
    eventually("it says that it stops", async || {
        draining.log().contains("pulling has stopped").then_some(())
    })
    .await;
    let other = yard.start_worker("other");
    broker.publish("training", rehearsal(0.0)).await;
    let short = the_job(&*store, JobState::Succeeded).await;
    assert_ne!(short.worker, long.worker);
    assert_eq!(other.stop().await.code(), Some(0));
}
