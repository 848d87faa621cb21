//! Checks for invalid values. Keys and types are checked before.

mod tasks;

use std::time::Duration;

use super::error::{ConfigError, bad_value};
use super::{Config, Subscription};
use crate::database_url;

/// Pub/Sub's limits for a stream's ack deadline.
/// <https://cloud.google.com/pubsub/docs/reference/rpc/google.pubsub.v1#streamingpullrequest>
const ACK_DEADLINES: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(600);

/// An ordinary pause of the database must not make a lease expire.
const MIN_LEASE: Duration = Duration::from_secs(2);

/// Catches a wrong unit.
const MIN_RETENTION: Duration = Duration::from_secs(60 * 60);

/// Each worker holds these messages in memory, with their data.
const MAX_PREFETCH: usize = 10_000;

/// Each is extended and looked after.
const MAX_MAX_WAITING: usize = 10_000;

const MIN_QUIET_LIMIT: Duration = Duration::from_secs(10);

/// With a longer lease, a dead worker's job would wait too long.
const MAX_LEASE: Duration = Duration::from_secs(24 * 60 * 60);

/// Longer times are slips, and too long for clocks.
const MAX_TIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Checks that the configuration can work.
///
/// # Errors
/// The first problem found, with its key and what to set instead.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    check_database(config)?;
    check_worker(config)?;
    check_times(config)?;
    if config.guard.retention < MIN_RETENTION {
        return bad_value(
            "guard.retention",
            "it must be at least 1h: a message that is redelivered later runs a second time",
        );
    }
    if config.guard.max_crashes == 0 {
        return bad_value("guard.max_crashes", "it must be at least 1");
    }
    for (name, subscription) in &config.subscriptions {
        check_subscription(name, subscription)?;
    }
    for (name, task) in &config.tasks {
        tasks::check(name, task, &config.worker)?;
    }
    Ok(())
}

fn check_times(config: &Config) -> Result<(), ConfigError> {
    let worker = &config.worker;
    let mut times = vec![
        ("worker.shutdown_grace".to_owned(), worker.shutdown_grace),
        (
            "worker.unknown_task_patience".to_owned(),
            worker.unknown_task_patience,
        ),
        ("worker.reserve_after".to_owned(), worker.reserve_after),
        ("guard.retention".to_owned(), config.guard.retention),
    ];
    for (name, subscription) in &config.subscriptions {
        let key = format!("subscriptions.{name}.quiet_limit");
        times.push((key, subscription.quiet_limit));
    }
    for (name, task) in &config.tasks {
        let limits = [
            ("timeout", task.timeout),
            ("stall_timeout", task.stall_timeout),
            ("backoff.max", Some(task.backoff.max)),
        ];
        let limits = limits.into_iter();
        times.extend(limits.filter_map(|(key, time)| Some((format!("tasks.{name}.{key}"), time?))));
    }
    match times.iter().find(|(_, time)| *time > MAX_TIME) {
        Some((key, _)) => bad_value(key, "it must be at most 10 years"),
        None => Ok(()),
    }
}

fn check_subscription(name: &str, subscription: &Subscription) -> Result<(), ConfigError> {
    let key = |key: &str| format!("subscriptions.{name}.{key}");
    if !ACK_DEADLINES.contains(&subscription.ack_deadline) {
        return bad_value(&key("ack_deadline"), "it must be between 10s and 10m");
    }
    if subscription.prefetch > MAX_PREFETCH {
        return bad_value(&key("prefetch"), "it must be at most 10000");
    }
    if subscription.concurrency == Some(0) {
        return bad_value(
            &key("concurrency"),
            "it must be at least 1; remove it for no limit",
        );
    }
    if !(1..=MAX_MAX_WAITING).contains(&subscription.max_waiting) {
        return bad_value(
            &key("max_waiting"),
            "it must be between 1 and 10000: with none, a busy worker pulls nothing",
        );
    }
    if subscription.quiet_limit < MIN_QUIET_LIMIT {
        return bad_value(
            &key("quiet_limit"),
            "it must be at least 10s: a new connection costs more than an idle stream",
        );
    }
    if subscription.dead_letter_topic.as_deref() == Some("") {
        return bad_value(&key("dead_letter_topic"), "it is empty; remove it for none");
    }
    Ok(())
}

fn check_database(config: &Config) -> Result<(), ConfigError> {
    if let Some(problem) = database_url::problem(&config.database.url) {
        return bad_value("database.url", &problem);
    }
    if config.database.max_connections == 0 {
        return bad_value("database.max_connections", "it must be at least 1");
    }
    Ok(())
}

fn check_worker(config: &Config) -> Result<(), ConfigError> {
    let worker = &config.worker;
    if !(1..=10_000).contains(&worker.slots) {
        return bad_value("worker.slots", "it must be between 1 and 10000");
    }
    if worker.lease < MIN_LEASE {
        return bad_value("worker.lease", "it must be at least 2s");
    }
    if worker.lease > MAX_LEASE {
        return bad_value(
            "worker.lease",
            "it must be at most 1d: a dead worker's job waits this long",
        );
    }
    if worker.lease < worker.stop_grace.saturating_mul(3) {
        return bad_value(
            "worker.lease",
            "it must be at least three times worker.stop_grace, so that a run that loses its lease ends before another starts",
        );
    }
    if worker.stop_grace > worker.shutdown_grace {
        return bad_value(
            "worker.stop_grace",
            "it must be at most worker.shutdown_grace, which includes it",
        );
    }
    Ok(())
}
