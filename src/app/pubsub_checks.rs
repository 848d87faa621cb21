//! Compares what is configured with what exists in Pub/Sub: at the start, rather than
//! during pulling.

use std::collections::BTreeMap;

use super::invalid;
use crate::config::{Config, ConfigError, in_days};
use crate::pubsub::{Connection, PubsubError, SubscriptionFacts};

/// With fewer, a few crashes or restarts of workers use them up.
const ENOUGH_DELIVERY_ATTEMPTS: u32 = 20;

/// Checks a subscription that is configured under this name. Returns warnings; one is
/// that this user may pull or publish, but not look.
///
/// # Errors
/// [`ConfigError`] if the worker cannot work with it; any other error if Pub/Sub cannot be
/// reached.
pub(crate) async fn check(
    connection: &Connection,
    name: &str,
    config: &Config,
) -> anyhow::Result<Vec<String>> {
    let mut concerns = Vec::new();
    let facts = match connection.subscription(name).await {
        Ok(facts) => Some(facts),
        Err(PubsubError::NotFound { what }) => {
            let missing =
                format!("{what} does not exist: create it, or correct [subscriptions.{name}]");
            return Err(invalid(&missing));
        }
        Err(denied @ PubsubError::PermissionDenied { .. }) => {
            concerns.push(format!("the subscription could not be checked: {denied}"));
            None
        }
        Err(other) => return Err(other.into()),
    };
    if let Some(facts) = &facts {
        concerns.extend(concerns_about(facts, config));
    }
    let topic = config.subscriptions.get(name);
    if let Some(topic) = topic.and_then(|subscription| subscription.dead_letter_topic.as_deref()) {
        let own = facts.as_ref().map(|facts| &*facts.topic);
        if own == Some(&connection.topic_path(topic)) {
            return Err(is_its_own(name, topic).into());
        }
        concerns.extend(check_dead_letter_topic(connection, name, topic).await?);
    }
    Ok(concerns)
}

/// Two sections for one subscription would be pulled twice, under one limit.
///
/// # Errors
/// Two sections spell the same subscription differently.
pub(crate) fn check_names(connection: &Connection, config: &Config) -> Result<(), ConfigError> {
    let mut known = BTreeMap::new();
    for name in config.subscriptions.keys() {
        if let Some(other) = known.insert(connection.subscription_path(name), name) {
            return Err(ConfigError::Invalid(format!(
                "[subscriptions.\"{other}\"] and [subscriptions.\"{name}\"] are the same subscription: keep one"
            )));
        }
    }
    Ok(())
}

fn concerns_about(facts: &SubscriptionFacts, config: &Config) -> Vec<String> {
    let mut concerns = Vec::new();
    if facts.retention > config.guard.retention {
        concerns.push(format!(
            "Pub/Sub retains messages for {}, longer than [guard] retention = {}: a message that is redelivered later runs a second time",
            in_days(facts.retention),
            in_days(config.guard.retention)
        ));
    }
    if let Some(attempts) = facts
        .max_delivery_attempts
        .filter(|attempts| *attempts < ENOUGH_DELIVERY_ATTEMPTS)
    {
        concerns.push(format!(
            "Pub/Sub's own dead-letter policy gives a message up after {attempts} deliveries, and each crash or restart of a worker that holds it uses one up: remove the policy and set `dead_letter_topic`, or allow {ENOUGH_DELIVERY_ATTEMPTS} deliveries or more"
        ));
    }
    concerns
}

fn is_its_own(name: &str, topic: &str) -> ConfigError {
    ConfigError::Invalid(format!(
        "`dead_letter_topic = \"{topic}\"` under [subscriptions.{name}] is the subscription's own topic: each dead message would come back as a new one, for ever; set another topic"
    ))
}

/// A dead message that cannot be published stays in the database, where nobody expects
/// it.
async fn check_dead_letter_topic(
    connection: &Connection,
    subscription: &str,
    topic: &str,
) -> anyhow::Result<Option<String>> {
    match connection.topic_exists(topic).await {
        Ok(true) => Ok(None),
        Ok(false) => Err(invalid(&format!(
            "topic {} does not exist: create it, or correct `dead_letter_topic` under [subscriptions.{subscription}]",
            connection.topic_path(topic)
        ))),
        Err(denied @ PubsubError::PermissionDenied { .. }) => Ok(Some(format!(
            "the topic for dead letters could not be checked: {denied}"
        ))),
        Err(other) => Err(other.into()),
    }
}
