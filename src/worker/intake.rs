//! What all deliveries of one subscription share.

use std::sync::Arc;

use super::key_turns::KeyTurns;
use crate::config;

/// One subscription, as the processing of its deliveries sees it.
pub(super) struct Intake {
    /// The name that the guard's keys carry.
    pub(super) name: Arc<str>,
    pub(super) settings: config::Subscription,
    pub(super) dead_letter_topic: Option<Arc<str>>,
    pub(super) turns: KeyTurns,
}

impl Intake {
    pub(super) fn new(name: &str, settings: config::Subscription) -> Self {
        Self {
            name: name.into(),
            dead_letter_topic: settings.dead_letter_topic.as_deref().map(Into::into),
            settings,
            turns: KeyTurns::default(),
        }
    }
}
