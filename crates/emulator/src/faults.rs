//! Faults of the emulator on request.
//!
//! All randomness comes from one generator with one seed, so a run can be repeated if
//! requests arrive in the same order.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use google_cloud_gax::error::rpc::Code;
use serde_json::{Map, Value, json};

mod dice;
#[cfg(test)]
mod tests;

pub(super) use dice::{Dice, Moment};

const NAMES: &str = "duplicates, dropped-acks, resets, silence, latency, out-of-order and seed";

/// The faults of an emulator; none by default. Probabilities go from 0 to 1.
///
/// As text: `duplicates=0.1,dropped-acks=0.05,resets=0.01:UNAVAILABLE,silence,
/// latency=50ms..200ms,out-of-order=0.2,seed=7`, in any order, each optional.
#[derive(Debug, Clone, PartialEq)]
pub struct Faults {
    /// `None` draws a seed at the start, and keeps the generator when faults are changed
    /// later.
    pub seed: Option<u64>,
    /// How likely a delivery is followed by a duplicate. Not on subscriptions with
    /// exactly-once delivery.
    pub duplicates: f64,
    /// How likely an ack is ignored. On a subscription with exactly-once delivery the
    /// client is told to retry it.
    pub dropped_acks: f64,
    /// How likely a stream ends after a response with messages.
    pub resets: f64,
    /// The status that it ends with.
    pub reset_status: Code,
    /// Streams stay open, but nothing is sent on them, not even a heartbeat.
    pub silence: bool,
    /// How much later a message becomes ready: a random time from this range, for each
    /// delivery anew.
    pub latency: RangeInclusive<Duration>,
    /// How likely a redelivered message is put behind a random ready one. The order of a
    /// key is kept.
    pub out_of_order: f64,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            seed: None,
            duplicates: 0.0,
            dropped_acks: 0.0,
            resets: 0.0,
            reset_status: Code::Unavailable,
            silence: false,
            latency: Duration::ZERO..=Duration::ZERO,
            out_of_order: 0.0,
        }
    }
}

/// Why a text does not describe faults.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadFaults(String);

impl Faults {
    /// Whether any fault is on.
    pub fn any(&self) -> bool {
        let off = Self {
            seed: self.seed,
            reset_status: self.reset_status,
            ..Self::default()
        };
        *self != off
    }

    /// Reads a JSON object with the names of the text form.
    ///
    /// # Errors
    /// There is no such fault, or it cannot have this value.
    pub(super) fn from_json(given: &Map<String, Value>) -> Result<Self, BadFaults> {
        let mut faults = Self::default();
        for (name, value) in given {
            match value {
                Value::String(text) => faults.set(name, text)?,
                other => faults.set(name, &other.to_string())?,
            }
        }
        Ok(faults)
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "seed": self.seed,
            "duplicates": self.duplicates,
            "dropped-acks": self.dropped_acks,
            "resets": format!("{}:{}", self.resets, self.reset_status),
            "silence": self.silence,
            "latency": latency_text(&self.latency),
            "out-of-order": self.out_of_order,
        })
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), BadFaults> {
        let bad =
            |expected: &str| BadFaults(format!("{name} is \"{value}\"; it must be {expected}"));
        match name {
            "duplicates" => self.duplicates = probability(value).map_err(bad)?,
            "dropped-acks" => self.dropped_acks = probability(value).map_err(bad)?,
            "out-of-order" => self.out_of_order = probability(value).map_err(bad)?,
            "resets" => {
                let (chance, status) = value.split_once(':').unwrap_or((value, "UNAVAILABLE"));
                self.resets = probability(chance).map_err(bad)?;
                self.reset_status = status_named(status)?;
            }
            "silence" => {
                self.silence = match value {
                    "" | "true" => true,
                    "false" => false,
                    _ => return Err(bad("true or false")),
                }
            }
            "latency" => self.latency = latency(value).map_err(bad)?,
            "seed" => self.seed = Some(value.parse().map_err(|_| bad("a whole number"))?),
            _ => {
                return Err(BadFaults(format!(
                    "there is no fault \"{name}\"; there are {NAMES}"
                )));
            }
        }
        Ok(())
    }
}

impl FromStr for Faults {
    type Err = BadFaults;

    fn from_str(text: &str) -> Result<Self, BadFaults> {
        let mut faults = Self::default();
        let parts = text.split(',').map(str::trim);
        for part in parts.filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            faults.set(name.trim(), value.trim())?;
        }
        Ok(faults)
    }
}

/// Shows the faults that are on, without the seed.
impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        let chances = [
            ("duplicates", self.duplicates),
            ("dropped-acks", self.dropped_acks),
            ("out-of-order", self.out_of_order),
        ];
        for (name, chance) in chances.iter().filter(|(_, chance)| *chance > 0.0) {
            parts.push(format!("{name}={chance}"));
        }
        if self.resets > 0.0 {
            parts.push(format!("resets={}:{}", self.resets, self.reset_status));
        }
        if !self.latency.end().is_zero() {
            parts.push(format!("latency={}", latency_text(&self.latency)));
        }
        if self.silence {
            parts.push("silence".to_owned());
        }
        if parts.is_empty() {
            parts.push("none".to_owned());
        }
        f.write_str(&parts.join(","))
    }
}

/// A gRPC status by its name.
pub(super) fn status_named(name: &str) -> Result<Code, BadFaults> {
    Code::try_from(name).map_err(|_unknown| {
        BadFaults(format!(
            "\"{name}\" is no gRPC status; it must be a name such as UNAVAILABLE"
        ))
    })
}

fn probability(text: &str) -> Result<f64, &'static str> {
    let given: Option<f64> = text.parse().ok();
    let given = given.filter(|chance| (0.0..=1.0).contains(chance));
    given.ok_or("a number from 0 to 1")
}

fn latency(text: &str) -> Result<RangeInclusive<Duration>, &'static str> {
    let (least, most) = text.split_once("..").unwrap_or((text, text));
    let duration = |text: &str| humantime::parse_duration(text.trim()).ok();
    match (duration(least), duration(most)) {
        (Some(least), Some(most)) if least <= most => Ok(least..=most),
        _ => Err("a duration such as 200ms, or a range such as 50ms..200ms"),
    }
}

fn latency_text(latency: &RangeInclusive<Duration>) -> String {
    let [least, most] =
        [latency.start(), latency.end()].map(|&end| humantime::format_duration(end));
    if latency.start() == latency.end() {
        return most.to_string();
    }
    format!("{least}..{most}")
}
