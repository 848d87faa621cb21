//! Counts what has happened on a subscription since the start.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counts for one subscription.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) deliveries: Counter,
    pub(super) acks: Counter,
    pub(super) unconfirmed_acks: Counter,
    pub(super) nacks: Counter,
    surplus: Counter,
    pub(super) streams_opened: Counter,
    pub(super) streams_failed: Counter,
    pub(super) streams_quiet: Counter,
    is_emulator: bool,
    ignores_limits: AtomicBool,
}

/// The counts at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    pub deliveries: u64,
    pub acks: u64,
    /// Acks that an exactly-once subscription did not confirm: their messages may be
    /// redelivered.
    pub unconfirmed_acks: u64,
    /// Deliveries that were handed back.
    pub nacks: u64,
    /// Deliveries that arrived although their stream had no room for them.
    pub surplus: u64,
    pub streams_opened: u64,
    pub streams_failed: u64,
    /// Streams that were replaced because they had brought nothing for too long.
    pub streams_quiet: u64,
}

impl Counters {
    pub(super) fn new(is_emulator: bool) -> Self {
        Self {
            is_emulator,
            ..Self::default()
        }
    }

    /// Whether the broker ignores the limit of outstanding messages, as Google's emulator
    /// does. Closing a stream does not stop it, and costs it more than that saves.
    pub(super) fn ignores_limits(&self) -> bool {
        self.ignores_limits.load(Ordering::Relaxed)
    }

    /// Counts a delivery for which its stream had no room. Only an emulator that sends one
    /// right after another counts as ignoring limits: when the client resumes a stream that
    /// broke, any server sends a message more, since it counts from zero. An emulator whose
    /// stream breaks right after a delivery is mistaken for one, which does little harm.
    pub(super) fn add_surplus(&self, right_after_another: bool) {
        self.surplus.add_one();
        if self.is_emulator && right_after_another {
            self.ignores_limits.store(true, Ordering::Relaxed);
        }
    }

    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures {
            deliveries: self.deliveries.get(),
            acks: self.acks.get(),
            unconfirmed_acks: self.unconfirmed_acks.get(),
            nacks: self.nacks.get(),
            surplus: self.surplus.get(),
            streams_opened: self.streams_opened.get(),
            streams_failed: self.streams_failed.get(),
            streams_quiet: self.streams_quiet.get(),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
