//! Measures what the calls of a worker and of people cost on Postgres, with many jobs
//! on record and with few:
//!
//!     tests/services/run.sh cargo bench --bench queue
//!     tests/services/run.sh cargo bench --bench queue -- --rows 10000000
//!
//! It compares within one run, because absolute figures differ by machine.

mod support {
    pub mod calls;
    pub mod database;
    pub mod queue;
}

use support::calls::{Bench, CALLS};
use support::database::{Outcome, asked, median};
use support::queue::Size;

const SMALL: Size = Size {
    ended: 10_000,
    waiting: 100,
    running: 20,
};
const LARGE: Size = Size {
    ended: 1_000_000,
    waiting: 200_000,
    running: 2_000,
};
const ROUNDS: usize = 30;
/// These rounds warm the caches. After five executions the server may also have
/// chosen another plan.
const WARM_UP: usize = 7;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let given = [
        ("--rows", "ended jobs in the large database", LARGE.ended),
        ("--waiting", "waiting jobs in it", LARGE.waiting),
    ];
    let Some((server, [ended, waiting])) = asked("queue", given) else {
        return Ok(());
    };
    let size = Size {
        ended,
        waiting,
        ..LARGE
    };
    let small = Bench::make(&server, SMALL).await?;
    let large = Bench::make(&server, size).await?;
    let measured = measure(&small, &large, size).await;
    small.database.remove(&server).await?;
    large.database.remove(&server).await?;
    measured
}

async fn measure(small: &Bench, large: &Bench, size: Size) -> Outcome {
    for (name, of) in [("small", SMALL), ("large", size)] {
        println!(
            "{name}: {} ended, {} waiting, {} running",
            of.ended, of.waiting, of.running
        );
    }
    println!(
        "\n{:<42} {:>10} {:>10} {:>8}",
        "", "small", "large", "ratio"
    );
    let times = times(small, large).await?;
    for ((name, _), [of_small, of_large]) in CALLS.into_iter().zip(times) {
        let ratio = of_large / of_small;
        println!("{name:<42} {of_small:>7.0} µs {of_large:>7.0} µs {ratio:>8.2}");
    }
    Ok(())
}

/// Microseconds of each call in each database, measured alternately.
async fn times(small: &Bench, large: &Bench) -> Outcome<Vec<[f64; 2]>> {
    let mut times = vec![[Vec::new(), Vec::new()]; CALLS.len()];
    for round in 0..WARM_UP + ROUNDS {
        for ((_, call), times) in CALLS.into_iter().zip(&mut times) {
            for (bench, times) in [small, large].into_iter().zip(times) {
                let time = call(bench).await?;
                if round >= WARM_UP {
                    times.push(time.as_secs_f64() * 1e6);
                }
            }
        }
    }
    Ok(times.into_iter().map(|both| both.map(median)).collect())
}
