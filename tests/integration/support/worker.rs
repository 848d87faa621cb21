use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::broker::Broker;
use super::database::Database;
use super::runs::micros_now;
use super::{PATIENCE, eventually};

/// The state of a connection in /proc/net/tcp.
const ESTABLISHED: &str = "01";

/// The program under test.
pub fn trainyard() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainyard"));
    for (name, _) in std::env::vars() {
        if name.starts_with("TRAINYARD_") || name.starts_with("PUBSUB_") {
            command.env_remove(name);
        }
    }
    command.env_remove("GOOGLE_CLOUD_PROJECT");
    command.env_remove("RUST_LOG");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// A folder with a configuration for workers on one broker and one database.
pub struct Yard {
    pub folder: TempDir,
    pub config: PathBuf,
}

impl Yard {
    /// `sections` is the TOML after [pubsub] and [database].
    pub fn new(broker: &Broker, database: &Database, sections: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("trainyard.toml");
        let text = format!(
            "[pubsub]\nproject = {:?}\nemulator_host = {:?}\n[database]\nurl = {:?}\n{sections}",
            broker.project, broker.host, database.url
        );
        std::fs::write(&config, text).unwrap();
        Self { folder, config }
    }

    /// A command of the program with this configuration, to be run in its folder.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = trainyard();
        command
            .args(arguments)
            .arg("--config")
            .arg(&self.config)
            .current_dir(self.folder.path());
        command
    }

    /// Runs a command to its end and returns its exit code and output.
    pub async fn output(&self, arguments: &[&str]) -> Output {
        output_of(self.command(arguments)).await
    }

    /// Checks the configuration, so that an error shows at once, not as a worker's
    /// silence.
    pub async fn config_is_good(&self) {
        let checked = self.output(&["config", "check"]).await;
        assert_eq!(checked.code, 0, "{}{}", checked.stdout, checked.stderr);
    }

    /// Starts `trainyard run`; its log goes to a file of that name.
    pub fn start_worker(&self, name: &str) -> WorkerProcess {
        self.start_worker_with(name, &[])
    }

    /// As [`Yard::start_worker`], with extra environment variables.
    pub fn start_worker_with(&self, name: &str, environment: &[(&str, &str)]) -> WorkerProcess {
        let log = self.folder.path().join(format!("{name}.log"));
        let file = std::fs::File::create(&log).unwrap();
        let child = self
            .command(&["run"])
            .env("RUST_LOG", "info,trainyard=debug")
            .envs(environment.iter().copied())
            .stderr(file)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        WorkerProcess { child, log }
    }
}

pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

pub async fn output_of(mut command: Command) -> Output {
    let output = timeout(PATIENCE, command.output()).await.unwrap().unwrap();
    Output {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// When a worker was killed, by the clock of the runs' log.
#[derive(Debug, Clone, Copy)]
pub struct Death {
    pub pid: u32,
    pub at_micros: u64,
}

/// A running worker. Killed when dropped.
pub struct WorkerProcess {
    child: Child,
    log: PathBuf,
}

/// A failed test shows its workers' logs; TRAINYARD_TEST_LOGS=1 always shows them.
impl Drop for WorkerProcess {
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os("TRAINYARD_TEST_LOGS").is_some() {
            println!("--- {}\n{}", self.log.display(), read(&self.log));
        }
    }
}

impl WorkerProcess {
    pub fn signal(&self, signal: Signal) {
        let pid = self.child.id().unwrap();
        kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
    }

    pub fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// Kills it as the kernel does when memory is short. Its log stays, for a failing
    /// test to show.
    pub async fn kill(&mut self) -> Death {
        let pid = self.pid();
        self.signal(Signal::SIGKILL);
        // From here on the process executes nothing.
        let at_micros = micros_now();
        self.child.wait().await.unwrap();
        Death { pid, at_micros }
    }

    /// Waits until it dies by itself.
    pub async fn dies(&mut self) -> (Death, ExitStatus) {
        let pid = self.pid();
        let Ok(status) = timeout(PATIENCE, self.child.wait()).await else {
            panic!("the worker did not die; its log:\n{}", self.log());
        };
        // Later than the death, but earlier than anything begun from now on.
        let at_micros = micros_now();
        (Death { pid, at_micros }, status.unwrap())
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// How many TCP connections it has to a port.
    pub fn connections_to(&self, port: u16) -> usize {
        let process = PathBuf::from(format!("/proc/{}", self.pid()));
        let files = std::fs::read_dir(process.join("fd")).unwrap();
        let sockets: BTreeSet<String> = files
            .filter_map(|file| std::fs::read_link(file.unwrap().path()).ok())
            .filter_map(|link| {
                let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
                Some(inode.to_owned())
            })
            .collect();
        let connections = ["net/tcp", "net/tcp6"].map(|table| read(&process.join(table)));
        let lines = connections.iter().flat_map(|table| table.lines());
        lines
            .filter(|line| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let [_, _, remote, state, _, _, _, _, _, inode, ..] = fields[..] else {
                    return false;
                };
                state == ESTABLISHED
                    && remote.ends_with(&format!(":{port:04X}"))
                    && sockets.contains(inode)
            })
            .count()
    }

    /// Waits until its log contains this.
    pub async fn says(&self, what: &str) {
        eventually(&format!("the worker says: {what}"), async || {
            self.log().contains(what).then_some(())
        })
        .await;
    }

    /// Sends SIGTERM and waits for the end.
    pub async fn stop(self) -> ExitStatus {
        self.stop_with(Signal::SIGTERM).await
    }

    pub async fn stop_with(self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.stops().await
    }

    /// Waits for the end of a worker that was told to stop.
    pub async fn stops(mut self) -> ExitStatus {
        match timeout(PATIENCE, self.child.wait()).await {
            Ok(status) => status.unwrap(),
            Err(_) => panic!("the worker did not stop; its log:\n{}", read(&self.log)),
        }
    }

    pub fn log(&self) -> String {
        read(&self.log)
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
