//! Values as every database can store them.

use std::borrow::Cow;

use super::StoreError;
use crate::job::FinalState;
use crate::report::Progress;

/// The ledger keeps at most this many duplicates of a job; the count goes on.
pub(super) const MAX_DUPLICATES_IN_LEDGER: u32 = 50;

/// Why a job is parked.
pub(super) fn too_many_crashes(max_crashes: u32) -> String {
    format!(
        "its worker was lost {max_crashes} times while running it; it is parked so that it takes no more workers down"
    )
}

pub(super) fn final_state(state: &str) -> Option<FinalState> {
    match state {
        "succeeded" => Some(FinalState::Succeeded),
        "dead" => Some(FinalState::Dead),
        "cancelled" => Some(FinalState::Cancelled),
        _ => None,
    }
}

/// Text as every database can store it: Postgres has no NUL in text.
pub(super) fn storable(text: &str) -> Cow<'_, str> {
    if text.contains('\0') {
        return Cow::Owned(text.replace('\0', "\u{FFFD}"));
    }
    Cow::Borrowed(text)
}

/// JSON as text, in which a NUL is an escape and so can be stored.
pub(super) fn json_text(value: &impl serde::Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Unreadable(error.to_string()))
}

/// A progress series as JSON, without NaN and infinities: JSON has no number for them.
pub(super) fn series_text(series: &[Progress]) -> Result<String, StoreError> {
    let mut series = series.to_vec();
    for report in &mut series {
        report.metrics.retain(|_, figure| figure.is_finite());
    }
    json_text(&series)
}

pub(super) fn from_json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Unreadable(error.to_string()))
}
