//! The signals that stop a process.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

use crate::support::PATIENCE;

/// Starts a process by a shell, sends it the signals, and returns its log. It must end with
/// code 0.
async fn log_of_a_process(shell: &str, signals: &[Signal]) -> String {
    let mut child = Command::new("sh")
        .args(["-c", shell, env!("CARGO_BIN_EXE_trainyard")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
    // It prints its address when it is ready.
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = timeout(PATIENCE, lines.next_line()).await.unwrap();
    assert!(line.unwrap().unwrap().contains("PUBSUB_EMULATOR_HOST"));
    for signal in signals {
        kill(pid, *signal).unwrap();
    }
    let output = timeout(PATIENCE, child.wait_with_output()).await.unwrap();
    let output = output.unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{log}");
    log
}

#[tokio::test]
async fn each_signal_that_asks_a_process_to_end_stops_it_in_order() {
    // The test itself may run where SIGHUP is ignored.
    let shell = "exec env --default-signal=HUP \"$0\" emulator --port 0";
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGHUP,
    ] {
        let log = log_of_a_process(shell, &[signal]).await;
        assert!(log.contains(signal.as_str()), "{log}");
    }
}

#[tokio::test]
async fn an_ignored_hangup_stays_ignored() {
    let shell = "trap '' HUP; exec \"$0\" emulator --port 0";
    let log = log_of_a_process(shell, &[Signal::SIGHUP, Signal::SIGTERM]).await;
    assert!(!log.contains("SIGHUP"), "{log}");
    assert!(log.contains("SIGTERM"), "{log}");
}
