mod python;
mod samples;
mod screen;

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use trainyard_emulator::{Broker, Emulator, Options};
use uuid::Uuid;

use super::{Shared, table};
use crate::app;
use crate::config::{Config, ConfigError, Subscription, Task};
use crate::pubsub::{Connection, Outgoing};
use crate::record::Job;
use crate::registry::Registry;
use crate::shutdown::Shutdown;
use crate::store::{Missing, Store};
use crate::worker::{Event, EventKind};
use samples::Sample;
use screen::Screen;

const PROJECT: &str = "trainyard-dev";
const TASK: &str = "train-classifier";
const SLOTS: usize = 2;

/// Run emulator, database, worker and sample jobs in one process.
///
/// Starts the built-in Pub/Sub emulator, a SQLite database and a worker, and
/// publishes sample training requests. One is delivered twice with the same
/// message id. If python3 is installed, one runs as a Python program. Afterwards
/// the command waits for more requests.
#[derive(Debug, Args)]
pub(super) struct Dev {
    /// Stop when the samples have ended; exit 0 if they ended as expected
    #[arg(long)]
    once: bool,
    /// The emulator's port; if it is in use, any free port
    #[arg(long, default_value_t = 8085)]
    port: u16,
    /// The directory for the database, the data set and the models
    #[arg(long, value_name = "DIR", default_value = ".trainyard")]
    dir: PathBuf,
}

impl Dev {
    pub(super) async fn execute(self, shared: &Shared) -> anyhow::Result<ExitCode> {
        refuse_configuration(shared)?;
        let shutdown = Shutdown::on_signals()?;
        // Programs run in another working directory.
        let dir = std::path::absolute(&self.dir).context("cannot find the working directory")?;
        let _lock = lock(&dir)?;
        let dataset = samples::write_dataset(&dir)?;
        let emulator = bind(self.port).await?;
        let address = emulator.address();
        let broker = emulator.broker();
        // The emulator stops last, as a draining worker still acknowledges.
        let emulator_stop = tokio_util::sync::CancellationToken::new();
        let serving = tokio::spawn(emulator.serve(emulator_stop.clone()));

        let mut config = config(&dir, address);
        let with_python = python::is_there().await;
        if with_python {
            let task = python::task(&dir)?;
            config.tasks.insert(python::NAME.to_owned(), task);
        }
        let store = app::open_store(&config, Missing::Create).await?;
        store.migrate(app::tell_who_is_in_the_way).await?;
        let connection = app::connection(&config)?;
        for name in config.subscriptions.keys() {
            connection.ensure_topic(name).await?;
            connection.ensure_subscription(name, name).await?;
        }
        let worker =
            app::build_worker(&config, Registry::new(), Arc::clone(&store), &connection).await?;
        let events = worker.events();
        let of_samples = events.watch();
        let working = tokio::spawn(worker.run(shutdown.clone()));

        println!("Pub/Sub emulator on {address}, project {PROJECT}");
        println!("database         {}", config.database.url);
        if !with_python {
            println!("python3          not found (3.9 or newer), so no sample runs as a program");
        }
        let samples = samples::all(&dataset, &dir, with_python);
        let published = publish(&connection, &broker, samples).await?;
        let watched = tokio::select! {
            watched = watch(of_samples, &published) => Some(watched),
            () = shutdown.draining.cancelled() => None,
        };
        // With --once an interrupted run counts as failed.
        let mut as_expected = !self.once;
        if let Some(jobs) = watched {
            as_expected = report(&store, &jobs?, &published).await?;
            if !self.once {
                print_next_steps(address, &config.database.url, &dataset, &dir);
                tokio::select! {
                    () = shutdown.draining.cancelled() => {}
                    () = print_events(events.watch()) => {}
                }
            }
        }
        println!("stopping");
        shutdown.drain();
        working.await??;
        emulator_stop.cancel();
        serving.await??;
        Ok(match as_expected {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }
}

fn refuse_configuration(shared: &Shared) -> Result<(), ConfigError> {
    match shared.config {
        None => Ok(()),
        Some(_) => Err(ConfigError::Invalid(
            "`dev` takes no --config and no TRAINYARD_CONFIG; use `run`, or unset it".to_owned(),
        )),
    }
}

/// Makes the directory this process's own until the file is dropped. The worker of
/// another `dev` would run some of the samples.
fn lock(dir: &Path) -> anyhow::Result<File> {
    let cannot = || {
        format!(
            "cannot write to {}; --dir sets another directory",
            dir.display()
        )
    };
    std::fs::create_dir_all(dir).with_context(cannot)?;
    let file = File::create(dir.join("dev.lock")).with_context(cannot)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => anyhow::bail!(
            "another `trainyard dev` runs in {}: stop it, or give --dir another directory",
            dir.display()
        ),
        Err(TryLockError::Error(error)) => Err(error).with_context(cannot),
    }
}

async fn bind(port: u16) -> anyhow::Result<Emulator> {
    let address = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    match Emulator::bind(address(port), Options::default()).await {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            println!("port {port} is in use; taking a free one");
            let emulator = Emulator::bind(address(0), Options::default()).await;
            emulator.context("the emulator found no free port")
        }
        bound => bound.with_context(|| format!("the emulator cannot listen on port {port}")),
    }
}

fn config(dir: &Path, emulator: SocketAddr) -> Config {
    let mut config = Config::default();
    config.pubsub.project = Some(PROJECT.to_owned());
    config.pubsub.emulator_host = Some(emulator.to_string());
    config.database.url = format!("sqlite://{}/trainyard.db", dir.display());
    config.worker.slots = SLOTS;
    config.worker.work_dir = Some(dir.join("work"));
    // No other worker could know the task.
    config.worker.unknown_task_patience = Duration::ZERO;
    for name in ["light-task", "heavy-task"] {
        let subscription = Subscription::default();
        config.subscriptions.insert(name.to_owned(), subscription);
    }
    let task = Task {
        builtin: Some(TASK.to_owned()),
        ..Task::default()
    };
    config.tasks.insert(TASK.to_owned(), task);
    config
}

/// A sample and its message's id.
struct Published {
    message_id: String,
    sample: Sample,
}

async fn publish(
    connection: &Connection,
    broker: &Broker,
    samples: Vec<Sample>,
) -> anyhow::Result<Vec<Published>> {
    let mut published = Vec::new();
    for sample in samples {
        let message = Outgoing {
            data: sample.payload.to_string().into_bytes(),
            ..Outgoing::default()
        };
        let message_id = connection.publish(sample.topic, message).await?;
        if sample.delivered_twice {
            let topic = connection.topic_path(sample.topic);
            broker.duplicate(&topic, &message_id)?;
        }
        let twice = match sample.delivered_twice {
            true => ", delivered twice",
            false => "",
        };
        println!(
            "published        {} to {}{twice}",
            sample.title, sample.topic
        );
        published.push(Published { message_id, sample });
    }
    std::io::stdout().flush()?;
    Ok(published)
}

/// Shows events until every sample has ended and every second delivery has been
/// suppressed. Returns the samples' job ids, in the samples' order.
async fn watch(mut events: Receiver<Event>, published: &[Published]) -> anyhow::Result<Vec<Uuid>> {
    let mut screen = Screen::new();
    let mut unfinished: HashMap<&str, Pending> = published
        .iter()
        .map(|published| {
            (
                published.message_id.as_str(),
                Pending::for_sample(published),
            )
        })
        .collect();
    let mut jobs: HashMap<String, Uuid> = HashMap::new();
    while !unfinished.values().all(Pending::is_over) {
        let event = match events.recv().await {
            Ok(event) => event,
            // The channel holds far more events than there are.
            Err(RecvError::Lagged(_)) => anyhow::bail!("events of the samples were lost"),
            Err(RecvError::Closed) => anyhow::bail!("the worker stopped before the samples ended"),
        };
        let Some(pending) = unfinished.get_mut(&*event.message_id) else {
            continue;
        };
        match &event.kind {
            EventKind::Started { job_id, .. } => {
                jobs.insert(event.message_id.to_string(), *job_id);
            }
            EventKind::Suppressed => pending.duplicate = false,
            EventKind::Ended { retry_in: None, .. } | EventKind::Refused { .. } => {
                pending.end = false;
            }
            EventKind::Ended { .. } | EventKind::Progressed(_) | EventKind::Queued => {}
        }
        screen.show(pending.title, &event.kind);
    }
    screen.close();
    Ok(published
        .iter()
        .filter_map(|published| jobs.get(&published.message_id).copied())
        .collect())
}

/// Prints a line for each event until the worker ends.
async fn print_events(mut events: Receiver<Event>) {
    let mut screen = Screen::plain();
    loop {
        match events.recv().await {
            Ok(event) => screen.show(&format!("message {}", event.message_id), &event.kind),
            Err(RecvError::Lagged(missed)) => println!("({missed} events not shown)"),
            Err(RecvError::Closed) => return,
        }
    }
}

/// The events that one sample still waits for.
struct Pending<'a> {
    title: &'a str,
    end: bool,
    duplicate: bool,
}

impl<'a> Pending<'a> {
    fn for_sample(published: &'a Published) -> Self {
        Self {
            title: &published.sample.title,
            end: true,
            duplicate: published.sample.delivered_twice,
        }
    }

    fn is_over(&self) -> bool {
        !self.end && !self.duplicate
    }
}

/// Prints the table, and returns whether all jobs ended as expected.
async fn report(
    store: &Arc<dyn Store>,
    ids: &[Uuid],
    published: &[Published],
) -> anyhow::Result<bool> {
    let mut jobs: Vec<Job> = Vec::new();
    for id in ids {
        jobs.extend(store.job(*id).await?);
    }
    println!("\n{}\n", table::of_jobs(&jobs));
    let mismatches =
        samples::mismatches(&jobs, published.iter().map(|published| &published.sample));
    for mismatch in &mismatches {
        println!("not as expected: {mismatch}");
    }
    if mismatches.is_empty() {
        let duplicates: u32 = jobs.iter().map(|job| job.duplicates).sum();
        println!(
            "{} jobs ran once each; {duplicates} duplicate delivery was suppressed",
            jobs.len()
        );
    }
    Ok(mismatches.is_empty())
}

fn print_next_steps(emulator: SocketAddr, database: &str, dataset: &Path, dir: &Path) {
    let another = samples::another(dataset, dir);
    println!(
        "
Publish more from another terminal:

  export PUBSUB_EMULATOR_HOST={emulator} GOOGLE_CLOUD_PROJECT={PROJECT}
  export TRAINYARD__DATABASE__URL={database}
  cargo run -- publish heavy-task '{another}'
  cargo run -- jobs list

or with any Pub/Sub client that supports PUBSUB_EMULATOR_HOST. The topics are light-task and heavy-task.
Ctrl-C stops."
    );
}
