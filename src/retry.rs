//! Delays between retries, with jitter so that many workers do not retry at once.

use std::time::Duration;

/// Exponential backoff with full jitter: each delay is random, from zero to a
/// ceiling that doubles from `initial` up to `max`.
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

    /// The delay before the next retry.
    pub fn next_delay(&mut self) -> Duration {
        self.next_ceiling().mul_f64(fastrand::f64())
    }

    /// The ceiling of the delay before the next retry.
    pub fn next_ceiling(&mut self) -> Duration {
        let ceiling = self
            .initial
            .saturating_mul(2_u32.saturating_pow(self.failures))
            .min(self.max);
        self.failures = self.failures.saturating_add(1);
        ceiling
    }

    /// Starts over after a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// How many attempts a task's job has, and how long it waits in between.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    /// All attempts, including the first.
    pub max_attempts: u32,
    /// The ceiling of the wait after the first attempt.
    pub initial: Duration,
    /// The maximum of the ceiling.
    pub max: Duration,
    /// The growth of the ceiling from attempt to attempt.
    pub multiplier: f64,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 3,
            initial: Duration::from_secs(10),
            max: Duration::from_secs(600),
            multiplier: 2.0,
        }
    }
}

impl RetryPolicy {
    /// The wait after this many attempts, with full jitter.
    #[must_use]
    pub fn delay_after(&self, attempts: u32) -> Duration {
        self.ceiling_after(attempts).mul_f64(fastrand::f64())
    }

    /// The ceiling of the wait after this many attempts.
    #[must_use]
    pub fn ceiling_after(&self, attempts: u32) -> Duration {
        let growth = self.multiplier.powf(f64::from(attempts.saturating_sub(1)));
        let seconds = (self.initial.as_secs_f64() * growth).min(self.max.as_secs_f64());
        Duration::try_from_secs_f64(seconds).unwrap_or(self.max)
    }
}

/// A random delay from 0.5 to 1.5 times `around`.
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
    fn a_tasks_waits_grow_by_its_multiplier_up_to_its_maximum() {
        let policy = RetryPolicy {
            initial: Duration::from_secs(2),
            max: Duration::from_secs(30),
            multiplier: 3.0,
            ..RetryPolicy::default()
        };
        for (attempts, ceiling) in [(1, 2), (2, 6), (3, 18), (4, 30), (u32::MAX, 30)] {
            assert_eq!(policy.ceiling_after(attempts).as_secs(), ceiling);
            assert!(policy.delay_after(attempts) <= Duration::from_secs(ceiling));
        }
    }

    #[test]
    fn a_long_outage_does_not_overflow() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        backoff.failures = u32::MAX;
        assert!(backoff.next_delay() <= Duration::from_secs(5));
    }
}
