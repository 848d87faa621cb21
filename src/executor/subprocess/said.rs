//! The lines that a command says to trainyard: `@trainyard ` and one JSON
//! object, on its stdout.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::report::Progress;

pub(super) const PREFIX: &str = "@trainyard ";

/// More of them on one line are dropped: reports are kept.
const MOST_METRICS: usize = 64;
const LONGEST_METRIC_NAME: usize = 200;
/// It goes into the environment of the next attempt.
const LONGEST_CHECKPOINT: usize = 8 << 10;

const NOT_NUMBERS: &[&str] = &["NaN", "Infinity", "-Infinity"];

/// What one such line says.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Said {
    pub(super) progress: Option<Progress>,
    pub(super) checkpoint: Option<String>,
    pub(super) result: Option<Value>,
    /// What of it cannot be taken, and why. It does not cost the rest.
    pub(super) wrong: Vec<String>,
}

impl Said {
    /// `None` for a line that is not meant for trainyard.
    pub(super) fn read(line: &[u8]) -> Option<Result<Self, String>> {
        line.strip_prefix(PREFIX.as_bytes()).map(Self::parse)
    }

    fn parse(json: &[u8]) -> Result<Self, String> {
        let mut object: Map<String, Value> = serde_json::from_slice(json)
            .or_else(|error| match without_non_numbers(json) {
                Some(json) => serde_json::from_slice(&json),
                None => Err(error),
            })
            .map_err(|error| error.to_string())?;
        let mut wrong = Vec::new();
        let checkpoint = field(&mut object, "checkpoint", &mut wrong, checkpoint);
        let progress = Progress {
            fraction: field(&mut object, "progress", &mut wrong, fraction),
            step: field(&mut object, "step", &mut wrong, whole_number),
            metrics: metrics(&mut object, &mut wrong),
        };
        let said = Self {
            progress: (progress != Progress::default()).then_some(progress),
            checkpoint,
            result: object.remove("result"),
            wrong,
        };
        match said == Self::default() {
            true => Err("it has none of progress, step, metrics, checkpoint, result".to_owned()),
            false => Ok(said),
        }
    }
}

/// A field's value, or nothing if it is null or cannot be taken.
fn field<T>(
    object: &mut Map<String, Value>,
    name: &str,
    wrong: &mut Vec<String>,
    read: impl FnOnce(Value) -> Result<T, String>,
) -> Option<T> {
    let value = object.remove(name).filter(|value| !value.is_null())?;
    read(value)
        .map_err(|reason| wrong.push(format!("`{name}` {reason}")))
        .ok()
}

fn checkpoint(value: Value) -> Result<String, String> {
    match value {
        Value::String(text) if text.len() > LONGEST_CHECKPOINT => {
            Err(format!("is longer than {LONGEST_CHECKPOINT} bytes"))
        }
        Value::String(text) if text.is_empty() || text.contains('\0') => {
            Err("is empty, or has a NUL in it".to_owned())
        }
        Value::String(text) => Ok(text),
        _ => Err("is no text".to_owned()),
    }
}

fn fraction(value: Value) -> Result<f64, String> {
    let number = value.as_f64().ok_or("is no number")?;
    Ok(number.clamp(0.0, 1.0))
}

/// Many programs count in floating point.
fn whole_number(value: Value) -> Result<u64, String> {
    const FIRST_BEYOND: f64 = 9_007_199_254_740_992.0;
    let as_float = value
        .as_f64()
        .filter(|float| float.fract() == 0.0 && (0.0..FIRST_BEYOND).contains(float));
    let number = value
        .as_u64()
        .or_else(|| format!("{:.0}", as_float?).parse().ok());
    number.ok_or_else(|| "is no whole number from 0 on".to_owned())
}

fn metrics(object: &mut Map<String, Value>, wrong: &mut Vec<String>) -> BTreeMap<String, f64> {
    let given = field(object, "metrics", wrong, |value| match value {
        Value::Object(metrics) => Ok(metrics),
        _ => Err("is no object".to_owned()),
    });
    given
        .unwrap_or_default()
        .into_iter()
        .filter(|(name, _)| name.len() <= LONGEST_METRIC_NAME && !name.contains('\0'))
        // Null is a figure that is not a number, which JSON cannot write.
        .filter(|(_, value)| !value.is_null())
        .filter_map(|(name, value)| match value.as_f64() {
            Some(number) => Some((name, number)),
            None => {
                wrong.push(format!("metric `{}` is no number", name.escape_debug()));
                None
            }
        })
        .take(MOST_METRICS)
        .collect()
}

/// The line with null for the figures that are not numbers, as Python's `json`
/// and others write them. `None` if it has none.
fn without_non_numbers(json: &[u8]) -> Option<Vec<u8>> {
    let mut written = Vec::with_capacity(json.len());
    let mut rest = json;
    let (mut in_string, mut found) = (false, false);
    while let Some((&byte, after)) = rest.split_first() {
        let skipped = match byte {
            _ if in_string => None,
            b'N' | b'I' | b'-' => NOT_NUMBERS
                .iter()
                .find_map(|name| rest.strip_prefix(name.as_bytes())),
            _ => None,
        };
        if let Some(after) = skipped {
            written.extend_from_slice(b"null");
            found = true;
            rest = after;
            continue;
        }
        written.push(byte);
        rest = after;
        match (byte, after.split_first()) {
            (b'"', _) => in_string = !in_string,
            // What is escaped does not end the string.
            (b'\\', Some((&escaped, after))) if in_string => {
                written.push(escaped);
                rest = after;
            }
            _ => {}
        }
    }
    found.then_some(written)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(json: &str) -> Result<Said, String> {
        Said::read(format!("@trainyard {json}").as_bytes()).unwrap()
    }

    #[test]
    fn a_line_may_say_several_things() {
        let said = parse(
            r#"{"progress":0.4,"step":120,"metrics":{"loss":0.31,"nan":null},"checkpoint":"gs://b/c","result":{"a":1},"later":true}"#,
        )
        .unwrap();
        let progress = said.progress.unwrap();
        assert_eq!((progress.fraction, progress.step), (Some(0.4), Some(120)));
        assert_eq!(
            progress.metrics,
            BTreeMap::from([("loss".to_owned(), 0.31)])
        );
        assert_eq!(said.checkpoint.as_deref(), Some("gs://b/c"));
        assert_eq!(said.result, Some(json!({"a": 1})));
    }

    #[test]
    fn malformed_lines_are_told_apart_from_lines_for_others() {
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
        assert_eq!(Said::read(b"epoch 1"), None);
        assert_eq!(Said::read(b" @trainyard {}"), None);
        assert_eq!(Said::read(b"@trainyards {}"), None);
    }

    #[test]
    fn what_is_kept_of_a_line_is_bounded() {
        let many: BTreeMap<String, f64> = (0..1000).map(|n| (format!("m{n}"), 1.0)).collect();
        let said = parse(&json!({"progress": 40.0, "metrics": many}).to_string()).unwrap();
        let progress = said.progress.unwrap();
        assert_eq!(progress.fraction, Some(1.0));
        assert_eq!(progress.metrics.len(), 64);
        let long = json!({"checkpoint": "x".repeat(100_000)}).to_string();
        assert_eq!(parse(&long).unwrap().checkpoint, None);
    }

    #[test]
    fn a_field_that_cannot_be_taken_does_not_cost_the_others() {
        for field in [
            r#""step":-1"#,
            r#""step":1.5"#,
            r#""progress":"40%""#,
            r#""metrics":7"#,
            r#""metrics":{"loss":"low"}"#,
        ] {
            let said = parse(&format!("{{{field},\"checkpoint\":\"c\",\"result\":1}}"));
            let expected = Said {
                checkpoint: Some("c".to_owned()),
                result: Some(json!(1)),
                ..Said::default()
            };
            let said = said.unwrap();
            assert_eq!(said.wrong.len(), 1, "{field}");
            let wrong = Vec::new();
            assert_eq!(Said { wrong, ..said }, expected);
        }
        for checkpoint in [r#""a\u0000b""#, "\"\"", "7"] {
            let said = parse(&format!(r#"{{"step":3,"checkpoint":{checkpoint}}}"#)).unwrap();
            assert_eq!((said.checkpoint, said.wrong.len()), (None, 1));
            assert_eq!(said.progress.unwrap().step, Some(3));
        }
        let said = parse(r#"{"step":120.0}"#).unwrap();
        assert_eq!(said.progress.unwrap().step, Some(120));
        let said = parse(r#"{"step":18446744073709551615}"#).unwrap();
        assert_eq!(said.progress.unwrap().step, Some(u64::MAX));
    }

    #[test]
    fn figures_that_are_not_numbers_are_null() {
        let said = parse(
            r#"{"metrics":{"a":NaN,"b":-Infinity,"c":1.5},"checkpoint":"NaN \" -Infinity","result":[NaN,Infinity,"NaN\\",-1]}"#,
        )
        .unwrap();
        assert_eq!(
            said.progress.unwrap().metrics,
            BTreeMap::from([("c".to_owned(), 1.5)])
        );
        assert_eq!(said.checkpoint.as_deref(), Some("NaN \" -Infinity"));
        assert_eq!(said.result, Some(json!([null, null, "NaN\\", -1])));
        assert_eq!(said.wrong, [""; 0]);
    }
}
