use super::*;

const ALL: &str = "duplicates=0.1,dropped-acks=0.05,out-of-order=0.2,\
                   resets=0.01:INTERNAL,latency=50ms..200ms,silence";

#[test]
fn faults_survive_their_text_and_their_json() {
    let faults: Faults = ALL.parse().unwrap();
    assert_eq!(faults.duplicates, 0.1);
    assert_eq!(faults.reset_status, Code::Internal);
    assert_eq!(*faults.latency.end(), Duration::from_millis(200));
    assert_eq!(faults.to_string(), ALL);
    let seeded = Faults {
        seed: Some(7),
        ..faults
    };
    let shown = seeded.to_json();
    assert_eq!(Faults::from_json(shown.as_object().unwrap()), Ok(seeded));
}

#[test]
fn a_name_alone_and_half_a_value_have_a_meaning() {
    let faults: Faults = " silence , resets=1, latency=1s,seed=3,".parse().unwrap();
    assert!(faults.silence);
    assert_eq!(
        (faults.resets, faults.reset_status),
        (1.0, Code::Unavailable)
    );
    assert_eq!(
        faults.latency,
        Duration::from_secs(1)..=Duration::from_secs(1)
    );
    assert_eq!(faults.seed, Some(3));
    assert_eq!("".parse(), Ok(Faults::default()));
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    for (text, reason) in [
        (
            "duplicates=2",
            "duplicates is \"2\"; it must be a number from 0 to 1",
        ),
        ("duplicates", "a number from 0 to 1"),
        ("dropped-acks=NaN", "a number from 0 to 1"),
        ("resets=0.1:BROKEN", "\"BROKEN\" is no gRPC status"),
        ("latency=fast", "a duration such as 200ms"),
        ("latency=2s..1s", "a range such as"),
        ("silence=loud", "true or false"),
        ("seed=-1", "a whole number"),
        (
            "dropped_acks=1",
            "there is no fault \"dropped_acks\"; there are duplicates,",
        ),
    ] {
        let refused = text.parse::<Faults>().unwrap_err().to_string();
        assert!(refused.contains(reason), "{text}: {refused}");
    }
}

#[test]
fn a_seed_alone_is_no_fault() {
    let seeded: Faults = "seed=1".parse().unwrap();
    assert!(!seeded.any());
    let silent: Faults = "silence".parse().unwrap();
    assert!(silent.any());
}

#[test]
fn one_seed_gives_one_sequence() {
    let faults: Faults = "duplicates=0.5,seed=42".parse().unwrap();
    let rolls = |dice: &mut Dice| (0..64).map(|_| dice.duplicates()).collect::<Vec<_>>();
    let mut dice = Dice::new(faults.clone());
    let first = rolls(&mut dice);
    assert!(first.contains(&true) && first.contains(&false));
    assert_ne!(rolls(&mut dice), first);
    dice.set(faults);
    assert_eq!(rolls(&mut dice), first);
}

#[test]
fn a_change_without_a_seed_keeps_the_one_that_was_drawn() {
    let mut dice = Dice::new(Faults::default());
    let drawn = dice.faults().seed;
    assert!(drawn.is_some());
    dice.set("silence".parse().unwrap());
    assert_eq!(dice.faults().seed, drawn);
}
