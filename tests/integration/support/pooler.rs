use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::database::Database;
use super::not_tested;

/// The test's own PgBouncer in transaction mode. Stopped when dropped.
pub struct Pooler {
    folder: TempDir,
    pub url: String,
}

/// The script's exit code if PgBouncer is not installed.
const NOT_INSTALLED: i32 = 3;

impl Pooler {
    /// `lines` are added to its configuration. None if PgBouncer is not installed.
    pub fn in_front_of(database: &Database, lines: &[&str]) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let output = script()
            .arg("start")
            .arg(folder.path().join("pgbouncer"))
            .arg(&database.direct_url)
            .args(lines)
            .output()
            .unwrap();
        if output.status.code() == Some(NOT_INSTALLED) {
            not_tested("a private PgBouncer");
            return None;
        }
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", output.status);
        Some(Self {
            url: String::from_utf8(output.stdout).unwrap().trim().to_owned(),
            folder,
        })
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let folder = self.folder.path().join("pgbouncer");
        script().arg("stop").arg(folder).status().unwrap();
    }
}

fn script() -> Command {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/services/pgbouncer.sh");
    let mut command = Command::new(path);
    command.stdin(Stdio::null());
    command
}
