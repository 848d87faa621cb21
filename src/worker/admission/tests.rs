use std::time::Duration;

use futures::FutureExt;

use super::*;

fn admission(slots: usize, gpus: usize) -> Admission {
    let tasks = [("cpu", 0), ("single", 1), ("pair", 2)].map(|(name, gpus)| {
        let capacity = TaskCapacity {
            concurrency: None,
            gpus,
        };
        (name.to_owned(), capacity)
    });
    let jobs = SubscriptionCapacity {
        concurrency: None,
        max_waiting: 1,
    };
    let capacity = Capacity {
        slots,
        subscriptions: [("jobs".to_owned(), jobs)].into(),
        tasks: tasks.into(),
        reserve_after: Duration::MAX,
    };
    let names = (0..gpus).map(|index| index.to_string());
    Admission::new(capacity, Devices::new(names.collect()))
}

fn key(job: &str) -> JobKey {
    JobKey::new("jobs", job)
}

fn due(job: &str, task: &str) -> DueJob {
    DueJob {
        key: key(job),
        task: task.to_owned(),
        waited: Duration::ZERO,
        is_lost: false,
    }
}

fn have_come(changes: &mut Changes) -> bool {
    changes.next().now_or_never().is_some()
}

#[test]
fn a_room_that_is_dropped_is_free_and_wakes_who_waits_for_it() {
    let admission = admission(1, 0);
    let room = admission.admit(&key("first"), "cpu").unwrap();
    assert_eq!(
        (admission.running(), admission.could_begin("jobs")),
        (1, false)
    );
    let mut changes = admission.changes();
    assert!(!have_come(&mut changes));
    drop(room);
    assert!(have_come(&mut changes));
    assert!(!have_come(&mut changes), "once");
    assert_eq!(
        (admission.running(), admission.could_begin("jobs")),
        (0, true)
    );
}

#[test]
fn a_change_between_a_look_and_the_wait_is_not_missed() {
    let admission = admission(1, 0);
    let mut changes = admission.changes();
    assert!(admission.could_begin("jobs"));
    let _room = admission.admit(&key("first"), "cpu").unwrap();
    assert!(have_come(&mut changes), "less may be asked for");
}

#[test]
fn gpus_come_back_with_the_last_that_holds_them_and_wake_who_waits() {
    let admission = admission(2, 1);
    let room = admission.admit(&key("first"), "single").unwrap();
    // A run that cannot be ended keeps its GPUs after its room is freed.
    let devices = room.begin().unwrap();
    assert_eq!(devices.names(), ["0"]);
    drop(room);
    assert_eq!(admission.running(), 0);
    assert!(admission.admit(&key("second"), "single").is_none());
    let mut changes = admission.changes();
    drop(devices);
    assert!(have_come(&mut changes));
    assert!(admission.admit(&key("second"), "single").is_some());
}

#[test]
fn a_room_gives_its_gpus_back_before_it_is_free_itself() {
    let admission = admission(2, 2);
    let room = admission.admit(&key("first"), "pair").unwrap();
    room.begin();
    assert!(admission.admit_due(vec![due("second", "pair")]).is_empty());
    drop(room);
    assert!(admission.is_sweep_due(), "it fits by then");
}

#[test]
fn rooms_for_jobs_from_the_queue_have_gpus_of_their_own() {
    let admission = admission(4, 3);
    let mut changes = admission.changes();
    let jobs = ["first", "second", "third"].map(|job| due(job, "pair"));
    let single = due("fourth", "single");
    let given = admission.admit_due(jobs.into_iter().chain([single]).collect());
    assert!(have_come(&mut changes), "less may be asked for");
    let names: Vec<(&str, Vec<String>)> = given
        .iter()
        .map(|(job, room)| (&*job.key.key, room.begin().unwrap().names().to_vec()))
        .collect();
    let expected = [("first", vec!["0", "1"]), ("fourth", vec!["2"])];
    assert_eq!(names, expected.map(|(job, of)| (job, strings(&of))));
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_place_that_is_dropped_is_free_and_wakes_who_waits_for_it() {
    let admission = admission(1, 0);
    let subscription = "jobs".into();
    let mut changes = admission.changes();
    let place = admission.hold(&subscription);
    assert!(have_come(&mut changes));
    assert!(!admission.could_hold("jobs"));
    assert!(!admission.could_begin("jobs"));
    // A delivery that has arrived still gets a place.
    drop(admission.hold(&subscription));
    assert!(!admission.could_hold("jobs"));
    assert!(have_come(&mut changes));
    drop(place);
    assert!(have_come(&mut changes));
    assert!(admission.could_hold("jobs"));
    assert!(admission.could_begin("jobs"));
}

#[test]
fn a_delivery_whose_job_could_begin_by_now_makes_a_sweep_due() {
    let admission = admission(1, 0);
    let subscription = "jobs".into();
    let _other = admission.hold(&subscription);
    assert!(!admission.is_sweep_due());
    let mut changes = admission.changes();
    let _place = admission.hold(&subscription);
    admission.queued(&subscription);
    assert!(admission.is_sweep_due());
    assert!(have_come(&mut changes));
    assert!(!admission.wants_a_successor());
    admission.within(&Reach::default());
    assert!(admission.admit_due(Vec::new()).is_empty());
    admission.swept();
    assert!(!admission.is_sweep_due());
    assert!(admission.wants_a_successor());
}

#[test]
fn nothing_is_asked_for_while_much_data_waits_for_its_claim() {
    let admission = admission(2, 0);
    let most = admission.load(MAX_LOAD - 1);
    assert!(admission.could_begin("jobs"));
    let rest = admission.load(1);
    assert!(!admission.could_begin("jobs") && !admission.could_hold("jobs"));
    let mut changes = admission.changes();
    drop(rest);
    assert!(have_come(&mut changes));
    assert!(admission.could_begin("jobs") && admission.could_hold("jobs"));
    drop(most);
}
