//! What was found in the data: numbers for people and machines, and a look at some rows.

use super::prepare::PreparedData;
use super::rows::TokenRows;
use super::tokenizer::ChatTokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use std::fmt::Write as _;
use std::path::PathBuf;

/// What was found in the data.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DataReport {
    /// Every data file, training files first.
    pub files: Vec<FileReport>,
    /// The rows that are learnt.
    pub train: SplitReport,
    /// The rows that are held out.
    pub eval: Option<SplitReport>,
    /// Longest sequence, in tokens: longer rows were cut.
    pub sequence_length: usize,
    /// Whether every token store was there already, and nothing had to be tokenised.
    pub cached: bool,
}

/// What was found in one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// Name of the row format, as in the spec.
    pub format: String,
    /// Whether the format was detected (`format = "auto"`).
    pub detected: bool,
    /// Rows in the file.
    pub rows: u64,
    /// Rows that were tokenised.
    pub used: u64,
    /// Bad rows that were set aside.
    pub quarantined: u64,
    /// Rows that were cut at the sequence length.
    pub truncated: u64,
    /// Tokens of the used rows.
    pub tokens: u64,
    /// Learnt tokens of the used rows.
    pub trainable_tokens: u64,
}

/// What was found in the rows that are learnt, or held out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SplitReport {
    /// Rows.
    pub rows: u64,
    /// Training rows dropped because the same tokens are held out.
    pub dropped_overlap: u64,
    /// Rows whose tokens equal those of an earlier row; they are kept.
    pub duplicates: u64,
    /// Tokens.
    pub tokens: u64,
    /// Learnt tokens.
    pub trainable_tokens: u64,
    /// Tokens cut off at the sequence length.
    pub tokens_cut: u64,
    /// Rows that were cut, as a share of the rows.
    pub share_truncated: f64,
    /// Tokens that are only read, as a share of the tokens.
    pub share_masked: f64,
    /// Median number of tokens of a row.
    pub median: u64,
    /// 95 % of the rows have at most so many tokens.
    pub p95: u64,
    /// Tokens of the longest row.
    pub longest: u64,
    /// Rows by number of tokens, in bins that double.
    pub histogram: Vec<Bin>,
}

/// One bin of a histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bin {
    /// Fewest tokens.
    pub from: u64,
    /// Most tokens.
    pub to: u64,
    /// Rows with so many tokens.
    pub rows: u64,
}

impl SplitReport {
    /// Counts over rows. Costs 12 bytes a row while it runs.
    pub(super) fn new(rows: &TokenRows, dropped_overlap: u64) -> Self {
        let mut lengths: Vec<u32> = (0..rows.len()).map(|i| rows.entry(i).tokens).collect();
        lengths.sort_unstable();
        // Half of a digest is enough to count with: two of a billion rows agree by chance once in 37 such sets.
        let mut digests: Vec<u64> = (0..rows.len())
            .map(|i| u64::from_le_bytes(std::array::from_fn(|b| rows.entry(i).digest[b])))
            .collect();
        digests.sort_unstable();
        let duplicates = digests.windows(2).filter(|w| w[0] == w[1]).count() as u64;
        let (mut truncated, mut cut) = (0u64, 0u64);
        for i in 0..rows.len() {
            let entry = rows.entry(i);
            truncated += u64::from(entry.cut > 0);
            cut += u64::from(entry.cut);
        }
        let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        // Nearest rank: the smallest length that so many rows do not exceed.
        let quantile = |percent: usize| {
            let rank = (lengths.len() * percent).div_ceil(100).max(1);
            lengths.get(rank - 1).map_or(0, |&n| u64::from(n))
        };
        let mut histogram = Vec::new();
        let (mut from, mut at) = (1u64, 0);
        while at < lengths.len() {
            let to = if from == 1 { 16 } else { (from - 1) * 2 };
            let upto = lengths.partition_point(|&n| u64::from(n) <= to);
            histogram.push(Bin { from, to, rows: (upto - at) as u64 });
            (from, at) = (to + 1, upto);
        }
        let (tokens, trainable) = (rows.total_tokens(), rows.trainable_tokens());
        Self {
            rows: rows.len() as u64,
            dropped_overlap,
            duplicates,
            tokens,
            trainable_tokens: trainable,
            tokens_cut: cut,
            share_truncated: share(truncated, rows.len() as u64),
            share_masked: share(tokens - trainable, tokens),
            median: quantile(50),
            p95: quantile(95),
            longest: quantile(100),
            histogram,
        }
    }
}

/// How the learnt part of a row is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// `[[learnt]]`, for files and pipes.
    Brackets,
    /// Bold green, for terminals.
    Ansi,
}

/// The report as text, with `samples` rows spread evenly over the training rows, their learnt part marked.
pub fn inspect(data: &PreparedData, tokenizer: &ChatTokenizer, samples: usize, marks: Marks) -> String {
    let mut out = String::new();
    let report = &data.report;
    for file in &report.files {
        let _ = writeln!(
            out,
            "{}: {} rows, {} format{}",
            file.path.display(),
            file.rows,
            file.format,
            if file.detected { " (detected)" } else { "" },
        );
        if file.quarantined > 0 {
            let _ = writeln!(out, "  {} bad rows set aside", file.quarantined);
        }
    }
    write_split(&mut out, "train", &report.train, report.sequence_length);
    if let Some(eval) = &report.eval {
        write_split(&mut out, "eval", eval, report.sequence_length);
    }
    let (open, close) = match marks {
        Marks::Brackets => ("[[", "]]"),
        Marks::Ansi => ("\x1b[1;32m", "\x1b[0m"),
    };
    for i in sample(&data.train, samples) {
        let (file, line) = data.train.origin(i);
        let path = report.files.get(file).map(|f| f.path.display().to_string()).unwrap_or_default();
        let _ =
            writeln!(out, "\n── {path}:{line} · {} tokens · learnt: {open}…{close}", data.train.row_len(i));
        for (text, learnt) in segments(&data.train, i, tokenizer) {
            // What a row holds must not steer the terminal it is shown on.
            let text: String =
                text.chars()
                    .map(|c| {
                        if c.is_control() && c != '\n' && c != '\t' { char::REPLACEMENT_CHARACTER } else { c }
                    })
                    .collect();
            let _ = if learnt { write!(out, "{open}{text}{close}") } else { write!(out, "{text}") };
        }
        out.push('\n');
    }
    out
}

/// The report as JSON, with the same rows: `{"report": …, "samples": [{file, line, tokens, segments: [{text, learnt}]}]}`.
pub fn inspect_json(data: &PreparedData, tokenizer: &ChatTokenizer, samples: usize) -> Json {
    let samples: Vec<Json> = sample(&data.train, samples)
        .map(|i| {
            let (file, line) = data.train.origin(i);
            let segments: Vec<Json> = segments(&data.train, i, tokenizer)
                .into_iter()
                .map(|(text, learnt)| json!({"text": text, "learnt": learnt}))
                .collect();
            json!({
                "file": data.report.files.get(file).map(|f| &f.path),
                "line": line,
                "tokens": data.train.row_len(i),
                "segments": segments,
            })
        })
        .collect();
    json!({"report": data.report, "samples": samples})
}

fn write_split(out: &mut String, name: &str, split: &SplitReport, sequence_length: usize) {
    let _ = writeln!(
        out,
        "{name}: {} rows, {} tokens, {} learnt ({:.1} % only read)",
        split.rows,
        split.tokens,
        split.trainable_tokens,
        100.0 * split.share_masked,
    );
    let _ = writeln!(
        out,
        "  tokens per row: median {}, 95 % at most {}, longest {}",
        split.median, split.p95, split.longest
    );
    let _ = writeln!(
        out,
        "  cut at {sequence_length} tokens: {:.1} % of the rows, {} tokens lost",
        100.0 * split.share_truncated,
        split.tokens_cut,
    );
    let _ = writeln!(out, "  duplicates: {}", split.duplicates);
    if split.dropped_overlap > 0 {
        let _ = writeln!(out, "  dropped because they are held out too: {}", split.dropped_overlap);
    }
    let most = split.histogram.iter().map(|b| b.rows).max().unwrap_or(0).max(1);
    for bin in &split.histogram {
        let width = (bin.rows * 40).div_ceil(most) as usize;
        let _ = writeln!(out, "  {:>7}–{:<7} {:>8} {}", bin.from, bin.to, bin.rows, "█".repeat(width));
    }
}

/// Row numbers spread evenly.
fn sample(rows: &TokenRows, samples: usize) -> impl Iterator<Item = usize> {
    let (len, count) = (rows.len(), samples.min(rows.len()));
    (0..count).map(move |k| k * len / count)
}

/// The row's text in runs of learnt and unlearnt tokens.
fn segments(rows: &TokenRows, i: usize, tokenizer: &ChatTokenizer) -> Vec<(String, bool)> {
    let (tokens, mask) = rows.row(i);
    let mut segments = Vec::new();
    let (mut start, mut before) = (0, String::new());
    while start < tokens.len() {
        let learnt = mask.get(start);
        let end = (start..tokens.len()).find(|&t| mask.get(t) != learnt).unwrap_or(tokens.len());
        // A decoder may treat the beginning of what it is given specially (SentencePiece drops a space there), so the
        // run is what the text grows by.
        let upto = tokenizer.decode(&tokens[..end], false);
        let text = match upto.strip_prefix(&before) {
            Some(text) => text.to_owned(),
            None => tokenizer.decode(&tokens[start..end], false),
        };
        segments.push((text, learnt));
        (start, before) = (end, upto);
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_is_counted() {
        let row = |n: usize, id: u32| (vec![id; n], vec![true; n]);
        let rows = TokenRows::from_examples(&[row(3, 1), row(16, 2), row(17, 3), row(3, 1), row(40, 4)]);
        let split = SplitReport::new(&rows, 2);
        assert_eq!((split.rows, split.duplicates, split.dropped_overlap), (5, 1, 2));
        assert_eq!((split.tokens, split.trainable_tokens), (79, 74));
        assert_eq!((split.median, split.p95, split.longest), (16, 40, 40));
        let bins: Vec<_> = split.histogram.iter().map(|b| (b.from, b.to, b.rows)).collect();
        assert_eq!(bins, [(1, 16, 3), (17, 32, 1), (33, 64, 1)]);
        assert!((split.share_masked - 5.0 / 79.0).abs() < 1e-12);
    }
}
