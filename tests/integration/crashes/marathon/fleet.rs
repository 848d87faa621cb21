//! Workers that are killed in turn, and replaced.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::support::worker::{Death, WorkerProcess, Yard};

const WORKERS: usize = 3;
/// Two seconds on average. With a fixed period, the ack deadline would be a multiple of
/// it, and the same message would be hit again and again.
const BETWEEN_KILLS_MS: std::ops::Range<u64> = 1500..2500;
/// A worker that cannot reach the database or the broker at its start exits. The fleet
/// restarts it, as a supervisor does.
const BETWEEN_STARTS: Duration = Duration::from_millis(300);
/// A worker's log line after it has reached both.
const READY: &str = " ready ";

pub struct Fleet<'a> {
    yard: &'a Yard,
    random: fastrand::Rng,
    alive: Vec<WorkerProcess>,
    /// Kept so that a failure shows their logs.
    dead: Vec<WorkerProcess>,
    pub deaths: Vec<Death>,
    /// Workers that exited at their start.
    pub false_starts: usize,
}

impl<'a> Fleet<'a> {
    pub fn start(yard: &'a Yard, random: fastrand::Rng) -> Self {
        let mut fleet = Self {
            yard,
            random,
            alive: Vec::new(),
            dead: Vec::new(),
            deaths: Vec::new(),
            false_starts: 0,
        };
        fleet.fill_up();
        fleet
    }

    /// Kills and replaces the oldest worker, again and again.
    pub async fn kill_in_turn(mut self, enough: &CancellationToken) -> Self {
        let mut next = self.next_kill();
        while !enough.is_cancelled() {
            tokio::select! {
                () = enough.cancelled() => {}
                () = sleep_until(next) => {
                    self.kill_the_oldest().await;
                    next = self.next_kill();
                }
                () = sleep(BETWEEN_STARTS) => {}
            }
            self.bury_false_starts();
            self.fill_up();
        }
        self
    }

    fn next_kill(&mut self) -> Instant {
        Instant::now() + Duration::from_millis(self.random.u64(BETWEEN_KILLS_MS))
    }

    async fn kill_the_oldest(&mut self) {
        self.bury_false_starts();
        self.fill_up();
        let mut oldest = self.alive.remove(0);
        self.deaths.push(oldest.kill().await);
        self.dead.push(oldest);
    }

    fn bury_false_starts(&mut self) {
        let gone = |worker: &mut WorkerProcess| !worker.is_alive();
        for worker in self.alive.extract_if(.., gone) {
            let log = worker.log();
            assert!(!log.contains(READY), "a worker ended by itself:\n{log}");
            self.false_starts += 1;
            self.dead.push(worker);
        }
    }

    fn fill_up(&mut self) {
        while self.alive.len() < WORKERS {
            let name = format!("worker-{}", self.alive.len() + self.dead.len());
            self.alive.push(self.yard.start_worker(&name));
        }
    }

    pub async fn stop(self) {
        for worker in self.alive {
            worker.says(READY).await;
            assert!(worker.stop().await.success());
        }
    }
}
