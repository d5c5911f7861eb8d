//! Compiled loops against the interpreter's own, to the bit.

use super::*;
use crate::loops::loops;
use crate::math::Lane;
use crate::tape::Arg;
use clip_host_cpu_kernels::bf16;
use clip_host_cpu_kernels::elements::narrowed;
use clip_host_plugin_api::ir::{Binary, Compare, Unary};

/// Compiles a body that reads pointer 0, and pointer 1, in full and writes pointer 2; runs it over the columns of rows.
fn run(
    body: impl for<'r> Fn(Recorded<'r>, Recorded<'r>) -> Recorded<'r>,
    a: &[f32],
    b: &[f32],
    rows: usize,
) -> Vec<f32> {
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
        let binary = [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Maximum, Binary::Minimum];
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

/// Every way to write a result, with more pointers than there are registers for them.
#[test]
fn every_sink_writes_its_own_memory_alone() {
    if !is_supported(Isa::detect()) {
        eprintln!("skipped: no AVX-512 here");
        return;
    }
    for (columns, rows) in [(64, 5), (16, 1), (48, 30), (30, 4), (7, 3)] {
        let n = columns * rows;
        let aligned = columns % 16 == 0;
        let recorder = Recorder::default();
        let x = recorder.value(Operation::Full(0));
        let half = recorder.value(Operation::Half(1)).widened();
        let by = [Operation::Column(2), Operation::Row(3), Operation::Scalar(4)].map(|o| recorder.value(o));
        let value = (x + half) * by[0] - by[1] / by[2];
        let bits = value.narrowed().id();
        let sinks = [Sink::Full, Sink::Stream, Sink::Half, Sink::StreamHalf, Sink::AddToColumn, Sink::AddToColumn];
        let outputs = sinks.map(|sink| match sink {
            // Lines past the caches begin where a vector does.
            Sink::Stream if !aligned => Sink::Full,
            Sink::StreamHalf if !aligned => Sink::Half,
            sink => sink,
        });
        let outputs: Vec<Output> = outputs
            .into_iter()
            .enumerate()
            .map(|(i, sink)| {
                let value = if matches!(sink, Sink::Half | Sink::StreamHalf) { bits } else { value.id() };
                Output { sink, pointer: 4 + i, value }
            })
            .collect();
        let code = Loop::new(&recorder.finish(), &outputs, &[true; 10]).expect("compiles");

        let mut a = crate::memory::Buffer::new(n);
        a.as_mut_slice().copy_from_slice(&numbers(3, n));
        let halves: Vec<bf16> = numbers(4, n).into_iter().map(bf16::from_f32).collect();
        let (column, row, scalars) = (numbers(5, columns), numbers(6, rows), [0.0, 0.0, 0.0, 0.0, 1.75f32]);
        let mut outs: Vec<crate::memory::Buffer> = (0..6).map(|_| crate::memory::Buffer::new(n + 32)).collect();
        outs.iter_mut().for_each(|out| out.as_mut_slice().fill(7.0));
        let mut pointers: Vec<*const u8> = vec![scalars.as_ptr().cast(), a.as_mut_slice().as_ptr().cast()];
        pointers.extend([halves.as_ptr().cast(), column.as_ptr().cast(), row.as_ptr().cast::<u8>()]);
        pointers.extend(outs.iter_mut().map(|out| out.as_mut_slice().as_mut_ptr().cast_const().cast::<u8>()));
        // SAFETY: sizes are as the body reads them; results have room to spare and are aligned.
        unsafe { code.run(&pointers, columns, rows) };
        crate::tape::fence();

        let at =
            |i: usize| (a.as_slice()[i] + halves[i].to_f32()) * column[i % columns] - row[i / columns] / scalars[4];
        let values: Vec<f32> = (0..n).map(at).collect();
        let mut sums = vec![7.0f32; columns];
        values.iter().enumerate().for_each(|(i, v)| sums[i % columns] += v);
        for (output, out) in outputs.iter().zip(&outs) {
            let what = format!("{:?} of {rows} x {columns}", output.sink);
            let written = match output.sink {
                Sink::Full | Sink::Stream => {
                    same(&out.as_slice()[..n], &values, &what);
                    n
                }
                Sink::Half | Sink::StreamHalf => {
                    let expected: Vec<f32> = values.iter().map(|&v| narrowed(v).to_f32()).collect();
                    let got: Vec<f32> = out.as_bf16()[..n].iter().map(|v| v.to_f32()).collect();
                    same(&got, &expected, &what);
                    n.div_ceil(2)
                }
                Sink::AddToColumn => {
                    same(&out.as_slice()[..columns], &sums, &what);
                    columns
                }
            };
            assert!(out.as_slice()[written..].iter().all(|&v| v == 7.0), "{what} ends where it should");
        }
    }
}
