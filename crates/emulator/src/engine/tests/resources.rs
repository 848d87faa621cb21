//! Topics, subscriptions, message ids and memory.

use super::*;

#[test]
fn a_message_published_before_the_subscription_is_not_delivered() {
    let mut fixture = Fixture::empty(1 << 30);
    fixture.publish("a");
    fixture.subscribe(SUBSCRIPTION, resource::Subscription::default());
    assert!(fixture.pull().is_empty());
}

#[test]
fn publishing_is_refused_when_the_backlog_fills_the_memory() {
    let mut fixture = Fixture::empty(10_000);
    fixture.subscribe(SUBSCRIPTION, resource::Subscription::default());
    let text = "x".repeat(4000);
    fixture.publish(&text);
    fixture.publish(&text);
    let refused = fixture.try_publish("", &text);
    assert!(matches!(refused, Err(BrokerError::ResourceExhausted(_))));
    let delivery = fixture.pull().remove(0);
    fixture.acknowledge(&delivery);
    drop(delivery);
    fixture.publish(&text);
}

#[test]
fn message_ids_grow_and_do_not_repeat_after_a_restart() {
    let number = |id: String| id.parse::<u64>().unwrap();
    let mut before = Fixture::new();
    let first = number(before.publish("a"));
    let second = number(before.publish("b"));
    assert!(second > first);
    let mut after = Fixture::new();
    after.wall = before.wall + Duration::from_secs(1);
    assert!(number(after.publish("c")) > second);
}

#[test]
fn names_are_taken_once_and_must_exist() {
    let mut fixture = Fixture::new();
    let topic = fixture.engine.topic(TOPIC).unwrap();
    let again = fixture.engine.create_topic(topic);
    assert!(matches!(again, Err(BrokerError::AlreadyExists(_))));
    let subscription = fixture.engine.subscription(SUBSCRIPTION).unwrap();
    let again = fixture.engine.create_subscription(subscription.clone());
    assert!(matches!(again, Err(BrokerError::AlreadyExists(_))));
    let orphan = resource::Subscription {
        name: "projects/p/subscriptions/orphan".to_owned(),
        topic: "projects/p/topics/none".to_owned(),
        ..subscription
    };
    let refused = fixture.engine.create_subscription(orphan);
    assert!(matches!(refused, Err(BrokerError::NotFound(_))));
}

#[test]
fn a_subscription_outlives_its_topic() {
    let mut fixture = Fixture::new();
    fixture.publish("a");
    fixture.engine.delete_topic(TOPIC).unwrap();
    let shown = fixture.engine.subscription(SUBSCRIPTION).unwrap();
    assert_eq!(shown.topic, name::DELETED_TOPIC);
    assert_eq!(fixture.pull_texts(), ["a"]);
    let topic = resource::Topic {
        name: TOPIC.to_owned(),
        ..resource::Topic::default()
    };
    fixture.engine.create_topic(topic).unwrap();
    fixture.publish("b");
    assert!(fixture.pull().is_empty(), "the new topic is another");
}

#[test]
fn a_list_comes_in_pages() {
    let mut fixture = Fixture::empty(1 << 30);
    for number in 0..5 {
        let name = format!("projects/p/subscriptions/sub{number}");
        fixture.subscribe(&name, resource::Subscription::default());
    }
    let mut request = PageRequest {
        size: 2,
        ..PageRequest::default()
    };
    let mut pages = Vec::new();
    loop {
        let page = fixture
            .engine
            .subscriptions("projects/p", &request)
            .unwrap();
        pages.push(page.items.len());
        if page.next_token.is_empty() {
            break;
        }
        request.token = page.next_token;
    }
    assert_eq!(pages, [2, 2, 1]);
    let all = PageRequest::default();
    let other = fixture.engine.subscriptions("projects/q", &all).unwrap();
    assert!(other.items.is_empty());
    let named = fixture.engine.topic_subscriptions(TOPIC, &all).unwrap();
    assert_eq!(named.items.len(), 5);
}
