//! gRPC beneath the official client: what a stream carries.

use std::time::{Duration, Instant};

use google_cloud_pubsub::model::Subscription;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::publisher_client::PublisherClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::subscriber_client::SubscriberClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{
    GetTopicRequest, PublishRequest, PubsubMessage, PullRequest, SeekRequest, StreamingPullRequest,
    StreamingPullResponse,
};
use tokio::sync::mpsc::{self, Sender};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use trainyard_emulator::Options;

use super::{Running, SUBSCRIPTION, TOPIC, in_time};

pub struct Stream {
    requests: Sender<StreamingPullRequest>,
    responses: Streaming<StreamingPullResponse>,
}

impl Stream {
    pub async fn open(running: &Running, first: StreamingPullRequest) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(10);
        requests.send(first).await.unwrap();
        let mut client = SubscriberClient::new(channel(running).await);
        let responses = in_time(client.streaming_pull(ReceiverStream::new(receiver))).await?;
        Ok(Self {
            requests,
            responses: responses.into_inner(),
        })
    }

    pub async fn next(&mut self) -> Result<StreamingPullResponse, Status> {
        let next = in_time(self.responses.message()).await?;
        Ok(next.expect("the stream ended"))
    }

    /// The ack id and the data of the one message of the next response.
    pub async fn next_message(&mut self) -> (String, String) {
        let mut response = self.next().await.unwrap();
        assert_eq!(response.received_messages.len(), 1);
        let received = response.received_messages.remove(0);
        let data = received.message.unwrap().data;
        (received.ack_id, String::from_utf8(data.to_vec()).unwrap())
    }

    pub async fn send(&self, request: StreamingPullRequest) {
        self.requests.send(request).await.unwrap();
    }
}

pub async fn channel(running: &Running) -> Channel {
    let endpoint = Channel::from_shared(running.endpoint.clone()).unwrap();
    endpoint.connect().await.unwrap()
}

pub fn first() -> StreamingPullRequest {
    StreamingPullRequest {
        subscription: SUBSCRIPTION.to_owned(),
        stream_ack_deadline_seconds: 10,
        max_outstanding_messages: 1,
        ..StreamingPullRequest::default()
    }
}

pub async fn publish(running: &Running, texts: &[&str]) {
    let message = |text: &&str| PubsubMessage {
        data: (*text).to_owned().into(),
        ..PubsubMessage::default()
    };
    let request = PublishRequest {
        topic: TOPIC.to_owned(),
        messages: texts.iter().map(message).collect(),
    };
    let mut client = PublisherClient::new(channel(running).await);
    client.publish(request).await.unwrap();
}

#[tokio::test]
async fn acks_and_nacks_travel_in_the_stream() {
    let running = Running::prepared(Subscription::new()).await;
    publish(&running, &["a", "b"]).await;
    let mut stream = Stream::open(&running, first()).await.unwrap();
    let (nacked, text) = stream.next_message().await;
    assert_eq!(text, "a");
    let nack = StreamingPullRequest {
        modify_deadline_ack_ids: vec![nacked.clone()],
        modify_deadline_seconds: vec![0],
        ..StreamingPullRequest::default()
    };
    stream.send(nack).await;
    let (acked, text) = stream.next_message().await;
    assert_eq!(text, "a");
    assert_ne!(acked, nacked);
    let ack = StreamingPullRequest {
        ack_ids: vec![acked],
        ..StreamingPullRequest::default()
    };
    stream.send(ack).await;
    assert_eq!(stream.next_message().await.1, "b");
    assert_eq!(running.broker.backlog_len(SUBSCRIPTION), Ok(1));
    running.stop().await;
}

#[tokio::test]
async fn a_message_is_redelivered_when_its_ack_deadline_has_passed() {
    let running = Running::prepared(Subscription::new()).await;
    publish(&running, &["a"]).await;
    let mut stream = Stream::open(&running, first()).await.unwrap();
    let (held, _) = stream.next_message().await;
    let shorten = StreamingPullRequest {
        modify_deadline_ack_ids: vec![held.clone()],
        modify_deadline_seconds: vec![1],
        ..StreamingPullRequest::default()
    };
    let shortened = Instant::now();
    stream.send(shorten).await;
    let (again, text) = stream.next_message().await;
    assert_eq!(text, "a");
    assert_ne!(again, held);
    assert!(shortened.elapsed() >= Duration::from_secs(1));
    running.stop().await;
}

#[tokio::test]
async fn a_quiet_stream_gets_heartbeats_from_protocol_version_one_on() {
    let options = Options {
        heartbeat: Duration::from_millis(10),
        ..Options::default()
    };
    let running = Running::prepared_with(options, Subscription::new()).await;
    let with_heartbeats = StreamingPullRequest {
        protocol_version: 1,
        ..first()
    };
    let mut stream = Stream::open(&running, with_heartbeats).await.unwrap();
    let mut plain = Stream::open(&running, first()).await.unwrap();
    for _ in 0..3 {
        let heartbeat = stream.next().await.unwrap();
        assert!(heartbeat.received_messages.is_empty());
    }
    drop(stream);
    publish(&running, &["a"]).await;
    assert_eq!(plain.next_message().await.1, "a");
    running.stop().await;
}

#[tokio::test]
async fn a_wrong_request_ends_the_stream_with_an_invalid_argument() {
    let running = Running::prepared(Subscription::new()).await;
    let short = StreamingPullRequest {
        stream_ack_deadline_seconds: 9,
        ..first()
    };
    let refused = Stream::open(&running, short).await.err().unwrap();
    assert_eq!(refused.code(), Code::InvalidArgument);

    let mut stream = Stream::open(&running, first()).await.unwrap();
    let lopsided = StreamingPullRequest {
        modify_deadline_seconds: vec![10],
        ..StreamingPullRequest::default()
    };
    stream.send(lopsided).await;
    let refused = stream.next().await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    running.stop().await;
}

#[tokio::test]
async fn shutdown_ends_a_stream_with_unavailable() {
    let running = Running::prepared(Subscription::new()).await;
    let mut stream = Stream::open(&running, first()).await.unwrap();
    running.stop().await;
    assert_eq!(stream.next().await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_waiting_pull_returns_when_a_message_comes_and_empty_when_none_does() {
    let options = Options {
        pull_wait: Duration::from_millis(50),
        ..Options::default()
    };
    let running = Running::prepared_with(options, Subscription::new()).await;
    let pull = PullRequest {
        subscription: SUBSCRIPTION.to_owned(),
        max_messages: 10,
        ..PullRequest::default()
    };
    let mut client = SubscriberClient::new(channel(&running).await);
    let empty = in_time(client.pull(pull.clone())).await.unwrap();
    assert!(empty.into_inner().received_messages.is_empty());
    publish(&running, &["a", "b"]).await;
    let both = in_time(client.pull(pull)).await.unwrap();
    assert_eq!(both.into_inner().received_messages.len(), 2);
    running.stop().await;
}

#[tokio::test]
async fn refusals_are_grpc_statuses() {
    let running = Running::prepared(Subscription::new()).await;
    let mut publisher = PublisherClient::new(channel(&running).await);
    let topic = "projects/test/topics/none".to_owned();
    let missing = publisher.get_topic(GetTopicRequest { topic }).await;
    assert_eq!(missing.unwrap_err().code(), Code::NotFound);
    let mut subscriber = SubscriberClient::new(channel(&running).await);
    let seek = subscriber.seek(SeekRequest::default()).await.unwrap_err();
    assert_eq!(seek.code(), Code::Unimplemented);
    assert!(seek.message().contains("Seek"), "{}", seek.message());
    running.stop().await;
}
