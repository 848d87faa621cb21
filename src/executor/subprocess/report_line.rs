//! Report lines: `@trainyard ` and one JSON object, on the command's stdout.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::json::{Fields, Json};
use crate::report::Progress;

pub(super) const PREFIX: &str = "@trainyard ";

/// More metrics on one line are dropped, as reports stay in memory.
const MAX_METRICS: usize = 64;
const MAX_METRIC_NAME: usize = 200;
/// A checkpoint becomes an environment variable of the next attempt.
const MAX_CHECKPOINT: usize = 8 << 10;

const NOT_NUMBERS: &[&str] = &["NaN", "Infinity", "-Infinity"];

/// The content of one report line.
#[derive(Debug, Default, PartialEq)]
pub(super) struct ReportLine {
    pub(super) progress: Option<Progress>,
    pub(super) checkpoint: Option<String>,
    pub(super) result: Option<Json>,
    /// The invalid fields, with the reasons. The other fields count.
    pub(super) errors: Vec<String>,
}

impl ReportLine {
    /// `None` if the line is not a report line.
    pub(super) fn read(line: &[u8]) -> Option<Result<Self, String>> {
        line.strip_prefix(PREFIX.as_bytes()).map(Self::parse)
    }

    fn parse(json: &[u8]) -> Result<Self, String> {
        let json = std::str::from_utf8(json).map_err(|error| error.to_string())?;
        match serde_json::from_str(json) {
            Ok(fields) => Self::of(fields),
            Err(error) => {
                let numbers_only = without_non_numbers(json).ok_or_else(|| error.to_string())?;
                let fields = serde_json::from_str(&numbers_only);
                Self::of(fields.map_err(|error| error.to_string())?)
            }
        }
    }

    fn of(mut object: Fields<'_>) -> Result<Self, String> {
        let mut errors = Vec::new();
        let checkpoint = field(&mut object, "checkpoint", &mut errors, checkpoint);
        let progress = Progress {
            fraction: field(&mut object, "progress", &mut errors, fraction),
            step: field(&mut object, "step", &mut errors, non_negative_integer),
            metrics: metrics(&mut object, &mut errors),
        };
        let line = Self {
            progress: (progress != Progress::default()).then_some(progress),
            checkpoint,
            result: object.remove("result").map(Json::from),
            errors,
        };
        match line == Self::default() {
            true => Err("it has none of progress, step, metrics, checkpoint, result".to_owned()),
            false => Ok(line),
        }
    }
}

/// A field's value, or `None` if it is missing, null or invalid.
fn field<T>(
    object: &mut Fields<'_>,
    name: &str,
    errors: &mut Vec<String>,
    read: impl FnOnce(Value) -> Result<T, String>,
) -> Option<T> {
    let value = object.remove(name).filter(|value| value.get() != "null")?;
    let value =
        serde_json::from_str(value.get()).map_err(|error| format!("is unreadable: {error}"));
    value
        .and_then(read)
        .map_err(|reason| errors.push(format!("`{name}` {reason}")))
        .ok()
}

fn checkpoint(value: Value) -> Result<String, String> {
    match value {
        Value::String(text) if text.len() > MAX_CHECKPOINT => {
            Err(format!("is longer than {MAX_CHECKPOINT} bytes"))
        }
        Value::String(text) if text.is_empty() || text.contains('\0') => {
            Err("is empty or contains a NUL".to_owned())
        }
        Value::String(text) => Ok(text),
        _ => Err("is not a string".to_owned()),
    }
}

fn fraction(value: Value) -> Result<f64, String> {
    let number = value.as_f64().ok_or("is not a number")?;
    Ok(number.clamp(0.0, 1.0))
}

/// Accepts `120.0` too, as some programs count in floating point.
fn non_negative_integer(value: Value) -> Result<u64, String> {
    const FIRST_BEYOND: f64 = 9_007_199_254_740_992.0;
    let as_float = value
        .as_f64()
        .filter(|float| float.fract() == 0.0 && (0.0..FIRST_BEYOND).contains(float));
    let number = value
        .as_u64()
        .or_else(|| format!("{:.0}", as_float?).parse().ok());
    number.ok_or_else(|| "is not a non-negative integer".to_owned())
}

/// Metrics are floating-point numbers of 64 bits.
fn metrics(object: &mut Fields<'_>, errors: &mut Vec<String>) -> BTreeMap<String, f64> {
    let Some(given) = object
        .remove("metrics")
        .filter(|given| given.get() != "null")
    else {
        return BTreeMap::new();
    };
    let Ok(given) = serde_json::from_str::<Fields<'_>>(given.get()) else {
        errors.push("`metrics` is not an object".to_owned());
        return BTreeMap::new();
    };
    given
        .into_iter()
        .filter(|(name, _)| name.len() <= MAX_METRIC_NAME && !name.contains('\0'))
        // Null stands for NaN or an infinity, which JSON lacks.
        .filter(|(_, value)| value.get() != "null")
        .filter_map(|(name, value)| match serde_json::from_str(value.get()) {
            Ok(number) => Some((name.into_owned(), number)),
            Err(_) => {
                errors.push(format!("metric `{}` is not a number", name.escape_debug()));
                None
            }
        })
        .take(MAX_METRICS)
        .collect()
}

/// Replaces NaN and infinities, which Python's `json` and others write, with
/// null. `None` if there are none.
fn without_non_numbers(json: &str) -> Option<String> {
    let mut written = String::with_capacity(json.len());
    let mut rest = json;
    let mut in_string = false;
    while let Some(next) = rest.chars().next() {
        let not_a_number = NOT_NUMBERS
            .iter()
            .find_map(|name| rest.strip_prefix(name).filter(|_| !in_string));
        if let Some(after) = not_a_number {
            written.push_str("null");
            rest = after;
            continue;
        }
        // An escaped quote does not end the string.
        let escape = in_string && next == '\\';
        let taken = rest.chars().take(if escape { 2 } else { 1 });
        let (taken, after) = rest.split_at(taken.map(char::len_utf8).sum());
        written.push_str(taken);
        rest = after;
        in_string ^= next == '"';
    }
    (written != json).then_some(written)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(json: &str) -> Result<ReportLine, String> {
        ReportLine::read(format!("@trainyard {json}").as_bytes()).unwrap()
    }

    #[test]
    fn a_line_may_have_several_fields() {
        let line = parse(
            r#"{"progress":0.4,"step":120,"metrics":{"loss":0.31,"nan":null},"checkpoint":"gs://b/c","result":{"a":1},"later":true}"#,
        )
        .unwrap();
        let progress = line.progress.unwrap();
        assert_eq!((progress.fraction, progress.step), (Some(0.4), Some(120)));
        assert_eq!(
            progress.metrics,
            BTreeMap::from([("loss".to_owned(), 0.31)])
        );
        assert_eq!(line.checkpoint.as_deref(), Some("gs://b/c"));
        assert_eq!(line.result, Some(json!({"a": 1}).into()));
    }

    #[test]
    fn malformed_report_lines_differ_from_other_lines() {
        for malformed in [
            "",
            "{",
            "7",
            "{}",
            "[NaN]",
            r#"{"step":1,"loss":NotANumber}"#,
            r#"{"step":Na"#,
        ] {
            assert!(parse(malformed).is_err(), "{malformed}");
        }
        assert_eq!(ReportLine::read(b"epoch 1"), None);
        assert_eq!(ReportLine::read(b" @trainyard {}"), None);
        assert_eq!(ReportLine::read(b"@trainyards {}"), None);
    }

    #[test]
    fn the_fields_of_a_line_are_bounded() {
        let many: BTreeMap<String, f64> = (0..1000).map(|n| (format!("m{n}"), 1.0)).collect();
        let line = parse(&json!({"progress": 40.0, "metrics": many}).to_string()).unwrap();
        let progress = line.progress.unwrap();
        assert_eq!(progress.fraction, Some(1.0));
        assert_eq!(progress.metrics.len(), 64);
        let long = json!({"checkpoint": "x".repeat(100_000)}).to_string();
        assert_eq!(parse(&long).unwrap().checkpoint, None);
    }

    #[test]
    fn an_invalid_field_does_not_affect_the_others() {
        for field in [
            r#""step":-1"#,
            r#""step":1.5"#,
            r#""progress":"40%""#,
            r#""metrics":7"#,
            r#""metrics":{"loss":"low"}"#,
        ] {
            let line = parse(&format!("{{{field},\"checkpoint\":\"c\",\"result\":1}}"));
            let expected = ReportLine {
                checkpoint: Some("c".to_owned()),
                result: Some(json!(1).into()),
                ..ReportLine::default()
            };
            let line = line.unwrap();
            assert_eq!(line.errors.len(), 1, "{field}");
            let errors = Vec::new();
            assert_eq!(ReportLine { errors, ..line }, expected);
        }
        for checkpoint in [r#""a\u0000b""#, "\"\"", "7"] {
            let line = parse(&format!(r#"{{"step":3,"checkpoint":{checkpoint}}}"#)).unwrap();
            assert_eq!((line.checkpoint, line.errors.len()), (None, 1));
            assert_eq!(line.progress.unwrap().step, Some(3));
        }
        let line = parse(r#"{"step":120.0}"#).unwrap();
        assert_eq!(line.progress.unwrap().step, Some(120));
        let line = parse(r#"{"step":18446744073709551615}"#).unwrap();
        assert_eq!(line.progress.unwrap().step, Some(u64::MAX));
    }

    #[test]
    fn nan_and_infinities_are_null() {
        let line = parse(
            r#"{"metrics":{"a":NaN,"b":-Infinity,"c":1.5},"checkpoint":"NaN \" -Infinity","result":[NaN,Infinity,"NaN\\",-1]}"#,
        )
        .unwrap();
        assert_eq!(
            line.progress.unwrap().metrics,
            BTreeMap::from([("c".to_owned(), 1.5)])
        );
        assert_eq!(line.checkpoint.as_deref(), Some("NaN \" -Infinity"));
        assert_eq!(line.result, Some(json!([null, null, "NaN\\", -1]).into()));
        assert_eq!(line.errors, [""; 0]);
    }
}
