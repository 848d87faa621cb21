//! A published message, and the training request in it.

use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde_json::{Map, Value};

/// A published message.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// The broker's id: unique in its topic, and the same at each redelivery.
    pub id: String,
    /// When the broker accepted it; the same at each redelivery.
    pub publish_time: DateTime<Utc>,
    pub data: Bytes,
    pub attributes: BTreeMap<String, String>,
    /// Empty if the publisher set none.
    pub ordering_key: String,
}

/// The payload of a request: its whole JSON object, including `name`.
pub type Payload = Map<String, Value>;

/// A training request: a task's name and the payload.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub task: String,
    pub payload: Payload,
}

/// Longer names would flood logs and tables.
const MAX_NAME_LENGTH: usize = 256;

/// Why a message is not a request. Every variant is permanent, so the message is
/// refused at once.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum DecodeError {
    #[error("the message has no data; a JSON object with a `name` was expected")]
    Empty,
    #[error("the data is not UTF-8 text (first bad byte at offset {offset})")]
    NotUtf8 { offset: usize },
    /// Also for nesting beyond 128 levels, the parser's limit.
    #[error("the data is not valid JSON: {reason}")]
    NotJson { reason: String },
    #[error("the data is a JSON {found}; an object with a `name` was expected")]
    NotAnObject { found: &'static str },
    #[error("the payload has no `name`")]
    NoName,
    #[error("the payload's `name` is a JSON {found}; it must be a string")]
    NameNotAString { found: &'static str },
    #[error("the payload's `name` is empty")]
    EmptyName,
    #[error("the payload's `name` is {length} bytes long; the maximum is {MAX_NAME_LENGTH}")]
    NameTooLong { length: usize },
}

impl Request {
    /// Decodes a message's data: UTF-8 JSON, an object, with a string `name`.
    ///
    /// # Errors
    /// A [`DecodeError`]. It never quotes the payload, which may hold secrets.
    pub fn decode(data: &[u8]) -> Result<Self, DecodeError> {
        if data.is_empty() {
            return Err(DecodeError::Empty);
        }
        let text = std::str::from_utf8(data).map_err(|error| DecodeError::NotUtf8 {
            offset: error.valid_up_to(),
        })?;
        let value: Value = serde_json::from_str(text).map_err(|error| DecodeError::NotJson {
            reason: error.to_string(),
        })?;
        let Value::Object(payload) = value else {
            return Err(DecodeError::NotAnObject {
                found: json_kind(&value),
            });
        };
        let task = match payload.get("name") {
            None => return Err(DecodeError::NoName),
            Some(Value::String(name)) if name.is_empty() => return Err(DecodeError::EmptyName),
            Some(Value::String(name)) if name.len() > MAX_NAME_LENGTH => {
                return Err(DecodeError::NameTooLong { length: name.len() });
            }
            Some(Value::String(name)) => name.clone(),
            Some(other) => {
                return Err(DecodeError::NameNotAString {
                    found: json_kind(other),
                });
            }
        };
        Ok(Self { task, payload })
    }
}

fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_keeps_its_whole_payload() {
        let request = Request::decode(br#"{"name":"train","seed":7}"#).unwrap();
        assert_eq!(request.task, "train");
        assert_eq!(request.payload["seed"], 7);
        assert_eq!(request.payload["name"], "train");
    }

    #[test]
    fn each_kind_of_bad_data_is_named() {
        let cases: [(&[u8], DecodeError); 7] = [
            (b"", DecodeError::Empty),
            (b"{\"name\":\"\xff\"}", DecodeError::NotUtf8 { offset: 9 }),
            (b"[1]", DecodeError::NotAnObject { found: "array" }),
            (b"null", DecodeError::NotAnObject { found: "null" }),
            (b"{}", DecodeError::NoName),
            (
                b"{\"name\":3}",
                DecodeError::NameNotAString { found: "number" },
            ),
            (b"{\"name\":\"\"}", DecodeError::EmptyName),
        ];
        for (data, expected) in cases {
            assert_eq!(Request::decode(data), Err(expected));
        }
    }

    #[test]
    fn ten_thousand_levels_of_nesting_are_refused_without_a_stack_overflow() {
        let deep = format!(
            "{{\"name\":\"t\",\"x\":{}{}}}",
            "[".repeat(10_000),
            "]".repeat(10_000)
        );
        assert!(matches!(
            Request::decode(deep.as_bytes()),
            Err(DecodeError::NotJson { .. })
        ));
    }

    #[test]
    fn an_error_never_quotes_the_payload() {
        let error = Request::decode(br#"{"name":"x","token":"s3cret" oops"#).unwrap_err();
        assert!(!error.to_string().contains("s3cret"));
    }
}
