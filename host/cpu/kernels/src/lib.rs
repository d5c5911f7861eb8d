//! Kernels of the CPU backend for f32 and bf16, over raw slices: no graph types, no allocation once warm.
//!
//! One kernel family is one file. All of them take a [`ThreadPool`], which carries the worker threads, their scratch
//! memory and the instruction set in use ([`Isa`]). **Every kernel gives the same bits for any number of threads**:
//! sums are taken in an order fixed by the shapes alone. Different instruction sets may differ in the last bits,
//! because fused multiply-add rounds once and a separate multiply and add round twice.
//!
//! | file | contents |
//! |---|---|
//! | `threads` | worker threads, scratch memory, disjoint writes |
//! | `elements` | element types, and tensors of any of them |
//! | `convert` | conversions between them |
//! | `isa` | run-time choice of the instruction set |
//! | `microkernel` | register tiles of the matrix multiplication, transposes for packing |
//! | `blocked` | the blocked multiplication shared by matmul and convolution |
//! | `gemm` | batched, strided matrix multiplication |
//! | `patches` | windows over images as operands |
//! | `conv` | 2-D convolution, NHWC, as implicit matrix multiplication |
//! | `winograd`, `winograd_*` | 3x3 convolution with fewer products |
//! | `depthwise` | direct convolution for one channel per group |
//! | `pool2d` | max and average pooling |
//! | `gather` | row gather, scatter-add, scatter-assign |
//! | `moments` | mean and variance of columns |
//! | `copy` | strided copies and transposes |
//! | `peak` | what this machine can do at most |
//!
//! Activations are NHWC; convolution weights keep PyTorch's `[out, in / groups, height, width]`.
//!
//! Shapes are the caller's invariant: kernels check the largest offset of every operand once at entry and panic with
//! the two sizes when a slice is too short, so that no input can make them read or write out of bounds. Values that
//! come from data (row ids) are checked too, and answered with a typed error.

mod blocked;
pub mod conv;
mod convert;
pub mod copy;
mod depthwise;
pub mod elements;
mod few_channels;
pub mod gather;
pub mod gemm;
pub mod isa;
mod microkernel;
pub mod moments;
mod patches;
pub mod peak;
pub mod pool2d;
pub mod threads;
mod winograd;
mod winograd_product;
#[cfg(test)]
mod winograd_tests;
mod winograd_transform;
mod winograd_vector;
mod winograd_weight_grad;

pub use conv::{ConvShape, conv2d_forward, conv2d_input_grad, conv2d_weight_grad};
pub use copy::{copy_strided, fill, place_block};
pub use elements::{Elements, ElementsMut, bf16, f16};
pub use gather::{RowError, gather_rows, scatter_add_rows, scatter_rows};
pub use gemm::{Gemm, gemm};
pub use isa::Isa;
pub use moments::column_moments;
pub use pool2d::{Pool2dShape, avg_pool2d_backward, avg_pool2d_forward, max_pool2d_backward, max_pool2d_forward};
pub use threads::{SharedMut, ThreadPool};
