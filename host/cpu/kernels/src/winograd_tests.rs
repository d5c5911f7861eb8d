//! Tests of what the public functions do not show: the choice, the maps, the vectors.

use crate::conv::ConvShape;
use crate::elements::{Element, bf16};
use crate::isa::Isa;
use crate::winograd::{Variant, choose};
use crate::winograd_transform::{Algorithm, F2, F4, Map};
use crate::winograd_vector::{Load, Plain, Rounded, Store, Vector, Work, with_vectors};

fn shape(batch: usize, size: usize, channels: usize) -> ConvShape {
    ConvShape {
        batch,
        in_h: size,
        in_w: size,
        in_c: channels,
        out_h: size,
        out_w: size,
        out_c: channels,
        kernel: (3, 3),
        stride: (1, 1),
        padding: (1, 1),
        dilation: (1, 1),
        groups: 1,
    }
}

#[test]
fn shapes_get_the_algorithm_that_was_faster() {
    for (batch, size, channels) in
        [(16, 56, 64), (16, 28, 128), (16, 14, 256), (16, 7, 512), (64, 16, 24), (64, 8, 48), (64, 4, 96)]
    {
        assert_eq!(choose(&shape(batch, size, channels)), Some(Variant::F4), "{size} px, {channels} channels");
    }
    assert_eq!(choose(&shape(64, 2, 192)), Some(Variant::F2));
    assert_eq!(choose(&shape(1, 14, 256)), Some(Variant::F2));
    // Kernels are worth a transform only where tiles enough use them, and tiles where channels enough do.
    assert_eq!(choose(&shape(1, 7, 512)), None);
    assert_eq!(choose(&shape(16, 56, 3)), None);
    let strided = ConvShape { stride: (2, 2), out_h: 28, out_w: 28, ..shape(16, 56, 64) };
    assert_eq!(choose(&strided), None);
    assert_eq!(choose(&ConvShape { groups: 2, ..shape(16, 56, 64) }), None);
    assert_eq!(choose(&ConvShape { dilation: (2, 2), padding: (2, 2), ..shape(16, 56, 64) }), None);
    assert_eq!(choose(&ConvShape { padding: (3, 3), out_h: 60, out_w: 60, ..shape(16, 56, 64) }), None);
    assert_eq!(choose(&shape(0, 56, 64)), None);
}

/// Lanes of different values, about one in size.
fn lanes(seed: usize) -> [f32; 8] {
    std::array::from_fn(|lane| ((seed * 8 + lane) * 7919 % 1000) as f32 / 500.0 - 1.0)
}

fn vectors<const N: usize>(seed: usize) -> ([Plain; N], [[f32; 8]; N]) {
    let values: [[f32; 8]; N] = std::array::from_fn(|at| lanes(10 * seed + at));
    // SAFETY: plain Rust needs no instruction set, and the lanes are as many as a vector has.
    (values.map(|lanes| unsafe { Plain::load(lanes.as_ptr()) }), values)
}

fn stored(vector: Plain) -> [f32; 8] {
    let mut lanes = [0.0; 8];
    // SAFETY: the lanes are as many as a vector has.
    unsafe { vector.store(lanes.as_mut_ptr()) };
    lanes
}

/// Elementwise product, by two sums that have it exactly.
fn product<const N: usize>(a: [Plain; N], b: [Plain; N]) -> [Plain; N] {
    // SAFETY: plain Rust needs no instruction set.
    let zero = unsafe { Plain::splat(0.0) };
    std::array::from_fn(|at| zero.plus(a[at], b[at]))
}

/// The maps along one axis, put together, are the correlations of the definition.
fn check_maps<A: Algorithm<SIDE, OUT>, const SIDE: usize, const OUT: usize>() {
    for seed in 0..20 {
        let (data, d) = vectors::<SIDE>(seed);
        let (kernel, g) = vectors::<3>(seed + 100);
        let (gradient, e) = vectors::<OUT>(seed + 200);
        let outputs = A::Output::map(product(A::Data::map(data), A::Kernel::map(kernel)));
        for (at, output) in outputs.into_iter().enumerate() {
            for (lane, got) in stored(output).into_iter().enumerate() {
                let expected: f64 = (0..3).map(|tap| d[at + tap][lane] as f64 * g[tap][lane] as f64).sum();
                assert!((got as f64 - expected).abs() < 5e-6, "output {at}: {got}, expected {expected}");
            }
        }
        let taps = A::KernelGradient::map(product(A::Data::map(data), A::Gradient::map(gradient)));
        for (tap, value) in taps.into_iter().enumerate() {
            for (lane, got) in stored(value).into_iter().enumerate() {
                let expected: f64 = (0..OUT).map(|at| d[at + tap][lane] as f64 * e[at][lane] as f64).sum();
                assert!((got as f64 - expected).abs() < 5e-6, "tap {tap}: {got}, expected {expected}");
            }
        }
    }
}

#[test]
fn maps_compose_to_correlations() {
    check_maps::<F2, 4, 2>();
    check_maps::<F4, 6, 4>();
}

/// Reads `count` values of each type and stores them as bf16.
struct Conversions<'a> {
    values: &'a [f32; 16],
    halves: &'a [bf16; 16],
    count: usize,
    from_f32: *mut bf16,
    from_half: *mut bf16,
    rounded: *mut f32,
}

impl Work for Conversions<'_> {
    // SAFETY: what the caller promises is with the trait; the destinations have 16 values.
    #[inline(always)]
    unsafe fn run<V: Vector>(&self) {
        let mut at = 0;
        while at < self.count {
            let count = V::LANES.min(self.count - at);
            // SAFETY: as above.
            unsafe {
                let values = self.values.as_ptr().add(at);
                bf16::store(<f32 as Load>::load::<V>(values, count), self.from_f32.add(at), count);
                bf16::store(bf16::load::<V>(self.halves.as_ptr().add(at), count), self.from_half.add(at), count);
                <f32 as Store>::store(Rounded::load::<V>(values.cast(), count), self.rounded.add(at), count);
            }
            at += V::LANES;
        }
    }
}

#[test]
fn conversions_of_all_vectors_round_to_nearest_even() {
    let ties = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -1.0 - 1.0 / 256.0, 1.0 + 1.01 / 256.0, f32::MAX, 1e-40];
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::from_bits(0x7f80_0001), 3.3, -7e-20];
    let mut values = [0.7; 16];
    values[..6].copy_from_slice(&ties);
    values[6..14].copy_from_slice(&special);
    let halves = values.map(bf16::narrow);
    for isa in Isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect()) {
        for count in 1..=16 {
            let (mut from_f32, mut from_half, mut rounded) = ([bf16::ONE; 16], [bf16::ONE; 16], [1f32; 16]);
            let work = Conversions {
                values: &values,
                halves: &halves,
                count,
                from_f32: from_f32.as_mut_ptr(),
                from_half: from_half.as_mut_ptr(),
                rounded: rounded.as_mut_ptr(),
            };
            // SAFETY: the instruction set was detected.
            unsafe { with_vectors(isa, &work) };
            for at in 0..16 {
                let expected = if at < count { halves[at] } else { bf16::ONE };
                assert_eq!(from_f32[at].to_bits(), expected.to_bits(), "{isa:?}: {} of {count}", values[at]);
                assert_eq!(from_half[at].to_bits(), expected.to_bits(), "{isa:?}: half {} of {count}", values[at]);
                assert_eq!(rounded[at].to_bits(), expected.widen().to_bits(), "{isa:?}: {} of {count}", values[at]);
            }
        }
    }
}
