//! A stored message that no worker can read any more.

use trainyard::job::{Can, ClaimRequest, JobKey};
use trainyard::record::JobState;

use crate::support::database::Database;
use crate::support::eventually;
use crate::support::jobs::{LONG, assert_waits, job_at, kinds, request, send, story_of, terms};
use crate::support::scene::{CALM, SUBSCRIPTION, Scene};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_stored_message_cannot_be_read_is_dead_after_one_attempt() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let scene = Scene::new(&database, &CALM).await;
    let recorded = ClaimRequest {
        key: JobKey::new(SUBSCRIPTION, "broken"),
        task: "rehearsal".to_owned(),
        can: Can::Record,
        ..request("broken")
    };
    assert_waits(&send(&scene.store, &recorded, &terms(LONG)).await);
    let damage = "UPDATE processed_messages SET payload = '\\xff' WHERE key = 'broken'";
    let damaged = database.tables().await.execute(damage.to_owned()).await;
    assert_eq!(damaged, 1);

    let worker = scene.start_worker("worker");
    let job = eventually("the job has ended", async || {
        let job = job_at(&scene.store, recorded.job_id).await;
        (job.state == JobState::Dead).then_some(job)
    })
    .await;
    assert_eq!(
        (job.attempts, job.reason.as_deref()),
        (1, Some("malformed"))
    );
    let error = job.error.unwrap();
    assert!(error.contains("cannot be read"), "{error}");
    let story = story_of(&scene.store, "broken").await;
    let told = [
        ("queued", None),
        ("claimed", Some(1)),
        ("finished", Some(1)),
    ];
    assert_eq!(kinds(&story), told);
    // The worker goes on.
    scene.publish_run(0.0).await;
    eventually("another job has run", async || {
        let mut jobs = scene.jobs().await.into_iter();
        jobs.any(|job| job.state == JobState::Succeeded)
            .then_some(())
    })
    .await;
    assert!(worker.stop().await.success());
}
