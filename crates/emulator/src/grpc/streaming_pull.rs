//! The StreamingPull method.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::routing::{MethodRouter, post};
use futures::future::BoxFuture;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1 as proto;
use proto::streaming_pull_response::{
    AcknowledgeConfirmation, ModifyAckDeadlineConfirmation, SubscriptionProperties,
};
use tokio::sync::mpsc::{self, Sender};
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::server::StreamingService;
use tonic::{Code, Response, Status, Streaming};

use super::convert;
use crate::StatusCode;
use crate::broker::{Broker, OpenStream};
use crate::confirmation::Confirmation;
use crate::error::BrokerError;
use crate::resource;
use crate::streams::StreamOptions;

type Answer = Result<proto::StreamingPullResponse, Status>;

pub fn route() -> MethodRouter<Broker> {
    post(async |State(broker): State<Broker>, request: Request| {
        super::codec().streaming(Method { broker }, request).await
    })
}

struct Method {
    broker: Broker,
}

impl StreamingService<proto::StreamingPullRequest> for Method {
    type Response = proto::StreamingPullResponse;
    type ResponseStream = ReceiverStream<Answer>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(
        &mut self,
        requests: tonic::Request<Streaming<proto::StreamingPullRequest>>,
    ) -> Self::Future {
        let broker = self.broker.clone();
        Box::pin(async move {
            let mut requests = requests.into_inner();
            let Some(first) = requests.message().await? else {
                return Err(Status::invalid_argument("The stream has no request."));
            };
            // One response at a time waits for the client, so deliveries that it does not
            // read stay here, available to others.
            let (answers, receiver) = mpsc::channel(1);
            let pull = StreamingPull::open(broker, first, requests, answers)?;
            tokio::spawn(pull.run());
            Ok(Response::new(ReceiverStream::new(receiver)))
        })
    }
}

struct StreamingPull {
    broker: Broker,
    stream: OpenStream,
    requests: Streaming<proto::StreamingPullRequest>,
    answers: Sender<Answer>,
    /// `None` for clients that do not know heartbeats.
    heartbeat: Option<Interval>,
    properties: SubscriptionProperties,
    /// Whether deliveries show their attempt.
    counted: bool,
    /// Ack results still to be sent to the client. Empty unless the subscription has
    /// exactly-once delivery.
    unconfirmed: proto::StreamingPullResponse,
    /// Whether to send nothing.
    silence: watch::Receiver<bool>,
    /// Changes when the stream must end.
    resets: watch::Receiver<StatusCode>,
}

enum End {
    /// The client is gone or has ended the stream.
    ByClient,
    Refused(Status),
}

impl From<BrokerError> for End {
    fn from(error: BrokerError) -> Self {
        Self::Refused(error.into())
    }
}

impl StreamingPull {
    fn open(
        broker: Broker,
        first: proto::StreamingPullRequest,
        requests: Streaming<proto::StreamingPullRequest>,
        answers: Sender<Answer>,
    ) -> Result<Self, BrokerError> {
        let subscription = broker.subscription(&first.subscription)?;
        let options = StreamOptions::new(
            resource::seconds(first.stream_ack_deadline_seconds)?,
            first.max_outstanding_messages,
            first.max_outstanding_bytes,
        );
        let stream = broker.open_stream(&first.subscription, options)?;
        let mut pull = Self {
            heartbeat: (first.protocol_version >= 1)
                .then(|| heartbeats(broker.options().heartbeat)),
            properties: SubscriptionProperties {
                exactly_once_delivery_enabled: subscription.exactly_once,
                message_ordering_enabled: subscription.ordered,
            },
            counted: subscription.dead_letter.is_some(),
            unconfirmed: proto::StreamingPullResponse::default(),
            silence: broker.silence(),
            resets: broker.resets(),
            broker,
            stream,
            requests,
            answers,
        };
        pull.settle(&first)?;
        Ok(pull)
    }

    async fn run(mut self) {
        let closing = self.broker.closing().clone();
        let end = tokio::select! {
            end = self.exchange() => end,
            () = closing.cancelled() => BrokerError::shutting_down().into(),
        };
        // Before the client is told of the end, so that it finds this stream gone.
        drop((self.stream, self.resets));
        if let End::Refused(status) = end {
            // Fails only if the client is gone.
            let _gone = self.answers.send(Err(status)).await;
        }
    }

    async fn exchange(&mut self) -> End {
        loop {
            let may_send = !*self.silence.borrow_and_update();
            let step = tokio::select! {
                // Acks first: they make room for the next deliveries.
                biased;
                request = self.requests.message() => match request {
                    Ok(Some(request)) => self.obey(&request),
                    Ok(None) | Err(_) => Err(End::ByClient),
                },
                () = self.answers.closed() => Err(End::ByClient),
                status = reset(&mut self.resets) => Err(End::Refused(status)),
                Ok(()) = self.silence.changed() => Ok(()),
                () = room(&self.answers), if may_send && self.owes_confirmation() => {
                    let confirmation = std::mem::take(&mut self.unconfirmed);
                    // There is room, since nobody else sends.
                    let _sent = self.answers.try_send(Ok(self.completed(confirmation)));
                    Ok(())
                }
                sent = deliver(&self.stream, &self.answers, self.properties, self.counted),
                    if may_send => sent,
                () = next_heartbeat(&mut self.heartbeat), if may_send => {
                    // A response under way makes a heartbeat unnecessary.
                    let _busy = self.answers.try_send(Ok(self.completed(Default::default())));
                    Ok(())
                }
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// A request after the first.
    fn obey(&mut self, request: &proto::StreamingPullRequest) -> Result<(), End> {
        if !request.subscription.is_empty() && request.subscription != self.stream.subscription {
            return Err(End::Refused(Status::invalid_argument(
                "Only the first request of a stream may name the subscription.",
            )));
        }
        if request.stream_ack_deadline_seconds != 0 {
            let ack_deadline = resource::seconds(request.stream_ack_deadline_seconds)?;
            self.stream.set_ack_deadline(ack_deadline)?;
        }
        Ok(self.settle(request)?)
    }

    /// Applies the acks and ack deadlines in a request.
    fn settle(&mut self, request: &proto::StreamingPullRequest) -> Result<(), BrokerError> {
        if !request.ack_ids.is_empty() {
            let subscription = &self.stream.subscription;
            let acked = self.broker.acknowledge(subscription, &request.ack_ids)?;
            self.confirm_acks(acked);
        }
        let seconds = &request.modify_deadline_seconds;
        let ids = &request.modify_deadline_ack_ids;
        if seconds.len() != ids.len() {
            return Err(BrokerError::InvalidArgument(format!(
                "modify_deadline_seconds has {} entries and modify_deadline_ack_ids {}.",
                seconds.len(),
                ids.len()
            )));
        }
        let mut by_seconds: BTreeMap<i32, Vec<String>> = BTreeMap::new();
        for (seconds, id) in seconds.iter().zip(ids) {
            by_seconds.entry(*seconds).or_default().push(id.clone());
        }
        for (seconds, ids) in by_seconds {
            let subscription = &self.stream.subscription;
            let modified = self
                .broker
                .modify_ack_deadline(subscription, &ids, seconds)?;
            self.confirm_ack_deadlines(modified);
        }
        Ok(())
    }

    fn owes_confirmation(&self) -> bool {
        self.unconfirmed != proto::StreamingPullResponse::default()
    }

    fn confirm_acks(&mut self, settled: Confirmation) {
        if !self.properties.exactly_once_delivery_enabled {
            return;
        }
        let confirmation = &mut self.unconfirmed.acknowledge_confirmation;
        let confirmation = confirmation.get_or_insert_with(AcknowledgeConfirmation::default);
        confirmation.ack_ids.extend(settled.done);
        confirmation.invalid_ack_ids.extend(settled.invalid);
        let temporary = &mut confirmation.temporary_failed_ack_ids;
        temporary.extend(settled.temporary);
        // `unordered_ack_ids` stays empty, since a key has one message out at a time.
    }

    fn confirm_ack_deadlines(&mut self, settled: Confirmation) {
        if !self.properties.exactly_once_delivery_enabled {
            return;
        }
        let confirmation = &mut self.unconfirmed.modify_ack_deadline_confirmation;
        let confirmation = confirmation.get_or_insert_with(ModifyAckDeadlineConfirmation::default);
        confirmation.ack_ids.extend(settled.done);
        confirmation.invalid_ack_ids.extend(settled.invalid);
        let temporary = &mut confirmation.temporary_failed_ack_ids;
        temporary.extend(settled.temporary);
    }

    fn completed(&self, response: proto::StreamingPullResponse) -> proto::StreamingPullResponse {
        proto::StreamingPullResponse {
            subscription_properties: Some(self.properties),
            ..response
        }
    }
}

/// Sends one response. Takes deliveries only when it can send, and does not wait once it
/// has them, so it is cancel-safe.
async fn deliver(
    stream: &OpenStream,
    answers: &Sender<Answer>,
    properties: SubscriptionProperties,
    counted: bool,
) -> Result<(), End> {
    let Ok(place) = answers.reserve().await else {
        return Err(End::ByClient);
    };
    let deliveries = stream.next().await?.into_iter();
    place.send(Ok(proto::StreamingPullResponse {
        received_messages: deliveries
            .map(|delivery| convert::delivery_out(delivery, counted))
            .collect(),
        subscription_properties: Some(properties),
        ..proto::StreamingPullResponse::default()
    }));
    match stream.reset_by_chance() {
        Some(status) => Err(End::Refused(as_reset(status))),
        None => Ok(()),
    }
}

/// Completes when somebody requests that the stream end.
async fn reset(resets: &mut watch::Receiver<StatusCode>) -> Status {
    match resets.changed().await {
        Ok(()) => as_reset(*resets.borrow_and_update()),
        Err(_no_broker) => std::future::pending().await,
    }
}

fn as_reset(status: StatusCode) -> Status {
    let code = Code::from_i32(status as i32);
    Status::new(code, "The emulator was asked to reset the stream.")
}

/// Completes when a response can be sent; never if the client is gone.
async fn room(answers: &Sender<Answer>) {
    match answers.reserve().await {
        Ok(place) => drop(place),
        Err(_gone) => std::future::pending().await,
    }
}

fn heartbeats(period: Duration) -> Interval {
    let mut heartbeats = interval_at(Instant::now() + period, period);
    heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    heartbeats
}

async fn next_heartbeat(heartbeats: &mut Option<Interval>) {
    match heartbeats {
        Some(heartbeats) => drop(heartbeats.tick().await),
        None => std::future::pending().await,
    }
}
