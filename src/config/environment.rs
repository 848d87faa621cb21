//! The layer of `TRAINYARD__SECTION__KEY` variables.

use std::ffi::OsString;

use config::Config as Layers;
use toml::{Table, Value};

use super::error::ConfigError;

const PREFIX: &str = "TRAINYARD__";
const SEPARATOR: &str = "__";

/// The variables as TOML. `files` are the layers below, whose tasks and subscriptions a
/// variable may name in capitals and with `_` for what a shell does not allow in a name.
///
/// # Errors
/// A [`ConfigError`] that names the variable.
pub(super) fn layer(
    variables: impl Iterator<Item = (OsString, OsString)>,
    files: &Layers,
) -> Result<String, ConfigError> {
    let mut table = Table::new();
    for (name, value) in variables {
        let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else {
            continue;
        };
        let invalid = |reason: &str| ConfigError::Invalid(format!("variable {name}: {reason}"));
        let value = value.to_str().ok_or_else(|| invalid("it is not UTF-8"))?;
        let path = path_of(&name[PREFIX.len()..], files).map_err(|reason| invalid(&reason))?;
        insert(&mut table, &path, parsed(&path, value)).map_err(invalid)?;
    }
    toml::to_string(&table).map_err(|error| ConfigError::Unreadable {
        reason: error.to_string(),
    })
}

/// Keys are written in small letters; names of tasks, subscriptions and a task's variables as
/// they are.
fn path_of(name: &str, files: &Layers) -> Result<Vec<String>, String> {
    let written: Vec<&str> = name.split(SEPARATOR).collect();
    let mut path: Vec<String> = written.iter().map(|part| part.to_lowercase()).collect();
    let has_sections = ["tasks", "subscriptions"].contains(&path[0].as_str());
    if has_sections && let Some(given) = written.get(1) {
        path[1] = section_name(&path[0], given, files)?;
    }
    if has_sections
        && path.get(2).is_some_and(|key| key == "env")
        && let Some(variable) = written.get(3)
    {
        path[3] = (*variable).to_owned();
    }
    Ok(path)
}

/// The section that a variable means: the one with exactly this name, or else the only one
/// that differs in case and `_` alone, or else a new one. A new one in capitals, as is usual
/// for variables, is written in small letters.
fn section_name(kind: &str, given: &str, files: &Layers) -> Result<String, String> {
    let known = files.get_table(kind).unwrap_or_default();
    if known.contains_key(given) {
        return Ok(given.to_owned());
    }
    let mut alike: Vec<&str> = known
        .keys()
        .map(String::as_str)
        .filter(|name| plain(name) == plain(given))
        .collect();
    alike.sort_unstable();
    match alike[..] {
        [name] => Ok(name.to_owned()),
        [] if given.chars().any(char::is_lowercase) => Ok(given.to_owned()),
        [] => Ok(given.to_lowercase()),
        _ => Err(format!("it may mean any of {}", alike.join(", "))),
    }
}

fn plain(name: &str) -> String {
    let characters = name.chars();
    let characters = characters.map(|c| if c.is_alphanumeric() { c } else { '_' });
    characters.flat_map(char::to_lowercase).collect()
}

/// A list, a table or a quoted string in TOML; anything else is the text itself, from which a
/// key of another type reads its number, size or time. A task's variable is always text.
fn parsed(path: &[String], text: &str) -> Value {
    let as_text = || Value::String(text.to_owned());
    let is_variable = matches!(path, [kind, _, env, _] if kind == "tasks" && env == "env");
    if is_variable || !text.starts_with(['[', '{', '"', '\'']) {
        return as_text();
    }
    let parsed: Result<Table, _> = format!("value = {text}").parse();
    let alone = parsed.ok().filter(|table| table.len() == 1);
    let value = alone.and_then(|mut table| table.remove("value"));
    value.unwrap_or_else(as_text)
}

fn insert(table: &mut Table, path: &[String], value: Value) -> Result<(), &'static str> {
    const TWICE: &str = "another variable sets the same key, or a part of it";
    match path {
        [] => Ok(()),
        [key] if table.contains_key(key) => Err(TWICE),
        [key] => {
            table.insert(key.clone(), value);
            Ok(())
        }
        [key, rest @ ..] => {
            let section = table
                .entry(key.as_str())
                .or_insert(Value::Table(Table::new()));
            insert(section.as_table_mut().ok_or(TWICE)?, rest, value)
        }
    }
}

#[cfg(test)]
mod tests {
    use config::{File, FileFormat};

    use super::*;

    fn layer_over(file: &str, variables: &[(&str, &str)]) -> Result<Table, ConfigError> {
        let files = Layers::builder()
            .add_source(File::from_str(file, FileFormat::Toml))
            .build()
            .unwrap();
        let variables = variables
            .iter()
            .map(|(name, value)| (name.into(), value.into()));
        Ok(layer(variables, &files)?.parse().unwrap())
    }

    #[test]
    fn values_are_toml_where_text_would_not_do() {
        let layer = layer_over(
            "",
            &[
                ("TRAINYARD__WORKER__SLOTS", "4"),
                ("TRAINYARD__WORKER__GPUS", r#"["0","1"]"#),
                ("TRAINYARD__TASKS__FINETUNE__COMMAND", "['sh', '-c', 'x']"),
                ("TRAINYARD__TASKS__FINETUNE__BACKOFF", "{ initial = '5s' }"),
                ("TRAINYARD__PUBSUB__EMULATOR_HOST", "[::1]:8085"),
                ("TRAINYARD__PUBSUB__PROJECT", "\"1e5\""),
                ("TRAINYARD__DATABASE__URL", "'a'\nb = 1"),
                ("TRAINYARD_CONFIG", "another"),
            ],
        );
        let expected: Table = r#"
            [worker]
            slots = "4"
            gpus = ["0", "1"]
            [tasks.finetune]
            command = ["sh", "-c", "x"]
            backoff.initial = "5s"
            [database]
            url = "'a'\nb = 1"
            [pubsub]
            emulator_host = "[::1]:8085"
            project = "1e5"
        "#
        .parse()
        .unwrap();
        assert_eq!(layer.unwrap(), expected);
    }

    #[test]
    fn a_section_keeps_its_name() {
        let file = "[tasks.MyTask]\n[subscriptions.heavy-task]\n[tasks.a-b]\n[tasks.a_b]";
        for (variable, section, name) in [
            ("TASKS__MyTask__ACK", "tasks", "MyTask"),
            ("TASKS__MYTASK__ACK", "tasks", "MyTask"),
            ("TASKS__NewTask__ACK", "tasks", "NewTask"),
            ("TASKS__NEW_TASK__ACK", "tasks", "new_task"),
            ("TASKS__a_b__ACK", "tasks", "a_b"),
            (
                "SUBSCRIPTIONS__HEAVY_TASK__PREFETCH",
                "subscriptions",
                "heavy-task",
            ),
        ] {
            let layer = layer_over(file, &[(&format!("TRAINYARD__{variable}"), "x")]).unwrap();
            let sections = layer[section].as_table().unwrap();
            assert_eq!(sections.keys().collect::<Vec<_>>(), [name], "{variable}");
        }
        let ambiguous = layer_over(file, &[("TRAINYARD__TASKS__A_B__ACK", "x")]);
        assert!(ambiguous.unwrap_err().to_string().contains("a-b, a_b"));
    }

    #[test]
    fn a_tasks_variables_keep_their_names_and_their_text() {
        for text in ["secret", "1e5", "[\"a\"]", "\"quoted\""] {
            let variable = ("TRAINYARD__TASKS__T__ENV__Api_Key", text);
            let layer = layer_over("", &[variable]).unwrap();
            let value = layer["tasks"]["t"]["env"]["Api_Key"].as_str();
            assert_eq!(value, Some(text));
        }
    }

    #[test]
    fn a_key_is_set_once() {
        let whole_and_part = [
            ("TRAINYARD__TASKS__T", "{ ack = 'before_run' }"),
            ("TRAINYARD__TASKS__T__ACK", "after_run"),
        ];
        let error = layer_over("", &whole_and_part).unwrap_err().to_string();
        assert!(error.contains("TRAINYARD__TASKS__T__ACK"), "{error}");
    }
}
