//! Messages of one ordering key are put on record in the order in which they
//! arrived; from there on the table keeps it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

/// Who comes after whom, per ordering key of one subscription.
#[derive(Debug, Clone, Default)]
pub(super) struct KeyTurns {
    last: Arc<Mutex<HashMap<String, Last>>>,
}

/// The last message of a key that has not been put on record yet.
#[derive(Debug)]
struct Last {
    number: u64,
    recorded: oneshot::Receiver<()>,
}

/// One message's place behind the earlier ones of its key. Dropped without
/// [`Turn::recorded`], those behind it are told that the order is broken.
#[derive(Debug)]
pub(super) struct Turn {
    turns: KeyTurns,
    ordering_key: String,
    number: u64,
    before: Option<oneshot::Receiver<()>>,
    recorded: Option<oneshot::Sender<()>>,
}

impl KeyTurns {
    /// The next place of the key; to be called in the order of arrival.
    pub(super) fn next(&self, ordering_key: &str) -> Turn {
        let (sender, recorded) = oneshot::channel();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let before = last.remove(ordering_key);
        let number = before.as_ref().map_or(0, |before| before.number + 1);
        last.insert(ordering_key.to_owned(), Last { number, recorded });
        Turn {
            turns: self.clone(),
            ordering_key: ordering_key.to_owned(),
            number,
            before: before.map(|before| before.recorded),
            recorded: Some(sender),
        }
    }
}

impl Turn {
    /// Waits for the message before. False: it is not on record, so this one
    /// must not be either; the broker sends both again, in order.
    pub(super) async fn comes(&mut self) -> bool {
        match self.before.take() {
            None => true,
            Some(before) => before.await.is_ok(),
        }
    }

    /// The message is on record, or has no place in the order.
    pub(super) fn recorded(mut self) {
        if let Some(sender) = self.recorded.take() {
            // An error says that nobody is behind.
            let _ = sender.send(());
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut last = self
            .turns
            .last
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_last = last
            .get(&self.ordering_key)
            .is_some_and(|last| last.number == self.number);
        if is_last {
            last.remove(&self.ordering_key);
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
        let mut first = turns.next("a");
        let mut second = turns.next("a");
        let mut other = turns.next("b");
        assert!(first.comes().await && other.comes().await);
        assert!(second.comes().now_or_never().is_none());
        let mut second = turns.next("c");
        assert!(second.comes().await);
    }

    #[tokio::test]
    async fn a_message_comes_when_the_one_before_it_is_on_record() {
        let turns = KeyTurns::default();
        let first = turns.next("a");
        let mut second = turns.next("a");
        first.recorded();
        assert!(second.comes().await);
    }

    #[tokio::test]
    async fn a_message_that_is_not_put_on_record_takes_those_behind_it_along() {
        let turns = KeyTurns::default();
        let first = turns.next("a");
        let mut second = turns.next("a");
        let mut third = turns.next("a");
        drop(first);
        assert!(!second.comes().await);
        drop(second);
        assert!(!third.comes().await);
        drop(third);
        assert!(turns.next("a").comes().await);
        assert!(turns.last.lock().unwrap().is_empty());
    }
}
