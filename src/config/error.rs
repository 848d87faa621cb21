//! Why a configuration cannot be used.

/// A configuration that cannot be used. Nothing has started yet.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration file {path} does not exist; give --config the path of a TOML file")]
    NoSuchFile { path: String },
    #[error("cannot read the configuration: {reason}")]
    Unreadable { reason: String },
    #[error("unknown configuration key `{key}`{}", suggestion(.nearest.as_deref()))]
    UnknownKey {
        key: String,
        nearest: Option<String>,
    },
    #[error("configuration key `{key}`: {reason}")]
    BadValue { key: String, reason: String },
    #[error("{0}")]
    Invalid(String),
}

fn suggestion(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |name| format!("; did you mean `{name}`?"))
}

pub(super) fn bad_value(key: &str, reason: &str) -> Result<(), ConfigError> {
    Err(ConfigError::BadValue {
        key: key.to_owned(),
        reason: reason.to_owned(),
    })
}
