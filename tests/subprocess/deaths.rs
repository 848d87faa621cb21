//! A run whose daemon or keeper dies leaves no process.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use trainyard::outcome::Outcome;

use crate::support::{
    Other, Place, attempt, begin, failure, freeze, lives, outcome_of, parent_of, report_step,
    reported_step, run, send, settings_in, stat, wait_until,
};

/// Ignores SIGTERM, as do a child and a child in another session. Writes the
/// process ids to `$OUT`.
const FAMILY: &str = "trap '' TERM HUP; sleep 1000 & a=$!; setsid sleep 1000 & b=$!
    echo $$ $a $b > \"$OUT.new\"; mv \"$OUT.new\" \"$OUT\"; wait";

fn family_in(folder: &Path) -> Vec<i32> {
    let out = folder.join("out");
    wait_until("the process ids are written", || out.exists());
    let text = std::fs::read_to_string(out).unwrap();
    let family: Vec<i32> = text
        .split_ascii_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect();
    assert_eq!(family.len(), 3);
    assert!(family.iter().all(|pid| lives(*pid)));
    family
}

#[tokio::test]
#[ignore = "the tests below run it as a separate process"]
async fn a_daemon() {
    let mut attempt = attempt(json!({}));
    let (_renewals, valid_until) = watch::channel(Instant::now() + Duration::from_secs(8));
    attempt.valid_until = valid_until;
    outcome_of(settings_in(&Other::folder(), FAMILY), attempt).await;
}

#[test]
fn nothing_outlives_a_daemon_that_is_killed() {
    let place = Place::new();
    let daemon = Other::start("deaths::a_daemon", place.folder.path());
    let family = family_in(place.folder.path());
    let keeper = parent_of(family[0]);
    send(daemon.pid(), Signal::SIGKILL);
    wait_until("the family is gone", || {
        !family.iter().any(|pid| lives(*pid))
    });
    wait_until("its keeper is gone", || !lives(keeper));
}

#[tokio::test]
#[ignore = "the test below runs it as a separate process"]
async fn a_daemon_of_one_process() {
    let script = "echo $$ > \"$OUT.new\"; mv \"$OUT.new\" \"$OUT\"; exec sleep 1000";
    outcome_of(settings_in(&Other::folder(), script), attempt(json!({}))).await;
}

#[test]
fn a_command_dies_with_its_keeper_when_the_daemon_cannot_act() {
    let place = Place::new();
    let daemon = Other::start("deaths::a_daemon_of_one_process", place.folder.path());
    wait_until("the process id is written", || place.out().exists());
    let command: i32 = place.written().trim().parse().unwrap();
    let keeper = parent_of(command);
    freeze(daemon.pid());
    send(keeper, Signal::SIGKILL);
    wait_until("the command is gone", || !lives(command));
}

#[test]
fn nothing_outlives_the_lease_of_a_frozen_daemon() {
    let place = Place::new();
    let daemon = Other::start("deaths::a_daemon", place.folder.path());
    let family = family_in(place.folder.path());
    send(daemon.pid(), Signal::SIGSTOP);
    wait_until("the family is gone", || {
        !family.iter().any(|pid| lives(*pid))
    });
    assert!(stat(daemon.pid()).unwrap().starts_with('T'));
}

#[tokio::test]
async fn nothing_outlives_a_keeper_that_is_killed() {
    let place = Place::new();
    let folder = place.folder.path().to_owned();
    let run = begin(place.script(FAMILY), attempt(json!({})));
    let family = tokio::task::spawn_blocking(move || family_in(&folder))
        .await
        .unwrap();
    send(parent_of(family[0]), Signal::SIGKILL);
    let (error, permanent) = failure(run.await.unwrap());
    assert_eq!(error, "the job's keeper failed: it was killed");
    assert!(!permanent);
    assert!(!family.iter().any(|pid| lives(*pid)), "{family:?}");
}

#[tokio::test]
async fn nothing_outlives_a_keeper_that_is_frozen() {
    let place = Place::new();
    let mut settings = place.script(FAMILY);
    settings.stall_timeout = Some(Duration::from_secs(2));
    let folder = place.folder.path().to_owned();
    let run = begin(settings, attempt(json!({})));
    let family = tokio::task::spawn_blocking(move || family_in(&folder))
        .await
        .unwrap();
    let keeper = parent_of(family[0]);
    send(keeper, Signal::SIGSTOP);
    let (error, _) = failure(run.await.unwrap());
    assert!(
        error.contains("did not stop the command in time"),
        "{error}"
    );
    assert!(!family.iter().any(|pid| lives(*pid)), "{family:?}");
    assert!(stat(keeper).is_none());
}

#[tokio::test]
async fn a_keeper_outlives_the_signals_of_a_service_manager() {
    let place = Place::new();
    let attempt = attempt(json!({}));
    let (reports, stop) = (attempt.reports.clone(), attempt.stop.clone());
    let script = format!("{}; sleep 1000", report_step("$$"));
    let run = begin(place.script(&script), attempt);
    let keeper = parent_of(reported_step(&reports).await);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        send(keeper, signal);
    }
    stop.cancel();
    let (error, _) = failure(run.await.unwrap());
    assert_eq!(error, "stopped before it was done (killed by SIGTERM)");
}

#[tokio::test]
async fn a_missing_keeper_program_is_a_transient_failure() {
    let place = Place::new();
    for keeper in ["/no/such/keeper", "true"] {
        let mut settings = place.script("exit 0");
        settings.keeper_program = Some(keeper.into());
        let (error, permanent) = failure(run(settings).await);
        assert!(error.contains("keeper"), "{error}");
        assert!(!permanent);
    }
}

/// A keeper that reads its command and the payload `{}`, says that `leader` leads the
/// command's group, and then does as told.
fn keeper_that(place: &Place, leader: i32, does: &str) -> PathBuf {
    let script = format!(
        "#!/bin/sh\nread -r spec\nhead -c 2 >/dev/null\necho '{{\"started\":{leader}}}' >&0\n{does}\n"
    );
    let program = place.folder.path().join("keeper");
    // A file that this process writes itself may be busy: a test beside this one may
    // start a program meanwhile, which inherits the file until it is executed.
    let write = "printf '%s' \"$0\" > \"$1\" && chmod +x \"$1\"";
    let written = Command::new("sh")
        .args(["-c", write, &script])
        .arg(&program)
        .status();
    assert!(written.unwrap().success());
    program
}

/// Once its leader is reaped, the group's id may belong to somebody else.
#[tokio::test]
async fn a_group_is_killed_only_while_its_leader_is_not_reaped() {
    let reaped = r#"echo '{"left":[1]}' >&0
        echo '{"ended":{"code":0,"signal":null,"expired":false}}' >&0
        exit 3"#;
    for (does, survives) in [(reaped, true), ("exit 1", false)] {
        let place = Place::new();
        let mut sleeping = Command::new("sleep");
        sleeping.arg("1000").process_group(0);
        let somebody = Other(sleeping.spawn().unwrap());
        let mut settings = place.script("exit 0");
        settings.keeper_program = Some(keeper_that(&place, somebody.pid(), does));
        let outcome = outcome_of(settings, attempt(json!({}))).await;
        let ended = matches!(outcome, Outcome::Succeeded(_));
        assert_eq!(ended, survives, "{outcome:?}");
        match survives {
            true => assert!(lives(somebody.pid())),
            false => wait_until("it is killed", || !lives(somebody.pid())),
        }
    }
}
