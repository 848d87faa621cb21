use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

/// The log that rehearsals write about their own runs, independent of the tables.
pub struct RunsLog {
    path: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunEvent {
    Start,
    End,
    Stopped,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RunLine {
    pub job: Uuid,
    pub attempt: u32,
    pub pid: u32,
    pub event: RunEvent,
    pub at_micros: u64,
    #[serde(default)]
    pub label: Option<String>,
    /// The checkpoint that the run was given.
    #[serde(default)]
    pub resumed_from: Option<String>,
}

impl RunsLog {
    pub fn in_folder(folder: &Path) -> Self {
        Self {
            path: folder.join("runs.jsonl"),
        }
    }

    /// A request for a run that takes this long and writes to this log.
    pub fn request(&self, seconds: f64) -> String {
        self.rehearsal(json!({"seconds": seconds}))
    }

    /// A request for a run with these fields (an object) that writes to this log.
    pub fn rehearsal(&self, like: Value) -> String {
        self.rehearsal_as("rehearsal", like)
    }

    /// As [`RunsLog::rehearsal`], for a task of another name.
    pub fn rehearsal_as(&self, task: &str, mut like: Value) -> String {
        like["name"] = json!(task);
        like["log"] = json!(self.path);
        like.to_string()
    }

    /// A request for a run that goes on until it is [`RunsLog::release`]d.
    pub fn waiting(&self, label: &str, more: Value) -> String {
        let mut like = more;
        like["label"] = json!(label);
        like["until"] = json!(self.file_of(label));
        self.rehearsal(like)
    }

    /// Lets the runs of that label end.
    pub fn release(&self, label: &str) {
        std::fs::write(self.file_of(label), "").unwrap();
    }

    fn file_of(&self, label: &str) -> PathBuf {
        self.path.with_file_name(format!("release-{label}"))
    }

    pub fn lines(&self) -> Vec<RunLine> {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        // The last line may be incomplete.
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        complete
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    pub fn of(&self, event: RunEvent) -> Vec<RunLine> {
        let mut lines = self.lines();
        lines.retain(|line| line.event == event);
        lines
    }
}

/// The clock of the log.
pub fn micros_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_micros()).unwrap()
}
