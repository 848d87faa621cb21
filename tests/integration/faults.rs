//! A broker that misbehaves.

use google_cloud_pubsub::model::Subscription;
use trainyard_emulator::Faults;

use crate::support::runs::RunEvent;
use crate::support::scene::{CALM, Scene, Settings};
use crate::support::seeded;

const JOBS: usize = 200;
const FAULTS: &str =
    "duplicates=0.1,dropped-acks=0.05,resets=0.05:UNAVAILABLE,latency=0ms..50ms,out-of-order=0.2";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_acked_late_run_once_in_spite_of_faults() {
    messages_run_once_in_spite_of_faults("after_run", Subscription::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_acked_early_run_once_in_spite_of_faults() {
    messages_run_once_in_spite_of_faults("before_run", Subscription::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_once_subscriptions_messages_run_once_in_spite_of_faults() {
    let exactly_once = Subscription::new().set_enable_exactly_once_delivery(true);
    messages_run_once_in_spite_of_faults("after_run", exactly_once).await;
}

async fn messages_run_once_in_spite_of_faults(ack: &'static str, subscription: Subscription) {
    let settings = Settings {
        slots: 4,
        ack,
        ..CALM
    };
    let Some(scene) = Scene::subscribed(subscription, &settings).await else {
        return;
    };
    let mut random = seeded();
    scene.misbehaves(Faults {
        seed: Some(random.u64(..)),
        ..FAULTS.parse().unwrap()
    });
    let workers = ["one", "other"].map(|name| scene.yard.start_worker(name));
    let requests = (0..JOBS).map(|_| scene.runs.request(f64::from(random.u32(0..=20)) / 1000.0));
    scene.publish_all(requests.collect()).await;
    let jobs = scene.all_succeed(JOBS).await;
    scene.nothing_is_left_to_deliver().await;
    for worker in workers {
        assert!(worker.stop().await.success());
    }
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert_eq!(scene.runs.of(RunEvent::Start).len(), JOBS);
    assert_eq!(scene.runs.of(RunEvent::End).len(), JOBS);
    let duplicates: u32 = jobs.iter().map(|job| job.duplicates).sum();
    println!("{ack}: {duplicates} duplicates of {JOBS} jobs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_stream_is_replaced_with_before_run() {
    a_silent_stream_is_replaced("before_run", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_stream_is_replaced_with_prefetch() {
    a_silent_stream_is_replaced("after_run", 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_stream_is_replaced_with_after_run() {
    a_silent_stream_is_replaced("after_run", 0).await;
}

async fn a_silent_stream_is_replaced(ack: &'static str, prefetch: usize) {
    let settings = Settings {
        quiet_limit: "10s",
        ack,
        prefetch,
        ..CALM
    };
    let Some(scene) = Scene::on_postgres(&settings).await else {
        return;
    };
    let worker = scene.yard.start_worker("worker");
    scene.publish_run(0.0).await;
    scene.all_succeed(1).await;
    scene.misbehaves("silence".parse().unwrap());
    let more = (0..5).map(|_| scene.runs.request(0.0)).collect();
    scene.publish_all(more).await;
    worker.says("a stream was quiet for too long").await;
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 1, "nothing came");
    scene.misbehaves(Faults::default());
    let jobs = scene.all_succeed(6).await;
    scene.nothing_is_left_to_deliver().await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 6);
    assert!(worker.stop().await.success());
}
