//! Maps a command's exit to the outcome of its run.

use std::time::Duration;

use signal_hook::consts::{SIGKILL, SIGTERM};
use signal_hook::low_level::signal_name;

use super::lifeline::ExitStatus;
use crate::json::Json;
use crate::outcome::Outcome;

/// How many of the last lines of stderr an error quotes.
const QUOTED_LINES: usize = 3;

/// What programs print when an allocation fails.
const OUT_OF_MEMORY: &[&str] = &[
    "out of memory",
    "memory exhausted",
    "cannot allocate memory",
    "memoryerror",
    "bad_alloc",
    "bad alloc",
    "memory allocation of",
    "unable to allocate",
    "alloc failed",
];

/// A command's exit, with everything that decides the outcome.
pub(super) struct CommandExit<'a> {
    pub(super) status: ExitStatus,
    /// It was asked to stop.
    pub(super) stopped: bool,
    /// It was asked to stop because it reported nothing for this long.
    pub(super) stalled: Option<Duration>,
    pub(super) result: Option<Json>,
    /// The last lines of stderr.
    pub(super) errors: &'a [String],
    pub(super) permanent_exit_codes: &'a [u8],
    pub(super) memory: Option<u64>,
}

impl CommandExit<'_> {
    pub(super) fn outcome(self) -> Outcome {
        if self.status.code == Some(0) {
            // A program that saves its work on SIGTERM may exit with 0 too.
            // Then only a result shows that it was done.
            if !(self.stopped || self.status.expired) || self.result.is_some() {
                return Outcome::Succeeded(self.result.unwrap_or_default());
            }
        }
        // The exit code of a program that was stopped does not judge the request.
        let by_itself = !self.stopped && !self.status.expired && self.stalled.is_none();
        let permanent = by_itself
            && self.status.code.is_some_and(|code| {
                self.permanent_exit_codes
                    .iter()
                    .any(|permanent| i32::from(*permanent) == code)
            });
        Outcome::Failed {
            error: self.error(permanent),
            permanent,
        }
    }

    fn error(&self, permanent: bool) -> String {
        let mut error = self.cause(permanent);
        let first = self.errors.len().saturating_sub(QUOTED_LINES);
        if !self.errors.is_empty() {
            error.push_str(": ");
            error.push_str(&self.errors[first..].join(" | "));
        }
        error
    }

    fn cause(&self, permanent: bool) -> String {
        let end = self.end();
        if let Some(limit) = self.stalled {
            let limit = humantime::format_duration(limit);
            return format!("no progress for {limit}, stopped as stuck ({end})");
        }
        if self.status.expired {
            return format!("stopped because its lease was not renewed in time ({end})");
        }
        if self.stopped {
            return format!("stopped before it was done ({end})");
        }
        match self.memory {
            Some(memory) if !permanent && self.ran_out_of_memory() => {
                format!("out of memory, with a limit of {memory} bytes ({end})")
            }
            _ => end,
        }
    }

    fn end(&self) -> String {
        match (self.status.code, self.status.signal) {
            (Some(code), _) => match shell_signal(code) {
                // A shell returns 128 + the signal that ended its command.
                Some(signal) => format!("exit code {code}, as after {}", name(signal)),
                None => format!("exit code {code}"),
            },
            (None, Some(SIGKILL)) if !(self.stopped || self.status.expired) => {
                "killed by SIGKILL, possibly by the kernel's out-of-memory killer".to_owned()
            }
            (None, Some(signal)) => format!("killed by {}", name(signal)),
            (None, None) => "its exit status is unknown".to_owned(),
        }
    }

    fn ran_out_of_memory(&self) -> bool {
        self.errors.iter().any(|line| {
            let line = line.to_lowercase();
            OUT_OF_MEMORY.iter().any(|words| line.contains(words))
        })
    }
}

fn shell_signal(code: i32) -> Option<i32> {
    let signal = code - 128;
    [SIGKILL, SIGTERM]
        .into_iter()
        .chain(signal_hook::consts::TERM_SIGNALS.iter().copied())
        .find(|known| *known == signal)
}

fn name(signal: i32) -> String {
    signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use signal_hook::consts::SIGSEGV;

    use super::*;

    fn exit_with(code: Option<i32>, signal: Option<i32>) -> CommandExit<'static> {
        CommandExit {
            status: ExitStatus {
                code,
                signal,
                expired: false,
            },
            stopped: false,
            stalled: None,
            result: None,
            errors: &[],
            permanent_exit_codes: &[65, 78],
            memory: None,
        }
    }

    fn failure(exit: CommandExit<'_>) -> (String, bool) {
        match exit.outcome() {
            Outcome::Failed { error, permanent } => (error, permanent),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_exit_code_decides() {
        let done = exit_with(Some(0), None).outcome();
        assert_eq!(done, Outcome::Succeeded(Json::default()));
        let with_result = CommandExit {
            result: Some(json!({"a": 1}).into()),
            ..exit_with(Some(0), None)
        };
        assert_eq!(
            with_result.outcome(),
            Outcome::Succeeded(json!({"a": 1}).into())
        );
        for (code, permanent) in [(1, false), (2, false), (65, true), (78, true), (255, false)] {
            let failed = failure(exit_with(Some(code), None));
            assert_eq!(failed, (format!("exit code {code}"), permanent));
        }
        let own = CommandExit {
            permanent_exit_codes: &[2],
            ..exit_with(Some(2), None)
        };
        assert!(failure(own).1);
    }

    #[test]
    fn a_signal_is_named() {
        let (error, permanent) = failure(exit_with(None, Some(SIGKILL)));
        assert!(error.contains("SIGKILL") && error.contains("out-of-memory killer"));
        assert!(!permanent);
        assert_eq!(
            failure(exit_with(None, Some(SIGSEGV))).0,
            "killed by SIGSEGV"
        );
        let of_a_shell = failure(exit_with(Some(137), None)).0;
        assert_eq!(of_a_shell, "exit code 137, as after SIGKILL");
    }

    #[test]
    fn a_stopped_run_succeeds_only_with_a_result() {
        let stopped = |result| CommandExit {
            stopped: true,
            result,
            ..exit_with(Some(0), None)
        };
        let (error, permanent) = failure(stopped(None));
        assert_eq!(error, "stopped before it was done (exit code 0)");
        assert!(!permanent);
        let done = stopped(Some(json!(1).into())).outcome();
        assert_eq!(done, Outcome::Succeeded(json!(1).into()));
    }

    #[test]
    fn the_end_of_stderr_is_quoted() {
        let errors = ["a", "b", "c", "ValueError: d"].map(str::to_owned);
        let failed = CommandExit {
            errors: &errors,
            ..exit_with(Some(1), None)
        };
        assert_eq!(failure(failed).0, "exit code 1: b | c | ValueError: d");
    }

    #[test]
    fn a_program_that_got_no_memory_within_a_limit_is_out_of_memory() {
        let errors = ["MemoryError".to_owned()];
        let limited = |code, memory| CommandExit {
            errors: &errors,
            memory,
            ..exit_with(Some(code), None)
        };
        let (error, permanent) = failure(limited(1, Some(1000)));
        assert!(error.starts_with("out of memory"), "{error}");
        assert!(!permanent);
        assert!(failure(limited(1, None)).0.starts_with("exit code 1"));
        assert!(failure(limited(65, Some(1000))).1);
    }

    #[test]
    fn a_stuck_run_is_a_transient_failure_whatever_it_ends_with() {
        for (code, signal, end) in [
            (None, Some(SIGTERM), "killed by SIGTERM"),
            (Some(65), None, "exit code 65"),
        ] {
            let stuck = CommandExit {
                stopped: true,
                stalled: Some(Duration::from_secs(600)),
                ..exit_with(code, signal)
            };
            let expected = format!("no progress for 10m, stopped as stuck ({end})");
            assert_eq!(failure(stuck), (expected, false));
        }
    }

    #[test]
    fn a_run_that_was_stopped_or_has_expired_fails_transiently_whatever_its_code() {
        for code in [65, 78] {
            let stopped = CommandExit {
                stopped: true,
                ..exit_with(Some(code), None)
            };
            assert!(!failure(stopped).1);
            let mut expired = exit_with(Some(code), None);
            expired.status.expired = true;
            assert!(!failure(expired).1);
        }
    }
}
