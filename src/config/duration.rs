//! Durations as text.

use std::time::Duration;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A duration as people write it in a configuration. The longest unit is a day: a month
/// of 30.44 days would turn `32days` into `1month 1day 13h 26m 24s`.
pub(crate) fn in_days(duration: Duration) -> String {
    let days = duration.as_secs() / DAY.as_secs();
    let rest = duration - DAY * u32::try_from(days).unwrap_or(u32::MAX);
    let rest_text = humantime::format_duration(rest).to_string();
    match (days, rest) {
        (0, _) => rest_text,
        (1, Duration::ZERO) => "1day".to_owned(),
        (1, _) => format!("1day {rest_text}"),
        (days, Duration::ZERO) => format!("{days}days"),
        (days, _) => format!("{days}days {rest_text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_written_as_it_was_read() {
        for text in [
            "0s",
            "90ms",
            "1m 30s",
            "1day",
            "1day 1h",
            "32days",
            "3650days 5s",
        ] {
            let duration = humantime::parse_duration(text).unwrap();
            assert_eq!(in_days(duration), text);
        }
    }
}
