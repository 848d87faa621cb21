//! The lines that a command says to trainyard: `@trainyard ` and one JSON
//! object, on its stdout.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::report::Progress;

pub(super) const PREFIX: &str = "@trainyard ";

/// More of them on one line are dropped: reports are kept.
const MOST_METRICS: usize = 64;
const LONGEST_METRIC_NAME: usize = 200;
/// It goes into the environment of the next attempt.
const LONGEST_CHECKPOINT: usize = 8 << 10;

/// What one such line says.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Said {
    pub(super) progress: Option<Progress>,
    pub(super) checkpoint: Option<String>,
    pub(super) result: Option<Value>,
}

#[derive(Deserialize)]
struct Object {
    progress: Option<f64>,
    step: Option<u64>,
    /// Null for a figure that is not a number, which JSON cannot write.
    metrics: Option<BTreeMap<String, Option<f64>>>,
    checkpoint: Option<String>,
    result: Option<Value>,
}

impl Said {
    /// `None` for a line that is not meant for trainyard.
    pub(super) fn read(line: &[u8]) -> Option<Result<Self, String>> {
        line.strip_prefix(PREFIX.as_bytes()).map(Self::parse)
    }

    fn parse(json: &[u8]) -> Result<Self, String> {
        let object: Object = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        if let Some(checkpoint) = &object.checkpoint {
            if checkpoint.len() > LONGEST_CHECKPOINT {
                return Err(format!(
                    "the checkpoint is longer than {LONGEST_CHECKPOINT} bytes"
                ));
            }
            if checkpoint.is_empty() || checkpoint.contains('\0') {
                return Err("the checkpoint is empty, or has a NUL in it".to_owned());
            }
        }
        let metrics: BTreeMap<String, f64> = object
            .metrics
            .unwrap_or_default()
            .into_iter()
            .filter(|(name, _)| name.len() <= LONGEST_METRIC_NAME && !name.contains('\0'))
            .filter_map(|(name, value)| Some((name, value?)))
            .take(MOST_METRICS)
            .collect();
        let progress = Progress {
            fraction: object.progress.map(|fraction| fraction.clamp(0.0, 1.0)),
            step: object.step,
            metrics,
        };
        let said = Self {
            progress: (progress != Progress::default()).then_some(progress),
            checkpoint: object.checkpoint,
            result: object.result,
        };
        match said == Self::default() {
            true => Err("it has none of progress, step, metrics, checkpoint, result".to_owned()),
            false => Ok(said),
        }
    }
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
            r#"{"step":-1}"#,
            r#"{"metrics":{"loss":NaN}}"#,
            r#"{"progress":"40%"}"#,
            r#"{"checkpoint":"a\u0000b"}"#,
            r#"{"checkpoint":""}"#,
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
        assert!(parse(&long).is_err());
    }
}
