//! Crashes, freezes and outages, and what becomes of the messages.

mod checker;
mod database_away;
mod failpoints;
mod frozen;
mod killed;
mod killed_often;
mod lost_replies;
mod many_subscriptions;
mod marathon;
mod outage;
mod rolling_restart;
mod same_job;

use crate::support::scene::{FAST, SUBSCRIPTION, Scene, Settings};
use crate::support::worker::WorkerProcess;

/// A worker that takes lost jobs over and keeps them, however slow the machine is.
fn start_heir(scene: &Scene, name: &str) -> WorkerProcess {
    let long_lease = [("TRAINYARD__WORKER__LEASE", "20s")];
    scene.start_worker_with(name, &long_lease)
}
