//! The environment of a command.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use chrono::SecondsFormat;

use super::super::Attempt;

/// The variables that every command inherits from the daemon.
const INHERITED: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_CLOUD_PROJECT",
];
const INHERITED_PREFIX: &str = "LC_";

/// Unique for each attempt, so it also identifies the attempt's processes.
pub(super) const FENCE: &str = "TRAINYARD_FENCE";

/// The variables. A later source overrides an earlier one: the daemon's
/// (inherited and `passed`), the task's, the attempt's.
pub(super) fn environment(
    own: impl Iterator<Item = (OsString, OsString)>,
    passed: impl Fn(&OsStr) -> bool,
    task: &BTreeMap<String, String>,
    attempt: &Attempt,
    work_dir: &Path,
) -> Vec<(OsString, OsString)> {
    let mut variables: BTreeMap<OsString, OsString> = own
        .filter(|(name, _)| is_inherited(name) || passed(name))
        .collect();
    for (name, value) in task {
        variables.insert(name.into(), value.into());
    }
    let deadline = attempt
        .deadline
        .map(|at| at.to_rfc3339_opts(SecondsFormat::Millis, true));
    let of_attempt = [
        ("TRAINYARD_JOB_ID", Some(attempt.job_id.to_string())),
        ("TRAINYARD_TASK", Some(attempt.task.to_string())),
        (
            "TRAINYARD_SUBSCRIPTION",
            Some(attempt.fence.key.subscription.to_string()),
        ),
        ("TRAINYARD_MESSAGE_ID", Some(attempt.message_id.to_string())),
        ("TRAINYARD_ATTEMPT", Some(attempt.fence.attempt.to_string())),
        (FENCE, Some(fence(attempt))),
        (
            "TRAINYARD_CHECKPOINT",
            attempt.checkpoint.as_deref().map(str::to_owned),
        ),
        ("TRAINYARD_DEADLINE", deadline),
        (
            "CUDA_VISIBLE_DEVICES",
            Some(attempt.device_names().join(",")),
        ),
    ];
    for (name, value) in of_attempt {
        match value {
            Some(value) => variables.insert(name.into(), value.into()),
            None => variables.remove(OsStr::new(name)),
        };
    }
    variables.insert("TRAINYARD_WORK_DIR".into(), work_dir.into());
    variables
        .into_iter()
        .map(|(name, value)| (name, without_nul(value)))
        .collect()
}

/// The attempt number, which grows, and the lease token, which is unique.
pub(super) fn fence(attempt: &Attempt) -> String {
    format!("{}.{}", attempt.fence.attempt, attempt.fence.token)
}

fn is_inherited(name: &OsStr) -> bool {
    INHERITED.iter().any(|inherited| name == *inherited)
        || name.as_bytes().starts_with(INHERITED_PREFIX.as_bytes())
}

/// A message can contain a NUL, and no environment variable can.
fn without_nul(value: OsString) -> OsString {
    let visible = |byte| if byte == 0 { b'?' } else { byte };
    OsString::from_vec(value.into_vec().into_iter().map(visible).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::devices::Devices;

    fn variables(attempt: &Attempt, task: &[(&str, &str)]) -> BTreeMap<String, String> {
        let own = [
            ("PATH", "/bin"),
            ("LC_ALL", "C"),
            ("DATABASE_PASSWORD", "secret"),
            ("HF_TOKEN", "passed"),
            ("TRAINYARD__DATABASE__URL", "postgres://u:secret@h/d"),
            ("TRAINYARD_CHECKPOINT", "of somebody else"),
            ("CUDA_VISIBLE_DEVICES", "0,1,2,3"),
        ];
        let own = own.map(|(name, value)| (name.into(), value.into()));
        let task = task
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        environment(
            own.into_iter(),
            |name| name == "HF_TOKEN",
            &task,
            attempt,
            Path::new("/work"),
        )
        .into_iter()
        .map(|(name, value)| (name.into_string().unwrap(), value.into_string().unwrap()))
        .collect()
    }

    #[test]
    fn the_environment_is_exactly_this() {
        let attempt = Attempt::of(json!({}));
        let names: Vec<String> = variables(&attempt, &[("EPOCHS", "3")])
            .into_keys()
            .collect();
        assert_eq!(
            names,
            [
                "CUDA_VISIBLE_DEVICES",
                "EPOCHS",
                "HF_TOKEN",
                "LC_ALL",
                "PATH",
                "TRAINYARD_ATTEMPT",
                "TRAINYARD_FENCE",
                "TRAINYARD_JOB_ID",
                "TRAINYARD_MESSAGE_ID",
                "TRAINYARD_SUBSCRIPTION",
                "TRAINYARD_TASK",
                "TRAINYARD_WORK_DIR",
            ]
        );
    }

    #[test]
    fn the_task_wins_over_what_is_inherited_and_the_attempt_over_the_task() {
        let devices = Devices::new(["GPU-1", "GPU-2"].map(str::to_owned).to_vec());
        let attempt = Attempt {
            checkpoint: Some("gs://b/c".into()),
            devices: devices.take(2).map(Arc::new),
            deadline: chrono::DateTime::from_timestamp_millis(1_700_000_000_000),
            ..Attempt::of(json!({}))
        };
        let variables = variables(&attempt, &[("PATH", "/opt"), ("TRAINYARD_JOB_ID", "mine")]);
        assert_eq!(variables["PATH"], "/opt");
        assert_eq!(variables["TRAINYARD_JOB_ID"], attempt.job_id.to_string());
        assert_eq!(variables["TRAINYARD_CHECKPOINT"], "gs://b/c");
        assert_eq!(variables["CUDA_VISIBLE_DEVICES"], "GPU-1,GPU-2");
        assert_eq!(variables["TRAINYARD_DEADLINE"], "2023-11-14T22:13:20.000Z");
        assert_eq!(variables["TRAINYARD_WORK_DIR"], "/work");
    }

    #[test]
    fn a_nul_in_a_value_is_replaced() {
        let attempt = Attempt {
            message_id: "a\0b".into(),
            ..Attempt::of(json!({}))
        };
        assert_eq!(variables(&attempt, &[])["TRAINYARD_MESSAGE_ID"], "a?b");
    }
}
