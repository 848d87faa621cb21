//! Settings that affect delivery and that the emulator lacks: refused, since ignoring
//! them silently would mislead a test.

use super::error::BrokerError;

/// A feature, and whether the request asks for it.
pub struct Asked(pub &'static str, pub bool);

/// # Errors
/// `Unimplemented`, naming the first feature that is asked for.
pub fn refuse(features: &[Asked]) -> Result<(), BrokerError> {
    match features.iter().find(|Asked(_, asked)| *asked) {
        Some(Asked(feature, _)) => Err(BrokerError::unimplemented(feature)),
        None => Ok(()),
    }
}
