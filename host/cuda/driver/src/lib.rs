//! CUDA for the host: a GPU's memory, queues, kernels and graphs ([`Device`]), the compiler for kernels
//! ([`compile`]), products by cuBLASLt and convolutions by cuDNN.
//!
//! # What is loaded, and from where
//!
//! Nothing of CUDA is linked: this crate builds, and its tests pass, on a machine that has none of it. A library is
//! loaded when it is first needed, once for the process, and a missing one is an error that names it and every place
//! that was looked in ([`CudaError::Library`]).
//!
//! | library | for | comes with |
//! | --- | --- | --- |
//! | `libcuda.so.1` | [`Device`]: anything that runs | NVIDIA's driver |
//! | `libnvrtc.so.13`, `.12` | [`compile`]: CUDA C to machine code; needs no GPU | CUDA, or the Python wheel `nvidia-cuda-nvrtc` |
//! | `libcublasLt.so.13`, `.12` | [`blas`]: matrix products | CUDA, or the Python wheel `nvidia-cublas` |
//! | `libcudnn.so.9` | [`dnn`]: convolutions | cuDNN, or the Python wheels `nvidia-cudnn-cu13`, `-cu12` |
//!
//! The places, in this order:
//!
//! 1. the folders in the variable `CLIP_HOST_CUDA_PATH` (separated by colons): a folder with the library itself, a CUDA
//!    installation (`lib64`, `lib`), a Python environment or its `site-packages` (`nvidia/*/lib`);
//! 2. the loader's own path (`LD_LIBRARY_PATH`, the system's cache);
//! 3. `CUDA_HOME`, `CUDA_PATH`, `VIRTUAL_ENV`, `CONDA_PREFIX`, `~/.local`, `/usr/local/cuda`, `/usr/local/cuda-*`, `/opt/cuda`,
//!    `/usr/local`, `/usr`, searched as those of the variable are.
//!
//! Where several versions are found in one place, the one of the driver's major version is taken. Only functions that
//! CUDA 12 and 13 both have are used. The functions are declared in this crate rather than taken from a crate of
//! bindings: those find libraries by name on the loader's path only and panic where there is none.
//!
//! # Safety
//!
//! Addresses are plain numbers, as kernels take them. Whatever this crate itself reads or writes on the device is checked
//! against the device memory that is allocated, and a [`Graph`] keeps alive what existed when it was captured.
//! [`Device::launch`] alone is `unsafe`: what a kernel does with its arguments cannot be known here.
//!
//! Any thread may use a [`Device`]; calls on one queue are carried out in the order in which they are made.

#![warn(clippy::undocumented_unsafe_blocks, missing_docs, missing_debug_implementations)]

pub mod blas;
pub mod compile;
mod device;
pub mod dnn;
mod driver;
mod element;
mod error;
mod library;
mod memory;
mod module;

pub use device::{Device, Event, Graph, Queue};
pub use element::{Compute, Element};
pub use error::CudaError;
pub use memory::{DeviceMemory, Pinned};
pub use module::{Function, Module};
