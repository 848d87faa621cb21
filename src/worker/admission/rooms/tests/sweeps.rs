//! When a sweep must come before the next pull.

use super::*;

#[test]
fn nothing_could_begin_and_nothing_passes_while_a_sweep_is_due() {
    let mut bench = Bench::with(4, 0);
    bench.rooms.sweep_first();
    assert!(bench.rooms.is_sweep_due());
    assert_eq!(bench.could_begin("jobs"), 0);
    assert!(!bench.arrives("job", "cpu-0"));
    assert!(bench.sweep(&[]).is_empty());
    assert!(!bench.rooms.is_sweep_due());
    assert_eq!(bench.could_begin("jobs"), 4);
    assert!(bench.arrives("job", "cpu-0"));
}

#[test]
fn a_sweep_that_is_asked_for_during_another_is_due_after_it() {
    let mut bench = Bench::with(4, 0);
    bench.look();
    bench.rooms.sweep_first();
    bench.rooms.swept();
    assert!(bench.rooms.is_sweep_due());
    bench.sweep(&[]);
    assert!(!bench.rooms.is_sweep_due());
}

#[test]
fn a_sweep_is_due_when_a_job_leaves_that_another_waits_for() {
    let mut bench = Bench::with(4, 1);
    assert!(bench.arrives("first", "a-1"));
    assert!(bench.sweep(&[("second", "a-1", 0)]).is_empty());
    bench.ends("first");
    assert!(bench.rooms.is_sweep_due());
    assert_eq!(bench.sweep(&[("second", "a-1", 0)]), ["second"]);
    bench.ends("second");
    assert!(!bench.rooms.is_sweep_due(), "nothing waits any more");
}

#[test]
fn no_sweep_is_due_when_what_waits_does_not_fit_yet() {
    let mut bench = Bench::with(4, 1);
    assert!(bench.arrives("first", "a-1"));
    assert!(bench.arrives("without a GPU", "cpu-0"));
    assert!(bench.sweep(&[("second", "a-1", 0)]).is_empty());
    bench.ends("without a GPU");
    assert!(!bench.rooms.is_sweep_due());
    assert_eq!(bench.could_begin("jobs"), 3);
}

#[test]
fn a_sweep_is_due_when_a_job_was_queued_after_room_came_free() {
    let mut bench = Bench::with(1, 0);
    assert!(bench.arrives("first", "cpu-0"));
    assert!(!bench.arrives("second", "cpu-0"));
    bench.ends("first");
    assert!(!bench.rooms.is_sweep_due(), "nothing is in the queue");
    bench.rooms.queued("jobs", bench.free_gpus, bench.now);
    assert!(bench.rooms.is_sweep_due());
}

#[test]
fn a_job_that_is_queued_during_a_look_is_not_forgotten() {
    let mut bench = Bench::with(1, 0);
    assert!(bench.arrives("first", "cpu-0"));
    bench.look();
    bench.rooms.queued("jobs", bench.free_gpus, bench.now);
    assert!(bench.find(&[]).is_empty());
    bench.rooms.swept();
    assert!(!bench.rooms.is_sweep_due());
    bench.ends("first");
    assert!(bench.rooms.is_sweep_due());
}

#[test]
fn a_room_that_is_not_used_teaches_nothing_and_asks_for_no_sweep() {
    let mut bench = Bench::with(1, 0);
    for _ in 0..3 {
        let admitted = bench.rooms.admit(&key("job"), "cpu-0", 0, bench.now);
        let id = admitted.unwrap();
        assert!(bench.sweep(&[("other", "cpu-0", 0)]).is_empty());
        bench.rooms.leave(id, 0, bench.now);
        assert!(!bench.rooms.is_sweep_due());
    }
    assert!(bench.rooms.run_times.is_empty());
    assert_eq!(bench.rooms.running(), 0);
}

#[test]
fn a_message_may_follow_only_while_nothing_waits_for_room() {
    let mut bench = Bench::with(1, 0);
    assert!(bench.arrives("first", "cpu-0"));
    assert!(bench.rooms.nothing_waits());
    assert!(bench.sweep(&[("second", "cpu-0", 0)]).is_empty());
    assert!(!bench.rooms.nothing_waits());
    bench.ends("first");
    assert_eq!(bench.sweep(&[("second", "cpu-0", 0)]), ["second"]);
    bench.sweep(&[]);
    assert!(bench.rooms.nothing_waits());
}
