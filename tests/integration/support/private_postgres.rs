use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use super::database::Database;
use super::not_tested;

/// The test's own server, for actions that would disturb other tests. Stopped when
/// dropped.
pub struct PrivatePostgres {
    folder: TempDir,
    pub url: String,
}

/// The script's exit code if PostgreSQL is not installed.
const NOT_INSTALLED: i32 = 3;

impl PrivatePostgres {
    /// A new cluster with an empty database; None if PostgreSQL is not installed.
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

    /// Like a power failure for the server: connections cut, nothing flushed.
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

/// The output of a successful script.
fn succeeded(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
