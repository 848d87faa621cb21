//! For which jobs room is reserved, and which jobs pass them.

use super::*;

/// Two GPUs, a job on one of them, and `pair`, which needs both and has waited
/// for this many seconds.
fn where_a_pair_has_waited(slots: usize, seconds: u64) -> Bench {
    let mut bench = Bench::with(slots, 2);
    assert!(bench.arrives("first", "a-1"));
    assert!(bench.sweep(&[("pair", "a-2", seconds)]).is_empty());
    bench
}

#[test]
fn before_a_job_has_waited_long_enough_younger_ones_pass_it() {
    let mut bench = where_a_pair_has_waited(4, LONG - 1);
    assert!(bench.arrives("younger", "a-1"));
}

#[test]
fn a_younger_job_does_not_take_what_is_reserved() {
    let mut bench = where_a_pair_has_waited(4, LONG);
    assert!(!bench.arrives("younger", "b-1"));
    let due = [("pair", "a-2", LONG), ("younger", "b-1", 1)];
    assert!(bench.sweep(&due).is_empty());
}

#[test]
fn what_is_reserved_goes_to_the_job_that_it_is_for() {
    let mut bench = where_a_pair_has_waited(4, LONG);
    bench.ends("first");
    let due = [("pair", "a-2", LONG), ("younger", "a-1", 1)];
    assert_eq!(bench.sweep(&due), ["pair"]);
    bench.ends("pair");
    assert_eq!(bench.sweep(&due[1..]), ["younger"]);
}

#[test]
fn a_reservation_stands_though_an_older_job_turns_up() {
    let mut bench = where_a_pair_has_waited(4, LONG);
    let due = [("older", "a-1", 2 * LONG), ("pair", "a-2", LONG)];
    assert!(bench.sweep(&due).is_empty());
    bench.ends("first");
    assert_eq!(bench.sweep(&due), ["pair"]);
}

#[test]
fn the_next_reservation_is_for_the_oldest() {
    let mut bench = where_a_pair_has_waited(4, LONG);
    bench.ends("first");
    let due = [
        ("older", "a-1", 2 * LONG),
        ("pair", "a-2", LONG),
        ("young pair", "a-2", LONG),
    ];
    assert_eq!(bench.sweep(&due), ["pair"]);
    assert_eq!(bench.rooms.reserved.unwrap().key, key("older"));
}

#[test]
fn a_younger_job_that_takes_nothing_of_it_passes_a_reservation() {
    let mut bench = where_a_pair_has_waited(4, LONG);
    assert!(bench.arrives("without a GPU", "cpu-0"));
    // The last slot is reserved, too.
    assert!(bench.arrives("another", "cpu-0"));
    assert!(!bench.arrives("one too many", "cpu-0"));
}

#[test]
fn a_younger_job_may_have_the_gpus_that_are_left() {
    let mut bench = Bench::with(2, 4);
    assert!(bench.arrives("first", "a-1"));
    assert!(bench.arrives("second", "cpu-0"));
    // It lacks only a slot.
    assert!(bench.sweep(&[("single", "a-1", LONG)]).is_empty());
    bench.rooms.capacity.slots = 4;
    assert!(bench.arrives("younger", "b-1"));
    assert!(!bench.arrives("one too many", "b-1"));
}

#[test]
fn a_job_that_is_over_in_time_passes_a_reservation() {
    let mut bench = Bench::with(4, 2);
    bench.learn("a-1", 100);
    bench.learn("b-1", 40);
    assert!(bench.arrives("first", "a-1"));
    assert!(bench.sweep(&[("pair", "a-2", LONG)]).is_empty());
    assert!(bench.arrives("short", "b-1"));
    bench.pass(40);
    bench.ends("short");
    // The first one is expected to run for another 60 seconds.
    assert!(bench.sweep(&[("pair", "a-2", LONG)]).is_empty());
    bench.pass(21);
    assert!(!bench.arrives("late", "b-1"));
    assert!(!bench.arrives("of a task that nothing is known of", "one-1"));
}

#[test]
fn nothing_passes_once_the_job_should_have_begun() {
    let mut bench = Bench::with(4, 4);
    bench.learn("a-1", 100);
    bench.learn("b-1", 50);
    for job in ["first", "second", "third", "fourth"] {
        assert!(bench.arrives(job, "a-1"));
    }
    assert!(bench.sweep(&[("pair", "a-2", LONG)]).is_empty());
    bench.pass(99);
    bench.ends("first");
    // The rest of the runs seems longer than when the reservation was made.
    let mut longer = RunTime::default();
    (0..3).for_each(|_| longer.add(Duration::from_secs(1000)));
    bench.rooms.run_times.insert("a-1".to_owned(), longer);
    assert!(!bench.arrives("short", "b-1"));
}

#[test]
fn of_unknown_tasks_only_what_is_short_is_passed_and_not_for_long() {
    let mut bench = Bench::with(4, 2);
    bench.learn("b-1", 2);
    assert!(bench.arrives("first", "a-1"));
    assert!(bench.sweep(&[("pair", "a-2", LONG)]).is_empty());
    assert!(bench.arrives("short", "b-1"));
    bench.pass(2);
    bench.ends("short");
    assert!(bench.sweep(&[("pair", "a-2", LONG)]).is_empty());
    assert!(!bench.arrives("another", "b-1"));
}

#[test]
fn a_reservation_for_a_job_that_has_gone_ends_with_the_next_sweep() {
    let mut bench = where_a_pair_has_waited(4, LONG);
    assert!(!bench.arrives("younger", "b-1"));
    assert!(bench.sweep(&[]).is_empty());
    assert!(bench.arrives("younger", "b-1"));
}

#[test]
fn nothing_is_reserved_for_a_job_that_needs_more_gpus_than_there_are() {
    let mut bench = Bench::with(4, 2);
    assert!(bench.sweep(&[("giant", "a-9", LONG)]).is_empty());
    assert!(bench.rooms.reserved.is_none());
    assert!(bench.arrives("younger", "a-1"));
}

#[test]
fn nothing_is_reserved_while_gpus_are_lost_to_a_run_that_has_left() {
    let mut bench = where_a_pair_has_waited(4, LONG);
    // Its run cannot be ended, and keeps its GPU.
    let (id, _) = bench.running["first"];
    bench.rooms.leave(id, bench.free_gpus, bench.now);
    assert!(bench.sweep(&[("pair", "a-2", LONG)]).is_empty());
    assert!(bench.arrives("younger", "a-1"));
    // Now its run has ended.
    bench.free_gpus += 1;
    assert!(bench.sweep(&[("pair", "a-2", LONG)]).is_empty());
    bench.pass(1);
    assert!(bench.sweep(&[("pair", "a-2", LONG)]).is_empty());
    assert!(!bench.arrives("another", "a-1"));
}

#[test]
fn after_gpus_stood_idle_nothing_is_reserved_for_four_times_as_long() {
    let mut bench = where_a_pair_has_waited(4, LONG);
    bench.pass(10);
    bench.ends("first");
    assert_eq!(bench.sweep(&[("pair", "a-2", LONG)]), ["pair"]);
    bench.ends("pair");
    assert!(bench.arrives("second", "a-1"));
    let next = [("next pair", "a-2", LONG)];
    bench.pass(39);
    assert!(bench.sweep(&next).is_empty());
    assert!(bench.rooms.reserved.is_none());
    bench.pass(1);
    assert!(bench.sweep(&next).is_empty());
    assert!(bench.rooms.reserved.is_some());
}

#[test]
fn a_slot_is_reserved_where_all_are_taken() {
    let mut bench = Bench::with(2, 0);
    assert!(bench.arrives("first", "cpu-0"));
    assert!(bench.arrives("second", "cpu-0"));
    let (_, limit) = bench.look();
    assert_eq!(limit, 1, "it has to be seen");
    assert!(bench.sweep(&[("old", "cpu-0", LONG)]).is_empty());
    assert!(bench.rooms.reserved.is_some());
    bench.ends("first");
    assert_eq!(bench.could_begin("jobs"), 0);
    assert_eq!(bench.sweep(&[("old", "cpu-0", LONG)]), ["old"]);
}

#[test]
fn a_jobs_share_of_its_subscription_is_reserved_for_it() {
    let mut bench = Bench::with(8, 2);
    assert!(bench.arrives("first", "a-1"));
    assert!(bench.sweep(&[("few/pair", "a-2", LONG)]).is_empty());
    assert!(bench.arrives("few/without a GPU", "cpu-0"));
    assert!(!bench.arrives("few/one too many", "cpu-0"));
    assert!(bench.arrives("of another subscription", "cpu-0"));
    bench.ends("first");
    assert_eq!(bench.sweep(&[("few/pair", "a-2", LONG)]), ["few/pair"]);
}

#[test]
fn a_share_is_reserved_also_while_the_reservation_is_another_jobs() {
    let mut bench = where_a_pair_has_waited(8, LONG);
    let due = [("pair", "a-2", LONG), ("few/pair", "a-2", LONG)];
    assert!(bench.sweep(&due).is_empty());
    assert!(bench.arrives("few/without a GPU", "cpu-0"));
    assert!(!bench.arrives("few/one too many", "cpu-0"));
}

#[test]
fn nothing_is_reserved_for_a_job_whose_task_is_at_its_limit() {
    let mut bench = Bench::with(8, 2);
    assert!(bench.arrives("few/first", "one-1"));
    assert!(bench.sweep(&[("few/second", "one-1", LONG)]).is_empty());
    assert!(bench.arrives("few/other", "a-1"));
}
