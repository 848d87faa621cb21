//! Checks for invalid values in a task's section.

use std::time::Duration;

use super::super::error::{ConfigError, bad_value};
use super::super::{Task, Worker};
use crate::tasks::BUILTIN_NAMES;

/// A program's libraries and the launcher need this many.
const MIN_OPEN_FILES: u64 = 32;

/// The system's limits.
const NICE: std::ops::RangeInclusive<i32> = -20..=19;

pub(super) fn check(name: &str, task: &Task, worker: &Worker) -> Result<(), ConfigError> {
    let key = |key: &str| format!("tasks.{name}.{key}");
    for (limit, time) in [
        ("timeout", task.timeout),
        ("stall_timeout", task.stall_timeout),
    ] {
        if time.is_some_and(|time| time.is_zero()) {
            return bad_value(
                &key(limit),
                "it must be more than zero; remove it for no limit",
            );
        }
    }
    check_stop_grace(&key("stop_grace"), task, worker)?;
    check_attempts(task, &key)?;
    if let Some(builtin) = &task.builtin
        && !BUILTIN_NAMES.contains(&builtin.as_str())
    {
        let known = BUILTIN_NAMES.join(" and ");
        return bad_value(
            &key("builtin"),
            &format!("there is no built-in task `{builtin}`; the built-in tasks are {known}"),
        );
    }
    match &task.command {
        Some(_) if task.builtin.is_some() => bad_value(
            &key("command"),
            "a task cannot have both this and `builtin`",
        ),
        Some(command) => check_command(command, task, &key),
        None => check_no_command(task, &key),
    }
}

fn check_attempts(task: &Task, key: &impl Fn(&str) -> String) -> Result<(), ConfigError> {
    if task.max_attempts == 0 {
        return bad_value(&key("max_attempts"), "it must be at least 1");
    }
    if task.concurrency == Some(0) {
        return bad_value(
            &key("concurrency"),
            "it must be at least 1; remove it for no limit",
        );
    }
    let backoff = &task.backoff;
    if backoff.max < backoff.initial {
        return bad_value(&key("backoff.max"), "it must be at least backoff.initial");
    }
    if !(1.0..=1000.0).contains(&backoff.multiplier) {
        return bad_value(
            &key("backoff.multiplier"),
            "it must be between 1 and 1000; with 1 the waits do not grow",
        );
    }
    Ok(())
}

fn check_stop_grace(key: &str, task: &Task, worker: &Worker) -> Result<(), ConfigError> {
    let grace = task.stop_grace.unwrap_or(Duration::ZERO);
    if worker.lease < grace.saturating_mul(3) {
        return bad_value(
            key,
            "worker.lease must be at least three times this, so that a run that loses its lease ends before another starts",
        );
    }
    if grace > worker.shutdown_grace {
        return bad_value(
            key,
            "it must be at most worker.shutdown_grace, which includes it",
        );
    }
    Ok(())
}

fn check_command(
    command: &[String],
    task: &Task,
    key: &impl Fn(&str) -> String,
) -> Result<(), ConfigError> {
    if command.first().is_none_or(String::is_empty) {
        return bad_value(&key("command"), "it must start with a program");
    }
    if command.iter().any(|argument| argument.contains('\0')) {
        return bad_value(&key("command"), "an argument cannot contain a NUL");
    }
    let set = task.env.iter().map(|(name, value)| ("env", name, &**value));
    let passed = task.pass_env.iter().map(|name| ("pass_env", name, ""));
    for (list, name, value) in set.chain(passed) {
        check_variable(&key(list), name, value)?;
    }
    let codes = task.permanent_exit_codes.as_deref().unwrap_or_default();
    if codes.contains(&0) {
        return bad_value(&key("permanent_exit_codes"), "0 is success; write 1 to 255");
    }
    if task.memory.is_some_and(|memory| memory.0 == 0) {
        return bad_value(&key("memory"), "it must be more than zero");
    }
    if task.nice.is_some_and(|nice| !NICE.contains(&nice)) {
        return bad_value(&key("nice"), "it must be between -20 and 19");
    }
    if task.open_files.is_some_and(|files| files < MIN_OPEN_FILES) {
        return bad_value(
            &key("open_files"),
            &format!("it must be at least {MIN_OPEN_FILES}"),
        );
    }
    Ok(())
}

fn check_variable(key: &str, name: &str, value: &str) -> Result<(), ConfigError> {
    if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
        let name = name.escape_debug();
        return bad_value(key, &format!("`{name}` cannot be set as a variable"));
    }
    // The worker's variables may hold the password of its database.
    if name.starts_with("TRAINYARD_") || name == "CUDA_VISIBLE_DEVICES" {
        return bad_value(key, &format!("`{name}` is reserved for trainyard"));
    }
    Ok(())
}

/// Refuses limits that would not be enforced.
fn check_no_command(task: &Task, key: &impl Fn(&str) -> String) -> Result<(), ConfigError> {
    let given = [
        ("stall_timeout", task.stall_timeout.is_some()),
        ("cwd", task.cwd.is_some()),
        ("permanent_exit_codes", task.permanent_exit_codes.is_some()),
        ("memory", task.memory.is_some()),
        ("nice", task.nice.is_some()),
        ("open_files", task.open_files.is_some()),
        ("gpus", task.gpus > 0),
        ("keep_work_dir", task.keep_work_dir),
        ("env", !task.env.is_empty()),
        ("pass_env", !task.pass_env.is_empty()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => bad_value(&key(name), "only a task with a `command` can have this"),
        None => Ok(()),
    }
}
