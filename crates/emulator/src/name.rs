//! The names of topics and subscriptions, and their rules.
//!
//! Rules: <https://cloud.google.com/pubsub/docs/pubsub-basics#resource_names>.

use super::error::BrokerError;

/// The topic that a subscription shows once its topic is deleted.
pub const DELETED_TOPIC: &str = "_deleted-topic_";

const ID_LENGTH: std::ops::RangeInclusive<usize> = 3..=255;

/// Checks `projects/PROJECT/topics/ID`.
///
/// # Errors
/// `InvalidArgument`, naming the rule that the name breaks.
pub fn check_topic(name: &str) -> Result<(), BrokerError> {
    check(name, "topics")
}

/// Checks `projects/PROJECT/subscriptions/ID`.
///
/// # Errors
/// `InvalidArgument`, naming the rule that the name breaks.
pub fn check_subscription(name: &str) -> Result<(), BrokerError> {
    check(name, "subscriptions")
}

/// Checks `projects/PROJECT`.
///
/// # Errors
/// `InvalidArgument` if it has another form.
pub fn check_project(name: &str) -> Result<(), BrokerError> {
    match name.split_once('/') {
        Some(("projects", project)) if is_project(project) => Ok(()),
        _ => Err(BrokerError::InvalidArgument(format!(
            "Invalid project name: (name={name}); expected projects/PROJECT."
        ))),
    }
}

fn check(name: &str, collection: &str) -> Result<(), BrokerError> {
    let invalid = |why: &str| {
        Err(BrokerError::InvalidArgument(format!(
            "Invalid [{collection}] name: (name={name}); {why}."
        )))
    };
    let parts: Vec<&str> = name.split('/').collect();
    let ["projects", project, kind, id] = parts[..] else {
        return invalid(&format!("expected projects/PROJECT/{collection}/ID"));
    };
    if kind != collection || !is_project(project) {
        return invalid(&format!("expected projects/PROJECT/{collection}/ID"));
    }
    if !ID_LENGTH.contains(&id.len()) {
        return invalid("the ID must have 3 to 255 characters");
    }
    if !id.starts_with(|first: char| first.is_ascii_alphabetic()) {
        return invalid("the ID must start with a letter");
    }
    if !id.chars().all(is_id_character) {
        return invalid("the ID may hold only letters, digits and - _ . ~ + %");
    }
    if id
        .get(..4)
        .is_some_and(|start| start.eq_ignore_ascii_case("goog"))
    {
        return invalid("the ID must not start with goog");
    }
    Ok(())
}

/// Looser than Google's own rule, so that short test projects pass.
fn is_project(project: &str) -> bool {
    !project.is_empty()
        && project
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':'))
}

fn is_id_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '~' | '+' | '%')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_well_formed_name_passes() {
        for id in ["abc", "light-task", "a.b_c~d+e%f", &"x".repeat(255)] {
            assert_eq!(check_topic(&format!("projects/p/topics/{id}")), Ok(()));
        }
        assert_eq!(check_subscription("projects/p-1/subscriptions/sub"), Ok(()));
        assert_eq!(check_project("projects/p"), Ok(()));
    }

    #[test]
    fn a_malformed_name_is_an_invalid_argument() {
        let long = format!("projects/p/topics/{}", "x".repeat(256));
        for name in [
            "",
            "light-task",
            "projects/p/topics/",
            "projects/p/topics/ab",
            "projects/p/topics/1abc",
            "projects/p/topics/goog-x",
            "projects/p/topics/a b c",
            "projects/p/topics/abc/d",
            "projects//topics/abc",
            "projects/p/subscriptions/abc",
            &long,
        ] {
            let refused = check_topic(name);
            assert!(
                matches!(refused, Err(BrokerError::InvalidArgument(_))),
                "{name}: {refused:?}"
            );
        }
    }
}
