use anyhow::Context;
use clap::Args;

use super::{Shared, print};
use crate::app;
use crate::message::Request;
use crate::printable::line;
use crate::pubsub::{Connection, Outgoing, PubsubError};

/// Publish a training request.
///
/// Example: trainyard publish heavy-task '{"name":"train-classifier", …}'
#[derive(Debug, Args)]
pub(super) struct Publish {
    /// A topic, or a subscription of the topic
    #[arg(value_name = "SUBSCRIPTION_OR_TOPIC")]
    target: String,
    /// The payload: a JSON object whose `name` is the task's name
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
        if !self.raw {
            check_payload(&self.json)?;
        }
        let config = shared.load()?;
        let connection = app::connection(&config)?;
        let topic = topic_for(&connection, &self.target).await?;
        let message = Outgoing {
            data: self.json.into_bytes(),
            attributes: self.attributes,
            ordering_key: self.ordering_key,
        };
        let id = connection.publish(&topic, message).await?;
        print(&line(&format!("published message {id} to {topic}")))
    }
}

/// Refuses a payload that a worker would refuse.
fn check_payload(json: &str) -> anyhow::Result<()> {
    let decoded = Request::decode(json.as_bytes());
    decoded.context(
        "a worker would refuse this payload (check the shell's quotes, too); --raw publishes it anyway",
    )?;
    Ok(())
}

async fn topic_for(connection: &Connection, target: &str) -> anyhow::Result<String> {
    match connection.topic_exists(target).await {
        // A publisher may lack the permission to read topics.
        Ok(true) | Err(PubsubError::PermissionDenied { .. }) => {
            return Ok(connection.topic_path(target));
        }
        Ok(false) => {}
        Err(other) => return Err(other.into()),
    }
    match connection
        .subscription(target)
        .await
        .map(|facts| facts.topic)
    {
        Ok(topic) => Ok(topic),
        Err(PubsubError::NotFound { .. }) => anyhow::bail!(
            "project {} has neither a topic nor a subscription `{target}`",
            connection.project()
        ),
        Err(other) => Err(other.into()),
    }
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
            assert!(check_payload(json).is_err(), "{json}");
        }
        check_payload(r#"{"name":"t"}"#).unwrap();
    }

    #[test]
    fn an_attribute_may_contain_an_equals_sign() {
        assert_eq!(key_value("k=a=b"), Ok(("k".to_owned(), "a=b".to_owned())));
        assert!(key_value("k").is_err());
    }
}
