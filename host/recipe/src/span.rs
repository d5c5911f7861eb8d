//! Texts, places in them, and key paths.

use std::fmt;
use std::ops::Range;

/// A text that recipe values come from: the recipe file, a file that it includes, or one `--set` override.
#[derive(Debug, Clone)]
pub struct Source {
    /// What a person calls it: the file's path, or `--set`.
    pub name: String,
    /// The whole text.
    pub text: String,
}

/// A half-open byte range of one [`Source`], numbered as in [`crate::Recipe::sources`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    /// Index of the source; 0 is the recipe file.
    pub source: usize,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// A place that can be shown to a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Name of the source.
    pub source: String,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// Length in characters of the marked text on that line (at least 1).
    pub width: usize,
    /// The text of that line.
    pub text: String,
}

impl Source {
    /// The source of an override.
    pub(crate) fn set(text: &str) -> Source {
        Source { name: "--set".to_string(), text: text.to_string() }
    }

    /// Line, column and line text of a byte range of this source.
    pub fn locate(&self, start: usize, end: usize) -> Location {
        let floor = |mut at: usize| {
            at = at.min(self.text.len());
            while !self.text.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        let (start, end) = (floor(start), floor(end.max(start)));
        let line_start = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let rest = &self.text[line_start..];
        let line = rest.split(['\n', '\r']).next().unwrap_or_default();
        let line_end = line_start + line.len();
        // A value over several lines is marked by its first character only: its opening bracket.
        let width = if end > line_end { 1 } else { self.text[start..end].chars().count().max(1) };
        Location {
            source: self.name.clone(),
            line: self.text[..start].matches('\n').count() + 1,
            column: self.text[line_start..start].chars().count() + 1,
            width,
            text: line.to_string(),
        }
    }
}

/// One step of a key path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Segment {
    /// `.name`
    Key(String),
    /// `[3]`
    Index(usize),
}

/// A path to a value: `data.train[0]`, `loss.config.rho`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct KeyPath(pub Vec<Segment>);

/// A segment and its byte range.
pub(crate) type Placed = (Segment, Range<usize>);

impl KeyPath {
    /// Reads `a.b[0].c`; the empty text is the root.
    ///
    /// # Errors
    /// A byte offset into `text` and what is wrong there.
    pub fn parse(text: &str) -> Result<KeyPath, (usize, String)> {
        let placed = KeyPath::parse_placed(text)?;
        Ok(KeyPath(placed.into_iter().map(|(segment, _)| segment).collect()))
    }

    /// As [`KeyPath::parse`], each segment with its byte range in `text`.
    pub(crate) fn parse_placed(text: &str) -> Result<Vec<Placed>, (usize, String)> {
        let mut segments = Vec::new();
        let mut at = 0;
        let mut key_expected = true;
        while at < text.len() {
            let rest = &text[at..];
            if let Some(inner) = rest.strip_prefix('[') {
                if key_expected {
                    return Err((at, "a key is expected before `[`".into()));
                }
                let close = inner.find(']').ok_or((at, "`[` is never closed".to_string()))?;
                let index = inner[..close].trim().parse().map_err(|_| {
                    let found = &inner[..close];
                    (at + 1, format!("expected an index from 0, got `{found}`"))
                })?;
                segments.push((Segment::Index(index), at..at + close + 2));
                at += close + 2;
            } else if !key_expected && rest.starts_with('.') {
                key_expected = true;
                at += 1;
            } else {
                let length = rest.find(['.', '[']).unwrap_or(rest.len());
                let key = rest[..length].trim();
                if !key_expected || key.is_empty() {
                    return Err((at, "expected keys joined by `.`, and indexes as `[0]`".into()));
                }
                let start = at + rest[..length].len() - rest[..length].trim_start().len();
                segments.push((Segment::Key(key.to_string()), start..start + key.len()));
                key_expected = false;
                at += length;
            }
        }
        if key_expected && !segments.is_empty() {
            return Err((text.len(), "a key is expected after `.`".into()));
        }
        Ok(segments)
    }

    /// This path with another one after it.
    pub fn join(&self, rest: &KeyPath) -> KeyPath {
        KeyPath(self.0.iter().chain(&rest.0).cloned().collect())
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Key(key) if i == 0 => f.write_str(key)?,
                Segment::Key(key) => write!(f, ".{key}")?,
                Segment::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}
