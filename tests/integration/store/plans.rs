//! Checks that no hot statement on Postgres reads a whole table.

use std::sync::Arc;
use std::time::Duration;

use trainyard::job::{Acquired, Can, Claim, ClaimRequest, Fence, JobKey, Pick};
use trainyard::record::{JobFilter, JobState, Retrying};
use trainyard::store::{GivenUp, Reach, Store};
use uuid::Uuid;

use crate::support::database::{Database, Tables};
use crate::support::eventually;
use crate::support::jobs::{
    LONG, acquired, due, failed, finish, ordered, patience, reach, refusal, request, send,
    succeeded, terms,
};
use crate::support::private_postgres::PrivatePostgres;

/// After five executions of a statement the server may settle for a plan that
/// does not regard the arguments.
const CALLS: usize = 8;
const BATCH: usize = 200;
const LOOKS: usize = 500;
const RETENTION: Duration = Duration::from_secs(32 * 24 * 60 * 60);

const ENDED: &str = "
INSERT INTO processed_messages
       (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
        task, state, attempts, worker, started_at, finished_at, finished_by)
SELECT 's', 'old-' || n,
       (lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - 2000000000 + n * 10000), 12, '0')
        || '70008000' || lpad(to_hex(n), 12, '0'))::uuid,
       n::text, now(), '', '{}', 'payload', 'train',
       CASE WHEN n % 100 = 0 THEN 'dead' ELSE 'succeeded' END, 1, 'w0', now(), now(),
       gen_random_uuid()
FROM generate_series(1, 100000::bigint) AS n";

/// Half of them wait for their turn, ten to an ordering key; a quarter wait for
/// their next attempt; and a quarter may run, but are out of reach, as are 200
/// that run.
const UNFINISHED: &str = "
WITH job AS (
    SELECT n, gen_random_uuid() AS job_id, 'task-' || n % 20 AS task, n > 20000 AS runs,
           CASE WHEN n <= 10000 THEN 'k-' || n / 10 END AS ordering_key
    FROM generate_series(1, 20200) AS n
), recorded AS (
    INSERT INTO processed_messages
           (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
            task, state)
    SELECT 's', 'new-' || n, job_id, 'new-' || n, now(), coalesce(ordering_key, ''), '{}',
           'payload', task, 'open'
    FROM job
)
INSERT INTO leases (subscription, key, job_id, task, ordering_key, attempt, token, worker,
                    started_at, run_after, lease_until)
SELECT 's', 'new-' || n, job_id, task, ordering_key, runs::int,
       CASE WHEN runs THEN gen_random_uuid() END, CASE WHEN runs THEN 'w0' END,
       CASE WHEN runs THEN now() END,
       CASE WHEN n < 10000 AND n % 10 > 0 THEN 'infinity'
            WHEN n BETWEEN 10000 AND 15000 THEN now() + interval '1 hour'
            ELSE now() END,
       now() + interval '1 hour'
FROM job
ORDER BY n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_hot_statement_reads_a_whole_table() {
    let Some(postgres) = PrivatePostgres::start() else {
        return;
    };
    let database = postgres.database();
    drop(database.open_migrated().await);
    let tables = database.tables().await;
    for statement in [ENDED, UNFINISHED, "VACUUM ANALYZE"] {
        tables.execute(statement.to_owned()).await;
    }
    let watch = Watch { database, tables };
    watch_claims(&watch).await;
    watch_runs(&watch).await;
    watch_queue(&watch).await;
    watch_unknown_tasks(&watch).await;
    watch_rest(&watch).await;
    watch_people(&watch).await;
}

async fn watch_claims(watch: &Watch) {
    let claim = async |store: &Arc<dyn Store>, requests: &[ClaimRequest]| {
        store.claim(requests, &terms(LONG)).await.unwrap();
    };
    watch
        .calls("a claim of a new key", async |store| {
            claim(store, &[fresh()]).await;
        })
        .await;
    watch
        .calls("claims of new keys", async |store| {
            let requests: Vec<_> = (0..BATCH).map(|_| fresh()).collect();
            claim(store, &requests).await;
        })
        .await;
    watch
        .calls("a claim behind jobs of its ordering key", async |store| {
            let mut request = fresh();
            request.message.ordering_key = format!("k-{}", fastrand::u32(1..1000));
            claim(store, &[request]).await;
        })
        .await;
    for (what, key) in [("an ended job", "old-7"), ("a waiting job", "new-7")] {
        watch
            .calls(&format!("a claim of {what}"), async |store| {
                claim(store, &[request(key)]).await;
            })
            .await;
    }
}

async fn watch_runs(watch: &Watch) {
    let store = watch.database.open().await;
    let requests: Vec<_> = (0..BATCH).map(|_| fresh()).collect();
    let claims = store.claim(&requests, &terms(LONG)).await.unwrap();
    drop(store);
    let fences: Vec<Fence> = claims.into_iter().map(|c| acquired(c).fence).collect();
    watch
        .calls("renewals", async |store| {
            store.renew(&fences, LONG).await.unwrap();
        })
        .await;
    watch
        .calls("cancelled_runs", async |store| {
            store.cancelled_runs("w1").await.unwrap();
        })
        .await;
    watch
        .calls("a checkpoint", async |store| {
            let saved = store.save_checkpoint(&fences[0], "c", true).await;
            assert!(saved.unwrap());
        })
        .await;
    watch
        .calls("a finish", async |store| {
            let job = running(store, fresh()).await;
            assert!(finish(store, &job.fence, succeeded()).await);
        })
        .await;
    watch
        .calls("a finish that lets the next job run", async |store| {
            let (first, next) = (ordered_fresh(), ordered_fresh());
            let job = running(store, first).await;
            let waits = send(store, &next, &terms(LONG)).await;
            assert!(matches!(waits, Claim::Waiting { .. }), "{waits:?}");
            assert!(finish(store, &job.fence, succeeded()).await);
            store.cancel(next.job_id, "a person").await.unwrap();
        })
        .await;
    watch
        .calls("a release", async |store| {
            let job = running(store, fresh()).await;
            let release = failed(&job.fence, "no luck", LONG);
            assert!(store.release(&release).await.unwrap());
        })
        .await;
}

async fn watch_queue(watch: &Watch) {
    watch
        .calls("a sweep that finds nothing", async |store| {
            assert!(store.due(&reach(), 8).await.unwrap().is_empty());
        })
        .await;
    watch
        .calls("a sweep, and a take of what it finds", async |store| {
            let reach = reach_of(&["task-3", "task-4", "task-5"]);
            let due = store.due(&reach, 8).await.unwrap();
            assert!(due.len() >= 8, "{due:?}");
            let pick = Pick {
                key: due[0].key.clone(),
                token: Uuid::new_v4(),
                acked_when_claimed: true,
                limits: reach.limits("s", &due[0].task),
            };
            let taken = store.take(&[pick], &terms(LONG)).await.unwrap();
            assert_eq!(taken.len(), 1);
        })
        .await;
    watch
        .calls("a look", async |store| {
            let standings = store.look(&keys(LOOKS)).await.unwrap();
            assert_eq!(standings.len(), LOOKS);
        })
        .await;
    watch
        .calls("an offer", async |store| {
            store.offer(&keys(2)).await.unwrap();
        })
        .await;
}

async fn watch_rest(watch: &Watch) {
    watch
        .calls("a look for dead letters", async |store| {
            assert!(store.dead_letters(&due()).await.unwrap().is_empty());
        })
        .await;
    watch
        .calls("a purge of nothing", async |store| {
            assert_eq!(store.purge(RETENTION, 1000).await.unwrap(), 0);
        })
        .await;
    watch
        .calls("a cancel", async |store| {
            let request = ClaimRequest {
                can: Can::Record,
                ..fresh()
            };
            send(store, &request, &terms(LONG)).await;
            store.cancel(request.job_id, "a person").await.unwrap();
        })
        .await;
    watch
        .calls("a list of jobs", async |store| {
            let filter = JobFilter {
                limit: 50,
                ..JobFilter::default()
            };
            assert_eq!(store.jobs(&filter).await.unwrap().len(), 50);
        })
        .await;
}

async fn watch_unknown_tasks(watch: &Watch) {
    let unknown = || ClaimRequest {
        can: Can::RecordUnknown,
        ..fresh()
    };
    watch
        .calls("a look for unknown tasks", async |store| {
            let unknown = store.unknown(&["s", "t"], patience(LONG), 5).await;
            assert!(unknown.unwrap().len() >= 5 * 20);
        })
        .await;
    watch
        .calls("giving messages of unknown tasks up", async |store| {
            let requests: Vec<_> = (0..BATCH).map(|_| unknown()).collect();
            store.claim(&requests, &terms(LONG)).await.unwrap();
            let given_up: Vec<GivenUp> = requests
                .into_iter()
                .map(|request| GivenUp {
                    key: request.key,
                    error: "unknown".to_owned(),
                    worker: "w1".into(),
                    dead_letter_topic: None,
                })
                .collect();
            let now = patience(Duration::ZERO);
            let gone = store.give_up_unknown(&given_up, now).await;
            assert_eq!(gone.unwrap().len(), BATCH);
        })
        .await;
    watch
        .calls("a refusal", async |store| {
            let key = Uuid::new_v4().to_string();
            store.refuse(&refusal(&key)).await.unwrap();
        })
        .await;
    watch
        .calls("a claim that is given back unanswered", async |store| {
            let request = fresh();
            running(store, request.clone()).await;
            let claims = [(request.key, request.token)];
            store.disown(&claims).await.unwrap();
        })
        .await;
}

async fn watch_people(watch: &Watch) {
    watch
        .calls("a retry of an ended job", async |store| {
            let job = running(store, fresh()).await;
            assert!(finish(store, &job.fence, succeeded()).await);
            let retrying = store.retry(job.job_id, "a person").await.unwrap();
            assert_eq!(retrying, Some(Retrying::Queued));
            store.cancel(job.job_id, "a person").await.unwrap();
        })
        .await;
    watch
        .calls("an explanation", async |store| {
            for message in ["7", "new-7"] {
                assert_eq!(store.stories(message).await.unwrap().len(), 1);
            }
        })
        .await;
    watch
        .calls("ids by their end", async |store| {
            store.job_ids_ending_with("deadbeef", 10).await.unwrap();
        })
        .await;
    for state in [JobState::Running, JobState::Dead] {
        watch
            .calls(&format!("a list of {state} jobs"), async |store| {
                let filter = JobFilter {
                    state: Some(state),
                    limit: 50,
                    ..JobFilter::default()
                };
                assert_eq!(store.jobs(&filter).await.unwrap().len(), 50);
            })
            .await;
    }
}

/// A request that no other has the key of.
fn fresh() -> ClaimRequest {
    request(&Uuid::new_v4().to_string())
}

fn ordered_fresh() -> ClaimRequest {
    ordered(&Uuid::new_v4().to_string())
}

async fn running(store: &Arc<dyn Store>, request: ClaimRequest) -> Acquired {
    acquired(send(store, &request, &terms(LONG)).await)
}

/// The keys of ended and of unfinished jobs, half of each.
fn keys(count: usize) -> Vec<JobKey> {
    let keys = (0..count).map(|n| match n % 2 {
        0 => format!("old-{}", fastrand::u32(1..=100_000)),
        _ => format!("new-{}", fastrand::u32(1..=20_200)),
    });
    keys.map(|key| JobKey::new("s", &key)).collect()
}

fn reach_of(tasks: &[&str]) -> Reach {
    let mut reach = reach();
    let terms = reach.tasks["train"];
    reach.tasks = tasks.iter().map(|task| ((*task).into(), terms)).collect();
    reach
}

/// A database whose server counts how its tables are read.
struct Watch {
    database: Database,
    tables: Tables,
}

/// How often the tables were read from end to end, how often in any way, how
/// many sorts went to the disk, and how many connections could still add to it.
const SCANS: &str = "
SELECT sum(seq_scan)::bigint, sum(seq_scan + idx_scan)::bigint,
       (SELECT temp_files FROM pg_stat_database WHERE datname = current_database()),
       (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'trainyard')
FROM pg_stat_user_tables WHERE relname IN ('processed_messages', 'leases')";

impl Watch {
    /// Makes the calls on a store of their own, whose connections tell their
    /// counts at their end at the latest.
    async fn calls(&self, what: &str, call: impl AsyncFn(&Arc<dyn Store>)) {
        let (sequential, all, on_disk, _) = self.scans().await;
        let store = self.database.open().await;
        for _ in 0..CALLS {
            call(&store).await;
        }
        drop(store);
        let wanted = all + i64::try_from(CALLS).unwrap();
        let now = eventually("the counts of scans", async || {
            let now = self.scans().await;
            (now.1 >= wanted && now.3 == 0).then_some(now)
        })
        .await;
        println!("{what}: {} scans", now.1 - all);
        let read = now.0 - sequential;
        assert_eq!(read, 0, "{what} read whole tables {read} times");
        assert_eq!(now.2, on_disk, "{what} sorted on the disk");
    }

    async fn scans(&self) -> (i64, i64, i64, i64) {
        self.tables.fetch(SCANS.to_owned()).await.remove(0)
    }
}
