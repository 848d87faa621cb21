//! Which messages are still to be published to a dead-letter topic.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use trainyard::job::{Acquired, Can, Claim, DeadLetter};
use trainyard::outcome::Ending;
use trainyard::record::Retrying;
use trainyard::store::{DeadLettersDue, Finish, Finished, GivenUp, Refusal, Store};
use uuid::Uuid;

use crate::on_every_store;
use crate::support::database::{Database, Tables};
use crate::support::jobs::{
    ENDED, LONG, acquire, acquired, assert_is_stale, assert_waits, dead, due, job_of, kinds,
    letters, pass_the_lease, patience, refusal, request, send, story_of, succeeded, terms,
    terms_of,
};

on_every_store!(
    a_dead_job_leaves_its_message_to_be_published,
    without_a_topic_nothing_is_published,
    an_ending_that_is_not_dead_leaves_no_dead_letter,
    finishing_again_leaves_one_dead_letter,
    a_stale_finish_leaves_no_dead_letter,
    a_refused_message_is_to_be_published,
    a_refused_duplicate_is_not_to_be_published,
    a_message_that_is_given_up_is_to_be_published,
    a_worker_asks_for_its_own,
    what_one_worker_publishes_no_other_is_given,
    anybodys_are_those_that_have_waited,
    dead_letters_come_earliest_first_and_no_more_than_asked_for,
    dead_letters_to_some_topics_can_be_passed_over,
    a_settled_dead_letter_is_gone_and_noted_once,
    a_dead_letter_of_another_topic_is_not_settled,
    a_retried_jobs_message_is_not_published,
    a_job_that_dies_again_leaves_another_dead_letter,
    settling_the_first_death_leaves_the_letter_of_the_second,
);

async fn end(store: &Arc<dyn Store>, run: &Acquired, ending: Ending, topic: Option<&str>) -> bool {
    let finish = Finish {
        fence: run.fence.clone(),
        ending,
        checkpoint: None,
        dead_letter_topic: topic.map(Into::into),
    };
    store.finish(&[finish]).await.unwrap()[0] == Finished::Ended
}

/// A job that has died, with a dead letter to `graves`.
async fn die(store: &Arc<dyn Store>, key: &str, worker: &str) -> Acquired {
    let run = acquired(send(store, &request(key), &terms_of(worker)).await);
    assert!(end(store, &run, dead("broken"), Some("graves")).await);
    run
}

async fn died(tables: &Tables, run: &Acquired, ago: Duration) {
    let (then, key) = (tables.ago(ago), &run.fence.key.key);
    let sql = format!("UPDATE processed_messages SET finished_at = {then} WHERE key = '{key}'");
    assert_eq!(tables.execute(sql).await, 1);
}

fn keys(letters: &[DeadLetter]) -> Vec<&str> {
    letters.iter().map(|letter| &*letter.key.key).collect()
}

async fn the_letter(store: &Arc<dyn Store>) -> DeadLetter {
    let mut letters = letters(store).await;
    assert_eq!(letters.len(), 1);
    letters.remove(0)
}

async fn a_dead_job_leaves_its_message_to_be_published(database: Database) {
    let store = database.open_migrated().await;
    let mut request = request("1");
    request.message.id = "m1".to_owned();
    request.message.ordering_key = "k".to_owned();
    request.message.data = b"\x00\xffany bytes"[..].into();
    request.message.attributes = BTreeMap::from([("nul".to_owned(), "\0".to_owned())]);
    let run = acquired(send(&store, &request, &terms(LONG)).await);
    assert_eq!(letters(&store).await.len(), 0);
    assert!(end(&store, &run, dead("broken"), Some("graves")).await);
    let letter = the_letter(&store).await;
    assert_eq!(letter.message, request.message);
    assert_eq!((&letter.job_id, &letter.key), (&run.job_id, &run.fence.key));
    assert_eq!((&*letter.topic, letter.attempts), ("graves", 1));
    assert_eq!(letter.reason.as_deref(), Some("permanent"));
    assert_eq!(letter.error.as_deref(), Some("broken"));
    assert_eq!(letter.task.as_deref(), Some("train"));
}

async fn without_a_topic_nothing_is_published(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    assert!(end(&store, &run, dead("broken"), None).await);
    store.refuse(&refusal("2")).await.unwrap();
    for _ in 0..3 {
        acquire(&store, "3", ENDED).await;
        pass_the_lease().await;
    }
    crate::support::jobs::claim(&store, "3", LONG).await;
    assert_eq!(keys(&letters(&store).await), [""; 0]);
}

async fn an_ending_that_is_not_dead_leaves_no_dead_letter(database: Database) {
    let store = database.open_migrated().await;
    for (key, ending) in [("1", succeeded()), ("2", Ending::cancelled())] {
        let run = acquire(&store, key, LONG).await;
        assert!(end(&store, &run, ending, Some("graves")).await);
    }
    assert_eq!(keys(&letters(&store).await), [""; 0]);
}

/// This also holds once the dead letter is settled.
async fn finishing_again_leaves_one_dead_letter(database: Database) {
    let store = database.open_migrated().await;
    let run = die(&store, "1", "w1").await;
    assert!(end(&store, &run, dead("broken"), Some("elsewhere")).await);
    let letter = the_letter(&store).await;
    assert_eq!(letter.topic, "graves");
    let settled = store.dead_letter_settled(&letter, "w1", "published").await;
    settled.unwrap();
    assert!(end(&store, &run, dead("broken"), Some("graves")).await);
    assert_eq!(keys(&letters(&store).await), [""; 0]);
}

async fn a_stale_finish_leaves_no_dead_letter(database: Database) {
    let store = database.open_migrated().await;
    let stale = acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    let holder = acquire(&store, "1", LONG).await;
    assert!(!end(&store, &stale, dead("broken"), Some("graves")).await);
    assert!(end(&store, &holder, succeeded(), Some("graves")).await);
    assert!(!end(&store, &stale, dead("broken"), Some("graves")).await);
    assert_eq!(keys(&letters(&store).await), [""; 0]);
}

fn refused(key: &str) -> Refusal {
    Refusal {
        dead_letter_topic: Some("graves".into()),
        ..refusal(key)
    }
}

async fn a_refused_message_is_to_be_published(database: Database) {
    let store = database.open_migrated().await;
    let refused = refused("1");
    store.refuse(&refused).await.unwrap();
    let letter = the_letter(&store).await;
    assert_eq!(letter.message, refused.message);
    assert_eq!((&*letter.topic, letter.attempts), ("graves", 0));
    assert_eq!(letter.reason.as_deref(), Some("malformed"));
    assert_eq!(letter.error, Some(refused.error));
    assert_eq!(letter.task, None);
}

async fn a_refused_duplicate_is_not_to_be_published(database: Database) {
    let store = database.open_migrated().await;
    let again = |key: &str| Refusal {
        job_id: Uuid::now_v7(),
        ..refused(key)
    };
    store.refuse(&refused("1")).await.unwrap();
    let letter = the_letter(&store).await;
    store.refuse(&again("1")).await.unwrap();
    assert_eq!(keys(&letters(&store).await), ["1"]);
    let settled = store.dead_letter_settled(&letter, "w1", "published").await;
    settled.unwrap();
    let run = acquire(&store, "2", LONG).await;
    assert!(end(&store, &run, succeeded(), None).await);
    for key in ["1", "2"] {
        store.refuse(&again(key)).await.unwrap();
    }
    assert_eq!(keys(&letters(&store).await), [""; 0]);
}

async fn a_message_that_is_given_up_is_to_be_published(database: Database) {
    let store = database.open_migrated().await;
    let mut unknown = request("1");
    unknown.can = Can::RecordUnknown;
    assert_waits(&send(&store, &unknown, &terms(LONG)).await);
    let given_up = GivenUp {
        key: unknown.key.clone(),
        error: "no task `train` is known here".to_owned(),
        worker: "w2".into(),
        dead_letter_topic: Some("graves".into()),
    };
    let given_up = store.give_up_unknown(&[given_up], patience(ENDED)).await;
    assert_eq!(given_up.unwrap(), [unknown.key]);
    let letter = the_letter(&store).await;
    assert_eq!(letter.message, unknown.message);
    assert_eq!((&*letter.topic, letter.attempts), ("graves", 0));
    assert_eq!(letter.reason.as_deref(), Some("unknown_task"));
    assert_eq!(letter.task.as_deref(), Some("train"));
}

async fn a_worker_asks_for_its_own(database: Database) {
    let store = database.open_migrated().await;
    die(&store, "1", "w1").await;
    die(&store, "2", "w2").await;
    for (worker, expected) in [("w1", vec!["1"]), ("w2", vec!["2"]), ("w3", vec![])] {
        let own = DeadLettersDue {
            worker: Some(worker.into()),
            ..due()
        };
        let own = store.dead_letters(&own).await.unwrap();
        assert_eq!(keys(&own), expected);
    }
    let mut all = letters(&store).await;
    all.sort_by(|a, b| a.key.cmp(&b.key));
    assert_eq!(keys(&all), ["1", "2"]);
}

async fn anybodys_are_those_that_have_waited(database: Database) {
    const MINUTE: Duration = Duration::from_secs(60);
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    let old = die(&store, "old", "w1").await;
    die(&store, "new", "w2").await;
    died(&tables, &old, MINUTE * 2).await;
    let waited = async |at_least, worker: Option<&str>| {
        let due = DeadLettersDue {
            worker: worker.map(Into::into),
            at_least,
            ..due()
        };
        store.dead_letters(&due).await.unwrap()
    };
    assert_eq!(keys(&waited(MINUTE, None).await), ["old"]);
    assert_eq!(keys(&waited(MINUTE, Some("w1")).await), ["old"]);
    assert_eq!(keys(&waited(MINUTE, Some("w2")).await), [""; 0]);
    assert_eq!(keys(&waited(MINUTE * 3, None).await), [""; 0]);
}

async fn dead_letters_come_earliest_first_and_no_more_than_asked_for(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    for (key, ago) in [("a", 20), ("b", 50), ("c", 10), ("d", 40)] {
        let run = die(&store, key, "w1").await;
        died(&tables, &run, Duration::from_secs(ago)).await;
    }
    for worker in [None, Some("w1")] {
        let some = DeadLettersDue {
            worker: worker.map(Into::into),
            limit: 3,
            ..due()
        };
        let some = store.dead_letters(&some).await.unwrap();
        assert_eq!(keys(&some), ["b", "d", "a"]);
    }
}

/// Their topic may be missing now, which must not delay the others.
async fn dead_letters_to_some_topics_can_be_passed_over(database: Database) {
    let store = database.open_migrated().await;
    for (key, topic) in [("1", "gone"), ("2", "graves"), ("3", "gone too")] {
        let run = acquire(&store, key, LONG).await;
        assert!(end(&store, &run, dead("broken"), Some(topic)).await);
    }
    let others = DeadLettersDue {
        not_to: vec!["gone".to_owned(), "gone too".to_owned()],
        limit: 1,
        ..due()
    };
    let others = store.dead_letters(&others).await.unwrap();
    assert_eq!(keys(&others), ["2"]);
    assert_eq!(letters(&store).await.len(), 3);
}

async fn a_settled_dead_letter_is_gone_and_noted_once(database: Database) {
    let store = database.open_migrated().await;
    let first = die(&store, "1", "w1").await;
    die(&store, "2", "w1").await;
    let before = job_of(&store, &first).await;
    let both = letters(&store).await;
    let letter = both.iter().find(|letter| *letter.key.key == *"1").unwrap();
    for _ in 0..2 {
        let settled = store.dead_letter_settled(letter, "w2", "published").await;
        settled.unwrap();
        assert_eq!(keys(&letters(&store).await), ["2"]);
    }
    assert_eq!(job_of(&store, &first).await, before);
    let story = story_of(&store, "1").await;
    assert_eq!(kinds(&story)[2..], [("dead_lettered", None)]);
    assert_eq!(story.ledger[2].worker, "w2");
    assert_eq!(story.ledger[2].detail.as_deref(), Some("published"));
}

async fn a_dead_letter_of_another_topic_is_not_settled(database: Database) {
    let store = database.open_migrated().await;
    die(&store, "1", "w1").await;
    let another = DeadLetter {
        topic: "elsewhere".to_owned(),
        ..the_letter(&store).await
    };
    let settled = store.dead_letter_settled(&another, "w1", "published").await;
    settled.unwrap();
    assert_eq!(keys(&letters(&store).await), ["1"]);
    assert_eq!(kinds(&story_of(&store, "1").await).len(), 2);
}

/// Its message is not published while the job waits or runs, nor once it has succeeded. A
/// worker that read the dead letter before settles nothing.
async fn a_retried_jobs_message_is_not_published(database: Database) {
    let store = database.open_migrated().await;
    let first = die(&store, "1", "w1").await;
    let letter = the_letter(&store).await;
    let retrying = store.retry(first.job_id, "anna").await.unwrap();
    assert_eq!(retrying, Some(Retrying::Queued));
    assert_eq!(keys(&letters(&store).await), [""; 0]);
    let settled = store.dead_letter_settled(&letter, "w1", "published").await;
    settled.unwrap();
    let second = acquire(&store, "1", LONG).await;
    assert_is_stale(&store, &first.fence).await;
    assert_eq!(keys(&letters(&store).await), [""; 0]);
    assert!(end(&store, &second, succeeded(), Some("graves")).await);
    assert_eq!(keys(&letters(&store).await), [""; 0]);
    let story = story_of(&store, "1").await;
    let told: Vec<_> = kinds(&story).into_iter().map(|(kind, _)| kind).collect();
    let expected = ["claimed", "finished", "retried", "claimed", "finished"];
    assert_eq!(told, expected);
}

async fn a_job_that_dies_again_leaves_another_dead_letter(database: Database) {
    let store = database.open_migrated().await;
    let first = die(&store, "1", "w1").await;
    let letter = the_letter(&store).await;
    let settled = store.dead_letter_settled(&letter, "w1", "published").await;
    settled.unwrap();
    store.retry(first.job_id, "anna").await.unwrap();
    let Claim::Acquired(second) = send(&store, &request("1"), &terms(LONG)).await else {
        panic!("not acquired");
    };
    assert!(end(&store, &second, dead("still broken"), Some("graves")).await);
    let letter = the_letter(&store).await;
    assert_eq!(letter.error.as_deref(), Some("still broken"));
    assert_eq!(letter.attempts, 1);
}

async fn what_one_worker_publishes_no_other_is_given(database: Database) {
    let store = database.open_migrated().await;
    for key in ["1", "2", "3"] {
        let dead = refused(key);
        store.refuse(&dead).await.unwrap();
    }
    let for_a_minute = DeadLettersDue {
        time_to_publish: LONG,
        limit: 2,
        ..due()
    };
    assert_eq!(store.dead_letters(&for_a_minute).await.unwrap().len(), 2);
    assert_eq!(store.dead_letters(&for_a_minute).await.unwrap().len(), 1);
    assert_eq!(store.dead_letters(&for_a_minute).await.unwrap().len(), 0);
}

async fn settling_the_first_death_leaves_the_letter_of_the_second(database: Database) {
    let store = database.open_migrated().await;
    let run = die(&store, "1", "w1").await;
    let first = the_letter(&store).await;
    store.retry(run.job_id, "anna").await.unwrap();
    pass_the_lease().await;
    die(&store, "1", "w1").await;
    let settled = store.dead_letter_settled(&first, "w1", "published").await;
    settled.unwrap();
    let second = the_letter(&store).await;
    assert!(second.died_at > first.died_at);
    let settled = store.dead_letter_settled(&second, "w1", "published").await;
    settled.unwrap();
    assert_eq!(keys(&letters(&store).await), [""; 0]);
}
