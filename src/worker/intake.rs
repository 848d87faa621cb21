//! The state that all deliveries of one subscription share.

use std::sync::Arc;

use super::key_turns::KeyTurns;
use crate::config;

/// One subscription, for processing its deliveries.
pub(super) struct Intake {
    /// The name used in the guard's keys.
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
