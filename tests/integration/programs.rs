//! Tasks that are separate programs, run by worker processes.

use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use trainyard::record::{Job, JobState};

use crate::on_both_databases;
use crate::support::database::Database;
use crate::support::scene::{PATIENT, SUBSCRIPTION, Scene, Settings};
use crate::support::{eventually, not_tested};

on_both_databases!(
    a_killed_workers_program_goes_on_elsewhere_from_its_checkpoint,
    a_stopped_workers_program_goes_on_elsewhere_at_no_cost,
    of_many_checkpoints_one_a_second_is_written_and_the_last_is_kept,
    a_failing_programs_last_words_are_kept,
    a_cancelled_program_is_stopped,
    programs_that_run_side_by_side_have_gpus_of_their_own,
);

const NAME: &str = "program";

/// A scene whose workers also know a task with this command.
async fn scene(database: &Database, command: &[&str], more: &str) -> Scene {
    let settings = Settings {
        slots: 1,
        ..PATIENT
    };
    let scene = Scene::new(database, &settings).await;
    let config = std::fs::read_to_string(&scene.yard.config).unwrap();
    let work_dir = scene.folder().join("work");
    let config = config.replace(
        "[worker]\n",
        &format!("[worker]\nwork_dir = {work_dir:?}\n"),
    );
    let config = format!(
        "{config}\n[tasks.{NAME}]\ncommand = {command:?}\nbackoff = {{ initial = \"10ms\", max = \"50ms\" }}\n{more}\n"
    );
    std::fs::write(&scene.yard.config, config).unwrap();
    scene
}

async fn publish(scene: &Scene, mut request: Value) -> String {
    request["name"] = NAME.into();
    scene
        .broker
        .publish(SUBSCRIPTION, request.to_string())
        .await
}

/// A shell script in the scene's folder, which it finds as `$HERE`.
fn script(text: &str) -> String {
    format!("cd \"$HERE\"; {text}")
}

fn here(scene: &Scene) -> String {
    format!("env = {{ HERE = {:?} }}", scene.folder())
}

async fn add_env(scene: &Scene) {
    let config = std::fs::read_to_string(&scene.yard.config).unwrap();
    std::fs::write(&scene.yard.config, format!("{config}{}\n", here(scene))).unwrap();
}

/// Makes the file that the programs wait for.
fn open_gate(scene: &Scene) {
    std::fs::write(scene.folder().join("gate"), "").unwrap();
}

/// The processes that run a job, whoever their parents are.
fn processes_of(job: &Job) -> Vec<u32> {
    let mark = format!("TRAINYARD_JOB_ID={}", job.id);
    let processes = std::fs::read_dir("/proc").unwrap();
    processes
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ"));
            let environment = environment.unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|variable| variable == mark.as_bytes())
        })
        .collect()
}

async fn nothing_runs(job: &Job) {
    eventually("no process of the job is left", async || {
        processes_of(job).is_empty().then_some(())
    })
    .await;
}

fn digits_example() -> Option<PathBuf> {
    let python = std::process::Command::new("python3")
        .arg("--version")
        .output();
    if python.is_err() {
        not_tested("python3");
        return None;
    }
    Some(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/python/train_digits.py"))
}

fn digits_request() -> Value {
    json!({"epochs": 3, "hidden": 16})
}

/// The result of the training without interruptions.
fn undisturbed(program: &Path) -> Value {
    let mut child = std::process::Command::new("python3")
        .arg(program)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, digits_request().to_string().as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let result = output
        .lines()
        .filter_map(|line| line.strip_prefix("@trainyard "))
        .filter_map(|line| {
            serde_json::from_str::<Value>(line)
                .ok()?
                .get("result")
                .cloned()
        })
        .next_back();
    result.unwrap()
}

/// Runs the program so that after its first checkpoint it waits for the file `gate`, or
/// for the request to stop.
const UP_TO_A_CHECKPOINT: &str = r#"
import os, sys, time
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import train_digits

gate = os.path.join(os.environ["CHECKPOINT_DIR"], "gate")

def sleep_until(stop, due):
    checkpoint = train_digits.checkpoint_path()
    while checkpoint.exists() and not stop.requested and not os.path.exists(gate):
        time.sleep(0.05)

train_digits.Stop.sleep_until = sleep_until
sys.exit(train_digits.main())
"#;

async fn digits_scene(database: &Database, program: &Path) -> Scene {
    let program = program.to_str().unwrap();
    let command = ["python3", "-c", UP_TO_A_CHECKPOINT, program];
    let scene = scene(database, &command, "ack = \"after_checkpoint\"").await;
    let config = std::fs::read_to_string(&scene.yard.config).unwrap();
    let folder = scene.folder();
    let config = format!("{config}env = {{ CHECKPOINT_DIR = {folder:?} }}\n");
    std::fs::write(&scene.yard.config, config).unwrap();
    scene
}

/// The job, once its first checkpoint is on record and its message acked.
async fn first_checkpoint(scene: &Scene, id: &str) -> Job {
    let job = scene.job(id, JobState::Running).await;
    let job = eventually("a checkpoint is on record", async || {
        let job = scene.store.job(job.id).await.unwrap().unwrap();
        job.checkpoint.is_some().then_some(job)
    })
    .await;
    scene.nothing_is_left_to_deliver().await;
    job
}

async fn a_killed_workers_program_goes_on_elsewhere_from_its_checkpoint(database: Database) {
    let Some(program) = digits_example() else {
        return;
    };
    let scene = digits_scene(&database, &program).await;
    let mut first = scene.start_doomed_worker("first");
    let id = publish(&scene, digits_request()).await;
    let job = first_checkpoint(&scene, &id).await;
    first.kill().await;
    nothing_runs(&job).await;
    let job = it_goes_on_at_a_second_worker(&scene, &id, &program).await;
    assert_eq!(job.attempts, 2);
}

async fn a_stopped_workers_program_goes_on_elsewhere_at_no_cost(database: Database) {
    let Some(program) = digits_example() else {
        return;
    };
    let scene = digits_scene(&database, &program).await;
    let first = scene.start_worker("first");
    let id = publish(&scene, digits_request()).await;
    let job = first_checkpoint(&scene, &id).await;
    assert_eq!(first.stop().await.code(), Some(0));
    nothing_runs(&job).await;
    let job = it_goes_on_at_a_second_worker(&scene, &id, &program).await;
    assert_eq!(job.attempts, 1);
    let story = ["claimed", "checkpointed", "released", "claimed", "finished"];
    scene.is_explained_by(&id, &story).await;
}

async fn it_goes_on_at_a_second_worker(scene: &Scene, id: &str, program: &Path) -> Job {
    open_gate(scene);
    let _second = scene.start_worker("second");
    let job = scene.job(id, JobState::Succeeded).await;
    assert_eq!(job.result, Some(undisturbed(program).into()));
    let shown = scene.command(&["jobs", "show", &job.id.to_string()]).await;
    assert!(shown.stdout.contains("going on from"), "{}", shown.stdout);
    job
}

/// The newest comes to the database while the program runs, and the last one with its end.
async fn of_many_checkpoints_one_a_second_is_written_and_the_last_is_kept(database: Database) {
    let text = script(
        r#"i=0
           while [ $i -lt 40 ]; do
             i=$((i + 1)); echo "@trainyard {\"checkpoint\":\"$i\"}"; sleep 0.05
           done
           while [ ! -e gate ]; do sleep 0.05; done
           echo '@trainyard {"checkpoint":"last"}'
           echo '@trainyard {"result":{}}'"#,
    );
    let scene = scene(&database, &["sh", "-c", &text], "").await;
    add_env(&scene).await;
    let began = Instant::now();
    let worker = scene.start_worker("w1");
    let id = publish(&scene, json!({})).await;
    let job = scene.job(&id, JobState::Running).await;
    eventually("the newest is on record", async || {
        let job = scene.store.job(job.id).await.unwrap().unwrap();
        (job.checkpoint.as_deref() == Some("40")).then_some(())
    })
    .await;
    let written = worker.log().matches("a checkpoint is stored").count();
    let most = usize::try_from(began.elapsed().as_secs()).unwrap() + 1;
    assert!((1..=most).contains(&written), "{written}, at most {most}");
    open_gate(&scene);
    let job = scene.job(&id, JobState::Succeeded).await;
    assert_eq!(job.checkpoint.as_deref(), Some("last"));
}

/// On Postgres only: a frozen process may hold the lock of a SQLite file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stale_program_says_changes_nothing() {
    if let Some(database) = Database::postgres().await {
        a_stale_program_speaks(database).await;
    }
}

/// The first worker is frozen. Its program writes something in time, but the worker reads
/// it only after another one has taken over.
async fn a_stale_program_speaks(database: Database) {
    let text = script(
        r#"if [ -n "$TRAINYARD_CHECKPOINT" ]; then
             echo "@trainyard {\"result\":{\"resumed_from\":\"$TRAINYARD_CHECKPOINT\"}}"; exit 0
           fi
           echo beginning; echo '@trainyard {"checkpoint":"good"}'
           while [ ! -e frozen ]; do sleep 0.05; done
           echo '@trainyard {"checkpoint":"stale"}'
           touch said; sleep 3600"#,
    );
    let command = ["sh", "-c", &text];
    let scene = scene(&database, &command, "ack = \"after_checkpoint\"").await;
    add_env(&scene).await;
    let frozen = scene.start_doomed_worker("frozen");
    let id = publish(&scene, json!({})).await;
    let job = first_checkpoint(&scene, &id).await;
    frozen.signal(Signal::SIGSTOP);
    std::fs::write(scene.folder().join("frozen"), "").unwrap();
    eventually("the program has spoken", async || {
        scene.folder().join("said").exists().then_some(())
    })
    .await;
    let _other = scene.start_worker("other");
    let done = scene.job(&id, JobState::Succeeded).await;
    assert_eq!(done.result, Some(json!({"resumed_from": "good"}).into()));
    // Its keeper has killed the program although the worker could not.
    nothing_runs(&job).await;
    frozen.signal(Signal::SIGCONT);
    eventually("the thawed worker has ended its attempt", async || {
        let attempts = scene.store.attempts(done.id).await.unwrap();
        let mut firsts = attempts.iter().filter(|told| told.attempt == 1);
        firsts.any(|told| told.outcome != "running").then_some(())
    })
    .await;
    let after = scene.store.job(done.id).await.unwrap().unwrap();
    assert_eq!(after.checkpoint.as_deref(), Some("good"));
    assert_eq!(after.state, JobState::Succeeded);
    assert_eq!(frozen.stop().await.code(), Some(0));
}

async fn a_failing_programs_last_words_are_kept(database: Database) {
    let text = script("echo on the way; echo 'no such column: y' >&2; exit 65");
    let scene = scene(&database, &["sh", "-c", &text], "").await;
    add_env(&scene).await;
    let _worker = scene.start_worker("w1");
    let id = publish(&scene, json!({})).await;
    let job = scene.job(&id, JobState::Dead).await;
    assert_eq!(job.attempts, 1);
    assert!(job.error.unwrap().contains("no such column: y"));
    let shown = eventually("the last words are shown", async || {
        let shown = scene.command(&["jobs", "show", &job.id.to_string()]).await;
        shown
            .stdout
            .contains("| on the way")
            .then_some(shown.stdout)
    })
    .await;
    assert!(shown.contains("| no such column: y"), "{shown}");
    eventually("its directory is removed", async || {
        let mut work = std::fs::read_dir(scene.folder().join("work")).unwrap();
        work.next().is_none().then_some(())
    })
    .await;
}

async fn a_cancelled_program_is_stopped(database: Database) {
    let scene = scene(&database, &["sleep", "3600"], "").await;
    let _worker = scene.start_worker("w1");
    let id = publish(&scene, json!({})).await;
    let job = scene.job(&id, JobState::Running).await;
    eventually("it runs", async || {
        (!processes_of(&job).is_empty()).then_some(())
    })
    .await;
    scene
        .command(&["jobs", "cancel", &job.id.to_string()])
        .await;
    scene.job(&id, JobState::Cancelled).await;
    nothing_runs(&job).await;
    scene.nothing_is_left_to_deliver().await;
}

/// Three programs need one GPU each and there are two: the third waits.
async fn programs_that_run_side_by_side_have_gpus_of_their_own(database: Database) {
    let text = script(
        r#"echo "$CUDA_VISIBLE_DEVICES" > "began-$TRAINYARD_JOB_ID"
           while [ ! -e gate ]; do sleep 0.05; done
           echo "@trainyard {\"result\":{\"gpu\":\"$CUDA_VISIBLE_DEVICES\"}}""#,
    );
    let scene = scene(&database, &["sh", "-c", &text], "gpus = 1").await;
    add_env(&scene).await;
    let config = std::fs::read_to_string(&scene.yard.config).unwrap();
    let config = config.replace("slots = 1\n", "slots = 3\ngpus = [\"4\", \"7\"]\n");
    std::fs::write(&scene.yard.config, config).unwrap();
    let _worker = scene.start_worker("w1");
    for _ in 0..3 {
        publish(&scene, json!({})).await;
    }
    let began = || {
        let files = std::fs::read_dir(scene.folder()).unwrap();
        let files = files.map(|entry| entry.unwrap().path());
        let began = files.filter(|path| path.to_string_lossy().contains("began-"));
        let mut gpus: Vec<String> = began
            .map(|path| std::fs::read_to_string(path).unwrap().trim().to_owned())
            .collect();
        gpus.sort();
        gpus
    };
    eventually("two programs run and one waits", async || {
        let jobs = scene.jobs().await;
        let waits = jobs.iter().any(|job| job.state == JobState::Waiting);
        (jobs.len() == 3 && waits && began() == ["4", "7"]).then_some(())
    })
    .await;
    open_gate(&scene);
    let jobs = scene.all_succeed(3).await;
    let gpu = |job: &Job| {
        let result = job.result.as_ref()?.to_value().unwrap();
        Some(result["gpu"].clone())
    };
    assert!(
        jobs.iter()
            .all(|job| [Some(json!("4")), Some(json!("7"))].contains(&gpu(job)))
    );
    assert_eq!(began().len(), 3);
}
