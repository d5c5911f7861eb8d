//! `include`: recipes that share a base.
//!
//! ```text
//! (
//!     include: "base.ron",              // or ["data.ron", "model.ron"], the later one over the earlier
//!     optimizer: (plugin: "adamw"),     // the rest of `optimizer` is the base's
//!     train: (epochs: 5),
//! )
//! ```
//!
//! A path starts from the folder of the file that says it. The including file's settings lie over the base's: see [`merge`].

use crate::error::{RecipeError, RecipeErrors};
use crate::parse::{SyntaxError, parse};
use crate::span::{Location, Source};
use crate::value::{Field, Kind, Value};
use std::path::{Path, PathBuf};

/// A recipe file with all that it includes, not yet read as settings.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    /// All settings; `include` is gone, `grid` is not.
    pub root: Value,
    /// The file, those included, then overrides.
    pub sources: Vec<Source>,
    /// Number of the first source that is an override.
    pub overrides: usize,
    /// What is wrong and did not keep the rest from being read: keys that are set twice.
    pub errors: Vec<RecipeError>,
}

impl Tree {
    /// Reads a file and what it includes.
    pub(crate) fn load(path: &Path) -> Result<Tree, RecipeErrors> {
        let text = read(path).map_err(|(message, hint)| RecipeError {
            location: None,
            path: String::new(),
            message: format!("cannot read the recipe {}: {message}", path.display()),
            hint: Some(hint.to_string()),
        })?;
        Tree::parse(&path.display().to_string(), &text)
    }

    /// As [`Tree::load`], from a text that is called `name`.
    pub(crate) fn parse(name: &str, text: &str) -> Result<Tree, RecipeErrors> {
        let mut reader = Reader::default();
        let root = reader.file(name, text, None)?;
        let overrides = reader.sources.len();
        Ok(Tree { root, sources: reader.sources, overrides, errors: reader.errors })
    }
}

/// The text of a file, or why there is none, and a hint.
fn read(path: &Path) -> Result<String, (String, &'static str)> {
    let bytes = std::fs::read(path).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => "is the path right, seen from the current folder?",
            std::io::ErrorKind::IsADirectory => "name a recipe file, not a folder",
            _ => "can the file be read by this user?",
        };
        (error.to_string(), hint)
    })?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1;
        let message = format!("it is not UTF-8 text (line {line}, byte {at})");
        (message, "a recipe is RON text; save it as UTF-8")
    })
}

/// A file whose includes are being read.
struct Open {
    name: String,
    /// The file itself, whatever path leads to it.
    file: PathBuf,
    /// Where it is included.
    from: Option<Location>,
}

#[derive(Default)]
struct Reader {
    sources: Vec<Source>,
    errors: Vec<RecipeError>,
    /// From the first file to the one at hand.
    open: Vec<Open>,
}

impl Reader {
    /// The settings of one file, over those that it includes.
    fn file(&mut self, name: &str, text: &str, from: Option<Location>) -> Result<Value, RecipeErrors> {
        let number = self.sources.len();
        self.sources.push(Source { name: name.to_string(), text: text.to_string() });
        let (mut root, duplicates) = parse(text, 0, number).map_err(|error| error.placed(&self.sources))?;
        self.errors.extend(duplicates.into_iter().map(|error| error.placed(&self.sources)));
        match root.kind {
            Kind::Struct(..) => {}
            Kind::Unit => root.kind = Kind::Struct(None, Vec::new()),
            _ => {
                let message = format!("expected a section `(key: ..)`, got {}", root.describe());
                let hint = Some("a recipe looks like (seed: 0, data: (..), model: (..), ..)".to_string());
                return Err(SyntaxError { span: root.span, message, hint }.placed(&self.sources).into());
            }
        }
        let Some(include) = root.take("include") else {
            return Ok(root);
        };
        let file = std::fs::canonicalize(name).unwrap_or_else(|_| PathBuf::from(name));
        self.open.push(Open { name: name.to_string(), file, from });
        let mut base: Option<Value> = None;
        for (value, path) in self.paths(&include)? {
            let included = self.include(value, path)?;
            base = Some(match base {
                Some(base) => merge(base, included),
                None => included,
            });
        }
        self.open.pop();
        Ok(match base {
            Some(base) => merge(base, root),
            None => root,
        })
    }

    /// The paths of `include`, each with its value: one text, or a list of them.
    fn paths<'v>(&self, include: &'v Field) -> Result<Vec<(&'v Value, &'v str)>, RecipeErrors> {
        let values: Vec<&Value> = match &include.value.kind {
            Kind::List(values) => values.iter().collect(),
            _ => vec![&include.value],
        };
        let path = |value: &'v Value| match &value.kind {
            Kind::String(path) => Ok((value, path.as_str())),
            _ => {
                let message = format!("expected the path of a recipe, or a list of paths, got {}", value.describe());
                let hint = "write `include: \"base.ron\"`, a path from this file's folder";
                Err(self.error(value, message, hint.to_string()))
            }
        };
        values.into_iter().map(path).collect()
    }

    fn include(&mut self, value: &Value, path: &str) -> Result<Value, RecipeErrors> {
        let folder = self.open.last().and_then(|open| Path::new(&open.name).parent()).unwrap_or(Path::new(""));
        let path = folder.join(path);
        let name = path.display().to_string();
        let file = std::fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        if let Some(first) = self.open.iter().position(|open| open.file == file) {
            let mut round: Vec<&str> = self.open[first..].iter().map(|open| open.name.as_str()).collect();
            round.push(&name);
            let message = format!("recipes include each other: {}{}", round.join(" includes "), self.chain());
            let hint = "take one of these `include`s out; what both need can stand in a file that both include";
            return Err(self.error(value, message, hint.to_string()));
        }
        let text = read(&path).map_err(|(problem, hint)| {
            let message = format!("cannot read the included recipe {name}: {problem}{}", self.chain());
            let hint = match path.exists() {
                true => hint.to_string(),
                false => "an included path starts from the folder of the file that includes it".to_string(),
            };
            self.error(value, message, hint)
        })?;
        let from = self.sources.get(value.span.source).map(|source| source.locate(value.span.start, value.span.end));
        self.file(&name, &text, from)
    }

    /// "; b.ron is included at a.ron:3:14; …" for the file at hand, up to the first.
    fn chain(&self) -> String {
        let links = self.open.iter().rev().filter_map(|open| {
            let from = open.from.as_ref()?;
            Some(format!("; {} is included at {}:{}:{}", open.name, from.source, from.line, from.column))
        });
        links.collect()
    }

    fn error(&self, value: &Value, message: String, hint: String) -> RecipeErrors {
        let error = SyntaxError { span: value.span, message, hint: Some(hint) }.placed(&self.sources);
        RecipeError { path: "include".to_string(), ..error }.into()
    }
}

/// `over` laid over `base`. Sections are merged key by key; every other value of `over`, lists among them, replaces the
/// base's, and so does `()`, which empties a section. Where `over` chooses another plugin, what the base says for its own
/// ([`PLUGINS_OWN`]) is gone; an optimizer's `lr`, decay and groups stay.
pub(crate) fn merge(base: Value, over: Value) -> Value {
    match (base.kind, over.kind) {
        (Kind::Struct(None, mut below), Kind::Struct(None, above)) => {
            if let (Some(old), Some(new)) = (plugin(&below), plugin(&above))
                && old != new
            {
                below.retain(|field| !PLUGINS_OWN.contains(&field.name.as_str()));
            }
            for field in above {
                match below.iter().position(|old| old.name == field.name) {
                    Some(at) => {
                        let old = std::mem::replace(&mut below[at].value, Kind::Unit.into());
                        below[at] = Field { value: merge(old, field.value), ..field };
                    }
                    None => below.push(field),
                }
            }
            Value { kind: Kind::Struct(None, below), span: over.span }
        }
        (_, kind) => Value { kind, span: over.span },
    }
}

/// Settings that mean something for one plugin only.
const PLUGINS_OWN: [&str; 5] = ["config", "path", "sha256", "weights", "weights_sha256"];

/// The plugin that a section chooses, if it is one that does.
fn plugin(fields: &[Field]) -> Option<&str> {
    match &fields.iter().find(|field| field.name == "plugin")?.value.kind {
        Kind::String(id) | Kind::Name(id) => Some(id),
        _ => None,
    }
}
