//! The GPUs that a worker finds, and those that a job sees.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use futures::future::join_all;
use nix::sys::signal::Signal;
use serde_json::json;
use trainyard::devices::{Devices, Gpus};
use trainyard::executor::Attempt;
use trainyard::json::Json;
use trainyard::nvidia;
use trainyard::outcome::Outcome;

use crate::support::{
    Other, Place, attempt, begin, lives, outcome_of, parent_of, report_step, reported_step, send,
    wait_until,
};

#[tokio::test]
#[ignore = "the test below runs it as a separate process"]
async fn discovery() {
    let devices = nvidia::devices(&Gpus::Auto).await;
    let all = devices.take(devices.total()).unwrap();
    fs::write(Other::folder().join("out"), all.names().join(" ")).unwrap();
}

#[test]
fn a_worker_finds_the_gpus_that_it_may_use() {
    let place = Place::new();
    let folder = place.folder.path();
    let listing = "GPU 0: T4 (UUID: GPU-aa)\nGPU 1: T4 (UUID: GPU-bb)\n";
    let stand_in = format!("#!/bin/sh\n[ \"$1\" = -L ] && printf '{listing}'\n");
    fs::write(folder.join("nvidia-smi"), stand_in).unwrap();
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(folder.join("nvidia-smi"), executable).unwrap();
    let path = format!("{}:/usr/bin:/bin", folder.display());
    for (visible, found) in [
        (None, "GPU-aa GPU-bb"),
        (Some("GPU-bb"), "GPU-bb"),
        (Some(""), ""),
    ] {
        let mut other = Other::command("gpus::discovery", folder);
        other.env("PATH", &path).env_remove("CUDA_VISIBLE_DEVICES");
        other.envs(visible.map(|visible| ("CUDA_VISIBLE_DEVICES", visible)));
        assert!(other.status().unwrap().success());
        assert_eq!(place.written(), found);
    }
}

/// Each job creates a file for each of its GPUs, which must not exist yet, and
/// removes it at its end.
#[tokio::test]
async fn jobs_side_by_side_never_see_the_same_gpu() {
    let place = Place::new();
    let devices = Devices::new(["GPU-1", "GPU-2", "GPU-3"].map(str::to_owned).to_vec());
    let script = r#"set -C; cd "${OUT%/*}"; gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr , ' ')
        for gpu in $gpus; do echo > "$gpu" || exit 1; done
        sleep 0.05; rm $gpus; [ "$(echo $gpus | wc -w)" -gt 0 ]"#;
    for _ in 0..10 {
        let mut jobs = Vec::new();
        for wanted in [1, 2, 1, 3] {
            if let Some(set) = devices.take(wanted) {
                let attempt = Attempt {
                    devices: Some(Arc::new(set)),
                    ..attempt(json!({}))
                };
                jobs.push(outcome_of(place.script(script), attempt));
            }
        }
        assert_eq!(devices.free(), 0);
        let outcomes = join_all(jobs).await;
        let succeeded = Outcome::Succeeded(Json::default());
        assert!(outcomes.iter().all(|outcome| *outcome == succeeded));
        assert_eq!(devices.free(), 3);
    }
}

#[tokio::test]
async fn an_abandoned_run_holds_its_gpus_until_its_processes_are_gone() {
    let place = Place::new();
    let devices = Devices::new(vec!["GPU-1".to_owned()]);
    let attempt = Attempt {
        devices: devices.take(1).map(Arc::new),
        ..attempt(json!({}))
    };
    let reports = attempt.reports.clone();
    let script = format!("trap '' TERM; {}; sleep 1000", report_step("$$"));
    let run = begin(place.script(&script), attempt);
    let shell = reported_step(&reports).await;
    // With its keeper frozen, only the daemon can end the run.
    send(parent_of(shell), Signal::SIGSTOP);
    run.abort();
    assert!(run.await.unwrap_err().is_cancelled());
    assert!(devices.free() == 0 || !lives(shell));
    tokio::task::spawn_blocking(move || {
        wait_until("the GPU is free", || devices.free() == 1);
    })
    .await
    .unwrap();
    assert!(!lives(shell));
}
