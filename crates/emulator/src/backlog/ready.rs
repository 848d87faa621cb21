//! The messages that may be delivered, in their order of delivery.

use std::collections::BTreeSet;

use crate::ack_id::Position;

/// A place in the queue: a position's own, or behind that of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    of: Position,
    behind: u64,
}

/// The queue. It never holds two messages of one ordering key, so any order of it keeps
/// theirs.
#[derive(Debug, Default)]
pub struct Ready {
    queue: BTreeSet<(Place, Position)>,
}

impl Ready {
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Inserts a message by the order of publishing.
    pub fn insert(&mut self, position: Position) -> Place {
        self.insert_at(
            Place {
                of: position,
                behind: 0,
            },
            position,
        )
    }

    /// Inserts a message right behind the one of this index.
    pub fn insert_behind(&mut self, index: usize, position: Position) -> Place {
        let Some(&(before, _)) = self.queue.iter().nth(index) else {
            return self.insert(position);
        };
        self.insert_at(
            Place {
                behind: before.behind + 1,
                ..before
            },
            position,
        )
    }

    pub fn remove(&mut self, place: Place, position: Position) {
        self.queue.remove(&(place, position));
    }

    pub fn pop_first(&mut self) -> Option<Position> {
        self.queue.pop_first().map(|(_, position)| position)
    }

    fn insert_at(&mut self, place: Place, position: Position) -> Place {
        self.queue.insert((place, position));
        place
    }
}
