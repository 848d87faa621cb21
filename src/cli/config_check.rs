use std::ffi::OsStr;

use clap::{Args, Subcommand};

use super::Shared;
use crate::app;
use crate::config::{Config, timeline};
use crate::executor::check_command;
use crate::registry::work_dir_of_commands;

/// Check the configuration.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    Check(Check),
}

/// Check the configuration and print the settings in force.
///
/// Prints the settings of all layers, with secrets masked, and a timeline of each
/// task. Compares the settings of the subscriptions in Pub/Sub, where this user may
/// read them.
#[derive(Debug, Args)]
pub(super) struct Check {
    /// Do not connect to Pub/Sub
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
        warn_of_missing_settings(&config);
        warn_of_commands(&config);
        work_dir_of_commands(&config).await?;
        if !offline {
            check_subscriptions(&config).await;
        }
        Ok(())
    }
}

/// `run` needs settings that other commands, such as `jobs list`, do not.
fn warn_of_missing_settings(config: &Config) {
    let refused = [
        (config.pubsub.project.is_none(), "no project is set"),
        (
            config.subscriptions.is_empty(),
            "no subscription is configured",
        ),
        (config.tasks.is_empty(), "no task is configured"),
        (
            config
                .tasks
                .values()
                .any(|task| task.builtin.is_none() && task.command.is_none()),
            "a task has neither `command` nor `builtin`, and only an embedding program can register it",
        ),
    ];
    for (_, reason) in refused.iter().filter(|(refused, _)| *refused) {
        println!("# warning: `trainyard run` refuses this configuration: {reason}");
    }
}

/// Checks this machine, which may not be the worker's.
fn warn_of_commands(config: &Config) {
    let own_path = std::env::var_os("PATH");
    for (name, task) in &config.tasks {
        let Some(command) = &task.command else {
            continue;
        };
        let path = task.env.get("PATH").map(OsStr::new);
        let checked = check_command(command, task.cwd.as_deref(), path.or(own_path.as_deref()));
        if let Err(reason) = checked {
            println!("# warning: task {name} cannot run on this machine: {reason}");
        }
        for unset in task
            .pass_env
            .iter()
            .filter(|name| std::env::var_os(name).is_none())
        {
            println!("# warning: `pass_env` of task {name} names {unset}, which is not set here");
        }
        if task.memory.is_some() && task.gpus > 0 {
            println!(
                "# warning: task {name} has `memory` and `gpus`: CUDA reserves far more address space than it uses and may fail to start"
            );
        }
    }
}

fn comment(text: &str) {
    for line in text.lines() {
        println!("# {line}");
    }
}

/// Compares the subscriptions in Pub/Sub with the configuration.
async fn check_subscriptions(config: &Config) {
    let Ok(connection) = app::connection(config) else {
        println!("# subscriptions: not checked, as no project is set");
        return;
    };
    for name in config.subscriptions.keys() {
        match connection.subscription(name).await {
            Ok(facts) => {
                println!("# subscription {name}: found");
                for concern in app::concerns_about(&facts, config) {
                    println!("# warning: subscription {name}: {concern}");
                }
            }
            Err(error) => println!("# subscription {name}: not checked: {error}"),
        }
    }
}
