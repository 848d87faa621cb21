//! Notices when this machine's clock is set.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tracing::warn;

/// A clock that is slewed stays within this from one look to the next.
const TOLERANCE: Duration = Duration::from_millis(500);

/// Compares the wall clock with one that is never set.
#[derive(Debug)]
pub(super) struct ClockSteps(Mutex<Looks>);

#[derive(Debug)]
struct Looks {
    last: (SystemTime, Instant),
    stepped_at: Option<Instant>,
}

impl ClockSteps {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Looks::since(SystemTime::now(), Instant::now())))
    }

    /// Looks, and tells whether the clock was set at most this long ago, as far as the looks
    /// can tell. To be called often: a clock that is slewed drifts in the meantime.
    pub(super) fn stepped_within(&self, period: Duration) -> bool {
        // The clocks are read under the lock, so that the looks are in their order.
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        looks.look(SystemTime::now(), Instant::now(), period)
    }
}

impl Looks {
    fn since(wall: SystemTime, steady: Instant) -> Self {
        Self {
            last: (wall, steady),
            stepped_at: None,
        }
    }

    fn look(&mut self, wall: SystemTime, steady: Instant, period: Duration) -> bool {
        let (last_wall, last_steady) = self.last;
        let expected = last_wall + steady.saturating_duration_since(last_steady);
        let step = wall
            .duration_since(expected)
            .unwrap_or_else(|backwards| backwards.duration());
        self.last = (wall, steady);
        if step > TOLERANCE {
            let seconds = step.as_secs_f64();
            warn!(
                seconds,
                "this machine's clock was set: no lost job is taken over for the length of a lease"
            );
            self.stepped_at = Some(steady);
        }
        self.stepped_at
            .is_some_and(|at| steady.saturating_duration_since(at) < period)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(60);
    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_step_of_the_clock_is_noticed_for_a_lease() {
        for is_forward in [true, false] {
            let (wall, steady) = (SystemTime::now(), Instant::now());
            let mut clock = Looks::since(wall, steady);
            let seconds = Duration::from_secs;
            assert!(!clock.look(wall + seconds(5), steady + seconds(5), LEASE));
            let set = match is_forward {
                true => wall + HOUR,
                false => wall - HOUR,
            };
            for passed in [6, 7, 65] {
                assert!(clock.look(set + seconds(passed), steady + seconds(passed), LEASE));
            }
            assert!(!clock.look(set + seconds(66), steady + seconds(66), LEASE));
        }
    }

    #[test]
    fn a_clock_that_runs_a_little_fast_was_not_set() {
        let (wall, steady) = (SystemTime::now(), Instant::now());
        let mut clock = Looks::since(wall, steady);
        for look in 1..1000 {
            let wall = wall + Duration::from_millis(1100) * look;
            assert!(!clock.look(wall, steady + Duration::from_millis(1000) * look, LEASE));
        }
    }
}
