//! Refuses requests that a web page has made a browser send.
//!
//! Any page that a developer visits can have the browser post to a local port, or have its
//! own name lead there. Browsers say which page it was in `Origin`, and which name in `Host`.
//! gRPC needs no check: a page cannot send its content type without being asked first.

use std::net::IpAddr;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Request, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::is_grpc;

/// Who may reach the emulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// This machine, under a name that leads to it only.
    ThisMachine,
    /// Others too, under names that the emulator cannot know.
    Network,
}

pub(super) async fn refuse_foreign(
    State(reach): State<Reach>,
    request: Request<Body>,
    next: Next,
) -> Response {
    if is_grpc(request.headers()) {
        return next.run(request).await;
    }
    match foreign(request.headers(), request.uri(), reach) {
        None => next.run(request).await,
        Some(header) => {
            let message = format!(
                "The {header} of the request is foreign: only this machine's own pages and programs may use the emulator."
            );
            let error = json!({"code": 403, "message": message, "status": "PERMISSION_DENIED"});
            (StatusCode::FORBIDDEN, Json(json!({ "error": error }))).into_response()
        }
    }
}

/// The name of the header that is foreign.
fn foreign(headers: &HeaderMap, uri: &Uri, reach: Reach) -> Option<&'static str> {
    let text = |name| {
        headers
            .get(name)
            .map(|value| value.to_str().unwrap_or_default())
    };
    if let Some(origin) = text(header::ORIGIN) {
        let host = origin.parse::<Uri>().ok();
        if !host.is_some_and(|origin| origin.host().is_some_and(is_this_machine)) {
            return Some("Origin");
        }
    }
    let host = text(header::HOST).map(|host| host.parse::<Authority>());
    let is_known = match (uri.authority(), &host) {
        // HTTP/2 has it in the URI.
        (Some(authority), _) => is_local_name(authority.host()),
        (None, Some(Ok(authority))) => is_local_name(authority.host()),
        (None, Some(Err(_))) => false,
        (None, None) => true,
    };
    (reach == Reach::ThisMachine && !is_known).then_some("Host")
}

/// An address cannot be made to lead elsewhere, as a name can.
fn is_local_name(host: &str) -> bool {
    is_localhost(host) || address(host).is_some()
}

fn is_this_machine(host: &str) -> bool {
    is_localhost(host) || address(host).is_some_and(|address| address.is_loopback())
}

fn is_localhost(host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    host == "localhost" || host.ends_with(".localhost")
}

fn address(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[')
        .trim_end_matches(']')
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(host: &str, origin: Option<&str>, reach: Reach) -> Option<&'static str> {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        foreign(&headers, &Uri::from_static("/v1/x"), reach)
    }

    #[test]
    fn programs_and_pages_of_this_machine_may_use_it() {
        for host in [
            "localhost:8085",
            "127.0.0.1:8085",
            "[::1]:8085",
            "a.localhost",
            "10.0.0.7",
        ] {
            for origin in [
                None,
                Some("http://localhost:3000"),
                Some("http://127.0.0.1"),
            ] {
                assert_eq!(
                    judged(host, origin, Reach::ThisMachine),
                    None,
                    "{host} {origin:?}"
                );
            }
        }
    }

    #[test]
    fn pages_of_others_may_not() {
        for origin in [
            "https://evil.example",
            "null",
            "http://10.0.0.7",
            "http://localhost.evil.example",
        ] {
            for reach in [Reach::ThisMachine, Reach::Network] {
                let judged = judged("localhost:8085", Some(origin), reach);
                assert_eq!(judged, Some("Origin"), "{origin}");
            }
        }
    }

    #[test]
    fn a_foreign_name_may_lead_to_it_only_if_it_serves_the_network() {
        for host in ["evil.example:8085", "emulator:8085", "bad host"] {
            assert_eq!(judged(host, None, Reach::ThisMachine), Some("Host"));
            assert_eq!(judged(host, None, Reach::Network), None);
        }
    }
}
