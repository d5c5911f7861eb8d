//! Everything that a clip-host plugin depends on.
//!
//! A plugin is a `cdylib` crate that describes computation. It never touches a tensor: asked to build, it writes its
//! formula with [`graph::Graph`] and [`graph::Tensor`], and the host differentiates, fuses and runs it. A whole loss:
//!
//! ```
//! use clip_host_plugin_api::prelude::*;
//!
//! /// Settings, as the recipe's `config: (…)` gives them.
//! #[derive(Serialize, Deserialize, JsonSchema)]
//! #[serde(crate = "serde", default, deny_unknown_fields)]
//! pub struct PlainConfig {
//!     /// Divides the similarities.
//!     #[schemars(range(min = 0.001, max = 1.0))]
//!     pub temperature: f64,
//! }
//!
//! impl Default for PlainConfig {
//!     fn default() -> Self {
//!         PlainConfig { temperature: 0.07 }
//!     }
//! }
//!
//! pub struct Plain;
//!
//! impl Plugin for Plain {
//!     type Config = PlainConfig;
//!     const ID: &'static str = "plain";
//!     const DOC: &'static str = "Cross-entropy from image to text.";
//! }
//!
//! impl Loss for Plain {
//!     fn build<'g>(config: &PlainConfig, _: &'g Graph, inputs: &LossInputs<'g>) -> Result<Tensor<'g>, BuildError> {
//!         let logits = inputs.image_features.matmul(inputs.text_features.t()) / config.temperature;
//!         Ok(logits.cross_entropy_diagonal())
//!     }
//! }
//!
//! export_plugin!(loss, Plain);
//! ```
//!
//! `crate = "serde"` lets the derive find serde through the prelude, so that a plugin's crate has one dependency, this one.
//!
//! The contract, on one page: [`loss::Loss`], [`optimizer::Optimizer`], [`encoder::Encoder`] and
//! [`scheduler::Scheduler`] are what a plugin implements; [`describe`] is what it says of itself; [`ir`] is what crosses
//! the boundary; [`abi`] is the boundary, and what its version means; [`testing`] checks a plugin in its own tests.
//!
//! # From nothing to a model trained with a loss of your own
//!
//! All that is needed is Rust 1.89 or newer, a C linker and clip-host's sources. Build the host, once; that takes some
//! minutes, the rest a few seconds each. In the folder of the sources:
//!
//! ```text
//! cargo build --release
//! export PATH=$PWD/target/release:$PATH
//! ```
//!
//! Make a crate for the loss, wherever you like. It is whole: it has a formula, settings and tests, and builds as it is.
//!
//! ```text
//! clip-host plugins new loss my_loss --out ../my_loss
//! cd ../my_loss
//! cargo test --release
//! ```
//!
//! Make it yours, in `src/lib.rs`. Here every pair is to win by a margin, as in AM-Softmax (Wang et al. 2018,
//! arXiv:1801.05599): a setting,
//!
//! ```text
//!     /// By how much a pair's similarity must exceed the others.
//!     #[schemars(range(min = 0.0, max = 1.0))]
//!     pub margin: f64,
//! ```
//!
//! its default, `margin: 0.1,`, in the braces of `fn default`, and the formula's line for `logits`:
//!
//! ```text
//!         let logits = (similarity - graph.eye(inputs.batch) * config.margin) / config.temperature;
//! ```
//!
//! `cargo test --release` now says two things: the gradient is still that of finite differences, and three pairs that
//! cannot be told apart no longer cost ln 3, because of the margin: give that test's harness
//! `&MyLossConfig { margin: 0.0, ..Default::default() }`. Then build the library, and train with it where the recipe's
//! data is:
//!
//! ```text
//! cargo build --release
//! export CLIP_HOST_PLUGIN_PATH=$PWD/target/release
//! cd -
//! clip-host run recipes/isogclr_radam.ron --epochs 2 --set 'loss=(plugin: "my_loss", config: (margin: 0.2))'
//! ```
//!
//! The last lines are retrieval on held-out pairs and the run's folder, with curves in `report.html` and the weights in
//! checkpoints. A misspelt setting or one out of range is refused with its place and what would be right;
//! `clip-host plugins inspect my_loss` shows them all, and `clip-host plugins check FILE` tries the library out. After
//! another change of the formula, `cargo build --release` in its crate is all; the host stays as it was built.
//!
//! `plugins new` makes optimizers, encoders and schedulers as well, and each crate's README says what its kind works
//! with. What a formula keeps from step to step is a [`graph::Graph::state`], what it learns a [`graph::Graph::param`],
//! what goes to the log a [`graph::Graph::metric`]; [`global`] has what losses over the whole data set keep. The plugins
//! that come with clip-host, one folder each in `plugins`, are examples to copy from.

pub use abi_stable;
pub use clip_host_plugin_abi as abi;
pub use schemars;
pub use serde;
pub use serde_json;

pub mod decompose;
pub mod describe;
pub mod encoder;
pub mod export;
pub mod global;
pub mod gradient;
pub mod graph;
pub mod interpret;
pub mod ir;
pub mod loss;
pub mod optimizer;
pub mod scheduler;
pub mod shape;
pub mod testing;

/// What a plugin's source imports.
pub mod prelude {
    pub use crate::describe::Plugin;
    pub use crate::encoder::{Encoder, EncoderInputs, Modality};
    pub use crate::export::log;
    pub use crate::export_plugin;
    pub use crate::graph::{BuildError, Graph, Tensor};
    pub use crate::ir::{Conv, DType, Init, Layout, Pool};
    pub use crate::loss::{Loss, LossInputs};
    pub use crate::optimizer::{Optimizer, ParamInfo, ParamUpdate};
    pub use crate::scheduler::{Progress, Scheduler};
    pub use schemars::JsonSchema;
    pub use serde::{Deserialize, Serialize};
    // For the code that the derives of settings write: with `#[serde(crate = "serde")]` on them, and these names in scope,
    // a plugin's crate depends on this one only.
    pub use {schemars, serde};
}
