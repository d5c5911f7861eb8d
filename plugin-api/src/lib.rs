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
//! #[serde(default, deny_unknown_fields)]
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
//! The contract, on one page: [`loss::Loss`], [`optimizer::Optimizer`], [`encoder::Encoder`] and
//! [`scheduler::Scheduler`] are what a plugin implements; [`describe`] is what it says of itself; [`ir`] is what crosses
//! the boundary; [`abi`] is the boundary; [`testing`] checks a plugin in its own tests.

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
