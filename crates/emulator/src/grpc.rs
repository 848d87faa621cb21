//! The Publisher and Subscriber services over gRPC.
//!
//! The generated crate has clients only, so the methods are routes here: one
//! line each in [`router`].

use axum::Router;
use axum::extract::{Request, State};
use axum::routing::{MethodRouter, post};
use futures::future::BoxFuture;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1 as proto;
use tonic::codec::Codec;
use tonic::server::{Grpc, UnaryService};
use tonic::{Response, Status};
use tonic_prost::ProstCodec;

use super::Broker;
use super::MAX_REQUEST_BODY_BYTES;
use super::engine::PageRequest;
use super::error::BrokerError;

mod convert;
mod status;
mod streaming_pull;

/// The gRPC methods as HTTP routes.
pub fn router(broker: Broker) -> Router {
    Router::new()
        .merge(publisher())
        .merge(subscriber())
        .with_state(broker)
}

/// The answer to a gRPC call of an unknown method.
pub fn unimplemented(path: &str) -> axum::response::Response {
    let status: Status = BrokerError::unimplemented(path.trim_start_matches('/')).into();
    status.into_http()
}

fn publisher() -> Router<Broker> {
    let path = |method: &str| format!("/google.pubsub.v1.Publisher/{method}");
    Router::new()
        .route(&path("CreateTopic"), simple(create_topic))
        .route(&path("GetTopic"), simple(get_topic))
        .route(&path("ListTopics"), simple(list_topics))
        .route(
            &path("ListTopicSubscriptions"),
            simple(list_topic_subscriptions),
        )
        .route(&path("DeleteTopic"), simple(delete_topic))
        .route(&path("Publish"), simple(publish))
}

fn subscriber() -> Router<Broker> {
    let path = |method: &str| format!("/google.pubsub.v1.Subscriber/{method}");
    Router::new()
        .route(&path("CreateSubscription"), simple(create_subscription))
        .route(&path("GetSubscription"), simple(get_subscription))
        .route(&path("ListSubscriptions"), simple(list_subscriptions))
        .route(&path("DeleteSubscription"), simple(delete_subscription))
        .route(&path("Acknowledge"), simple(acknowledge))
        .route(&path("ModifyAckDeadline"), simple(modify_ack_deadline))
        .route(&path("Pull"), unary(pull))
        .route(&path("StreamingPull"), streaming_pull::route())
}

fn create_topic(broker: &Broker, topic: proto::Topic) -> Result<proto::Topic, BrokerError> {
    let topic = convert::topic_in(topic)?;
    broker.create_topic(topic.clone())?;
    Ok(convert::topic_out(topic))
}

fn get_topic(
    broker: &Broker,
    request: proto::GetTopicRequest,
) -> Result<proto::Topic, BrokerError> {
    broker.topic(&request.topic).map(convert::topic_out)
}

fn list_topics(
    broker: &Broker,
    request: proto::ListTopicsRequest,
) -> Result<proto::ListTopicsResponse, BrokerError> {
    let page = page(request.page_size, request.page_token);
    let listed = broker.topics(&request.project, &page)?;
    Ok(proto::ListTopicsResponse {
        topics: listed.items.into_iter().map(convert::topic_out).collect(),
        next_page_token: listed.next_token,
    })
}

fn list_topic_subscriptions(
    broker: &Broker,
    request: proto::ListTopicSubscriptionsRequest,
) -> Result<proto::ListTopicSubscriptionsResponse, BrokerError> {
    let page = page(request.page_size, request.page_token);
    let listed = broker.topic_subscriptions(&request.topic, &page)?;
    Ok(proto::ListTopicSubscriptionsResponse {
        subscriptions: listed.items,
        next_page_token: listed.next_token,
    })
}

fn delete_topic(broker: &Broker, request: proto::DeleteTopicRequest) -> Result<(), BrokerError> {
    broker.delete_topic(&request.topic)
}

fn publish(
    broker: &Broker,
    request: proto::PublishRequest,
) -> Result<proto::PublishResponse, BrokerError> {
    let messages = request.messages.into_iter().map(convert::message_in);
    let message_ids = broker.publish(&request.topic, messages.collect())?;
    Ok(proto::PublishResponse { message_ids })
}

fn create_subscription(
    broker: &Broker,
    subscription: proto::Subscription,
) -> Result<proto::Subscription, BrokerError> {
    let subscription = convert::subscription_in(subscription)?;
    let created = broker.create_subscription(subscription)?;
    Ok(convert::subscription_out(created))
}

fn get_subscription(
    broker: &Broker,
    request: proto::GetSubscriptionRequest,
) -> Result<proto::Subscription, BrokerError> {
    let found = broker.subscription(&request.subscription)?;
    Ok(convert::subscription_out(found))
}

fn list_subscriptions(
    broker: &Broker,
    request: proto::ListSubscriptionsRequest,
) -> Result<proto::ListSubscriptionsResponse, BrokerError> {
    let page = page(request.page_size, request.page_token);
    let listed = broker.subscriptions(&request.project, &page)?;
    let items = listed.items.into_iter();
    Ok(proto::ListSubscriptionsResponse {
        subscriptions: items.map(convert::subscription_out).collect(),
        next_page_token: listed.next_token,
    })
}

fn delete_subscription(
    broker: &Broker,
    request: proto::DeleteSubscriptionRequest,
) -> Result<(), BrokerError> {
    broker.delete_subscription(&request.subscription)
}

fn acknowledge(broker: &Broker, request: proto::AcknowledgeRequest) -> Result<(), BrokerError> {
    let settled = broker.acknowledge(&request.subscription, &request.ack_ids)?;
    settled.into_answer()
}

fn modify_ack_deadline(
    broker: &Broker,
    request: proto::ModifyAckDeadlineRequest,
) -> Result<(), BrokerError> {
    let settled = broker.modify_ack_deadline(
        &request.subscription,
        &request.ack_ids,
        request.ack_deadline_seconds,
    )?;
    settled.into_answer()
}

#[expect(
    deprecated,
    reason = "return_immediately is deprecated in Pub/Sub, and still in use"
)]
async fn pull(
    broker: Broker,
    request: proto::PullRequest,
) -> Result<proto::PullResponse, BrokerError> {
    let subscription = broker.subscription(&request.subscription)?;
    let deliveries = broker
        .pull_up_to(
            &request.subscription,
            request.max_messages,
            request.return_immediately,
        )
        .await?;
    let counted = subscription.dead_letter.is_some();
    let received = deliveries.into_iter();
    Ok(proto::PullResponse {
        received_messages: received
            .map(|d| convert::delivery_out(d, counted))
            .collect(),
    })
}

fn page(size: i32, token: String) -> PageRequest {
    PageRequest { size, token }
}

/// A method that answers at once.
fn simple<Req, Res>(
    call: impl Fn(&Broker, Req) -> Result<Res, BrokerError> + Clone + Send + Sync + 'static,
) -> MethodRouter<Broker>
where
    Req: Send + 'static,
    Res: Send + 'static,
    ProstCodec<Res, Req>: Codec<Encode = Res, Decode = Req>,
{
    unary(move |broker: Broker, request| {
        let answer = call(&broker, request);
        async { answer }
    })
}

/// A method with one request and one response.
fn unary<Req, Res, Call, Answer>(call: Call) -> MethodRouter<Broker>
where
    Req: Send + 'static,
    Res: Send + 'static,
    ProstCodec<Res, Req>: Codec<Encode = Res, Decode = Req>,
    Call: Fn(Broker, Req) -> Answer + Clone + Send + Sync + 'static,
    Answer: Future<Output = Result<Res, BrokerError>> + Send + 'static,
{
    post(
        async move |State(broker): State<Broker>, request: Request| {
            codec().unary(Method { broker, call }, request).await
        },
    )
}

/// The framing, with room for the largest message: 10 MB and its attributes.
fn codec<Req, Res>() -> Grpc<ProstCodec<Res, Req>>
where
    ProstCodec<Res, Req>: Codec<Encode = Res, Decode = Req>,
{
    Grpc::new(ProstCodec::default())
        .max_decoding_message_size(MAX_REQUEST_BODY_BYTES)
        .max_encoding_message_size(usize::MAX)
}

struct Method<Call> {
    broker: Broker,
    call: Call,
}

impl<Req, Res, Call, Answer> UnaryService<Req> for Method<Call>
where
    Call: Fn(Broker, Req) -> Answer,
    Answer: Future<Output = Result<Res, BrokerError>> + Send + 'static,
{
    type Response = Res;
    type Future = BoxFuture<'static, Result<Response<Res>, Status>>;

    fn call(&mut self, request: tonic::Request<Req>) -> Self::Future {
        let answer = (self.call)(self.broker.clone(), request.into_inner());
        Box::pin(async { Ok(Response::new(answer.await?)) })
    }
}
