//! Checks the runs by their own log alone, after everything is over.

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use crate::support::runs::{RunEvent, RunLine};
use crate::support::worker::Death;

/// One attempt according to the log.
#[derive(Debug, Default)]
struct LoggedRun {
    pids: Vec<u32>,
    starts: Vec<u64>,
    ends: Vec<u64>,
    stops: Vec<u64>,
}

type RunsOfJobs = HashMap<Uuid, BTreeMap<u32, LoggedRun>>;

/// All violations of single jobs: overlapping runs and unfinished jobs.
pub fn violations(
    lines: &[RunLine],
    deaths: &[Death],
    attempts_on_record: &[(Uuid, u32)],
) -> Vec<String> {
    let mut wrong = overlaps(lines, deaths);
    wrong.extend(unfinished(lines, attempts_on_record));
    wrong
}

/// Runs that began before the job's previous run ended or its process died, and fences
/// that were used twice.
pub fn overlaps(lines: &[RunLine], deaths: &[Death]) -> Vec<String> {
    let jobs = by_job_and_attempt(lines);
    let of_job = |(job, runs)| overlaps_of(job, runs, deaths);
    jobs.iter().flat_map(of_job).collect()
}

/// Jobs whose last attempt, as the table counts them, never ended.
pub fn unfinished(lines: &[RunLine], attempts_on_record: &[(Uuid, u32)]) -> Vec<String> {
    let jobs = by_job_and_attempt(lines);
    attempts_on_record
        .iter()
        .filter_map(|(job, attempts)| unfinished_one(job, jobs.get(job), *attempts))
        .collect()
}

/// Jobs that began before all runs of the previous job of their ordering key were over.
/// `keys` has the jobs of each key in the order of publishing.
pub fn disorder(lines: &[RunLine], deaths: &[Death], keys: &[Vec<Uuid>]) -> Vec<String> {
    let jobs = by_job_and_attempt(lines);
    let pairs = keys.iter().flat_map(|jobs| jobs.windows(2));
    let wrong = pairs.filter_map(|pair| {
        let (before, after) = (jobs.get(&pair[0])?, jobs.get(&pair[1])?);
        let overs: Vec<Option<u64>> = before.values().map(|run| over_at(run, deaths)).collect();
        let began = after.values().flat_map(|run| &run.starts).min()?;
        let in_order = overs
            .iter()
            .all(|over| over.is_some_and(|over| over <= *began));
        let [before, after] = pair else { return None };
        (!in_order).then(|| format!("{after} began at {began}, {before} was over at {overs:?}"))
    });
    wrong.collect()
}

fn by_job_and_attempt(lines: &[RunLine]) -> RunsOfJobs {
    let mut jobs = RunsOfJobs::new();
    for line in lines {
        let runs = jobs.entry(line.job).or_default();
        let run = runs.entry(line.attempt).or_default();
        match line.event {
            RunEvent::Start => {
                run.pids.push(line.pid);
                run.starts.push(line.at_micros);
            }
            RunEvent::End => run.ends.push(line.at_micros),
            RunEvent::Stopped => run.stops.push(line.at_micros),
        }
    }
    jobs
}

fn overlaps_of(job: &Uuid, runs: &BTreeMap<u32, LoggedRun>, deaths: &[Death]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut before: Option<(u32, &LoggedRun)> = None;
    for (attempt, run) in runs {
        if run.starts.len() != 1 || run.ends.len() + run.stops.len() > 1 {
            wrong.push(format!("{job}: attempt {attempt} ran twice: {run:?}"));
        }
        if let Some((last, last_run)) = before {
            let over = over_at(last_run, deaths);
            if over.is_none_or(|over| run.starts.iter().any(|start| *start < over)) {
                wrong.push(format!(
                    "{job}: attempt {attempt} began at {:?}, attempt {last} was over at {over:?}",
                    run.starts
                ));
            }
        }
        before = Some((*attempt, run));
    }
    wrong
}

fn over_at(run: &LoggedRun, deaths: &[Death]) -> Option<u64> {
    let logged = run.ends.iter().chain(&run.stops).max().copied();
    // Process ids are reused: an earlier death is another worker's.
    let is_its = |death: &&Death| {
        run.pids.contains(&death.pid) && run.starts.iter().all(|start| *start <= death.at_micros)
    };
    logged.or_else(|| deaths.iter().find(is_its).map(|death| death.at_micros))
}

fn unfinished_one(
    job: &Uuid,
    runs: Option<&BTreeMap<u32, LoggedRun>>,
    attempts: u32,
) -> Option<String> {
    let last = runs.and_then(|runs| runs.last_key_value());
    match last {
        Some((number, run)) if *number == attempts && run.ends.len() == 1 => None,
        _ => Some(format!(
            "{job}: {attempts} attempts on record, the last that was logged is {last:?}"
        )),
    }
}

fn line(attempt: u32, event: RunEvent, at_micros: u64) -> RunLine {
    line_of(Uuid::nil(), attempt, event, at_micros)
}

fn line_of(job: Uuid, attempt: u32, event: RunEvent, at_micros: u64) -> RunLine {
    RunLine {
        job,
        attempt,
        pid: attempt,
        event,
        at_micros,
        label: None,
        resumed_from: None,
    }
}

#[test]
fn the_checker_accepts_a_run_after_the_death_of_the_one_before() {
    let lines = [
        line(1, RunEvent::Start, 10),
        line(3, RunEvent::Start, 30),
        line(3, RunEvent::End, 40),
    ];
    let death = |at_micros| Death { pid: 1, at_micros };
    let on_record = [(Uuid::nil(), 3)];
    assert_eq!(
        violations(&lines, &[death(29)], &on_record),
        Vec::<String>::new()
    );
    assert_eq!(violations(&lines, &[death(31)], &on_record).len(), 1);
    assert_eq!(violations(&lines, &[], &on_record).len(), 1);
}

#[test]
fn the_checker_finds_what_is_missing_and_what_ran_twice() {
    let lines = [
        line(1, RunEvent::Start, 10),
        line(1, RunEvent::Start, 11),
        line(1, RunEvent::End, 12),
    ];
    assert_eq!(violations(&lines, &[], &[(Uuid::nil(), 1)]).len(), 1);
    assert_eq!(violations(&lines[1..], &[], &[(Uuid::nil(), 2)]).len(), 1);
    assert_eq!(violations(&lines[1..2], &[], &[(Uuid::nil(), 1)]).len(), 1);
    assert_eq!(violations(&[], &[], &[(Uuid::nil(), 1)]).len(), 1);
}

#[test]
fn the_checker_finds_what_began_before_its_turn() {
    let (first, second) = (Uuid::nil(), Uuid::max());
    let mut lines = vec![
        line_of(first, 1, RunEvent::Start, 10),
        line_of(first, 2, RunEvent::Start, 30),
        line_of(first, 2, RunEvent::End, 40),
        line_of(second, 1, RunEvent::Start, 40),
        line_of(second, 1, RunEvent::End, 50),
    ];
    let deaths = [Death {
        pid: 1,
        at_micros: 20,
    }];
    let key = [vec![first, second]];
    assert_eq!(disorder(&lines, &deaths, &key), Vec::<String>::new());
    assert_eq!(disorder(&lines, &[], &key).len(), 1);
    lines[3].at_micros = 39;
    assert_eq!(disorder(&lines, &deaths, &key).len(), 1);
    lines[3].at_micros = 9;
    assert_eq!(disorder(&lines, &deaths, &key).len(), 1);
}
