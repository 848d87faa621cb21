//! Records messages of one ordering key in their order of arrival; after that the queue
//! keeps the order.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

/// If a message was not recorded, the messages fetched behind it arrive within this time.
pub(super) const FETCHED_BEFORE: Duration = Duration::from_secs(5);

/// The order of messages per ordering key of one subscription.
#[derive(Debug, Clone, Default)]
pub(super) struct KeyTurns {
    keys: Arc<Mutex<Keys>>,
}

#[derive(Debug, Default)]
struct Keys {
    last: HashMap<String, Last>,
    broken: HashMap<String, Broken>,
}

/// A key whose message could not be recorded. No other message of the key may be recorded
/// until the broker has redelivered it.
#[derive(Debug)]
struct Broken {
    message_id: String,
    until: Instant,
}

/// The last message of a key that is not recorded yet.
#[derive(Debug)]
struct Last {
    number: u64,
    recorded: oneshot::Receiver<()>,
}

/// One message's place behind the earlier ones of its key. Dropping it without
/// [`Turn::recorded`] tells those behind it that the order is broken.
#[derive(Debug)]
pub(super) struct Turn {
    turns: KeyTurns,
    ordering_key: String,
    message_id: String,
    number: u64,
    is_out_of_turn: bool,
    before: Option<oneshot::Receiver<()>>,
    recorded: Option<oneshot::Sender<()>>,
}

impl KeyTurns {
    /// The next place of the key; to be called in the order of arrival.
    pub(super) fn next(&self, ordering_key: &str, message_id: &str) -> Turn {
        let (sender, recorded) = oneshot::channel();
        let mut keys = self.lock();
        let is_out_of_turn = keys.is_out_of_turn(ordering_key, message_id);
        let before = keys.last.remove(ordering_key);
        let number = before.as_ref().map_or(0, |before| before.number + 1);
        keys.last
            .insert(ordering_key.to_owned(), Last { number, recorded });
        Turn {
            turns: self.clone(),
            ordering_key: ordering_key.to_owned(),
            message_id: message_id.to_owned(),
            number,
            is_out_of_turn,
            before: before.map(|before| before.recorded),
            recorded: Some(sender),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Keys {
    fn is_out_of_turn(&mut self, ordering_key: &str, message_id: &str) -> bool {
        let Some(broken) = self.broken.get(ordering_key) else {
            return false;
        };
        if broken.message_id == message_id || broken.until < Instant::now() {
            self.broken.remove(ordering_key);
            return false;
        }
        true
    }

    fn break_off(&mut self, ordering_key: &str, message_id: &str) {
        let now = Instant::now();
        self.broken.retain(|_, broken| broken.until >= now);
        // The others wait for the first one.
        self.broken
            .entry(ordering_key.to_owned())
            .or_insert_with(|| Broken {
                message_id: message_id.to_owned(),
                until: now + FETCHED_BEFORE,
            });
    }
}

impl Turn {
    /// Waits for the previous message. False: that one is not on record, so this one must
    /// not be either; the broker redelivers both, in order.
    pub(super) async fn comes(&mut self) -> bool {
        match self.before.take() {
            _ if self.is_out_of_turn => false,
            None => true,
            Some(before) => before.await.is_ok(),
        }
    }

    /// Marks the message as recorded, or as having no place in the order.
    pub(super) fn recorded(mut self) {
        if let Some(sender) = self.recorded.take() {
            // An error means that nobody is behind.
            let _ = sender.send(());
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut keys = self.turns.lock();
        if self.recorded.is_some() {
            keys.break_off(&self.ordering_key, &self.message_id);
        }
        let last = keys.last.get(&self.ordering_key);
        if last.is_some_and(|last| last.number == self.number) {
            keys.last.remove(&self.ordering_key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_message_waits_for_the_one_before_it_in_its_key_only() {
        let turns = KeyTurns::default();
        let mut first = turns.next("a", "1");
        let mut second = turns.next("a", "2");
        let mut other = turns.next("b", "3");
        assert!(first.comes().await && other.comes().await);
        assert!(second.comes().now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_message_comes_when_the_one_before_it_is_on_record() {
        let turns = KeyTurns::default();
        let first = turns.next("a", "1");
        let mut second = turns.next("a", "2");
        first.recorded();
        assert!(second.comes().await);
        second.recorded();
        assert!(turns.lock().last.is_empty() && turns.lock().broken.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_is_not_put_on_record_takes_those_behind_it_along() {
        let turns = KeyTurns::default();
        let first = turns.next("a", "1");
        let mut second = turns.next("a", "2");
        drop(first);
        assert!(!second.comes().await);
        drop(second);
        // The third was fetched before, but begun only later.
        let mut third = turns.next("a", "3");
        assert!(!third.comes().await);
        drop(third);
        // The broker redelivers all of them, in order.
        let mut again = turns.next("a", "1");
        assert!(again.comes().await);
        again.recorded();
        assert!(turns.next("a", "2").comes().await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_went_elsewhere_holds_its_key_up_for_seconds_only() {
        let turns = KeyTurns::default();
        drop(turns.next("a", "1"));
        assert!(!turns.next("a", "2").comes().await);
        tokio::time::advance(FETCHED_BEFORE * 2).await;
        assert!(turns.next("a", "2").comes().await);
    }
}
