//! What this machine can do at most, as a yardstick for the kernels.

use std::time::{Duration, Instant};

use crate::copy::copy_strided;
use crate::elements::{Elements, ElementsMut};
use crate::gemm::{Gemm, gemm};
use crate::threads::ThreadPool;

/// Measured limits of a machine with a given pool.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Multiplications and additions per second of a large matrix product, in units of 10^9.
    pub gemm_gflops: f64,
    /// Bytes copied per second, in units of 10^9; each byte copied is counted once.
    pub copy_gbytes: f64,
}

/// Measures both limits for about `budget` each, and reports the fastest run.
pub fn measure(pool: &ThreadPool, budget: Duration) -> Peak {
    let size = 1024;
    let a: Vec<f32> = (0..size * size).map(|at| (at % 17) as f32 - 8.0).collect();
    let mut c = vec![0f32; size * size];
    let g = Gemm::contiguous(size, size, size);
    let seconds = fastest(budget, || gemm(pool, &g, Elements::F32(&a), Elements::F32(&a), ElementsMut::F32(&mut c)));
    let gemm_gflops = 2.0 * (size as f64).powi(3) / seconds / 1e9;

    // Far larger than any cache.
    let len = 32 << 20;
    let source = vec![1f32; len];
    let mut target = vec![0f32; len];
    let seconds = fastest(budget, || {
        copy_strided(pool, &[len], &[1], Elements::F32(&source), ElementsMut::F32(&mut target));
    });
    Peak { gemm_gflops, copy_gbytes: (len * size_of::<f32>()) as f64 / seconds / 1e9 }
}

/// Seconds of the fastest of at least three runs, after one to warm up.
pub fn fastest(budget: Duration, mut work: impl FnMut()) -> f64 {
    work();
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut runs = 0;
    while runs < 3 || start.elapsed() < budget {
        let begin = Instant::now();
        work();
        best = best.min(begin.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_positive() {
        let peak = measure(&ThreadPool::new(1), Duration::from_millis(1));
        assert!(peak.gemm_gflops > 0.1 && peak.gemm_gflops.is_finite(), "{peak:?}");
        assert!(peak.copy_gbytes > 0.1 && peak.copy_gbytes.is_finite(), "{peak:?}");
    }
}
