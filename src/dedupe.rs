//! The deduplication key of a message.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::job::JobKey;
use crate::json::{canonical, pointed};
use crate::message::Message;

/// A longer value is replaced by its hash, so that keys stay small.
const MAX_VALUE_LENGTH: usize = 200;

/// The part of a message that is its key. Written as `message_id`,
/// `attribute:NAME`, `json:/pointer` (RFC 6901) or `content`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DedupeKey {
    #[default]
    MessageId,
    Attribute(String),
    Json(String),
    /// The SHA-256 of the message's data.
    Content,
}

/// The message lacks the attribute or field of its subscription's `dedupe_key`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the message has no {0}, the subscription's dedupe_key")]
pub struct MissingKey(String);

impl TryFrom<String> for DedupeKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "message_id" => Ok(Self::MessageId),
            None if text == "content" => Ok(Self::Content),
            Some(("attribute", name)) if !name.is_empty() => Ok(Self::Attribute(name.to_owned())),
            Some(("json", pointer)) if pointer.starts_with('/') => {
                Ok(Self::Json(pointer.to_owned()))
            }
            _ => Err(format!(
                "`{text}` is not a dedupe key: write message_id, attribute:NAME, json:/pointer or content"
            )),
        }
    }
}

impl From<DedupeKey> for String {
    fn from(key: DedupeKey) -> Self {
        match key {
            DedupeKey::MessageId => "message_id".to_owned(),
            DedupeKey::Attribute(name) => format!("attribute:{name}"),
            DedupeKey::Json(pointer) => format!("json:{pointer}"),
            DedupeKey::Content => "content".to_owned(),
        }
    }
}

impl DedupeKey {
    /// The key of a message's job.
    ///
    /// # Errors
    /// The message lacks the attribute or the field.
    pub fn of(&self, subscription: &str, message: &Message) -> Result<JobKey, MissingKey> {
        let (name, value) = match self {
            Self::MessageId => return Ok(JobKey::of_message_id(subscription, message)),
            Self::Content => ("sha256", hex(&message.data)),
            Self::Attribute(name) => {
                let value = message.attributes.get(name);
                let value = value.ok_or_else(|| MissingKey(format!("attribute `{name}`")))?;
                (name.as_str(), value.clone())
            }
            Self::Json(pointer) => (pointer.as_str(), json_value(&message.data, pointer)?),
        };
        let value = match value.len() > MAX_VALUE_LENGTH || value.contains('\0') {
            true => hex(value.as_bytes()),
            false => value,
        };
        Ok(JobKey::new(subscription, &format!("{name}={value}")))
    }
}

fn json_value(data: &[u8], pointer: &str) -> Result<String, MissingKey> {
    let text = std::str::from_utf8(data).unwrap_or_default();
    match pointed(text, pointer) {
        // As JSON, with quotes: the string "3" differs from the number 3.
        Some(value) if value.get() != "null" => Ok(canonical(value)),
        _ => Err(MissingKey(format!("field `{pointer}`"))),
    }
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::Bytes;
    use chrono::DateTime;
    use serde_json::{Value, json};

    use super::*;

    fn key(dedupe: &str, payload: Value) -> Result<String, MissingKey> {
        let message = Message {
            id: "7".to_owned(),
            publish_time: DateTime::from_timestamp_micros(5).unwrap(),
            data: Bytes::from(payload.to_string()),
            attributes: BTreeMap::from([("request_id".to_owned(), "r1".to_owned())]),
            ordering_key: String::new(),
        };
        let dedupe = DedupeKey::try_from(dedupe.to_owned()).unwrap();
        dedupe.of("s", &message).map(|key| key.key.to_string())
    }

    #[test]
    fn each_kind_uses_its_part_of_the_message() {
        let payload = json!({"run": {"id": 3}, "a/b": "x"});
        assert_eq!(key("message_id", payload.clone()).unwrap(), "7@5");
        assert_eq!(
            key("attribute:request_id", payload.clone()).unwrap(),
            "request_id=r1"
        );
        assert_eq!(key("json:/run/id", payload.clone()).unwrap(), "/run/id=3");
        assert_eq!(key("json:/a~1b", payload.clone()).unwrap(), "/a~1b=\"x\"");
        assert_eq!(key("content", payload).unwrap().len(), "sha256=".len() + 64);
    }

    #[test]
    fn a_missing_field_is_named() {
        let missing = key("attribute:other", json!({})).unwrap_err();
        assert!(missing.to_string().contains("attribute `other`"));
        let missing = key("json:/run/id", json!({"run": {"id": null}})).unwrap_err();
        assert!(missing.to_string().contains("field `/run/id`"));
    }

    #[test]
    fn a_long_value_becomes_its_hash() {
        let long = key("json:/id", json!({"id": "x".repeat(5000)})).unwrap();
        assert_eq!(long.len(), "/id=".len() + 64);
    }

    #[test]
    fn an_invalid_key_lists_the_valid_forms() {
        for text in ["", "messageid", "attribute:", "json:id", "content:x"] {
            let error = DedupeKey::try_from(text.to_owned()).unwrap_err();
            assert!(error.contains("attribute:NAME"), "{error}");
        }
    }
}
