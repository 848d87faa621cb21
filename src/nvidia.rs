//! Finds the GPUs that this process may use.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::devices::{Devices, Gpus};

/// A faulty driver makes it hang.
const NVIDIA_SMI_LIMIT: Duration = Duration::from_secs(20);

/// Finds the GPUs that the configuration allows. If they cannot be listed, there
/// are none, and the log says why.
pub async fn devices(gpus: &Gpus) -> Devices {
    Devices::new(match gpus {
        Gpus::List(names) => names.clone(),
        Gpus::Auto => find().await,
    })
}

/// The GPUs in `CUDA_VISIBLE_DEVICES`, or all if it is unset.
async fn find() -> Vec<String> {
    match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(visible) => visible_devices(&visible),
        Err(_) => match timeout(NVIDIA_SMI_LIMIT, list("nvidia-smi")).await {
            Ok(devices) => devices,
            Err(_) => {
                warn!("`nvidia-smi -L` hangs; this worker has no GPUs");
                Vec::new()
            }
        },
    }
}

/// As in CUDA, an invalid index hides the devices after it.
fn visible_devices(visible: &str) -> Vec<String> {
    let mut devices: Vec<String> = Vec::new();
    for name in visible.split(',').map(str::trim) {
        if name.is_empty() || name.starts_with('-') || name == "NoDevFiles" {
            break;
        }
        if !devices.iter().any(|device| device == name) {
            devices.push(name.to_owned());
        }
    }
    devices
}

async fn list(nvidia_smi: &str) -> Vec<String> {
    let listed = Command::new(nvidia_smi)
        .arg("-L")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await;
    match listed {
        Ok(listed) if listed.status.success() => {
            devices_of(&String::from_utf8_lossy(&listed.stdout))
        }
        Ok(failed) => {
            let reason = String::from_utf8_lossy(&failed.stderr);
            let reason = reason.lines().next().unwrap_or_default();
            warn!(status = %failed.status, %reason, "`nvidia-smi -L` failed; this worker has no GPUs");
            Vec::new()
        }
        Err(error) => {
            debug!(%error, "there is no nvidia-smi; this worker has no GPUs");
            Vec::new()
        }
    }
}

/// Parses lines such as `GPU 0: NVIDIA A100 (UUID: GPU-…)`. The partitions of a
/// GPU follow it, `  MIG 3g.20gb Device 0: (UUID: MIG-…)`, and replace it. Uses
/// UUIDs, as the indices of CUDA and nvidia-smi may differ.
fn devices_of(listing: &str) -> Vec<String> {
    let mut devices: Vec<String> = Vec::new();
    let mut whole = None;
    for line in listing.lines() {
        let text = line.trim_start();
        if let Some(rest) = text.strip_prefix("GPU ") {
            devices.extend(whole.take());
            whole = uuid(text).or_else(|| rest.split(':').next().map(str::to_owned));
        } else if text.starts_with("MIG ")
            && let Some(part) = uuid(text)
        {
            whole = None;
            devices.push(part);
        }
    }
    devices.extend(whole);
    devices
}

fn uuid(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("(UUID: ")?;
    Some(rest.split(')').next()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

    #[test]
    fn visible_devices_are_read_as_cuda_does() {
        for (visible, devices) in [
            ("", &[] as &[&str]),
            ("-1", &[]),
            ("NoDevFiles", &[]),
            ("0", &["0"]),
            ("1, 0", &["1", "0"]),
            ("0,-1,1", &["0"]),
            ("GPU-aa,GPU-bb,GPU-aa", &["GPU-aa", "GPU-bb"]),
        ] {
            assert_eq!(visible_devices(visible), devices, "{visible}");
        }
    }

    #[test]
    fn the_partitions_of_a_gpu_replace_it() {
        let listing = "\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb)
  MIG 3g.20gb     Device  0: (UUID: MIG-1111)
  MIG 3g.20gb     Device  1: (UUID: MIG-2222)
GPU 2: Something without
";
        assert_eq!(
            devices_of(listing),
            ["GPU-aaaa", "MIG-1111", "MIG-2222", "2"]
        );
        assert!(devices_of("No devices were found\n").is_empty());
    }

    fn stand_in(folder: &Path, script: &str) -> String {
        let program = folder.join("nvidia-smi");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        program.to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn nvidia_smi_lists_the_gpus() {
        let folder = tempfile::tempdir().unwrap();
        let program = stand_in(
            folder.path(),
            r#"[ "$1" = -L ] && echo "GPU 0: Tesla T4 (UUID: GPU-cafe)""#,
        );
        assert_eq!(list(&program).await, ["GPU-cafe"]);
    }

    #[tokio::test]
    async fn without_a_working_nvidia_smi_there_are_no_gpus() {
        let folder = tempfile::tempdir().unwrap();
        let program = stand_in(folder.path(), "echo 'driver mismatch' >&2; exit 9");
        assert!(list(&program).await.is_empty());
        assert!(list("/no/such/nvidia-smi").await.is_empty());
    }
}
