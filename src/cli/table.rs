//! Formats jobs as text.

use chrono::{DateTime, Utc};
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use serde_json::Value;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use crate::config::in_days;
use crate::json::{Fields, Json};
use crate::printable::{indented, line};
use crate::record::{AttemptRecord, Job, JobState, Story};
use crate::report::Progress;

/// The width of a table without a terminal.
const WIDTH: usize = 120;
const MAX_TASK: usize = 40;
/// Below a value of one job.
const CONTINUED: &str = "              ";
/// The result's column is at least this wide.
const MIN_RESULT: usize = 15;
/// How many digits of a job's id are shown.
pub(super) const SHORT_ID: usize = 8;

pub(super) fn of_jobs(jobs: &[Job]) -> String {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header([
            "JOB", "TASK", "STATE", "ATTEMPTS", "DUPS", "DURATION", "RESULT",
        ]);
    let widest_task = jobs.iter().map(|job| task_of(job).width());
    let widest_task = widest_task.max().unwrap_or_default();
    // The maximum width of the other columns, with gaps.
    let others = SHORT_ID + widest_task.max(4) + 9 + 8 + 4 + 8 + 14;
    let width = terminal_size::terminal_size().map_or(WIDTH, |(width, _)| width.0.into());
    let room = width.saturating_sub(others).max(MIN_RESULT);
    for job in jobs {
        table.add_row([
            short_id(job),
            task_of(job),
            job.state.to_string(),
            job.attempts.to_string(),
            job.duplicates.to_string(),
            duration(job),
            short(&outcome_or_lack(job), room),
        ]);
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim().to_owned()).collect();
    lines.join("\n")
}

/// A message may name any task.
fn task_of(job: &Job) -> String {
    let task = job.task.as_deref().unwrap_or("?");
    short(task, MAX_TASK)
}

/// The end of a job's id, as ids of the same time start alike.
pub(super) fn short_id(job: &Job) -> String {
    let id = job.id.simple().to_string();
    id[id.len() - SHORT_ID..].to_owned()
}

pub(super) fn of_one_job(job: &Job) -> String {
    let time = |time: Option<DateTime<Utc>>| {
        time.map_or_else(
            || "-".to_owned(),
            |time| time.format("%Y-%m-%d %H:%M:%S%.3f UTC").to_string(),
        )
    };
    let payload = job.payload.as_ref().map_or_else(
        || "no longer stored".to_owned(),
        |payload| String::from_utf8_lossy(payload).into_owned(),
    );
    let lines = [
        ("job", job.id.to_string()),
        ("task", job.task.clone().unwrap_or_else(|| "-".to_owned())),
        ("state", job.state.to_string()),
        ("attempts", job.attempts.to_string()),
        ("duplicates", job.duplicates.to_string()),
        ("subscription", job.subscription.clone()),
        ("message id", job.message_id.clone()),
        (
            "ordering key",
            job.ordering_key.clone().unwrap_or_else(|| "-".to_owned()),
        ),
        (
            "worker",
            job.worker.clone().unwrap_or_else(|| "-".to_owned()),
        ),
        ("published", time(Some(job.publish_time))),
        ("received", time(Some(job.received_at))),
        ("started", time(job.started_at)),
        ("finished", time(job.finished_at)),
        ("duration", duration(job)),
        ("waits for", waits_for(job)),
        ("waits until", time(job.waits_until)),
        (
            "checkpoint",
            job.checkpoint.clone().unwrap_or_else(|| "-".to_owned()),
        ),
        (
            "reason",
            job.reason.clone().unwrap_or_else(|| "-".to_owned()),
        ),
        ("outcome", outcome(job)),
        ("payload", payload),
    ];
    lines
        .iter()
        .map(|(label, value)| format!("{label:<13} {}\n", indented(value, CONTINUED)))
        .collect()
}

/// Without a worker that knows its task, a waiting job needs somebody who looks.
fn outcome_or_lack(job: &Job) -> String {
    match job.waits_for.as_deref() {
        Some("task") => format!("waits for {}", waits_for(job)),
        _ => outcome(job),
    }
}

/// Why nobody runs a waiting job.
fn waits_for(job: &Job) -> String {
    let text = match job.waits_for.as_deref() {
        None => "-",
        Some("turn") => "an earlier job of its ordering key",
        Some("task") => "a worker that knows its task; none does now",
        Some("takeover") => "another worker to take it over from its lost one",
        Some("attempt") => "its next attempt",
        Some("room") => "a worker that knows its task and has room",
        Some(other) => other,
    };
    text.to_owned()
}

/// The last progress report and the last lines of each attempt.
pub(super) fn of_attempts(attempts: &[AttemptRecord]) -> String {
    let mut text = String::new();
    for attempt in attempts {
        let last = attempt.series.last().map(progress).unwrap_or_default();
        text += &format!("\nattempt {}  {}{last}\n", attempt.attempt, attempt.outcome);
        for written in &attempt.log {
            text += &format!("  | {}\n", line(written));
        }
    }
    text
}

fn progress(progress: &Progress) -> String {
    let mut parts = Vec::new();
    parts.extend(
        progress
            .fraction
            .map(|done| format!("{:.0}%", done * 100.0)),
    );
    parts.extend(progress.step.map(|step| format!("step {step}")));
    let metrics = progress.metrics.iter();
    parts.extend(metrics.map(|(name, figure)| format!("{} {figure:.4}", line(name))));
    format!(", {}", parts.join(", "))
}

/// The history of a message, one line per event.
pub(super) fn of_story(story: &Story) -> String {
    let job = &story.job;
    let mut lines = vec![
        format!(
            "message {} in subscription {}: job {}, {}",
            line(&job.message_id),
            line(&job.subscription),
            job.id,
            job.state.as_str()
        ),
        format!("  {}  published", clock(job.publish_time)),
    ];
    for entry in &story.ledger {
        let attempt = entry.attempt.map(|attempt| format!(" attempt {attempt}"));
        let detail = entry.detail.as_deref().map(|detail| format!(": {detail}"));
        let message = entry.message_id.as_deref();
        let message = message.map(|id| format!(" message {}", line(id)));
        lines.push(format!(
            "  {}  {:<13}{}{}{}  [{}]",
            clock(entry.at),
            entry.kind,
            attempt.unwrap_or_default(),
            message.unwrap_or_default(),
            line(&detail.unwrap_or_default()),
            line(&entry.worker)
        ));
    }
    if job.finished_at.is_some() {
        lines.push(format!("  outcome: {}", line(&outcome(job))));
    }
    if job.waits_for.is_some() {
        lines.push(format!("  waits for: {}", waits_for(job)));
    }
    lines.join("\n")
}

fn clock(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d %H:%M:%S%.3f").to_string()
}

fn outcome(job: &Job) -> String {
    match (&job.error, &job.result) {
        (Some(error), _) => error.clone(),
        (None, Some(result)) => figures(result),
        (None, None) => "-".to_owned(),
    }
}

/// An object's fields as `name=value`, with rounded fractions.
fn figures(result: &Json) -> String {
    let Ok(fields) = serde_json::from_str::<Fields<'_>>(result.as_str()) else {
        return result.as_str().to_owned();
    };
    let fields: Vec<String> = fields
        .iter()
        .map(|(name, value)| format!("{name}={}", figure(value.get())))
        .collect();
    fields.join(" ")
}

fn figure(written: &str) -> String {
    match serde_json::from_str(written) {
        Ok(Value::Number(number)) if written.contains(['.', 'e', 'E']) => {
            format!("{:.4}", number.as_f64().unwrap_or_default())
        }
        Ok(Value::String(text)) => text,
        _ => written.to_owned(),
    }
}

/// How long the last attempt took, or runs already. A waiting job's attempt has no end
/// on record.
fn duration(job: &Job) -> String {
    let end = match job.state {
        JobState::Running => Some(Utc::now()),
        _ => job.finished_at,
    };
    let Some((started, end)) = job.started_at.zip(end) else {
        return "-".to_owned();
    };
    let seconds = (end - started).as_seconds_f64().max(0.0);
    match seconds {
        short if short < 60.0 => format!("{short:.1}s"),
        long => in_days(std::time::Duration::from_secs(long as u64)),
    }
}

/// One safe line of at most `room` columns.
fn short(text: &str, room: usize) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let safe = line(&words);
    if safe.width() <= room {
        return safe.into_owned();
    }
    let mut used = 0;
    let fits = safe.chars().take_while(|character| {
        used += character.width().unwrap_or_default();
        used < room
    });
    let cut: String = fits.collect();
    format!("{cut}…")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let cut = short(&"é".repeat(200), 80);
        assert_eq!(cut.chars().count(), 80);
        assert!(cut.ends_with('…'));
    }

    #[test]
    fn a_wide_character_takes_two_columns() {
        assert_eq!(short("模型训练", 8), "模型训练");
        assert_eq!(short("模型训练", 7), "模型训…");
    }

    #[test]
    fn a_task_cannot_forge_a_row_or_send_escapes() {
        let task = "evil\u{1b}[2J\nforged row";
        assert_eq!(short(task, 80), "evil\\u{1b}[2J forged row");
    }

    #[test]
    fn a_text_of_several_lines_becomes_one() {
        assert_eq!(short("a\n  b", 80), "a b");
    }
}
