//! The CPU backend: runs a compiled plan. Fused kernels run tile by tile: as machine code compiled for the kernel where there
//! is AVX-512 (`native`), else interpreted over vectorised loops (`tape`), with the same bits. Products, windows and tables
//! have kernels of their own in `clip-host-cpu-kernels`.

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
mod wide;

pub use clip_host_cpu_kernels::ThreadPool;
pub use executor::{ExecuteError, Executor, Store};
