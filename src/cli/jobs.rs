use std::borrow::Cow;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::table::SHORT_ID;
use super::{Shared, print, table};
use crate::app;
use crate::record::{AttemptRecord, Cancelling, Job, JobFilter, JobState, Retrying};
use crate::store::{Missing, Store};

/// List, show, cancel and retry jobs.
#[derive(Debug, Subcommand)]
pub(super) enum Jobs {
    /// List jobs, newest first
    List(List),
    /// Show the details of a job
    Show(Show),
    /// Cancel a job
    ///
    /// A waiting job ends at once. A running job is asked to stop within seconds,
    /// on any worker, and has its stop grace to end.
    Cancel(One),
    /// Run a job again
    ///
    /// A job that has ended, whatever its outcome, gets a new attempt with the same
    /// payload and its last checkpoint. If a job waits for its next attempt, the
    /// attempt starts now.
    Retry(One),
}

#[derive(Debug, Args)]
pub(super) struct One {
    /// The job's id, or its end as `jobs list` prints it
    id: String,
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// Only jobs in this state: running, waiting, succeeded, dead or cancelled
    #[arg(long)]
    state: Option<JobState>,
    /// Only jobs of this task
    #[arg(long)]
    task: Option<String>,
    /// How many jobs at most
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Show {
    /// The job's id, or its end as `jobs list` prints it
    id: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Jobs {
    pub(super) async fn execute(self, shared: &Shared) -> anyhow::Result<()> {
        let store = app::open_store(&shared.load()?, Missing::Fail).await?;
        store.check_schema().await?;
        match self {
            Self::List(list) => {
                let filter = JobFilter {
                    state: list.state,
                    task: list.task,
                    limit: list.limit,
                };
                print_list(&store.jobs(&filter).await?, list.json)
            }
            Self::Show(show) => {
                let id = whole_id(&*store, &show.id).await?;
                let job = store.job(id).await?;
                let job = job.with_context(|| format!("there is no job {}", show.id))?;
                let attempts = store.attempts(id).await?;
                print_job(&job, &attempts, show.json)
            }
            Self::Cancel(one) => cancel(&*store, &one.id).await,
            Self::Retry(one) => retry(&*store, &one.id).await,
        }
    }
}

async fn cancel(store: &dyn Store, id: &str) -> anyhow::Result<()> {
    let id = whole_id(store, id).await?;
    match store.cancel(id, &requester()).await? {
        None => anyhow::bail!("there is no job {id}"),
        Some(Cancelling::Cancelled) => print(&format!("job {id} is cancelled")),
        Some(Cancelling::Requested) => print(&format!(
            "job {id} is running; its worker stops it within seconds"
        )),
        Some(Cancelling::AlreadyEnded(state)) => {
            anyhow::bail!(
                "job {id} has already ended: its state is {}",
                state.as_str()
            )
        }
    }
}

async fn retry(store: &dyn Store, id: &str) -> anyhow::Result<()> {
    let id = whole_id(store, id).await?;
    match store.retry(id, &requester()).await? {
        None => anyhow::bail!("there is no job {id}"),
        Some(Retrying::Queued) => print(&format!(
            "job {id} runs again as soon as a worker that knows its task has room"
        )),
        Some(Retrying::Hurried) => print(&format!(
            "job {id} was waiting; its next attempt starts as soon as a worker that knows its task has room"
        )),
        Some(Retrying::Running) => anyhow::bail!("job {id} is running"),
        Some(Retrying::NothingToRun) => anyhow::bail!(
            "job {id} cannot run again: its message names no task, or is no longer stored"
        ),
    }
}

/// The user, for the ledger.
fn requester() -> String {
    let user = std::env::var("USER").ok().filter(|user| !user.is_empty());
    user.map_or_else(
        || "command line".to_owned(),
        |user| format!("command line, {user}"),
    )
}

async fn whole_id(store: &dyn Store, id: &str) -> anyhow::Result<Uuid> {
    if let Ok(id) = id.parse() {
        return Ok(id);
    }
    let hexadecimal = id.chars().all(|digit| digit.is_ascii_hexdigit());
    anyhow::ensure!(
        hexadecimal && id.len() >= SHORT_ID,
        "`{id}` is not a job id: give the whole id, or at least its last {SHORT_ID} digits"
    );
    let ids = store.job_ids_ending_with(&id.to_lowercase(), 2).await?;
    match ids[..] {
        [] => anyhow::bail!("there is no job {id}"),
        [id] => Ok(id),
        _ => anyhow::bail!("several job ids end with {id}; give more digits"),
    }
}

fn print_list(jobs: &[Job], json: bool) -> anyhow::Result<()> {
    if !json {
        return print(&match jobs.is_empty() {
            true => "no jobs".to_owned(),
            false => table::of_jobs(jobs),
        });
    }
    for job in jobs {
        print(&serde_json::to_string(job)?)?;
    }
    Ok(())
}

fn print_job(job: &Job, attempts: &[AttemptRecord], json: bool) -> anyhow::Result<()> {
    if !json {
        let text = table::of_one_job(job) + &table::of_attempts(attempts);
        return print(text.trim_end());
    }
    let payload = job.payload.as_deref().map(Payload::of);
    print(&serde_json::to_string_pretty(&WholeJob {
        job,
        attempts_told: attempts,
        payload,
    })?)
}

#[derive(Serialize)]
struct WholeJob<'a> {
    #[serde(flatten)]
    job: &'a Job,
    attempts_told: &'a [AttemptRecord],
    payload: Option<Payload<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Payload<'a> {
    /// As it was published, digit by digit.
    Json(&'a RawValue),
    NotJson(Cow<'a, str>),
}

impl<'a> Payload<'a> {
    fn of(data: &'a [u8]) -> Self {
        match serde_json::from_slice(data) {
            Ok(json) => Self::Json(json),
            Err(_) => Self::NotJson(String::from_utf8_lossy(data)),
        }
    }
}
