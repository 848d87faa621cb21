//! The v1 API over HTTP and JSON, used by the official admin clients and curl:
//! <https://cloud.google.com/pubsub/docs/reference/rest>.

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use google_cloud_pubsub::model;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Broker;
use super::engine::PageRequest;
use super::error::{ACK_IDS_REASON, BrokerError, DOMAIN};
use super::name::{check_subscription, check_topic};

mod convert;

type Answer = Result<Json<Value>, BrokerError>;

const TOPICS: &str = "/v1/projects/{project}/topics";
const TOPIC: &str = "/v1/projects/{project}/topics/{id}";
const TOPIC_SUBSCRIPTIONS: &str = "/v1/projects/{project}/topics/{id}/subscriptions";
const SUBSCRIPTIONS: &str = "/v1/projects/{project}/subscriptions";
const SUBSCRIPTION: &str = "/v1/projects/{project}/subscriptions/{id}";

/// The REST paths.
pub fn router(broker: Broker) -> Router {
    let topic = get(get_topic)
        .put(create_topic)
        .delete(delete_topic)
        .post(post_topic);
    let subscription = get(get_subscription)
        .put(create_subscription)
        .delete(delete_subscription)
        .post(post_subscription);
    Router::new()
        .route(TOPICS, get(list_topics))
        .route(TOPIC, topic)
        .route(TOPIC_SUBSCRIPTIONS, get(list_topic_subscriptions))
        .route(SUBSCRIPTIONS, get(list_subscriptions))
        .route(SUBSCRIPTION, subscription)
        .method_not_allowed_fallback(unknown_method)
        .with_state(broker)
}

/// The answer to an unknown path.
pub fn unknown(path: &str) -> Response {
    BrokerError::unimplemented(path).into_response()
}

async fn unknown_method(method: axum::http::Method, uri: axum::http::Uri) -> Response {
    unknown(&format!("{method} {}", uri.path()))
}

type Named = Path<(String, String)>;

fn topic_name((project, id): &(String, String)) -> String {
    format!("projects/{project}/topics/{id}")
}

fn subscription_name((project, id): &(String, String)) -> String {
    format!("projects/{project}/subscriptions/{id}")
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PageQuery {
    #[serde(alias = "page_size")]
    page_size: i32,
    #[serde(alias = "page_token")]
    page_token: String,
}

type PageOfList = Result<Query<PageQuery>, QueryRejection>;

fn wanted(page: PageOfList) -> Result<PageRequest, BrokerError> {
    let invalid = |rejection: QueryRejection| BrokerError::InvalidArgument(rejection.body_text());
    let Query(page) = page.map_err(invalid)?;
    Ok(PageRequest {
        size: page.page_size,
        token: page.page_token,
    })
}

async fn create_topic(
    State(broker): State<Broker>,
    Path(path): Named,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let mut topic: model::Topic = read(body)?;
    topic.name = topic_name(&path);
    let topic = convert::topic_in(topic)?;
    broker.create_topic(topic.clone())?;
    Ok(Json(show(convert::topic_out(topic))?))
}

async fn get_topic(State(broker): State<Broker>, Path(path): Named) -> Answer {
    Ok(Json(show(convert::topic_out(
        broker.topic(&topic_name(&path))?,
    ))?))
}

async fn list_topics(
    State(broker): State<Broker>,
    Path(project): Path<String>,
    page: PageOfList,
) -> Answer {
    let page = broker.topics(&format!("projects/{project}"), &wanted(page)?)?;
    let topics: Vec<_> = page.items.into_iter().map(convert::topic_out).collect();
    Ok(Json(with_token(
        json!({ "topics": topics }),
        page.next_token,
    )))
}

async fn list_topic_subscriptions(
    State(broker): State<Broker>,
    Path(path): Named,
    page: PageOfList,
) -> Answer {
    let page = broker.topic_subscriptions(&topic_name(&path), &wanted(page)?)?;
    let names = json!({ "subscriptions": page.items });
    Ok(Json(with_token(names, page.next_token)))
}

async fn delete_topic(State(broker): State<Broker>, Path(path): Named) -> Answer {
    broker.delete_topic(&topic_name(&path))?;
    Ok(Json(json!({})))
}

#[derive(Debug, Deserialize)]
struct Publish {
    messages: Vec<model::Message>,
}

/// `POST …/topics/ID:VERB`.
async fn post_topic(
    State(broker): State<Broker>,
    Path((project, target)): Named,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let (id, verb) = target.split_once(':').unwrap_or((&target, ""));
    let topic = topic_name(&(project, id.to_owned()));
    check_topic(&topic)?;
    if verb != "publish" {
        return Err(BrokerError::unimplemented(&format!("the verb :{verb}")));
    }
    let publish: Publish = read(body)?;
    let messages = publish.messages.into_iter().map(convert::message_in);
    let ids = broker.publish(&topic, messages.collect())?;
    Ok(Json(json!({ "messageIds": ids })))
}

async fn create_subscription(
    State(broker): State<Broker>,
    Path(path): Named,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let mut subscription: model::Subscription = read(body)?;
    subscription.name = subscription_name(&path);
    let subscription = convert::subscription_in(subscription)?;
    let created = broker.create_subscription(subscription)?;
    Ok(Json(show(convert::subscription_out(created))?))
}

async fn get_subscription(State(broker): State<Broker>, Path(path): Named) -> Answer {
    let found = broker.subscription(&subscription_name(&path))?;
    Ok(Json(show(convert::subscription_out(found))?))
}

async fn list_subscriptions(
    State(broker): State<Broker>,
    Path(project): Path<String>,
    page: PageOfList,
) -> Answer {
    let page = broker.subscriptions(&format!("projects/{project}"), &wanted(page)?)?;
    let items = page.items.into_iter().map(convert::subscription_out);
    let subscriptions: Vec<_> = items.map(show).collect::<Result<_, _>>()?;
    let list = json!({ "subscriptions": subscriptions });
    Ok(Json(with_token(list, page.next_token)))
}

async fn delete_subscription(State(broker): State<Broker>, Path(path): Named) -> Answer {
    broker.delete_subscription(&subscription_name(&path))?;
    Ok(Json(json!({})))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pull {
    #[serde(alias = "max_messages")]
    max_messages: i32,
    #[serde(default, alias = "return_immediately")]
    return_immediately: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Acknowledge {
    #[serde(alias = "ack_ids")]
    ack_ids: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ModifyAckDeadline {
    #[serde(alias = "ack_ids")]
    ack_ids: Vec<String>,
    #[serde(alias = "ack_deadline_seconds")]
    ack_deadline_seconds: i32,
}

/// `POST …/subscriptions/ID:VERB`.
async fn post_subscription(
    State(broker): State<Broker>,
    Path((project, target)): Named,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let (id, verb) = target.split_once(':').unwrap_or((&target, ""));
    let name = subscription_name(&(project, id.to_owned()));
    check_subscription(&name)?;
    match verb {
        "pull" => pull(&broker, &name, read(body)?).await,
        "acknowledge" => {
            let request: Acknowledge = read(body)?;
            let settled = broker.acknowledge(&name, &request.ack_ids)?;
            settled.into_answer()?;
            Ok(Json(json!({})))
        }
        "modifyAckDeadline" => {
            let request: ModifyAckDeadline = read(body)?;
            let seconds = request.ack_deadline_seconds;
            let settled = broker.modify_ack_deadline(&name, &request.ack_ids, seconds)?;
            settled.into_answer()?;
            Ok(Json(json!({})))
        }
        other => Err(BrokerError::unimplemented(&format!("the verb :{other}"))),
    }
}

async fn pull(broker: &Broker, name: &str, request: Pull) -> Answer {
    let counted = broker.subscription(name)?.dead_letter.is_some();
    let deliveries = broker
        .pull_up_to(name, request.max_messages, request.return_immediately)
        .await?;
    let received: Vec<Value> = deliveries
        .iter()
        .map(|delivery| convert::delivery_out(delivery, counted))
        .collect();
    if received.is_empty() {
        return Ok(Json(json!({})));
    }
    Ok(Json(json!({ "receivedMessages": received })))
}

/// Reads a body of proto-JSON, whatever its content type; an empty body is `{}`.
fn read<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, BrokerError> {
    let invalid = |why: String| BrokerError::InvalidArgument(format!("Invalid body: {why}"));
    let body = body.map_err(|rejection| invalid(rejection.body_text()))?;
    let body: &[u8] = if body.is_empty() { b"{}" } else { &body };
    serde_json::from_slice(body).map_err(|error| invalid(error.to_string()))
}

fn show(resource: impl serde::Serialize) -> Result<Value, BrokerError> {
    let shown = serde_json::to_value(resource);
    let mut shown = shown.map_err(|error| BrokerError::InvalidArgument(error.to_string()))?;
    // The official client writes the number; Google writes the name.
    shown["state"] = "ACTIVE".into();
    Ok(shown)
}

/// Proto-JSON leaves out empty fields.
fn with_token(mut list: Value, token: String) -> Value {
    if let (false, Some(list)) = (token.is_empty(), list.as_object_mut()) {
        list.insert("nextPageToken".to_owned(), Value::String(token));
    }
    list
}

impl IntoResponse for BrokerError {
    /// The form of all Google APIs:
    /// <https://cloud.google.com/apis/design/errors#http_mapping>.
    fn into_response(self) -> Response {
        let (code, status) = match &self {
            Self::NotFound(_) => (StatusCode::NOT_FOUND, "NOT_FOUND"),
            Self::AlreadyExists(_) => (StatusCode::CONFLICT, "ALREADY_EXISTS"),
            Self::AckIds(failed) if Self::is_temporary(failed) => {
                (StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE")
            }
            Self::InvalidArgument(_) | Self::AckIds(_) => {
                (StatusCode::BAD_REQUEST, "INVALID_ARGUMENT")
            }
            Self::ResourceExhausted(_) => (StatusCode::TOO_MANY_REQUESTS, "RESOURCE_EXHAUSTED"),
            Self::Unimplemented(_) => (StatusCode::NOT_IMPLEMENTED, "UNIMPLEMENTED"),
            Self::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE"),
        };
        let mut error = json!({
            "code": code.as_u16(),
            "message": self.to_string(),
            "status": status,
        });
        if let Self::AckIds(failed) = self {
            error["details"] = json!([{
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": ACK_IDS_REASON,
                "domain": DOMAIN,
                "metadata": failed,
            }]);
        }
        (code, Json(json!({ "error": error }))).into_response()
    }
}
