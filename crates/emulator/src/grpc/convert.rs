//! Converts between the protocol's types and the emulator's.

use std::time::Duration;

use chrono::{DateTime, Utc};
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1 as proto;

use crate::backlog::Delivery;
use crate::error::BrokerError;
use crate::message::NewMessage;
use crate::resource;
use crate::unsupported::{self, Asked};

pub fn topic_in(topic: proto::Topic) -> Result<resource::Topic, BrokerError> {
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

pub fn topic_out(topic: resource::Topic) -> proto::Topic {
    proto::Topic {
        name: topic.name,
        labels: topic.labels,
        message_retention_duration: duration_out(topic.message_retention),
        state: proto::topic::State::Active.into(),
        ..proto::Topic::default()
    }
}

pub fn subscription_in(asked: proto::Subscription) -> Result<resource::Subscription, BrokerError> {
    let pushed = |push: &proto::PushConfig| !push.push_endpoint.is_empty();
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

pub fn subscription_out(kept: resource::Subscription) -> proto::Subscription {
    proto::Subscription {
        name: kept.name,
        topic: kept.topic,
        ack_deadline_seconds: resource::whole_seconds(kept.ack_deadline),
        labels: kept.labels,
        enable_message_ordering: kept.ordered,
        enable_exactly_once_delivery: kept.exactly_once,
        retain_acked_messages: kept.retain_acked_messages,
        message_retention_duration: duration_out(kept.message_retention),
        expiration_policy: kept.expiration.map(|ttl| proto::ExpirationPolicy {
            ttl: duration_out(ttl),
        }),
        dead_letter_policy: kept.dead_letter.map(|policy| proto::DeadLetterPolicy {
            dead_letter_topic: policy.topic,
            max_delivery_attempts: policy.max_delivery_attempts,
        }),
        retry_policy: kept.retry.map(|policy| proto::RetryPolicy {
            minimum_backoff: duration_out(policy.minimum_backoff),
            maximum_backoff: duration_out(policy.maximum_backoff),
        }),
        state: proto::subscription::State::Active.into(),
        ..proto::Subscription::default()
    }
}

pub fn message_in(message: proto::PubsubMessage) -> NewMessage {
    NewMessage {
        data: message.data,
        attributes: message.attributes,
        ordering_key: message.ordering_key,
    }
}

/// Clients see the delivery attempt only when `counted`.
pub fn delivery_out(delivery: Delivery, counted: bool) -> proto::ReceivedMessage {
    let message = &delivery.message;
    proto::ReceivedMessage {
        ack_id: delivery.ack_id.to_string(),
        delivery_attempt: delivery.attempt_shown(counted),
        message: Some(proto::PubsubMessage {
            data: message.data.clone(),
            attributes: message.attributes.clone(),
            message_id: message.id(),
            publish_time: Some(timestamp_out(message.publish_time)),
            ordering_key: message.ordering_key.clone(),
        }),
    }
}

fn retry_in(policy: proto::RetryPolicy) -> Result<resource::RetryPolicy, BrokerError> {
    Ok(resource::RetryPolicy {
        minimum_backoff: duration_in(policy.minimum_backoff)?,
        maximum_backoff: duration_in(policy.maximum_backoff)?,
    })
}

fn duration_in(given: Option<prost_types::Duration>) -> Result<Option<Duration>, BrokerError> {
    given
        .map(Duration::try_from)
        .transpose()
        .map_err(|_negative| resource::negative_duration())
}

/// Every duration here came from the protocol, so none exceeds its range of 10 000 years.
fn duration_out(kept: Option<Duration>) -> Option<prost_types::Duration> {
    kept.and_then(|duration| duration.try_into().ok())
}

fn timestamp_out(time: DateTime<Utc>) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.timestamp(),
        nanos: i32::try_from(time.timestamp_subsec_nanos()).unwrap_or_default(),
    }
}
