#![doc = include_str!("../README.md")]

// Three layers:
//
// - `engine` (`feed`, `backlog`, `streams`, `faults`): a state machine without
//   clock or I/O. Time is an argument, so every rule is tested with made-up
//   instants.
// - `broker`: the engine behind a lock, the clock, and the waking of waiters.
// - `grpc`, `rest` and `admin`: the protocols, each no more than a translation.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderMap, Request, header};
use axum::response::Response;
use axum::serve::ListenerExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

mod ack_id;
mod admin;
mod backlog;
mod broker;
mod confirmation;
mod engine;
mod error;
mod faults;
mod feed;
mod grpc;
mod message;
mod name;
mod origin;
mod resource;
mod rest;
mod stream_id;
mod streams;
mod unsupported;

pub use broker::Broker;
pub use error::BrokerError;
pub use faults::{BadFaults, Faults};
pub use google_cloud_gax::error::rpc::Code as StatusCode;
use origin::Reach;

/// The largest request that is read. Well above the 10 MB that may be published, also in
/// base64, so that a slightly too large request gets Pub/Sub's own answer.
const MAX_REQUEST_BODY_BYTES: usize = 64 << 20;

/// How long connections may take to end at shutdown.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(5);

/// How an emulator behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// How often a quiet stream gets an empty response. Pub/Sub: about 30 s.
    pub heartbeat: Duration,
    /// The memory that messages may occupy, including an estimate of their overhead.
    /// Beyond it, publishing fails with `RESOURCE_EXHAUSTED`.
    pub max_retained_bytes: usize,
    /// How long a unary pull waits for a first message.
    pub pull_wait: Duration,
    /// The faults in force from the start.
    pub faults: Faults,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(30),
            max_retained_bytes: 1 << 30,
            pull_wait: Duration::from_secs(5),
            faults: Faults::default(),
        }
    }
}

/// An emulator that listens, and answers once it is served.
#[derive(Debug)]
pub struct Emulator {
    listener: TcpListener,
    address: SocketAddr,
    reach: Reach,
    broker: Broker,
}

impl Emulator {
    /// Listens on an address; port 0 takes any free port.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn bind(address: SocketAddr, options: Options) -> std::io::Result<Self> {
        Self::of(address, Broker::new(options)).await
    }

    /// Listens on an address again, for the broker of an emulator that has shut down.
    /// To clients this is a restart without loss: topics, subscriptions, messages,
    /// outstanding deliveries and their ack ids stay valid. Ack deadlines keep running
    /// in the meantime.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn bind_again(address: SocketAddr, broker: &Broker) -> std::io::Result<Self> {
        Self::of(address, broker.for_another_server()).await
    }

    async fn of(address: SocketAddr, broker: Broker) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let reach = match address.ip().is_loopback() {
            true => Reach::ThisMachine,
            false => Reach::Network,
        };
        Ok(Self {
            reach,
            address: listener.local_addr()?,
            listener,
            broker,
        })
    }

    /// The address it listens on, with the actual port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The broker, for use within the process.
    pub fn broker(&self) -> Broker {
        self.broker.clone()
    }

    /// Answers until `shutdown` is cancelled. Open streams then end with `UNAVAILABLE`,
    /// so that clients reconnect. Connections that have not ended after 5 seconds are
    /// dropped.
    ///
    /// # Errors
    /// The listener fails.
    pub async fn serve(self, shutdown: CancellationToken) -> std::io::Result<()> {
        let closing = self.broker.closing().clone();
        // Also when this future is dropped, so that no stream outlives it.
        let _close = closing.clone().drop_guard();
        let quick = self.listener.tap_io(|connection: &mut TcpStream| {
            // Sends small responses at once. Fails only if the client is gone.
            let _gone = connection.set_nodelay(true);
        });
        let stopping = shutdown.clone();
        let server = axum::serve(quick, router(&self.broker, self.reach))
            .with_graceful_shutdown(async move { stopping.cancelled().await });
        let stop = async {
            shutdown.cancelled().await;
            closing.cancel();
            tokio::time::sleep(SHUTDOWN_PATIENCE).await;
        };
        let serve = async {
            let (served, ()) = tokio::join!(server.into_future(), self.broker.run_timers());
            served
        };
        tokio::select! {
            served = serve => served,
            () = stop => Ok(()),
        }
    }
}

fn router(broker: &Broker, reach: Reach) -> Router {
    Router::new()
        .merge(grpc::router(broker.clone()))
        .merge(rest::router(broker.clone()))
        .merge(admin::router(broker.clone()))
        .fallback(unknown)
        .layer(axum::middleware::from_fn_with_state(
            reach,
            origin::refuse_foreign,
        ))
        .layer(DefaultBodyLimit::max(MAX_REQUEST_BODY_BYTES))
}

async fn unknown(request: Request<axum::body::Body>) -> Response {
    let path = request.uri().path();
    if is_grpc(request.headers()) {
        return grpc::unimplemented(path);
    }
    rest::unknown(path)
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}
