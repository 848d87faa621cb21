//! Runs that are stopped, and that no process of them is left.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use trainyard::json::Json;
use trainyard::outcome::Outcome;

use crate::support::{
    Place, attempt, begin, failure, lives, outcome_of, parent_of, report_step, reported_step, send,
    stat, wait_until,
};

#[tokio::test]
async fn a_run_that_is_asked_to_stop_may_save_its_work() {
    let place = Place::new();
    let attempt = attempt(json!({}));
    let (reports, stop) = (attempt.reports.clone(), attempt.stop.clone());
    let script = format!(
        "trap 'echo \"@trainyard {{\\\"checkpoint\\\":\\\"c9\\\"}}\"; exit 0' TERM
        {}; while :; do sleep 0.05; done",
        report_step("$$")
    );
    let run = begin(place.script(&script), attempt);
    reported_step(&reports).await;
    stop.cancel();
    let (error, permanent) = failure(run.await.unwrap());
    assert!(error.starts_with("stopped before it was done (exit code 0)"));
    assert!(!permanent);
    let checkpoint = reports.watch_checkpoint().borrow().clone();
    assert_eq!(checkpoint.as_deref(), Some("c9"));
}

#[tokio::test]
async fn a_run_that_is_done_when_it_is_asked_to_stop_has_succeeded() {
    let place = Place::new();
    let attempt = attempt(json!({}));
    let (reports, stop) = (attempt.reports.clone(), attempt.stop.clone());
    let script = format!(
        "trap 'echo \"@trainyard {{\\\"result\\\":1}}\"; exit 0' TERM
        {}; while :; do sleep 0.05; done",
        report_step("$$")
    );
    let run = begin(place.script(&script), attempt);
    reported_step(&reports).await;
    stop.cancel();
    assert_eq!(run.await.unwrap(), Outcome::Succeeded(json!(1).into()));
}

#[tokio::test]
async fn a_shell_and_its_grandchild_that_ignore_sigterm_are_killed() {
    let place = Place::new();
    let attempt = attempt(json!({}));
    let (reports, stop) = (attempt.reports.clone(), attempt.stop.clone());
    // A child inherits the ignored signal.
    let script = format!("trap '' TERM; sleep 1000 & {}; wait", report_step("$!"));
    let run = begin(place.script(&script), attempt);
    let grandchild = reported_step(&reports).await;
    let shell = parent_of(grandchild);
    stop.cancel();
    let (error, _) = failure(run.await.unwrap());
    assert_eq!(error, "stopped before it was done (killed by SIGKILL)");
    assert!(!lives(shell) && !lives(grandchild));
}

#[tokio::test]
async fn a_grandchild_in_another_session_is_killed_too() {
    let place = Place::new();
    let attempt = attempt(json!({}));
    let reports = attempt.reports.clone();
    // It is in its second session, its parents are gone, and it ignores SIGTERM
    // and SIGHUP.
    let script = format!(
        r#"setsid sh -c "setsid sh -c 'trap "" TERM HUP
            echo \$\$ > "\$OUT.new"; mv "\$OUT.new" "\$OUT"; sleep 1000' &"
        while [ ! -e "$OUT" ]; do sleep 0.02; done
        pid=$(cat "$OUT"); {}; exit 0"#,
        report_step("$pid")
    );
    let outcome = outcome_of(place.script(&script), attempt).await;
    assert_eq!(outcome, Outcome::Succeeded(Json::default()));
    assert!(!lives(reported_step(&reports).await));
}

#[tokio::test]
async fn a_run_whose_future_is_dropped_ends_at_once() {
    let place = Place::new();
    let attempt = attempt(json!({}));
    let reports = attempt.reports.clone();
    let script = format!(
        "trap '' TERM; setsid sleep 1000 & {}; wait",
        report_step("$!")
    );
    let run = begin(place.script(&script), attempt);
    let grandchild = reported_step(&reports).await;
    let shell = parent_of(grandchild);
    let keeper = parent_of(shell);
    run.abort();
    let aborted = run.await;
    assert!(aborted.unwrap_err().is_cancelled());
    wait_until("the run's processes are gone", || {
        !lives(shell) && !lives(grandchild)
    });
    // Taken, so it is not even a zombie.
    tokio::task::spawn_blocking(move || {
        wait_until("the keeper is reaped", || stat(keeper).is_none());
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_run_that_reports_nothing_for_too_long_is_stuck() {
    let place = Place::new();
    let mut settings = place.script("echo busy; sleep 1000");
    settings.stall_timeout = Some(Duration::from_millis(300));
    let attempt = attempt(json!({}));
    let (error, permanent) = failure(outcome_of(settings, attempt).await);
    assert_eq!(
        error,
        "no progress for 300ms, stopped as stuck (killed by SIGTERM)"
    );
    assert!(!permanent);
}

#[tokio::test]
async fn a_run_that_goes_on_reporting_is_not_stuck() {
    let place = Place::new();
    let script = format!(
        "for i in $(seq 40); do {}; sleep 0.05; done",
        report_step("$i")
    );
    let mut settings = place.script(&script);
    settings.stall_timeout = Some(Duration::from_millis(1500));
    let outcome = outcome_of(settings, attempt(json!({}))).await;
    assert_eq!(outcome, Outcome::Succeeded(Json::default()));
}

#[tokio::test]
async fn a_stopped_process_is_stuck_and_ends() {
    let place = Place::new();
    let script = format!("{}; while :; do sleep 0.05; done", report_step("$$"));
    let mut settings = place.script(&script);
    settings.stall_timeout = Some(Duration::from_secs(1));
    let attempt = attempt(json!({}));
    let reports = attempt.reports.clone();
    let run = begin(settings, attempt);
    let shell = reported_step(&reports).await;
    send(shell, Signal::SIGSTOP);
    let (error, _) = failure(run.await.unwrap());
    assert!(error.starts_with("no progress for 1s"), "{error}");
    assert!(!lives(shell));
}

#[tokio::test]
async fn a_run_ends_when_its_lease_expires() {
    let place = Place::new();
    let mut attempt = attempt(json!({}));
    let soon = Instant::now() + Duration::from_secs(1);
    let (_renewals, valid_until) = watch::channel(soon);
    attempt.valid_until = valid_until;
    let (error, permanent) = failure(outcome_of(place.script("sleep 1000"), attempt).await);
    assert!(error.contains("lease was not renewed in time"), "{error}");
    assert!(!permanent);
    assert!(Instant::now() >= soon);
}

#[tokio::test]
async fn a_run_goes_on_while_its_lease_is_renewed() {
    let place = Place::new();
    let mut attempt = attempt(json!({}));
    let soon = Instant::now() + Duration::from_secs(2);
    let (renewals, valid_until) = watch::channel(soon);
    attempt.valid_until = valid_until;
    let reports = attempt.reports.clone();
    let run = begin(
        place.script(&format!("{}; sleep 3; exit 0", report_step("$$"))),
        attempt,
    );
    reported_step(&reports).await;
    renewals.send_replace(soon + Duration::from_secs(60));
    assert_eq!(run.await.unwrap(), Outcome::Succeeded(Json::default()));
    assert!(Instant::now() > soon);
}
