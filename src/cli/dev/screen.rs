//! Shows progress as bars on a terminal, and as plain lines elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::printable::line;
use crate::task::Progress;
use crate::worker::EventKind;

/// The resolution of a bar, finer than any terminal is wide.
const STEPS: u64 = 1000;
/// Without a terminal, a line is printed after each such fraction.
const LINE_EVERY: f64 = 0.25;

/// Shows jobs by their titles.
pub(super) enum Screen {
    Terminal {
        bars: MultiProgress,
        by_title: HashMap<String, ProgressBar>,
    },
    Plain {
        printed: HashMap<String, f64>,
    },
}

impl Screen {
    pub(super) fn new() -> Self {
        if std::io::stderr().is_terminal() {
            return Self::Terminal {
                bars: MultiProgress::new(),
                by_title: HashMap::new(),
            };
        }
        Self::plain()
    }

    /// Plain lines, even on a terminal.
    pub(super) fn plain() -> Self {
        Self::Plain {
            printed: HashMap::new(),
        }
    }

    pub(super) fn show(&mut self, title: &str, event: &EventKind) {
        match self {
            Self::Terminal { bars, by_title } => {
                let bar = by_title
                    .entry(title.to_owned())
                    .or_insert_with(|| bars.add(new_bar(title)));
                draw(bar, event);
            }
            Self::Plain { printed } => {
                if let Some(text) = plain(printed, title, event) {
                    eprintln!("{title:<15} {text}");
                }
            }
        }
    }

    /// Leaves the bars on the terminal.
    pub(super) fn close(self) {
        if let Self::Terminal { by_title, .. } = self {
            for bar in by_title.into_values() {
                bar.abandon();
            }
        }
    }
}

fn new_bar(title: &str) -> ProgressBar {
    // The template is valid, so the default is never used.
    let style = ProgressStyle::with_template("{prefix:<15} {bar:20} {percent:>3}%  {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(STEPS)
        .with_style(style)
        .with_prefix(title.to_owned())
}

fn draw(bar: &ProgressBar, event: &EventKind) {
    match event {
        EventKind::Started { .. } => bar.set_message("started"),
        EventKind::Progressed(progress) => {
            if let Some(fraction) = progress.fraction {
                bar.set_position((fraction * STEPS as f64) as u64);
            }
            bar.set_message(figures(progress));
        }
        EventKind::Ended { outcome, retry_in } => {
            if *outcome == "succeeded" {
                bar.set_position(STEPS);
            }
            bar.set_message(ended(outcome, *retry_in));
        }
        EventKind::Queued => bar.set_message("waits in the table"),
        EventKind::Suppressed => bar.println(format!(
            "{:<15} second delivery: suppressed, it runs once",
            bar.prefix()
        )),
        EventKind::Refused { reason } => bar.set_message(format!("refused: {}", line(reason))),
    }
}

fn plain(printed: &mut HashMap<String, f64>, title: &str, event: &EventKind) -> Option<String> {
    match event {
        EventKind::Started { attempt, .. } => Some(format!("started, attempt {attempt}")),
        EventKind::Progressed(progress) => {
            let fraction = progress.fraction?;
            let last = printed.entry(title.to_owned()).or_default();
            if fraction < *last + LINE_EVERY {
                return None;
            }
            *last = fraction;
            Some(format!("{:>3.0}%  {}", fraction * 100.0, figures(progress)))
        }
        EventKind::Ended { outcome, retry_in } => Some(ended(outcome, *retry_in)),
        EventKind::Queued => Some("waits in the table".to_owned()),
        EventKind::Suppressed => Some("second delivery: suppressed, it runs once".to_owned()),
        EventKind::Refused { reason } => Some(format!("refused: {}", line(reason))),
    }
}

fn ended(outcome: &str, retry_in: Option<Duration>) -> String {
    match retry_in {
        None => outcome.to_owned(),
        Some(wait) => format!("{outcome}; tried again in {} s", wait.as_secs()),
    }
}

fn figures(progress: &Progress) -> String {
    let figures: Vec<String> = progress
        .metrics
        .iter()
        .map(|(name, figure)| format!("{} {figure:.4}", line(name)))
        .collect();
    figures.join("  ")
}
