//! The messages of the marathon.

use google_cloud_pubsub::model::Message;
use serde_json::json;

use super::{EARLY, LATE};
use crate::support::broker::Broker;
use crate::support::runs::RunsLog;

/// Shares in percent: messages that are delivered twice, that have an ordering key, whose
/// first attempt fails, and that run long enough to be hit by a kill.
const DUPLICATED: u32 = 30;
const ORDERED: u32 = 20;
const FAILING: u32 = 5;
const LONG: u32 = 10;

/// Each wave draws from this many ordering keys, which change after some waves, so a key
/// has about seven messages.
const KEYS: usize = 3;
const WAVES_OF_A_KEY: usize = 4;

pub struct Published {
    pub id: String,
    pub subscription: &'static str,
    pub ordering_key: String,
}

/// Publishes in waves and duplicates some messages: half of them at once, beside the first
/// delivery, and half with the next wave, when most have ended.
pub struct Load {
    random: fastrand::Rng,
    waves: usize,
    pub published: Vec<Published>,
    pub duplicates: usize,
    delivered_later: Vec<(&'static str, String)>,
}

impl Load {
    pub fn new(random: fastrand::Rng) -> Self {
        Self {
            random,
            waves: 0,
            published: Vec::new(),
            duplicates: 0,
            delivered_later: Vec::new(),
        }
    }

    pub async fn publish_wave(&mut self, how_many: usize, broker: &Broker, runs: &RunsLog) {
        self.waves += 1;
        let mut again = std::mem::take(&mut self.delivered_later);
        let early = self.random.usize(0..=how_many);
        for (subscription, how_many) in [(EARLY, early), (LATE, how_many - early)] {
            let messages: Vec<Message> = (0..how_many)
                .map(|_| self.message(subscription, runs))
                .collect();
            let keys: Vec<String> = messages.iter().map(|m| m.ordering_key.clone()).collect();
            let ids = broker.publish_messages(subscription, messages).await;
            for (id, ordering_key) in ids.into_iter().zip(keys) {
                if self.chance(DUPLICATED) {
                    self.duplicates += 1;
                    let later = self.random.bool();
                    let copies = if later {
                        &mut self.delivered_later
                    } else {
                        &mut again
                    };
                    copies.push((subscription, id.clone()));
                }
                self.published.push(Published {
                    id,
                    subscription,
                    ordering_key,
                });
            }
        }
        self.random.shuffle(&mut again);
        deliver_again(broker, again).await;
    }

    /// Delivers the duplicates that remain.
    pub async fn finish(&mut self, broker: &Broker) {
        deliver_again(broker, std::mem::take(&mut self.delivered_later)).await;
    }

    fn message(&mut self, task: &str, runs: &RunsLog) -> Message {
        let milliseconds = match self.chance(LONG) {
            true => self.random.u32(300..=1200),
            false => self.random.u32(2..=10),
        };
        let mut like = json!({ "seconds": f64::from(milliseconds) / 1000.0 });
        if self.chance(FAILING) {
            like["fail"] = json!("transient");
            like["fail_attempts"] = json!(1);
        }
        let message = Message::new().set_data(runs.rehearsal_as(task, like));
        match self.chance(ORDERED) {
            true => {
                let key = self.random.usize(0..KEYS);
                message.set_ordering_key(format!("{}-{key}", self.waves / WAVES_OF_A_KEY))
            }
            false => message,
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.random.u32(0..100) < percent
    }
}

async fn deliver_again(broker: &Broker, copies: Vec<(&'static str, String)>) {
    for (subscription, id) in copies {
        broker.deliver_again(subscription, &[id]).await;
    }
}
