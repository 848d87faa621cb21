use std::collections::HashSet;

use serde_json::json;

use super::*;

#[test]
fn taken_devices_never_overlap_and_all_are_returned() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..200 {
        let total = random.usize(0..9);
        let devices = Devices::new((0..total).map(|index| index.to_string()).collect());
        let mut sets: Vec<DeviceSet> = Vec::new();
        for _ in 0..200 {
            let wanted = random.usize(0..5);
            let free = devices.free();
            match devices.take(wanted) {
                Some(set) => {
                    assert_eq!(set.names().len(), wanted);
                    sets.push(set);
                }
                None => assert!(free < wanted, "{free} were free for {wanted}"),
            }
            if random.bool() && !sets.is_empty() {
                sets.swap_remove(random.usize(..sets.len()));
            }
            let taken: Vec<&String> = sets.iter().flat_map(DeviceSet::names).collect();
            let different: HashSet<&String> = taken.iter().copied().collect();
            assert_eq!(different.len(), taken.len(), "a device was taken twice");
            assert_eq!(devices.free() + taken.len(), total, "a device was lost");
        }
        sets.clear();
        assert_eq!(devices.free(), devices.total());
    }
}

#[test]
fn threads_that_race_for_devices_never_share_one() {
    let devices = Devices::new((0..3).map(|index| index.to_string()).collect());
    let in_use = Mutex::new(HashSet::new());
    std::thread::scope(|scope| {
        for count in [1, 1, 2, 2, 3] {
            let (devices, in_use) = (&devices, &in_use);
            scope.spawn(move || {
                for _ in 0..1000 {
                    let Some(set) = devices.take(count) else {
                        std::thread::yield_now();
                        continue;
                    };
                    let mut used = in_use.lock().unwrap();
                    assert!(set.names().iter().all(|name| used.insert(name.clone())));
                    drop(used);
                    let mut used = in_use.lock().unwrap();
                    assert!(set.names().iter().all(|name| used.remove(name)));
                }
            });
        }
    });
    assert_eq!(devices.free(), 3);
}

#[test]
fn gpus_can_be_written_in_several_ways() {
    let read = |value| serde_json::from_value::<Gpus>(value);
    let list = |names: &[&str]| Gpus::List(names.iter().map(|name| (*name).to_owned()).collect());
    assert_eq!(read(json!("auto")).unwrap(), Gpus::Auto);
    assert_eq!(read(json!(0)).unwrap(), list(&[]));
    assert_eq!(read(json!("0")).unwrap(), list(&[]));
    assert_eq!(read(json!(["0", 1])).unwrap(), list(&["0", "1"]));
    for wrong in [
        json!(2),
        json!("all"),
        json!(["0", 0]),
        json!(["0,1"]),
        json!([""]),
        json!(true),
    ] {
        assert!(read(wrong.clone()).is_err(), "{wrong}");
    }
    for gpus in [Gpus::Auto, list(&["GPU-1"]), list(&[])] {
        let written = serde_json::to_value(&gpus).unwrap();
        assert_eq!(read(written).unwrap(), gpus);
    }
}
