//! `grid`: one recipe for each combination of values.
//!
//! ```text
//! (
//!     include: "base.ron",
//!     grid: (
//!         loss: ["clip", (plugin: "isogclr", config: (gamma: 0.8))],
//!         optimizer: [(plugin: "adamw"), (name: "adamw_high", plugin: "adamw", lr: 2e-3)],
//!         seed: [0, 1, 2],
//!     ),
//! )
//! ```
//!
//! Each key of `grid` is a key of recipes, with a list of what it shall be. A section in the list lies over the recipe's
//! own as that does over an included one: what it does not say stays. A value is called by its `name`, else by its plugin;
//! a text is short for a section with nothing but that plugin. A combination is called by all its values' names, joined
//! by `_`: `isogclr_adamw_high_s2`.

use crate::error::{RecipeError, RecipeErrors, name_hint};
use crate::include::{Tree, merge};
use crate::parse::SyntaxError;
use crate::recipe::{Recipe, locate, sorted};
use crate::sections::KEYS;
use crate::set;
use crate::span::{KeyPath, Segment, Source, Span};
use crate::value::{Field, Kind, Value};
use std::collections::HashSet;
use std::path::Path;

/// More cells than this are a slip of the finger.
const MAX_CELLS: usize = 10_000;

/// A recipe for each combination of a grid's values.
#[derive(Debug, Clone)]
pub struct Grid {
    /// What the recipes differ in, as written.
    pub axes: Vec<Axis>,
    /// The combinations; values of the last axis change fastest.
    pub cells: Vec<Cell>,
}

/// One key of a grid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Axis {
    /// The recipe's key.
    pub key: String,
    /// Names of its values.
    pub names: Vec<String>,
}

/// One combination.
#[derive(Debug, Clone)]
pub struct Cell {
    /// Names of its values, joined by `_`; those of seeds begin with `s`.
    pub name: String,
    /// Names of its values, one for each axis.
    pub values: Vec<String>,
    /// Its recipe.
    pub recipe: Recipe,
}

/// One value of an axis.
struct Choice {
    name: String,
    value: Value,
}

/// An axis with its values.
struct Choices {
    key: String,
    key_span: Span,
    choices: Vec<Choice>,
}

impl Grid {
    /// Reads the grid in the file `path`. Overrides of `grid` itself (`grid.seed=[0,1,2]`) change the axes, all others
    /// hold for every cell.
    ///
    /// # Errors
    /// As [`Recipe::load`], of all cells at once; what is wrong with the axes; an override of what an axis chooses.
    pub fn load(path: impl AsRef<Path>, sets: &[String]) -> Result<Grid, RecipeErrors> {
        Grid::from_tree(Tree::load(path.as_ref())?, sets)
    }

    /// As [`Grid::load`], from a text that is called `name` in errors.
    ///
    /// # Errors
    /// As [`Grid::load`].
    pub fn parse(name: &str, text: &str, sets: &[String]) -> Result<Grid, RecipeErrors> {
        Grid::from_tree(Tree::parse(name, text)?, sets)
    }

    fn from_tree(mut tree: Tree, sets: &[String]) -> Result<Grid, RecipeErrors> {
        let (of_grid, of_cells): (Vec<&String>, Vec<&String>) =
            sets.iter().partition(|set| first_keys(set).is_some_and(|(first, _)| first == "grid"));
        for set in of_grid {
            let source = tree.sources.len();
            tree.sources.push(Source::set(set));
            if let Err(found) = set::apply(&mut tree.root, set, source) {
                tree.errors.extend(found.into_iter().map(|error| error.placed(&tree.sources)));
            }
        }
        let grid = tree.root.take("grid").ok_or_else(|| RecipeError {
            location: locate(&tree.sources, Span { end: tree.root.span.start + 1, ..tree.root.span }),
            path: "grid".to_string(),
            message: "the key `grid` is missing: this recipe is one run".to_string(),
            hint: Some("`clip-host run` runs it; a grid has `grid: (loss: [..], optimizer: [..])`".to_string()),
        })?;
        let axes = axes(&grid).map_err(|found| {
            sorted(found.into_iter().map(|error| error.placed(&tree.sources)).collect(), &tree.sources)
        })?;
        let mut errors = std::mem::take(&mut tree.errors);
        errors.extend(of_cells.iter().filter_map(|set| chosen_by_axis(set, &axes)));
        if !errors.is_empty() {
            return Err(sorted(errors, &tree.sources));
        }
        cells(&tree, &axes, &of_cells.into_iter().cloned().collect::<Vec<_>>())
    }

    /// Position of the axis of seeds, over which figures are averaged.
    pub fn seed_axis(&self) -> Option<usize> {
        self.axes.iter().position(|axis| axis.key == SEED)
    }
}

const SEED: &str = "seed";

/// The first key of an override, and the second.
fn first_keys(set: &str) -> Option<(String, Option<String>)> {
    let path = KeyPath::parse(set.split_once('=')?.0).ok()?;
    let mut keys = path.0.into_iter().map(|segment| match segment {
        Segment::Key(key) => key,
        Segment::Index(index) => format!("[{index}]"),
    });
    Some((keys.next()?, keys.next()))
}

/// An override that would make an axis' values one.
fn chosen_by_axis(set: &str, axes: &[Choices]) -> Option<RecipeError> {
    let (first, second) = first_keys(set)?;
    let axis = axes.iter().find(|axis| axis.key == first)?;
    if second.as_deref().is_some_and(|key| key != "plugin") {
        return None;
    }
    let names: Vec<&str> = axis.choices.iter().map(|choice| choice.name.as_str()).collect();
    Some(RecipeError {
        location: Some(Source::set(set).locate(0, set.find('=').unwrap_or(set.len()))),
        path: first.clone(),
        message: format!("expected an override of what the grid does not choose, got its axis `{first}`"),
        hint: Some(format!(
            "the grid has {}; `--cell` picks some of its runs, `--set grid.{first}=[..]` gives others",
            names.join(", ")
        )),
    })
}

fn error(span: Span, message: String, hint: Option<String>) -> SyntaxError {
    SyntaxError { span, message, hint }
}

fn axes(grid: &Field) -> Result<Vec<Choices>, Vec<SyntaxError>> {
    let form = || Some("write `grid: (loss: [\"clip\", \"isogclr\"], optimizer: [\"adamw\", \"radam\"])`".to_string());
    let fields = match &grid.value.kind {
        Kind::Struct(None, fields) if !fields.is_empty() => fields,
        _ => {
            let message = format!("grid: expected a section with a list for each axis, got {}", grid.value.describe());
            return Err(vec![error(grid.value.span, message, form())]);
        }
    };
    let mut errors = Vec::new();
    let mut axes = Vec::new();
    for field in fields {
        match choices(field) {
            Ok(choices) => axes.push(Choices { key: field.name.clone(), key_span: field.name_span, choices }),
            Err(found) => errors.extend(found),
        }
    }
    let cells = axes.iter().fold(1usize, |cells, axis| cells.saturating_mul(axis.choices.len()));
    if cells > MAX_CELLS {
        let message = format!("grid: expected at most {MAX_CELLS} combinations, got {cells}");
        errors.push(error(grid.name_span, message, Some("split it into several grids".to_string())));
    }
    if errors.is_empty() { Ok(axes) } else { Err(errors) }
}

fn choices(axis: &Field) -> Result<Vec<Choice>, Vec<SyntaxError>> {
    let key = axis.name.as_str();
    if !KEYS.contains(&key) {
        let hint = name_hint(key, "axes", &KEYS);
        return Err(vec![error(
            axis.name_span,
            format!("grid: unknown axis `{key}`, which is no key of a recipe"),
            hint,
        )]);
    }
    let items = match &axis.value.kind {
        Kind::List(items) if !items.is_empty() => items,
        _ => {
            let message = format!("grid.{key}: expected a list of at least one value, got {}", axis.value.describe());
            return Err(vec![error(axis.value.span, message, Some(format!("write `{key}: [..]`")))]);
        }
    };
    let mut names = HashSet::new();
    let mut choices = Vec::new();
    let mut errors = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let place = format!("grid.{key}[{i}]");
        match choice(key, item) {
            Ok(choice) if !names.insert(choice.name.clone()) => {
                let message = format!("{place}: there is a value `{}` already", choice.name);
                let hint = "give one of them a name of its own: (name: \"..\", ..)".to_string();
                errors.push(error(item.span, message, Some(hint)));
            }
            Ok(choice) => choices.push(choice),
            Err((span, message, hint)) => errors.push(error(span, format!("{place}: {message}"), Some(hint))),
        }
    }
    if errors.is_empty() { Ok(choices) } else { Err(errors) }
}

/// One value with its name; or where and why it has none, and a hint.
fn choice(key: &str, item: &Value) -> Result<Choice, (Span, String, String)> {
    let text = |value: &Value| match &value.kind {
        Kind::String(text) | Kind::Name(text) => Some(text.clone()),
        _ => None,
    };
    let mut value = item.clone();
    let (name, at) = match (&item.kind, value.take("name")) {
        (_, Some(given)) => {
            let name = text(&given.value).ok_or_else(|| {
                let message = format!("name: expected a text, got {}", given.value.describe());
                (given.value.span, message, "write it in quotes".to_string())
            })?;
            (Some(name), given.value.span)
        }
        (Kind::String(id) | Kind::Name(id), None) if ["loss", "optimizer", "scheduler"].contains(&key) => {
            let plugin = Value { kind: Kind::String(id.clone()), span: item.span };
            let field = Field { name: "plugin".to_string(), name_span: item.span, value: plugin };
            value.kind = Kind::Struct(None, vec![field]);
            (Some(id.clone()), item.span)
        }
        (Kind::Struct(None, fields), None) => {
            let plugin = fields.iter().find(|field| field.name == "plugin").and_then(|field| text(&field.value));
            (plugin, item.span)
        }
        (Kind::Int(seed), None) if key == SEED => (Some(format!("s{seed}")), item.span),
        (Kind::Name(name), None) => (Some(name.to_lowercase()), item.span),
        _ => (None, item.span),
    };
    let hint = || "give it a name for its folder and its row of the table: (name: \"..\", ..)".to_string();
    let name = name.ok_or_else(|| {
        (at, format!("expected a value with a `name` or a `plugin`, got {}", item.describe()), hint())
    })?;
    let sound = |c: char| c.is_ascii_alphanumeric() || "._+-".contains(c);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(sound) {
        let message = format!("expected a name of letters, digits and `._+-` that can be a folder's, got {name:?}");
        return Err((at, message, hint()));
    }
    Ok(Choice { name, value })
}

/// The recipes of all combinations, with the overrides `sets`.
fn cells(tree: &Tree, axes: &[Choices], sets: &[String]) -> Result<Grid, RecipeErrors> {
    let count: usize = axes.iter().map(|axis| axis.choices.len()).product();
    let mut errors: Vec<RecipeError> = Vec::new();
    let mut cells: Vec<Cell> = Vec::with_capacity(count);
    for number in 0..count {
        let mut stride = count;
        let mut tree = tree.clone();
        let mut values = Vec::with_capacity(axes.len());
        for axis in axes {
            stride /= axis.choices.len();
            let choice = &axis.choices[number / stride % axis.choices.len()];
            let field = Field { name: axis.key.clone(), name_span: axis.key_span, value: choice.value.clone() };
            let over = Value { kind: Kind::Struct(None, vec![field]), span: tree.root.span };
            tree.root = merge(tree.root, over);
            values.push(choice.name.clone());
        }
        let name = values.join("_");
        if cells.iter().any(|cell| cell.name == name) {
            errors.push(RecipeError {
                location: axes.last().and_then(|axis| locate(&tree.sources, axis.key_span)),
                path: "grid".to_string(),
                message: format!("two combinations are called `{name}`"),
                hint: Some("give values names that do not read the same when `_` joins them".to_string()),
            });
        }
        match Recipe::from_tree(tree, sets) {
            Ok(recipe) => cells.push(Cell { name, values, recipe }),
            // Most of what is wrong with one cell is wrong with others too.
            Err(found) => {
                let known = errors.clone();
                errors.extend(found.into_iter().filter(|error| !known.contains(error)));
            }
        }
    }
    if !errors.is_empty() {
        return Err(sorted(errors, &tree.sources));
    }
    let names = |axis: &Choices| axis.choices.iter().map(|choice| choice.name.clone()).collect();
    let axes = axes.iter().map(|axis| Axis { key: axis.key.clone(), names: names(axis) }).collect();
    Ok(Grid { axes, cells })
}
