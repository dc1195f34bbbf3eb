//! Files of rows, read one row at a time.
//!
//! | file | rows |
//! |---|---|
//! | `.csv` | records under a header; a quoted cell may hold newlines |
//! | text whose first character is `[` | the elements of one JSON array |
//! | other text | JSON Lines: one object a line; empty lines are skipped |
//!
//! No file is ever held whole. A row has at most [`MAX_ROW_BYTES`]; a longer line is a bad row, a longer array element
//! or CSV record ends the file's reading, since where the next row starts is then unknown. Everything read is hashed on
//! its way, so that the caller can see whether the file is still the one it hashed before.

use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Longest row, in bytes: about four million tokens, far beyond any context.
pub const MAX_ROW_BYTES: usize = 16 << 20;

/// A file that cannot be read as rows.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The system refused.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A kind of file that is not read.
    #[error("{path} is {what}: convert it to JSON Lines (one JSON object a line) or CSV first")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The frame around the rows is broken.
    #[error("{path}:{line}: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// What is wrong.
        reason: String,
    },
}

/// A row as it stands in the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RawRow {
    /// Line on which it starts, from 1.
    pub line: u64,
    /// What stands there.
    pub body: RawBody,
}

/// What stands in a row, not looked at yet: parsing is the expensive part and happens on all cores.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum RawBody {
    /// Text that should be a JSON object.
    Json(Vec<u8>),
    /// Cells of a CSV record.
    Cells(Map<String, Json>),
    /// A row that is already known to be bad: the reason, and the beginning of the row.
    Bad(String, String),
}

impl RawRow {
    /// The row as an object, or what is wrong with it.
    pub fn object(&self) -> Result<Map<String, Json>, String> {
        match &self.body {
            RawBody::Cells(cells) => Ok(cells.clone()),
            RawBody::Bad(reason, _) => Err(reason.clone()),
            RawBody::Json(bytes) => match serde_json::from_slice(bytes) {
                Ok(Json::Object(map)) => Ok(map),
                Ok(other) => Err(format!("a row must be a JSON object, this is {}", kind(&other))),
                // serde_json counts lines from the row's own start, which a reader would take for the file's.
                Err(e) => {
                    let what = e.to_string();
                    let what = what.split(" at line ").next().unwrap_or(&what);
                    Err(format!("not valid JSON: {what} (column {})", e.column()))
                }
            },
        }
    }

    /// The row as a JSON value for the quarantine file: the parsed row where it parses, else its text.
    pub fn quarantined(&self) -> Json {
        match &self.body {
            RawBody::Cells(cells) => Json::Object(cells.clone()),
            RawBody::Bad(_, text) => Json::String(text.clone()),
            RawBody::Json(bytes) => serde_json::from_slice(bytes)
                .unwrap_or_else(|_| Json::String(String::from_utf8_lossy(bytes).into_owned())),
        }
    }
}

/// A JSON type's name with its article.
pub(super) fn kind(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "an array",
        Json::Object(_) => "an object",
    }
}

/// What the reading of a file has come to, seen from outside the reader that owns the file.
struct Tap {
    file: File,
    hash: Rc<Cell<Option<Sha256>>>,
    bytes: Rc<Cell<u64>>,
    /// Bytes that may still be read for the current CSV record.
    allowance: Rc<Cell<usize>>,
}

impl Read for Tap {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let allowance = self.allowance.get();
        if allowance == 0 {
            return Err(io::Error::other(TooLong));
        }
        let limit = buffer.len().min(allowance);
        let n = self.file.read(&mut buffer[..limit])?;
        if let Some(mut hash) = self.hash.take() {
            hash.update(&buffer[..n]);
            self.hash.set(Some(hash));
        }
        self.bytes.set(self.bytes.get() + n as u64);
        if allowance != usize::MAX {
            self.allowance.set(allowance - n);
        }
        Ok(n)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("a record is longer than {MAX_ROW_BYTES} bytes: is a quote missing?")]
struct TooLong;

enum Frame {
    Lines(BufReader<Tap>),
    Array { reader: BufReader<Tap>, started: bool, ended: bool },
    Csv { reader: Box<csv::Reader<Tap>>, header: Vec<String> },
}

/// Reads the rows of one file in order.
pub(super) struct RowReader {
    path: PathBuf,
    frame: Frame,
    line: u64,
    hash: Rc<Cell<Option<Sha256>>>,
    bytes: Rc<Cell<u64>>,
    allowance: Rc<Cell<usize>>,
}

impl RowReader {
    /// Opens a file and decides how its rows are framed.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let read_error = |source| SourceError::Read { path: path.into(), source };
        let extension = extension(path);
        let file = open_rows(path)?;
        let hash = Rc::new(Cell::new(Some(Sha256::new())));
        let bytes = Rc::new(Cell::new(0));
        let allowance = Rc::new(Cell::new(usize::MAX));
        let tap = Tap { file, hash: hash.clone(), bytes: bytes.clone(), allowance: allowance.clone() };
        let frame = if extension == "csv" {
            allowance.set(MAX_ROW_BYTES);
            let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(tap);
            let header = match reader.headers() {
                Ok(header) => header.iter().map(|name| name.trim().to_owned()).collect::<Vec<_>>(),
                Err(e) => return Err(csv_error(path, e)),
            };
            if let Some(twice) =
                header.iter().enumerate().find_map(|(i, n)| header[..i].contains(n).then_some(n))
            {
                let reason = format!("the header names the column {twice:?} twice");
                return Err(SourceError::Malformed { path: path.into(), line: 1, reason });
            }
            Frame::Csv { reader: Box::new(reader), header }
        } else {
            let mut reader = BufReader::with_capacity(1 << 16, tap);
            if reader.fill_buf().map_err(read_error)?.starts_with(b"\xEF\xBB\xBF") {
                reader.consume(3);
            }
            // JSON Lines may start with empty lines, an array with white space: 64 KiB of it is enough.
            let first =
                reader.fill_buf().map_err(read_error)?.iter().find(|b| !b.is_ascii_whitespace()).copied();
            if first == Some(b'[') {
                Frame::Array { reader, started: false, ended: false }
            } else {
                Frame::Lines(reader)
            }
        };
        Ok(Self { path: path.into(), frame, line: 1, hash, bytes, allowance })
    }

    /// Bytes read so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes.get()
    }

    /// SHA-256 of the file; to be called when all rows have been read.
    pub fn finish(self) -> Result<[u8; 32], SourceError> {
        let read_error = |source| SourceError::Read { path: self.path.clone(), source };
        match self.frame {
            Frame::Lines(mut reader) | Frame::Array { mut reader, .. } => {
                io::copy(&mut reader, &mut io::sink()).map_err(read_error)?;
            }
            Frame::Csv { reader, .. } => {
                self.allowance.set(usize::MAX);
                io::copy(&mut reader.into_inner(), &mut io::sink()).map_err(read_error)?;
            }
        }
        Ok(self.hash.take().unwrap_or_default().finalize().into())
    }

    /// The next row, or `None` at the end.
    pub fn next_row(&mut self) -> Result<Option<RawRow>, SourceError> {
        match &mut self.frame {
            Frame::Lines(reader) => next_line(reader, &mut self.line)
                .map_err(|source| SourceError::Read { path: self.path.clone(), source }),
            Frame::Array { reader, started, ended } => next_element(reader, started, ended, &mut self.line)
                .map_err(|e| match e {
                    ArrayError::Read(source) => SourceError::Read { path: self.path.clone(), source },
                    ArrayError::Malformed(reason) => {
                        SourceError::Malformed { path: self.path.clone(), line: self.line, reason }
                    }
                }),
            Frame::Csv { reader, header } => {
                self.allowance.set(MAX_ROW_BYTES);
                next_record(reader, header).map_err(|e| csv_error(&self.path, e))
            }
        }
    }
}

/// One line of JSON Lines.
fn next_line(reader: &mut BufReader<Tap>, line: &mut u64) -> io::Result<Option<RawRow>> {
    loop {
        let mut row = Vec::new();
        let mut length = 0usize;
        let ended = loop {
            let buffer = reader.fill_buf()?;
            if buffer.is_empty() {
                break length == 0;
            }
            let newline = buffer.iter().position(|&b| b == b'\n');
            let take = newline.map_or(buffer.len(), |at| at + 1);
            let room = MAX_ROW_BYTES.saturating_sub(row.len());
            row.extend_from_slice(&buffer[..take.min(room)]);
            length = length.saturating_add(take);
            reader.consume(take);
            if newline.is_some() {
                break false;
            }
        };
        if ended {
            return Ok(None);
        }
        let at = *line;
        *line += 1;
        if length > MAX_ROW_BYTES {
            let reason = format!("the line has {length} bytes, more than {MAX_ROW_BYTES}");
            row.truncate(200);
            let start = String::from_utf8_lossy(&row).into_owned();
            return Ok(Some(RawRow { line: at, body: RawBody::Bad(reason, start) }));
        }
        let text = row.trim_ascii();
        if !text.is_empty() {
            return Ok(Some(RawRow { line: at, body: RawBody::Json(text.to_vec()) }));
        }
    }
}

enum ArrayError {
    Read(io::Error),
    Malformed(String),
}

/// One element of a JSON array. Only brackets and strings are followed here; what an element is worth is seen when it
/// is parsed.
fn next_element(
    reader: &mut BufReader<Tap>,
    started: &mut bool,
    ended: &mut bool,
    line: &mut u64,
) -> Result<Option<RawRow>, ArrayError> {
    let malformed = |reason: &str| Err(ArrayError::Malformed(reason.to_owned()));
    let mut element: Vec<u8> = Vec::new();
    let mut start_line = *line;
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    loop {
        let buffer = reader.fill_buf().map_err(ArrayError::Read)?;
        if buffer.is_empty() {
            return if *ended {
                Ok(None)
            } else {
                malformed("the array is not closed: is the file cut off?")
            };
        }
        let mut used = 0;
        let mut complete = None;
        for &byte in buffer {
            used += 1;
            if byte == b'\n' {
                *line += 1;
            }
            if *ended {
                if !byte.is_ascii_whitespace() {
                    return malformed("something follows the end of the array");
                }
                continue;
            }
            if !*started {
                *started = byte == b'[';
                continue;
            }
            if element.is_empty() {
                if byte.is_ascii_whitespace() {
                    continue;
                }
                start_line = *line;
            }
            if element.len() >= MAX_ROW_BYTES {
                return malformed(
                    "an element of the array is longer than 16 MiB: is a bracket or a quote missing?",
                );
            }
            if in_string {
                element.push(byte);
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' => escaped = true,
                    b'"' => in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b',' | b']' if depth == 0 => {
                    *ended = byte == b']';
                    complete = Some(byte);
                    break;
                }
                b'"' => in_string = true,
                b'[' | b'{' => depth += 1,
                b']' | b'}' => match depth.checked_sub(1) {
                    Some(less) => depth = less,
                    None => return malformed("a bracket closes that was never opened"),
                },
                _ => {}
            }
            element.push(byte);
        }
        reader.consume(used);
        match complete {
            // `[]` and a comma before the end have nothing before the bracket.
            Some(b']') if element.trim_ascii().is_empty() => {}
            Some(_) => {
                let text = element.trim_ascii().to_vec();
                return Ok(Some(RawRow { line: start_line, body: RawBody::Json(text) }));
            }
            None => {}
        }
    }
}

/// One CSV record.
fn next_record(reader: &mut csv::Reader<Tap>, header: &[String]) -> Result<Option<RawRow>, csv::Error> {
    let mut record = csv::ByteRecord::new();
    if !reader.read_byte_record(&mut record)? {
        return Ok(None);
    }
    let line = record.position().map_or(0, csv::Position::line);
    let bad = |reason: String, record: &csv::ByteRecord| {
        let text: Vec<_> = record.iter().map(|c| String::from_utf8_lossy(c)).collect();
        let text: String = text.join(",").chars().take(2000).collect();
        Ok(Some(RawRow { line, body: RawBody::Bad(reason, text) }))
    };
    if record.len() != header.len() {
        return bad(format!("{} cells under a header of {}", record.len(), header.len()), &record);
    }
    let mut cells = Map::new();
    for (name, cell) in header.iter().zip(&record) {
        match std::str::from_utf8(cell) {
            Ok(text) => cells.insert(name.clone(), Json::String(text.to_owned())),
            Err(_) => return bad(format!("the cell {name:?} is not UTF-8"), &record),
        };
    }
    Ok(Some(RawRow { line, body: RawBody::Cells(cells) }))
}

fn csv_error(path: &Path, error: csv::Error) -> SourceError {
    let line = error.position().map_or(1, csv::Position::line);
    let text = error.to_string();
    match error.into_kind() {
        csv::ErrorKind::Io(e) if e.get_ref().is_some_and(|e| e.is::<TooLong>()) => {
            SourceError::Malformed { path: path.into(), line, reason: TooLong.to_string() }
        }
        csv::ErrorKind::Io(source) => SourceError::Read { path: path.into(), source },
        _ => SourceError::Malformed { path: path.into(), line, reason: text },
    }
}

/// The file name's extension in lower case.
fn extension(path: &Path) -> String {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase()
}

/// Opens a regular file of a kind that is read. A pipe or a device might never end, and rows are read twice.
fn open_rows(path: &Path) -> Result<File, SourceError> {
    let read_error = |source| SourceError::Read { path: path.into(), source };
    let unsupported = |what| SourceError::Unsupported { path: path.into(), what };
    match extension(path).as_str() {
        "parquet" => return Err(unsupported("a Parquet file")),
        "arrow" | "feather" => return Err(unsupported("an Arrow file")),
        "gz" | "zst" | "xz" | "bz2" | "zip" => return Err(unsupported("compressed")),
        "xlsx" | "xls" | "ods" => return Err(unsupported("a spreadsheet")),
        _ => {}
    }
    let metadata = std::fs::metadata(path).map_err(read_error)?;
    if metadata.is_dir() {
        return Err(unsupported("a directory"));
    }
    if !metadata.is_file() {
        return Err(unsupported("not a regular file"));
    }
    File::open(path).map_err(read_error)
}

/// SHA-256 of a whole file.
pub(super) fn hash_file(path: &Path) -> Result<[u8; 32], SourceError> {
    let read_error = |source| SourceError::Read { path: path.into(), source };
    let mut file = open_rows(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(read_error)?;
        if n == 0 {
            return Ok(hash.finalize().into());
        }
        hash.update(&buffer[..n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rows(name: &str, content: &[u8]) -> Result<Vec<RawRow>, SourceError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let mut reader = RowReader::open(&path)?;
        let mut rows = Vec::new();
        while let Some(row) = reader.next_row()? {
            rows.push(row);
        }
        assert_eq!(reader.finish()?, hash_file(&path)?);
        Ok(rows)
    }

    fn objects(name: &str, content: &str) -> Vec<(u64, Result<String, String>)> {
        rows(name, content.as_bytes())
            .unwrap()
            .iter()
            .map(|r| (r.line, r.object().map(|o| Json::Object(o).to_string())))
            .collect()
    }

    #[test]
    fn lines_with_bom_crlf_and_empty_lines() {
        assert_eq!(
            objects("a.jsonl", "\u{feff}\n{\"a\":1}\r\n\n  {\"b\":2}"),
            [(2, Ok("{\"a\":1}".into())), (4, Ok("{\"b\":2}".into()))]
        );
        assert_eq!(objects("a.jsonl", ""), []);
    }

    #[test]
    fn a_broken_line_does_not_hide_the_next() {
        let rows = objects("a.jsonl", "{\"a\":\n[1]\n{\"b\":2}\n");
        assert!(rows[0].1.as_ref().is_err_and(|e| e.contains("not valid JSON")), "{rows:?}");
        assert!(
            rows[1].1.as_ref().is_err_and(|e| e.contains("not valid JSON") || e.contains("array")),
            "{rows:?}"
        );
        assert_eq!(rows[2], (3, Ok("{\"b\":2}".into())));
    }

    #[test]
    fn an_array_is_cut_at_its_commas() {
        assert_eq!(
            objects("a.json", " [\n {\"a\":\"],[\\\"\"},\n\n{\"b\":[1,{\"c\":[]}]} ]\n"),
            [(2, Ok("{\"a\":\"],[\\\"\"}".into())), (4, Ok("{\"b\":[1,{\"c\":[]}]}".into()))]
        );
        assert_eq!(objects("a.json", "[]"), []);
    }

    #[test]
    fn a_broken_array_is_named() {
        for (text, expected) in [
            ("[{\"a\":1},", "not closed"),
            ("[{\"a\":1}] x", "follows the end"),
            ("[{\"a\":1}}]", "never opened"),
        ] {
            let e = rows("a.json", text.as_bytes()).unwrap_err().to_string();
            assert!(e.contains(expected), "{text}: {e}");
        }
    }

    #[test]
    fn csv_cells_hold_quotes_and_newlines() {
        let rows = objects("a.csv", "q,a\n\"x\ny\",\"say \"\"hi\"\"\"\nonly one\n1,2\n");
        assert_eq!(rows[0], (2, Ok("{\"q\":\"x\\ny\",\"a\":\"say \\\"hi\\\"\"}".into())));
        assert!(rows[1].1.as_ref().is_err_and(|e| e.contains("1 cells under a header of 2")));
        assert_eq!(rows[1].0, 4);
        assert_eq!(rows[2].0, 5);
    }

    #[test]
    fn a_long_line_is_one_bad_row() {
        let mut text = vec![b' '; 10];
        text.extend(b"{\"a\":\"");
        text.resize(MAX_ROW_BYTES + 5, b'x');
        text.extend(b"\n{\"b\":2}\n");
        let rows = rows("a.jsonl", &text).unwrap();
        assert!(rows[0].object().unwrap_err().contains("more than"));
        assert!(rows[1].object().is_ok());
        assert_eq!((rows.len(), rows[1].line), (2, 2));
    }

    #[test]
    fn a_csv_quote_that_never_closes_does_not_eat_the_memory() {
        let mut text = b"a\n\"".to_vec();
        text.resize(2 * MAX_ROW_BYTES, b'x');
        let e = rows("a.csv", &text).unwrap_err().to_string();
        assert!(e.contains("longer than"), "{e}");
    }

    #[test]
    fn other_files_are_refused_by_name() {
        assert!(rows("a.parquet", b"PAR1").unwrap_err().to_string().contains("Parquet"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_reader_panic(text in proptest::collection::vec(any::<u8>(), 0..400), name in 0..3usize) {
            let _ = rows(["a.jsonl", "a.json", "a.csv"][name], &text).map(|rows| {
                for row in rows {
                    let _ = row.object();
                    let _ = row.quarantined();
                }
            });
        }

        #[test]
        fn a_mutated_array_never_panics(at in 0..60usize, byte: u8, cut in 0..60usize) {
            let mut text = b"[{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]},{\"b\":[1]}]".to_vec();
            let n = text.len();
            text[at % n] = byte;
            text.truncate(cut.max(1));
            let _ = rows("a.json", &text);
        }
    }
}
