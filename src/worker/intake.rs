//! What all deliveries of one subscription share.

use std::sync::Arc;

use super::hold::{HeldDeliveries, Unknown};
use super::key_turns::KeyTurns;
use crate::config;

/// One subscription, as the processing of its deliveries sees it.
pub(super) struct Intake {
    /// The name that the guard's keys carry.
    pub(super) name: Arc<str>,
    pub(super) settings: config::Subscription,
    pub(super) dead_letter_topic: Option<Arc<str>>,
    pub(super) held: HeldDeliveries,
    pub(super) turns: KeyTurns,
}

impl Intake {
    pub(super) fn new(name: &str, settings: config::Subscription, held: HeldDeliveries) -> Self {
        Self {
            name: name.into(),
            dead_letter_topic: settings.dead_letter_topic.as_deref().map(Into::into),
            settings,
            held,
            turns: KeyTurns::default(),
        }
    }

    pub(super) fn unknown(&self, patience: std::time::Duration, error: String) -> Unknown {
        Unknown {
            patience,
            error,
            dead_letter_topic: self.dead_letter_topic.clone(),
        }
    }
}
