//! What a message or a program says is shown, and does nothing to a terminal.

use serde_json::{Value, json};
use trainyard::record::{Job, JobFilter, JobState};

use crate::on_both_databases;
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::worker::Yard;

on_both_databases!(escapes_and_line_breaks_of_others_are_shown_as_such,);

/// The program says what its request says.
const SECTIONS: &str = r#"
[worker]
unknown_task_patience = "0s"
[subscriptions.training]
[tasks.parrot]
command = ["sh", "-c", "cat; printf 'evil \\033]0;title\\007 \\r\\342\\200\\256 words\\n' >&2; exit 65"]
"#;

const EVIL: &str = "x\nforged\u{1b}[31mred\r\u{202e}txt";

async fn escapes_and_line_breaks_of_others_are_shown_as_such(database: Database) {
    let broker = Broker::builtin().await.unwrap();
    let store = database.open_migrated().await;
    broker.subscribe("training").await;
    let yard = Yard::new(&broker, &database, SECTIONS);
    let worker = yard.start_worker("w1");
    let requests = [json!({"name": EVIL}), json!({"name": "parrot", "x": EVIL})];
    for request in &requests {
        broker.publish("training", request.to_string()).await;
    }
    let filter = JobFilter {
        limit: 10,
        state: Some(JobState::Dead),
        ..JobFilter::default()
    };
    let jobs: Vec<Job> = eventually("both jobs are dead", async || {
        let jobs = store.jobs(&filter).await.unwrap();
        (jobs.len() == requests.len()).then_some(jobs)
    })
    .await;

    let mut shown = vec![yard.output(&["jobs", "list"]).await.stdout];
    for job in &jobs {
        let id = job.id.to_string();
        shown.push(yard.output(&["jobs", "show", &id]).await.stdout);
        shown.push(yard.output(&["explain", &job.message_id]).await.stdout);
        let exact = yard.output(&["jobs", "show", &id, "--json"]).await.stdout;
        let exact: Value = serde_json::from_str(&exact).unwrap();
        assert_eq!(exact["task"], job.task.as_deref().unwrap());
    }
    worker.says("evil \\u{1b}]0;title").await;
    shown.push(worker.log());
    for text in &shown {
        assert!(
            !text.contains(['\u{1b}', '\r', '\u{7}', '\u{202e}']),
            "{text}"
        );
        assert!(
            !text.lines().any(|line| line.starts_with("forged")),
            "{text}"
        );
    }
    assert!(shown[0].contains("forged\\u{1b}[31mred"), "{}", shown[0]);
}
