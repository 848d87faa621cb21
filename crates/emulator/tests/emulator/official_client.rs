//! What the worker relies on, through the client that it uses.

use google_cloud_gax::error::rpc::Code;
use google_cloud_gax::options::RequestOptionsBuilder;
use google_cloud_gax::paginator::ItemPaginator;
use google_cloud_gax::retry_policy::NeverRetry;
use google_cloud_pubsub::model::{DeadLetterPolicy, Message, Subscription};

use super::{Running, SUBSCRIPTION, TOPIC, in_time, next, publish};

#[tokio::test]
async fn a_message_is_delivered_acknowledged_and_not_redelivered() {
    let running = Running::prepared(Subscription::new()).await;
    let publisher = running.publisher().await;
    let message = Message::new()
        .set_data("hello")
        .set_attributes([("kind", "greeting")]);
    let id = publish(&publisher, message).await;
    assert!(id.bytes().all(|byte| byte.is_ascii_digit()), "{id}");

    let mut stream = running.stream(10).await;
    let (message, handler) = next(&mut stream).await;
    assert_eq!(message.message_id, id);
    assert_eq!(&message.data[..], b"hello");
    assert_eq!(message.attributes["kind"], "greeting");
    assert!(message.publish_time.is_some());
    assert_eq!(handler.delivery_attempt(), None);
    handler.ack();
    running.backlog_of(0).await;

    // The next that comes is the next published.
    let last = publish(&publisher, Message::new().set_data("last")).await;
    assert_eq!(next(&mut stream).await.0.message_id, last);
    running.stop().await;
}

#[tokio::test]
async fn a_nacked_message_comes_again_with_its_attempt_under_a_dead_letter_policy() {
    let policy = DeadLetterPolicy::new().set_dead_letter_topic(TOPIC);
    let subscription = Subscription::new().set_dead_letter_policy(policy);
    let running = Running::prepared(subscription).await;
    let publisher = running.publisher().await;
    let id = publish(&publisher, Message::new().set_data("again")).await;
    let mut stream = running.stream(10).await;
    for attempt in 1..=3 {
        let (message, handler) = next(&mut stream).await;
        assert_eq!(message.message_id, id);
        assert_eq!(handler.delivery_attempt(), Some(attempt));
        handler.nack();
    }
    running.stop().await;
}

#[tokio::test]
async fn a_duplicate_reaches_the_client_under_the_same_id() {
    let running = Running::prepared(Subscription::new()).await;
    let publisher = running.publisher().await;
    let id = publish(&publisher, Message::new().set_data("twice")).await;
    let mut stream = running.stream(10).await;
    let (first, handler) = next(&mut stream).await;
    handler.ack();
    running.backlog_of(0).await;
    running.broker.duplicate(TOPIC, &id).unwrap();
    let (second, _) = next(&mut stream).await;
    assert_eq!(second.message_id, first.message_id);
    assert_eq!(second.publish_time, first.publish_time);
    running.stop().await;
}

#[tokio::test]
async fn a_stream_with_room_for_one_gets_the_second_after_the_ack_of_the_first() {
    let running = Running::prepared(Subscription::new()).await;
    let publisher = running.publisher().await;
    let first_id = publish(&publisher, Message::new().set_data("1")).await;
    let mut full = running.stream(1).await;
    let (first, handler) = next(&mut full).await;
    assert_eq!(first.message_id, first_id);

    // The second goes to the other stream, and the third to neither.
    let mut other = running.stream(1).await;
    let second_id = publish(&publisher, Message::new().set_data("2")).await;
    let (second, held) = tokio::select! {
        _ = full.next() => panic!("the full stream got a message"),
        delivery = next(&mut other) => delivery,
    };
    assert_eq!(second.message_id, second_id);
    let third_id = publish(&publisher, Message::new().set_data("3")).await;
    handler.ack();
    let (third, _) = tokio::select! {
        delivery = next(&mut full) => delivery,
        _ = other.next() => panic!("the other stream got a message"),
    };
    assert_eq!(third.message_id, third_id);
    drop(held);
    running.stop().await;
}

#[tokio::test]
async fn messages_of_a_key_come_in_order_and_one_at_a_time() {
    let running = Running::prepared(Subscription::new().set_enable_message_ordering(true)).await;
    let publisher = running.publisher().await;
    for number in 0..5 {
        let message = Message::new().set_data(number.to_string());
        publish(&publisher, message.set_ordering_key("k")).await;
    }
    let mut stream = running.stream(100).await;
    let (_, handler) = next(&mut stream).await;
    handler.nack();
    for number in 0..5 {
        let (message, handler) = next(&mut stream).await;
        assert_eq!(message.data, number.to_string());
        assert_eq!(message.ordering_key, "k");
        handler.ack();
    }
    running.backlog_of(0).await;
    running.stop().await;
}

#[tokio::test]
async fn a_message_of_almost_ten_megabytes_gets_through() {
    let running = Running::prepared(Subscription::new()).await;
    let publisher = running.publisher().await;
    let data = vec![42_u8; 9_900_000];
    publish(&publisher, Message::new().set_data(data.clone())).await;
    let mut stream = running.stream(10).await;
    let (message, handler) = next(&mut stream).await;
    assert!(message.data == data, "the data differs");
    handler.ack();
    running.backlog_of(0).await;
    running.stop().await;
}

#[tokio::test]
async fn a_message_above_ten_megabytes_is_an_invalid_argument() {
    let running = Running::prepared(Subscription::new()).await;
    let publisher = running.publisher().await;
    let data = vec![42_u8; 10_000_001];
    let refused = in_time(publisher.publish(Message::new().set_data(data))).await;
    let refused = format!("{:?}", refused.unwrap_err());
    assert!(refused.contains("InvalidArgument"), "{refused}");
    running.stop().await;
}

#[tokio::test]
async fn topics_and_subscriptions_are_created_listed_and_deleted() {
    let running = Running::prepared(Subscription::new().set_labels([("team", "ml")])).await;
    let topics = running.topic_admin().await;
    let subscriptions = running.subscription_admin().await;

    let twice = topics.create_topic().set_name(TOPIC).send().await;
    assert_eq!(code(twice.unwrap_err()), Code::AlreadyExists);
    let bad = topics.create_topic().set_name("projects/test/topics/1");
    assert_eq!(code(bad.send().await.unwrap_err()), Code::InvalidArgument);

    for number in 0..4 {
        let name = format!("projects/test/topics/extra-{number}");
        topics.create_topic().set_name(name).send().await.unwrap();
    }
    let list = topics.list_topics().set_project("projects/test");
    let mut items = list.set_page_size(2).by_item();
    let mut names = Vec::new();
    while let Some(topic) = items.next().await {
        names.push(topic.unwrap().name);
    }
    assert_eq!(names.len(), 5);
    assert_eq!(names.last().unwrap(), TOPIC);

    let of_topic = topics.list_topic_subscriptions().set_topic(TOPIC);
    assert_eq!(of_topic.send().await.unwrap().subscriptions, [SUBSCRIPTION]);

    topics.delete_topic().set_topic(TOPIC).send().await.unwrap();
    let gone = topics.get_topic().set_topic(TOPIC).send().await;
    assert_eq!(code(gone.unwrap_err()), Code::NotFound);
    let get = || {
        subscriptions
            .get_subscription()
            .set_subscription(SUBSCRIPTION)
    };
    let orphan = get().send().await.unwrap();
    assert_eq!(orphan.topic, "_deleted-topic_");
    assert_eq!(orphan.ack_deadline_seconds, 10);
    assert_eq!(orphan.labels["team"], "ml");

    let delete = subscriptions.delete_subscription();
    let delete = delete.set_subscription(SUBSCRIPTION);
    delete.send().await.unwrap();
    assert_eq!(code(get().send().await.unwrap_err()), Code::NotFound);
    running.stop().await;
}

#[tokio::test]
async fn what_the_emulator_lacks_is_refused_as_unimplemented() {
    let running = Running::prepared(Subscription::new()).await;
    let subscriptions = running.subscription_admin().await;
    let seek = subscriptions.seek().set_subscription(SUBSCRIPTION);
    let refused = seek.with_retry_policy(NeverRetry).send().await;
    assert_eq!(code(refused.unwrap_err()), Code::Unimplemented);
    let filtered = subscriptions
        .create_subscription()
        .set_name("projects/test/subscriptions/filtered")
        .set_topic(TOPIC)
        .set_filter("attributes.kind = \"x\"");
    let refused = filtered.with_retry_policy(NeverRetry).send().await;
    assert_eq!(code(refused.unwrap_err()), Code::Unimplemented);
    running.stop().await;
}

#[tokio::test]
async fn a_stream_of_an_unknown_subscription_fails_with_not_found() {
    let running = Running::start().await;
    let mut stream = running.stream(10).await;
    let failed = in_time(stream.next()).await.unwrap().unwrap_err();
    assert_eq!(code(failed), Code::NotFound);
    running.stop().await;
}

#[tokio::test]
async fn shutdown_ends_open_streams_and_serving() {
    let running = Running::prepared(Subscription::new()).await;
    let publisher = running.publisher().await;
    publish(&publisher, Message::new().set_data("open it")).await;
    let mut stream = running.stream(1).await;
    let (_, _handler) = next(&mut stream).await;
    running.stop().await;
}

fn code(error: google_cloud_pubsub::Error) -> Code {
    error.status().expect("a status").code
}
