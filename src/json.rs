//! JSON as it was written: numbers keep every digit, and depth has no limit but the text's.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

/// The fields of a JSON object, as they were written. Of a field that comes twice the last
/// one counts.
pub(crate) type Fields<'a> = BTreeMap<Cow<'a, str>, &'a RawValue>;

/// A JSON value as text.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Json(Box<RawValue>);

impl Json {
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.get()
    }

    /// The value with numbers as Rust's `f64`, `u64` or `i64`, so that some lose digits.
    ///
    /// # Errors
    /// A number is too large for them, or the value nests beyond 128 levels.
    pub fn to_value(&self) -> Result<Value, serde_json::Error> {
        serde_json::from_str(self.as_str())
    }
}

impl From<&RawValue> for Json {
    fn from(raw: &RawValue) -> Self {
        Self(raw.to_owned())
    }
}

impl From<Value> for Json {
    fn from(value: Value) -> Self {
        // A `Value` has no keys but strings, so writing it cannot fail.
        Self(to_raw_value(&value).unwrap_or_else(|_| RawValue::NULL.to_owned()))
    }
}

impl Default for Json {
    fn default() -> Self {
        RawValue::NULL.into()
    }
}

/// Equal values are equal however they are written.
impl PartialEq for Json {
    fn eq(&self, other: &Self) -> bool {
        canonical(&self.0) == canonical(&other.0)
    }
}

/// Beyond this depth values are compared as they were written.
const MAX_DEPTH: u32 = 128;
/// A number with a larger exponent is written with one.
const MAX_ZEROS: i64 = 40;

/// The value that a JSON pointer (RFC 6901) names.
pub(crate) fn pointed<'a>(text: &'a str, pointer: &str) -> Option<&'a RawValue> {
    let mut value: &RawValue = serde_json::from_str(text).ok()?;
    for name in pointer.split('/').skip(1) {
        let name = name.replace("~1", "/").replace("~0", "~");
        value = match value.get().as_bytes().first()? {
            b'{' => fields(value)?.remove(&*name)?,
            b'[' => *elements(value)?.get(index(&name)?)?,
            _ => return None,
        };
    }
    Some(value)
}

fn fields(value: &RawValue) -> Option<Fields<'_>> {
    serde_json::from_str(value.get()).ok()
}

fn elements(value: &RawValue) -> Option<Vec<&RawValue>> {
    serde_json::from_str(value.get()).ok()
}

fn index(name: &str) -> Option<usize> {
    let is_canonical = name == "0" || !name.starts_with(['0', '+']);
    name.parse().ok().filter(|_| is_canonical)
}

/// The same text for equal values: without white space, fields in order, strings with the
/// same escapes, and numbers of the same value alike (`1`, `1.0` and `10e-1`).
pub(crate) fn canonical(value: &RawValue) -> String {
    let mut text = String::new();
    write_canonical(value, &mut text, 0);
    text
}

fn write_canonical(value: &RawValue, text: &mut String, depth: u32) {
    let written = value.get();
    let known = match written.as_bytes().first() {
        _ if depth == MAX_DEPTH => None,
        Some(b'{') => fields(value).map(|fields| write_object(&fields, text, depth)),
        Some(b'[') => elements(value).map(|elements| write_array(&elements, text, depth)),
        Some(b'"') => serde_json::from_str::<Cow<'_, str>>(written)
            .ok()
            .map(|string| write_string(&string, text)),
        Some(b'-' | b'0'..=b'9') => canonical_number(written).map(|number| *text += &number),
        _ => None,
    };
    if known.is_none() {
        *text += written;
    }
}

fn write_object(fields: &Fields<'_>, text: &mut String, depth: u32) {
    let mut separator = '{';
    for (name, value) in fields {
        text.push(separator);
        write_string(name, text);
        text.push(':');
        write_canonical(value, text, depth + 1);
        separator = ',';
    }
    *text += if fields.is_empty() { "{}" } else { "}" };
}

fn write_array(elements: &[&RawValue], text: &mut String, depth: u32) {
    let mut separator = '[';
    for value in elements {
        text.push(separator);
        write_canonical(value, text, depth + 1);
        separator = ',';
    }
    *text += if elements.is_empty() { "[]" } else { "]" };
}

fn write_string(string: &str, text: &mut String) {
    *text += &Value::from(string).to_string();
}

/// None if the exponent is astronomical.
fn canonical_number(written: &str) -> Option<String> {
    let (sign, magnitude) = match written.strip_prefix('-') {
        Some(magnitude) => ("-", magnitude),
        None => ("", written),
    };
    let (mantissa, exponent) = match magnitude.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (magnitude, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        return Some("0".to_owned());
    }
    // The value is the significant digits times ten to this power.
    let power = i64::from(exponent) - length(fraction) + length(digits) - length(significant);
    Some(format!("{sign}{}", with_power(significant, power)))
}

fn length(digits: &str) -> i64 {
    i64::try_from(digits.len()).unwrap_or(i64::MAX)
}

fn with_power(digits: &str, power: i64) -> String {
    let before_point = length(digits) + power;
    let zeros = |count: i64| "0".repeat(usize::try_from(count).unwrap_or_default());
    match power {
        0.. if power <= MAX_ZEROS => format!("{digits}{}", zeros(power)),
        ..0 if before_point > 0 => {
            let (whole, fraction) = digits.split_at(digits.len() - zeros(-power).len());
            format!("{whole}.{fraction}")
        }
        ..0 if before_point >= -MAX_ZEROS => format!("0.{}{digits}", zeros(-before_point)),
        _ => format!("{digits}e{power}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn canonical_of(text: &str) -> String {
        canonical(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn numbers_are_equal_by_value_and_keep_every_digit() {
        for (written, expected) in [
            ("1", "1"),
            ("1.0", "1"),
            ("1e0", "1"),
            ("10e-1", "1"),
            ("0.1E1", "1"),
            ("-0", "0"),
            ("-0.0e5", "0"),
            ("0.5", "0.5"),
            ("-12.50", "-12.5"),
            ("1e3", "1000"),
            ("1.5e-3", "0.0015"),
            ("20261125064636571233", "20261125064636571233"),
            ("1e400", "1e400"),
            ("10E+399", "1e400"),
            ("1e-400", "1e-400"),
            ("1e99999999999", "1e99999999999"),
        ] {
            assert_eq!(canonical_of(written), expected, "{written}");
        }
    }

    #[test]
    fn fields_have_an_order_and_strings_the_same_escapes() {
        let text = "{ \"b\": [1.0, {} , []], \"a\": \"\\u0041\\/\", \"b\": [2] }";
        assert_eq!(canonical_of(text), r#"{"a":"A/","b":[2]}"#);
        assert_eq!(canonical_of(r#""\ud800""#), r#""\ud800""#);
        assert_eq!(canonical_of(r#"[{}, [], null, true]"#), "[{},[],null,true]");
    }

    #[test]
    fn a_deep_value_is_compared_as_it_was_written() {
        let deep = "[".repeat(100_000) + "1.0" + &"]".repeat(100_000);
        assert_eq!(canonical_of(&deep), deep);
    }

    #[test]
    fn a_pointer_names_a_value_as_it_was_written() {
        let text = r#"{"a":{"b/c":[1, 20261125064636571233]},"x":{"":7}}"#;
        for (pointer, expected) in [
            ("/a/b~1c/1", Some("20261125064636571233")),
            ("/a/b~1c/0", Some("1")),
            ("/a/b~1c/00", None),
            ("/a/b~1c/+1", None),
            ("/a/b~1c/2", None),
            ("/a/none", None),
            ("/x/", Some("7")),
            ("/x//deeper", None),
        ] {
            let found = pointed(text, pointer).map(RawValue::get);
            assert_eq!(found, expected, "{pointer}");
        }
    }

    proptest! {
        #[test]
        fn a_canonical_number_is_the_same_number(number in -1e30..1e30f64, zeros in 0..5usize) {
            let written = format!("{number:?}");
            let canonical = canonical_of(&written);
            prop_assert_eq!(canonical.parse::<f64>().unwrap(), number);
            if written.contains('.') && !written.contains('e') {
                let longer = written + &"0".repeat(zeros);
                prop_assert_eq!(canonical_of(&longer), canonical);
            }
        }

        #[test]
        fn an_integer_stays_as_it_is(number: i64) {
            prop_assert_eq!(canonical_of(&number.to_string()), number.to_string());
        }
    }

    #[test]
    fn a_value_is_written_without_white_space() {
        assert_eq!(
            Json::from(json!({"b": 1, "a": "x"})).as_str(),
            r#"{"a":"x","b":1}"#
        );
        assert_eq!(Json::default().as_str(), "null");
    }
}
