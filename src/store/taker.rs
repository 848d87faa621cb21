//! Who asks for a job that is on record: a delivery's claim, or a sweep.

use std::time::Duration;

use uuid::Uuid;

use crate::job::{Can, ClaimRequest, JobKey, Limits, Pick};

/// What a run needs to take a job over.
pub(super) struct Taker<'a> {
    pub(super) key: &'a JobKey,
    pub(super) token: Uuid,
    /// None keeps the row's value.
    pub(super) delay: Option<Duration>,
    /// Also takes the job of a worker whose lease has expired.
    pub(super) takes_lost: bool,
    /// It has no delivery: it takes such a job only after the row's delay, and needs the
    /// message's fields too.
    pub(super) from_queue: bool,
    pub(super) limits: &'a Limits,
}

impl<'a> From<&'a ClaimRequest> for Taker<'a> {
    fn from(request: &'a ClaimRequest) -> Self {
        Self {
            key: &request.key,
            token: request.token,
            delay: Some(request.ack.reap_delay(true)),
            takes_lost: request.can == Can::Run,
            from_queue: false,
            limits: &request.limits,
        }
    }
}

impl<'a> From<&'a Pick> for Taker<'a> {
    fn from(pick: &'a Pick) -> Self {
        Self {
            key: &pick.key,
            token: pick.token,
            delay: pick.acked_when_claimed.then_some(Duration::ZERO),
            takes_lost: true,
            from_queue: true,
            limits: &pick.limits,
        }
    }
}
