//! What a configuration can get wrong although every key and type is right.

mod tasks;

use std::time::Duration;

use super::error::{ConfigError, bad_value};
use super::{Config, Subscription};

/// Pub/Sub's own limits of a stream's ack deadline.
/// <https://cloud.google.com/pubsub/docs/reference/rpc/google.pubsub.v1#streamingpullrequest>
const ACK_DEADLINES: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(600);

/// Shorter leases would be lost to an ordinary pause of the database.
const SHORTEST_LEASE: Duration = Duration::from_secs(2);

/// Far below what makes sense; guards against a slip of the unit.
const SHORTEST_RETENTION: Duration = Duration::from_secs(60 * 60);

/// Held in memory, with their data, by each worker.
const MOST_PREFETCHED: usize = 10_000;

const SHORTEST_QUIET_LIMIT: Duration = Duration::from_secs(10);

/// Longer ones would help nobody.
const LONGEST_LEASE: Duration = Duration::from_secs(24 * 60 * 60);

/// Refuses what cannot work, naming the key and what to set instead.
///
/// # Errors
/// The first problem found.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    check_database(config)?;
    check_worker(config)?;
    if config.guard.retention < SHORTEST_RETENTION {
        return bad_value(
            "guard.retention",
            "it must be at least 1h: a message that comes again after it would run a second time",
        );
    }
    if config.guard.max_crashes == 0 {
        return bad_value("guard.max_crashes", "at least 1 is needed");
    }
    for (name, subscription) in &config.subscriptions {
        check_subscription(name, subscription)?;
    }
    for (name, task) in &config.tasks {
        tasks::check(name, task, &config.worker)?;
    }
    Ok(())
}

fn check_subscription(name: &str, subscription: &Subscription) -> Result<(), ConfigError> {
    let key = |key: &str| format!("subscriptions.{name}.{key}");
    if !ACK_DEADLINES.contains(&subscription.ack_deadline) {
        return bad_value(&key("ack_deadline"), "Pub/Sub takes 10s to 10m");
    }
    if subscription.prefetch > MOST_PREFETCHED {
        return bad_value(&key("prefetch"), "it must be at most 10000");
    }
    if subscription.concurrency == Some(0) {
        return bad_value(
            &key("concurrency"),
            "at least 1 is needed; leave it out for no limit",
        );
    }
    if subscription.quiet_limit < SHORTEST_QUIET_LIMIT {
        return bad_value(
            &key("quiet_limit"),
            "it must be at least 10s: a new connection costs more than an idle stream",
        );
    }
    if subscription.dead_letter_topic.as_deref() == Some("") {
        return bad_value(
            &key("dead_letter_topic"),
            "it is empty; leave it out for none",
        );
    }
    Ok(())
}

fn check_database(config: &Config) -> Result<(), ConfigError> {
    let url = &config.database.url;
    let known = ["postgres://", "postgresql://", "sqlite:"];
    if !known.iter().any(|scheme| url.starts_with(scheme)) {
        return bad_value(
            "database.url",
            "it must begin with postgres:// or sqlite://",
        );
    }
    if config.database.max_connections == 0 {
        return bad_value("database.max_connections", "at least 1 is needed");
    }
    Ok(())
}

fn check_worker(config: &Config) -> Result<(), ConfigError> {
    let worker = &config.worker;
    if !(1..=10_000).contains(&worker.slots) {
        return bad_value("worker.slots", "it must be between 1 and 10000");
    }
    if worker.lease < SHORTEST_LEASE {
        return bad_value("worker.lease", "it must be at least 2s");
    }
    if worker.lease > LONGEST_LEASE {
        return bad_value(
            "worker.lease",
            "it must be at most 1d: so long would a dead worker's job wait",
        );
    }
    if worker.lease < worker.stop_grace.saturating_mul(3) {
        return bad_value(
            "worker.lease",
            "it must be at least three times worker.stop_grace, so that a run whose lease is lost has ended before another begins",
        );
    }
    if worker.stop_grace > worker.shutdown_grace {
        return bad_value(
            "worker.stop_grace",
            "it is a part of worker.shutdown_grace and cannot be longer than that",
        );
    }
    Ok(())
}
