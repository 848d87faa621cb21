//! Decides by chance when faults happen.

use std::time::{Duration, Instant};

use fastrand::Rng;
use google_cloud_gax::error::rpc::Code;

use super::Faults;

/// The faults in force and the generator that decides when they happen.
#[derive(Debug)]
pub struct Dice {
    faults: Faults,
    rng: Rng,
}

/// The current instant, and the dice for its faults.
#[derive(Debug)]
pub struct Moment<'a> {
    pub now: Instant,
    pub dice: &'a mut Dice,
}

impl Dice {
    pub fn new(mut faults: Faults) -> Self {
        // Short enough to type.
        let seed = *faults.seed.get_or_insert_with(|| fastrand::u32(..).into());
        Self {
            faults,
            rng: Rng::with_seed(seed),
        }
    }

    /// The faults in force, always with a seed.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// With a seed, restarts from it.
    pub fn set(&mut self, mut faults: Faults) {
        match faults.seed {
            Some(seed) => self.rng = Rng::with_seed(seed),
            None => faults.seed = self.faults.seed,
        }
        self.faults = faults;
    }

    pub fn is_silent(&self) -> bool {
        self.faults.silence
    }

    pub fn duplicates(&mut self) -> bool {
        self.falls_within(self.faults.duplicates)
    }

    pub fn drops_ack(&mut self) -> bool {
        self.falls_within(self.faults.dropped_acks)
    }

    pub fn resets(&mut self) -> Option<Code> {
        let status = self.faults.reset_status;
        self.falls_within(self.faults.resets).then_some(status)
    }

    pub fn latency(&mut self) -> Duration {
        let (least, most) = (*self.faults.latency.start(), *self.faults.latency.end());
        if most <= least {
            return least;
        }
        least + (most - least).mul_f64(self.rng.f64())
    }

    /// The index of the ready message to be put behind, or None for the message's own
    /// place.
    pub fn out_of_order(&mut self, others: usize) -> Option<usize> {
        let moved = others > 0 && self.falls_within(self.faults.out_of_order);
        moved.then(|| self.rng.usize(..others))
    }

    /// A fault that is off draws nothing.
    fn falls_within(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.rng.f64() < probability
    }
}
