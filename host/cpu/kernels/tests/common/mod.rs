//! What the kernel tests share: random numbers, comparisons, and every pool to run on.
#![allow(dead_code)]

use clip_host_cpu_kernels::{Isa, ThreadPool};

/// A xorshift generator: the tests need variety, not quality.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        ((self.next() >> 33) as usize) % limit
    }

    /// One of the given values.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Values between -1 and 1.
    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }
}

/// The instruction sets that this machine can run.
pub fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect()).collect()
}

/// Runs a kernel on every instruction set and with one, two and three threads; the bits must not depend on the
/// threads. Returns the result per instruction set.
pub fn on_every_pool(mut kernel: impl FnMut(&ThreadPool) -> Vec<f32>) -> Vec<(Isa, Vec<f32>)> {
    isas()
        .into_iter()
        .map(|isa| {
            let results: Vec<Vec<f32>> = (1..=3).map(|threads| kernel(&ThreadPool::with_isa(threads, isa))).collect();
            for (index, result) in results.iter().enumerate().skip(1) {
                let same = result.iter().zip(&results[0]).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{isa:?}: {} threads give other bits than one", index + 1);
            }
            (isa, results.into_iter().next().unwrap())
        })
        .collect()
}

/// Compares with a sum in double precision; `scale` is the size of the sum of absolute values.
pub fn assert_close(what: &str, got: &[f32], expected: &[f64], scale: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (*got as f64 - expected).abs();
        assert!(error <= 3e-6 * scale, "{what}: element {at} is {got}, expected {expected}, error {error:e}");
    }
}
