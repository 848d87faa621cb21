//! The deliveries and dead letters that come out of a backlog.

use std::sync::Arc;

use crate::ack_id::AckId;
use crate::message::Message;
use crate::stream_id::StreamId;

/// A message handed to a client.
#[derive(Debug, Clone)]
pub struct Delivery {
    pub ack_id: AckId,
    pub message: Arc<Message>,
    /// 1 for the first delivery. Clients see it only under a dead-letter policy.
    pub attempt: u32,
}

impl Delivery {
    /// The attempt as clients see it: zero, meaning absent, unless `counted`.
    pub fn attempt_shown(&self, counted: bool) -> i32 {
        if !counted {
            return 0;
        }
        i32::try_from(self.attempt).unwrap_or(i32::MAX)
    }
}

/// The room that an ended delivery frees on its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freed {
    /// `None` if a unary pull delivered the message.
    pub stream: Option<StreamId>,
    pub bytes: usize,
}

/// A message that was delivered too often, for the dead-letter topic.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub message: Arc<Message>,
    pub attempts: u32,
}
