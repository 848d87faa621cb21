use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;

use clap::{Args, Subcommand};

use super::{Shared, print};
use crate::app::{self, pubsub_checks};
use crate::config::{Config, ConfigError, timeline};
use crate::executor::check_command;
use crate::printable::{indented, line};
use crate::record::UnknownTask;
use crate::registry::work_dir_of_commands;
use crate::store::{Missing, SchemaError, Store};

/// Check the configuration.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    Check(Check),
}

/// Check the configuration and print the settings in force.
///
/// Prints the settings of all layers, with secrets masked, and a timeline of each
/// task. Compares them with the database, and with the subscriptions and topics in Pub/Sub,
/// where this user may read those; fails if `trainyard run` would refuse one.
#[derive(Debug, Args)]
pub(super) struct Check {
    /// Do not connect to the database and to Pub/Sub
    #[arg(long)]
    offline: bool,
}

impl ConfigCommand {
    pub(super) async fn execute(self, shared: &Shared) -> anyhow::Result<()> {
        let Self::Check(Check { offline }) = self;
        let config = shared.load()?;
        print(&toml::to_string(&config.masked())?)?;
        match config.tasks.is_empty() {
            true => remark("no tasks are configured")?,
            false => remark(&timeline(&config))?,
        }
        let refusals = refusals(&config);
        let refusals = refusals
            .iter()
            .map(|why| format!("`trainyard run` refuses this configuration: {why}"));
        for warning in refusals.chain(concerns_about_commands(&config)) {
            remark(&format!("warning: {warning}"))?;
        }
        work_dir_of_commands(&config).await?;
        match offline {
            true => Ok(()),
            false => {
                check_database(&config).await?;
                check_subscriptions(&config).await
            }
        }
    }
}

/// `run` needs settings that other commands, such as `jobs list`, do not.
fn refusals(config: &Config) -> Vec<String> {
    let missing = [
        (config.pubsub.project.is_none(), "no project is set"),
        (
            config.subscriptions.is_empty(),
            "no subscription is configured",
        ),
        (config.tasks.is_empty(), "no task is configured"),
    ];
    let missing = missing.into_iter().filter(|(is_missing, _)| *is_missing);
    let missing = missing.map(|(_, why)| why.to_owned());
    let tasks = config.tasks.iter();
    let unregistered = tasks.filter(|(_, task)| task.builtin.is_none() && task.command.is_none());
    let unregistered = unregistered.map(|(name, _)| {
        format!(
            "[tasks.{name}] has neither `command` nor `builtin`, and only an embedding program can register it"
        )
    });
    missing.chain(unregistered).collect()
}

/// Checks this machine, which may not be the worker's.
fn concerns_about_commands(config: &Config) -> Vec<String> {
    let own_path = std::env::var_os("PATH");
    let mut concerns = Vec::new();
    for (name, task) in &config.tasks {
        let Some(command) = &task.command else {
            continue;
        };
        let path = task.env.get("PATH").map(OsStr::new);
        let checked = check_command(command, task.cwd.as_deref(), path.or(own_path.as_deref()));
        if let Err(reason) = checked {
            concerns.push(format!("task {name} cannot run on this machine: {reason}"));
        }
        let unset = task.pass_env.iter();
        for unset in unset.filter(|name| std::env::var_os(name).is_none()) {
            concerns.push(format!(
                "`pass_env` of task {name} names {unset}, which is not set here"
            ));
        }
        if task.memory.is_some() && task.gpus > 0 {
            concerns.push(format!(
                "task {name} has `memory` and `gpus`: CUDA reserves far more address space than it uses and may fail to start"
            ));
        }
    }
    concerns
}

/// # Errors
/// It can never hold the tables.
async fn check_database(config: &Config) -> anyhow::Result<()> {
    let store = match app::open_store(config, Missing::Fail).await {
        Ok(store) => store,
        Err(error) => return remark(&format!("database: not checked: {error:#}")),
    };
    match store.check_schema().await {
        Ok(()) => {
            remark("database: checked")?;
            warn_of_unknown_tasks(config, &*store).await
        }
        Err(unfit @ SchemaError::Unfit(_)) => Err(ConfigError::Invalid(unfit.to_string()).into()),
        Err(error) => remark(&format!("warning: database: {error}")),
    }
}

/// Tells of waiting jobs that nobody runs, nor would with this configuration.
async fn warn_of_unknown_tasks(config: &Config, store: &dyn Store) -> anyhow::Result<()> {
    let unknown = match store.unknown_tasks().await {
        Ok(unknown) => unknown,
        Err(error) => return remark(&format!("unknown tasks: not checked: {error}")),
    };
    let connection = app::connection(config).ok();
    let own: BTreeSet<&str> = config
        .subscriptions
        .keys()
        .map(|name| match &connection {
            Some(connection) => connection.short_name(name),
            None => name,
        })
        .collect();
    for UnknownTask {
        subscription,
        task,
        jobs,
    } in unknown
    {
        if own.contains(&*subscription) && config.tasks.contains_key(&task) {
            continue;
        }
        let jobs = match jobs {
            1 => "1 job waits".to_owned(),
            many => format!("{many} jobs wait"),
        };
        remark(&format!(
            "warning: subscription {}: {jobs} for a worker that knows the task `{}`; none does now, nor would one with this configuration",
            line(&subscription),
            line(&task)
        ))?;
    }
    Ok(())
}

/// Compares the subscriptions in Pub/Sub with the configuration.
///
/// # Errors
/// The first subscription that `run` would refuse.
async fn check_subscriptions(config: &Config) -> anyhow::Result<()> {
    let Ok(connection) = app::connection(config) else {
        return remark("subscriptions: not checked, as no project is set");
    };
    pubsub_checks::check_names(&connection, config)?;
    let mut refused = None;
    let mut known = BTreeMap::new();
    for name in config.subscriptions.keys() {
        match pubsub_checks::check(&connection, name, config, &mut known).await {
            Ok(concerns) => {
                remark(&format!("subscription {name}: checked"))?;
                for concern in concerns {
                    remark(&format!("warning: subscription {name}: {concern}"))?;
                }
            }
            Err(error) if error.is::<ConfigError>() => {
                remark(&format!(
                    "subscription {name}: `trainyard run` refuses it: {error}"
                ))?;
                refused.get_or_insert(error);
            }
            Err(error) => remark(&format!("subscription {name}: not checked: {error}"))?,
        }
    }
    pubsub_checks::check_circles(&connection, config, &known)?;
    refused.map_or(Ok(()), Err)
}

/// Prints a comment, since the output is the configuration.
fn remark(text: &str) -> anyhow::Result<()> {
    print(&format!("# {}", indented(text, "# ")))
}
