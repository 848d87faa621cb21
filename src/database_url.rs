//! Database URLs: what is wrong with one, how it is shown, and how the driver reads it.
//!
//! A URL holds a password, so nothing here returns a part of a URL that could not be read.

use serde::{Deserialize, Serialize};
use url::Url;

/// What stands between trainyard and PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "String")]
pub enum Pooler {
    /// Nothing, or nothing that is noticed: each connection has a session to itself.
    None,
    /// A pooler that gives a connection another session for each transaction.
    Transaction,
}

impl TryFrom<String> for Pooler {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "none" => Ok(Self::None),
            "transaction" => Ok(Self::Transaction),
            "session" => {
                Err("write \"transaction\", which also suits a pooler in session mode".to_owned())
            }
            _ => Err(format!(
                "{text:?} is neither \"none\" nor \"transaction\"; remove it to have it found out"
            )),
        }
    }
}

const HIDDEN: &str = "***";

/// The parameters that the driver knows, and those that trainyard takes in its place.
const PARAMETERS: &[&str] = &[
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "target_session_attrs",
    "user",
];
/// Other names that the driver knows for some of them, and one parameter of its own.
const ALSO_KNOWN: &[&str] = &[
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "ssl-root-cert",
    "statement-cache-capacity",
];
/// The parameters whose values may be shown.
const SHOWN_PARAMETERS: &[&str] = &[
    "dbname", "host", "hostaddr", "mode", "port", "ssl-mode", "sslmode",
];
const SSL_MODES: &[&str] = &[
    "disable",
    "allow",
    "prefer",
    "require",
    "verify-ca",
    "verify-full",
];
/// A worker needs a server that it can write to, and finds out by writing.
const WRITABLE: &[&str] = &["any", "read-write", "primary"];

const ENCODE: &str =
    "in a user or password write `#` as %23, `/` as %2F, `?` as %3F, `@` as %40 and `%` as %25";

/// What is wrong with a URL, for people. Does not quote it.
#[must_use]
pub fn problem(url: &str) -> Option<String> {
    if let Some(file) = url.strip_prefix("sqlite:") {
        return problem_of_file(file);
    }
    let Some(rest) = after_scheme(url) else {
        return Some("it must start with postgres:// or sqlite://".to_owned());
    };
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
    // A password that is not encoded may look like a path or a query, up to its `@`.
    let is_cut = !authority.contains('@') && tail.contains('@');
    if path.contains('@') || is_cut || tail.contains('#') || !has_valid_percents(authority) {
        return Some(format!("it cannot be read; {ENCODE}"));
    }
    let hosts = authority
        .rsplit_once('@')
        .map_or(authority, |(_, hosts)| hosts);
    if hosts.contains(',') || parameter(query, "host").is_some_and(|host| host.contains(',')) {
        return Some(
            "it names several hosts: name one, such as a proxy or a DNS name that leads to the primary"
                .to_owned(),
        );
    }
    if authority.ends_with('@') && parameter(query, "host").is_none() {
        return Some("it names no host".to_owned());
    }
    if Url::parse(&with_host(url)).is_err() {
        return Some(format!("its host or port cannot be read; {ENCODE}"));
    }
    problem_of_parameters(query)
}

fn problem_of_file(file: &str) -> Option<String> {
    let file = file.strip_prefix("//").unwrap_or(file);
    let (path, query) = file.split_once('?').unwrap_or((file, ""));
    if path.is_empty() {
        return Some("it names no file: write sqlite://PATH".to_owned());
    }
    (path == ":memory:" || parameter(query, "mode").as_deref() == Some("memory")).then(|| {
        "a database in memory is lost with its process, and messages would run twice: name a file, as in sqlite://PATH"
            .to_owned()
    })
}

fn problem_of_parameters(query: &str) -> Option<String> {
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
        let is_known = PARAMETERS.contains(&&*name)
            || ALSO_KNOWN.contains(&&*name)
            || name.starts_with("options[");
        let problem = match &*name {
            // It is a part of a password.
            _ if !is_known && query.contains('@') => format!("it cannot be read; {ENCODE}"),
            _ if !is_known => format!(
                "its parameter `{}` is not known; known are {}",
                name.escape_debug(),
                PARAMETERS.join(", ")
            ),
            "sslmode" | "ssl-mode" if !SSL_MODES.contains(&&*value.to_lowercase()) => {
                format!("its sslmode must be one of {}", SSL_MODES.join(", "))
            }
            "port" if value.parse::<u16>().is_err() => "its port is not a port number".to_owned(),
            "target_session_attrs" if !WRITABLE.contains(&&*value) => format!(
                "its target_session_attrs must be one of {}, since a worker writes",
                WRITABLE.join(", ")
            ),
            _ => continue,
        };
        return Some(problem);
    }
    None
}

fn after_scheme(url: &str) -> Option<&str> {
    let rest = url.strip_prefix("postgres://");
    rest.or_else(|| url.strip_prefix("postgresql://"))
}

fn parameter(query: &str, name: &str) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    let value = pairs.find_map(|(key, value)| (key == name).then_some(value))?;
    Some(value.into_owned()).filter(|value| !value.is_empty())
}

/// Whether each `%` begins an escape.
fn has_valid_percents(text: &str) -> bool {
    text.split('%').skip(1).all(|after| {
        let escape = after.as_bytes().get(..2);
        escape.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

/// `user@/db?host=/socket/dir`, as libpq takes it, with a host that the parameter overrides.
fn with_host(url: &str) -> String {
    match url.split_once("@/") {
        Some((before, after)) if !before.contains('?') => format!("{before}@localhost/{after}"),
        _ => url.to_owned(),
    }
}

/// The URL as the driver reads it: with a host, and without what only libpq knows.
#[must_use]
pub fn for_driver(url: &str) -> String {
    let url = with_host(url);
    let Ok(mut parsed) = Url::parse(&url) else {
        return url;
    };
    let pairs: Vec<(String, String)> = parsed
        .query_pairs()
        .filter(|(name, _)| name != "target_session_attrs")
        .map(|(name, value)| (name.into_owned(), value.into_owned()))
        .collect();
    parsed.set_query(None);
    if !pairs.is_empty() {
        parsed.query_pairs_mut().extend_pairs(pairs);
    }
    parsed.to_string()
}

/// The URL without secrets: no user, no password, and only the parameters that are known to
/// be harmless. Nothing of a URL with a problem is shown but its scheme.
#[must_use]
pub fn masked(url: &str) -> String {
    if url.starts_with("sqlite:") {
        return url.to_owned();
    }
    let Some(rest) = after_scheme(url) else {
        return HIDDEN.to_owned();
    };
    let scheme = &url[..url.len() - rest.len()];
    if problem(url).is_some() {
        return format!("{scheme}{HIDDEN}");
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let place = match place.rsplit_once('@') {
        Some((_, place)) => format!("{HIDDEN}@{place}"),
        None => place.to_owned(),
    };
    let pairs = url::form_urlencoded::parse(query.as_bytes());
    let shown: Vec<String> = pairs
        .map(|(name, value)| match SHOWN_PARAMETERS.contains(&&*name) {
            true => format!("{name}={value}"),
            false => format!("{name}={HIDDEN}"),
        })
        .collect();
    match shown.is_empty() {
        true => format!("{scheme}{place}"),
        false => format!("{scheme}{place}?{}", shown.join("&")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_url_is_said_without_quoting_it() {
        for (url, says) in [
            ("nonsense", "must start with"),
            ("mysql://h/secret", "must start with"),
            ("postgres://u:p@ss/secret#rd@host/db", "%23"),
            ("postgres://u:sec/ret@host/db", "%2F"),
            ("postgres://u:sec?ret@host/db", "%3F"),
            ("postgres://u:5?secret@host/db", "%3F"),
            ("postgres://u:5?user=secret@host/db", "%3F"),
            ("postgres://u:5?host=secret@host/db", "%3F"),
            ("postgres://u:5/x?dbname=secret@host/db", "%3F"),
            ("postgres://u:sec%ret@host/db", "%25"),
            ("postgres://u:secret/db", "host or port"),
            ("postgres://u:secret@h:port/db", "host or port"),
            ("postgres://a,b/secret", "several hosts"),
            ("postgres://a:1,b:2/secret", "several hosts"),
            ("postgres:///secret?host=a,b", "several hosts"),
            ("postgres://secret@/db", "no host"),
            ("postgres://h/secret?sslmode=on", "sslmode"),
            ("postgres://h/secret?port=http", "port number"),
            ("postgres://h/secret?connect_timeout=5", "`connect_timeout`"),
            ("postgres://h/secret?target_session_attrs=standby", "writes"),
            ("sqlite://", "names no file"),
            ("sqlite:", "names no file"),
            ("sqlite://:memory:", "in memory"),
            ("sqlite::memory:", "in memory"),
            ("sqlite://a.db?mode=memory", "in memory"),
        ] {
            let problem = problem(url).unwrap_or_default();
            assert!(problem.contains(says), "{url}: {problem}");
            assert!(!problem.contains("secret"), "{problem}");
            assert!(!problem.contains("ret@"), "{problem}");
        }
    }

    #[test]
    fn urls_that_libpq_takes_are_read() {
        for (url, driver) in [
            ("postgres://u:p@h:5433/db", "postgres://u:p@h:5433/db"),
            ("postgresql://h/db", "postgresql://h/db"),
            ("postgres://u:p%40%2F@h/db", "postgres://u:p%40%2F@h/db"),
            ("postgres://u:p@ss@h/db", "postgres://u:p%40ss@h/db"),
            ("postgres://u@[::1]:5433/db", "postgres://u@[::1]:5433/db"),
            (
                "postgres://u:p@/db?host=/cloudsql/a:b:c",
                "postgres://u:p@localhost/db?host=%2Fcloudsql%2Fa%3Ab%3Ac",
            ),
            (
                "postgres:///db?host=/run/postgresql",
                "postgres:///db?host=%2Frun%2Fpostgresql",
            ),
            (
                "postgres://h/db?target_session_attrs=read-write&sslmode=require",
                "postgres://h/db?sslmode=require",
            ),
            (
                "postgres://h/db?ssl-mode=VERIFY-FULL&ssl-ca=/ca.pem",
                "postgres://h/db?ssl-mode=VERIFY-FULL&ssl-ca=%2Fca.pem",
            ),
        ] {
            assert_eq!(problem(url), None, "{url}");
            assert_eq!(for_driver(url), driver);
        }
    }

    #[test]
    fn no_secret_is_shown() {
        for (url, shown) in [
            ("postgres://u:pw@h/db", "postgres://***@h/db"),
            ("postgres://u:p@w@h/db", "postgres://***@h/db"),
            ("postgres://u@h/db", "postgres://***@h/db"),
            ("postgres://h/db", "postgres://h/db"),
            (
                "postgres://h/db?user=u&password=p%40w&sslmode=require",
                "postgres://h/db?user=***&password=***&sslmode=require",
            ),
            ("postgres://u:p@ss/w#rd@host/db", "postgres://***"),
            ("postgres://h/db?passwd=pw", "postgres://***"),
            ("postgres://u:12?user=pw@host/db", "postgres://***"),
            ("postgres://u:12?host=pw@host/db", "postgres://***"),
            ("sqlite://.trainyard/a.db", "sqlite://.trainyard/a.db"),
            ("nonsense with pw", "***"),
        ] {
            assert_eq!(masked(url), shown);
        }
    }
}
