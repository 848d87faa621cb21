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
To try it, `trainyard dev` runs everything on this machine, with sample jobs.

Exit codes: 0 success, 2 invalid configuration or command line, 1 any other failure.
Logs go to stderr. RUST_LOG=debug shows more.";

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
    /// A TOML configuration file. It overrides config/default.toml, and
    /// TRAINYARD__SECTION__KEY variables override both
    #[arg(long, global = true, value_name = "FILE", env = "TRAINYARD_CONFIG")]
    config: Option<PathBuf>,
    /// The format of log lines: text or json
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

impl Shared {
    fn load(&self) -> Result<Config, ConfigError> {
        config::load(self.config.as_deref())
    }
}

#[derive(Debug, Subcommand)]
// The help text of a command is at its type.
enum Command {
    Dev(dev::Dev),
    Run(run::Run),
    Migrate(migrate::Migrate),
    Publish(publish::Publish),
    /// List, show, cancel and retry jobs
    #[command(subcommand)]
    Jobs(jobs::Jobs),
    Explain(explain::Explain),
    /// Check the configuration
    #[command(subcommand)]
    Config(config_check::ConfigCommand),
    Emulator(emulator::Emulator),
}

/// Parses the arguments and runs the command.
///
/// # Errors
/// Why the command failed, for the user.
pub async fn main() -> anyhow::Result<ExitCode> {
    let Cli { shared, command } = Cli::parse();
    let default_level = match &command {
        Command::Run(_) | Command::Emulator(_) => "info",
        // Their output is enough.
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

/// Prints a line. If the reader has closed the pipe, as `head` does, the process
/// exits.
fn print(line: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => Ok(written?),
    }
}
