//! The command line: one file per command.

mod config_check;
mod dev;
mod emulator;
mod explain;
mod jobs;
mod migrate;
mod publish;
mod run;
mod table;

use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{self, Config, ConfigError};
use crate::telemetry::{self, LogFormat};

const AFTER_HELP: &str = "\
First time here? `trainyard dev` runs everything on this machine, with sample jobs.

Exit codes: 0 done, 2 the configuration must be mended, 1 any other failure.
Logs go to stderr; RUST_LOG=debug shows more.";

/// Runs machine-learning training requests from Google Cloud Pub/Sub, each once.
#[derive(Debug, Parser)]
#[command(version, after_help = AFTER_HELP, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    shared: Shared,
    #[command(subcommand)]
    command: Command,
}

/// Options that every command takes.
#[derive(Debug, Args)]
struct Shared {
    /// A TOML configuration file; settings in it win over config/default.toml,
    /// and TRAINYARD__SECTION__KEY variables win over both.
    #[arg(long, global = true, value_name = "FILE", env = "TRAINYARD_CONFIG")]
    config: Option<PathBuf>,
    /// How log lines look: text or json.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

impl Shared {
    fn load(&self) -> Result<Config, ConfigError> {
        config::load(self.config.as_deref())
    }
}

#[derive(Debug, Subcommand)]
// What a command says of itself stands at its own type.
enum Command {
    Dev(dev::Dev),
    Run(run::Run),
    Migrate(migrate::Migrate),
    Publish(publish::Publish),
    /// Look at jobs, cancel them, run them again
    #[command(subcommand)]
    Jobs(jobs::Jobs),
    Explain(explain::Explain),
    /// Look at the configuration
    #[command(subcommand)]
    Config(config_check::ConfigCommand),
    Emulator(emulator::Emulator),
}

/// Parses the arguments and runs the command.
///
/// # Errors
/// What the command could not do, in words for whoever typed it.
pub async fn main() -> anyhow::Result<ExitCode> {
    let Cli { shared, command } = Cli::parse();
    let default_level = match &command {
        Command::Run(_) | Command::Emulator(_) => "info",
        // Their own output tells what happens.
        _ => "warn",
    };
    let _logs = telemetry::install(shared.log_format, default_level);
    let done = match command {
        Command::Dev(command) => return command.execute(&shared).await,
        Command::Run(command) => command.execute(&shared).await,
        Command::Migrate(command) => command.execute(&shared).await,
        Command::Publish(command) => command.execute(&shared).await,
        Command::Jobs(command) => command.execute(&shared).await,
        Command::Explain(command) => command.execute(&shared).await,
        Command::Config(command) => command.execute(&shared).await,
        Command::Emulator(command) => command.execute().await,
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Prints a line. Whoever closes the pipe, as `head` does, has read enough.
fn say(line: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => Ok(written?),
    }
}
