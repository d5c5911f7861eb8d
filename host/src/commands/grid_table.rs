//! The table of a grid: retrieval in both directions, mean recall, zero-shot accuracy, time.

use crate::cli::TableFormat;
use clip_host_recipe::Grid;
use clip_host_train::Summary;
use std::collections::BTreeMap;
use std::fmt::Write;

/// What is known of one cell.
pub struct Row {
    /// The cell's name.
    pub name: String,
    /// Names of its values, one for each axis.
    pub values: Vec<String>,
    /// Its run folder.
    pub folder: String,
    /// `finished`, or how far it is.
    pub status: String,
    /// How it ended.
    pub result: Option<Outcome>,
}

/// What a finished cell reached.
pub struct Outcome {
    /// Its last evaluation.
    pub metrics: BTreeMap<String, f64>,
    /// Seconds of its steps and evaluations, over all its starts.
    pub seconds: f64,
}

impl Outcome {
    pub fn new(summary: Summary, seconds: f64) -> Outcome {
        Outcome { metrics: summary.metrics, seconds }
    }
}

/// A column of figures: its title, and the metrics that it may be, under the names that the log has.
struct Column {
    title: &'static str,
    metric: &'static str,
}

/// The studies' columns. TR is image to text (which text is retrieved), IR text to image.
const COLUMNS: [Column; 8] = [
    Column { title: "TR@1", metric: "image_to_text_R@1" },
    Column { title: "TR@5", metric: "image_to_text_R@5" },
    Column { title: "TR@10", metric: "image_to_text_R@10" },
    Column { title: "IR@1", metric: "text_to_image_R@1" },
    Column { title: "IR@5", metric: "text_to_image_R@5" },
    Column { title: "IR@10", metric: "text_to_image_R@10" },
    Column { title: "mean recall", metric: "mean_recall" },
    Column { title: "zero-shot", metric: "imagenet-zeroshot-val-top1" },
];

/// The table of all rows, which are cells of `grid`.
pub fn table(grid: &Grid, rows: &[Row], format: TableFormat) -> String {
    match format {
        TableFormat::Csv => csv(grid, rows),
        TableFormat::Text => text(&averaged(grid, rows)),
        TableFormat::Markdown => markdown(&averaged(grid, rows)),
    }
}

/// One cell of a table of text: what it says, and whether it is the best of its column.
#[derive(Clone, Default)]
struct Entry {
    text: String,
    best: bool,
}

struct Table {
    titles: Vec<String>,
    /// Columns before this one are names, to the left.
    figures: usize,
    lines: Vec<Vec<Entry>>,
}

/// Rows that differ in their seed only are one line: the mean, and the deviation between seeds.
fn averaged(grid: &Grid, rows: &[Row]) -> Table {
    let seed = grid.seed_axis();
    let names = |values: &[String]| -> Vec<String> {
        values.iter().enumerate().filter(|(i, _)| Some(*i) != seed).map(|(_, name)| name.clone()).collect()
    };
    let mut lines: Vec<(Vec<String>, Vec<&Row>)> = Vec::new();
    for row in rows {
        let key = names(&row.values);
        match lines.iter_mut().find(|(known, _)| *known == key) {
            Some((_, rows)) => rows.push(row),
            None => lines.push((key, vec![row])),
        }
    }
    let mut titles = names(&grid.axes.iter().map(|axis| axis.key.clone()).collect::<Vec<_>>());
    let figures = titles.len();
    titles.extend(COLUMNS.iter().map(|column| column.title.to_string()));
    titles.push("time".to_string());
    if seed.is_some() {
        titles.push("seeds".to_string());
    }
    let unfinished = rows.iter().any(|row| row.result.is_none());
    if unfinished {
        titles.push("status".to_string());
    }

    let means: Vec<Vec<Option<f64>>> = COLUMNS
        .iter()
        .map(|column| lines.iter().map(|(_, rows)| mean(&values_of(rows, column.metric))).collect())
        .collect();
    let best: Vec<Option<f64>> = means
        .iter()
        .map(|column| column.iter().flatten().copied().max_by(f64::total_cmp).filter(|_| lines.len() > 1))
        .collect();
    let lines = lines.iter().enumerate().map(|(i, (names, rows))| {
        let plain = |text: String| Entry { text, best: false };
        let mut line: Vec<Entry> = names.iter().cloned().map(plain).collect();
        for (c, column) in COLUMNS.iter().enumerate() {
            let percent: Vec<f64> = values_of(rows, column.metric).iter().map(|value| value * 100.0).collect();
            let best = means[c][i].is_some() && means[c][i] == best[c];
            line.push(Entry { text: spread(&percent, |value| format!("{value:.2}")), best });
        }
        let seconds: Vec<f64> = rows.iter().filter_map(|row| Some(row.result.as_ref()?.seconds)).collect();
        line.push(plain(mean(&seconds).map_or("–".to_string(), duration)));
        let finished = rows.iter().filter(|row| row.result.is_some()).count();
        if seed.is_some() {
            line.push(plain(finished.to_string()));
        }
        if unfinished {
            line.push(plain(status(rows)));
        }
        line
    });
    Table { titles, figures, lines: lines.collect() }
}

fn values_of(rows: &[&Row], metric: &str) -> Vec<f64> {
    rows.iter().filter_map(|row| row.result.as_ref()?.metrics.get(metric).copied()).collect()
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The mean and, of several values, their sample standard deviation.
fn spread(values: &[f64], show: impl Fn(f64) -> String) -> String {
    let Some(mean) = mean(values) else {
        return "–".to_string();
    };
    if values.len() < 2 {
        return show(mean);
    }
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    format!("{} ± {}", show(mean), show((squares / (values.len() - 1) as f64).sqrt()))
}

/// `finished`, or what is said of the seeds that are not.
fn status(rows: &[&Row]) -> String {
    let mut open: Vec<&str> = rows.iter().filter(|row| row.result.is_none()).map(|row| row.status.as_str()).collect();
    open.dedup();
    match open.is_empty() {
        true => "finished".to_string(),
        false => open.join(", "),
    }
}

/// `1:02:03`, or `2:03` below an hour.
fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds / 3600 {
        0 => format!("{}:{:02}", seconds / 60, seconds % 60),
        hours => format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60),
    }
}

fn text(table: &Table) -> String {
    let width = |column: usize| {
        let lengths = table.lines.iter().map(|line| line[column].text.chars().count());
        lengths.chain([table.titles[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..table.titles.len()).map(width).collect();
    let mut out = String::new();
    let titles: Vec<&str> = table.titles.iter().map(String::as_str).collect();
    let lines = table.lines.iter().map(|line| line.iter().map(|entry| entry.text.as_str()).collect::<Vec<_>>());
    for line in [titles].into_iter().chain(lines) {
        let entries = line.iter().enumerate().map(|(i, entry)| match is_left(table, i) {
            true => format!("{entry:<width$}", width = widths[i]),
            false => format!("{entry:>width$}", width = widths[i]),
        });
        out.push_str(entries.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// Names and the status stand to the left, figures to the right.
fn is_left(table: &Table, column: usize) -> bool {
    column < table.figures || table.titles[column] == "status"
}

fn markdown(table: &Table) -> String {
    let row = |entries: Vec<String>| format!("| {} |\n", entries.join(" | "));
    let mut out = row(table.titles.clone());
    out.push_str(&row((0..table.titles.len())
        .map(|i| if is_left(table, i) { "---" } else { "---:" }.into())
        .collect()));
    for line in &table.lines {
        let entry = |entry: &Entry| if entry.best { format!("**{}**", entry.text) } else { entry.text.clone() };
        out.push_str(&row(line.iter().map(entry).collect()));
    }
    out
}

/// One line for each cell, for other programs: every figure as exact as it is known.
fn csv(grid: &Grid, rows: &[Row]) -> String {
    let mut out = String::from("cell");
    for axis in &grid.axes {
        // Writing to a string cannot fail.
        let _ = write!(out, ",{}", axis.key);
    }
    for column in &COLUMNS {
        let _ = write!(out, ",{}", column.metric);
    }
    out.push_str(",seconds,status,folder\n");
    for row in rows {
        out.push_str(&row.name);
        for (axis, value) in grid.axes.iter().zip(&row.values) {
            let value = match axis.key.as_str() {
                "seed" => value.strip_prefix('s').unwrap_or(value),
                _ => value,
            };
            let _ = write!(out, ",{value}");
        }
        for column in &COLUMNS {
            out.push(',');
            if let Some(value) = row.result.as_ref().and_then(|result| result.metrics.get(column.metric)) {
                let _ = write!(out, "{value}");
            }
        }
        let seconds = row.result.as_ref().map_or(String::new(), |result| format!("{:.3}", result.seconds));
        let _ = writeln!(out, ",{seconds},{},{}", quoted(&row.status), quoted(&row.folder));
    }
    out
}

/// A field as RFC 4180 writes it.
fn quoted(field: &str) -> String {
    match field.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(axes: &str) -> Grid {
        let text = format!(
            r#"(data: (), model: (image_encoder: (plugin: "-"), text_encoder: (plugin: "-"), embed_dim: 1),
            loss: (plugin: "-"), optimizer: (plugin: "-", lr: 1.0), train: (epochs: 1, batch_size: 2), grid: ({axes}))"#
        );
        Grid::parse("grid", &text, &[]).unwrap()
    }

    /// The cells of a grid, with a mean recall each; `None` for one that is not finished.
    fn rows(grid: &Grid, recalls: &[Option<f64>]) -> Vec<Row> {
        assert_eq!(grid.cells.len(), recalls.len());
        let row = |(cell, recall): (&clip_host_recipe::Cell, &Option<f64>)| Row {
            name: cell.name.clone(),
            values: cell.values.clone(),
            folder: format!("runs/a, b/{}", cell.name),
            status: if recall.is_some() { "finished" } else { "stopped at step 3" }.to_string(),
            result: recall.map(|recall| Outcome {
                metrics: [("mean_recall".to_string(), recall), ("image_to_text_R@1".to_string(), recall / 2.0)].into(),
                seconds: recall * 10_000.0,
            }),
        };
        grid.cells.iter().zip(recalls).map(row).collect()
    }

    #[test]
    fn figures_stand_below_their_titles() {
        let grid = grid(r#"loss: ["clip", "isogclr"], optimizer: ["adamw", "sgd"]"#);
        let rows = rows(&grid, &[Some(0.25), Some(0.5), Some(0.125), None]);
        assert_eq!(
            table(&grid, &rows, TableFormat::Text),
            "\
loss     optimizer   TR@1  TR@5  TR@10  IR@1  IR@5  IR@10  mean recall  zero-shot     time  status
clip     adamw      12.50     –      –     –     –      –        25.00          –    41:40  finished
clip     sgd        25.00     –      –     –     –      –        50.00          –  1:23:20  finished
isogclr  adamw       6.25     –      –     –     –      –        12.50          –    20:50  finished
isogclr  sgd            –     –      –     –     –      –            –          –        –  stopped at step 3
"
        );
    }

    #[test]
    fn seeds_are_averaged_and_the_best_is_bold() {
        let grid = grid(r#"loss: ["clip", "isogclr"], seed: [1, 2]"#);
        let found = table(&grid, &rows(&grid, &[Some(0.2), Some(0.4), Some(0.6), Some(0.6)]), TableFormat::Markdown);
        let expected = "\
| loss | TR@1 | TR@5 | TR@10 | IR@1 | IR@5 | IR@10 | mean recall | zero-shot | time | seeds |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| clip | 15.00 ± 7.07 | – | – | – | – | – | 30.00 ± 14.14 | – | 50:00 | 2 |
| isogclr | **30.00 ± 0.00** | – | – | – | – | – | **60.00 ± 0.00** | – | 1:40:00 | 2 |
";
        assert_eq!(found, expected);
        // One seed of two: its own figures, and how far the other is.
        let found = table(&grid, &rows(&grid, &[Some(0.2), None, None, None]), TableFormat::Text);
        assert!(found.contains("10.00") && !found.contains('±') && found.contains("1  stopped at step 3"), "{found}");
    }

    #[test]
    fn csv_has_a_line_for_each_run() {
        let grid = grid(r#"loss: ["clip"], seed: [1, 2]"#);
        let found = table(&grid, &rows(&grid, &[Some(0.1 + 0.2), None]), TableFormat::Csv);
        let lines: Vec<&str> = found.lines().collect();
        assert_eq!(
            lines[0],
            "cell,loss,seed,image_to_text_R@1,image_to_text_R@5,image_to_text_R@10,text_to_image_R@1,text_to_image_R@5,\
             text_to_image_R@10,mean_recall,imagenet-zeroshot-val-top1,seconds,status,folder"
        );
        let expected =
            "clip_s1,clip,1,0.15000000000000002,,,,,,0.30000000000000004,,3000.000,finished,\"runs/a, b/clip_s1\"";
        assert_eq!(lines[1], expected);
        assert_eq!(lines[2], "clip_s2,clip,2,,,,,,,,,,stopped at step 3,\"runs/a, b/clip_s2\"");
    }
}
