//! Logs: levels from `RUST_LOG`, as text or as JSON lines.

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;

use tracing::field::Field;
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::{Writer, debug_fn};

use crate::printable::line;

/// The format of log lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line, for log collectors.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("write text or json".to_owned()),
        }
    }
}

/// Sends logs to stderr. Dropping the returned guard flushes them.
/// `default_level` applies if `RUST_LOG` is not set.
///
/// A separate thread writes them, so that a blocked stderr does not stop the
/// renewal of leases. When 128,000 lines are waiting, further ones are lost.
#[must_use]
pub fn install(format: LogFormat, default_level: &str) -> Option<WorkerGuard> {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new(format!("{default_level},sqlx=warn")));
    let (writer, guard) = tracing_appender::non_blocking(std::io::stderr());
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // An error means that a subscriber is already installed, as in a test.
    let installed = match format {
        LogFormat::Text => logs
            .fmt_fields(debug_fn(write_field).delimited(" "))
            .try_init(),
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    };
    installed.is_ok().then_some(guard)
}

/// Values may hold what a message, a program or a broker has said.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let value = format!("{value:?}");
    match field.name() {
        "message" => write!(writer, "{}", line(&value)),
        name => write!(writer, "{name}={}", line(&value)),
    }
}
