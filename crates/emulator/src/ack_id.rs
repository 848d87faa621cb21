//! Ack ids: each names one delivery, not its message.

use std::fmt;
use std::str::FromStr;

/// A message's place in a backlog: its order of publishing, and a number that
/// distinguishes copies of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub sequence: u64,
    pub copy: u64,
}

/// One delivery of one message by one subscription. Opaque to clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AckId {
    /// The subscription's creation number: a recreated subscription does not accept the
    /// ack ids of its predecessor.
    pub subscription: u64,
    pub position: Position,
    /// Grows with every delivery of the subscription.
    pub delivery: u64,
}

impl fmt::Display for AckId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Position { sequence, copy } = self.position;
        write!(
            f,
            "{:x}-{sequence:x}-{copy:x}-{:x}",
            self.subscription, self.delivery
        )
    }
}

/// The text is not an ack id of this emulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAnAckId;

impl FromStr for AckId {
    type Err = NotAnAckId;

    fn from_str(text: &str) -> Result<Self, NotAnAckId> {
        let mut numbers = text.split('-').map(|part| u64::from_str_radix(part, 16));
        let mut next = || numbers.next().and_then(Result::ok).ok_or(NotAnAckId);
        let id = Self {
            subscription: next()?,
            position: Position {
                sequence: next()?,
                copy: next()?,
            },
            delivery: next()?,
        };
        if numbers.next().is_some() {
            return Err(NotAnAckId);
        }
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ack_id_survives_its_text() {
        let id = AckId {
            subscription: 1_700_000_000_000_000,
            position: Position {
                sequence: 1_700_000_000_000_001,
                copy: 3,
            },
            delivery: u64::MAX,
        };
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn other_text_is_not_an_ack_id() {
        for text in ["", "1-2-3", "1-2-3-4-5", "x-1-1-1", "--"] {
            assert_eq!(text.parse::<AckId>(), Err(NotAnAckId), "{text}");
        }
    }
}
