//! What the kernel tests share: random numbers, comparisons, and every pool to run on.
#![allow(dead_code)]

use clip_host_cpu_kernels::{Elements, ElementsMut, Isa, ThreadPool, bf16};

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

/// An element type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    F32,
    Bf16,
}

impl Kind {
    /// The value as it is stored.
    pub fn stored(self, value: f32) -> f32 {
        match self {
            Kind::F32 => value,
            Kind::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// The values as they are stored.
    pub fn all(self, values: &[f32]) -> Vec<f32> {
        values.iter().map(|&value| self.stored(value)).collect()
    }
}

/// A tensor of either type.
pub struct Tensor {
    kind: Kind,
    wide: Vec<f32>,
    half: Vec<bf16>,
}

impl Tensor {
    pub fn new(kind: Kind, values: &[f32]) -> Self {
        let half =
            if kind == Kind::Bf16 { values.iter().map(|&value| bf16::from_f32(value)).collect() } else { vec![] };
        Tensor { kind, wide: values.to_vec(), half }
    }

    pub fn get(&self) -> Elements<'_> {
        match self.kind {
            Kind::F32 => Elements::F32(&self.wide),
            Kind::Bf16 => Elements::Bf16(&self.half),
        }
    }

    pub fn get_mut(&mut self) -> ElementsMut<'_> {
        match self.kind {
            Kind::F32 => ElementsMut::F32(&mut self.wide),
            Kind::Bf16 => ElementsMut::Bf16(&mut self.half),
        }
    }

    pub fn values(self) -> Vec<f32> {
        match self.kind {
            Kind::F32 => self.wide,
            Kind::Bf16 => self.half.iter().map(|value| value.to_f32()).collect(),
        }
    }
}

/// Operands and result of a product: all f32, all bf16, and the mixtures that mixed precision has.
pub const KINDS: [(Kind, Kind, Kind); 6] = [
    (Kind::F32, Kind::F32, Kind::F32),
    (Kind::Bf16, Kind::Bf16, Kind::Bf16),
    (Kind::Bf16, Kind::Bf16, Kind::F32),
    (Kind::Bf16, Kind::F32, Kind::Bf16),
    (Kind::F32, Kind::Bf16, Kind::F32),
    (Kind::F32, Kind::F32, Kind::Bf16),
];

/// What operands of a product count as: bf16 if one of them is.
pub fn operands(a: Kind, b: Kind) -> Kind {
    if a == Kind::Bf16 || b == Kind::Bf16 { Kind::Bf16 } else { Kind::F32 }
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

/// As [`assert_close`], with the rounding of the result's type.
pub fn assert_close_as(kind: Kind, what: &str, got: &[f32], expected: &[f64], scale: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (*got as f64 - expected).abs();
        // Half a unit in the last of eight places, and what the sum may be off by.
        let rounding = if kind == Kind::Bf16 { expected.abs() / 256.0 } else { 0.0 };
        let bound = 3.1e-6 * scale + rounding;
        assert!(error <= bound, "{what}: element {at} is {got}, expected {expected}, error {error:e}");
    }
}

/// Compares with a sum in double precision; `scale` is the size of the sum of absolute values.
pub fn assert_close(what: &str, got: &[f32], expected: &[f64], scale: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (*got as f64 - expected).abs();
        assert!(error <= 3e-6 * scale, "{what}: element {at} is {got}, expected {expected}, error {error:e}");
    }
}

/// Means and population variances of columns, in two passes and double precision.
pub fn exact_moments(values: &[f32], cols: usize) -> (Vec<f64>, Vec<f64>) {
    let rows = (values.len() / cols).max(1) as f64;
    let (mut means, mut variances) = (vec![0.0; cols], vec![0.0; cols]);
    for (at, value) in values.iter().enumerate() {
        means[at % cols] += *value as f64 / rows;
    }
    for (at, value) in values.iter().enumerate() {
        variances[at % cols] += (*value as f64 - means[at % cols]).powi(2) / rows;
    }
    (means, variances)
}
