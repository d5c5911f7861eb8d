//! Evaluation of embeddings: retrieval between images and captions, and zero-shot classification.
//!
//! - [`retrieval`]: ranks and recall in both directions, any number of captions per image, in memory that grows with the
//!   number of rows, never with their product.
//! - [`zeroshot`]: class weights from prompt templates, and top-k accuracy.
//! - [`embedding`]: what both share, rows of unit length.
//!
//! Everything here is exact counting over f32 similarities; results are the same for any number of threads.

pub mod embedding;
pub mod error;
pub mod retrieval;
pub mod zeroshot;

pub use error::EvalError;
pub use retrieval::{Direction, Retrieval, retrieval};
