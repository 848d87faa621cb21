//! Numbers keep every digit: in the key of a job, in what a program gets, and in its result.

use trainyard::json::Json;
use trainyard::record::{Job, JobFilter, JobState};

use crate::on_both_databases;
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::worker::Yard;

on_both_databases!(requests_are_one_job_only_if_their_numbers_are_equal_in_every_digit,);

/// Each request is its job's result.
const SECTIONS: &str = r#"
[subscriptions.training]
dedupe_key = "json:/run"
[tasks.echo]
command = ["sh", "-c", "printf '@trainyard {\"result\":'; cat; echo '}'"]
"#;

fn request(run: &str) -> String {
    format!("{{\"name\":\"echo\",\"run\":{run}}}")
}

async fn requests_are_one_job_only_if_their_numbers_are_equal_in_every_digit(database: Database) {
    let broker = Broker::builtin().await.unwrap();
    let store = database.open_migrated().await;
    broker.subscribe("training").await;
    let yard = Yard::new(&broker, &database, SECTIONS);
    let _worker = yard.start_worker("w1");
    let different = ["20261125064636571233", "20261125064636571901", "1", "1e400"];
    for run in different {
        broker.publish("training", request(run)).await;
    }
    let filter = JobFilter {
        limit: 100,
        ..JobFilter::default()
    };
    let ended = eventually("every job has ended", async || {
        let jobs = store.jobs(&filter).await.unwrap();
        let ended = jobs.iter().filter(|job| job.finished_at.is_some()).count();
        (ended == different.len()).then_some(jobs)
    })
    .await;
    assert!(ended.iter().all(|job| job.state == JobState::Succeeded));
    let mut results: Vec<&str> = ended.iter().map(result).collect();
    results.sort_unstable();
    let mut requests = different.map(request);
    requests.sort_unstable();
    assert_eq!(results, requests);

    for run in ["1.0", "1e0", "20261125064636571233.0"] {
        let again = broker.publish("training", request(run)).await;
        eventually("it is a duplicate", async || {
            let stories = store.stories(&again).await.unwrap();
            (!stories.is_empty()).then_some(())
        })
        .await;
    }
    assert_eq!(store.jobs(&filter).await.unwrap().len(), different.len());

    let id = ended[0].id.to_string();
    let shown = yard.output(&["jobs", "show", &id, "--json"]).await;
    let written = format!("\"payload\": {}", result(&ended[0]));
    assert!(shown.stdout.contains(&written), "{}", shown.stdout);
}

fn result(job: &Job) -> &str {
    job.result.as_ref().map(Json::as_str).unwrap()
}
