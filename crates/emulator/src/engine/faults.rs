//! Faults in force, and the random faults that belong to no subscription.

use std::time::Instant;

use google_cloud_gax::error::rpc::Code;

use super::Engine;
use crate::faults::Faults;

impl Engine {
    pub fn faults(&self) -> &Faults {
        self.dice.faults()
    }

    pub fn set_faults(&mut self, faults: Faults, now: Instant) {
        let silence = faults.silence;
        self.dice.set(faults);
        let names: Vec<String> = self.feeds.keys().cloned().collect();
        for name in names {
            // Deliveries that a silent stream cannot send would reach their ack deadline.
            // After silence, streams get everything that has accumulated.
            self.change_feed(&name, now, |feed, at| {
                if silence {
                    feed.withdraw(at);
                }
            });
        }
    }

    /// Whether a stream that has just sent messages ends, and with which status.
    pub fn reset_by_chance(&mut self) -> Option<Code> {
        self.dice.resets()
    }
}
