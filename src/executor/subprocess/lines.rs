//! Splits a stream of bytes into lines of bounded length.

use memchr::memchr2;

use super::report_line::PREFIX;

/// The rest of a longer line is dropped.
const MAX_LINE: usize = 16 << 10;
/// For a report line, as a result may be large.
const MAX_REPORT_LINE: usize = 256 << 10;

/// A line ends with a newline or, for progress bars, a carriage return. Blank
/// lines are skipped.
#[derive(Default)]
pub(super) struct Lines {
    /// The line so far.
    line: Vec<u8>,
    /// The line was too long and has been emitted; the rest is dropped.
    skipping: bool,
}

/// One line, without its end.
#[derive(Debug, PartialEq)]
pub(super) struct Line<'a> {
    pub(super) bytes: &'a [u8],
    /// The line was longer.
    pub(super) cut: bool,
}

impl Lines {
    /// Adds bytes, and emits each line that they complete.
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(Line<'_>)) {
        while let Some(end) = memchr2(b'\n', b'\r', bytes) {
            self.add(&bytes[..end], &mut each);
            self.end(&mut each);
            bytes = &bytes[end + 1..];
        }
        self.add(bytes, &mut each);
    }

    /// Emits the last line, which may lack a newline.
    pub(super) fn end(&mut self, mut each: impl FnMut(Line<'_>)) {
        if !self.skipping && !self.line.trim_ascii().is_empty() {
            each(Line {
                bytes: &self.line,
                cut: false,
            });
        }
        self.line.clear();
        self.skipping = false;
    }

    fn add(&mut self, bytes: &[u8], mut each: impl FnMut(Line<'_>)) {
        if self.skipping {
            return;
        }
        let room = self.max_length(bytes) - self.line.len();
        self.line.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if bytes.len() > room {
            each(Line {
                bytes: &self.line,
                cut: true,
            });
            self.line = Vec::new();
            self.skipping = true;
        }
    }

    /// The limit for this line, which depends on its prefix.
    fn max_length(&self, more: &[u8]) -> usize {
        let beginning = self.line.iter().chain(more).take(PREFIX.len());
        match beginning.eq(PREFIX.as_bytes()) {
            true => MAX_REPORT_LINE,
            false => MAX_LINE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<(String, bool)> {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        let mut see = |line: Line<'_>| {
            seen.push((String::from_utf8_lossy(line.bytes).into_owned(), line.cut));
        };
        for chunk in chunks {
            lines.feed(chunk, &mut see);
        }
        lines.end(&mut see);
        seen
    }

    fn whole(line: &str) -> (String, bool) {
        (line.to_owned(), false)
    }

    #[test]
    fn lines_are_found_however_the_bytes_arrive() {
        let expected = vec![whole("one"), whole("two"), whole(" 50%"), whole("rest")];
        let text = b"one\r\n\ntwo\n \n 50%\rrest";
        assert_eq!(split(&[text]), expected);
        let single: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(split(&single), expected);
    }

    #[test]
    fn an_endless_line_is_cut_at_once_and_its_rest_dropped() {
        let chunk = [b'x'; 10_000];
        let mut chunks: Vec<&[u8]> = vec![&chunk; 100];
        chunks.push(b"\nnext");
        let lines = split(&chunks);
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0].0.len(), lines[0].1), (16 << 10, true));
        assert_eq!(lines[1], whole("next"));
    }

    #[test]
    fn a_report_line_may_be_longer() {
        let said = format!("@trainyard {}", "x".repeat(100_000));
        for size in [1, 7, 1000, 200_000] {
            let chunks: Vec<&[u8]> = said.as_bytes().chunks(size).collect();
            assert_eq!(split(&chunks), [whole(&said)]);
        }
    }
}
