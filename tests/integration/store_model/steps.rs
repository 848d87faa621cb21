//! The actions of a worker or a person on one key.

use proptest::prelude::*;
use trainyard::job::FinalState;

use super::{KEYS, WORKERS};

#[derive(Debug, Clone)]
pub enum Step {
    Claim {
        worker: usize,
        key: usize,
        /// Otherwise the job is only recorded.
        has_room: bool,
    },
    /// The holder sends its claim again, as after a lost answer.
    ClaimAgain {
        key: usize,
    },
    /// A lease expires, or a waiting job becomes due.
    Expire {
        key: usize,
    },
    Reap {
        worker: usize,
    },
    /// With the worker's fence from this many claims ago.
    Write {
        write: Write,
        worker: usize,
        key: usize,
        age: usize,
    },
    Cancel {
        key: usize,
    },
    Retry {
        key: usize,
    },
}

#[derive(Debug, Clone, Copy)]
pub enum Write {
    Renew,
    SaveCheckpoint,
    Finish(FinalState),
    Release,
    /// The job waits until a step makes it due.
    Fail,
}

pub fn step() -> impl Strategy<Value = Step> {
    let (worker, key) = (0..WORKERS, 0..KEYS.len());
    let has_room = prop_oneof![4 => Just(true), 1 => Just(false)];
    let age = prop_oneof![3 => Just(0_usize), 1 => 1..4_usize];
    prop_oneof![
        6 => (worker.clone(), key.clone(), has_room)
            .prop_map(|(worker, key, has_room)| Step::Claim { worker, key, has_room }),
        1 => key.clone().prop_map(|key| Step::ClaimAgain { key }),
        4 => key.clone().prop_map(|key| Step::Expire { key }),
        2 => worker.clone().prop_map(|worker| Step::Reap { worker }),
        8 => (write(), worker, key.clone(), age)
            .prop_map(|(write, worker, key, age)| Step::Write { write, worker, key, age }),
        1 => key.clone().prop_map(|key| Step::Cancel { key }),
        2 => key.prop_map(|key| Step::Retry { key }),
    ]
}

fn write() -> impl Strategy<Value = Write> {
    let endings = [
        FinalState::Succeeded,
        FinalState::Dead,
        FinalState::Cancelled,
    ];
    prop_oneof![
        2 => Just(Write::Renew),
        1 => Just(Write::SaveCheckpoint),
        2 => prop::sample::select(endings.to_vec()).prop_map(Write::Finish),
        2 => Just(Write::Release),
        2 => Just(Write::Fail),
    ]
}
