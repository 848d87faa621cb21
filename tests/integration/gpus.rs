//! Which job gets the GPUs that are freed.

use serde_json::json;

use crate::support::database::Database;
use crate::support::eventually;
use crate::support::scene::{PATIENT, SUBSCRIPTION, Scene, Settings};

const SMALL: usize = 16;

/// The jobs log the order in which they start.
const SETTINGS: Settings = Settings {
    slots: 4,
    worker: "gpus = [\"0\", \"1\"]\nreserve_after = \"500ms\"",
    task: r#"
[tasks.small]
command = ["sh", "-c", "echo small >> order; sleep $(sed 's/.*\"seconds\":\\([0-9.]*\\).*/\\1/')"]
gpus = 1
[tasks.large]
command = ["sh", "-c", "echo large >> order"]
gpus = 2"#,
    ..PATIENT
};

/// Small jobs end at different times, so two GPUs are never free at once unless the first
/// one freed is reserved.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_needs_all_gpus_is_not_passed_by_again_and_again() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let scene = Scene::new(&database, &SETTINGS).await;
    scene.yard.config_is_good().await;
    let _worker = scene.start_worker("worker");
    publish(&scene, "small", 0.5).await;
    publish(&scene, "small", 1.0).await;
    eventually("two small jobs have all GPUs", async || {
        (order(&scene).len() == 2).then_some(())
    })
    .await;
    publish(&scene, "large", 0.0).await;
    for _ in 2..SMALL {
        publish(&scene, "small", 1.0).await;
    }
    scene.all_succeed(SMALL + 1).await;
    let order = order(&scene);
    let before = order.iter().position(|task| task == "large").unwrap();
    assert!(
        before < SMALL / 2,
        "{before} of {SMALL} small jobs started before the large one: {order:?}"
    );
    scene.nothing_is_left_to_deliver().await;
}

async fn publish(scene: &Scene, task: &str, seconds: f64) {
    let request = json!({"name": task, "seconds": seconds}).to_string();
    scene.broker.publish(SUBSCRIPTION, request).await;
}

fn order(scene: &Scene) -> Vec<String> {
    let told = std::fs::read_to_string(scene.folder().join("order")).unwrap_or_default();
    told.lines().map(str::to_owned).collect()
}
