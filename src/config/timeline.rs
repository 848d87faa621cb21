//! The timeline of each task, for `config check`.

use std::fmt::Write;

use super::{AckTiming, Config, Task, in_days};

/// Per task: when its message is acked, when its lease expires without renewal,
/// when it is stopped.
#[must_use]
pub fn timeline(config: &Config) -> String {
    let mut text = String::new();
    for (name, task) in &config.tasks {
        write_task(&mut text, config, name, task);
    }
    text
}

fn write_task(text: &mut String, config: &Config, name: &str, task: &Task) {
    let worker = &config.worker;
    let lease = in_days(worker.lease);
    let acked = match task.ack {
        AckTiming::BeforeRun => "once the claim has committed, before the run",
        AckTiming::AfterCheckpoint => {
            "once the run's first checkpoint has committed, or its outcome if it has none"
        }
        AckTiming::AfterRun => "once the outcome has committed, after the run",
    };
    let limit = task.timeout.map_or_else(
        || "no timeout".to_owned(),
        |timeout| format!("after {} the run is asked to stop", in_days(timeout)),
    );
    let attempts = match task.max_attempts {
        1 => "one attempt; a job that fails is dead".to_owned(),
        most => format!(
            "up to {most} attempts; the wait before the next one is up to {}, growing to {}",
            in_days(task.backoff.initial),
            in_days(task.backoff.max)
        ),
    };
    let lines = [
        (
            "claim",
            format!("a lease of {lease}, renewed by the worker"),
        ),
        ("ack", format!("{acked} (ack = \"{}\")", task.ack.as_str())),
        ("timeout", limit),
        ("failure", attempts),
        (
            "stop",
            format!(
                "the run has {} to end when it is asked to stop",
                in_days(task.stop_grace.unwrap_or(worker.stop_grace))
            ),
        ),
    ];
    // Writing to a String cannot fail.
    let _ = match (&task.builtin, &task.command) {
        (Some(builtin), _) => writeln!(text, "{name} (built in: {builtin})"),
        (None, Some(command)) => writeln!(text, "{name} (command: {})", command.join(" ")),
        (None, None) => writeln!(text, "{name} (registered by the embedding program)"),
    };
    let stall = task.stall_timeout.map(|limit| {
        let limit = in_days(limit);
        (
            "stall",
            format!("after {limit} without a report the run is stopped as stuck"),
        )
    });
    for (label, line) in lines.into_iter().chain(stall) {
        let _ = writeln!(text, "  {label:<8} {line}");
    }
}
