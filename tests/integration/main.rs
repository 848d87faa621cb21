//! Tests against real databases and real brokers: both stores, the built-in
//! emulator and Google's. `make test` starts what they need.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod ack_timing;
mod admission;
mod architecture;
mod bad_input;
mod cancel;
mod commands;
mod crashes;
mod dead_letters;
mod delivery;
mod digits;
mod failures;
mod faults;
mod gpus;
mod just_in_time;
mod migrations;
mod ordering;
mod pooler;
mod programs;
mod pubsub_checks;
mod pulling;
mod renewals;
mod services;
mod shutdown;
mod signals;
mod store;
mod store_model;
mod support;
mod terminals;
mod unknown_tasks;
mod unreadable;
