//! Reads a labelled table of numbers from a CSV file.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use csv::{ByteRecord, Terminator, Trim};
use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

use super::error::TrainError;

/// The most feature cells of one table: 1 GiB of numbers. Training needs about twice
/// that.
const MAX_CELLS: usize = 1 << 27;

/// The most classes of a target. With more, the column is surely no label (an id, a
/// measurement) and the weights would not fit in memory.
const MAX_CLASSES: usize = 1_000;

/// How many rows are read between two checks of the stop signal.
const ROWS_PER_STOP_CHECK: usize = 256;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// A labelled table, entirely in memory.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Table {
    /// The names of the columns other than the target, in file order.
    pub features: Vec<String>,
    /// The cells, row after row: `rows × features`, all finite.
    pub values: Vec<f64>,
    /// Each row's class, as an index into `classes`.
    pub labels: Vec<usize>,
    /// The distinct labels, sorted as text.
    pub classes: Vec<String>,
    /// The SHA-256 of the file as stored, in hexadecimal.
    pub sha256: String,
}

impl Table {
    /// Reads a CSV file with a header row, gzipped or not, in which every column but
    /// `target` is a number. Skips blank lines.
    ///
    /// # Errors
    /// [`TrainError::Dataset`] for a missing file or one without such a table, naming the
    /// line (from 1, the header's) or column; [`TrainError::Io`] when reading fails;
    /// [`TrainError::Stopped`] when `stopped` returns true.
    pub fn read(path: &Path, target: &str, stopped: &dyn Fn() -> bool) -> Result<Self, TrainError> {
        let mut file = HashedFile::open(path)?;
        let mut table = {
            let source = decompressed(&mut file, path)?;
            read_csv(source, path, target, stopped)?
        };
        // The decoder may stop before the end; the digest covers the whole file.
        io::copy(&mut file, &mut io::sink()).map_err(cannot_read(path))?;
        table.sha256 = file.digest();
        Ok(table)
    }

    pub fn rows(&self) -> usize {
        self.labels.len()
    }

    /// The cells of one row, in the order of `features`.
    pub fn row(&self, row: usize) -> &[f64] {
        let width = self.features.len();
        &self.values[row * width..(row + 1) * width]
    }
}

fn cannot_read(path: &Path) -> impl FnOnce(io::Error) -> TrainError + '_ {
    TrainError::io("cannot read the dataset", path)
}

/// A file whose digest is computed as it is read.
struct HashedFile {
    file: File,
    sha256: Sha256,
}

impl HashedFile {
    fn open(path: &Path) -> Result<Self, TrainError> {
        // Checked before opening: opening a named pipe would block.
        let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                TrainError::Dataset(format!("the dataset {} does not exist", path.display()))
            }
            _ => cannot_read(path)(error),
        })?;
        if !metadata.is_file() {
            let reason = format!("the dataset {} is not a file", path.display());
            return Err(TrainError::Dataset(reason));
        }
        let file = File::open(path).map_err(cannot_read(path))?;
        let sha256 = Sha256::new();
        Ok(Self { file, sha256 })
    }

    fn digest(self) -> String {
        let bytes = self.sha256.finalize();
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Read for HashedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.sha256.update(&buffer[..count]);
        Ok(count)
    }
}

/// The file's text, and whether it is gunzipped.
struct Source<'a> {
    text: Box<dyn Read + 'a>,
    gzip: bool,
}

fn decompressed<'a>(file: &'a mut HashedFile, path: &Path) -> Result<Source<'a>, TrainError> {
    let mut stored = BufReader::with_capacity(1 << 16, file);
    let start = stored.fill_buf().map_err(cannot_read(path))?;
    if start.is_empty() {
        return Err(flaw(path, "the file is empty"));
    }
    let gzip = start.starts_with(&GZIP_MAGIC)
        || path.extension().is_some_and(|ext| ext == OsStr::new("gz"));
    let text: Box<dyn Read> = if gzip {
        Box::new(MultiGzDecoder::new(stored))
    } else {
        Box::new(stored)
    };
    Ok(Source { text, gzip })
}

fn flaw(path: &Path, reason: impl std::fmt::Display) -> TrainError {
    TrainError::Dataset(format!("{}: {reason}", path.display()))
}

fn read_csv(
    source: Source<'_>,
    path: &Path,
    target: &str,
    stopped: &dyn Fn() -> bool,
) -> Result<Table, TrainError> {
    let mut lines = Lines::new(source, path);
    if !lines.advance()? {
        return Err(flaw(path, "the file is empty"));
    }
    let header = Header::parse(&lines.record, target).map_err(|reason| flaw(path, reason))?;
    let mut rows = Rows::default();
    while lines.advance()? {
        rows.push(&header, &lines.record)
            .map_err(|reason| flaw(path, format!("line {}{reason}", lines.line())))?;
        if rows.labels.len().is_multiple_of(ROWS_PER_STOP_CHECK) && stopped() {
            return Err(TrainError::Stopped);
        }
    }
    rows.into_table(header).map_err(|reason| flaw(path, reason))
}

/// The records of a CSV text with the lines on which they begin.
struct Lines<'a> {
    reader: csv::Reader<Box<dyn Read + 'a>>,
    record: ByteRecord,
    path: &'a Path,
    gzip: bool,
}

impl<'a> Lines<'a> {
    fn new(source: Source<'a>, path: &'a Path) -> Self {
        // If every line ends with "\n", the line count after a record is exact; the "\r"
        // of "\r\n" is trimmed with the other blanks.
        let text: Box<dyn Read> = Box::new(source.text.chain(&b"\n"[..]));
        let reader = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .terminator(Terminator::Any(b'\n'))
            .trim(Trim::All)
            .from_reader(text);
        Self {
            reader,
            record: ByteRecord::new(),
            path,
            gzip: source.gzip,
        }
    }

    /// Reads the next record that is not a blank line; false at the end.
    fn advance(&mut self) -> Result<bool, TrainError> {
        loop {
            let more = self
                .reader
                .read_byte_record(&mut self.record)
                .map_err(|error| self.broken(error))?;
            let blank = self.record.len() == 1 && self.record[0].is_empty();
            if !more || !blank {
                return Ok(more);
            }
        }
    }

    /// The line on which the current record begins, from 1.
    fn line(&self) -> u64 {
        let inside = self.record.as_slice().iter().filter(|b| **b == b'\n');
        self.reader.position().line() - 1 - inside.count() as u64
    }

    fn broken(&self, error: csv::Error) -> TrainError {
        let reason = error.to_string();
        let csv::ErrorKind::Io(cause) = error.into_kind() else {
            return flaw(self.path, reason);
        };
        let corrupt = matches!(
            cause.kind(),
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
        );
        if self.gzip && corrupt {
            return flaw(self.path, format!("the gzip stream is broken: {cause}"));
        }
        cannot_read(self.path)(cause)
    }
}

/// The columns of the table and which of them is the target.
struct Header {
    names: Vec<String>,
    target: usize,
}

impl Header {
    fn parse(record: &ByteRecord, target: &str) -> Result<Self, String> {
        let mut names = Vec::with_capacity(record.len());
        let mut seen = HashSet::new();
        for (index, cell) in record.iter().enumerate() {
            let number = index + 1;
            let name = std::str::from_utf8(cell)
                .map_err(|_| format!("line 1: the name of column {number} is not UTF-8"))?;
            if name.is_empty() {
                return Err(format!("line 1: column {number} has no name"));
            }
            if !seen.insert(name) {
                return Err(format!("line 1: the column `{name}` appears twice"));
            }
            names.push(name.to_owned());
        }
        let position = names.iter().position(|name| name == target);
        let target = position.ok_or_else(|| format!("there is no column `{target}`"))?;
        if names.len() == 1 {
            let name = &names[target];
            return Err(format!("there is no column beside the target `{name}`"));
        }
        Ok(Self { names, target })
    }
}

/// The rows read so far. Classes are numbered by first appearance.
#[derive(Default)]
struct Rows {
    values: Vec<f64>,
    labels: Vec<usize>,
    classes: HashMap<String, usize>,
}

impl Rows {
    /// Adds a row; a refusal's reason continues the words "line N".
    fn push(&mut self, header: &Header, record: &ByteRecord) -> Result<(), String> {
        let (found, expected) = (record.len(), header.names.len());
        if found != expected {
            return Err(format!(
                ": {found} cells where the header has {expected} columns"
            ));
        }
        if self.values.len() + expected > MAX_CELLS {
            return Err(format!(
                ": the table is too large; at most {MAX_CELLS} feature cells are read"
            ));
        }
        for (index, (cell, name)) in record.iter().zip(&header.names).enumerate() {
            let placed = |reason| format!(", column `{name}`: {reason}");
            let text = std::str::from_utf8(cell).map_err(|_| placed("the cell is not UTF-8"))?;
            if text.is_empty() {
                return Err(placed("the cell is empty"));
            }
            if index == header.target {
                let class = self.class(text).ok_or_else(|| placed(TOO_MANY_CLASSES))?;
                self.labels.push(class);
            } else {
                self.values.push(number(text).map_err(placed)?);
            }
        }
        Ok(())
    }

    fn class(&mut self, label: &str) -> Option<usize> {
        if let Some(class) = self.classes.get(label) {
            return Some(*class);
        }
        let class = self.classes.len();
        if class == MAX_CLASSES {
            return None;
        }
        self.classes.insert(label.to_owned(), class);
        Some(class)
    }

    fn into_table(self, header: Header) -> Result<Table, String> {
        let Header { mut names, target } = header;
        let target = names.remove(target);
        if self.labels.is_empty() {
            return Err("there is no row after the header".to_owned());
        }
        let mut classes: Vec<(String, usize)> = self.classes.into_iter().collect();
        if let [(only, _)] = classes.as_slice() {
            return Err(format!(
                "every row's `{target}` is `{only}`; at least two classes are needed"
            ));
        }
        classes.sort();
        let mut rank = vec![0; classes.len()];
        for (sorted, (_, first_seen)) in classes.iter().enumerate() {
            rank[*first_seen] = sorted;
        }
        Ok(Table {
            features: names,
            values: self.values,
            labels: self.labels.into_iter().map(|class| rank[class]).collect(),
            classes: classes.into_iter().map(|(label, _)| label).collect(),
            sha256: String::new(),
        })
    }
}

const TOO_MANY_CLASSES: &str = "the target has more than 1000 different labels";

fn number(text: &str) -> Result<f64, &'static str> {
    match text.parse::<f64>() {
        Err(_) => Err("the cell is not a number"),
        Ok(value) if !value.is_finite() => Err("the cell is not a finite number"),
        Ok(value) => Ok(value),
    }
}

#[cfg(test)]
mod tests;
