//! Name → task: which executor runs a request, under which settings.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{self, Config, ConfigError};
use crate::executor::subprocess::{self, PERMANENT_EXIT_CODES, ResourceLimits, Subprocess};
use crate::executor::{Executor, InProcess};
use crate::task::Task;
use crate::tasks;

/// The tasks that a program registers, by the `name` in their requests.
///
/// Their settings (ack timing, timeout) are added from the configuration when the
/// worker starts.
#[derive(Default, Clone)]
pub struct Registry {
    tasks: BTreeMap<String, Arc<dyn Task>>,
}

impl Registry {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a task, replacing one of the same name.
    #[must_use]
    pub fn with(mut self, name: &str, task: impl Task) -> Self {
        self.tasks.insert(name.to_owned(), Arc::new(task));
        self
    }

    /// Joins the tasks with their configuration. A registered task needs no
    /// section. A section needs a registered task, a built-in one, or a command.
    ///
    /// # Errors
    /// A section has none of these, or a command for a registered task.
    pub fn configure(
        self,
        settings: &BTreeMap<String, config::Task>,
        worker: &config::Worker,
    ) -> Result<ConfiguredTasks, ConfigError> {
        let mut tasks = BTreeMap::new();
        for (name, task) in &self.tasks {
            let settings = settings.get(name).cloned().unwrap_or_default();
            if settings.command.is_some() {
                return Err(ConfigError::Invalid(format!(
                    "[tasks.{name}] has a `command`, but the program registers a task of that name: remove one of them"
                )));
            }
            tasks.insert(
                name.clone(),
                ConfiguredTask::in_process(name, task, settings),
            );
        }
        for (name, settings) in settings {
            if tasks.contains_key(name) {
                continue;
            }
            if let Some(command) = &settings.command {
                let task = ConfiguredTask::subprocess(name, command, settings, worker);
                tasks.insert(name.clone(), task);
                continue;
            }
            let Some(task) = settings.builtin.as_deref().and_then(tasks::builtin) else {
                return Err(ConfigError::Invalid(format!(
                    "[tasks.{name}] does not say how to run the task: set `command = [\"PROGRAM\", …]` or `builtin = \"…\"` (one of: {}), or register a task of that name in the program",
                    tasks::BUILTIN_NAMES.join(", ")
                )));
            };
            tasks.insert(
                name.clone(),
                ConfiguredTask::in_process(name, &task, settings.clone()),
            );
        }
        Ok(ConfiguredTasks { tasks })
    }
}

/// A task, ready to run.
pub struct ConfiguredTask {
    pub name: String,
    pub settings: config::Task,
    pub executor: Arc<dyn Executor>,
}

/// A command is killed after its stop grace, and its executor waits a little
/// longer for the keeper's report.
const REPORT_DELAY: Duration = Duration::from_secs(6);

impl ConfiguredTask {
    /// How long to wait for a run that was asked to stop.
    #[must_use]
    pub fn stop_patience(&self, worker_stop_grace: Duration) -> Duration {
        let grace = self.settings.stop_grace.unwrap_or(worker_stop_grace);
        match self.settings.command {
            Some(_) => grace + REPORT_DELAY,
            None => grace,
        }
    }

    fn in_process(name: &str, task: &Arc<dyn Task>, settings: config::Task) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            settings,
            executor: Arc::new(InProcess::new(Arc::clone(task))),
        })
    }

    fn subprocess(
        name: &str,
        command: &[String],
        settings: &config::Task,
        worker: &config::Worker,
    ) -> Arc<Self> {
        let work_dir = worker.work_dir.clone();
        let codes = settings.permanent_exit_codes.as_deref();
        let executor = Subprocess::new(subprocess::Settings {
            command: command.to_vec(),
            cwd: settings.cwd.clone(),
            pass_env: settings.pass_env.clone(),
            env: settings.env.clone(),
            permanent_exit_codes: codes.unwrap_or(PERMANENT_EXIT_CODES).to_vec(),
            stop_grace: settings.stop_grace.unwrap_or(worker.stop_grace),
            stall_timeout: settings.stall_timeout,
            limits: ResourceLimits {
                memory: settings.memory.map(|size| size.0),
                nice: settings.nice,
                open_files: settings.open_files,
            },
            work_dir: work_dir.unwrap_or_else(subprocess::default_work_dir),
            keep_work_dir: settings.keep_work_dir,
            keeper_program: None,
        });
        Arc::new(Self {
            name: name.to_owned(),
            settings: settings.clone(),
            executor: Arc::new(executor),
        })
    }
}

/// The folder of the commands' work directories, or `None` without a command.
/// Checks that directories can be created there.
///
/// # Errors
/// They cannot.
pub async fn work_dir_of_commands(config: &Config) -> Result<Option<PathBuf>, ConfigError> {
    if config.tasks.values().all(|task| task.command.is_none()) {
        return Ok(None);
    }
    let work_dir = config.worker.work_dir.clone();
    let work_dir = work_dir.unwrap_or_else(subprocess::default_work_dir);
    match subprocess::probe_work_dir(&work_dir).await {
        Ok(()) => Ok(Some(work_dir)),
        Err(error) => Err(ConfigError::BadValue {
            key: "worker.work_dir".to_owned(),
            reason: format!(
                "cannot create directories for jobs in {}: {error}",
                work_dir.display()
            ),
        }),
    }
}

/// All tasks that a worker knows.
#[derive(Default)]
pub struct ConfiguredTasks {
    tasks: BTreeMap<String, Arc<ConfiguredTask>>,
}

impl ConfiguredTasks {
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<ConfiguredTask>> {
        self.tasks.get(name)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// All tasks, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<ConfiguredTask>> {
        self.tasks.values()
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tasks.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_without_a_task_is_refused_by_name() {
        let settings = BTreeMap::from([("finetune".to_owned(), config::Task::default())]);
        let error = Registry::new()
            .configure(&settings, &config::Worker::default())
            .err()
            .unwrap();
        assert!(error.to_string().contains("[tasks.finetune]"), "{error}");
    }

    #[test]
    fn a_section_with_a_command_is_a_task_of_its_own() {
        let section = config::Task {
            command: Some(vec!["python3".to_owned()]),
            ..config::Task::default()
        };
        let settings = BTreeMap::from([("finetune".to_owned(), section)]);
        let worker = config::Worker::default();
        let tasks = Registry::new().configure(&settings, &worker).unwrap();
        assert_eq!(tasks.names().collect::<Vec<_>>(), ["finetune"]);

        let rehearsal = crate::tasks::rehearsal::Rehearsal;
        let both = Registry::new().with("finetune", rehearsal);
        let error = both.configure(&settings, &worker).err().unwrap();
        assert!(error.to_string().contains("[tasks.finetune]"), "{error}");
    }

    #[test]
    fn a_builtin_can_go_by_another_name() {
        let section = config::Task {
            builtin: Some("train-classifier".to_owned()),
            ..config::Task::default()
        };
        let settings = BTreeMap::from([("digits".to_owned(), section)]);
        let tasks = Registry::new()
            .configure(&settings, &config::Worker::default())
            .unwrap();
        assert_eq!(tasks.names().collect::<Vec<_>>(), ["digits"]);
    }
}
