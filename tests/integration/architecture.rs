//! The rules of the source tree, read off its `use` lines.

use std::path::{Path, PathBuf};

/// (what, the only places in `src` that may use it)
const ONLY_IN: &[(&str, &[&str])] = &[
    ("sqlx", &["store"]),
    ("google_cloud_pubsub", &["pubsub", "emulator"]),
    ("google_cloud_auth", &["pubsub"]),
    ("axum", &["emulator"]),
    ("tonic", &["emulator"]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("crate::cli", &["cli", "main"]),
    ("crate::app", &["app", "cli", "lib"]),
    ("crate::emulator", &["emulator", "cli"]),
];

const WORDS: &[&str] = &[
    "dedupe", "devices", "job", "message", "outcome", "report", "retry", "task",
];
const OUTSIDE_SYSTEMS: &[&str] = &["pubsub", "store", "executor", "nvidia", "emulator"];
const SERVICES: &[&str] = &["guard", "registry", "worker", "app", "cli"];

/// Every Rust file under `src` with its top-level module's name and its text.
fn sources() -> Vec<(PathBuf, String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let inside = path.strip_prefix(&root).unwrap();
            let top = inside.iter().next().unwrap().to_str().unwrap();
            let top = top.trim_end_matches(".rs").to_owned();
            let text = std::fs::read_to_string(&path).unwrap();
            files.push((inside.to_owned(), top, text));
        }
    }
    assert!(files.len() > 30, "the sources were not found");
    files
}

/// Whether a line of code names a path that begins with `what`.
fn uses(text: &str, what: &str) -> bool {
    let what = format!("{what}::");
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .any(|line| {
            line.match_indices(&what).any(|(at, _)| {
                !line[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_')
            })
        })
}

#[test]
fn each_outside_library_is_used_in_its_own_place_only() {
    for (path, top, text) in sources() {
        for (what, places) in ONLY_IN {
            assert!(
                places.contains(&top.as_str()) || !uses(&text, what),
                "{} uses {what}, which only {places:?} may",
                path.display()
            );
        }
    }
}

#[test]
fn words_import_only_words() {
    for (path, top, text) in sources() {
        if !WORDS.contains(&top.as_str()) {
            continue;
        }
        for (at, prefix) in text.match_indices("use crate::") {
            let rest = &text[at + prefix.len()..];
            let module = rest.split([':', ';']).next().unwrap();
            assert!(
                WORDS.contains(&module),
                "{} imports {module}",
                path.display()
            );
        }
    }
}

#[test]
fn outside_systems_import_neither_each_other_nor_services() {
    for (path, top, text) in sources() {
        if !OUTSIDE_SYSTEMS.contains(&top.as_str()) {
            continue;
        }
        let others = OUTSIDE_SYSTEMS.iter().chain(SERVICES);
        for other in others.filter(|other| **other != top) {
            assert!(
                !uses(&text, &format!("crate::{other}")),
                "{} imports {other}",
                path.display()
            );
        }
    }
}

#[test]
fn both_databases_have_the_same_migrations() {
    let names = |database: &str| -> Vec<String> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("migrations")
            .join(database);
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("postgres"), names("sqlite"));
}

#[test]
fn both_databases_have_the_same_functions_in_the_same_order() {
    let statements = |database: &str, file: &str| -> Vec<String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("src/store")
            .join(database)
            .join(file);
        std::fs::read_to_string(path)
            .unwrap()
            .lines()
            .filter_map(|line| line.strip_prefix("pub(super) async fn "))
            .map(|line| line.split(['(', '<']).next().unwrap().to_owned())
            .collect()
    };
    for file in [
        "attempts.rs",
        "claims.rs",
        "dead_letters.rs",
        "endings.rs",
        "orphans.rs",
        "reading.rs",
        "requests.rs",
        "running.rs",
    ] {
        assert_eq!(statements("postgres", file), statements("sqlite", file));
    }
}
