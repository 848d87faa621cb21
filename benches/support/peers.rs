//! What trainyard is compared with: a subscriber written in Python, and `pgbench`, which
//! shows what the database alone can do.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use url::Url;

use super::database::Outcome;
use super::processes::Process;

const PACKAGES: &str = "google-cloud-pubsub==2.44.0 psycopg2-binary==2.9.11";
const HANDLER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/handler.py");

/// The handler's table.
pub const TABLE: &str = "CREATE TABLE processed (
    message_id text PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp())";

/// Starts the handler of `benches/peers` on a subscription, with ten threads.
pub fn start_handler(
    host: &str,
    subscription: &str,
    database: &str,
    output: &Path,
) -> Outcome<Process> {
    let mut command = Command::new(python()?);
    command
        .arg(HANDLER)
        .env("PUBSUB_EMULATOR_HOST", host)
        .env("SUBSCRIPTION", subscription)
        .env("DATABASE", database)
        .env("THREADS", "10");
    Process::start(&mut command, output)
}

/// A Python with the packages, in an environment below the target folder.
fn python() -> Outcome<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-venv");
    let stamp = folder.join("installed");
    let python = folder.join("bin/python");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == PACKAGES) {
        return Ok(python);
    }
    let _ = fs::remove_dir_all(&folder);
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "install", "-q", "--disable-pip-version-check"]);
    run(install.args(PACKAGES.split(' ')))?;
    // Last: a half-made environment is made again.
    fs::write(stamp, PACKAGES)?;
    Ok(python)
}

fn run(command: &mut Command) -> Outcome<String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{command:?}: {}: {errors}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The rows that a job has from its claim to its end, 200 jobs in a transaction: the guard's
/// row, the queue's row, and both again at the end.
const BATCHES: &str = "\\set batch random(1, 1000000000000000)
BEGIN;
INSERT INTO processed_messages (subscription, key, job_id, message_id, publish_time, ordering_key,
    attributes, payload, task, state)
SELECT 'pgbench', n || '-' || :batch, gen_random_uuid(), n || '-' || :batch, now(), '', '{}',
    '\\x7b7d', 'rehearsal', 'open'
FROM generate_series(1, 200) AS n;
INSERT INTO leases (subscription, key, job_id, task, attempt, token, worker, started_at,
    run_after, lease_until)
SELECT 'pgbench', n || '-' || :batch, gen_random_uuid(), 'rehearsal', 1, gen_random_uuid(), 'w',
    now(), now(), now() + interval '2 min'
FROM generate_series(1, 200) AS n;
COMMIT;
BEGIN;
DELETE FROM leases USING generate_series(1, 200) AS n
WHERE subscription = 'pgbench' AND key = n || '-' || :batch;
UPDATE processed_messages SET state = 'succeeded', finished_at = now(), attempts = 1,
    last_attempt = 1, worker = 'w', started_at = now(), finished_by = gen_random_uuid()
FROM generate_series(1, 200) AS n
WHERE subscription = 'pgbench' AND key = n || '-' || :batch;
COMMIT;
";

/// How many jobs per second `pgbench` puts through the tables of a database, over two
/// connections.
pub fn pgbench(database: &str, folder: &Path, seconds: u64) -> Outcome<f64> {
    let script = folder.join("batches.sql");
    fs::write(&script, BATCHES)?;
    let mut command = Command::new(program("pgbench")?);
    command
        .args([
            "--no-vacuum",
            "--protocol=prepared",
            "--client=2",
            "--jobs=1",
        ])
        .args(["--time", &seconds.to_string(), "--file"])
        .arg(script)
        .arg(database);
    let printed = run(&mut command)?;
    let rate = printed
        .lines()
        .find_map(|line| line.strip_prefix("tps = ")?.split(' ').next())
        .ok_or_else(|| format!("pgbench printed no rate: {printed}"))?;
    Ok(rate.parse::<f64>()? * 200.0)
}

/// Where a program of PostgreSQL is: on PATH, or where Debian puts it.
fn program(name: &str) -> Outcome<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&path).collect();
    if let Ok(versions) = fs::read_dir("/usr/lib/postgresql") {
        folders.extend(versions.flatten().map(|version| version.path().join("bin")));
    }
    let mut programs = folders.into_iter().map(|folder| folder.join(name));
    let found = programs.find(|program| program.is_file());
    found.ok_or_else(|| format!("{name} is not installed (Debian: postgresql-contrib)").into())
}

/// A database's URL without what only trainyard understands.
pub fn plain(url: &str) -> Outcome<String> {
    let mut url = Url::parse(url)?;
    url.set_query(None);
    Ok(url.to_string())
}
