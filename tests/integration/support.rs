//! What the tests stand on: fresh databases, fresh projects, worker processes.

pub mod broker;
pub mod database;
pub mod jobs;
pub mod private_postgres;
pub mod proxy;
pub mod requests;
pub mod runs;
pub mod scene;
pub mod training;
pub mod worker;

use std::io::Write;
use std::time::{Duration, Instant};

/// A guard against hanging, not a measure: nothing that works takes as long.
/// Google's emulator keeps a stream that is gone as a receiver until it has
/// swallowed a batch, which then comes again after the ack deadline of 10 s.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What has not changed for so long stands still.
const STILL: Duration = Duration::from_secs(3);
/// Some things never stand still.
const LONG_ENOUGH: Duration = Duration::from_secs(20);

/// Says that a part is missing; that fails the test where everything must be
/// there.
pub fn not_tested(what: &str) {
    // Not println!, which a passing test keeps to itself.
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

/// A generator of chances, with its seed printed. TRAINYARD_TEST_SEED repeats
/// what one chose.
pub fn seeded() -> fastrand::Rng {
    let seed = std::env::var("TRAINYARD_TEST_SEED")
        .map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("TRAINYARD_TEST_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// Waits until `condition` holds, looking often.
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

/// Looks until what it sees stands still, or for long enough, and returns it.
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
