//! A subscription is pulled message by message, whatever becomes of its streams.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use trainyard::pubsub::{Receipt, Subscription};

use crate::support::PATIENCE;
use crate::support::broker::Broker;

const NAME: &str = "requests";

/// When the client resumes a stream that broke, the server counts from zero and sends one
/// message more. That must not be taken for a broker that ignores limits, of which one
/// stream would be enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resumed_stream_that_is_full_is_not_the_only_one_that_is_asked() {
    let Some(broker) = Broker::builtin().await else {
        return;
    };
    broker.subscribe(NAME).await;
    let mut subscription = broker.pulled(NAME);
    subscription.listen().await.unwrap();
    broker.publish(NAME, "first").await;
    let first = next(&mut subscription).await;

    // Longer than a broker without limits would pause.
    sleep(Duration::from_millis(1100)).await;
    broker.restart(Duration::ZERO).await;
    broker.publish(NAME, "second").await;
    let second = next(&mut subscription).await;
    let figures = subscription.counters().figures();
    assert_eq!((figures.streams_opened, figures.surplus), (1, 1));

    broker.publish(NAME, "third").await;
    subscription.listen().await.unwrap();
    let third = next(&mut subscription).await;
    for receipt in [first, second, third] {
        receipt.ack();
    }
    subscription.flush().await;
}

async fn next(subscription: &mut Subscription) -> Receipt {
    let next = timeout(PATIENCE, subscription.next()).await;
    next.unwrap().unwrap().into_parts().1
}
