//! A run's progress over time, in bounded memory.

use super::Progress;

/// Even, so that every second point can be removed.
const CAPACITY: usize = 500;

/// Stores every report, then every second, every fourth and so on: whenever it is
/// full, every second point is removed and the stride doubles.
#[derive(Debug)]
pub(super) struct Series {
    points: Vec<Progress>,
    /// One of this many reports is stored.
    stride: u64,
    count: u64,
    /// The newest report, if it is not among the points.
    newest: Option<Progress>,
}

impl Default for Series {
    fn default() -> Self {
        Self {
            points: Vec::new(),
            stride: 1,
            count: 0,
            newest: None,
        }
    }
}

impl Series {
    pub(super) fn push(&mut self, report: Progress) {
        if self.points.len() == CAPACITY {
            let mut nth = 0_usize;
            self.points.retain(|_| {
                nth += 1;
                nth % 2 == 1
            });
            self.stride *= 2;
        }
        self.newest = match self.count % self.stride {
            0 => {
                self.points.push(report);
                None
            }
            _ => Some(report),
        };
        self.count += 1;
    }

    pub(super) fn points(&self) -> Vec<Progress> {
        self.points.iter().chain(&self.newest).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps_after(reports: u64) -> Vec<u64> {
        let mut series = Series::default();
        for step in 0..reports {
            series.push(Progress {
                step: Some(step),
                ..Progress::default()
            });
        }
        let points = series.points();
        points.iter().filter_map(|point| point.step).collect()
    }

    #[test]
    fn a_short_series_is_complete() {
        assert_eq!(steps_after(0), [0_u64; 0]);
        assert_eq!(steps_after(500), (0..500).collect::<Vec<_>>());
    }

    #[test]
    fn a_long_series_is_thinned_evenly_and_ends_with_the_newest() {
        for reports in [501, 502, 999, 1000, 1001, 12_345, 100_000] {
            let steps = steps_after(reports);
            assert!((250..=501).contains(&steps.len()), "{reports}");
            assert_eq!(steps.first(), Some(&0));
            assert_eq!(steps.last(), Some(&(reports - 1)));
            let stride = steps[1];
            let (_, even) = steps.split_last().unwrap();
            assert!(
                even.windows(2).all(|pair| pair[1] - pair[0] == stride),
                "{reports}"
            );
        }
    }
}
