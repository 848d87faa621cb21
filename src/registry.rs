//! Name → task: which executor runs a request, under which settings.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{self, Config, ConfigError};
use crate::executor::subprocess::{self, Limits, PERMANENT_EXIT_CODES, Subprocess};
use crate::executor::{Executor, InProcess};
use crate::task::Task;
use crate::tasks;

/// The tasks that a program brings along, by the `name` their requests carry.
///
/// What the configuration says about them (ack timing, timeout) is joined on
/// when the worker starts.
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

    /// Joins the tasks with their configuration. A task that the program
    /// registered needs no section; a section needs a task, registered or
    /// built in, or a command.
    ///
    /// # Errors
    /// A section names a task that nobody brought along, or gives a registered
    /// one another way to run.
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
                    "[tasks.{name}] has a `command`, but the program registers a task of that name: leave one of them out"
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
                    "[tasks.{name}] does not say how to run it: set `command = [\"PROGRAM\", …]` or `builtin = \"…\"` (one of: {}), or register a task of that name in the program",
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

/// A command is killed when its stop grace is over. Its executor gives its
/// keeper a little longer, and is to have the last word.
const LAST_NEWS: Duration = Duration::from_secs(6);

impl ConfiguredTask {
    /// How long a run that is asked to stop is waited for.
    #[must_use]
    pub fn stop_patience(&self, worker_stop_grace: Duration) -> Duration {
        let grace = self.settings.stop_grace.unwrap_or(worker_stop_grace);
        match self.settings.command {
            Some(_) => grace + LAST_NEWS,
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
            limits: Limits {
                memory: settings.memory.map(|size| size.0),
                nice: settings.nice,
                open_files: settings.open_files,
            },
            work_dir: work_dir.unwrap_or_else(subprocess::default_work_dir),
            keep_work_dir: settings.keep_work_dir,
            keeper: None,
        });
        Arc::new(Self {
            name: name.to_owned(),
            settings: settings.clone(),
            executor: Arc::new(executor),
        })
    }
}

/// Where commands have their work directories, if there is any command; they
/// can be made there.
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
                "jobs cannot have their directories in {}: {error}",
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

    /// All, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<ConfiguredTask>> {
        self.tasks.values()
    }

    /// The names, in order.
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
