//! Commands that cannot run, and commands that misbehave.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use serde_json::json;
use trainyard::json::Json;
use trainyard::outcome::Outcome;

use crate::support::{Place, attempt, failure, lives, outcome_of, report_step, reported_step, run};

#[tokio::test]
async fn a_command_that_cannot_run_is_a_permanent_failure_that_names_it() {
    let place = Place::new();
    let file = |name: &str, text: &str, mode| {
        let path = place.folder.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    for program in [
        "no-such-program".to_owned(),
        "/no/such/program".to_owned(),
        "/etc".to_owned(),
        file("data", "text", 0o644),
        file("no-interpreter", "#!/no/such/interpreter\n", 0o755),
        file("no-program", "\u{1}\u{2}", 0o755),
    ] {
        let mut settings = place.script("");
        settings.command = vec![program.clone()];
        let (error, permanent) = failure(run(settings).await);
        assert!(error.contains(&program), "{error}");
        assert!(permanent, "{error}");
    }
    let mut settings = place.script("exit 0");
    settings.cwd = Some("/no/such/folder".into());
    let (error, permanent) = failure(run(settings).await);
    assert!(error.contains("/no/such/folder") && permanent, "{error}");
}

#[test]
fn config_check_warns_of_a_command_that_cannot_run() {
    let place = Place::new();
    let file = place.folder.path().join("trainyard.toml");
    let text = "[tasks.good]\ncommand = ['sh']\n[tasks.bad]\ncommand = ['no-such-program']\n";
    fs::write(&file, text).unwrap();
    let checked = Command::new(env!("CARGO_BIN_EXE_trainyard"))
        .args(["config", "check", "--offline", "--config"])
        .arg(&file)
        .current_dir(place.folder.path())
        .output()
        .unwrap();
    let printed = String::from_utf8(checked.stdout).unwrap();
    let warning = "# warning: task bad cannot run on this machine: its program `no-such-program`";
    assert!(printed.contains(warning), "{printed}");
    assert!(!printed.contains("task good cannot"), "{printed}");
    assert!(printed.contains("good (command: sh)"), "{printed}");
}

#[test]
fn config_check_warns_of_unset_secrets_and_refuses_an_unusable_work_dir() {
    let place = Place::new();
    let file = place.folder.path().join("trainyard.toml");
    let check = |text: &str| {
        fs::write(&file, text).unwrap();
        Command::new(env!("CARGO_BIN_EXE_trainyard"))
            .args(["config", "check", "--offline", "--config"])
            .arg(&file)
            .current_dir(place.folder.path())
            .output()
            .unwrap()
    };
    let task =
        "[tasks.t]\ncommand = ['sh']\npass_env = ['NO_SUCH_TOKEN']\nmemory = '1GiB'\ngpus = 1";
    let printed = String::from_utf8(check(task).stdout).unwrap();
    assert!(
        printed.contains("# warning: `pass_env` of task t names NO_SUCH_TOKEN"),
        "{printed}"
    );
    assert!(
        printed.contains("# warning: task t has `memory` and `gpus`"),
        "{printed}"
    );
    let refused = check(&format!("{task}\n[worker]\nwork_dir = '/dev/null/jobs'"));
    let printed = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{printed}");
    assert!(printed.contains("`worker.work_dir`"), "{printed}");
}

#[tokio::test]
async fn a_command_may_close_its_stdin_early() {
    let place = Place::new();
    let attempt = attempt(json!({"text": "x".repeat(5_000_000)}));
    let outcome = outcome_of(place.script("exec <&-; exit 0"), attempt).await;
    assert_eq!(outcome, Outcome::Succeeded(Json::default()));
}

#[tokio::test]
async fn binary_output_becomes_text() {
    let place = Place::new();
    let attempt = attempt(json!({}));
    let reports = attempt.reports.clone();
    let script = r"printf 'a\000\377\033[1mb\n'; head -c 100000 /dev/urandom >&2; exit 1";
    let (error, _) = failure(outcome_of(place.script(script), attempt).await);
    let readable = |text: &str| text.chars().all(|c| c == '\t' || !c.is_control());
    assert!(readable(&error));
    assert!(reports.tail().iter().all(|line| readable(line)));
    let line = "a\\u{0}\u{fffd}\\u{1b}[1mb".to_owned();
    assert!(reports.tail().len() <= 50);
    assert!(error.starts_with("exit code 1"));
    // Fifty lines of noise may have pushed the line out.
    assert!(reports.tail().contains(&line) || reports.tail().len() == 50);
}

/// In KiB.
fn most_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let number = line.unwrap().split_ascii_whitespace().nth(1);
    number.unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_gigabyte_of_output_takes_no_memory() {
    let place = Place::new();
    let before = most_memory();
    let line = "0123456789".repeat(100);
    for script in [
        format!("yes {line} | head -c 1000000000; echo; echo end"),
        "head -c 1000000000 /dev/zero; echo; echo end".to_owned(),
    ] {
        let attempt = attempt(json!({}));
        let reports = attempt.reports.clone();
        let outcome = outcome_of(place.script(&script), attempt).await;
        assert_eq!(outcome, Outcome::Succeeded(Json::default()));
        assert_eq!(reports.tail().last().unwrap(), "end");
    }
    let grown = most_memory() - before;
    assert!(grown < 100 << 10, "{grown} KiB more");
}

#[tokio::test]
async fn a_grandchild_that_holds_the_output_open_does_not_hold_up_the_job() {
    let place = Place::new();
    let attempt = attempt(json!({}));
    let reports = attempt.reports.clone();
    let script = format!("sleep 1000 & {}; exit 0", report_step("$!"));
    let outcome = outcome_of(place.script(&script), attempt).await;
    assert_eq!(outcome, Outcome::Succeeded(Json::default()));
    assert!(!lives(reported_step(&reports).await));
}

#[tokio::test]
async fn a_flood_of_reports_is_thinned() {
    let place = Place::new();
    let attempt = attempt(json!({}));
    let reports = attempt.reports.clone();
    let script = "seq 0 99999 | sed 's/.*/@trainyard {\"step\":&}/'";
    let outcome = outcome_of(place.script(script), attempt).await;
    assert_eq!(outcome, Outcome::Succeeded(Json::default()));
    let series = reports.series();
    assert!(series.len() <= 501);
    assert_eq!(series.last().unwrap().step, Some(99_999));
    assert!(reports.tail().is_empty());
}
