//! Duplicates of messages, on request or by chance.

use std::sync::Arc;

use super::{Backlog, Delivery};
use crate::ack_id::Position;
use crate::faults::Moment;
use crate::message::Message;

impl Backlog {
    /// Adds a copy of a message that was added before, whatever became of it.
    pub fn add_copy(&mut self, message: Arc<Message>, at: &mut Moment<'_>) {
        self.copies += 1;
        self.insert(message, self.copies, at);
    }

    /// Whether the message, or a copy of it, still waits for its first delivery.
    pub fn awaits_first_delivery(&self, sequence: u64) -> bool {
        let first = Position { sequence, copy: 0 };
        let last = Position {
            sequence,
            copy: u64::MAX,
        };
        self.entries
            .range(first..=last)
            .any(|(_, entry)| entry.deliveries == 0)
    }

    /// Adds a copy of the message just delivered, if a fault wants it. A message has at
    /// most one such copy, and copies have none, so that a message that is never
    /// acknowledged does not fill the memory.
    pub(super) fn duplicate_by_chance(&mut self, delivery: &Delivery, at: &mut Moment<'_>) {
        let Position { sequence, copy } = delivery.ack_id.position;
        if copy > 0 || self.exactly_once || self.has_copy(sequence) {
            return;
        }
        if at.dice.duplicates() {
            self.add_copy(Arc::clone(&delivery.message), at);
        }
    }

    fn has_copy(&self, sequence: u64) -> bool {
        let first = Position { sequence, copy: 1 };
        let next = Position {
            sequence: sequence + 1,
            copy: 0,
        };
        self.entries.range(first..next).next().is_some()
    }
}
