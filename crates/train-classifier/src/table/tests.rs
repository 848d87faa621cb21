use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Reads a file of that name and content, with the target `kind`.
fn read_as(name: &str, bytes: &[u8]) -> Result<Table, TrainError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    Table::read(&path, "kind", &|| false)
}

fn read(text: &str) -> Table {
    read_as("t.csv", text.as_bytes()).unwrap()
}

/// The error about a file, without its path.
fn refusal_of(name: &str, bytes: &[u8]) -> String {
    match read_as(name, bytes) {
        Err(TrainError::Dataset(reason)) => {
            let (_, reason) = reason.split_once(&format!("{name}: ")).unwrap();
            reason.to_owned()
        }
        other => panic!("not refused for good: {other:?}"),
    }
}

fn refusal(text: &str) -> String {
    refusal_of("t.csv", text.as_bytes())
}

#[test]
fn the_target_may_stand_anywhere_and_classes_are_sorted() {
    let table = read("a,kind,b\n1,pear,2\n3,apple,4.5\n-5e1,pear,6\n");
    assert_eq!(table.features, ["a", "b"]);
    assert_eq!(table.classes, ["apple", "pear"]);
    assert_eq!(table.labels, [1, 0, 1]);
    assert_eq!(table.values, [1.0, 2.0, 3.0, 4.5, -50.0, 6.0]);
    assert_eq!(table.row(1), [3.0, 4.5]);
}

#[test]
fn dos_line_ends_blanks_quotes_and_a_byte_order_mark_do_not_matter() {
    let plain = read("a,kind\n1,x y\n2,z\n");
    let odd = read("\u{feff}a,\"kind\"\r\n\r\n 1 ,\"x y\"\r\n2,z");
    assert_eq!((odd.features, odd.values), (plain.features, plain.values));
    assert_eq!((odd.classes, odd.labels), (plain.classes, plain.labels));
}

#[test]
fn gzip_is_known_by_its_content_and_the_digest_is_of_the_stored_file() {
    let text = b"a,kind\n1,x\n2,y\n";
    let stored = gzipped(text);
    let plain = read_as("t.csv", text).unwrap();
    let packed = read_as("t.csv", &stored).unwrap();
    assert_eq!(packed.values, plain.values);
    let digest: String = Sha256::digest(&stored)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(packed.sha256, digest);
}

#[test]
fn a_missing_target_is_named() {
    assert_eq!(refusal("a,b\n1,2\n"), "there is no column `kind`");
}

#[test]
fn a_non_numeric_cell_is_named_by_line_and_column() {
    let reason = "line 3, column `b`: the cell is not a number";
    assert_eq!(refusal("a,b,kind\n1,2,x\n3,four,y\n"), reason);
    assert_eq!(refusal("a,b,kind\r\n1,2,x\r\n3,four,y"), reason);
}

#[test]
fn blank_lines_and_line_breaks_in_quotes_count_as_lines() {
    let reason = "line 6, column `a`: the cell is not a number";
    assert_eq!(refusal("a,kind\n\n1,\"x\ny\"\n\n?,z\n5,z\n"), reason);
}

#[test]
fn an_empty_cell_is_named_by_line_and_column() {
    let feature = refusal("a,kind\n1,x\n ,y\n");
    assert_eq!(feature, "line 3, column `a`: the cell is empty");
    let label = refusal("a,kind\n1,x\n2,\n");
    assert_eq!(label, "line 3, column `kind`: the cell is empty");
}

#[test]
fn a_cell_that_is_not_finite_is_named_by_line_and_column() {
    for cell in ["nan", "inf", "-Infinity", "1e999"] {
        let reason = refusal(&format!("a,kind\n{cell},x\n"));
        assert_eq!(
            reason,
            "line 2, column `a`: the cell is not a finite number"
        );
    }
}

#[test]
fn a_cell_that_is_not_utf_8_is_named_by_line_and_column() {
    let reason = refusal_of("t.csv", b"a,kind\n1,x\n2,\xff\n");
    assert_eq!(reason, "line 3, column `kind`: the cell is not UTF-8");
    let reason = refusal_of("t.csv", b"a,\xff\n1,x\n");
    assert_eq!(reason, "line 1: the name of column 2 is not UTF-8");
}

#[test]
fn a_ragged_row_is_named_by_line() {
    let reason = "line 3: 1 cells where the header has 2 columns";
    assert_eq!(refusal("a,kind\n1,x\n2\n"), reason);
    let reason = "line 2: 3 cells where the header has 2 columns";
    assert_eq!(refusal("a,kind\n1,x,2\n"), reason);
}

#[test]
fn a_header_with_a_name_twice_or_without_a_name_is_refused() {
    let reason = "line 1: the column `a` appears twice";
    assert_eq!(refusal("a,kind,a\n1,x,2\n"), reason);
    assert_eq!(refusal("a,,kind\n1,2,x\n"), "line 1: column 2 has no name");
}

#[test]
fn a_table_of_the_target_alone_is_refused() {
    let reason = "there is no column beside the target `kind`";
    assert_eq!(refusal("kind\nx\ny\n"), reason);
}

#[test]
fn an_empty_file_and_a_header_alone_are_refused() {
    assert_eq!(refusal(""), "the file is empty");
    assert_eq!(refusal("\n\n"), "the file is empty");
    assert_eq!(refusal_of("t.csv.gz", b""), "the file is empty");
    assert_eq!(refusal_of("t.csv.gz", &gzipped(b"")), "the file is empty");
    assert_eq!(refusal("a,kind\n"), "there is no row after the header");
}

#[test]
fn one_class_alone_is_refused() {
    let reason = "every row's `kind` is `x`; at least two classes are needed";
    assert_eq!(refusal("a,kind\n1,x\n2,x\n"), reason);
}

#[test]
fn a_target_of_too_many_labels_is_refused() {
    let rows: String = (0..=MAX_CLASSES).map(|n| format!("1,id{n}\n")).collect();
    let reason = refusal(&format!("a,kind\n{rows}"));
    let expected = "line 1002, column `kind`: the target has more than 1000 different labels";
    assert_eq!(reason, expected);
}

#[test]
fn broken_gzip_is_refused() {
    let whole = gzipped(format!("a,kind\n{}", "1,x\n2,y\n".repeat(1_000)).as_bytes());
    let mut flipped = whole.clone();
    let last = flipped.len() - 6; // in the checksum
    flipped[last] ^= 0xff;
    for bytes in [&whole[..whole.len() / 2], &flipped, b"a,kind\n1,x\n2,y\n"] {
        let reason = refusal_of("t.csv.gz", bytes);
        assert!(
            reason.starts_with("the gzip stream is broken: "),
            "{reason}"
        );
    }
}

#[test]
fn a_dataset_that_is_not_there_or_not_a_file_is_refused_by_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none.csv");
    let error = Table::read(&path, "kind", &|| false).unwrap_err();
    let expected = format!("the dataset {} does not exist", path.display());
    assert!(matches!(error, TrainError::Dataset(reason) if reason == expected));

    let error = Table::read(directory.path(), "kind", &|| false).unwrap_err();
    let expected = format!("the dataset {} is not a file", directory.path().display());
    assert!(matches!(error, TrainError::Dataset(reason) if reason == expected));
}

#[test]
fn reading_stops_when_asked() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("t.csv");
    let rows = "1,x\n2,y\n".repeat(ROWS_PER_STOP_CHECK);
    std::fs::write(&path, format!("a,kind\n{rows}")).unwrap();
    let error = Table::read(&path, "kind", &|| true).unwrap_err();
    assert!(matches!(error, TrainError::Stopped));
}
