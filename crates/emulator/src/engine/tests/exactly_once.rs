//! Exactly-once delivery.

use super::*;

fn exactly_once() -> Fixture {
    Fixture::with(resource::Subscription {
        exactly_once: true,
        ..resource::Subscription::default()
    })
}

impl Fixture {
    fn try_acknowledge(&mut self, ids: &[String]) -> Confirmation {
        let acked = self.engine.acknowledge(SUBSCRIPTION, ids, self.now);
        acked.unwrap()
    }

    fn try_modify(&mut self, ids: &[String], seconds: i32) -> Confirmation {
        let engine = &mut self.engine;
        let modified = engine.modify_ack_deadline(SUBSCRIPTION, ids, seconds, self.now);
        modified.unwrap()
    }
}

fn done(ids: &[String]) -> Confirmation {
    Confirmation {
        done: ids.to_vec(),
        ..Confirmation::default()
    }
}

fn invalid(ids: &[String]) -> Confirmation {
    Confirmation {
        invalid: ids.to_vec(),
        ..Confirmation::default()
    }
}

#[test]
fn an_ack_and_a_nack_in_time_are_confirmed() {
    let mut fixture = exactly_once();
    fixture.publish("a");
    let first = [fixture.pull().remove(0).ack_id.to_string()];
    assert_eq!(fixture.try_modify(&first, 30), done(&first));
    assert_eq!(fixture.try_modify(&first, 0), done(&first));
    let second = [fixture.pull().remove(0).ack_id.to_string()];
    assert_eq!(fixture.try_acknowledge(&second), done(&second));
    assert_eq!(fixture.backlog(), 0);
    assert_eq!(fixture.try_acknowledge(&second), invalid(&second));
}

#[test]
fn a_late_ack_is_invalid_and_the_message_comes_again() {
    let mut fixture = exactly_once();
    fixture.publish("a");
    let late = [fixture.pull().remove(0).ack_id.to_string()];
    fixture.pass(9);
    assert!(fixture.pull().is_empty(), "its ack deadline is running");
    // The deadline has passed, though no timer has fired since.
    fixture.now += Duration::from_secs(1);
    assert_eq!(fixture.try_acknowledge(&late), invalid(&late));
    assert_eq!(fixture.try_modify(&late, 0), invalid(&late));
    assert_eq!(fixture.try_modify(&late, 10), invalid(&late));
    assert_eq!(fixture.pull_texts(), ["a"]);
}

#[test]
fn text_that_is_no_ack_id_is_invalid_beside_one_that_is_good() {
    let mut fixture = exactly_once();
    fixture.publish("a");
    let good = fixture.pull().remove(0).ack_id.to_string();
    let both = ["nonsense".to_owned(), good];
    let confirmation = fixture.try_acknowledge(&both);
    assert_eq!(confirmation.invalid, both[..1]);
    assert_eq!(confirmation.done, both[1..]);
    let answer = confirmation.into_answer();
    let Err(BrokerError::AckIds(failed)) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(failed["nonsense"], "PERMANENT_FAILURE_INVALID_ACK_ID");
    assert_eq!(failed.len(), 1);
}

#[test]
fn there_are_no_duplicates() {
    let mut fixture = exactly_once();
    let id = fixture.publish("a");
    let now = fixture.now;
    fixture.engine.duplicate(TOPIC, &id, now).unwrap();
    assert_eq!(fixture.pull_texts(), ["a"]);
}

#[test]
fn without_it_a_late_ack_counts_as_done() {
    let mut fixture = Fixture::new();
    fixture.publish("a");
    let late = [fixture.pull().remove(0).ack_id.to_string()];
    fixture.pass(10);
    assert_eq!(fixture.try_acknowledge(&late), done(&late));
    assert_eq!(fixture.pull_texts(), ["a"]);
}
