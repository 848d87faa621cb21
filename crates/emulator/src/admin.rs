//! The emulator's faults over HTTP and JSON, which Pub/Sub does not have.
//!
//! - `GET /`: for health checks.
//! - `GET /emulator/faults`: the faults in force.
//! - `PUT /emulator/faults`: replaces them; faults not named are off.
//! - `POST /emulator/streams/reset?status=UNAVAILABLE`: ends all streams.

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Broker;
use super::error::BrokerError;
use super::faults::{BadFaults, Faults, status_named};

type Answer = Result<Json<Value>, BrokerError>;

pub fn router(broker: Broker) -> Router {
    Router::new()
        .route("/", get(|| async { "Ok\n" }))
        .route("/emulator/faults", get(faults).put(set_faults))
        .route("/emulator/streams/reset", post(reset_streams))
        .with_state(broker)
}

async fn faults(State(broker): State<Broker>) -> Json<Value> {
    Json(broker.faults().to_json())
}

async fn set_faults(State(broker): State<Broker>, body: Result<Bytes, BytesRejection>) -> Answer {
    let body = body.map_err(|rejection| invalid(rejection.body_text()))?;
    let given: Map<String, Value> = serde_json::from_slice(&body)
        .map_err(|error| invalid(format!("The body is no JSON object: {error}.")))?;
    broker.set_faults(Faults::from_json(&given)?);
    Ok(faults(State(broker)).await)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reset {
    #[serde(default = "unavailable")]
    status: String,
}

fn unavailable() -> String {
    "UNAVAILABLE".to_owned()
}

async fn reset_streams(
    State(broker): State<Broker>,
    reset: Result<Query<Reset>, QueryRejection>,
) -> Answer {
    let Query(reset) = reset.map_err(|rejection| invalid(rejection.body_text()))?;
    let status = status_named(&reset.status)?;
    Ok(Json(json!({ "reset": broker.reset_streams(status) })))
}

fn invalid(why: String) -> BrokerError {
    BrokerError::InvalidArgument(why)
}

impl From<BadFaults> for BrokerError {
    fn from(bad: BadFaults) -> Self {
        Self::InvalidArgument(bad.to_string())
    }
}
