//! A command's input, and the outcome that its exit and its reports lead to.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;

use serde_json::json;
use trainyard::devices::Devices;
use trainyard::executor::Attempt;
use trainyard::json::Json;
use trainyard::outcome::Outcome;
use trainyard::report::Progress;

use crate::support::{Place, attempt, failure, forget, outcome_of, run};

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

#[tokio::test]
async fn the_exit_code_is_the_outcome() {
    let place = Place::new();
    let succeeded = run(place.script("exit 0")).await;
    assert_eq!(succeeded, Outcome::Succeeded(Json::default()));
    for (code, permanent) in [(1, false), (65, true), (78, true), (77, false)] {
        let script = format!("echo first >&2; echo 'No such column: y' >&2; exit {code}");
        let error = format!("exit code {code}: first | No such column: y");
        assert_eq!(
            failure(run(place.script(&script)).await),
            (error, permanent)
        );
    }
    let mut own = place.script("exit 3");
    own.permanent_exit_codes = vec![3];
    assert!(failure(run(own).await).1);
}

#[tokio::test]
async fn orphans_that_end_all_the_time_do_not_hide_how_the_command_ended() {
    let place = Place::new();
    for _ in 0..20 {
        let script = "for i in $(seq 300); do (true &); done; exit 0";
        let outcome = run(place.script(script)).await;
        assert_eq!(outcome, Outcome::Succeeded(Json::default()));
    }
}

#[tokio::test]
async fn an_external_signal_is_a_transient_failure_that_names_it() {
    let place = Place::new();
    let (error, permanent) = failure(run(place.script("kill -KILL $$")).await);
    assert!(error.contains("SIGKILL") && error.contains("out-of-memory"));
    assert!(!permanent);
    let (error, _) = failure(run(place.script("kill -SEGV $$")).await);
    assert_eq!(error, "killed by SIGSEGV");
}

#[tokio::test]
async fn the_last_result_progress_and_checkpoint_count() {
    let place = Place::new();
    let script = r#"
        echo loading
        echo '@trainyard {"progress":0.5,"step":1,"metrics":{"loss":0.7}}'
        echo '@trainyard {"checkpoint":"gs://b/1"}'
        echo '@trainyard {"result":'
        echo '@trainyard {"result":{"a":1}}'
        echo '@trainyard {"progress":1.0,"step":2,"checkpoint":"gs://b/2","result":{"a":2}}'
        echo almost >&2"#;
    let attempt = attempt(json!({}));
    let reports = attempt.reports.clone();
    let outcome = outcome_of(place.script(script), attempt).await;
    assert_eq!(outcome, Outcome::Succeeded(json!({"a": 2}).into()));
    let series = reports.series();
    assert_eq!(
        series[0],
        Progress {
            fraction: Some(0.5),
            step: Some(1),
            metrics: [("loss".to_owned(), 0.7)].into(),
        }
    );
    assert_eq!(series.len(), 2);
    let checkpoint = reports.watch_checkpoint().borrow().clone();
    assert_eq!(checkpoint.as_deref(), Some("gs://b/2"));
    let mut tail = reports.tail();
    tail.sort();
    assert_eq!(tail, ["@trainyard {\"result\":", "almost", "loading"]);
}

#[tokio::test]
async fn exactly_the_payload_reaches_stdin() {
    let place = Place::new();
    let payload = json!({
        "name": "finetune",
        "--help": "; rm -rf \"$HOME\" `id` $(id) | & > < * ? \\ '\n\u{0}\u{7f}é😀",
        "number": 0.1,
    });
    let pretty = serde_json::to_string_pretty(&payload).unwrap();
    let expected = format!(" {pretty}\n{{\"twice\":1.10}}\r\n");
    let mut attempt = attempt(payload);
    attempt.data = expected.clone().into();
    let script = "cat > \"$OUT\"; exit $#";
    let outcome = outcome_of(place.script(script), attempt).await;
    assert_eq!(outcome, Outcome::Succeeded(Json::default()));
    assert_eq!(place.written(), expected);
}

#[tokio::test]
async fn a_payload_larger_than_a_pipe_arrives_whole() {
    let place = Place::new();
    let attempt = attempt(json!({"text": "x".repeat(5_000_000)}));
    let size = attempt.data.len();
    let outcome = outcome_of(place.script("wc -c > \"$OUT\""), attempt).await;
    assert_eq!(outcome, Outcome::Succeeded(Json::default()));
    assert_eq!(place.written().trim(), size.to_string());
}

#[tokio::test]
async fn the_environment_is_the_allow_list_and_the_variables_of_task_and_attempt() {
    let place = Place::new();
    let devices = Devices::new(["GPU-1", "GPU-2"].map(str::to_owned).to_vec());
    let attempt = Attempt {
        checkpoint: Some("gs://b/1".into()),
        message_id: "12\u{0}34".into(),
        deadline: chrono::DateTime::from_timestamp(1_700_000_000, 0),
        devices: devices.take(2).map(Arc::new),
        ..attempt(json!({}))
    };
    let fence = format!("2.{}", attempt.fence.token);
    let job_id = attempt.job_id.to_string();
    let mut settings = place.script("");
    // A shell would add variables.
    let out = place.out().to_str().unwrap().to_owned();
    settings.command = ["cp", "/proc/self/environ", &out]
        .map(str::to_owned)
        .to_vec();
    let work_dir = settings.work_dir.join(&job_id);
    let mut expected: BTreeMap<String, String> = std::env::vars()
        .filter(|(name, _)| INHERITED.contains(&name.as_str()) || name.starts_with("LC_"))
        .collect();
    for (name, value) in [
        ("TRAINYARD_JOB_ID", job_id.as_str()),
        ("TRAINYARD_TASK", "finetune"),
        ("TRAINYARD_SUBSCRIPTION", "heavy-task"),
        ("TRAINYARD_MESSAGE_ID", "12?34"),
        ("TRAINYARD_ATTEMPT", "2"),
        ("TRAINYARD_FENCE", fence.as_str()),
        ("TRAINYARD_CHECKPOINT", "gs://b/1"),
        ("TRAINYARD_DEADLINE", "2023-11-14T22:13:20.000Z"),
        ("TRAINYARD_WORK_DIR", work_dir.to_str().unwrap()),
        ("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2"),
        ("OUT", &out),
    ] {
        expected.insert(name.to_owned(), value.to_owned());
    }
    outcome_of(settings, attempt).await;
    let found: BTreeMap<String, String> = place
        .written()
        .split_terminator('\0')
        .map(|variable| variable.split_once('=').unwrap())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    assert_eq!(found, expected);
}

#[tokio::test]
async fn a_first_attempt_has_no_checkpoint_and_a_job_without_gpus_sees_none() {
    let place = Place::new();
    let script = r#"[ -z "${TRAINYARD_CHECKPOINT+set}" ] && [ "$CUDA_VISIBLE_DEVICES" = "" ] \
        && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]"#;
    let outcome = run(place.script(script)).await;
    assert_eq!(outcome, Outcome::Succeeded(Json::default()));
}

#[tokio::test]
async fn a_command_inherits_only_the_three_standard_streams() {
    let place = Place::new();
    let list = ["ls", "/proc/self/fd"];
    let mut settings = place.script("");
    settings.command = list.map(str::to_owned).to_vec();
    let attempt = attempt(json!({}));
    let reports = attempt.reports.clone();
    outcome_of(settings, attempt).await;
    // The test process itself may inherit more open files.
    let plain = Command::new(list[0]).arg(list[1]).output().unwrap().stdout;
    let plain = String::from_utf8(plain).unwrap();
    assert_eq!(reports.tail(), plain.lines().collect::<Vec<_>>());
}

#[tokio::test]
async fn the_work_directory_stays_until_the_job_is_forgotten() {
    let place = Place::new();
    let mut again = attempt(json!({}));
    let id = again.job_id;
    let script = "[ -e \"$TRAINYARD_WORK_DIR/weights\" ] && exit 0
        echo > \"$TRAINYARD_WORK_DIR/weights\"; exit 1";
    assert!(!failure(outcome_of(place.script(script), again.clone()).await).1);
    again.fence.attempt += 1;
    let outcome = outcome_of(place.script(script), again).await;
    assert_eq!(outcome, Outcome::Succeeded(Json::default()));
    assert_eq!(place.work_dirs(), 1);

    let mut keeping = place.script(script);
    keeping.keep_work_dir = true;
    forget(keeping, id).await;
    assert_eq!(place.work_dirs(), 1);
    forget(place.script(script), id).await;
    assert_eq!(place.work_dirs(), 0);
    // A job that ran elsewhere has no directory here.
    forget(place.script(script), id).await;
}

#[tokio::test]
async fn the_working_directory_is_the_tasks() {
    let place = Place::new();
    let mut settings = place.script("pwd -P > \"$OUT\"");
    settings.cwd = Some("/usr/bin".into());
    run(settings).await;
    assert_eq!(place.written(), "/usr/bin\n");
}
