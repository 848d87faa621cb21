//! What a test run leaves behind on the machine: nothing, however it ends.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::support::{PATIENCE, eventually};

/// Prints its own id, its directory, and the id of a process that no signal to its group
/// reaches.
const COMMAND: &str = "setsid bash -c 'echo $$ >\"$TMPDIR/stray\"; exec sleep 600' &
until [ -s \"$TMPDIR/stray\" ]; do sleep 0.05; done
echo \"$$ $TMPDIR $(cat \"$TMPDIR/stray\")\" >\"$OUT\"
sleep 600";

struct Contained {
    script: Child,
    command: Pid,
    directory: PathBuf,
    stray: Pid,
}

fn id(text: &str) -> Pid {
    Pid::from_raw(text.parse().unwrap())
}

impl Contained {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/services/contained.sh");
        let script = Command::new(path)
            .args(["bash", "-c", COMMAND])
            .env("OUT", &out)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let told = eventually("the command runs", async || {
            let told = std::fs::read_to_string(&out).ok()?;
            told.ends_with('\n').then_some(told)
        })
        .await;
        let told: Vec<&str> = told.split_whitespace().collect();
        Self {
            script,
            command: id(told[0]),
            directory: Path::new(told[1]).to_owned(),
            stray: id(told[2]),
        }
    }

    async fn leaves_nothing(&self) {
        eventually("nothing is left of the command", async || {
            let lives = |id: Pid| Path::new(&format!("/proc/{id}")).exists();
            let left = lives(self.stray) || lives(self.command) || self.directory.exists();
            (!left).then_some(())
        })
        .await;
    }

    async fn code(mut self) -> Option<i32> {
        let ended = tokio::time::timeout(PATIENCE, self.script.wait()).await;
        ended.unwrap().unwrap().code()
    }
}

#[tokio::test]
async fn a_command_that_is_killed_leaves_nothing_behind() {
    let run = Contained::start().await;
    kill(run.command, Signal::SIGKILL).unwrap();
    run.leaves_nothing().await;
    assert_eq!(run.code().await, Some(128 + 9));
}

#[tokio::test]
async fn a_test_run_that_is_terminated_leaves_nothing_behind() {
    let run = Contained::start().await;
    let script = id(&run.script.id().unwrap().to_string());
    kill(script, Signal::SIGTERM).unwrap();
    run.leaves_nothing().await;
    assert_eq!(run.code().await, Some(128 + 15));
}

#[tokio::test]
async fn a_test_run_that_is_killed_leaves_nothing_behind() {
    let mut run = Contained::start().await;
    run.script.start_kill().unwrap();
    // Reaps it, as a shell would.
    run.script.wait().await.unwrap();
    run.leaves_nothing().await;
}
