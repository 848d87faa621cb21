//! The last lines of a run's output, in bounded memory.

use std::collections::VecDeque;

use crate::printable::line;

const LINES: usize = 50;
const LINE_BYTES: usize = 500;

/// Stores bytes and converts them only on request, as a run may print millions of
/// lines.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    lines: VecDeque<Vec<u8>>,
}

impl Tail {
    pub(crate) fn push(&mut self, line: &[u8]) {
        let mut buffer = match self.lines.len() {
            LINES => self.lines.pop_front().unwrap_or_default(),
            _ => Vec::new(),
        };
        buffer.clear();
        buffer.extend_from_slice(&line[..line.len().min(LINE_BYTES)]);
        self.lines.push_back(buffer);
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.iter().map(|line| readable(line)).collect()
    }
}

/// Makes text safe for a log, a terminal and a database: replaces invalid UTF-8
/// and escapes control characters.
pub(crate) fn readable(bytes: &[u8]) -> String {
    line(&String::from_utf8_lossy(bytes)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_lines_are_stored_and_long_ones_are_truncated() {
        let mut tail = Tail::default();
        for number in 0..200 {
            tail.push(format!("line {number}").as_bytes());
        }
        tail.push(&[b'x'; 100_000]);
        let lines = tail.lines();
        assert_eq!(lines.len(), 50);
        assert_eq!(lines[0], "line 151");
        assert_eq!(lines[49], "x".repeat(500));
    }

    #[test]
    fn control_characters_and_broken_text_are_made_visible() {
        assert_eq!(readable(b"\x1b[31mred\0\tend"), "\\u{1b}[31mred\\u{0}\tend");
        assert_eq!(readable(b"caf\xc3\xa9 \xff"), "café \u{fffd}");
    }
}
