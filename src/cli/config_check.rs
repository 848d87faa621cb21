use clap::{Args, Subcommand};

use super::Shared;
use crate::config::timeline;

/// Look at the configuration.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Check it, and print what is in force
    Check(Check),
}

/// Prints the configuration in force, from all layers and with secrets masked,
/// then per task what happens when.
#[derive(Debug, Args)]
pub(super) struct Check {}

impl ConfigCommand {
    pub(super) fn execute(self, shared: &Shared) -> anyhow::Result<()> {
        let Self::Check(Check {}) = self;
        let config = shared.load()?;
        println!("{}", toml::to_string(&config.masked())?);
        match config.tasks.is_empty() {
            true => println!("# no tasks are configured"),
            false => {
                for line in timeline(&config).lines() {
                    println!("# {line}");
                }
            }
        }
        Ok(())
    }
}
