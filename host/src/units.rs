//! Numbers for people, in aligned columns.

/// Bytes in megabytes, with one decimal.
pub fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// Bytes with the unit that fits.
pub fn bytes(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", value / 1e6),
        _ => format!("{:.2} GB", value / 1e9),
    }
}

/// Operations in 10⁹, with as many decimals as small ones need.
pub fn gflop(flops: f64) -> String {
    format!("{:.3}", flops / 1e9)
}

/// A share as a percentage.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A name and how often it occurs: `mul×3`.
pub fn counted((name, count): &(&'static str, usize)) -> String {
    if *count == 1 { name.to_string() } else { format!("{name}×{count}") }
}

/// A table: the first column flush left, the others flush right, two spaces between. `left` more columns are flush left.
pub fn table(rows: &[Vec<String>], left: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let pad = " ".repeat(widths[column] - cell.chars().count());
            line += gap;
            line += &if column <= left { format!("{cell}{pad}") } else { format!("{pad}{cell}") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// Breaks a list of words into lines of at most `width` characters, each after `indent` spaces.
pub fn wrap(words: &[String], indent: usize, width: usize) -> String {
    let mut text = String::new();
    let mut line = String::new();
    for word in words {
        if !line.is_empty() && indent + line.chars().count() + 1 + word.chars().count() > width {
            text += &format!("{:indent$}{line}\n", "");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line += word;
    }
    if !line.is_empty() {
        text += &format!("{:indent$}{line}\n", "");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_fit_their_numbers() {
        assert_eq!(
            [0, 999, 1_500, 2_340_000, 5_600_000_000].map(bytes),
            ["0 B", "999 B", "1.5 kB", "2.3 MB", "5.60 GB"]
        );
        assert_eq!(
            (megabytes(1_250_000), gflop(3.7775e9), percent(0.8765)),
            ("1.2".into(), "3.777".into(), "87.6 %".into())
        );
    }

    #[test]
    fn columns_are_aligned() {
        let rows =
            [["part", "×", "MB"], ["a", "left", "1.5"], ["long", "l", "100.0"]].map(|r| r.map(String::from).to_vec());
        assert_eq!(table(&rows, 1), "part  ×        MB\na     left    1.5\nlong  l     100.0\n");
    }

    #[test]
    fn long_lists_are_broken() {
        let words = ["aaa", "bbb", "ccc", "ddddddddddddd"].map(String::from);
        assert_eq!(wrap(&words, 2, 10), "  aaa bbb\n  ccc\n  ddddddddddddd\n");
        assert_eq!(wrap(&[], 2, 10), "");
    }
}
