//! How long a task's jobs take, as observed by this worker.

use std::time::Duration;

/// An exponentially weighted mean.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RunTime {
    seconds: f64,
    runs: u32,
}

/// The weight of the newest run.
const WEIGHT: f64 = 0.2;
/// With fewer runs, the mean is unknown.
const ENOUGH: u32 = 3;

impl RunTime {
    pub(super) fn add(&mut self, took: Duration) {
        let took = took.as_secs_f64();
        self.runs = self.runs.saturating_add(1);
        let weight = WEIGHT.max(1.0 / f64::from(self.runs));
        self.seconds += weight * (took - self.seconds);
    }

    /// None while too few runs have been seen.
    pub(super) fn mean(&self) -> Option<Duration> {
        (self.runs >= ENOUGH).then(|| Duration::from_secs_f64(self.seconds.max(0.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_known_of_a_task_before_its_third_run() {
        let mut time = RunTime::default();
        for expected in [None, None, Some(Duration::from_secs(4))] {
            time.add(Duration::from_secs(4));
            assert_eq!(time.mean(), expected);
        }
    }

    #[test]
    fn the_mean_follows_runs_that_become_longer() {
        let mut time = RunTime::default();
        for _ in 0..10 {
            time.add(Duration::from_secs(1));
        }
        for _ in 0..20 {
            time.add(Duration::from_secs(100));
        }
        assert!(time.mean().unwrap() > Duration::from_secs(95));
    }
}
