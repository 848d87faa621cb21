//! REST as curl speaks it: HTTP/1.1 and JSON.

use google_cloud_pubsub::model::Subscription;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Running, SUBSCRIPTION, TOPIC, in_time};

/// The status code and the JSON of the answer.
pub async fn call(running: &Running, method: &str, path: &str, body: Value) -> (u16, Value) {
    request(running, method, &format!("v1/{path}"), body.to_string()).await
}

/// The same for any path and any text.
pub async fn request(running: &Running, method: &str, path: &str, body: String) -> (u16, Value) {
    let host = format!("host: {}", running.address);
    let (status, body) = exchange(running, method, path, &[&host], body).await;
    (status, serde_json::from_str(&body).unwrap())
}

/// The status code and the text of the answer.
async fn exchange(
    running: &Running,
    method: &str,
    path: &str,
    headers: &[&str],
    body: String,
) -> (u16, String) {
    let mut connection = TcpStream::connect(running.address).await.unwrap();
    let headers = headers.join("\r\n");
    let request = format!(
        "{method} /{path} HTTP/1.1\r\n{headers}\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    in_time(connection.read_to_string(&mut answer))
        .await
        .unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

#[tokio::test]
async fn a_health_check_is_answered() {
    let running = Running::start().await;
    let answer = exchange(&running, "GET", "", &["host: localhost"], String::new()).await;
    assert_eq!(answer, (200, "Ok\n".to_owned()));
    running.stop().await;
}

/// A page may post text without asking first, and may have its own name lead here.
#[tokio::test]
async fn a_web_page_of_somebody_else_cannot_drive_the_emulator() {
    let running = Running::prepared(Subscription::new()).await;
    let publish = format!("v1/{TOPIC}:publish");
    let message = json!({"messages": [{"data": "YQ=="}]}).to_string();
    for headers in [
        &[
            "host: localhost",
            "origin: https://evil.example",
            "content-type: text/plain",
        ][..],
        &["host: localhost", "origin: null"],
        &["host: evil.example:8085"],
    ] {
        for (path, body) in [
            (publish.as_str(), message.clone()),
            ("emulator/streams/reset", String::new()),
        ] {
            let (status, answer) = exchange(&running, "POST", path, headers, body).await;
            assert_eq!(status, 403, "{answer}");
            assert!(answer.contains("foreign"), "{answer}");
        }
    }
    let (status, _) = exchange(&running, "POST", &publish, &["host: localhost"], message).await;
    assert_eq!(status, 200);
    running.backlog_of(1).await;
    running.stop().await;
}

#[tokio::test]
async fn a_message_is_published_pulled_and_acknowledged() {
    let running = Running::prepared(Subscription::new()).await;
    let messages = json!({ "messages": [{ "data": "aGVsbG8=", "attributes": { "a": "b" } }] });
    let (status, published) = call(&running, "POST", &format!("{TOPIC}:publish"), messages).await;
    assert_eq!(status, 200, "{published}");

    let pull = json!({ "maxMessages": 10 });
    let (_, pulled) = call(&running, "POST", &format!("{SUBSCRIPTION}:pull"), pull).await;
    let received = &pulled["receivedMessages"][0];
    assert_eq!(received["message"]["messageId"], published["messageIds"][0]);
    assert_eq!(received["message"]["data"], "aGVsbG8=");
    assert_eq!(received["message"]["attributes"]["a"], "b");
    assert_eq!(received.get("deliveryAttempt"), None);

    let ack_ids = json!({ "ackIds": [received["ackId"]] });
    let nack = json!({ "ackIds": [received["ackId"]], "ackDeadlineSeconds": 0 });
    let path = format!("{SUBSCRIPTION}:modifyAckDeadline");
    assert_eq!(call(&running, "POST", &path, nack).await, (200, json!({})));
    let path = format!("{SUBSCRIPTION}:acknowledge");
    let stale = call(&running, "POST", &path, ack_ids).await;
    assert_eq!(stale, (200, json!({})));
    assert_eq!(running.broker.backlog_len(SUBSCRIPTION), Ok(1));

    let pull = json!({ "maxMessages": 10 });
    let (_, pulled) = call(&running, "POST", &format!("{SUBSCRIPTION}:pull"), pull).await;
    let ack_ids = json!({ "ackIds": [pulled["receivedMessages"][0]["ackId"]] });
    call(&running, "POST", &path, ack_ids).await;
    assert_eq!(running.broker.backlog_len(SUBSCRIPTION), Ok(0));
    running.stop().await;
}

#[tokio::test]
async fn settings_come_back_as_they_were_given() {
    let running = Running::prepared(Subscription::new()).await;
    let path = "projects/test/subscriptions/full";
    let settings = json!({
        "name": path,
        "topic": TOPIC,
        "ackDeadlineSeconds": 600,
        "labels": { "team": "ml" },
        "enableMessageOrdering": true,
        "enableExactlyOnceDelivery": true,
        "messageRetentionDuration": "3600s",
        "expirationPolicy": { "ttl": "86400s" },
        "deadLetterPolicy": { "deadLetterTopic": TOPIC, "maxDeliveryAttempts": 7 },
        "retryPolicy": { "minimumBackoff": "0.5s", "maximumBackoff": "10s" },
        "state": "ACTIVE",
    });
    let (status, created) = call(&running, "PUT", path, settings.clone()).await;
    assert_eq!((status, &created), (200, &settings));
    assert_eq!(
        call(&running, "GET", path, json!({})).await,
        (200, settings)
    );
    running.stop().await;
}

#[tokio::test]
async fn a_refusal_has_the_form_of_google_errors() {
    let running = Running::prepared(Subscription::new()).await;
    let cases = [
        ("GET", "projects/test/topics/none", 404, "NOT_FOUND"),
        ("PUT", TOPIC, 409, "ALREADY_EXISTS"),
        ("PUT", "projects/test/topics/1", 400, "INVALID_ARGUMENT"),
        (
            "GET",
            "projects/test/topics?pageSize=x",
            400,
            "INVALID_ARGUMENT",
        ),
        ("PATCH", TOPIC, 501, "UNIMPLEMENTED"),
        ("GET", "projects/test/schemas", 501, "UNIMPLEMENTED"),
    ];
    for (method, path, code, name) in cases {
        let (status, answer) = call(&running, method, path, json!({})).await;
        assert_eq!(status, code, "{method} {path}: {answer}");
        assert_eq!(answer["error"]["code"], code);
        assert_eq!(answer["error"]["status"], name);
        assert!(answer["error"]["message"].is_string());
    }
    running.stop().await;
}
