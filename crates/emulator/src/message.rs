//! Messages: what publishers may send, and how much of it is stored.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use chrono::{DateTime, Utc};

use super::error::BrokerError;

/// The most bytes that one publish request may carry. Limits:
/// <https://cloud.google.com/pubsub/quotas#resource_limits>.
pub const MAX_REQUEST_BYTES: usize = 10_000_000;
/// The most messages that one publish request may carry.
pub const MAX_REQUEST_MESSAGES: usize = 1000;
const MAX_ORDERING_KEY_BYTES: usize = 1024;
const MAX_ATTRIBUTES: usize = 100;
const MAX_ATTRIBUTE_KEY_BYTES: usize = 256;
const MAX_ATTRIBUTE_VALUE_BYTES: usize = 1024;

/// A message's overhead: once for itself and once for each subscription that it waits in.
/// Bounds the memory of a million tiny messages.
const BYTES_PER_MESSAGE: usize = 256;
const BYTES_PER_BACKLOG_ENTRY: usize = 192;

/// A message as a publisher sends it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewMessage {
    pub data: Bytes,
    pub attributes: HashMap<String, String>,
    /// Empty for none.
    pub ordering_key: String,
}

/// A published message, shared by all subscriptions that hold it.
#[derive(Debug)]
pub struct Message {
    /// Grows with every publish; the message id is its decimal form.
    pub sequence: u64,
    pub publish_time: DateTime<Utc>,
    pub data: Bytes,
    pub attributes: HashMap<String, String>,
    pub ordering_key: String,
    /// Released when the last holder drops the message.
    _reservation: Reservation,
}

impl Message {
    /// The message id: decimal digits, unique across restarts.
    pub fn id(&self) -> String {
        self.sequence.to_string()
    }

    /// The bytes of data, attributes and ordering key, which flow control counts.
    pub fn size(&self) -> usize {
        size(&self.data, &self.attributes, &self.ordering_key)
    }

    pub(super) fn new(
        new: NewMessage,
        sequence: u64,
        publish_time: DateTime<Utc>,
        reservation: Reservation,
    ) -> Self {
        Self {
            sequence,
            publish_time,
            // A slice of the request's buffer would keep the whole request in memory
            // while one of its messages lives.
            data: Bytes::copy_from_slice(&new.data),
            attributes: new.attributes,
            ordering_key: new.ordering_key,
            _reservation: reservation,
        }
    }
}

impl NewMessage {
    fn size(&self) -> usize {
        size(&self.data, &self.attributes, &self.ordering_key)
    }

    /// The memory to reserve for it in a topic with this many subscriptions.
    pub(super) fn charge(&self, subscriptions: usize) -> usize {
        self.size() + BYTES_PER_MESSAGE + subscriptions * BYTES_PER_BACKLOG_ENTRY
    }

    fn check(&self) -> Result<(), BrokerError> {
        if self.data.is_empty() && self.attributes.is_empty() {
            return invalid("Every message needs data or at least one attribute.".to_owned());
        }
        if self.ordering_key.len() > MAX_ORDERING_KEY_BYTES {
            return invalid(format!(
                "An ordering key has {} bytes; the limit is {MAX_ORDERING_KEY_BYTES}.",
                self.ordering_key.len()
            ));
        }
        if self.attributes.len() > MAX_ATTRIBUTES {
            return invalid(format!(
                "A message has {} attributes; the limit is {MAX_ATTRIBUTES}.",
                self.attributes.len()
            ));
        }
        self.attributes.iter().try_for_each(|(key, value)| {
            if key.is_empty() || key.len() > MAX_ATTRIBUTE_KEY_BYTES {
                return invalid(format!(
                    "An attribute's key has {} bytes; it must have 1 to {MAX_ATTRIBUTE_KEY_BYTES}.",
                    key.len()
                ));
            }
            if value.len() > MAX_ATTRIBUTE_VALUE_BYTES {
                return invalid(format!(
                    "The value of attribute {key} has {} bytes; the limit is \
                     {MAX_ATTRIBUTE_VALUE_BYTES}.",
                    value.len()
                ));
            }
            Ok(())
        })
    }
}

/// Checks a publish request against
/// <https://cloud.google.com/pubsub/quotas#resource_limits>.
///
/// # Errors
/// `InvalidArgument`, naming the limit.
pub fn check_request(messages: &[NewMessage]) -> Result<(), BrokerError> {
    if messages.is_empty() || messages.len() > MAX_REQUEST_MESSAGES {
        return invalid(format!(
            "The request has {} messages; it must have 1 to {MAX_REQUEST_MESSAGES}.",
            messages.len()
        ));
    }
    let total: usize = messages.iter().map(NewMessage::size).sum();
    if total > MAX_REQUEST_BYTES {
        return invalid(format!(
            "The request's messages have {total} bytes; the limit is {MAX_REQUEST_BYTES}."
        ));
    }
    messages.iter().try_for_each(NewMessage::check)
}

fn invalid(why: String) -> Result<(), BrokerError> {
    Err(BrokerError::InvalidArgument(why))
}

fn size(data: &Bytes, attributes: &HashMap<String, String>, ordering_key: &str) -> usize {
    let attributes: usize = attributes.iter().map(|(k, v)| k.len() + v.len()).sum();
    data.len() + attributes + ordering_key.len()
}

/// The bytes that messages may occupy and do occupy.
#[derive(Debug)]
pub(super) struct Memory {
    used: Arc<AtomicUsize>,
    limit: usize,
}

impl Memory {
    pub fn new(limit: usize) -> Self {
        Self {
            used: Arc::default(),
            limit,
        }
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    pub fn limit(&self) -> usize {
        self.limit
    }

    pub fn has_room_for(&self, bytes: usize) -> bool {
        self.used().saturating_add(bytes) <= self.limit
    }

    /// Counts the bytes as used until the reservation is dropped, even if they do not
    /// fit: ask [`Self::has_room_for`] first.
    pub fn reserve(&self, bytes: usize) -> Reservation {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        Reservation {
            used: Arc::clone(&self.used),
            bytes,
        }
    }
}

#[derive(Debug)]
pub(super) struct Reservation {
    used: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_data(bytes: usize) -> NewMessage {
        NewMessage {
            data: vec![7; bytes].into(),
            ..NewMessage::default()
        }
    }

    #[test]
    fn ten_megabytes_pass_and_one_byte_more_does_not() {
        assert_eq!(check_request(&[with_data(MAX_REQUEST_BYTES)]), Ok(()));
        assert!(check_request(&[with_data(MAX_REQUEST_BYTES + 1)]).is_err());
        assert!(check_request(&[with_data(MAX_REQUEST_BYTES), with_data(1)]).is_err());
    }

    #[test]
    fn an_empty_message_and_an_empty_request_are_refused() {
        assert!(check_request(&[NewMessage::default()]).is_err());
        assert!(check_request(&[]).is_err());
    }

    #[test]
    fn an_attribute_alone_makes_a_message() {
        let message = NewMessage {
            attributes: HashMap::from([("kind".to_owned(), String::new())]),
            ..NewMessage::default()
        };
        assert_eq!(check_request(&[message]), Ok(()));
    }

    #[test]
    fn a_long_ordering_key_is_refused() {
        let message = |length| NewMessage {
            ordering_key: "k".repeat(length),
            ..with_data(1)
        };
        assert_eq!(check_request(&[message(1024)]), Ok(()));
        assert!(check_request(&[message(1025)]).is_err());
    }

    #[test]
    fn memory_comes_back_when_the_reservation_goes() {
        let memory = Memory::new(100);
        let held = memory.reserve(60);
        assert!(!memory.has_room_for(41));
        drop(held);
        assert!(memory.has_room_for(100));
    }
}
