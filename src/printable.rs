//! Text from outside, made safe for a terminal.
//!
//! What a message, a program or a broker says may hold escape sequences, line breaks that
//! forge a row, and characters that turn the direction of a line. They are shown as escapes.

use std::borrow::Cow;

/// As one line; a line break is escaped too.
#[must_use]
pub fn line(text: &str) -> Cow<'_, str> {
    match text.contains(is_unsafe) {
        true => Cow::Owned(escaped(text)),
        false => Cow::Borrowed(text),
    }
}

/// As several lines, each but the first behind `indent`, so that none looks like a new entry.
#[must_use]
pub fn indented(text: &str, indent: &str) -> String {
    let lines: Vec<Cow<'_, str>> = text.lines().map(line).collect();
    lines.join(&format!("\n{indent}"))
}

fn is_unsafe(character: char) -> bool {
    let is_invisible = matches!(
        character,
        // Marks and overrides of the direction, and characters without a width.
        '\u{061C}' | '\u{200B}' | '\u{200E}' | '\u{200F}' | '\u{2028}'..='\u{202E}'
            | '\u{2060}'..='\u{2069}' | '\u{FEFF}'
    );
    is_invisible || character.is_control() && character != '\t'
}

fn escaped(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    for character in text.chars() {
        match is_unsafe(character) {
            true => written.extend(character.escape_default()),
            false => written.push(character),
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor_or_turns_the_line() {
        for (text, shown) in [
            ("x\n\u{1b}[31mred", "x\\n\\u{1b}[31mred"),
            ("a\rb\u{7}\u{9b}2J", "a\\rb\\u{7}\\u{9b}2J"),
            ("gpj.\u{202e}exe", "gpj.\\u{202e}exe"),
            ("zero\u{200b}width", "zero\\u{200b}width"),
            ("żółć 模型 😀\tplain", "żółć 模型 😀\tplain"),
        ] {
            assert_eq!(line(text), shown);
        }
    }

    #[test]
    fn no_line_of_a_value_looks_like_a_new_entry() {
        assert_eq!(indented("{\n \"a\": 1\r\n}", "  "), "{\n   \"a\": 1\n  }");
        assert_eq!(indented("a\rb", "  "), "a\\rb");
    }
}
