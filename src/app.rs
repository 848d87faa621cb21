//! The composition root: wires the parts together.

pub(crate) mod pubsub_checks;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use tracing::{info, warn};
use uuid::Uuid;

use crate::config::{self, Config, ConfigError, Database};
use crate::database_url;
use crate::devices::Devices;
use crate::executor::subprocess::{run_as_keeper_if_asked, tidy_work_dir};
use crate::guard::Guard;
use crate::nvidia;
use crate::pubsub::{Connection, Publishers, Pulling, Subscription};
use crate::registry::{ConfiguredTasks, Registry, work_dir_of_commands};
use crate::shutdown::Shutdown;
use crate::store::{self, ClaimTerms, Missing, Store};
use crate::worker::{Source, Worker};

/// Loads the configuration and runs a worker with the given tasks until a signal stops it:
/// the whole `main` of a program that embeds trainyard.
///
/// For each job of a task with a `command` the program starts itself again, as the job's
/// keeper. A `main` that does more than call this must first call
/// [`crate::run_as_keeper_if_asked`].
///
/// # Errors
/// [`ConfigError`] for an unusable configuration; any other error if the database or
/// Pub/Sub cannot be reached at the start.
pub async fn run(config_file: Option<&Path>, registry: Registry) -> anyhow::Result<()> {
    run_as_keeper_if_asked();
    let config = config::load(config_file)?;
    run_worker(config, registry, false).await
}

/// Runs a worker until a signal stops it; with `migrate`, first brings the database's schema
/// up to date.
///
/// # Errors
/// As [`run`].
pub async fn run_worker(config: Config, registry: Registry, migrate: bool) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals().context("signals cannot be handled")?;
    let store = match migrate {
        true => {
            let store = open_store(&config, Missing::Create).await?;
            store.migrate(tell_who_is_in_the_way).await?;
            store
        }
        false => {
            let store = open_store(&config, Missing::Fail).await?;
            store.check_schema().await?;
            store
        }
    };
    let connection = connection(&config)?;
    let worker = build_worker(&config, registry, store, &connection).await?;
    Ok(worker.run(shutdown).await?)
}

/// Logs who holds the lock that a migration waits for.
pub fn tell_who_is_in_the_way(holders: &str) {
    warn!(
        holders,
        "the migration waits for a lock on the tables, and tries again; workers go on meanwhile"
    );
}

/// Opens the database that the configuration names.
///
/// # Errors
/// The database cannot be reached.
pub async fn open_store(config: &Config, missing: Missing) -> anyhow::Result<Arc<dyn Store>> {
    let database = &config.database;
    let what_to_do = match (database.url.starts_with("sqlite:"), missing) {
        (true, Missing::Create) => "check [database] url, and that the folder can be written",
        (true, Missing::Fail) => "check [database] url; `trainyard migrate` makes a new database",
        (false, _) => "check [database] url, and that the server is up",
    };
    let Database {
        url,
        max_connections,
        pooler,
    } = &config.database;
    store::open(url, *max_connections, *pooler, missing)
        .await
        .with_context(|| {
            format!(
                "cannot open {} ({what_to_do})",
                database_url::masked(&database.url)
            )
        })
}

/// Connects to the configured Pub/Sub.
///
/// # Errors
/// No project is set.
pub fn connection(config: &Config) -> Result<Connection, ConfigError> {
    let project = config.pubsub.project.as_deref().ok_or_else(|| {
        ConfigError::Invalid(
            "no Google Cloud project is set: set `project` under [pubsub], GOOGLE_CLOUD_PROJECT or PUBSUB_PROJECT_ID"
                .to_owned(),
        )
    })?;
    Ok(Connection::new(
        project,
        config.pubsub.emulator_host.as_deref(),
    ))
}

/// Wires a worker: its tasks, its guard, its subscriptions.
///
/// # Errors
/// [`ConfigError`] if nothing is subscribed, a task is missing, or a subscription does
/// not exist; any other error if Pub/Sub cannot be reached.
pub async fn build_worker(
    config: &Config,
    registry: Registry,
    store: Arc<dyn Store>,
    connection: &Connection,
) -> anyhow::Result<Worker> {
    let tasks = registry.configure(&config.tasks, &config.worker)?;
    if tasks.is_empty() {
        return Err(invalid(
            "no task is configured: add a section such as [tasks.train-classifier] with `builtin = \"train-classifier\"`",
        ));
    }
    let work_dir = work_dir_of_commands(config).await?;
    if config.subscriptions.is_empty() {
        return Err(invalid(
            "no subscription is configured: add a section [subscriptions.NAME]",
        ));
    }
    pubsub_checks::check_names(connection, config)?;
    let mut pulled = Vec::new();
    let mut known = BTreeMap::new();
    for (name, settings) in &config.subscriptions {
        for concern in pubsub_checks::check(connection, name, config, &mut known).await? {
            warn!(subscription = name, "{concern}");
        }
        let pulling = Pulling {
            ack_deadline: settings.ack_deadline,
            slots: config.worker.slots,
            prefetch: settings.prefetch,
            quiet_limit: settings.quiet_limit,
        };
        pulled.push((name, settings, pulling));
    }
    pubsub_checks::check_circles(connection, config, &known)?;
    let streams = pulled.iter().map(|(_, _, pulling)| pulling.streams());
    let clients = connection.clients(streams.sum());
    let subscriptions = pulled.into_iter().map(|(name, settings, pulling)| {
        let path = connection.subscription_path(name);
        Source {
            name: connection.short_name(name).to_owned(),
            settings: settings.clone(),
            subscription: Subscription::new(clients.clone(), path, pulling),
        }
    });
    let terms = ClaimTerms {
        worker: worker_name().into(),
        lease: config.worker.lease,
        max_crashes: config.guard.max_crashes,
    };
    info!(
        worker = %terms.worker,
        project = connection.project(),
        slots = config.worker.slots,
        tasks = tasks.names().collect::<Vec<_>>().join(", "),
        subscriptions = config.subscriptions.keys().cloned().collect::<Vec<_>>().join(", "),
        "ready"
    );
    let devices = nvidia::devices(&config.worker.gpus).await;
    warn_of_missing_gpus(&tasks, &devices);
    if let Some(work_dir) = work_dir {
        tokio::spawn(tidy_work_dir(work_dir));
    }
    let guard = Guard::new(store, terms);
    Ok(Worker::new(
        config.worker.clone(),
        guard,
        tasks,
        subscriptions.collect(),
        Publishers::new(connection.clone()),
        devices,
        config.guard.retention,
    ))
}

/// Another worker may have enough GPUs, so such a task's jobs wait in the table.
fn warn_of_missing_gpus(tasks: &ConfiguredTasks, devices: &Devices) {
    for task in tasks.iter() {
        let (needed, there) = (task.settings.gpus, devices.total());
        if needed > there {
            warn!(
                task = task.name,
                needed,
                there,
                "this worker has too few GPUs for the task and leaves its jobs to others"
            );
        }
    }
}

fn invalid(reason: &str) -> anyhow::Error {
    ConfigError::Invalid(reason.to_owned()).into()
}

/// Tells workers apart in the tables and the logs: host (a pod's name), process id and a
/// random part, since a restarted container has the same first two.
fn worker_name() -> String {
    let host = std::env::var("HOSTNAME")
        .ok()
        .or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok())
        .map_or_else(|| "worker".to_owned(), |host| host.trim().to_owned());
    let random = Uuid::new_v4().simple().to_string();
    format!("{host}/{}/{}", std::process::id(), &random[..6])
}
