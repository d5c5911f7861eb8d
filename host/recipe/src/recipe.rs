//! A whole recipe: loading, overriding, checking, writing.

use crate::de::{Found, deserialize_all};
use crate::diff::{self, Difference};
use crate::error::{RecipeError, RecipeErrors, nearest};
use crate::include::Tree;
use crate::optimizer::Optimizer;
use crate::parse::parse;
use crate::sections::{Backend, Eval, KEYS, Model, PluginChoice, Plugins, Precision, REQUIRED, Top, Train};
use crate::span::{KeyPath, Location, Segment, Source, Span};
use crate::value::{Field, Kind, Value};
use crate::{set, write};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;

/// A checked recipe.
///
/// Relative paths in it are relative to the current folder, not to the recipe's own: `clip-host run recipes/x.ron` is
/// called where `data/` is, and a recipe copied into a run folder still means the same files.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Seed of everything random: initial weights, order, augmentation, dropout.
    pub seed: u64,
    /// The encoders.
    pub model: Model,
    /// The loss plugin.
    pub loss: PluginChoice,
    /// The optimizer plugin and its common settings.
    pub optimizer: Optimizer,
    /// The scheduler plugin; without one the learning rate is constant.
    pub scheduler: PluginChoice,
    /// The training loop.
    pub train: Train,
    /// The evaluation.
    pub eval: Eval,
    /// What computes.
    pub backend: Backend,
    /// Arithmetic.
    pub precision: Precision,
    /// Where plugins are found.
    pub plugins: Plugins,
    root: Value,
    sources: Vec<Source>,
    /// Number of the first source that is an override.
    overrides: usize,
}

/// The part of a setting that an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Its name: it may not be there.
    Key,
    /// Its value.
    Value,
}

/// Equal settings, wherever they were written.
impl PartialEq for Recipe {
    fn eq(&self, other: &Self) -> bool {
        self.seed == other.seed
            && self.data() == other.data()
            && self.model == other.model
            && self.loss == other.loss
            && self.optimizer == other.optimizer
            && self.scheduler == other.scheduler
            && self.train == other.train
            && self.eval == other.eval
            && self.backend == other.backend
            && self.precision == other.precision
            && self.plugins == other.plugins
    }
}

impl Recipe {
    /// Reads the file `path` and what it includes, and applies the overrides `sets`, each `path.to.key=VALUE`, in order.
    ///
    /// # Errors
    /// Everything that can be known wrong without the plugins and without the `data` section's own types (for which see
    /// [`Recipe::section`] and [`Recipe::error_at`]).
    pub fn load(path: impl AsRef<Path>, sets: &[String]) -> Result<Recipe, RecipeErrors> {
        Recipe::from_tree(Tree::load(path.as_ref())?, sets)
    }

    /// As [`Recipe::load`], from a text that is called `name` in errors; what it includes is looked for in the folder of
    /// `name`.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn parse(name: &str, text: &str, sets: &[String]) -> Result<Recipe, RecipeErrors> {
        Recipe::from_tree(Tree::parse(name, text)?, sets)
    }

    /// The recipe of a tree, with more overrides.
    pub(crate) fn from_tree(tree: Tree, sets: &[String]) -> Result<Recipe, RecipeErrors> {
        let Tree { mut root, mut sources, overrides, mut errors } = tree;
        for set in sets {
            let source = sources.len();
            sources.push(Source::set(set));
            if let Err(found) = set::apply(&mut root, set, source) {
                errors.extend(found.into_iter().map(|error| error.placed(&sources)));
            }
        }
        for (key, message, hint) in [
            ("include", "an override comes after all files are read", "write `include` in a recipe file"),
            ("grid", "this recipe is a grid of runs, not one", "`clip-host grid` runs, checks and compares its cells"),
        ] {
            if let Some(field) = root.take(key) {
                errors.push(RecipeError {
                    location: locate(&sources, field.name_span),
                    path: key.to_string(),
                    message: message.to_string(),
                    hint: Some(hint.to_string()),
                });
            }
        }
        let top = deserialize_all::<Top>(&root, &KeyPath::default(), overrides);
        let configs = ["model.image_encoder", "model.text_encoder", "loss", "optimizer", "scheduler"];
        for plugin in configs {
            let path = KeyPath::parse(&format!("{plugin}.config")).unwrap_or_default();
            if let Some(config) = root.get(&path) {
                not_finite(config, &path, &mut |path, value| {
                    errors.push(RecipeError {
                        location: locate(&sources, value.span),
                        path: path.to_string(),
                        message: format!("expected a finite number, got {}", value.describe()),
                        hint: None,
                    });
                });
            }
        }
        let top = match top {
            Ok(top) if errors.is_empty() => top,
            Ok(_) => return Err(sorted(errors, &sources)),
            Err(found) => {
                errors.extend(found.into_iter().map(|found| placed(&sources, found)));
                for key in missing_sections(&root) {
                    // serde has named the first one.
                    if !errors.iter().any(|error| error.path == key) {
                        errors.push(RecipeError {
                            location: locate(&sources, root.span),
                            path: key.to_string(),
                            message: format!("the key `{key}` is missing"),
                            hint: None,
                        });
                    }
                }
                return Err(sorted(errors, &sources));
            }
        };
        Ok(Recipe {
            seed: top.seed,
            model: top.model,
            loss: top.loss,
            optimizer: top.optimizer,
            scheduler: top.scheduler,
            train: top.train,
            eval: top.eval,
            backend: top.backend,
            precision: top.precision,
            plugins: top.plugins,
            root,
            sources,
            overrides,
        })
    }

    /// The `data` section, whose types are the data pipeline's: `recipe.section::<DataConfig>("data")`.
    pub fn data(&self) -> Option<&Value> {
        self.root.step(&Segment::Key("data".to_string()))
    }

    /// Everything that was set, by file and overrides.
    pub fn root(&self) -> &Value {
        &self.root
    }

    /// The texts that [`Span::source`] numbers: the file, those that it includes, then the overrides.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// Reads the part of the recipe at `path` (`"data"`, `"data.augment"`) as a `T`. What is not set reads as the empty
    /// section `()`.
    ///
    /// # Errors
    /// Everything that is wrong with it, each with line, column, key path and the nearest valid name.
    pub fn section<T: DeserializeOwned>(&self, path: &str) -> Result<T, RecipeErrors> {
        let path = KeyPath::parse(path).map_err(|(_, message)| RecipeError {
            location: None,
            path: path.to_string(),
            message,
            hint: None,
        })?;
        let empty = Value { kind: Kind::Unit, span: self.span(&path, Part::Value) };
        let value = self.root.get(&path).unwrap_or(&empty);
        deserialize_all(value, &path, self.overrides).map_err(|found| {
            sorted(found.into_iter().map(|found| placed(&self.sources, found)).collect(), &self.sources)
        })
    }

    /// Where the value at `path` is set; for one that is not set, the nearest section around it.
    pub fn locate(&self, path: &str) -> Option<Location> {
        let path = KeyPath::parse(path).ok()?;
        locate(&self.sources, self.span(&path, Part::Value))
    }

    /// An error about the setting at `path`, shown in its place: for what only others can check, a plugin's schema say.
    pub fn error_at(&self, path: &str, part: Part, message: impl Into<String>, hint: Option<String>) -> RecipeError {
        let span = KeyPath::parse(path).map(|path| self.span(&path, part));
        RecipeError {
            location: span.ok().and_then(|span| locate(&self.sources, span)),
            path: path.to_string(),
            message: message.into(),
            hint,
        }
    }

    fn span(&self, path: &KeyPath, part: Part) -> Span {
        let mut value = &self.root;
        let mut key = self.root.span;
        for segment in &path.0 {
            let Some(next) = value.step(segment) else {
                // The key that holds the rest of the path, for it is short where its value is long.
                return key;
            };
            key = match segment {
                Segment::Key(name) => value.key_span(name).unwrap_or(next.span),
                Segment::Index(_) => next.span,
            };
            value = next;
        }
        match part {
            Part::Key => key,
            Part::Value => value.span,
        }
    }

    /// Replaces the `data` section by what it was read as, so that [`Recipe::to_ron`] writes its defaults out as well.
    ///
    /// # Errors
    /// If `data` has no RON form.
    pub fn resolve_data<T: Serialize>(&mut self, data: &T) -> Result<(), RecipeErrors> {
        let error = |message: String| RecipeError {
            location: None,
            path: "data".to_string(),
            message: format!("the resolved section cannot be written as RON: {message}"),
            hint: None,
        };
        let text = ron::to_string(data).map_err(|e| error(e.to_string()))?;
        let (value, _) = parse(&text, 0, self.sources.len()).map_err(|e| error(e.message))?;
        self.sources.push(Source { name: "resolved data section".to_string(), text });
        if let Kind::Struct(_, fields) = &mut self.root.kind {
            match fields.iter_mut().find(|field| field.name == "data") {
                Some(field) => field.value = value,
                None => fields.push(Field { name: "data".to_string(), name_span: value.span, value }),
            }
        }
        Ok(())
    }

    /// The resolved recipe as RON, defaults written out and overrides applied. It loads to an equal recipe.
    pub fn to_ron(&self) -> String {
        write::write(&self.to_value())
    }

    /// Everything in which `other` differs once both are resolved, in the order of the sections. Where and how a setting
    /// is written does not matter.
    pub fn differences(&self, other: &Recipe) -> Vec<Difference> {
        diff::differences(&self.to_value(), &other.to_value())
    }

    fn to_value(&self) -> Value {
        let data = self.data().cloned();
        Value::section([
            ("seed", Value::int(self.seed)),
            ("data", data.unwrap_or(Kind::Unit.into())),
            ("model", self.model.to_value()),
            ("loss", self.loss.to_value()),
            ("optimizer", self.optimizer.to_value()),
            ("scheduler", self.scheduler.to_value()),
            ("train", self.train.to_value()),
            ("eval", self.eval.to_value()),
            ("backend", self.backend.to_value()),
            ("precision", self.precision.to_value()),
            ("plugins", self.plugins.to_value()),
        ])
    }
}

pub(crate) fn locate(sources: &[Source], span: Span) -> Option<Location> {
    sources.get(span.source).map(|source| source.locate(span.start, span.end))
}

/// The sections that every recipe must have and this one has not, not counting those that are only misspelt.
fn missing_sections(root: &Value) -> Vec<&'static str> {
    let fields = match &root.kind {
        Kind::Struct(_, fields) => fields.as_slice(),
        _ => &[],
    };
    let has = |key: &str| fields.iter().any(|field| field.name == key);
    let meant = |key: &str| fields.iter().any(|field| nearest(&field.name, KEYS) == Some(key));
    REQUIRED.iter().copied().filter(|key| !has(key) && !meant(key)).collect()
}

fn placed(sources: &[Source], found: Found) -> RecipeError {
    RecipeError {
        location: locate(sources, found.span),
        path: found.path.to_string(),
        message: found.message,
        hint: found.hint,
    }
}

/// In the order of the texts: the file's errors first, then those of what it includes, then the overrides'.
pub(crate) fn sorted(mut errors: Vec<RecipeError>, sources: &[Source]) -> RecipeErrors {
    let number = |name: &str| sources.iter().position(|source| source.name == name);
    errors.sort_by_key(|error| error.location.as_ref().map(|at| (number(&at.source), at.line, at.column)));
    RecipeErrors(errors)
}

/// Calls `report` for each number in `value` that JSON, and so a plugin, cannot be told.
fn not_finite(value: &Value, path: &KeyPath, report: &mut impl FnMut(&KeyPath, &Value)) {
    let mut inner = |segment: Segment, value: &Value| {
        let mut path = path.clone();
        path.0.push(segment);
        not_finite(value, &path, report);
    };
    match &value.kind {
        Kind::Float(x) if !x.is_finite() => report(path, value),
        Kind::Struct(_, fields) => {
            fields.iter().for_each(|f| inner(Segment::Key(f.name.clone()), &f.value));
        }
        Kind::Map(entries) => {
            entries.iter().for_each(|(k, v)| inner(Segment::Key(k.describe()), v));
        }
        Kind::List(items) | Kind::Tuple(_, items) => {
            items.iter().enumerate().for_each(|(i, v)| inner(Segment::Index(i), v));
        }
        Kind::Option(Some(some)) => not_finite(some, path, report),
        _ => {}
    }
}
