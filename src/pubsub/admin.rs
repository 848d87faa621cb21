//! Inspects topics and subscriptions, and creates those that `dev` needs.

use std::time::Duration;

use google_cloud_gax::error::rpc::Code;

use super::{Connection, PubsubError};

/// How long one of these calls may take before Pub/Sub counts as not answering.
const TIMEOUT: Duration = Duration::from_secs(15);

/// How long Pub/Sub keeps messages by default.
/// <https://cloud.google.com/pubsub/docs/subscription-properties#message_retention_duration>
const DEFAULT_RETENTION: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How many deliveries Pub/Sub's own dead-letter policy allows by default.
/// <https://cloud.google.com/pubsub/docs/dead-letter-topics#dead-letter_topic_properties>
const DEFAULT_DELIVERY_ATTEMPTS: u32 = 5;

/// What Pub/Sub shows in place of a topic that is deleted.
/// <https://cloud.google.com/pubsub/docs/reference/rest/v1/projects.subscriptions#Subscription>
const DELETED_TOPIC: &str = "_deleted-topic_";

/// The settings of a subscription that matter here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubscriptionFacts {
    /// Its full path.
    pub topic: String,
    /// How long a message is kept for redelivery.
    pub retention: Duration,
    /// Pub/Sub itself dead-letters a message after this many deliveries. None: the
    /// subscription has no dead-letter policy.
    pub max_delivery_attempts: Option<u32>,
    /// The full path of that policy's topic.
    pub given_up_to: Option<String>,
    /// Where Pub/Sub itself sends the messages. None: they can be pulled.
    pub sent_to: Option<&'static str>,
}

impl SubscriptionFacts {
    /// Whether its topic is deleted, so that no message will ever come again.
    #[must_use]
    pub fn has_lost_its_topic(&self) -> bool {
        self.topic == DELETED_TOPIC
    }
}

impl Connection {
    async fn in_time<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<T, google_cloud_pubsub::Error>>,
    ) -> Result<T, PubsubError> {
        let failed = |reason: String| PubsubError::Failed {
            what: what.to_owned(),
            reason: format!("{reason}; {}", self.hint()),
        };
        match tokio::time::timeout(TIMEOUT, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(match PubsubError::about(what, &error) {
                PubsubError::Failed { reason, .. } => failed(reason),
                other => other,
            }),
            Err(_) => Err(failed(format!("no answer within {} s", TIMEOUT.as_secs()))),
        }
    }

    /// Reads a subscription's settings.
    ///
    /// # Errors
    /// [`PubsubError::NotFound`] when there is no such subscription.
    pub async fn subscription(&self, name: &str) -> Result<SubscriptionFacts, PubsubError> {
        let path = self.subscription_path(name);
        let what = format!("subscription {path}");
        let admin = self.subscription_admin().await?;
        let get = admin.get_subscription().set_subscription(&path);
        let found = self.in_time(&what, get.send()).await?;
        let retention = found.message_retention_duration;
        let pushes = found
            .push_config
            .is_some_and(|push| !push.push_endpoint.is_empty());
        let sent_to = [
            (pushes, "a push endpoint"),
            (found.bigquery_config.is_some(), "BigQuery"),
            (found.cloud_storage_config.is_some(), "Cloud Storage"),
        ];
        let policy = found.dead_letter_policy;
        Ok(SubscriptionFacts {
            given_up_to: policy
                .as_ref()
                .map(|policy| policy.dead_letter_topic.clone()),
            sent_to: sent_to
                .into_iter()
                .find_map(|(sent, to)| sent.then_some(to)),
            topic: found.topic,
            retention: retention.map_or(DEFAULT_RETENTION, |retention| {
                Duration::from_secs(retention.seconds().unsigned_abs())
            }),
            max_delivery_attempts: policy.map(|policy| match policy.max_delivery_attempts {
                0 => DEFAULT_DELIVERY_ATTEMPTS,
                attempts => attempts.unsigned_abs(),
            }),
        })
    }

    /// Whether the topic exists.
    ///
    /// # Errors
    /// Pub/Sub's error, except that a missing topic is `Ok(false)`.
    pub async fn topic_exists(&self, topic: &str) -> Result<bool, PubsubError> {
        let path = self.topic_path(topic);
        let what = format!("topic {path}");
        let admin = self.topic_admin().await?;
        match self
            .in_time(&what, admin.get_topic().set_topic(&path).send())
            .await
        {
            Ok(_) => Ok(true),
            Err(PubsubError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Creates the topic unless it exists.
    ///
    /// # Errors
    /// Pub/Sub's error.
    pub async fn ensure_topic(&self, topic: &str) -> Result<(), PubsubError> {
        let path = self.topic_path(topic);
        let what = format!("topic {path}");
        let admin = self.topic_admin().await?;
        let made = self.in_time(&what, async {
            existing_is_fine(admin.create_topic().set_name(&path).send().await)
        });
        made.await
    }

    /// Creates the subscription of a topic unless it exists.
    ///
    /// # Errors
    /// Pub/Sub's error.
    pub async fn ensure_subscription(
        &self,
        subscription: &str,
        topic: &str,
    ) -> Result<(), PubsubError> {
        let path = self.subscription_path(subscription);
        let what = format!("subscription {path}");
        let admin = self.subscription_admin().await?;
        let create = admin
            .create_subscription()
            .set_name(&path)
            .set_topic(self.topic_path(topic))
            .set_ack_deadline_seconds(30);
        self.in_time(&what, async { existing_is_fine(create.send().await) })
            .await
    }
}

fn existing_is_fine<T>(
    made: Result<T, google_cloud_pubsub::Error>,
) -> Result<(), google_cloud_pubsub::Error> {
    match made {
        Err(error) if !already_exists(&error) => Err(error),
        _ => Ok(()),
    }
}

fn already_exists(error: &google_cloud_pubsub::Error) -> bool {
    error.http_status_code() == Some(409)
        || error
            .status()
            .is_some_and(|status| status.code == Code::AlreadyExists)
}
