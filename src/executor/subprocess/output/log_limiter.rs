//! Limits how much of a run's output is logged.

use std::time::Duration;

use tokio::time::Instant;

const LINES_PER_SECOND: u32 = 100;
/// For a whole run, as all runs share the log's disk.
const MAX_BYTES: usize = 64 << 20;

pub(super) struct LogLimiter {
    second: Instant,
    shown: u32,
    hidden: u64,
    bytes_left: usize,
}

#[derive(Debug, PartialEq)]
pub(super) enum Decision {
    Show {
        /// Lines that were hidden since the last one that was shown.
        hidden_before: u64,
    },
    Hide,
}

impl LogLimiter {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            second: now,
            shown: 0,
            hidden: 0,
            bytes_left: MAX_BYTES,
        }
    }

    pub(super) fn admit(&mut self, now: Instant, bytes: usize) -> Decision {
        if now.duration_since(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.shown = 0;
        }
        if self.shown == LINES_PER_SECOND || self.bytes_left < bytes {
            self.hidden += 1;
            return Decision::Hide;
        }
        self.shown += 1;
        self.bytes_left -= bytes;
        Decision::Show {
            hidden_before: self.take_hidden(),
        }
    }

    /// Returns the number of hidden lines, and resets it.
    pub(super) fn take_hidden(&mut self) -> u64 {
        std::mem::take(&mut self.hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(hidden_before: u64) -> Decision {
        Decision::Show { hidden_before }
    }

    #[test]
    fn lines_beyond_the_rate_are_counted() {
        let start = Instant::now();
        let mut limiter = LogLimiter::new(start);
        let passed = (0..1000)
            .filter(|_| limiter.admit(start, 10) == shown(0))
            .count();
        assert_eq!(passed, 100);
        let later = start + Duration::from_secs(1);
        assert_eq!(limiter.admit(later, 10), shown(900));
        assert_eq!(limiter.admit(later, 10), shown(0));
    }

    #[test]
    fn the_bytes_of_a_run_are_limited() {
        let mut now = Instant::now();
        let mut limiter = LogLimiter::new(now);
        let mut bytes = 0;
        for _ in 0..10_000 {
            now += Duration::from_millis(20);
            if let Decision::Show { .. } = limiter.admit(now, 16 << 10) {
                bytes += 16 << 10;
            }
        }
        assert_eq!(bytes, 64 << 20);
        assert_eq!(limiter.take_hidden(), 10_000 - 4096);
    }
}
