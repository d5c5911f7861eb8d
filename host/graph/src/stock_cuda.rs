//! luminal's stock CUDA compiler (`luminal_cuda`) over a program written out in luminal's primitives: what the fused plan is
//! compared with on a GPU.
//!
//! Feature `luminal-cuda`. It links CUDA's libraries, so a build needs a CUDA toolkit (`CUDA_PATH`), and what is built
//! starts only where the driver's `libcuda` is; feature `ci-check` compiles it without a toolkit, but cannot link it.
//!
//! What it is: `luminal_cuda` 0.2 compiles every primitive to one kernel, finds products of matrices for cuBLAS
//! (`[m, k] × [k, n]`; a product of two batched operands stays a multiplication and a sum), and allocates every result
//! anew. Its kernels index with 32 bits, so that no tensor may have 2³¹ elements, and it reads `cuda_fp16.h` from
//! `/usr/local/cuda/include`.

use crate::oracle::{OracleError, Primitives, lower};
use crate::program::Program;
use luminal::graph::NodeIndex;
use luminal::op::Function;
use luminal_cuda::CudaCompiler;
use luminal_cudarc::driver::CudaDevice;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Why a program could not be compiled or run by `luminal_cuda`.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum StockError {
    #[error(
        "luminal_cuda: expected a CUDA device 0, got {0} (hint: `nvidia-smi` shows what the driver sees; without a GPU \
         leave the feature `luminal-cuda` out)"
    )]
    Device(String),
    #[error("luminal_cuda: {what} failed: {got} (hint: it looks for headers in /usr/local/cuda/include)")]
    Failed { what: &'static str, got: String },
    #[error(transparent)]
    Program(#[from] OracleError),
}

/// A program compiled by `luminal_cuda` for device 0, in f32, with all that it is given on the device.
pub struct StockCuda {
    primitives: Primitives,
    device: Arc<CudaDevice>,
    compile_time: Duration,
}

impl StockCuda {
    /// Writes a program out in primitives and compiles it; `inputs` holds inputs, parameters and states by name, integers
    /// as floats. Random numbers are those of seed 0.
    ///
    /// # Errors
    /// [`StockError::Device`] without a GPU, [`StockError::Failed`] with what luminal_cuda said,
    /// [`StockError::Program`] if `inputs` do not fit.
    pub fn compile(program: &Program, inputs: &HashMap<String, Vec<f32>>) -> Result<StockCuda, StockError> {
        let device = guarded("opening the device", || CudaDevice::new(0))?
            .map_err(|error| StockError::Device(format!("{error:?}")))?;
        let mut primitives = lower(program, inputs)?;
        let start = Instant::now();
        let Primitives { graph, outputs } = &mut primitives;
        graph.retrieve_tensors(outputs.iter().map(|o| o.1).collect::<Vec<_>>());
        let ids: Vec<&mut NodeIndex> = outputs.iter_mut().map(|o| &mut o.1).collect();
        guarded("compiling", || graph.compile(CudaCompiler::<f32>::default(), ids))?;
        // What is given goes to the device once, in the first run: each such node has one reader, its copy.
        let is_data = |id: &NodeIndex| graph.graph.node_weight(*id).is_some_and(|op| op.as_any().is::<Function>());
        let data: Vec<NodeIndex> = graph.graph.node_indices().filter(is_data).collect();
        let copies = data.iter().flat_map(|&id| graph.graph.neighbors(id));
        let copies: Vec<NodeIndex> = copies.filter(|&id| graph.get_sources(id).len() == 1).collect();
        graph.no_delete.extend(data.into_iter().chain(copies));
        Ok(StockCuda { primitives, device, compile_time: start.elapsed() })
    }

    /// How long luminal_cuda took to compile.
    pub fn compile_time(&self) -> Duration {
        self.compile_time
    }

    /// Computes everything once, to the outputs' arrival in the host's memory. The first run also copies what is given to
    /// the device.
    ///
    /// # Errors
    /// [`StockError::Failed`] with what luminal_cuda said: no memory left, say.
    pub fn run(&mut self) -> Result<Duration, StockError> {
        let start = Instant::now();
        let Primitives { graph, outputs } = &mut self.primitives;
        // What is there is not computed again.
        graph.drop_tensors(outputs.iter().map(|o| o.1).collect::<Vec<_>>());
        guarded("running", || graph.execute())?;
        guarded("waiting for the device", || self.device.synchronize())?
            .map_err(|error| StockError::Failed { what: "waiting for the device", got: format!("{error:?}") })?;
        Ok(start.elapsed())
    }

    /// The outputs of the last run, by name.
    pub fn results(&self) -> Result<Vec<(String, Vec<f32>)>, StockError> {
        Ok(self.primitives.results()?)
    }
}

/// luminal_cuda tells of errors by panics.
fn guarded<T>(what: &'static str, f: impl FnOnce() -> T) -> Result<T, StockError> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        StockError::Failed { what, got: text.unwrap_or("a panic without a message").to_string() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_its_text() {
        let error = guarded("compiling", || -> u8 { panic!("no {}", "kernel") }).unwrap_err().to_string();
        assert!(error.starts_with("luminal_cuda: compiling failed: no kernel"), "{error}");
        assert_eq!(guarded("compiling", || 3), Ok(3));
    }
}
