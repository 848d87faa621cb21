//! Loads the layers. A later one overrides an earlier one: built-in defaults,
//! `config/default.toml`, `--config FILE`, `TRAINYARD__SECTION__KEY` variables.

use std::env;
use std::path::Path;

use config::builder::DefaultState;
use config::{ConfigBuilder, File, FileFormat};

use super::environment;
use super::error::ConfigError;
use super::nearest::nearest;
use super::{Config, problems};

const DEFAULT_FILE: &str = "config/default.toml";

/// Loads all layers and checks them.
///
/// # Errors
/// A [`ConfigError`] that names the key.
pub fn load(file: Option<&Path>) -> Result<Config, ConfigError> {
    let mut layers = config::Config::builder()
        .add_source(File::new(DEFAULT_FILE, FileFormat::Toml).required(false));
    if let Some(path) = file {
        if !path.exists() {
            return Err(ConfigError::NoSuchFile {
                path: path.display().to_string(),
            });
        }
        layers = layers.add_source(File::from(path).format(FileFormat::Toml));
    }
    let built = |layers: ConfigBuilder<DefaultState>| {
        layers.build().map_err(|error| ConfigError::Unreadable {
            reason: without_quotation(&error.to_string()),
        })
    };
    let files = built(layers.clone())?;
    let variables = environment::layer(env::vars_os(), &files)?;
    let variables = File::from_str(&variables, FileFormat::Toml);
    let mut config = typed(built(layers.add_source(variables))?)?;
    fill_from_well_known_variables(&mut config, |name| env::var(name).ok());
    problems::check(&config)?;
    Ok(config)
}

/// Loads and checks TOML text alone.
#[cfg(test)]
pub(super) fn from_toml(text: &str) -> Result<Config, ConfigError> {
    let merged = config::Config::builder()
        .add_source(File::from_str(text, FileFormat::Toml))
        .build()
        .map_err(|error| ConfigError::Unreadable {
            reason: without_quotation(&error.to_string()),
        })?;
    let config = typed(merged)?;
    problems::check(&config)?;
    Ok(config)
}

/// The parser quotes the line, which may hold a password, below the place of the error.
fn without_quotation(error: &str) -> String {
    let is_quotation = |line: &&str| {
        let number = line
            .trim_start()
            .trim_start_matches(|c: char| c.is_ascii_digit());
        number.trim_start().starts_with('|')
    };
    let lines = error.lines().filter(|line| !is_quotation(line));
    lines.map(str::trim).collect::<Vec<_>>().join(": ")
}

fn typed(merged: config::Config) -> Result<Config, ConfigError> {
    serde_path_to_error::deserialize(merged).map_err(|error| {
        let path = error.path().to_string();
        explain(&path, &error.into_inner().to_string())
    })
}

/// Turns serde's error about a key into ours.
fn explain(path: &str, reason: &str) -> ConfigError {
    let Some(rest) = reason.split("unknown field `").nth(1) else {
        // The loader's message repeats the key.
        let reason = reason.split(" for key `").next().unwrap_or(reason);
        let expected = |what: &str| reason.ends_with(&format!("expected {what}"));
        let reason = match reason {
            _ if expected("a duration") => {
                "write a duration with its unit, such as \"90s\" or \"2m\""
            }
            _ if expected("a sequence") => "write a list, such as [\"sh\", \"-c\", \"date\"]",
            reason => reason,
        };
        return ConfigError::BadValue {
            key: path.to_owned(),
            reason: reason.to_owned(),
        };
    };
    let mut names = rest.split('`');
    let unknown = names.next().unwrap_or_default();
    let known = names.skip(1).step_by(2);
    let section = path.strip_suffix(unknown).unwrap_or(path).trim_matches('.');
    let within = |name: &str| match section {
        "" => name.to_owned(),
        section => format!("{section}.{name}"),
    };
    ConfigError::UnknownKey {
        key: within(unknown),
        nearest: nearest(unknown, known)
            .filter(|name| !name.contains('.'))
            .map(|name| within(&name)),
    }
}

/// The variables of Google's tools and clients.
fn fill_from_well_known_variables(config: &mut Config, variable: impl Fn(&str) -> Option<String>) {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let pubsub = &mut config.pubsub;
    if pubsub.emulator_host.is_none() {
        pubsub.emulator_host = set("PUBSUB_EMULATOR_HOST");
    }
    if pubsub.project.is_none() {
        pubsub.project = set("GOOGLE_CLOUD_PROJECT").or_else(|| set("PUBSUB_PROJECT_ID"));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::AckTiming;

    #[test]
    fn a_whole_configuration_is_read() {
        let config = from_toml(
            r#"
            [pubsub]
            project = "p"
            [worker]
            slots = 4
            lease = "90s"
            [subscriptions.heavy-task]
            ack_deadline = "1m"
            [tasks.train-classifier]
            builtin = "train-classifier"
            ack = "before_run"
            timeout = "12h"
            "#,
        )
        .unwrap();
        assert_eq!(config.worker.slots, 4);
        assert_eq!(config.worker.lease, Duration::from_secs(90));
        let task = &config.tasks["train-classifier"];
        assert_eq!(task.ack, AckTiming::BeforeRun);
        assert_eq!(task.timeout, Some(Duration::from_secs(12 * 3600)));
    }

    #[test]
    fn the_place_of_an_error_is_told_without_its_line() {
        let text = "[database]\nurl = \"postgres://u:s3cret@h/db\n";
        let error = from_toml(text).unwrap_err().to_string();
        assert!(
            error.contains("line 2, column 32: invalid basic string"),
            "{error}"
        );
        assert!(!error.contains("s3cret"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_named_with_the_nearest_known_one() {
        for (text, key, nearest) in [
            ("[worker]\nslot = 1", "worker.slot", "worker.slots"),
            ("[wroker]\nslots = 1", "wroker", "worker"),
            (
                "[tasks.t]\ntimeot = '1h'",
                "tasks.t.timeot",
                "tasks.t.timeout",
            ),
        ] {
            let error = from_toml(text).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("unknown configuration key `{key}`; did you mean `{nearest}`?")
            );
        }
    }

    #[test]
    fn the_key_of_a_mistyped_value_is_named() {
        for (text, key) in [
            ("[worker]\nslots = 'many'", "worker.slots"),
            ("[worker]\nlease = '2 fortnights'", "worker.lease"),
            ("[tasks.t]\nack = 'sometime'", "tasks.t.ack"),
            ("[tasks.t]\ncommand = 'sh -c date'", "tasks.t.command"),
            (
                "[subscriptions.s]\nwithout_dedupe_key = 'deadletter'",
                "subscriptions.s.without_dedupe_key",
            ),
        ] {
            let error = from_toml(text).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("configuration key `{key}`: ")),
                "{error}"
            );
        }
    }

    #[test]
    fn googles_variables_fill_only_unset_keys() {
        let mut config = Config::default();
        config.pubsub.project = Some("mine".to_owned());
        fill_from_well_known_variables(&mut config, |name| Some(format!("from {name}")));
        assert_eq!(config.pubsub.project.as_deref(), Some("mine"));
        assert_eq!(
            config.pubsub.emulator_host.as_deref(),
            Some("from PUBSUB_EMULATOR_HOST")
        );
    }
}
