//! The result, from the runs' own log and from the tables.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use sqlx::FromRow;
use uuid::Uuid;

use super::load::{Load, Published};
use super::{EARLY, LATE, Marathon, RESTARTS};
use crate::crashes::checker::{disorder, overlaps, unfinished};
use crate::support::runs::{RunEvent, RunLine};
use crate::support::worker::Death;

/// A job, how many endings the ledger has for it, and the attempt of the last one.
#[derive(Debug, FromRow)]
struct JobRow {
    job_id: Uuid,
    subscription: String,
    message_id: String,
    state: String,
    duplicates: i32,
    endings: i64,
    attempt: Option<i32>,
}

const JOBS: &str = "
SELECT m.job_id, m.subscription, m.message_id, m.state, m.duplicates,
       count(ledger.id) AS endings, max(ledger.attempt) AS attempt
FROM processed_messages m
LEFT JOIN ledger ON ledger.subscription = m.subscription AND ledger.key = m.key
                AND ledger.kind = 'finished'
GROUP BY m.subscription, m.key";

const CRASHES: &str = "SELECT count(*) FROM ledger WHERE kind = 'taken_over'";
const QUEUE: &str = "SELECT count(*) FROM leases";

pub struct Verdict {
    messages: usize,
    jobs: usize,
    in_the_queue: i64,
    with_a_key: usize,
    delivered_again: usize,
    kills: usize,
    runs: usize,
    crashes: i64,
    duplicates: i64,
    failed_deliveries: u64,
    lost: Vec<String>,
    twice: Vec<String>,
    overlaps: Vec<String>,
}

/// Jobs by subscription and message id.
type JobsOf<'a> = HashMap<(&'a str, &'a str), Vec<&'a JobRow>>;

impl Verdict {
    pub async fn of(marathon: &Marathon, load: &Load, deaths: &[Death]) -> Self {
        let mut connection = marathon.connection().await;
        let jobs: Vec<JobRow> = sqlx::query_as(JOBS)
            .fetch_all(&mut connection)
            .await
            .unwrap();
        let mut count = async |sql| {
            let counted = sqlx::query_scalar(sql).fetch_one(&mut connection).await;
            counted.unwrap()
        };
        let (crashes, in_the_queue) = (count(CRASHES).await, count(QUEUE).await);
        let lines = marathon.runs.lines();
        let mut jobs_of = JobsOf::new();
        for job in &jobs {
            let message = (&*job.subscription, &*job.message_id);
            jobs_of.entry(message).or_default().push(job);
        }
        let mut overlaps = overlaps(&lines, deaths);
        overlaps.extend(disorder(&lines, deaths, &keys(&load.published, &jobs_of)));
        Self {
            messages: load.published.len(),
            jobs: jobs.len(),
            in_the_queue,
            with_a_key: load
                .published
                .iter()
                .filter(|message| !message.ordering_key.is_empty())
                .count(),
            delivered_again: load.duplicates,
            kills: deaths.len(),
            runs: lines.iter().filter(|l| l.event == RunEvent::Start).count(),
            crashes,
            duplicates: jobs.iter().map(|job| i64::from(job.duplicates)).sum(),
            failed_deliveries: [EARLY, LATE]
                .map(|name| marathon.broker.failed_deliveries(name))
                .iter()
                .sum(),
            lost: lost(&load.published, &jobs_of, &jobs, &lines),
            twice: twice(&jobs, &jobs_of),
            overlaps,
        }
    }

    pub fn print(&self, took: Duration, false_starts: usize) {
        let seconds = took.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a figure to read")]
        let rate = self.messages as f64 / seconds;
        let restarts = RESTARTS.len() / 2;
        let figures: [(&str, String); 15] = [
            ("messages", self.messages.to_string()),
            ("with an ordering key", self.with_a_key.to_string()),
            ("delivered again", self.delivered_again.to_string()),
            ("kills", self.kills.to_string()),
            ("database restarts", restarts.to_string()),
            ("broker restarts", restarts.to_string()),
            ("starts that failed", false_starts.to_string()),
            ("runs", self.runs.to_string()),
            ("crashes counted", self.crashes.to_string()),
            ("duplicates stopped", self.duplicates.to_string()),
            ("deliveries failed", self.failed_deliveries.to_string()),
            ("seconds", format!("{seconds:.0} ({rate:.0} messages/s)")),
            ("lost", self.lost.len().to_string()),
            ("ended twice", self.twice.len().to_string()),
            ("overlaps", self.overlaps.len().to_string()),
        ];
        for (name, figure) in figures {
            println!("{name:21} {figure}");
        }
    }

    pub fn is_clean(&self) {
        assert!(self.lost.is_empty(), "lost: {:#?}", self.lost);
        assert!(self.twice.is_empty(), "ended twice: {:#?}", self.twice);
        assert!(self.overlaps.is_empty(), "overlaps: {:#?}", self.overlaps);
        assert_eq!((self.jobs, self.in_the_queue), (self.messages, 0));
        assert!(self.crashes > 0, "no kill hit a run");
        assert!(self.duplicates > 0, "no message was delivered twice");
    }
}

/// Messages without a succeeded job, and jobs whose last run never ended.
fn lost(
    published: &[Published],
    jobs_of: &JobsOf<'_>,
    jobs: &[JobRow],
    lines: &[RunLine],
) -> Vec<String> {
    let has_succeeded = |message: &&Published| {
        let jobs = jobs_of.get(&(message.subscription, &*message.id));
        jobs.is_some_and(|jobs| jobs.iter().any(|job| job.state == "succeeded"))
    };
    let without = published.iter().filter(|message| !has_succeeded(message));
    let mut lost: Vec<String> = without.map(|m| format!("message {}", m.id)).collect();
    let attempts: Vec<(Uuid, u32)> = jobs
        .iter()
        .map(|job| (job.job_id, job.attempt.unwrap_or_default().unsigned_abs()))
        .collect();
    lost.extend(unfinished(lines, &attempts));
    lost
}

/// Jobs that did not end exactly once, and messages with several jobs.
fn twice(jobs: &[JobRow], jobs_of: &JobsOf<'_>) -> Vec<String> {
    let endings = jobs.iter().filter(|job| job.endings != 1);
    let several = jobs_of.values().filter(|jobs| jobs.len() != 1);
    endings
        .map(|job| format!("{job:?}"))
        .chain(several.map(|jobs| format!("{jobs:?}")))
        .collect()
}

/// The jobs of each ordering key, in the order of publishing.
fn keys(published: &[Published], jobs_of: &JobsOf<'_>) -> Vec<Vec<Uuid>> {
    let mut keys: BTreeMap<(&str, &str), Vec<Uuid>> = BTreeMap::new();
    for message in published.iter().filter(|m| !m.ordering_key.is_empty()) {
        let jobs = jobs_of.get(&(message.subscription, &*message.id));
        let key = keys.entry((message.subscription, &*message.ordering_key));
        let jobs = jobs.into_iter().flatten().map(|job| job.job_id);
        key.or_default().extend(jobs);
    }
    keys.into_values().collect()
}
