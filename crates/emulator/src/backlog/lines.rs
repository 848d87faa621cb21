//! The lines in which messages of one ordering key wait.

use std::collections::{BTreeSet, HashMap};

use crate::ack_id::Position;

/// The unacknowledged messages of one ordering key.
#[derive(Debug, Default)]
struct Line {
    positions: BTreeSet<Position>,
    /// The message that may be delivered; all others are behind it.
    active: Option<Position>,
}

/// A line for each ordering key that has messages.
#[derive(Debug, Default)]
pub struct Lines {
    lines: HashMap<String, Line>,
}

impl Lines {
    pub fn join(&mut self, key: &str, position: Position) {
        let line = self.lines.entry(key.to_owned()).or_default();
        line.positions.insert(position);
    }

    pub fn leave(&mut self, key: &str, position: Position) {
        if let Some(line) = self.lines.get_mut(key) {
            line.positions.remove(&position);
        }
    }

    pub fn active(&self, key: &str) -> Option<Position> {
        self.lines.get(key)?.active
    }

    /// Leaves no message of the key active.
    pub fn release(&mut self, key: &str) {
        if let Some(line) = self.lines.get_mut(key) {
            line.active = None;
        }
    }

    /// Makes the first in line active, if none is, and returns it.
    pub fn advance(&mut self, key: &str) -> Option<Position> {
        let line = self.lines.get_mut(key)?;
        if line.active.is_some() {
            return None;
        }
        line.active = line.positions.first().copied();
        if line.active.is_none() {
            self.lines.remove(key);
            return None;
        }
        line.active
    }
}
