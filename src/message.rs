//! A published message, and the training request in it.

use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde_json::value::RawValue;

use crate::json::Fields;

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

/// A training request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub task: String,
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
    #[error(
        "the data begins with a byte order mark, which JSON does not allow; publish it without"
    )]
    ByteOrderMark,
    #[error("the data is not valid JSON: {reason}")]
    NotJson { reason: String },
    #[error(
        "the data is not valid JSON: it has `{found}` at line {line} column {column}; write null"
    )]
    NotANumber {
        found: &'static str,
        line: usize,
        column: usize,
    },
    #[error("the data is a JSON {found}; an object with a `name` was expected")]
    NotAnObject { found: &'static str },
    #[error("the payload has no `name`")]
    NoName,
    #[error("the payload's `name` is a JSON {found}; it must be a string")]
    NameNotAString { found: &'static str },
    #[error("the payload's `name` has half a surrogate pair, which is no character")]
    NameNotText,
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
        if text.starts_with(BYTE_ORDER_MARK) {
            return Err(DecodeError::ByteOrderMark);
        }
        let written: &RawValue =
            serde_json::from_str(text).map_err(|error| not_json(text, &error))?;
        if !written.get().starts_with('{') {
            return Err(DecodeError::NotAnObject {
                found: json_kind(written),
            });
        }
        let fields: Fields<'_> =
            serde_json::from_str(written.get()).map_err(|error| not_json(written.get(), &error))?;
        let name = *fields.get("name").ok_or(DecodeError::NoName)?;
        if !name.get().starts_with('"') {
            return Err(DecodeError::NameNotAString {
                found: json_kind(name),
            });
        }
        let task: String =
            serde_json::from_str(name.get()).map_err(|_| DecodeError::NameNotText)?;
        match task.len() {
            0 => Err(DecodeError::EmptyName),
            1..=MAX_NAME_LENGTH => Ok(Self { task }),
            length => Err(DecodeError::NameTooLong { length }),
        }
    }
}

const BYTE_ORDER_MARK: char = '\u{FEFF}';

/// What some writers put where JSON has no number: Python's `json.dumps`, for one.
const NOT_NUMBERS: [&str; 3] = ["NaN", "-Infinity", "Infinity"];

fn not_json(text: &str, error: &serde_json::Error) -> DecodeError {
    let line = text.lines().nth(error.line().saturating_sub(1));
    let line = line.unwrap_or_default();
    // The parser stops at the word's first byte, or behind its minus sign.
    let found = NOT_NUMBERS.into_iter().find_map(|word| {
        let columns = [error.column(), error.column().saturating_sub(1)];
        let is_there = |column: &usize| {
            let rest = column.checked_sub(1).and_then(|start| line.get(start..));
            rest.is_some_and(|rest| rest.starts_with(word))
        };
        Some((word, columns.into_iter().find(is_there)?))
    });
    match found {
        Some((found, column)) => DecodeError::NotANumber {
            found,
            line: error.line(),
            column,
        },
        None => DecodeError::NotJson {
            reason: error.to_string(),
        },
    }
}

fn json_kind(value: &RawValue) -> &'static str {
    match value.get().as_bytes().first() {
        Some(b'n') => "null",
        Some(b't' | b'f') => "boolean",
        Some(b'"') => "string",
        Some(b'[') => "array",
        Some(b'{') => "object",
        _ => "number",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_for_the_task_that_it_names() {
        let request = Request::decode(br#"{"seed":7,"name":"train\u0021"}"#).unwrap();
        assert_eq!(request.task, "train!");
    }

    /// Whether a task can read them is for the task to say.
    #[test]
    fn values_that_are_json_are_taken_whatever_they_are() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        for value in ["\"\\ud800\"", "1e400", "20261125064636571233", &deep] {
            let data = format!("{{\"name\":\"t\",\"x\":{value}}}");
            assert_eq!(Request::decode(data.as_bytes()).unwrap().task, "t");
        }
    }

    #[test]
    fn what_is_almost_json_is_named() {
        for (data, says) in [
            ("\u{FEFF}{\"name\":\"t\"}", "a byte order mark"),
            ("{\"name\":\"t\",\"x\":NaN}", "`NaN` at line 1 column 17"),
            (
                "{\"name\":\"t\",\n\"x\":[Infinity]}",
                "`Infinity` at line 2",
            ),
            (
                "{\"name\":\"t\",\"x\":-Infinity}",
                "`-Infinity` at line 1 column 17",
            ),
            ("{\"name\":\"\\ud800\"}", "half a surrogate pair"),
        ] {
            let error = Request::decode(data.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
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
    fn an_error_never_quotes_the_payload() {
        let error = Request::decode(br#"{"name":"x","token":"s3cret" oops"#).unwrap_err();
        assert!(!error.to_string().contains("s3cret"));
    }
}
