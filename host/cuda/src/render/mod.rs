//! Kernels as CUDA C: one function for each distinct text, sizes and strides written into it.

mod fused;
pub mod moments;
pub mod own;
pub mod pool;
pub mod product;
mod text;

pub use fused::fused;
pub use text::Draft;

/// What every kernel's text stands on.
pub const PRELUDE: &str = include_str!("prelude.cuh");
