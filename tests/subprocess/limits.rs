//! The resource limits of a command.

use serde_json::json;
use trainyard::executor::subprocess::ResourceLimits;

use crate::support::{Place, attempt, failure, outcome_of, run};

#[tokio::test]
async fn a_command_that_exceeds_its_memory_limit_is_out_of_memory() {
    let place = Place::new();
    // It buffers a line that never ends.
    let mut settings = place.script("exec tail /dev/zero");
    settings.limits.memory = Some(200 << 20);
    let (error, permanent) = failure(run(settings).await);
    assert!(error.starts_with("out of memory"), "{error}");
    assert!(!permanent);
}

#[tokio::test]
async fn limits_are_exact_and_apply_to_every_process() {
    let place = Place::new();
    let mut settings = place.script("sh -c 'ulimit -v; ulimit -Hv; ulimit -n; ulimit -c; nice'");
    settings.limits = ResourceLimits {
        memory: Some(2 << 30),
        nice: Some(5),
        open_files: Some(64),
    };
    let attempt = attempt(json!({}));
    let reports = attempt.reports.clone();
    outcome_of(settings, attempt).await;
    let tail = reports.tail();
    let own = std::process::Command::new("nice").output().unwrap().stdout;
    let own: i32 = String::from_utf8(own).unwrap().trim().parse().unwrap();
    let nice = (own + 5).min(19).to_string();
    assert_eq!(tail, ["2097152", "2097152", "64", "0", nice.as_str()]);
}

#[tokio::test]
async fn without_limits_a_command_has_those_of_the_daemon() {
    let place = Place::new();
    let attempt = attempt(json!({}));
    let reports = attempt.reports.clone();
    outcome_of(place.script("ulimit -v"), attempt).await;
    let own = std::process::Command::new("sh")
        .args(["-c", "ulimit -v"])
        .output()
        .unwrap();
    let own = String::from_utf8(own.stdout).unwrap();
    assert_eq!(reports.tail(), [own.trim()]);
}
