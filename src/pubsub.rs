//! The official Pub/Sub client: connections, deliveries, publishing, and the few calls
//! that inspect topics and subscriptions.

mod admin;
mod clients;
mod counters;
mod delivery;
mod publishing;
mod subscription;

use std::time::Duration;

use google_cloud_auth::credentials::anonymous;
use google_cloud_gax::error::rpc::Code;
use google_cloud_pubsub::client::{SubscriptionAdmin, TopicAdmin};
use google_cloud_pubsub::model;

use crate::message::Message;

pub use admin::SubscriptionFacts;
pub use clients::Clients;
pub use counters::{Counters, Figures};
pub use delivery::{Delivery, Receipt};
pub use publishing::{Outgoing, Publishers};
pub use subscription::{Pulling, Subscription};

/// Why a Pub/Sub call failed. No error settles a message: an unacknowledged message is
/// redelivered.
#[derive(Debug, thiserror::Error)]
pub enum PubsubError {
    /// Retrying does not help until somebody creates the resource.
    #[error("{what} does not exist")]
    NotFound { what: String },
    /// Retrying does not help until somebody grants the permission.
    #[error("no permission for {what}: {reason}")]
    PermissionDenied { what: String, reason: String },
    /// Pub/Sub rejects what was sent, and always will.
    #[error("Pub/Sub does not take what was sent to {what}: {reason}")]
    Refused { what: String, reason: String },
    /// The resource is not fit for this, such as a push subscription that is pulled.
    /// Retrying does not help until somebody changes it.
    #[error("{what} cannot be used as it is: {reason}")]
    Unfit { what: String, reason: String },
    /// A stream has brought nothing for so long that it may be dead.
    #[error("{what} has been quiet for {} s", .quiet_for.as_secs())]
    Quiet { what: String, quiet_for: Duration },
    /// Usually passes by itself.
    #[error("Pub/Sub did not answer as expected about {what}: {reason}")]
    Failed { what: String, reason: String },
    /// The client could not be built: credentials or endpoint are wrong.
    #[error("no connection to Pub/Sub can be set up: {reason}")]
    NotConnected { reason: String },
    #[error("the name `{name}` is not a Pub/Sub resource name: {reason}")]
    BadName { name: String, reason: &'static str },
}

impl PubsubError {
    fn about(what: &str, error: &google_cloud_pubsub::Error) -> Self {
        let what = what.to_owned();
        let http = error.http_status_code();
        match error.status().map(|status| status.code) {
            Some(Code::NotFound) => Self::NotFound { what },
            _ if http == Some(404) => Self::NotFound { what },
            Some(Code::PermissionDenied | Code::Unauthenticated) => Self::PermissionDenied {
                what,
                reason: error.to_string(),
            },
            Some(Code::InvalidArgument) => Self::Refused {
                what,
                reason: error.to_string(),
            },
            Some(Code::FailedPrecondition) => Self::Unfit {
                what,
                reason: error.to_string(),
            },
            _ => Self::Failed {
                what,
                reason: error.to_string(),
            },
        }
    }

    fn not_connected(error: impl std::fmt::Display) -> Self {
        Self::NotConnected {
            reason: error.to_string(),
        }
    }

    /// Whether only a person can fix it, so that quick retries are no use.
    #[must_use]
    pub fn needs_a_person(&self) -> bool {
        !matches!(self, Self::Failed { .. } | Self::Quiet { .. })
    }
}

/// Which Pub/Sub: a project of Google Cloud or of an emulator.
#[derive(Debug, Clone)]
pub struct Connection {
    project: String,
    /// `http://host:port` of an emulator, which needs no credentials.
    emulator: Option<String>,
}

impl Connection {
    /// Connects to Google Cloud with Application Default Credentials, or, given
    /// `host:port`, to an emulator. The official client does not read
    /// `PUBSUB_EMULATOR_HOST` itself.
    #[must_use]
    pub fn new(project: &str, emulator_host: Option<&str>) -> Self {
        install_tls_provider();
        Self {
            project: project.to_owned(),
            emulator: emulator_host.map(|host| match host.contains("://") {
                true => host.to_owned(),
                false => format!("http://{host}"),
            }),
        }
    }

    /// What to check when nothing answers.
    fn hint(&self) -> String {
        match &self.emulator {
            Some(endpoint) => format!(
                "is an emulator running at {endpoint}? PUBSUB_EMULATOR_HOST, or `emulator_host` under [pubsub], says where it is"
            ),
            None => "Google Cloud is meant: check the network and the credentials (`gcloud auth application-default login`), or set PUBSUB_EMULATOR_HOST for an emulator".to_owned(),
        }
    }

    #[must_use]
    pub fn project(&self) -> &str {
        &self.project
    }

    /// `projects/P/topics/NAME`; a name that is already such a path stays.
    #[must_use]
    pub fn topic_path(&self, name: &str) -> String {
        self.path("topics", name)
    }

    /// `projects/P/subscriptions/NAME`; a name that is already such a path stays.
    #[must_use]
    pub fn subscription_path(&self, name: &str) -> String {
        self.path("subscriptions", name)
    }

    /// The name used in the guard's keys: always the short one within the connection's
    /// own project. Otherwise two workers whose configurations spell it differently would
    /// each run a message.
    #[must_use]
    pub fn short_name<'a>(&self, subscription: &'a str) -> &'a str {
        let own = format!("projects/{}/subscriptions/", self.project);
        subscription.strip_prefix(&own).unwrap_or(subscription)
    }

    fn path(&self, collection: &str, name: &str) -> String {
        if name.starts_with("projects/") {
            return name.to_owned();
        }
        format!("projects/{}/{collection}/{name}", self.project)
    }

    /// Clients for streaming pull, for about this many streams at a time.
    #[must_use]
    pub fn clients(&self, streams: usize) -> Clients {
        Clients::new(self.clone(), streams)
    }

    /// Publishes one message and returns the id that the broker gave it.
    ///
    /// # Errors
    /// The topic does not exist, may not be published to, or did not answer.
    pub async fn publish(&self, topic: &str, message: Outgoing) -> Result<String, PubsubError> {
        Publishers::new(self.clone()).publish(topic, message).await
    }

    async fn topic_admin(&self) -> Result<TopicAdmin, PubsubError> {
        let mut builder = TopicAdmin::builder();
        if let Some(endpoint) = &self.emulator {
            builder = builder
                .with_endpoint(endpoint)
                .with_credentials(anonymous::Builder::new().build());
        }
        builder.build().await.map_err(PubsubError::not_connected)
    }

    async fn subscription_admin(&self) -> Result<SubscriptionAdmin, PubsubError> {
        let mut builder = SubscriptionAdmin::builder();
        if let Some(endpoint) = &self.emulator {
            builder = builder
                .with_endpoint(endpoint)
                .with_credentials(anonymous::Builder::new().build());
        }
        builder.build().await.map_err(PubsubError::not_connected)
    }
}

fn to_message(received: model::Message) -> Message {
    let publish_time = received.publish_time.unwrap_or_default();
    Message {
        id: received.message_id,
        publish_time: chrono::DateTime::from_timestamp(
            publish_time.seconds(),
            publish_time.nanos().unsigned_abs(),
        )
        .unwrap_or_default(),
        data: received.data,
        attributes: received.attributes.into_iter().collect(),
        ordering_key: received.ordering_key,
    }
}

/// The client is built without a TLS provider, so that the program has only one
/// cryptography library, and no C++ or assembler to build.
fn install_tls_provider() {
    // An error means that one is installed already, which is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_name_gets_the_project_and_a_path_stays() {
        let connection = Connection::new("p", None);
        assert_eq!(connection.topic_path("t"), "projects/p/topics/t");
        assert_eq!(
            connection.subscription_path("projects/q/subscriptions/s"),
            "projects/q/subscriptions/s"
        );
    }

    #[test]
    fn a_subscription_has_one_name_however_it_is_written() {
        let connection = Connection::new("p", None);
        assert_eq!(connection.short_name("projects/p/subscriptions/s"), "s");
        assert_eq!(connection.short_name("s"), "s");
        let other = "projects/q/subscriptions/s";
        assert_eq!(connection.short_name(other), other);
    }

    /// A pull of a subscription that has become a push subscription fails so.
    #[test]
    fn only_what_may_pass_by_itself_is_retried_soon() {
        for (code, needs_a_person) in [
            (Code::FailedPrecondition, true),
            (Code::NotFound, true),
            (Code::PermissionDenied, true),
            (Code::Unavailable, false),
            (Code::Internal, false),
        ] {
            let status = google_cloud_gax::error::rpc::Status::default().set_code(code);
            let error = google_cloud_pubsub::Error::service(status);
            let error = PubsubError::about("subscription s", &error);
            assert_eq!(error.needs_a_person(), needs_a_person, "{error}");
        }
    }
}
