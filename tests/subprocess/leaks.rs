//! Many runs leave nothing behind.

use std::fs;

use futures::StreamExt;
use futures::stream;
use serde_json::json;
use trainyard::executor::{Executor, Subprocess};
use trainyard::outcome::Outcome;

use crate::support::{Other, Place, attempt, parent_of, settings_in};

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn children() -> Vec<i32> {
    let me = i32::try_from(std::process::id()).unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| crate::support::stat(*pid).is_some() && parent_of(*pid) == me)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the test below runs it as a separate process"]
async fn many_runs() {
    let folder = Other::folder();
    let script = "sleep 1000 & setsid sleep 1000 & echo '@trainyard {\"result\":1}'; exit 0";
    let executor = Subprocess::new(settings_in(&folder, script));
    let mut before = None;
    // The first run opens files that stay open, such as the runtime's signal pipe.
    for runs in [1, 200] {
        let outcomes = stream::iter(0..runs).map(|_| async {
            let attempt = attempt(json!({}));
            let id = attempt.job_id;
            let outcome = executor.execute(attempt).await;
            executor.forget(id).await;
            outcome
        });
        let outcomes: Vec<Outcome> = outcomes.buffer_unordered(4).collect().await;
        let succeeded = Outcome::Succeeded(json!(1).into());
        assert!(outcomes.iter().all(|outcome| *outcome == succeeded));
        assert_eq!(children(), [0; 0], "children or zombies are left");
        assert_eq!(*before.get_or_insert_with(open_files), open_files());
    }
    let left = fs::read_dir(folder.join("work")).unwrap().count();
    assert_eq!(left, 0, "directories are left");
}

#[test]
fn two_hundred_runs_four_at_a_time_leave_nothing_behind() {
    let place = Place::new();
    let mut other = Other::start("leaks::many_runs", place.folder.path());
    assert!(other.0.wait().unwrap().success());
}
