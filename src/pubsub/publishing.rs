//! Publishing, with one client per topic.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use google_cloud_auth::credentials::anonymous;
use google_cloud_pubsub::client::Publisher;
use google_cloud_pubsub::error::PublishError;
use google_cloud_pubsub::model;

use super::{Connection, PubsubError};

/// A message to publish.
#[derive(Debug, Clone, Default)]
pub struct Outgoing {
    pub data: Vec<u8>,
    pub attributes: Vec<(String, String)>,
    pub ordering_key: String,
}

/// Clients for publishing, one per topic. Clones share them.
#[derive(Debug, Clone)]
pub struct Publishers {
    connection: Connection,
    by_topic: Arc<Mutex<HashMap<String, Publisher>>>,
}

impl Publishers {
    #[must_use]
    pub fn new(connection: Connection) -> Self {
        Self {
            connection,
            by_topic: Arc::default(),
        }
    }

    /// `projects/P/subscriptions/NAME`, as [`Connection::subscription_path`].
    #[must_use]
    pub fn subscription_path(&self, name: &str) -> String {
        self.connection.subscription_path(name)
    }

    /// Publishes one message and returns the id that the broker gave it.
    ///
    /// # Errors
    /// The topic does not exist, may not be published to, rejects the message, or did not
    /// answer.
    pub async fn publish(&self, topic: &str, message: Outgoing) -> Result<String, PubsubError> {
        let path = self.connection.topic_path(topic);
        let publisher = self.publisher(&path).await?;
        let sent = model::Message::new()
            .set_data(message.data)
            .set_attributes(message.attributes)
            .set_ordering_key(&message.ordering_key);
        let published = publisher.publish(sent).await;
        if published.is_err() && !message.ordering_key.is_empty() {
            // A failure blocks all later messages with the same key.
            publisher.resume_publish(&message.ordering_key);
        }
        published.map_err(|error| {
            let what = format!("topic {path}");
            match &error {
                PublishError::Rpc(error) => PubsubError::about(&what, error),
                _ => PubsubError::Failed {
                    what,
                    reason: error.to_string(),
                },
            }
        })
    }

    async fn publisher(&self, path: &str) -> Result<Publisher, PubsubError> {
        let known = |by_topic: &HashMap<String, Publisher>| by_topic.get(path).cloned();
        if let Some(publisher) =
            known(&self.by_topic.lock().unwrap_or_else(PoisonError::into_inner))
        {
            return Ok(publisher);
        }
        let mut builder = Publisher::builder(path);
        if let Some(endpoint) = &self.connection.emulator {
            builder = builder
                .with_endpoint(endpoint)
                .with_credentials(anonymous::Builder::new().build());
        }
        let publisher = builder.build().await.map_err(PubsubError::not_connected)?;
        let mut by_topic = self.by_topic.lock().unwrap_or_else(PoisonError::into_inner);
        let publisher = by_topic.entry(path.to_owned()).or_insert(publisher);
        Ok(publisher.clone())
    }
}
