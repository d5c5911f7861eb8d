//! The CUDA backend: the kernel IR that the CPU runs tile by tile, rendered as CUDA C, over the plan's own arena.
//!
//! [`schedule`](schedule::schedule) turns a plan into launches, [`verify`](verify::verify) holds them against the plan,
//! [`Executor`] runs them on a [`Machine`]: a GPU, or in tests an emulator that compiles the same text for the host.

pub mod executor;
pub mod gpu;
pub mod launch;
pub mod library;
pub mod machine;
pub mod peak;
pub mod render;
pub mod schedule;
pub mod verify;

pub use executor::{ExecuteError, Executor, Store};
pub use library::{Libraries, Rendered};
pub use machine::{Machine, MachineError};
