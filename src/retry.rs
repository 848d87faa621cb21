//! Delays between tries, with jitter so that many workers do not try as one.

use std::time::Duration;

/// Exponential backoff with full jitter: each delay is drawn from nothing to
/// a ceiling that doubles from `initial` up to `max`.
#[derive(Debug, Clone)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    #[must_use]
    pub fn new(initial: Duration, max: Duration) -> Self {
        Self {
            initial,
            max,
            failures: 0,
        }
    }

    /// The delay before the next try.
    pub fn next_delay(&mut self) -> Duration {
        self.next_ceiling().mul_f64(fastrand::f64())
    }

    /// The longest that the delay before the next try may be.
    pub fn next_ceiling(&mut self) -> Duration {
        let ceiling = self
            .initial
            .saturating_mul(2_u32.saturating_pow(self.failures))
            .min(self.max);
        self.failures = self.failures.saturating_add(1);
        ceiling
    }

    /// A try went well: the next failure starts over.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A delay between half of `around` and one and a half times it.
#[must_use]
pub fn jittered(around: Duration) -> Duration {
    around.mul_f64(0.5 + fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_stay_below_a_ceiling_that_doubles_up_to_the_maximum() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        for ceiling in [1, 2, 4, 5, 5, 5] {
            assert!(backoff.next_delay() <= Duration::from_secs(ceiling));
        }
    }

    #[test]
    fn a_very_long_outage_does_not_overflow() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        backoff.failures = u32::MAX;
        assert!(backoff.next_delay() <= Duration::from_secs(5));
    }
}
