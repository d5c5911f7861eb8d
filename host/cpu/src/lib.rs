//! The CPU backend: runs a compiled plan. Fused kernels are interpreted tile by tile over vectorised loops; products,
//! windows and tables have kernels of their own in `clip-host-cpu-kernels`.

pub mod executor;
mod fused;
mod loops;
mod math;
pub mod memory;
mod native;
mod pairs;
pub mod peak;
mod streams;
mod tape;
mod walk;

pub use clip_host_cpu_kernels::ThreadPool;
pub use executor::{ExecuteError, Executor, Store};
