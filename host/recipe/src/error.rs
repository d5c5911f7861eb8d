//! Errors that point at the text they are about.

use crate::span::Location;
use std::fmt;

/// One thing wrong with a recipe. `Display` shows the place, the source line with a caret, and the hint:
///
/// ```text
/// recipes/mine.ron:14:9: optimizer.lrr: unknown key `lrr`
///    |
/// 14 |         lrr: 2e-4,
///    |         ^^^
/// hint: did you mean `lr`? Valid keys: clip_grad_norm, config, lr, ...
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct RecipeError {
    /// Where; `None` only if the file could not be read at all.
    pub location: Option<Location>,
    /// Path of the key, empty for the whole recipe and for syntax errors.
    pub path: String,
    /// What was expected and what was found.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl fmt::Display for RecipeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(at) = &self.location {
            write!(f, "{}:{}:{}: ", at.source, at.line, at.column)?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        if let Some(at) = &self.location {
            let number = at.line.to_string();
            let gutter = " ".repeat(number.len());
            // Tabs are kept, so that the caret stays under its text whatever the terminal makes of them.
            let indent: String =
                at.text.chars().take(at.column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
            let carets = "^".repeat(at.width.max(1));
            write!(f, "\n{gutter} |\n{number} | {}\n{gutter} | {indent}{carets}", at.text)?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

/// Everything wrong with a recipe that could be found at once; never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct RecipeErrors(pub Vec<RecipeError>);

impl fmt::Display for RecipeErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n\n")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl From<RecipeError> for RecipeErrors {
    fn from(error: RecipeError) -> Self {
        RecipeErrors(vec![error])
    }
}

impl IntoIterator for RecipeErrors {
    type Item = RecipeError;
    type IntoIter = std::vec::IntoIter<RecipeError>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// The valid name that `name` most likely stands for, if any is near enough to be worth proposing.
pub fn nearest<'a, S: AsRef<str> + ?Sized + 'a>(name: &str, valid: impl IntoIterator<Item = &'a S>) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace('-', "_");
    let wanted = plain(name);
    valid
        .into_iter()
        .map(|candidate| {
            let candidate = candidate.as_ref();
            (strsim::jaro_winkler(&wanted, &plain(candidate)), candidate)
        })
        .filter(|(score, _)| *score >= 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// "did you mean `x`? Valid keys: a, b, c", sorted.
pub fn name_hint(name: &str, what: &str, valid: &[&str]) -> Option<String> {
    let mut sorted: Vec<&str> = valid.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let list = match sorted.as_slice() {
        [] => return Some(format!("there are no {what} here")),
        names => names.join(", "),
    };
    Some(match nearest(name, sorted.iter().copied()) {
        Some(near) => format!("did you mean `{near}`? Valid {what}: {list}"),
        None => format!("valid {what}: {list}"),
    })
}
