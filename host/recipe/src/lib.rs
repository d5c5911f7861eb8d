//! Recipes: one RON file says everything about a run.
//!
//! ```text
//! file ──▶ parse ──▶ include ──▶ values that know their place ──▶ --set overrides ──▶ typed sections ──▶ Recipe
//! ```
//!
//! - [`Recipe::load`] reads a file and applies overrides; it reports *all* that is wrong, each with line, column, key
//!   path, and the nearest valid name.
//! - `include: "base.ron"` takes another recipe's settings for all that a recipe does not say itself (`include.rs`).
//! - [`Grid::load`] reads a recipe with a `grid`: a recipe for each combination of its values.
//! - Sections that others define (`data`, each plugin's `config`) are kept as values with places: [`Recipe::section`]
//!   reads one as any serde type, [`Recipe::error_at`] shows a plugin's complaint where the setting is written.
//! - [`Recipe::to_ron`] writes the resolved recipe into the run folder.
//!
//! Why not the `ron` crate alone: its typed reader stops at the first error and knows the place of the reader's cursor,
//! not of the key or value that is wrong; its `ron::Value` keeps neither places nor the names of enum variants
//! (`Tar("..")` becomes a plain value), so that a section cannot be read later by the crate that owns it, and overrides
//! cannot be merged into it. The reader here accepts the same texts (the tests hold it to `ron`'s results), and
//! leniently what `ron` has extensions for: implicit `Some`, unwrapped newtypes. It refuses byte strings.

mod de;
mod diff;
mod encoder;
mod error;
mod grid;
mod include;
mod optimizer;
mod parse;
mod range;
mod recipe;
mod sections;
mod set;
mod span;
mod value;
mod write;

pub use diff::Difference;
pub use encoder::Encoder;
pub use error::{RecipeError, RecipeErrors, name_hint, nearest};
pub use grid::{Axis, Cell, Grid};
pub use optimizer::{Optimizer, ParamGroup, matches_pattern};
pub use recipe::{Part, Recipe};
pub use sections::{Backend, Dtype, Eval, GradScaler, Model, PluginChoice, Plugins, Precision, Train};
pub use span::{KeyPath, Location, Segment, Source, Span};
pub use value::{Field, Kind, Value};
