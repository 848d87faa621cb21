//! How much of a run's output the log takes.

use std::time::Duration;

use tokio::time::Instant;

const LINES_PER_SECOND: u32 = 100;
/// Of one run in all: the log's disk is everybody's.
const MOST_BYTES: usize = 64 << 20;

pub(super) struct Gate {
    second: Instant,
    shown: u32,
    hidden: u64,
    bytes_left: usize,
}

#[derive(Debug, PartialEq)]
pub(super) enum Passage {
    Shown {
        /// Lines that were not, and of which nothing has been told yet.
        hidden_before: u64,
    },
    Hidden,
}

impl Gate {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            second: now,
            shown: 0,
            hidden: 0,
            bytes_left: MOST_BYTES,
        }
    }

    pub(super) fn pass(&mut self, now: Instant, bytes: usize) -> Passage {
        if now.duration_since(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.shown = 0;
        }
        if self.shown == LINES_PER_SECOND || self.bytes_left < bytes {
            self.hidden += 1;
            return Passage::Hidden;
        }
        self.shown += 1;
        self.bytes_left -= bytes;
        Passage::Shown {
            hidden_before: self.close(),
        }
    }

    /// The lines hidden since this was last told.
    pub(super) fn close(&mut self) -> u64 {
        std::mem::take(&mut self.hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(hidden_before: u64) -> Passage {
        Passage::Shown { hidden_before }
    }

    #[test]
    fn what_comes_too_fast_is_counted_and_told_later() {
        let start = Instant::now();
        let mut gate = Gate::new(start);
        let passed = (0..1000)
            .filter(|_| gate.pass(start, 10) == shown(0))
            .count();
        assert_eq!(passed, 100);
        let later = start + Duration::from_secs(1);
        assert_eq!(gate.pass(later, 10), shown(900));
        assert_eq!(gate.pass(later, 10), shown(0));
    }

    #[test]
    fn a_run_may_fill_only_so_much_of_the_log() {
        let mut now = Instant::now();
        let mut gate = Gate::new(now);
        let mut bytes = 0;
        for _ in 0..10_000 {
            now += Duration::from_millis(20);
            if let Passage::Shown { .. } = gate.pass(now, 16 << 10) {
                bytes += 16 << 10;
            }
        }
        assert_eq!(bytes, 64 << 20);
        assert_eq!(gate.close(), 10_000 - 4096);
    }
}
