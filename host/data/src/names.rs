//! Shard names: brace expansion and wildcards.
//!
//! `cc3m-train-{0000..0575}.tar` names 576 files, `{train,val}-{0..3}.tar` eight, `*.tar` whatever the folder holds, in
//! the order of their names. Braces expand as in bash: numbers keep the width of the wider end if either has a leading
//! zero, ranges may run downwards and have a step (`{0..10..5}`), groups may nest. A wildcard (`*`, `?`) is allowed in
//! the file name, not in its folder.

use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};

/// Most names that one pattern may give: a slip such as `{0..99999999999}` should be an error, not a full memory.
pub const MAX_NAMES: usize = 1_000_000;

/// Expands the braces of a pattern; a pattern without braces gives itself.
///
/// # Errors
/// [`DataError::Pattern`] for unbalanced braces or more than [`MAX_NAMES`] names.
pub fn expand_braces(pattern: &str) -> Result<Vec<String>> {
    let fail = |problem: String, hint: &str| DataError::Pattern { pattern: pattern.into(), problem, hint: hint.into() };
    let mut depth = 0i32;
    for c in pattern.chars() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        if depth < 0 {
            break;
        }
    }
    if depth != 0 {
        let problem = if depth > 0 { "a `{` is never closed" } else { "a `}` closes nothing" };
        return Err(fail(problem.into(), "write braces in pairs, as in `train-{00..05}.tar`"));
    }
    expand(pattern).ok_or_else(|| {
        fail(format!("the braces stand for more than {MAX_NAMES} names"), "check the ends of the ranges")
    })
}

/// Expands the first group and, recursively, what is left. None if there are too many names.
fn expand(pattern: &str) -> Option<Vec<String>> {
    let mut search = 0;
    while let Some(open) = pattern[search..].find('{').map(|i| i + search) {
        // Braces are balanced, so the group ends inside the pattern.
        let close = matching_brace(pattern, open)?;
        let body = &pattern[open + 1..close];
        let (head, tail) = (&pattern[..open], &pattern[close + 1..]);
        let items: Option<Vec<String>> = match range(body) {
            Some(names) => Some(names?),
            None => {
                let parts = split_top_level(body);
                if parts.len() < 2 {
                    None
                } else {
                    let mut items = Vec::new();
                    for part in parts {
                        items.extend(expand(part)?);
                    }
                    Some(items)
                }
            }
        };
        // A group that is neither a range nor a list, `{x}`, stands for itself, as in bash.
        let Some(items) = items else {
            search = open + 1;
            continue;
        };
        let tails = expand(tail)?;
        if items.len().checked_mul(tails.len())? > MAX_NAMES {
            return None;
        }
        return Some(items.iter().flat_map(|item| tails.iter().map(move |t| format!("{head}{item}{t}"))).collect());
    }
    Some(vec![pattern.to_string()])
}

fn matching_brace(pattern: &str, open: usize) -> Option<usize> {
    let mut depth = 0;
    for (i, c) in pattern[open..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(open + i);
        }
    }
    None
}

fn split_top_level(body: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (i, c) in body.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&body[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&body[start..]);
    parts
}

/// `a..b` or `a..b..step` of integers. Outer None: not a range; inner None: too many names.
fn range(body: &str) -> Option<Option<Vec<String>>> {
    let parts: Vec<&str> = body.split("..").collect();
    let (first, last, step) = match parts[..] {
        [first, last] => (first, last, 1u64),
        [first, last, step] => (first, last, step.parse::<i64>().ok()?.unsigned_abs().max(1)),
        _ => return None,
    };
    let (from, to): (i64, i64) = (first.parse().ok()?, last.parse().ok()?);
    let digits = |s: &str| s.trim_start_matches(['-', '+']).len();
    let padded = |s: &str| digits(s) > 1 && s.trim_start_matches(['-', '+']).starts_with('0');
    let width = if padded(first) || padded(last) { digits(first).max(digits(last)) } else { 0 };
    let count = from.abs_diff(to) / step;
    if count >= MAX_NAMES as u64 {
        return Some(None);
    }
    let sign = if to >= from { 1i128 } else { -1 };
    let names = (0..=count).map(|i| {
        let value = i128::from(from) + sign * i128::from(i) * i128::from(step);
        let minus = if value < 0 { "-" } else { "" };
        format!("{minus}{:0width$}", value.unsigned_abs())
    });
    Some(Some(names.collect()))
}

/// The files that a pattern names, relative names below `base`. Braces need not exist (the caller reports all missing
/// files at once); wildcards give the existing files in order of their names.
///
/// # Errors
/// [`DataError::Pattern`] for bad braces, a wildcard in a folder's name, or one that matches nothing;
/// [`DataError::Missing`] if the folder of a wildcard does not exist.
pub fn resolve(pattern: &str, base: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for name in expand_braces(pattern)? {
        let path = base.join(&name);
        let file_name = path.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
        let folder = path.parent().unwrap_or(base).to_path_buf();
        if Path::new(&name).parent().is_some_and(|p| p.to_string_lossy().contains(['*', '?'])) {
            return Err(DataError::Pattern {
                pattern: pattern.into(),
                problem: "a wildcard stands in a folder's name".into(),
                hint: "use `*` and `?` in the file name only, or name the folders in braces: `{a,b}/*.tar`".into(),
            });
        }
        if !file_name.contains(['*', '?']) {
            files.push(path);
            continue;
        }
        if !folder.is_dir() {
            return Err(DataError::Missing { what: "folder", path: folder, base: base.into(), more: String::new() });
        }
        let entries = std::fs::read_dir(&folder).map_err(|e| DataError::io("list", &folder, &e))?;
        let mut found: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .filter(|p| p.file_name().is_some_and(|f| wildcard_matches(&file_name, &f.to_string_lossy())))
            .collect();
        if found.is_empty() {
            return Err(DataError::Pattern {
                pattern: pattern.into(),
                problem: format!("no file in `{}` matches", folder.display()),
                hint: "check the folder and the ending of the file names".into(),
            });
        }
        found.sort_unstable();
        files.append(&mut found);
    }
    Ok(files)
}

/// Whether `*` (any run of characters) and `?` (one character) of a pattern match a whole name.
fn wildcard_matches(pattern: &str, name: &str) -> bool {
    let (p, n): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut i, mut j, mut star) = (0, 0, None);
    while j < n.len() {
        if i < p.len() && (p[i] == '?' || p[i] == n[j]) && p[i] != '*' {
            (i, j) = (i + 1, j + 1);
        } else if i < p.len() && p[i] == '*' {
            star = Some((i, j));
            i += 1;
        } else if let Some((at, eaten)) = star {
            // Let the last star eat one character more.
            star = Some((at, eaten + 1));
            (i, j) = (at + 1, eaten + 1);
        } else {
            return false;
        }
    }
    p[i..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn expanded(pattern: &str) -> Vec<String> {
        expand_braces(pattern).unwrap()
    }

    #[test]
    fn ranges_lists_and_nesting() {
        assert_eq!(expanded("a.tar"), ["a.tar"]);
        assert_eq!(expanded("t-{00..03}.tar"), ["t-00.tar", "t-01.tar", "t-02.tar", "t-03.tar"]);
        assert_eq!(expanded("{9..11}"), ["9", "10", "11"]);
        assert_eq!(expanded("{3..1}"), ["3", "2", "1"]);
        assert_eq!(expanded("{0..10..5}"), ["0", "5", "10"]);
        assert_eq!(expanded("{-1..1}"), ["-1", "0", "1"]);
        assert_eq!(expanded("{a,b}{0..1}"), ["a0", "a1", "b0", "b1"]);
        assert_eq!(expanded("{a,{b,c}d,}x"), ["ax", "bdx", "cdx", "x"]);
        assert_eq!(expanded("{x}-{1,2}"), ["{x}-1", "{x}-2"]);
        assert_eq!(expanded("ü{ä,ö}"), ["üä", "üö"]);
        assert_eq!(expanded("cc3m-train-{0000..0575}.tar").len(), 576);
    }

    #[test]
    fn bad_patterns_are_errors() {
        for pattern in ["a{", "a}", "}{", "{a,b", "{{a,b}"] {
            assert!(matches!(expand_braces(pattern), Err(DataError::Pattern { .. })), "{pattern}");
        }
        for pattern in ["{0..99999999999}", "{0..9999}{0..9999}"] {
            let error = expand_braces(pattern).unwrap_err().to_string();
            assert!(error.contains("more than") && error.contains("hint:"), "{error}");
        }
    }

    /// Random patterns: the number of names is the product of the groups' sizes, names are distinct, order is that of
    /// an odometer, and nothing is left of the braces.
    #[test]
    fn property_odometer() {
        let mut rng = Rng::new(11);
        for _ in 0..500 {
            let (mut pattern, mut groups): (String, Vec<Vec<String>>) = ("s".into(), Vec::new());
            for g in 0..1 + rng.below(3) {
                if rng.chance(0.5) {
                    let (from, len) = (rng.below(50), rng.below(12));
                    let width = 1 + rng.below(4) as usize;
                    pattern += &format!("{{{from:0width$}..{:0width$}}}", from + len);
                    let wide = [from, from + len].iter().any(|v| format!("{v:0width$}").starts_with('0') && width > 1);
                    let w = if wide { width.max(format!("{}", from + len).len()) } else { 0 };
                    groups.push((from..=from + len).map(|v| format!("{v:0w$}")).collect());
                } else {
                    let items: Vec<String> = (0..2 + rng.below(3)).map(|i| format!("w{g}x{i}")).collect();
                    pattern += &format!("{{{}}}", items.join(","));
                    groups.push(items);
                }
                pattern.push('-');
            }
            let mut want = vec!["s".to_string()];
            for group in &groups {
                want = want.iter().flat_map(|head| group.iter().map(move |item| format!("{head}{item}-"))).collect();
            }
            assert_eq!(expanded(&pattern), want, "{pattern}");
        }
    }

    #[test]
    fn wildcards() {
        for (pattern, name, want) in [
            ("*.tar", "a.tar", true),
            ("*.tar", "a.tar.index", false),
            ("a?c*", "abc", true),
            ("a?c", "ac", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*ab", "aab", true),
            ("", "", true),
        ] {
            assert_eq!(wildcard_matches(pattern, name), want, "{pattern} {name}");
        }
    }
}
