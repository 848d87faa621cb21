//! What a command prints: read without ever holding it up, told to the log
//! within bounds, and its end kept.

mod gate;

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::Instant;
use tracing::{info, warn};

use super::lines::{Line, Lines};
use super::said::Said;
use crate::report::{Reports, Tail, readable};
use gate::{Gate, Passage};

/// As much as a pipe holds.
const READ_AT_ONCE: usize = 64 << 10;

/// What becomes of a line that speaks to trainyard and does not end.
const TOO_LONG: &str = "trainyard: the next line is ignored: it is longer than 256 KiB";
/// Of such a line.
const QUOTED: usize = 200;

/// What one run prints, and what of it counts.
pub(super) struct Output {
    reports: Reports,
    heard: Mutex<Heard>,
}

struct Heard {
    gate: Gate,
    result: Option<Value>,
    /// Of stderr, for the error of a run that failed.
    errors: Tail,
    /// When the run last said something to trainyard, or began.
    sign_of_life: Instant,
}

#[derive(Clone, Copy, PartialEq)]
enum Stream {
    Stdout,
    Stderr,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        })
    }
}

impl Output {
    pub(super) fn new(reports: Reports) -> Self {
        let now = Instant::now();
        Self {
            reports,
            heard: Mutex::new(Heard {
                gate: Gate::new(now),
                result: None,
                errors: Tail::default(),
                sign_of_life: now,
            }),
        }
    }

    /// Reads both streams to their ends.
    pub(super) async fn read(
        &self,
        stdout: impl AsyncRead + Unpin,
        stderr: impl AsyncRead + Unpin,
    ) {
        tokio::join!(
            self.read_stream(stdout, Stream::Stdout),
            self.read_stream(stderr, Stream::Stderr)
        );
    }

    async fn read_stream(&self, mut source: impl AsyncRead + Unpin, stream: Stream) {
        let mut lines = Lines::default();
        let mut room = vec![0; READ_AT_ONCE];
        // An error is the stream's end like any other.
        while let Ok(read) = source.read(&mut room).await
            && read > 0
        {
            lines.feed(&room[..read], |line| self.take(&line, stream));
        }
        lines.end(|line| self.take(&line, stream));
    }

    fn take(&self, line: &Line<'_>, stream: Stream) {
        let said = match stream {
            Stream::Stdout => Said::read(line.bytes),
            Stream::Stderr => None,
        };
        if said.is_some() {
            // Also what cannot be understood tells that it is not stuck.
            self.heard().sign_of_life = Instant::now();
        }
        match said {
            Some(_) if line.cut => self.refuse_too_long(line, stream),
            Some(Ok(said)) => {
                let wrong = said.wrong.join(", ");
                self.follow(said);
                if !wrong.is_empty() {
                    self.show(line, stream, Some(&wrong));
                }
            }
            Some(Err(reason)) => self.show(line, stream, Some(&reason)),
            None => self.show(line, stream, None),
        }
    }

    /// It may have been the result: the log and the tail tell that it was lost.
    fn refuse_too_long(&self, line: &Line<'_>, stream: Stream) {
        let beginning = &line.bytes[..line.bytes.len().min(QUOTED)];
        self.reports.output(TOO_LONG.as_bytes());
        let line = Line {
            bytes: beginning,
            cut: true,
        };
        self.show(&line, stream, Some(TOO_LONG));
    }

    fn follow(&self, said: Said) {
        // The checkpoint first: what is told later may be the last word.
        if let Some(checkpoint) = said.checkpoint {
            self.reports.checkpoint(&checkpoint);
        }
        if let Some(progress) = said.progress {
            self.reports.progress(progress);
        }
        let mut heard = self.heard();
        if said.result.is_some() {
            heard.result = said.result;
        }
    }

    fn show(&self, line: &Line<'_>, stream: Stream, malformed: Option<&str>) {
        self.reports.output(line.bytes);
        let mut heard = self.heard();
        if stream == Stream::Stderr {
            heard.errors.push(line.bytes);
        }
        let passage = heard.gate.pass(Instant::now(), line.bytes.len());
        drop(heard);
        let Passage::Shown { hidden_before } = passage else {
            return;
        };
        tell_hidden(hidden_before);
        let text = readable(line.bytes);
        let cut = if line.cut { " … (cut)" } else { "" };
        match malformed {
            None => info!(target: "task", %stream, "{text}{cut}"),
            Some(reason) => warn!(target: "task", %stream, %reason, "not understood: {text}{cut}"),
        }
    }

    /// The run is over: what was counted and not shown is told.
    pub(super) fn close(&self) {
        let hidden = self.heard().gate.close();
        tell_hidden(hidden);
    }

    pub(super) fn result(&self) -> Option<Value> {
        self.heard().result.clone()
    }

    /// The last lines of stderr, each of bounded length, oldest first.
    pub(super) fn last_errors(&self) -> Vec<String> {
        self.heard().errors.lines()
    }

    pub(super) fn sign_of_life(&self) -> Instant {
        self.heard().sign_of_life
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tell_hidden(lines: u64) {
    if lines > 0 {
        info!(target: "task", lines, "more lines than are shown");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn a_result_that_is_too_long_is_lost_and_the_tail_says_so() {
        let reports = Reports::default();
        let output = Output::new(reports.clone());
        let long = format!("@trainyard {{\"result\":\"{}\"}}\n", "x".repeat(300_000));
        output.read(long.as_bytes(), &b""[..]).await;
        assert_eq!(output.result(), None);
        let tail = reports.tail();
        assert_eq!(tail[0], TOO_LONG);
        assert_eq!((tail.len(), tail[1].len()), (2, 200));
    }

    #[tokio::test]
    async fn only_stdout_speaks_to_trainyard() {
        let reports = Reports::default();
        let output = Output::new(reports.clone());
        let stdout: &[u8] = b"hello\n@trainyard {\"step\":1}\n@trainyard {\"result\":7}\n@trainyard {\"checkpoint\":\"c\"}\n@trainyard oops\n";
        let stderr: &[u8] = b"@trainyard {\"step\":2}\nwhoa\n";
        output.read(stdout, stderr).await;
        assert_eq!(reports.series().len(), 1);
        assert_eq!(output.result(), Some(json!(7)));
        let checkpoint = reports.watch_checkpoint().borrow().clone();
        assert_eq!(checkpoint.as_deref(), Some("c"));
        assert_eq!(output.last_errors(), ["@trainyard {\"step\":2}", "whoa"]);
        assert_eq!(
            reports.tail(),
            [
                "hello",
                "@trainyard oops",
                "@trainyard {\"step\":2}",
                "whoa"
            ]
        );
    }
}
