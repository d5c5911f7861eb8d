//! One subcommand, one file.

pub mod bench;
pub mod check;
pub mod data;
pub mod eval;
pub mod grid;
mod grid_table;
pub mod luminal_cuda;
pub mod peak;
pub mod plan;
pub mod plugins;
pub mod plugins_check;
pub mod plugins_new;
pub mod replay;
pub mod run;
