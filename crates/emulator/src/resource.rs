//! The settings of topics and subscriptions.

use std::collections::HashMap;
use std::time::Duration;

use super::error::BrokerError;
use super::name;

/// The ack deadline of a subscription that sets none.
pub const DEFAULT_ACK_DEADLINE: Duration = Duration::from_secs(10);

const DEFAULT_MINIMUM_BACKOFF: Duration = Duration::from_secs(10);
const MAXIMUM_BACKOFF: Duration = Duration::from_secs(600);

/// A topic's settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topic {
    /// `projects/PROJECT/topics/ID`.
    pub name: String,
    pub labels: HashMap<String, String>,
    /// Stored and shown, not enforced.
    pub message_retention: Option<Duration>,
}

/// A subscription's settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Subscription {
    /// `projects/PROJECT/subscriptions/ID`.
    pub name: String,
    /// The topic's name, or [`name::DELETED_TOPIC`].
    pub topic: String,
    /// How long a delivery may stay unacknowledged; zero means the default.
    pub ack_deadline: Duration,
    pub labels: HashMap<String, String>,
    /// Messages of one ordering key are delivered in the order of publishing.
    pub ordered: bool,
    /// Acks are confirmed, and there are no duplicates:
    /// <https://cloud.google.com/pubsub/docs/exactly-once-delivery>.
    pub exactly_once: bool,
    /// Stored and shown, not enforced.
    pub retain_acked_messages: bool,
    /// Stored and shown, not enforced.
    pub message_retention: Option<Duration>,
    /// Stored and shown, not enforced. The inner option is the policy's `ttl`.
    pub expiration: Option<Option<Duration>>,
    /// While set, deliveries carry their delivery attempt.
    pub dead_letter: Option<DeadLetterPolicy>,
    /// `None` redelivers at once.
    pub retry: Option<RetryPolicy>,
}

/// The target of messages that were delivered too often. While the topic does not exist, they
/// are redelivered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeadLetterPolicy {
    pub topic: String,
    pub max_delivery_attempts: i32,
}

/// How long a message waits between deliveries:
/// <https://cloud.google.com/pubsub/docs/subscription-retry-policy>.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RetryPolicy {
    pub minimum_backoff: Option<Duration>,
    pub maximum_backoff: Option<Duration>,
}

impl Topic {
    /// # Errors
    /// `InvalidArgument` if the name is malformed.
    pub fn check(&self) -> Result<(), BrokerError> {
        name::check_topic(&self.name)
    }
}

impl Subscription {
    /// Checks the settings and fills in Pub/Sub's defaults.
    ///
    /// # Errors
    /// `InvalidArgument` for a malformed name or a number out of its range.
    pub fn checked(mut self) -> Result<Self, BrokerError> {
        name::check_subscription(&self.name)?;
        name::check_topic(&self.topic)?;
        if self.ack_deadline.is_zero() {
            self.ack_deadline = DEFAULT_ACK_DEADLINE;
        }
        check_ack_deadline(self.ack_deadline)?;
        if let Some(policy) = &mut self.dead_letter {
            policy.complete()?;
        }
        if let Some(policy) = &mut self.retry {
            policy.complete()?;
        }
        Ok(self)
    }
}

impl DeadLetterPolicy {
    /// Rules: <https://cloud.google.com/pubsub/docs/handling-failures>.
    fn complete(&mut self) -> Result<(), BrokerError> {
        name::check_topic(&self.topic)?;
        if self.max_delivery_attempts == 0 {
            self.max_delivery_attempts = 5;
        }
        if (5..=100).contains(&self.max_delivery_attempts) {
            return Ok(());
        }
        Err(BrokerError::InvalidArgument(format!(
            "max_delivery_attempts is {}; it must be between 5 and 100.",
            self.max_delivery_attempts
        )))
    }
}

impl RetryPolicy {
    /// Defaults and ranges:
    /// <https://cloud.google.com/pubsub/docs/reference/rpc/google.pubsub.v1#retrypolicy>.
    fn complete(&mut self) -> Result<(), BrokerError> {
        let maximum = *self.maximum_backoff.get_or_insert(MAXIMUM_BACKOFF);
        let default_minimum = DEFAULT_MINIMUM_BACKOFF.min(maximum);
        let minimum = *self.minimum_backoff.get_or_insert(default_minimum);
        if minimum <= maximum && maximum <= MAXIMUM_BACKOFF {
            return Ok(());
        }
        Err(BrokerError::InvalidArgument(format!(
            "The backoff goes from {} to {} seconds; it must be within 0 and {} seconds, and the \
             minimum must not exceed the maximum.",
            minimum.as_secs_f64(),
            maximum.as_secs_f64(),
            MAXIMUM_BACKOFF.as_secs()
        )))
    }

    /// How long to wait after this many failed deliveries: the minimum, doubled with each
    /// failure after the first, up to the maximum.
    pub fn backoff(&self, failures: u32) -> Duration {
        let minimum = self.minimum_backoff.unwrap_or(DEFAULT_MINIMUM_BACKOFF);
        let maximum = self.maximum_backoff.unwrap_or(MAXIMUM_BACKOFF);
        let factor = 2_u32.checked_pow(failures.saturating_sub(1));
        let backoff = factor.and_then(|factor| minimum.checked_mul(factor));
        backoff.map_or(maximum, |backoff| backoff.min(maximum))
    }
}

/// The range of a subscription's and a stream's ack deadline:
/// <https://cloud.google.com/pubsub/docs/subscription-properties#ack_deadline>.
///
/// # Errors
/// `InvalidArgument` outside 10 to 600 seconds.
pub fn check_ack_deadline(deadline: Duration) -> Result<(), BrokerError> {
    if (10..=600).contains(&deadline.as_secs()) {
        return Ok(());
    }
    Err(BrokerError::InvalidArgument(format!(
        "The ack deadline is {} seconds; it must be between 10 and 600.",
        deadline.as_secs()
    )))
}

/// The protocol's number of seconds as a duration.
///
/// # Errors
/// `InvalidArgument` if it is negative.
pub fn seconds(given: i32) -> Result<Duration, BrokerError> {
    let seconds = u64::try_from(given).map_err(|_negative| negative_duration())?;
    Ok(Duration::from_secs(seconds))
}

/// The protocol's number of seconds for an ack deadline.
pub fn whole_seconds(ack_deadline: Duration) -> i32 {
    i32::try_from(ack_deadline.as_secs()).unwrap_or(i32::MAX)
}

pub fn negative_duration() -> BrokerError {
    BrokerError::InvalidArgument("A duration is negative.".to_owned())
}
