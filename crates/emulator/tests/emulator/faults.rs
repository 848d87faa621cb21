//! Faults on request: by option and by admin call.

use std::slice;
use std::time::{Duration, Instant};

use google_cloud_pubsub::model::{Message, Subscription};
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::subscriber_client::SubscriberClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{
    AcknowledgeRequest, StreamingPullRequest,
};
use serde_json::json;
use tonic::Code;
use trainyard_emulator::{Faults, Options, StatusCode};

use super::exactly_once::{self, exactly_once};
use super::grpc::{self, Stream, channel, first};
use super::rest::request;
use super::{Running, SUBSCRIPTION, in_time, next, publish};

/// Long enough to show that nothing comes.
const A_WHILE: Duration = Duration::from_millis(200);

async fn with(faults: &str) -> Running {
    let options = Options {
        faults: faults.parse().unwrap(),
        ..Options::default()
    };
    Running::prepared_with(options, Subscription::new()).await
}

fn settling(ack_ids: &[&String], modify: &[&String], seconds: i32) -> StreamingPullRequest {
    let owned = |ids: &[&String]| ids.iter().map(|&id| id.clone()).collect();
    StreamingPullRequest {
        ack_ids: owned(ack_ids),
        modify_deadline_ack_ids: owned(modify),
        modify_deadline_seconds: vec![seconds; modify.len()],
        ..StreamingPullRequest::default()
    }
}

#[tokio::test]
async fn the_official_client_gets_a_duplicate_of_each_message() {
    let running = with("duplicates=1").await;
    let publisher = running.publisher().await;
    let mut stream = running.stream(10).await;
    for _ in 0..3 {
        let id = publish(&publisher, Message::new().set_data("twice")).await;
        for _ in 0..2 {
            let (message, handler) = next(&mut stream).await;
            assert_eq!(message.message_id, id);
            handler.ack();
        }
    }
    running.backlog_of(0).await;
    running.stop().await;
}

#[tokio::test]
async fn a_message_whose_ack_was_dropped_comes_again() {
    let running = with("dropped-acks=1").await;
    grpc::publish(&running, &["a"]).await;
    let mut stream = Stream::open(&running, first()).await.unwrap();
    let (id, _) = stream.next_message().await;
    // Acked, and yet it is there to have its ack deadline shortened.
    stream.send(settling(&[&id], &[&id], 1)).await;
    assert_eq!(stream.next_message().await.1, "a");
    running.stop().await;
}

#[tokio::test]
async fn with_exactly_once_delivery_a_dropped_ack_failed_for_the_time_being() {
    let running = exactly_once::prepared().await;
    running.broker.set_faults("dropped-acks=1".parse().unwrap());
    grpc::publish(&running, &["a"]).await;
    let mut stream = Stream::open(&running, first()).await.unwrap();
    let (id, _) = stream.next_message().await;
    stream.send(settling(&[&id], &[], 0)).await;
    let confirmed = stream.next().await.unwrap().acknowledge_confirmation;
    assert_eq!(
        confirmed.unwrap().temporary_failed_ack_ids,
        slice::from_ref(&id)
    );
    let mut client = SubscriberClient::new(channel(&running).await);
    let request = AcknowledgeRequest {
        subscription: SUBSCRIPTION.to_owned(),
        ack_ids: vec![id],
    };
    let dropped = client.acknowledge(request.clone()).await.unwrap_err();
    assert_eq!(dropped.code(), Code::Unavailable);
    running.broker.set_faults(Faults::default());
    client.acknowledge(request).await.unwrap();
    assert_eq!(running.broker.backlog_len(SUBSCRIPTION), Ok(0));
    running.stop().await;
}

#[tokio::test]
async fn the_official_client_tries_a_dropped_ack_again() {
    let running = exactly_once::prepared().await;
    running.broker.set_faults("dropped-acks=1".parse().unwrap());
    let publisher = running.publisher().await;
    publish(&publisher, Message::new().set_data("once")).await;
    let mut stream = running.stream(10).await;
    let (_, handler) = next(&mut stream).await;
    let mut ack = tokio::spawn(exactly_once(handler).confirmed_ack());
    let early = tokio::time::timeout(A_WHILE, &mut ack).await;
    assert!(early.is_err(), "{early:?}");
    running.broker.set_faults(Faults::default());
    in_time(ack).await.unwrap().unwrap();
    assert_eq!(running.broker.backlog_len(SUBSCRIPTION), Ok(0));
    running.stop().await;
}

#[tokio::test]
async fn a_stream_ends_by_chance_after_its_messages() {
    let running = with("resets=1:ABORTED").await;
    grpc::publish(&running, &["a"]).await;
    let mut stream = Stream::open(&running, first()).await.unwrap();
    assert_eq!(stream.next_message().await.1, "a");
    assert_eq!(stream.next().await.unwrap_err().code(), Code::Aborted);
    running.stop().await;
}

#[tokio::test]
async fn all_streams_end_on_request_and_the_official_client_goes_on() {
    let running = with("").await;
    let publisher = running.publisher().await;
    publish(&publisher, Message::new().set_data("before")).await;
    let mut official = running.stream(10).await;
    let (_, held) = next(&mut official).await;
    let mut bare = Stream::open(&running, first()).await.unwrap();
    assert_eq!(running.broker.reset_streams(StatusCode::Internal), 2);
    assert_eq!(bare.next().await.unwrap_err().code(), Code::Internal);
    publish(&publisher, Message::new().set_data("after")).await;
    assert_eq!(next(&mut official).await.0.data, "after");
    held.ack();
    running.backlog_of(1).await;
    running.stop().await;
}

#[tokio::test]
async fn a_silent_stream_stays_open_without_messages_and_heartbeats() {
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
    stream.next().await.unwrap();
    running.broker.set_faults("silence".parse().unwrap());
    grpc::publish(&running, &["a"]).await;
    // At most what was under way already.
    let mut spoken = 0;
    while let Ok(answer) = tokio::time::timeout(A_WHILE, stream.next()).await {
        assert!(answer.unwrap().received_messages.is_empty());
        spoken += 1;
    }
    assert!(spoken < 10, "{spoken} responses in silence");
    running.broker.set_faults(Faults::default());
    while stream.next().await.unwrap().received_messages.is_empty() {}
    running.stop().await;
}

#[tokio::test]
async fn silence_does_not_keep_a_stream_from_being_reset() {
    let running = with("silence").await;
    let mut stream = Stream::open(&running, first()).await.unwrap();
    running.broker.reset_streams(StatusCode::Unavailable);
    assert_eq!(stream.next().await.unwrap_err().code(), Code::Unavailable);
    running.stop().await;
}

#[tokio::test]
async fn a_message_is_late_by_the_latency() {
    let running = with("latency=150ms").await;
    let mut stream = Stream::open(&running, first()).await.unwrap();
    let published = Instant::now();
    grpc::publish(&running, &["a"]).await;
    assert_eq!(stream.next_message().await.1, "a");
    assert!(published.elapsed() >= Duration::from_millis(150));
    running.stop().await;
}

#[tokio::test]
async fn a_nacked_message_comes_behind_another_when_out_of_order() {
    let running = with("out-of-order=1").await;
    grpc::publish(&running, &["a", "b"]).await;
    let mut stream = Stream::open(&running, first()).await.unwrap();
    let (nacked, text) = stream.next_message().await;
    assert_eq!(text, "a");
    stream.send(settling(&[], &[&nacked], 0)).await;
    assert_eq!(stream.next_message().await.1, "b");
    running.stop().await;
}

#[tokio::test]
async fn faults_are_shown_and_replaced_by_an_admin_call() {
    let running = with("duplicates=0.25,seed=9").await;
    let path = "emulator/faults";
    let (status, shown) = request(&running, "GET", path, String::new()).await;
    assert_eq!(status, 200);
    assert_eq!(shown["duplicates"], 0.25);
    assert_eq!(shown["seed"], 9);
    let wanted = json!({ "resets": "0.5:INTERNAL", "latency": "1s", "silence": true });
    let (status, set) = request(&running, "PUT", path, wanted.to_string()).await;
    assert_eq!(status, 200, "{set}");
    assert_eq!(set["resets"], "0.5:INTERNAL");
    assert_eq!(set["seed"], 9, "kept");
    let faults = running.broker.faults();
    assert_eq!(faults.duplicates, 0.0, "what is not named is off");
    assert_eq!(faults.reset_status, StatusCode::Internal);
    assert!(faults.silence);
    let (status, again) = request(&running, "PUT", path, set.to_string()).await;
    assert_eq!((status, again), (200, set));
    running.stop().await;
}

#[tokio::test]
async fn an_admin_call_ends_the_streams_with_its_status() {
    let running = with("").await;
    let reset = "emulator/streams/reset";
    for (path, code) in [
        (reset.to_owned(), Code::Unavailable),
        (format!("{reset}?status=NOT_FOUND"), Code::NotFound),
    ] {
        let mut stream = Stream::open(&running, first()).await.unwrap();
        let answer = request(&running, "POST", &path, String::new()).await;
        assert_eq!(answer, (200, json!({ "reset": 1 })));
        assert_eq!(stream.next().await.unwrap_err().code(), code);
    }
    running.stop().await;
}

#[tokio::test]
async fn a_bad_admin_call_is_refused_with_a_reason_and_changes_nothing() {
    let running = with("duplicates=0.25").await;
    let faults = "emulator/faults";
    let cases = [
        ("PUT", faults, "{\"duplicates\":2}", "a number from 0 to 1"),
        ("PUT", faults, "{\"loss\":1}", "no fault \\\"loss\\\""),
        ("PUT", faults, "duplicates=1", "no JSON object"),
        ("PUT", faults, "", "no JSON object"),
        (
            "POST",
            "emulator/streams/reset?status=GONE",
            "",
            "no gRPC status",
        ),
        ("POST", "emulator/streams/reset?code=5", "", "unknown field"),
    ];
    for (method, path, body, reason) in cases {
        let (status, answer) = request(&running, method, path, body.to_owned()).await;
        assert_eq!(status, 400, "{method} {path} {body}");
        assert_eq!(answer["error"]["status"], "INVALID_ARGUMENT");
        let answer = answer.to_string();
        assert!(answer.contains(reason), "{answer}");
    }
    assert_eq!(running.broker.faults().duplicates, 0.25);
    running.stop().await;
}
