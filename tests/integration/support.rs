//! Support for the tests: fresh databases, fresh projects, worker processes.

pub mod broker;
pub mod database;
pub mod five_subscriptions;
pub mod jobs;
pub mod pooler;
pub mod private_postgres;
pub mod proxy;
pub mod requests;
pub mod runs;
pub mod scene;
pub mod worker;

use std::io::Write;
use std::time::{Duration, Instant};

/// A guard against hanging, not a measure: nothing that works takes this long. Google's
/// emulator keeps a closed stream as a receiver, and what it gives to that is redelivered
/// after the ack deadline of 10 s: under load, several times over.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Unchanged for this long counts as still.
const STILL: Duration = Duration::from_secs(3);
/// Some things never stand still.
const LONG_ENOUGH: Duration = Duration::from_secs(20);

/// Reports that a part is missing; fails the test if every part must be there.
pub fn not_tested(what: &str) {
    // Not println!, whose output a passing test hides.
    let _ = writeln!(
        std::io::stderr(),
        "NOT TESTED: {what}; `make test` provides it"
    );
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{what} is missing and CI=true"
    );
}

/// Whether a worker can abort at a failpoint. If not, says so.
pub fn has_failpoints() -> bool {
    let built_in = cfg!(feature = "failpoints");
    if !built_in {
        not_tested("the feature `failpoints`");
    }
    built_in
}

/// A random generator, with its seed printed. TRAINYARD_TEST_SEED repeats a run.
pub fn seeded() -> fastrand::Rng {
    let seed = std::env::var("TRAINYARD_TEST_SEED")
        .map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("TRAINYARD_TEST_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// Waits until `condition` holds, polling often.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = condition().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, looking).await {
        Ok(found) => found,
        Err(_) => panic!("waited in vain: {what}"),
    }
}

/// Polls until the value stands still, or for long enough, and returns it.
pub async fn once_still<T: PartialEq>(look: impl Fn() -> T) -> T {
    let began = Instant::now();
    let (mut seen, mut since) = (look(), began);
    while since.elapsed() < STILL && began.elapsed() < LONG_ENOUGH {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = look();
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
    }
    seen
}
