use std::ffi::OsStr;

use clap::{Args, Subcommand};

use super::Shared;
use crate::app;
use crate::config::{Config, timeline};
use crate::executor::check_command;
use crate::registry::work_dir_of_commands;

/// Look at the configuration.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    Check(Check),
}

/// Check it, and print what is in force.
///
/// Prints the configuration in force, from all layers and with secrets masked,
/// then per task what happens when. Compares it with the subscriptions in
/// Pub/Sub, as far as they can be looked at.
#[derive(Debug, Args)]
pub(super) struct Check {
    /// Do not look at Pub/Sub
    #[arg(long)]
    offline: bool,
}

impl ConfigCommand {
    pub(super) async fn execute(self, shared: &Shared) -> anyhow::Result<()> {
        let Self::Check(Check { offline }) = self;
        let config = shared.load()?;
        println!("{}", toml::to_string(&config.masked())?);
        match config.tasks.is_empty() {
            true => println!("# no tasks are configured"),
            false => comment(&timeline(&config)),
        }
        warn_of_what_run_refuses(&config);
        warn_of_commands(&config);
        work_dir_of_commands(&config).await?;
        if !offline {
            check_retention(&config).await;
        }
        Ok(())
    }
}

/// A configuration may be whole for `jobs list` and not for `run`.
fn warn_of_what_run_refuses(config: &Config) {
    let refused = [
        (config.pubsub.project.is_none(), "no project is set"),
        (config.subscriptions.is_empty(), "nothing is subscribed"),
        (config.tasks.is_empty(), "no task is configured"),
        (
            config
                .tasks
                .values()
                .any(|task| task.builtin.is_none() && task.command.is_none()),
            "a task with neither `command` nor `builtin` needs a program that registers it",
        ),
    ];
    for (_, reason) in refused.iter().filter(|(refused, _)| *refused) {
        println!("# warning: `trainyard run` refuses this: {reason}");
    }
}

/// Of the machine that this is run on, which may not be the worker's.
fn warn_of_commands(config: &Config) {
    let own_path = std::env::var_os("PATH");
    for (name, task) in &config.tasks {
        let Some(command) = &task.command else {
            continue;
        };
        let path = task.env.get("PATH").map(OsStr::new);
        let checked = check_command(command, task.cwd.as_deref(), path.or(own_path.as_deref()));
        if let Err(reason) = checked {
            println!("# warning: task {name} cannot be run here: {reason}");
        }
        for unset in task
            .pass_env
            .iter()
            .filter(|name| std::env::var_os(name).is_none())
        {
            println!("# warning: task {name} is to be passed {unset}, which is not set here");
        }
        if task.memory.is_some() && task.gpus > 0 {
            println!(
                "# warning: task {name} has `memory` and `gpus`: CUDA reserves far more address space than it uses, and may not start within the limit"
            );
        }
    }
}

fn comment(text: &str) {
    for line in text.lines() {
        println!("# {line}");
    }
}

/// A message that Pub/Sub still has when the guard has forgotten it would run
/// a second time.
async fn check_retention(config: &Config) {
    let Ok(connection) = app::connection(config) else {
        println!("# subscriptions: not compared, since no project is set");
        return;
    };
    for name in config.subscriptions.keys() {
        match connection.message_retention_of(name).await {
            Ok(kept) if kept > config.guard.retention => println!(
                "# warning: subscription {name} keeps messages for {}, longer than [guard] retention = {}: one that is delivered again after that would run a second time",
                humantime::format_duration(kept),
                humantime::format_duration(config.guard.retention)
            ),
            Ok(_) => println!("# subscription {name}: found"),
            Err(error) => println!("# subscription {name}: not compared: {error}"),
        }
    }
}
