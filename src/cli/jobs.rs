use anyhow::Context;
use clap::{Args, Subcommand};
use uuid::Uuid;

use super::{Shared, table};
use crate::app;
use crate::job::{Job, JobFilter, JobState};

/// Look at jobs.
#[derive(Debug, Subcommand)]
pub(super) enum Jobs {
    /// List jobs, newest first
    List(List),
    /// Show all that is known about one job
    Show(Show),
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// Only jobs in this state: running, waiting, succeeded, dead or cancelled
    #[arg(long)]
    state: Option<JobState>,
    /// Only jobs of this task
    #[arg(long)]
    task: Option<String>,
    /// At most so many
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// One JSON object per line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Show {
    /// The job's id, as `jobs list` prints it
    id: Uuid,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl Jobs {
    pub(super) async fn execute(self, shared: &Shared) -> anyhow::Result<()> {
        let store = app::open_store(&shared.load()?).await?;
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
                let job = store.job(show.id).await?;
                let job = job.with_context(|| format!("there is no job {}", show.id))?;
                print_job(&job, show.json)
            }
        }
    }
}

fn print_list(jobs: &[Job], json: bool) -> anyhow::Result<()> {
    if json {
        for job in jobs {
            println!("{}", serde_json::to_string(job)?);
        }
        return Ok(());
    }
    match jobs.is_empty() {
        true => println!("no jobs"),
        false => println!("{}", table::of_jobs(jobs)),
    }
    Ok(())
}

fn print_job(job: &Job, json: bool) -> anyhow::Result<()> {
    match json {
        true => println!("{}", serde_json::to_string_pretty(job)?),
        false => print!("{}", table::of_one_job(job)),
    }
    Ok(())
}
