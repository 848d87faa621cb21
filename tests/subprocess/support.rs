//! Settings, attempts, and views of processes for the tests.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant as StdInstant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use trainyard::executor::subprocess::Settings;
use trainyard::executor::{Attempt, Executor, Subprocess};
use trainyard::job::{Fence, JobKey};
use trainyard::outcome::Outcome;
use trainyard::report::Reports;
use uuid::Uuid;

/// Far longer than any wait here takes.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A folder for work directories and the test's files.
pub struct Place {
    pub folder: TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// Settings for a shell script that may write to `$OUT`.
    pub fn script(&self, script: &str) -> Settings {
        settings_in(self.folder.path(), script)
    }

    pub fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    pub fn written(&self) -> String {
        std::fs::read_to_string(self.out()).unwrap()
    }

    /// How many work directories exist.
    pub fn work_dirs(&self) -> usize {
        std::fs::read_dir(self.folder.path().join("work")).map_or(0, Iterator::count)
    }
}

pub fn settings_in(folder: &Path, script: &str) -> Settings {
    let out = folder.join("out").to_str().unwrap().to_owned();
    Settings {
        env: [("OUT".to_owned(), out)].into(),
        stop_grace: Duration::from_millis(500),
        work_dir: folder.join("work"),
        keeper_program: Some(env!("CARGO_BIN_EXE_trainyard").into()),
        ..Settings::new(["sh", "-c", script].map(str::to_owned).to_vec())
    }
}

pub fn attempt(payload: Value) -> Attempt {
    let far = Instant::now() + Duration::from_secs(24 * 60 * 60);
    Attempt {
        job_id: Uuid::now_v7(),
        task: "finetune".into(),
        fence: Fence {
            key: JobKey::new("heavy-task", "key"),
            attempt: 2,
            token: Uuid::new_v4(),
        },
        message_id: "1234".into(),
        data: payload.to_string().into(),
        checkpoint: None,
        deadline: None,
        devices: None,
        reports: Reports::default(),
        valid_until: watch::channel(far).1,
        stop: CancellationToken::new(),
    }
}

/// Runs the attempt to its end.
pub async fn outcome_of(settings: Settings, attempt: Attempt) -> Outcome {
    let executor = Subprocess::new(settings);
    tokio::time::timeout(PATIENCE, executor.execute(attempt))
        .await
        .expect("the run did not end")
}

/// Removes the job's directory, as after the job's end.
pub async fn forget(settings: Settings, job_id: Uuid) {
    Subprocess::new(settings).forget(job_id).await;
}

pub async fn run(settings: Settings) -> Outcome {
    outcome_of(settings, attempt(json!({"name": "finetune"}))).await
}

/// Starts a run in the background.
pub fn begin(settings: Settings, attempt: Attempt) -> tokio::task::JoinHandle<Outcome> {
    tokio::spawn(outcome_of(settings, attempt))
}

/// The error, and whether it is permanent.
pub fn failure(outcome: Outcome) -> (String, bool) {
    match outcome {
        Outcome::Failed { error, permanent } => (error, permanent),
        other => panic!("{other:?}"),
    }
}

/// Waits for the step that the run reports: scripts report process ids as steps.
pub async fn reported_step(reports: &Reports) -> i32 {
    let mut progress = reports.watch_progress();
    let reported = progress.wait_for(|progress| progress.step.is_some());
    let reported = tokio::time::timeout(PATIENCE, reported)
        .await
        .unwrap()
        .unwrap();
    i32::try_from(reported.step.unwrap()).unwrap()
}

/// A script that reports a number as its step.
pub fn report_step(number: &str) -> String {
    format!("echo \"@trainyard {{\\\"step\\\":{number}}}\"")
}

/// Whether the process runs. A zombie does not.
pub fn lives(pid: i32) -> bool {
    stat(pid).is_some_and(|stat| !stat.starts_with('Z'))
}

pub fn parent_of(pid: i32) -> i32 {
    let stat = stat(pid).unwrap();
    stat.split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

/// Stops the process, and returns when each of its threads has stopped.
pub fn freeze(pid: i32) {
    send(pid, Signal::SIGSTOP);
    wait_until("it is frozen", || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        threads.flatten().all(|thread| {
            stat_in(&thread.path().join("stat")).is_some_and(|stat| stat.starts_with('T'))
        })
    });
}

/// The fields of `/proc/PID/stat` from the state on.
pub fn stat(pid: i32) -> Option<String> {
    stat_in(Path::new(&format!("/proc/{pid}/stat")))
}

fn stat_in(path: &Path) -> Option<String> {
    let stat = std::fs::read_to_string(path).ok()?;
    Some(stat.rsplit_once(')')?.1.trim_start().to_owned())
}

/// Polls, as there is no event for the end of a process that is not a child.
pub fn wait_until(what: &str, reached: impl Fn() -> bool) {
    let start = StdInstant::now();
    while !reached() {
        assert!(start.elapsed() < PATIENCE, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// Another process, mostly of this test program, which then runs one ignored test. It is
/// killed when this is dropped.
pub struct Other(pub Child);

impl Other {
    pub fn start(test: &str, folder: &Path) -> Self {
        Self(Self::command(test, folder).spawn().unwrap())
    }

    pub fn command(test: &str, folder: &Path) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env("TEST_FOLDER", folder);
        command
    }

    pub fn folder() -> PathBuf {
        std::env::var_os("TEST_FOLDER")
            .expect("only another test may run this one")
            .into()
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
