//! Reads a command's output without ever blocking the command. Logs a limited
//! part of it, and stores the last lines.

mod log_limiter;

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::Instant;
use tracing::{info, warn};

use super::lines::{Line, Lines};
use super::report_line::ReportLine;
use crate::json::Json;
use crate::report::{Reports, Tail, readable};
use log_limiter::{Decision, LogLimiter};

/// The capacity of a pipe.
const BUFFER_SIZE: usize = 64 << 10;

/// Replaces a report line that is too long.
const TOO_LONG: &str = "trainyard: the next line is ignored: it is longer than 256 KiB";
/// How much of such a line is logged.
const QUOTED_BYTES: usize = 200;

/// The output of one run.
pub(super) struct Output {
    reports: Reports,
    state: Mutex<State>,
}

struct State {
    limiter: LogLimiter,
    result: Option<Json>,
    /// The last lines of stderr, for the error of a failed run.
    errors: Tail,
    /// When the last report line came, or the run began.
    last_report_at: Instant,
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
            state: Mutex::new(State {
                limiter: LogLimiter::new(now),
                result: None,
                errors: Tail::default(),
                last_report_at: now,
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
        let mut buffer = vec![0; BUFFER_SIZE];
        // A read error ends the stream too.
        while let Ok(read) = source.read(&mut buffer).await
            && read > 0
        {
            lines.feed(&buffer[..read], |line| self.handle(&line, stream));
        }
        lines.end(|line| self.handle(&line, stream));
    }

    fn handle(&self, line: &Line<'_>, stream: Stream) {
        let report = match stream {
            Stream::Stdout => ReportLine::read(line.bytes),
            Stream::Stderr => None,
        };
        if report.is_some() {
            // A malformed report line shows too that the run is not stuck.
            self.state().last_report_at = Instant::now();
        }
        match report {
            Some(_) if line.cut => self.refuse_too_long(line, stream),
            Some(Ok(report)) => {
                let errors = report.errors.join(", ");
                self.apply(report);
                if !errors.is_empty() {
                    self.show(line, stream, Some(&errors));
                }
            }
            Some(Err(reason)) => self.show(line, stream, Some(&reason)),
            None => self.show(line, stream, None),
        }
    }

    /// The line may have been the result, so the log and the tail say that it is
    /// lost.
    fn refuse_too_long(&self, line: &Line<'_>, stream: Stream) {
        let beginning = &line.bytes[..line.bytes.len().min(QUOTED_BYTES)];
        self.reports.output(TOO_LONG.as_bytes());
        let line = Line {
            bytes: beginning,
            cut: true,
        };
        self.show(&line, stream, Some(TOO_LONG));
    }

    fn apply(&self, report: ReportLine) {
        // The checkpoint first, in case the run reports nothing after this.
        if let Some(checkpoint) = report.checkpoint {
            self.reports.checkpoint(&checkpoint);
        }
        if let Some(progress) = report.progress {
            self.reports.progress(progress);
        }
        let mut state = self.state();
        if report.result.is_some() {
            state.result = report.result;
        }
    }

    fn show(&self, line: &Line<'_>, stream: Stream, malformed: Option<&str>) {
        self.reports.output(line.bytes);
        let mut state = self.state();
        if stream == Stream::Stderr {
            state.errors.push(line.bytes);
        }
        let decision = state.limiter.admit(Instant::now(), line.bytes.len());
        drop(state);
        let Decision::Show { hidden_before } = decision else {
            return;
        };
        log_hidden(hidden_before);
        let text = readable(line.bytes);
        let cut = if line.cut { " … (truncated)" } else { "" };
        match malformed {
            None => info!(target: "task", %stream, "{text}{cut}"),
            Some(reason) => {
                warn!(target: "task", %stream, %reason, "invalid report line: {text}{cut}")
            }
        }
    }

    /// Logs the number of lines that are still hidden.
    pub(super) fn close(&self) {
        let hidden = self.state().limiter.take_hidden();
        log_hidden(hidden);
    }

    pub(super) fn result(&self) -> Option<Json> {
        self.state().result.clone()
    }

    /// The last lines of stderr, truncated, oldest first.
    pub(super) fn last_errors(&self) -> Vec<String> {
        self.state().errors.lines()
    }

    pub(super) fn last_report_at(&self) -> Instant {
        self.state().last_report_at
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn log_hidden(lines: u64) {
    if lines > 0 {
        info!(target: "task", lines, "more lines are not shown");
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
    async fn only_stdout_has_report_lines() {
        let reports = Reports::default();
        let output = Output::new(reports.clone());
        let stdout: &[u8] = b"hello\n@trainyard {\"step\":1}\n@trainyard {\"result\":7}\n@trainyard {\"checkpoint\":\"c\"}\n@trainyard oops\n";
        let stderr: &[u8] = b"@trainyard {\"step\":2}\nwhoa\n";
        output.read(stdout, stderr).await;
        assert_eq!(reports.series().len(), 1);
        assert_eq!(output.result(), Some(json!(7).into()));
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
