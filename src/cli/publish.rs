use anyhow::Context;
use clap::Args;
use tokio::io::AsyncReadExt;

use super::{Shared, print};
use crate::app;
use crate::message::Request;
use crate::printable::line;
use crate::pubsub::{Connection, Outgoing, PubsubError};

/// Publish a training request.
///
/// Examples:
///   trainyard publish heavy-task '{"name":"train-classifier", …}'
///   trainyard publish heavy-task @request.json
///   make-request | trainyard publish heavy-task -
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Publish {
    /// A topic, or a subscription of the topic
    #[arg(value_name = "SUBSCRIPTION_OR_TOPIC")]
    target: String,
    /// The payload: a JSON object whose `name` is the task's name; @FILE reads it from a
    /// file, - from stdin
    json: String,
    /// An attribute of the message; may be repeated
    #[arg(long = "attribute", value_name = "KEY=VALUE", value_parser = key_value)]
    attributes: Vec<(String, String)>,
    /// The message's ordering key in Pub/Sub
    #[arg(
        long,
        value_name = "KEY",
        default_value = "",
        hide_default_value = true
    )]
    ordering_key: String,
    /// Publish invalid data too, for tests
    #[arg(long)]
    raw: bool,
}

impl Publish {
    pub(super) async fn execute(self, shared: &Shared) -> anyhow::Result<()> {
        let data = payload(self.json).await?;
        if !self.raw {
            check_payload(&data)?;
        }
        let config = shared.load()?;
        let connection = app::connection(&config)?;
        let topic = topic_for(&connection, &self.target).await?;
        let message = Outgoing {
            data,
            attributes: self.attributes,
            ordering_key: self.ordering_key,
        };
        let id = connection.publish(&topic, message).await?;
        print(&line(&format!("published message {id} to {topic}")))
    }
}

async fn payload(argument: String) -> anyhow::Result<Vec<u8>> {
    if argument == "-" {
        let mut data = Vec::new();
        let reading = tokio::io::stdin().read_to_end(&mut data).await;
        reading.context("the payload cannot be read from stdin")?;
        return Ok(data);
    }
    match argument.strip_prefix('@') {
        None => Ok(argument.into_bytes()),
        Some(file) => tokio::fs::read(file)
            .await
            .with_context(|| format!("the payload cannot be read from {file}")),
    }
}

/// Refuses a payload that a worker would refuse.
fn check_payload(data: &[u8]) -> anyhow::Result<()> {
    let decoded = Request::decode(data);
    decoded.context(
        "a worker would refuse this payload (check the shell's quotes, too); --raw publishes it anyway",
    )?;
    Ok(())
}

async fn topic_for(connection: &Connection, target: &str) -> anyhow::Result<String> {
    let parts: Vec<&str> = target.split('/').collect();
    match parts[..] {
        [_] | ["projects", _, "topics", _] => {}
        ["projects", _, "subscriptions", _] => return topic_of(connection, target).await,
        _ => anyhow::bail!(
            "write a name, projects/PROJECT/topics/NAME or projects/PROJECT/subscriptions/NAME, not `{target}`"
        ),
    }
    match connection.topic_exists(target).await {
        // A publisher may lack the permission to read topics.
        Ok(true) | Err(PubsubError::PermissionDenied { .. }) => {
            return Ok(connection.topic_path(target));
        }
        Ok(false) => {}
        Err(other) => return Err(other.into()),
    }
    match topic_of(connection, target).await {
        Err(error) if is_missing(&error) => anyhow::bail!(
            "project {} has neither a topic nor a subscription `{target}`",
            connection.project()
        ),
        found => found,
    }
}

async fn topic_of(connection: &Connection, subscription: &str) -> anyhow::Result<String> {
    let facts = connection.subscription(subscription).await?;
    anyhow::ensure!(
        !facts.has_lost_its_topic(),
        "the topic of subscription {subscription} is deleted"
    );
    Ok(facts.topic)
}

fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(PubsubError::NotFound { .. }))
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or("write the attribute as KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_that_no_worker_could_run_is_not_published() {
        for json in ["{", "[]", "{}", r#"{"name":1}"#] {
            assert!(check_payload(json.as_bytes()).is_err(), "{json}");
        }
        check_payload(br#"{"name":"t"}"#).unwrap();
    }

    #[test]
    fn an_attribute_may_contain_an_equals_sign() {
        assert_eq!(key_value("k=a=b"), Ok(("k".to_owned(), "a=b".to_owned())));
        assert!(key_value("k").is_err());
    }
}
