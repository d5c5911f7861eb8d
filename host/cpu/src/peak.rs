//! What this machine can do at most, measured with the backend's own memory and kernels: what their shares are of.

use crate::memory::Buffer;
use clip_host_cpu_kernels::peak::fastest;
use clip_host_cpu_kernels::{Elements, ElementsMut, Gemm, ThreadPool, copy_strided, gemm};
use std::sync::Mutex;
use std::time::Duration;

/// Sides of the matrices whose product is timed: one fits into caches, the other amortises all that is not products.
const SIDES: [usize; 2] = [1024, 2048];
/// Elements copied: 256 MB. The last cache of a large server holds some of it, as it holds some of a model.
const COPIED: usize = 64 << 20;

/// The limits of a machine with a number of threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    pub threads: usize,
    /// 10⁹ multiplications and additions a second in a large product of f32 matrices.
    pub gemm_f32: f64,
    /// The same with bf16 operands and results, summed in f32.
    pub gemm_bf16: f64,
    /// 10⁹ bytes a second in a copy of memory, bytes read plus bytes written.
    pub copy: f64,
}

impl Peaks {
    /// Measures each limit for about `budget`, and takes the fastest run.
    pub fn measure(pool: &ThreadPool, budget: Duration) -> Peaks {
        let gemm_f32 = best_product(budget, |g, a, c| {
            gemm(pool, g, Elements::F32(a.as_slice()), Elements::F32(a.as_slice()), ElementsMut::F32(c.as_mut_slice()));
        });
        let gemm_bf16 = best_product(budget, |g, a, c| {
            let (a, c) = (&a.as_bf16()[..g.m * g.k], &mut c.as_mut_bf16()[..g.m * g.n]);
            gemm(pool, g, Elements::Bf16(a), Elements::Bf16(a), ElementsMut::Bf16(c));
        });
        let seconds = best_copy(pool, budget);
        let copy = (2 * COPIED * size_of::<f32>()) as f64 / seconds / 1e9;
        Peaks { threads: pool.threads(), gemm_f32, gemm_bf16, copy }
    }

    /// The limit of products whose operands are kept as `element`, in 10⁹ operations a second.
    pub fn gemm(&self, bf16: bool) -> f64 {
        if bf16 { self.gemm_bf16 } else { self.gemm_f32 }
    }
}

/// Seconds of the fastest copy of [`COPIED`] elements: by the backend's kernel, or by the system's `memcpy`, which may
/// write past the caches.
fn best_copy(pool: &ThreadPool, budget: Duration) -> f64 {
    let (mut from, mut to) = (Buffer::new(COPIED), Buffer::new(COPIED));
    // Untouched memory is one page of zeros.
    from.as_mut_slice().fill(1.0);
    let kernel = fastest(budget / 2, || {
        let (from, to) = (Elements::F32(from.as_slice()), ElementsMut::F32(to.as_mut_slice()));
        copy_strided(pool, &[COPIED], &[1], from, to);
    });
    let part = COPIED.div_ceil(pool.threads());
    let parts: Vec<_> = from.as_slice().chunks(part).zip(to.as_mut_slice().chunks_mut(part)).map(Mutex::new).collect();
    let system = fastest(budget / 2, || {
        pool.run(parts.len(), &|index, _| {
            // Nobody else takes this part: the lock is free and whole.
            if let Ok(mut part) = parts[index].lock() {
                let (from, to) = &mut *part;
                to.copy_from_slice(from);
            }
        });
    });
    kernel.min(system)
}

/// 10⁹ operations a second of the best size.
fn best_product(budget: Duration, product: impl Fn(&Gemm, &Buffer, &mut Buffer)) -> f64 {
    let rate = |side: usize| {
        let (mut operand, mut result) = (Buffer::new(side * side), Buffer::new(side * side));
        // Small integers, which as pairs of bf16 are finite too; untouched memory would be one page of zeros.
        operand.as_mut_slice().iter_mut().enumerate().for_each(|(at, value)| *value = (at % 17) as f32 - 8.0);
        let shape = Gemm::contiguous(side, side, side);
        let seconds = fastest(budget / SIDES.len() as u32, || product(&shape, &operand, &mut result));
        2.0 * (side as f64).powi(3) / seconds / 1e9
    };
    SIDES.into_iter().map(rate).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_positive() {
        let peaks = Peaks::measure(&ThreadPool::new(1), Duration::ZERO);
        assert_eq!(peaks.threads, 1);
        for limit in [peaks.gemm_f32, peaks.gemm_bf16, peaks.copy] {
            assert!(limit > 0.1 && limit.is_finite(), "{peaks:?}");
        }
        assert_eq!((peaks.gemm(false), peaks.gemm(true)), (peaks.gemm_f32, peaks.gemm_bf16));
    }
}
