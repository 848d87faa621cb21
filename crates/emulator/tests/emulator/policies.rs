//! Retry policies and dead-letter policies, through the official client.

use std::time::{Duration, Instant};

use google_cloud_pubsub::model::{DeadLetterPolicy, Message, RetryPolicy, Subscription};
use google_cloud_wkt::Duration as Seconds;

use super::{Running, SUBSCRIPTION, TOPIC, in_time, next, publish};

const DEAD: &str = "projects/test/topics/dead";
const MORGUE: &str = "projects/test/subscriptions/morgue";

#[tokio::test]
async fn a_nacked_message_comes_again_after_the_backoff_of_its_retry_policy() {
    let policy = RetryPolicy::new()
        .set_minimum_backoff(Seconds::clamp(0, 200_000_000))
        .set_maximum_backoff(Seconds::clamp(1, 0));
    let running = Running::prepared(Subscription::new().set_retry_policy(policy)).await;
    let publisher = running.publisher().await;
    publish(&publisher, Message::new().set_data("again")).await;
    let mut stream = running.stream(10).await;
    let (_, handler) = next(&mut stream).await;
    let mut failed = Instant::now();
    handler.nack();
    for backoff in [200, 400] {
        let (_, handler) = next(&mut stream).await;
        assert!(failed.elapsed() >= Duration::from_millis(backoff));
        failed = Instant::now();
        handler.nack();
    }
    running.stop().await;
}

#[tokio::test]
async fn a_message_nacked_too_often_arrives_on_the_dead_letter_topic() {
    let policy = DeadLetterPolicy::new()
        .set_dead_letter_topic(DEAD)
        .set_max_delivery_attempts(5);
    let running = Running::prepared(Subscription::new().set_dead_letter_policy(policy)).await;
    let morgue = running.subscription_admin().await.create_subscription();
    let morgue = morgue.set_name(MORGUE).set_topic(DEAD);
    morgue.send().await.unwrap();
    let publisher = running.publisher().await;
    let message = Message::new()
        .set_data("hopeless")
        .set_attributes([("kind", "x")]);
    publish(&publisher, message).await;
    let mut stream = running.stream(10).await;
    for attempt in 1..=5 {
        let (_, handler) = next(&mut stream).await;
        assert_eq!(handler.delivery_attempt(), Some(attempt));
        handler.nack();
    }
    let subscriber = running.subscriber().await;
    let mut dead = subscriber.subscribe(MORGUE).build();
    let (message, handler) = next(&mut dead).await;
    assert_eq!(message.data, "hopeless");
    assert_eq!(message.attributes["kind"], "x");
    let attribute = |name: &str| &message.attributes[&format!("CloudPubSubDeadLetterSource{name}")];
    assert_eq!(attribute("DeliveryCount"), "5");
    assert_eq!(attribute("Subscription"), "worker");
    assert_eq!(attribute("SubscriptionProject"), "test");
    assert!(attribute("TopicPublishTime").ends_with("+00:00"));
    assert_eq!(handler.delivery_attempt(), None);
    assert_eq!(running.broker.backlog_len(SUBSCRIPTION), Ok(0));
    running.stop().await;
}

#[tokio::test]
async fn an_impossible_retry_policy_is_an_invalid_argument() {
    let running = Running::prepared(Subscription::new()).await;
    let policy = RetryPolicy::new().set_minimum_backoff(Seconds::clamp(601, 0));
    let subscriptions = running.subscription_admin().await;
    let request = subscriptions
        .create_subscription()
        .set_name(MORGUE)
        .set_topic(TOPIC)
        .set_retry_policy(policy);
    let refused = in_time(request.send()).await.unwrap_err();
    let refused = format!("{refused:?}");
    assert!(refused.contains("InvalidArgument"), "{refused}");
    running.stop().await;
}
