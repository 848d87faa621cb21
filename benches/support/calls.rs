//! The calls that a worker and people make, one at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::LocalBoxFuture;
use serde_json::json;
use trainyard::job::{Can, Claim, ClaimRequest, Fence, Pick, Taken};
use trainyard::outcome::Ending;
use trainyard::record::{JobFilter, JobState};
use trainyard::store::{
    self, ClaimTerms, DeadLettersDue, Finish, Missing, Reach, Release, Released, Store, StoreError,
    TaskTerms,
};
use uuid::Uuid;

use super::database::{Database, Outcome, request};
use super::queue::{self, BUSY, IDLE, Size, ended_key, ended_message, last_digits, unfinished_key};

const LEASE: Duration = Duration::from_secs(3 * 60 * 60);
const RETENTION: Duration = Duration::from_secs(32 * 24 * 60 * 60);
const FENCES: usize = 200;
/// The most that a worker asks for: jobs of one task, standings, dead letters.
const FREE: u32 = 8;
const LOOKS: u64 = 500;
const LETTERS: u32 = 10;
const LISTED: u32 = 50;

/// Prepares and makes one call, and returns the time of the call alone.
pub type Call = for<'a> fn(&'a Bench) -> LocalBoxFuture<'a, Outcome<Duration>>;

pub const CALLS: [(&str, Call); 25] = [
    ("claim a new key", |b| Box::pin(b.claim(request()))),
    ("claim a known key, ended", |b| Box::pin(b.claim_ended())),
    ("claim a known key, waiting", |b| {
        Box::pin(b.claim_waiting())
    }),
    ("claim behind an ordering key's jobs", |b| {
        Box::pin(b.claim_ordered())
    }),
    ("claim 200 new keys", |b| Box::pin(b.claim_batch())),
    ("due, and nothing is", |b| Box::pin(b.due(&IDLE))),
    ("due, and there is work", |b| Box::pin(b.due(&BUSY))),
    ("take a job", |b| Box::pin(b.take())),
    ("renew 200 leases", |b| Box::pin(b.renew())),
    ("look at 500 jobs", |b| Box::pin(b.look())),
    ("finish", |b| Box::pin(b.finish())),
    ("finish, and the next of its key may run", |b| {
        Box::pin(b.finish_ordered())
    }),
    ("release", |b| Box::pin(b.release())),
    ("cancelled_runs", |b| Box::pin(b.cancelled_runs())),
    ("know", |b| Box::pin(b.know())),
    ("dead_letters, and there are none", |b| {
        Box::pin(b.dead_letters())
    }),
    ("jobs list", |b| Box::pin(b.list(None))),
    ("jobs list --state running", |b| {
        Box::pin(b.list(Some(JobState::Running)))
    }),
    ("jobs list --state waiting", |b| {
        Box::pin(b.list(Some(JobState::Waiting)))
    }),
    ("jobs list --state dead", |b| {
        Box::pin(b.list(Some(JobState::Dead)))
    }),
    ("a job by its last eight digits", |b| {
        Box::pin(b.by_last_digits())
    }),
    ("a message's stories", |b| Box::pin(b.stories())),
    ("cancel by id", |b| Box::pin(b.cancel())),
    ("retry by id", |b| Box::pin(b.retry())),
    ("purge of nothing", |b| Box::pin(b.purge())),
];

pub struct Bench {
    pub database: Database,
    size: Size,
    /// The bench's own leases, which it renews.
    fences: Vec<Fence>,
}

/// Makes a call, and returns its time and its answer.
async fn timed<T>(call: impl Future<Output = Result<T, StoreError>>) -> Outcome<(Duration, T)> {
    let started = Instant::now();
    let answer = call.await?;
    Ok((started.elapsed(), answer))
}

impl Bench {
    pub async fn make(server: &str, size: Size) -> Outcome<Self> {
        let mut bench = Self {
            database: queue::make(server, size).await?,
            size,
            fences: Vec::new(),
        };
        let requests: Vec<ClaimRequest> = (0..FENCES).map(|_| request()).collect();
        let claims = bench.store().claim(&requests, &terms()).await?;
        bench.fences = claims.into_iter().map(fence).collect::<Outcome<_>>()?;
        Ok(bench)
    }

    fn store(&self) -> &dyn Store {
        &*self.database.store
    }

    async fn claim(&self, request: ClaimRequest) -> Outcome<Duration> {
        Ok(timed(self.store().claim(&[request], &terms())).await?.0)
    }

    async fn claim_ended(&self) -> Outcome<Duration> {
        let key = ended_key(fastrand::u64(1..=self.size.ended));
        self.claim(ClaimRequest { key, ..request() }).await
    }

    /// Claims a job that waits for its next attempt.
    async fn claim_waiting(&self) -> Outcome<Duration> {
        let key = unfinished_key(self.size.waiting * 3 / 4 - fastrand::u64(..10));
        self.claim(ClaimRequest { key, ..request() }).await
    }

    async fn claim_ordered(&self) -> Outcome<Duration> {
        let mut request = request();
        request.message.ordering_key = format!("k{}", fastrand::u64(..self.size.waiting / 20));
        self.claim(request).await
    }

    async fn claim_batch(&self) -> Outcome<Duration> {
        let requests: Vec<ClaimRequest> = (0..FENCES).map(|_| request()).collect();
        let (time, claims) = timed(self.store().claim(&requests, &terms())).await?;
        // Otherwise more and more jobs would run.
        let fences = claims.into_iter().map(fence).collect::<Outcome<Vec<_>>>()?;
        let finishes: Vec<Finish> = fences.into_iter().map(finished).collect();
        self.store().finish(&finishes).await?;
        Ok(time)
    }

    async fn due(&self, tasks: &[&str]) -> Outcome<Duration> {
        Ok(timed(self.store().due(&reach(tasks), FREE)).await?.0)
    }

    async fn take(&self) -> Outcome<Duration> {
        let (time, taken) = self.take_one().await?;
        self.store().release(&interrupted(taken)).await?;
        Ok(time)
    }

    async fn take_one(&self) -> Outcome<(Duration, Taken)> {
        let reach = reach(&BUSY);
        let due = self.store().due(&reach, 1).await?;
        let job = due.into_iter().next().ok_or("nothing is due")?;
        let pick = Pick {
            token: Uuid::new_v4(),
            acked_when_claimed: true,
            limits: reach.limits("s", &job.task),
            key: job.key,
        };
        let (time, taken) = timed(self.store().take(&[pick], &terms())).await?;
        let taken = taken.into_iter().next().ok_or("a due job was not taken")?;
        Ok((time, taken))
    }

    async fn renew(&self) -> Outcome<Duration> {
        Ok(timed(self.store().renew(&self.fences, LEASE)).await?.0)
    }

    /// Looks at ended, waiting and running jobs; a worker may hold deliveries of each.
    async fn look(&self) -> Outcome<Duration> {
        let unfinished = self.size.waiting + self.size.running;
        let keys: Vec<_> = (0..LOOKS)
            .map(|nth| match nth % 2 {
                0 => ended_key(fastrand::u64(1..=self.size.ended)),
                _ => unfinished_key(fastrand::u64(1..=unfinished)),
            })
            .collect();
        Ok(timed(self.store().look(&keys)).await?.0)
    }

    async fn finish(&self) -> Outcome<Duration> {
        let claims = self.store().claim(&[request()], &terms()).await?;
        self.finish_first(claims).await
    }

    async fn finish_ordered(&self) -> Outcome<Duration> {
        let mut requests = [request(), request()];
        for request in &mut requests {
            request.message.ordering_key = "two".to_owned();
        }
        let claims = self.store().claim(&requests, &terms()).await?;
        let time = self.finish_first(claims).await?;
        self.store().cancel(requests[1].job_id, "bench").await?;
        Ok(time)
    }

    async fn finish_first(&self, claims: Vec<Claim>) -> Outcome<Duration> {
        let claim = claims.into_iter().next().ok_or("no answer to a claim")?;
        let finish = finished(fence(claim)?);
        Ok(timed(self.store().finish(&[finish])).await?.0)
    }

    async fn release(&self) -> Outcome<Duration> {
        let (_, taken) = self.take_one().await?;
        let release = interrupted(taken);
        Ok(timed(self.store().release(&release)).await?.0)
    }

    async fn cancelled_runs(&self) -> Outcome<Duration> {
        Ok(timed(self.store().cancelled_runs("bench")).await?.0)
    }

    async fn know(&self) -> Outcome<Duration> {
        Ok(timed(self.store().know(&reach(&BUSY))).await?.0)
    }

    async fn dead_letters(&self) -> Outcome<Duration> {
        let due = DeadLettersDue {
            worker: None,
            at_least: Duration::ZERO,
            not_to: Vec::new(),
            time_to_publish: LEASE,
            limit: LETTERS,
        };
        Ok(timed(self.store().dead_letters(&due)).await?.0)
    }

    async fn list(&self, state: Option<JobState>) -> Outcome<Duration> {
        let filter = JobFilter {
            state,
            task: None,
            limit: LISTED,
        };
        let store = self.of_command().await?;
        store.jobs(&filter).await?;
        let (time, jobs) = timed(store.jobs(&filter)).await?;
        match jobs.is_empty() {
            true => Err("a list is empty".into()),
            false => Ok(time),
        }
    }

    /// Opens a connection, as each command does. The server plans the first statements
    /// of a connection for their arguments, and later ones perhaps not.
    async fn of_command(&self) -> Outcome<Arc<dyn Store>> {
        Ok(store::open(&self.database.url, 1, None, Missing::Fail).await?)
    }

    async fn by_last_digits(&self) -> Outcome<Duration> {
        let store = self.of_command().await?;
        store.job_ids_ending_with(&last_digits(1), 2).await?;
        let end = last_digits(fastrand::u64(1..=self.size.ended));
        let (time, ids) = timed(store.job_ids_ending_with(&end, 2)).await?;
        match ids.is_empty() {
            true => Err("a job is not found by its last digits".into()),
            false => Ok(time),
        }
    }

    async fn stories(&self) -> Outcome<Duration> {
        let store = self.of_command().await?;
        store.stories(&ended_message(1)).await?;
        let message = ended_message(fastrand::u64(1..=self.size.ended));
        Ok(timed(store.stories(&message)).await?.0)
    }

    /// Cancels a job that waits for room.
    async fn cancel(&self) -> Outcome<Duration> {
        let request = ClaimRequest {
            can: Can::Record,
            ..request()
        };
        let id = request.job_id;
        self.store().claim(&[request], &terms()).await?;
        Ok(timed(self.store().cancel(id, "bench")).await?.0)
    }

    /// Retries a job that has ended, and then cancels it.
    async fn retry(&self) -> Outcome<Duration> {
        let request = request();
        let id = request.job_id;
        let claims = self.store().claim(&[request], &terms()).await?;
        self.finish_first(claims).await?;
        let time = timed(self.store().retry(id, "bench")).await?.0;
        self.store().cancel(id, "bench").await?;
        Ok(time)
    }

    async fn purge(&self) -> Outcome<Duration> {
        match timed(self.store().purge(RETENTION, 1000)).await? {
            (time, 0) => Ok(time),
            _ => Err("jobs of the last thirty days were purged".into()),
        }
    }
}

fn terms() -> ClaimTerms {
    ClaimTerms {
        worker: "bench".into(),
        lease: LEASE,
        max_crashes: 3,
    }
}

fn reach(tasks: &[&str]) -> Reach {
    let terms = TaskTerms {
        max_attempts: 3,
        acked_when_claimed: true,
    };
    Reach {
        subscriptions: [("s".to_owned(), None)].into(),
        tasks: tasks
            .iter()
            .map(|task| ((*task).to_owned(), terms))
            .collect(),
    }
}

fn fence(claim: Claim) -> Outcome<Fence> {
    match claim {
        Claim::Acquired(acquired) => Ok(acquired.fence),
        other => Err(format!("a new key was not acquired: {other:?}").into()),
    }
}

fn finished(fence: Fence) -> Finish {
    Finish {
        fence,
        ending: Ending::succeeded(json!({"accuracy": 0.5})),
        checkpoint: None,
        dead_letter_topic: None,
    }
}

fn interrupted(taken: Taken) -> Release {
    Release {
        fence: taken.acquired.fence,
        why: Released::Interrupted,
        checkpoint: None,
    }
}
