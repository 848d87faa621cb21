//! Exactly-once delivery: what the client is told of its acks.

use std::slice;

use google_cloud_pubsub::model::{Message, Subscription};
use google_cloud_pubsub::subscriber::handler::{ExactlyOnce, Handler};
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::StreamingPullRequest;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::subscriber_client::SubscriberClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{
    AcknowledgeRequest, ModifyAckDeadlineRequest,
};
use serde_json::json;
use tonic::Code;

use super::grpc::{self, Stream, channel, first};
use super::{Running, SUBSCRIPTION, in_time, next, publish, rest};

const INVALID: &str = "PERMANENT_FAILURE_INVALID_ACK_ID";

pub async fn prepared() -> Running {
    Running::prepared(Subscription::new().set_enable_exactly_once_delivery(true)).await
}

pub fn exactly_once(handler: Handler) -> ExactlyOnce {
    match handler {
        Handler::ExactlyOnce(handler) => handler,
        other => panic!("not with exactly-once delivery: {other:?}"),
    }
}

#[tokio::test]
async fn the_official_client_gets_its_acks_and_nacks_confirmed() {
    let running = prepared().await;
    let publisher = running.publisher().await;
    let id = publish(&publisher, Message::new().set_data("once")).await;
    let mut stream = running.stream(10).await;
    let (_, handler) = next(&mut stream).await;
    let nacked = in_time(exactly_once(handler).confirmed_nack()).await;
    nacked.unwrap();
    let (again, handler) = next(&mut stream).await;
    assert_eq!(again.message_id, id);
    let acked = in_time(exactly_once(handler).confirmed_ack()).await;
    acked.unwrap();
    assert_eq!(running.broker.backlog_len(SUBSCRIPTION), Ok(0));
    running.stop().await;
}

#[tokio::test]
async fn the_official_client_is_told_that_its_ack_came_too_late() {
    let running = prepared().await;
    let publisher = running.publisher().await;
    publish(&publisher, Message::new().set_data("once")).await;
    let mut stream = running.stream(10).await;
    let (_, handler) = next(&mut stream).await;
    let handler = exactly_once(handler);
    // With its subscription, every ack id goes.
    let subscriptions = running.subscription_admin().await;
    let delete = subscriptions.delete_subscription();
    let delete = delete.set_subscription(SUBSCRIPTION);
    delete.send().await.unwrap();
    let again = subscriptions.create_subscription();
    let again = again
        .set_name(SUBSCRIPTION)
        .set_topic(super::TOPIC)
        .set_enable_exactly_once_delivery(true);
    again.send().await.unwrap();
    let refused = in_time(handler.confirmed_ack()).await.unwrap_err();
    let refused = format!("{refused:?}");
    assert!(refused.contains(INVALID), "{refused}");
    running.stop().await;
}

#[tokio::test]
async fn acks_in_the_stream_are_confirmed_there() {
    let running = prepared().await;
    grpc::publish(&running, &["a"]).await;
    let mut stream = Stream::open(&running, first()).await.unwrap();
    let delivered = stream.next().await.unwrap();
    let properties = delivered.subscription_properties.unwrap();
    assert!(properties.exactly_once_delivery_enabled);
    let ack_id = delivered.received_messages[0].ack_id.clone();
    let extend = StreamingPullRequest {
        modify_deadline_ack_ids: vec![ack_id.clone(), "gone".to_owned()],
        modify_deadline_seconds: vec![60, 60],
        ..StreamingPullRequest::default()
    };
    stream.send(extend).await;
    let confirmed = stream.next().await.unwrap();
    let confirmed = confirmed.modify_ack_deadline_confirmation.unwrap();
    assert_eq!(confirmed.ack_ids, slice::from_ref(&ack_id));
    assert_eq!(confirmed.invalid_ack_ids, ["gone"]);
    for round in 0..2 {
        let ack = StreamingPullRequest {
            ack_ids: vec![ack_id.clone()],
            ..StreamingPullRequest::default()
        };
        stream.send(ack).await;
        let confirmed = stream.next().await.unwrap().acknowledge_confirmation;
        let confirmed = confirmed.unwrap();
        let lists = [confirmed.ack_ids, confirmed.invalid_ack_ids];
        assert_eq!(lists[round], slice::from_ref(&ack_id));
        assert!(lists[1 - round].is_empty());
    }
    running.stop().await;
}

#[tokio::test]
async fn a_unary_call_with_a_bad_ack_id_fails_and_names_it() {
    let running = prepared().await;
    let mut client = SubscriberClient::new(channel(&running).await);
    let subscription = SUBSCRIPTION.to_owned();
    let ack_ids = vec!["gone".to_owned()];
    let acked = client.acknowledge(AcknowledgeRequest {
        subscription: subscription.clone(),
        ack_ids: ack_ids.clone(),
    });
    let acked = acked.await.unwrap_err();
    let modified = client.modify_ack_deadline(ModifyAckDeadlineRequest {
        subscription,
        ack_ids,
        ack_deadline_seconds: 10,
    });
    let modified = modified.await.unwrap_err();
    for refused in [acked, modified] {
        assert_eq!(refused.code(), Code::InvalidArgument);
        let details = String::from_utf8_lossy(refused.details()).into_owned();
        assert!(
            details.contains("gone") && details.contains(INVALID),
            "{details}"
        );
    }
    let path = format!("{SUBSCRIPTION}:acknowledge");
    let body = json!({ "ackIds": ["gone"] });
    let (status, refused) = rest::call(&running, "POST", &path, body).await;
    assert_eq!(status, 400);
    let info = &refused["error"]["details"][0];
    assert_eq!(info["reason"], "EXACTLY_ONCE_ACKID_FAILURE");
    assert_eq!(info["metadata"], json!({ "gone": INVALID }));
    running.stop().await;
}
