//! A server that restarts and keeps its state.

use google_cloud_pubsub::model::Subscription;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::subscriber_client::SubscriberClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{
    AcknowledgeRequest, ModifyAckDeadlineRequest,
};
use tokio::net::TcpStream;
use tonic::Code;
use trainyard_emulator::Emulator;

use super::grpc::{Stream, channel, first, publish};
use super::{Running, SUBSCRIPTION};

#[tokio::test]
async fn a_restarted_server_has_every_message_and_takes_earlier_ack_ids() {
    let before = Running::prepared(Subscription::new()).await;
    publish(&before, &["a", "b"]).await;
    let mut stream = Stream::open(&before, first()).await.unwrap();
    let (of_a, text) = stream.next_message().await;
    assert_eq!(text, "a");
    let (address, broker) = (before.address, before.broker.clone());
    before.stop().await;
    assert_eq!(stream.next().await.unwrap_err().code(), Code::Unavailable);
    assert!(TcpStream::connect(address).await.is_err());

    let after = Running::serve(Emulator::bind_again(address, &broker).await.unwrap());
    assert_eq!(after.broker.backlog_len(SUBSCRIPTION), Ok(2));
    let mut stream = Stream::open(&after, first()).await.unwrap();
    // "a" is still outstanding.
    assert_eq!(stream.next_message().await.1, "b");
    let ack = AcknowledgeRequest {
        subscription: SUBSCRIPTION.to_owned(),
        ack_ids: vec![of_a],
    };
    let mut subscriber = SubscriberClient::new(channel(&after).await);
    subscriber.acknowledge(ack).await.unwrap();
    assert_eq!(after.broker.backlog_len(SUBSCRIPTION), Ok(1));
    publish(&after, &["c"]).await;
    assert_eq!(after.broker.backlog_len(SUBSCRIPTION), Ok(2));
    after.stop().await;
    assert_eq!(stream.next().await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn ack_deadlines_pass_at_a_restarted_server() {
    let before = Running::prepared(Subscription::new()).await;
    publish(&before, &["a"]).await;
    let mut stream = Stream::open(&before, first()).await.unwrap();
    let (shortened, _) = stream.next_message().await;
    let (address, broker) = (before.address, before.broker.clone());
    before.stop().await;
    let after = Running::serve(Emulator::bind_again(address, &broker).await.unwrap());
    let mut subscriber = SubscriberClient::new(channel(&after).await);
    let shorten = ModifyAckDeadlineRequest {
        subscription: SUBSCRIPTION.to_owned(),
        ack_ids: vec![shortened.clone()],
        ack_deadline_seconds: 1,
    };
    subscriber.modify_ack_deadline(shorten).await.unwrap();
    let mut stream = Stream::open(&after, first()).await.unwrap();
    let (again, text) = stream.next_message().await;
    assert_eq!(text, "a");
    assert_ne!(again, shortened);
    after.stop().await;
}
