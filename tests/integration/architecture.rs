//! The rules of the source tree, checked in its `use` lines.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const EMULATOR: &str = "crates/emulator";
const CLASSIFIER: &str = "crates/train-classifier";

/// (path, the only places that may use it: modules of `src`, and crates)
const ONLY_IN: &[(&str, &[&str])] = &[
    ("sqlx", &["store"]),
    ("google_cloud_pubsub", &["pubsub", EMULATOR]),
    ("google_cloud_auth", &["pubsub"]),
    ("googleapis_tonic_google_pubsub_v1", &[EMULATOR]),
    ("axum", &[EMULATOR]),
    ("tonic", &[EMULATOR]),
    ("argmin", &[CLASSIFIER]),
    ("ndarray", &[CLASSIFIER]),
    ("csv", &[CLASSIFIER]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("trainyard_emulator", &["cli"]),
    ("train_classifier", &["tasks"]),
    ("crate::cli", &["cli", "main"]),
    ("crate::app", &["app", "cli", "lib"]),
];

const WORDS: &[&str] = &[
    "database_url",
    "dedupe",
    "devices",
    "job",
    "json",
    "message",
    "outcome",
    "printable",
    "record",
    "report",
    "retry",
    "task",
];
const OUTSIDE_SYSTEMS: &[&str] = &["pubsub", "store", "executor", "nvidia"];
const SERVICES: &[&str] = &["guard", "registry", "worker", "app", "cli"];

struct Source {
    /// Relative to the repository's root.
    path: PathBuf,
    /// Its module of `src`, or its crate as `crates/NAME`.
    place: String,
    text: String,
}

/// Every Rust file of the daemon and of its crates, except tests.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("src")];
    for member in std::fs::read_dir(root.join("crates")).unwrap() {
        folders.push(member.unwrap().path().join("src"));
    }
    assert!(folders.len() > 1, "the crates were not found");
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let path = path.strip_prefix(root).unwrap().to_owned();
            let place = place(&path);
            sources.push(Source { path, place, text });
        }
    }
    assert!(sources.len() > 30, "the sources were not found");
    sources
}

fn place(path: &Path) -> String {
    let names: Vec<&str> = path.iter().map(|name| name.to_str().unwrap()).collect();
    match names[..] {
        ["crates", member, ..] => format!("crates/{member}"),
        ["src", module, ..] => module.trim_end_matches(".rs").to_owned(),
        _ => panic!("{} is in neither", path.display()),
    }
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
    for Source { path, place, text } in sources() {
        for (what, places) in ONLY_IN {
            assert!(
                places.contains(&place.as_str()) || !uses(&text, what),
                "{} uses {what}, which only {places:?} may",
                path.display()
            );
        }
    }
}

#[test]
fn crates_do_not_know_the_daemon() {
    for Source { path, place, text } in sources() {
        assert!(
            !place.starts_with("crates/") || !uses(&text, "trainyard"),
            "{} uses trainyard",
            path.display()
        );
    }
}

#[test]
fn words_import_only_words() {
    for Source { path, place, text } in sources() {
        if !WORDS.contains(&place.as_str()) {
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
    for Source { path, place, text } in sources() {
        if !OUTSIDE_SYSTEMS.contains(&place.as_str()) {
            continue;
        }
        let others = OUTSIDE_SYSTEMS.iter().chain(SERVICES);
        for other in others.filter(|other| **other != place) {
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
        "claims.rs",
        "dead_letters.rs",
        "endings.rs",
        "ledger.rs",
        "queue.rs",
        "requests.rs",
        "running.rs",
        "schema.rs",
        "takeover.rs",
    ] {
        assert_eq!(statements("postgres", file), statements("sqlite", file));
    }
}

/// (module, its sibling): the first names the second in its own or its children's code.
fn uses_of_siblings() -> BTreeSet<(String, String)> {
    let mut uses = BTreeSet::new();
    for Source { path, text, .. } in sources() {
        let Ok(inside) = path.strip_prefix("src") else {
            continue;
        };
        let inside = inside.with_extension("");
        let module: Vec<&str> = inside.iter().map(|name| name.to_str().unwrap()).collect();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for named in named_modules(code, &module) {
            let shared = module.iter().zip(&named).take_while(|(a, b)| *a == *b);
            let shared = shared.count();
            if shared < module.len() && shared < named.len() {
                let sibling = |of: &[&str]| of[..=shared].join("::");
                uses.insert((sibling(&module), sibling(&named)));
            }
        }
    }
    uses
}

/// The absolute paths that the code of a module names, with `crate::` or `super::`.
fn named_modules<'a>(code: &'a str, module: &[&'a str]) -> Vec<Vec<&'a str>> {
    let mut named = Vec::new();
    let lines = code.lines().map(str::trim_start);
    for line in lines.filter(|line| !line.starts_with("//")) {
        let words = line.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
        for word in words {
            let mut segments = word.split("::").peekable();
            let mut path = match segments.peek() {
                Some(&"crate") => Vec::new(),
                Some(&"super") => module.to_vec(),
                _ => continue,
            };
            for segment in segments.filter(|segment| !segment.is_empty()) {
                match segment {
                    "crate" => {}
                    "super" => drop(path.pop()),
                    name => path.push(name),
                }
            }
            named.push(path);
        }
    }
    named
}

#[test]
fn siblings_do_not_use_each_other_in_a_circle() {
    let mut uses = uses_of_siblings();
    assert!(uses.len() > 100, "the uses were not found");
    // Whoever uses nothing, or is used by nobody, is in no circle.
    loop {
        let users: BTreeSet<String> = uses.iter().map(|(user, _)| user.clone()).collect();
        let used: BTreeSet<String> = uses.iter().map(|(_, used)| used.clone()).collect();
        let before = uses.len();
        uses.retain(|(user, of)| users.contains(of) && used.contains(user));
        if uses.len() == before {
            break;
        }
    }
    assert!(uses.is_empty(), "circles: {uses:#?}");
}
