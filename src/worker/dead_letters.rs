//! Publishes the messages of dead jobs to their subscription's topic.
//!
//! One commit records a job's death and that its message must be published, and only then
//! is the message acked; so no crash loses it. A dead letter is published at least once.
//!
//! The worker that ended the job publishes at once. Every worker also publishes dead
//! letters that have waited for longer. A message that Pub/Sub will never take stays in
//! the table only, and the ledger says so.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::job::DeadLetter;
use crate::message::Message;
use crate::pubsub::{Outgoing, Publishers, PubsubError};
use crate::retry::{Backoff, jittered};
use crate::store::{DeadLetterBox, DeadLettersDue, StoreError, in_time};

/// How often to look for dead letters that other workers should have published long ago.
const PAUSE: Duration = Duration::from_secs(5);
const LONG_AGO: Duration = Duration::from_secs(10);
/// Pauses after a failure.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Shorter than the time after which other workers try.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(20);
/// After this long another worker tries to publish a dead letter.
const TIME_TO_PUBLISH: Duration = Duration::from_secs(60);
/// Small, since their data is in memory.
const BATCH: u32 = 10;

const MAX_FAILED_BEFORE: usize = 10_000;

/// Pub/Sub's limits.
/// <https://cloud.google.com/pubsub/quotas#resource_limits>
const MAX_ATTRIBUTES: usize = 100;
const MAX_ATTRIBUTE_BYTES: usize = 1024;

pub(super) struct DeadLetters {
    pub(super) letters: Arc<dyn DeadLetterBox>,
    pub(super) worker: Arc<str>,
    pub(super) publishers: Publishers,
    pub(super) wake: Arc<Notify>,
    pub(super) draining: CancellationToken,
}

/// Which dead letters to look for.
#[derive(Debug, Clone, Copy)]
enum Whose {
    Mine,
    /// Those whose own worker has had its time.
    Anybodys {
        at_least: Duration,
    },
}

impl DeadLetters {
    /// Publishes until the worker drains, then the rest of its own once more.
    pub(super) async fn run(&self) {
        let mut backoff = Backoff::new(TRY_AGAIN.0, TRY_AGAIN.1);
        let mut failed = false;
        let mut failed_before = HashSet::new();
        loop {
            let pause = match failed {
                true => backoff.next_ceiling(),
                false => PAUSE,
            };
            let whose = tokio::select! {
                () = self.draining.cancelled() => break,
                () = sleep(jittered(pause)) => Whose::Anybodys { at_least: LONG_AGO },
                () = self.wake.notified(), if !failed => Whose::Mine,
            };
            failed = !self.publish_all(whose, &mut failed_before).await;
            if !failed {
                backoff.reset();
            }
        }
    }

    /// Publishes the dead letters that a stopping worker's last jobs have left.
    pub(super) async fn publish_mine(&self) {
        self.publish_all(Whose::Mine, &mut HashSet::new()).await;
    }

    /// False if something could not be published. A failing topic does not delay the
    /// others; a letter that failed before does not delay its topic's others.
    async fn publish_all(&self, whose: Whose, failed_before: &mut HashSet<Uuid>) -> bool {
        let mut failing: Vec<String> = Vec::new();
        loop {
            let mut letters = match self.due(whose, &failing).await {
                Ok(letters) => letters,
                Err(error) => {
                    warn!(%error, "no look for dead letters");
                    return false;
                }
            };
            if letters.is_empty() {
                return failing.is_empty();
            }
            letters.sort_by_key(|letter| failed_before.contains(&letter.job_id));
            for letter in letters {
                if failing.contains(&letter.topic) {
                    continue;
                }
                if self.publish(&letter).await {
                    failed_before.remove(&letter.job_id);
                } else {
                    if failed_before.len() == MAX_FAILED_BEFORE {
                        failed_before.clear();
                    }
                    failed_before.insert(letter.job_id);
                    failing.push(letter.topic);
                }
            }
        }
    }

    async fn due(&self, whose: Whose, not_to: &[String]) -> Result<Vec<DeadLetter>, StoreError> {
        let (worker, at_least) = match whose {
            Whose::Mine => (Some(Arc::clone(&self.worker)), Duration::ZERO),
            Whose::Anybodys { at_least } => (None, at_least),
        };
        let due = DeadLettersDue {
            worker,
            at_least,
            not_to: not_to.to_vec(),
            time_to_publish: TIME_TO_PUBLISH,
            limit: BATCH,
        };
        in_time(self.letters.dead_letters(&due)).await
    }

    /// False if it is still to be published.
    async fn publish(&self, letter: &DeadLetter) -> bool {
        let (job, topic) = (&letter.key, &letter.topic);
        let subscription = self.publishers.subscription_path(&job.subscription);
        if path_of(&letter.message).any(|before| before == subscription) {
            warn!(%job, topic, "it was a dead letter of this subscription before, so it is not published; its job keeps the message");
            return self.settle(letter, BEFORE).await;
        }
        let publishing = self
            .publishers
            .publish(topic, outgoing(letter, &subscription));
        let Ok(published) = timeout(PUBLISH_TIMEOUT, publishing).await else {
            error!(%job, topic, "a dead letter is not published yet: no answer");
            return false;
        };
        let detail = match published {
            Ok(id) => {
                info!(%job, topic, id, "dead-lettered");
                format!("published to {topic} as message {id}")
            }
            Err(error @ PubsubError::Refused { .. }) => {
                error!(%job, topic, %error, "Pub/Sub does not take the dead letter; its job keeps the message");
                format!("{error}; the message stays in the table only")
            }
            Err(error) => {
                error!(%job, topic, %error, "a dead letter is not published yet");
                return false;
            }
        };
        self.settle(letter, &detail).await
    }

    async fn settle(&self, letter: &DeadLetter, detail: &str) -> bool {
        let settling = self
            .letters
            .dead_letter_settled(letter, &self.worker, detail);
        match in_time(settling).await {
            Ok(()) => true,
            Err(error) => {
                warn!(job = %letter.key, %error, "a dead letter may be published twice");
                false
            }
        }
    }
}

/// Why a dead letter is not published, for the ledger.
const BEFORE: &str = "it was a dead letter of this subscription before, so its topic leads back here; the message stays in the table only";

/// The full names of the subscriptions in which the message has been dead, separated by
/// spaces. Without it, two deployments could send a message to each other for ever.
const PATH: &str = "trainyard-path";

fn path_of(message: &Message) -> impl Iterator<Item = &str> {
    let path = message.attributes.get(PATH);
    path.into_iter().flat_map(|path| path.split(' '))
}

/// The path with one more subscription; the oldest ones go if it becomes too long.
fn longer_path(message: &Message, subscription: &str) -> String {
    let mut path: Vec<&str> = path_of(message).chain([subscription]).collect();
    while path.len() > 1 && path.join(" ").len() > MAX_ATTRIBUTE_BYTES {
        path.remove(0);
    }
    path.join(" ")
}

/// The message unchanged, plus why it is dead. `subscription` is the full name of the
/// letter's own.
fn outgoing(letter: &DeadLetter, subscription: &str) -> Outgoing {
    let message = &letter.message;
    let published = message.publish_time.to_rfc3339();
    let attempts = letter.attempts.to_string();
    let path = longer_path(message, subscription);
    let ours = [
        ("reason", letter.reason.as_deref()),
        ("error", letter.error.as_deref()),
        ("task", letter.task.as_deref()),
        ("attempts", Some(&*attempts)),
        ("subscription", Some(&*letter.key.subscription)),
        ("message-id", Some(&*message.id)),
        ("publish-time", Some(&*published)),
        ("path", Some(&*path)),
    ];
    let ours: Vec<(String, String)> = ours
        .into_iter()
        .filter_map(|(name, value)| {
            let value = shortened(value?, MAX_ATTRIBUTE_BYTES);
            Some((format!("trainyard-{name}"), value))
        })
        .collect();
    let original = message
        .attributes
        .iter()
        .filter(|(name, _)| !ours.iter().any(|(our_name, _)| our_name == *name))
        // The message may already have the maximum number of attributes; some must go.
        .take(MAX_ATTRIBUTES - ours.len())
        .map(|(name, value)| (name.clone(), value.clone()));
    Outgoing {
        data: message.data.to_vec(),
        attributes: original.chain(ours.iter().cloned()).collect(),
        ordering_key: message.ordering_key.clone(),
    }
}

fn shortened(text: &str, max_bytes: usize) -> String {
    const MARK: &str = "…";
    if text.len() <= max_bytes {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(max_bytes - MARK.len());
    format!("{}{MARK}", &text[..end])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::job::JobKey;
    use crate::message::Message;

    const SUBSCRIPTION: &str = "projects/p/subscriptions/s";

    fn letter(attributes: BTreeMap<String, String>, error: &str) -> DeadLetter {
        DeadLetter {
            job_id: Uuid::nil(),
            key: JobKey::new("s", "k"),
            topic: "dead".to_owned(),
            message: Message {
                id: "7".to_owned(),
                publish_time: DateTime::UNIX_EPOCH,
                data: "data".into(),
                attributes,
                ordering_key: "o".to_owned(),
            },
            reason: Some("permanent".to_owned()),
            error: Some(error.to_owned()),
            task: None,
            attempts: 2,
            died_at: DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_dead_letter_has_the_original_and_the_reason() {
        let attributes = BTreeMap::from([("tenant".to_owned(), "a".to_owned())]);
        let sent = outgoing(&letter(attributes, "no such column"), SUBSCRIPTION);
        assert_eq!(sent.data, b"data");
        assert_eq!(sent.ordering_key, "o");
        let attributes: BTreeMap<_, _> = sent.attributes.into_iter().collect();
        let expected = [
            ("tenant", "a"),
            ("trainyard-attempts", "2"),
            ("trainyard-error", "no such column"),
            ("trainyard-message-id", "7"),
            ("trainyard-path", SUBSCRIPTION),
            ("trainyard-publish-time", "1970-01-01T00:00:00+00:00"),
            ("trainyard-reason", "permanent"),
            ("trainyard-subscription", "s"),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(attributes, BTreeMap::from(expected));
    }

    #[test]
    fn a_dead_letter_keeps_to_pubsubs_limits() {
        let many = (0..100).map(|n| (format!("a{n}"), String::new()));
        let sent = outgoing(&letter(many.collect(), &"é".repeat(5000)), SUBSCRIPTION);
        assert_eq!(sent.attributes.len(), MAX_ATTRIBUTES);
        assert!(
            sent.attributes
                .iter()
                .all(|(_, value)| value.len() <= MAX_ATTRIBUTE_BYTES)
        );
    }

    #[test]
    fn a_dead_letters_path_grows_by_each_subscription() {
        let first = BTreeMap::from([(PATH.to_owned(), "a b".to_owned())]);
        let sent = outgoing(&letter(first, "new"), SUBSCRIPTION);
        let path = sent.attributes.iter().find(|(name, _)| name == PATH);
        assert_eq!(path.unwrap().1, format!("a b {SUBSCRIPTION}"));
    }

    #[test]
    fn a_path_that_is_too_long_loses_its_oldest_part() {
        let long = format!("first {}", "x".repeat(MAX_ATTRIBUTE_BYTES - 30));
        let long = BTreeMap::from([(PATH.to_owned(), long)]);
        let path = longer_path(&letter(long, "").message, SUBSCRIPTION);
        assert!(path.len() <= MAX_ATTRIBUTE_BYTES);
        assert!(
            path.starts_with('x') && path.ends_with(SUBSCRIPTION),
            "{path}"
        );
    }

    #[test]
    fn a_second_death_overwrites_the_reason_of_the_first() {
        let first = BTreeMap::from([("trainyard-error".to_owned(), "old".to_owned())]);
        let sent = outgoing(&letter(first, "new"), SUBSCRIPTION);
        let errors: Vec<_> = sent
            .attributes
            .iter()
            .filter(|(name, _)| name == "trainyard-error")
            .collect();
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0].1, "new");
    }
}
