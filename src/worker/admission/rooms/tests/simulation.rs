//! One worker in virtual time. TRAINYARD_TEST_SEED repeats what a test chose.

mod mix;
mod worker;

use std::time::Duration;

use super::super::{REST, SHORT};
use mix::{Job, Mix, Task};
use worker::{PAUSE, Worker};

/// How many mixes a test tries.
const MIXES: usize = 150;

fn seeded() -> fastrand::Rng {
    let seed = std::env::var("TRAINYARD_TEST_SEED")
        .map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("TRAINYARD_TEST_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// The longest that a reservation can stand. Jobs that pass should be over when its
/// job can begin. No mean of run times expects that later than after the longest
/// run. From then on no job passes, and those that run end.
fn longest_reservation(mix: &Mix) -> Duration {
    mix.longest_run().max(mix.reserve_after / SHORT) + mix.longest_run()
}

/// The longest that the oldest job can wait once it has waited for
/// `reserve_after`. It waits for the rest after the reservation before its own, for
/// the sweep that sees the end of this rest, and during its own reservation. If its
/// subscription has a limit, it may first wait until a job of the subscription ends,
/// while other jobs have reservations. From then on its share is reserved for it.
fn longest_wait(mix: &Mix) -> Duration {
    let once = longest_reservation(mix) * (REST + 1) + PAUSE;
    match mix.limit {
        None => once,
        Some(_) => mix.longest_run() + once * 2,
    }
}

#[test]
fn the_oldest_job_begins_within_a_bound() {
    let mut random = seeded();
    let mut longest: Vec<f64> = Vec::new();
    for _ in 0..MIXES {
        let mix = Mix::random(&mut random);
        let mut worker = Worker::new(&mix, mix.reserve_after);
        worker.run();
        let (reserved, waited) = (worker.longest_reservation, worker.longest_wait);
        assert!(
            reserved <= longest_reservation(&mix),
            "{reserved:?}: {mix:?}"
        );
        assert!(waited <= longest_wait(&mix), "{waited:?}: {mix:?}");
        longest.push(waited.div_duration_f64(mix.longest_run()));
    }
    longest.sort_by(f64::total_cmp);
    println!(
        "longest waits of the oldest, in longest runs: median {:.2}, max {:.2}",
        longest[MIXES / 2],
        longest[MIXES - 1]
    );
}

/// Random mixes in which no limit keeps GPUs idle.
fn unlimited_mixes(mut random: fastrand::Rng) -> impl Iterator<Item = Mix> {
    std::iter::repeat_with(move || Mix {
        limit: None,
        ..Mix::random(&mut random)
    })
    .take(MIXES)
}

#[test]
fn gpus_are_kept_idle_for_a_bounded_time() {
    for mix in unlimited_mixes(seeded()) {
        let mut worker = Worker::new(&mix, mix.reserve_after);
        worker.run();
        // Each reservation but the last is followed by REST times as long without one.
        let most = worker.took().as_secs_f64() / f64::from(REST + 1)
            + worker.longest_reservation.as_secs_f64();
        let idle = worker.gpus_kept_idle / mix.gpus as f64;
        assert!(idle <= most, "{idle} s of {:?}: {mix:?}", worker.took());
    }
}

/// Compares with first-fit without reservations. In a single mix chance may matter more:
/// which job is the last one. So the mixes are always the same, and a few may be worse.
#[test]
fn reservations_cost_little_of_the_gpus_time() {
    let mixes = unlimited_mixes(fastrand::Rng::with_seed(1));
    let ratios = mixes.map(|mix| {
        let mut worker = Worker::new(&mix, mix.reserve_after);
        worker.run();
        let mut first_fit = Worker::new(&mix, Duration::MAX);
        first_fit.run();
        // Both workers do the same work.
        first_fit.took().div_duration_f64(worker.took())
    });
    let mut ratios: Vec<f64> = ratios.collect();
    ratios.sort_by(f64::total_cmp);
    let (min, median) = (ratios[0], ratios[MIXES / 2]);
    println!("utilisation, relative to first-fit: min {min:.3}, median {median:.3}");
    assert!(ratios[MIXES / 50] >= 0.8, "{:?}", &ratios[..10]);
    assert!(median >= 0.95, "{median}");
}

/// Two GPUs, and sixteen jobs of one GPU that never end at the same time.
fn a_pair_among_sixteen(reserve_after: Duration) -> usize {
    let mut jobs: Vec<Job> = (0..16)
        .map(|number| Job::pulled(number, 0, 60 + 10 * (number as u64 % 2)))
        .collect();
    jobs.insert(3, Job::pulled(16, 1, 60));
    let tasks = vec![Task::of("single", 1), Task::of("pair", 2)];
    let mix = Mix::of(4, 2, tasks, jobs);
    let mut worker = Worker::new(&mix, reserve_after);
    worker.run();
    worker.begun.iter().position(|job| job.task == 1).unwrap()
}

#[test]
fn a_job_for_both_gpus_does_not_begin_after_all_that_need_one() {
    assert_eq!(a_pair_among_sixteen(Duration::MAX), 16, "the fault");
    // Four jobs begin before it has waited for `reserve_after`.
    assert_eq!(a_pair_among_sixteen(Duration::from_secs(30)), 4);
}
