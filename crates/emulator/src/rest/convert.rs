//! Converts between the official client's types, which read and write proto-JSON, and the
//! emulator's.

use std::time::{Duration, SystemTime};

use google_cloud_pubsub::model;
use serde_json::{Value, json};

use crate::backlog::Delivery;
use crate::error::BrokerError;
use crate::message::NewMessage;
use crate::resource;
use crate::unsupported::{self, Asked};

pub fn topic_in(topic: model::Topic) -> Result<resource::Topic, BrokerError> {
    unsupported::refuse(&[
        Asked("schemas", topic.schema_settings.is_some()),
        Asked("ingestion", topic.ingestion_data_source_settings.is_some()),
        Asked("message transforms", !topic.message_transforms.is_empty()),
    ])?;
    Ok(resource::Topic {
        name: topic.name,
        labels: topic.labels,
        message_retention: duration_in(topic.message_retention_duration)?,
    })
}

pub fn topic_out(topic: resource::Topic) -> model::Topic {
    let mut shown = model::Topic::new()
        .set_name(topic.name)
        .set_labels(topic.labels)
        .set_state(model::topic::State::Active);
    shown.message_retention_duration = duration_out(topic.message_retention);
    shown
}

pub fn subscription_in(asked: model::Subscription) -> Result<resource::Subscription, BrokerError> {
    let pushed = |push: &model::PushConfig| !push.push_endpoint.is_empty();
    unsupported::refuse(&[
        Asked("push", asked.push_config.as_ref().is_some_and(pushed)),
        Asked("BigQuery export", asked.bigquery_config.is_some()),
        Asked("Cloud Storage export", asked.cloud_storage_config.is_some()),
        Asked("Bigtable export", asked.bigtable_config.is_some()),
        Asked("filters", !asked.filter.is_empty()),
        Asked("message transforms", !asked.message_transforms.is_empty()),
    ])?;
    let expiration = match asked.expiration_policy {
        Some(policy) => Some(duration_in(policy.ttl)?),
        None => None,
    };
    Ok(resource::Subscription {
        name: asked.name,
        topic: asked.topic,
        ack_deadline: resource::seconds(asked.ack_deadline_seconds)?,
        labels: asked.labels,
        ordered: asked.enable_message_ordering,
        exactly_once: asked.enable_exactly_once_delivery,
        retain_acked_messages: asked.retain_acked_messages,
        message_retention: duration_in(asked.message_retention_duration)?,
        expiration,
        dead_letter: asked
            .dead_letter_policy
            .map(|p| resource::DeadLetterPolicy {
                topic: p.dead_letter_topic,
                max_delivery_attempts: p.max_delivery_attempts,
            }),
        retry: asked.retry_policy.map(retry_in).transpose()?,
    })
}

pub fn subscription_out(kept: resource::Subscription) -> model::Subscription {
    let mut shown = model::Subscription::new()
        .set_name(kept.name)
        .set_topic(kept.topic)
        .set_ack_deadline_seconds(resource::whole_seconds(kept.ack_deadline))
        .set_labels(kept.labels)
        .set_enable_message_ordering(kept.ordered)
        .set_enable_exactly_once_delivery(kept.exactly_once)
        .set_retain_acked_messages(kept.retain_acked_messages)
        .set_state(model::subscription::State::Active);
    shown.message_retention_duration = duration_out(kept.message_retention);
    shown.expiration_policy = kept.expiration.map(|ttl| {
        let mut policy = model::ExpirationPolicy::new();
        policy.ttl = duration_out(ttl);
        policy
    });
    shown.dead_letter_policy = kept.dead_letter.map(|policy| {
        model::DeadLetterPolicy::new()
            .set_dead_letter_topic(policy.topic)
            .set_max_delivery_attempts(policy.max_delivery_attempts)
    });
    shown.retry_policy = kept.retry.map(|policy| {
        let mut shown = model::RetryPolicy::new();
        shown.minimum_backoff = duration_out(policy.minimum_backoff);
        shown.maximum_backoff = duration_out(policy.maximum_backoff);
        shown
    });
    shown
}

pub fn message_in(message: model::Message) -> NewMessage {
    NewMessage {
        data: message.data,
        attributes: message.attributes,
        ordering_key: message.ordering_key,
    }
}

/// A `ReceivedMessage`, since the official client does not export that type. Clients see
/// the delivery attempt only when `counted`.
pub fn delivery_out(delivery: &Delivery, counted: bool) -> Value {
    let message = &delivery.message;
    let mut shown = model::Message::new()
        .set_data(message.data.clone())
        .set_attributes(message.attributes.clone())
        .set_message_id(message.id())
        .set_ordering_key(message.ordering_key.clone());
    shown.publish_time = SystemTime::from(message.publish_time).try_into().ok();
    let mut received = json!({
        "ackId": delivery.ack_id.to_string(),
        "message": shown,
    });
    if counted {
        received["deliveryAttempt"] = delivery.attempt_shown(counted).into();
    }
    received
}

fn retry_in(policy: model::RetryPolicy) -> Result<resource::RetryPolicy, BrokerError> {
    Ok(resource::RetryPolicy {
        minimum_backoff: duration_in(policy.minimum_backoff)?,
        maximum_backoff: duration_in(policy.maximum_backoff)?,
    })
}

fn duration_in<D>(given: Option<D>) -> Result<Option<Duration>, BrokerError>
where
    Duration: TryFrom<D>,
{
    given
        .map(Duration::try_from)
        .transpose()
        .map_err(|_negative| resource::negative_duration())
}

/// Every duration here came from the protocol, so none exceeds its range of 10 000 years.
fn duration_out<D>(kept: Option<Duration>) -> Option<D>
where
    Duration: TryInto<D>,
{
    kept.and_then(|duration| duration.try_into().ok())
}
