//! Compares what is configured with what exists in Pub/Sub: at the start, rather than
//! during pulling.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::invalid;
use crate::config::{Config, ConfigError, in_days};
use crate::pubsub::{Connection, PubsubError, SubscriptionFacts};

/// With fewer, a few crashes or restarts of workers use them up.
const ENOUGH_DELIVERY_ATTEMPTS: u32 = 20;

/// What Pub/Sub tells of the subscriptions in the configuration, by their names there.
/// Those that this user may not look at are missing.
pub(crate) type KnownSubscriptions = BTreeMap<String, SubscriptionFacts>;

/// Checks a subscription that is configured under this name, and adds it to the `known`
/// ones. Returns warnings; one is that this user may pull or publish, but not look.
///
/// # Errors
/// [`ConfigError`] if the worker cannot work with it; any other error if Pub/Sub cannot be
/// reached.
pub(crate) async fn check(
    connection: &Connection,
    name: &str,
    config: &Config,
    known: &mut KnownSubscriptions,
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
    if let Some(facts) = facts {
        if let Some(sent_to) = facts.sent_to {
            return Err(invalid(&format!(
                "subscription {name} cannot be pulled, as Pub/Sub sends its messages to {sent_to}: make it a pull subscription, or correct [subscriptions.{name}]"
            )));
        }
        concerns.extend(concerns_about(&facts, config));
        known.insert(name.to_owned(), facts);
    }
    if let Some(topic) = dead_letter_topic(config, name) {
        concerns.extend(check_dead_letter_topic(connection, name, topic).await?);
    }
    Ok(concerns)
}

fn dead_letter_topic<'a>(config: &'a Config, name: &str) -> Option<&'a str> {
    config.subscriptions.get(name)?.dead_letter_topic.as_deref()
}

/// A circle of dead letters never ends: each dead message comes back as a new one. Follows
/// `dead_letter_topic` and Pub/Sub's own policies, through the configured subscriptions.
///
/// # Errors
/// There is one.
pub(crate) fn check_circles(
    connection: &Connection,
    config: &Config,
    known: &KnownSubscriptions,
) -> Result<(), ConfigError> {
    let next = |name: &str| {
        let topic = dead_letter_topic(config, name).map(|topic| connection.topic_path(topic));
        let given_up_to = known.get(name).and_then(|facts| facts.given_up_to.clone());
        let topics = [topic, given_up_to];
        let fed = known
            .iter()
            .filter(move |(_, facts)| topics.iter().flatten().any(|topic| *topic == facts.topic));
        fed.map(|(name, _)| name.as_str()).collect()
    };
    match known.keys().find_map(|start| circle(start, &next)) {
        None => Ok(()),
        Some(circle) => Err(ConfigError::Invalid(format!(
            "dead messages would come back as new ones, for ever: {}; set another `dead_letter_topic`, or change the dead-letter policy in Pub/Sub",
            told(&circle)
        ))),
    }
}

/// The shortest way from `start` back to it.
fn circle<'a>(start: &'a str, next: &impl Fn(&str) -> Vec<&'a str>) -> Option<Vec<&'a str>> {
    let mut seen = BTreeSet::new();
    let mut ways = VecDeque::from([vec![start]]);
    while let Some(way) = ways.pop_front() {
        for name in next(way.last()?) {
            if name == start {
                return Some(way);
            }
            if seen.insert(name) {
                ways.push_back([way.as_slice(), &[name]].concat());
            }
        }
    }
    None
}

fn told(circle: &[&str]) -> String {
    if let [alone] = circle {
        return format!("those of [subscriptions.{alone}] go to its own topic");
    }
    let nexts = circle.iter().cycle().skip(1);
    let steps = circle.iter().zip(nexts).map(|(from, to)| {
        format!("those of [subscriptions.{from}] go to the topic of [subscriptions.{to}]")
    });
    steps.collect::<Vec<_>>().join(", ")
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
    if facts.has_lost_its_topic() {
        concerns.push(
            "it needs a person's help: its topic is deleted, so nothing new will ever arrive: create topic and subscription again"
                .to_owned(),
        );
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn circle_of(edges: &[(&'static str, &'static str)]) -> Option<String> {
        let next = |name: &str| {
            let from = edges.iter().filter(|(from, _)| *from == name);
            from.map(|(_, to)| *to).collect()
        };
        let found = edges.iter().find_map(|(start, _)| circle(start, &next));
        found.map(|circle| circle.join(" "))
    }

    #[test]
    fn a_circle_is_found_wherever_it_is() {
        assert_eq!(circle_of(&[("a", "b"), ("b", "c"), ("a", "c")]), None);
        assert_eq!(circle_of(&[("a", "a")]).unwrap(), "a");
        let behind = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "b")];
        assert_eq!(circle_of(&behind).unwrap(), "b c d");
    }

    #[test]
    fn a_circle_is_told_step_by_step() {
        assert!(told(&["a"]).ends_with("its own topic"));
        let told = told(&["a", "b"]);
        assert!(told.contains("[subscriptions.a] go to the topic of [subscriptions.b], "));
        assert!(told.ends_with("[subscriptions.b] go to the topic of [subscriptions.a]"));
    }
}
