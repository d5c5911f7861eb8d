//! From an assembled program to a plan: the ordered list of passes, fusion into kernels, schedule and memory.

pub mod cost;
pub mod decompose;
pub mod fuse;
pub mod kept;
pub mod kernel;
pub mod layout;
pub mod lower;
pub mod memory;
mod merge;
pub mod module;
pub mod moments;
pub mod plan;
pub mod precision;
pub mod simplify;
mod update;
pub mod view;
