use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use super::database::Database;
use super::not_tested;

/// A server of a test's own, for what would disturb the other tests. Stopped
/// when dropped.
pub struct PrivatePostgres {
    folder: TempDir,
    pub url: String,
}

/// The script's answer where PostgreSQL is not installed.
const NOT_INSTALLED: i32 = 3;

impl PrivatePostgres {
    /// A new cluster with an empty database; None where there are no binaries.
    pub fn start() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let output = script("start", &folder, &[]);
        if output.status.code() == Some(NOT_INSTALLED) {
            not_tested("a private PostgreSQL");
            return None;
        }
        Some(Self {
            url: succeeded(&output),
            folder,
        })
    }

    pub fn database(&self) -> Database {
        Database::at(self.url.clone())
    }

    /// What a power failure is to the server: connections cut, nothing flushed.
    pub fn crash(&self) {
        succeeded(&script("stop", &self.folder, &["immediate"]));
    }

    /// Brings the same cluster back on the same port.
    pub fn start_again(&self) {
        assert_eq!(succeeded(&script("start", &self.folder, &[])), self.url);
    }
}

impl Drop for PrivatePostgres {
    fn drop(&mut self) {
        script("stop", &self.folder, &["immediate"]);
    }
}

fn script(verb: &str, folder: &TempDir, more: &[&str]) -> Output {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/services/postgres.sh");
    Command::new(path)
        .arg(verb)
        .arg(folder.path().join("cluster"))
        .args(more)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// What a successful script printed.
fn succeeded(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
