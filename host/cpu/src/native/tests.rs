//! Compiled loops against the interpreter's own, to the bit.

use super::*;
use crate::loops::loops;
use crate::math::Lane;
use crate::tape::Arg;
use clip_host_plugin_api::ir::{Binary, Compare, Unary};

/// Compiles a body that reads pointer 0, and pointer 1, in full and writes pointer 2; runs it over the columns of rows.
fn run(body: impl for<'r> Fn(Recorded<'r>, Recorded<'r>) -> Recorded<'r>, a: &[f32], b: &[f32], rows: usize) -> Vec<f32> {
    let recorder = Recorder::default();
    let value = body(recorder.value(Operation::Full(0)), recorder.value(Operation::Full(1))).id();
    let outputs = [Output { sink: Sink::Full, pointer: 2, value }];
    let code = Loop::new(&recorder.finish(), &outputs, &[true, true, true]).expect("compiles");
    let mut out = vec![7.0f32; a.len() + 16];
    let pointers = [std::ptr::null(), a.as_ptr().cast(), b.as_ptr().cast(), out.as_mut_ptr().cast_const().cast()];
    // SAFETY: all three have `a.len()` elements, of which the rows are a part.
    unsafe { code.run(&pointers, a.len() / rows, rows) };
    assert!(out[a.len()..].iter().all(|&v| v == 7.0), "nothing is written behind the end");
    out.truncate(a.len());
    out
}

fn same(got: &[f32], expected: &[f32], what: &str) {
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(g.to_bits() == e.to_bits() || g.is_nan() && e.is_nan(), "{what} [{i}]: {g:e}, expected {e:e}");
    }
}

/// Ordinary numbers of all sizes, and the special ones.
fn numbers(seed: u32, n: usize) -> Vec<f32> {
    let special = [0.0, -0.0, 1.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, -1e-40, f32::MAX, 0.625];
    let mut bits = seed;
    (0..n)
        .map(|i| {
            bits = bits.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            match i % 5 {
                0 => special[(bits >> 8) as usize % special.len()],
                1 => f32::from_bits(bits),
                _ => ((bits >> 8) as f32 / 65536.0 - 128.0) * [0.01, 0.1, 1.0][i % 3],
            }
        })
        .collect()
}

#[test]
fn every_operation_gives_the_interpreters_bits() {
    if !is_supported(Isa::detect()) {
        eprintln!("skipped: no AVX-512 here");
        return;
    }
    let l = loops(Isa::Portable);
    // Whole vectors, a part of one, less than one.
    for (n, rows) in [(1600, 1), (777, 7), (90, 30), (5, 1), (31 * 24, 31)] {
        let (a, b) = (numbers(1, n), numbers(2, n));
        let mut out = vec![0.0; n];
        for op in [Unary::Neg, Unary::Exp, Unary::Ln, Unary::Sqrt, Unary::Recip, Unary::Tanh, Unary::Erf, Unary::Abs] {
            // SAFETY: both have n elements.
            unsafe { (l.unary)(op, Arg::Vector(a.as_ptr()), out.as_mut_ptr(), n) };
            same(&run(|x, _| x.unary(op).unwrap(), &a, &b, rows), &out, &format!("{op:?}"));
        }
        let binary =
            [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Maximum, Binary::Minimum];
        for op in binary {
            // SAFETY: all have n elements.
            unsafe { (l.binary)(op, Arg::Vector(a.as_ptr()), Arg::Vector(b.as_ptr()), out.as_mut_ptr(), n) };
            same(&run(|x, y| x.binary(op, y).unwrap(), &a, &b, rows), &out, &format!("{op:?}"));
        }
        for op in [Compare::Lt, Compare::Le, Compare::Eq] {
            // SAFETY: all have n elements.
            unsafe { (l.compare)(op, Arg::Vector(a.as_ptr()), Arg::Vector(b.as_ptr()), out.as_mut_ptr(), n) };
            let got = run(|x, y| x.compare(op, y, x.constant(1.0), x.constant(0.0)), &a, &b, rows);
            same(&got, &out, &format!("{op:?}"));
        }
    }
}
