//! Crashes, freezes and outages, and what becomes of the messages.

mod checker;
mod database_away;
mod failpoints;
mod frozen;
mod killed;
mod lost_replies;
mod marathon;
mod outage;
mod rolling_restart;
mod same_job;

use crate::support::scene::{FAST, SUBSCRIPTION, Scene, Settings};
