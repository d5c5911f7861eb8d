//! The tape's loops, compiled once for each instruction set.
//!
//! A tile's interpreter is the same code everywhere; what it calls for a tile's elements is not. The loops are reached
//! through a table, so that each is compiled with its instruction set's vectors whatever the optimiser inlines where.

use crate::tape::{self, Arg, Arithmetic};
use clip_host_cpu_kernels::{Isa, bf16};
use clip_host_plugin_api::ir::{Binary, Compare, Unary};

/// The loops for one instruction set; each is the function of [`tape`] of that name, whose safety conditions it has. The
/// processor must have the instruction set.
pub struct Loops {
    pub unary: unsafe fn(Unary, Arg, *mut f32, usize),
    pub binary: unsafe fn(Binary, Arg, Arg, *mut f32, usize),
    pub pair: unsafe fn((Arithmetic, Arithmetic), Arg, Arg, Arg, *mut f32, usize),
    pub compare: unsafe fn(Compare, Arg, Arg, *mut f32, usize),
    pub select: unsafe fn(Arg, Arg, Arg, *mut f32, usize),
    pub unary_identity: unsafe fn(Arg, *mut f32, usize),
    pub keep: unsafe fn(Arg, *mut f32, usize),
    pub to_integers: unsafe fn(Arg, *mut i32, usize),
    pub widen: unsafe fn(*const bf16, *mut f32, usize),
    pub narrow: unsafe fn(Arg, *mut bf16, usize),
    pub narrow_at_random: unsafe fn(Arg, (u64, u32, u64), *mut bf16, usize),
    /// [`tape::stream`] of f32 and of bf16.
    pub stream_single: unsafe fn(Arg, *mut f32, usize),
    pub stream_half: unsafe fn(Arg, *mut bf16, usize),
    pub uniform: unsafe fn(u64, u32, u64, *mut f32, usize),
    pub sum: unsafe fn(*const f32, usize) -> f32,
    pub max: unsafe fn(*const f32, usize) -> f32,
    pub reduce_rows: unsafe fn(bool, *const f32, usize, usize, *mut f32),
    pub repeat_rows: unsafe fn(*const f32, usize, usize, *mut f32),
    pub accumulate: unsafe fn(bool, Arg, *mut f32, usize),
    pub accumulate_rows: unsafe fn(bool, Arg, usize, *mut f32, usize),
}

/// The table for an instruction set that the processor has.
pub fn loops(isa: Isa) -> &'static Loops {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => &avx512::LOOPS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &avx2::LOOPS,
        _ => &portable::LOOPS,
    }
}

/// A module with the table of one instruction set. A function cannot be generic over the features that it is compiled
/// with, so that a macro repeats them.
macro_rules! table {
    ($module:ident $(, $features:literal)?) => {
        mod $module {
            use super::*;

            pub static LOOPS: Loops = Loops {
                unary,
                binary,
                pair,
                compare,
                select,
                unary_identity,
                keep,
                to_integers,
                widen,
                narrow,
                narrow_at_random,
                stream_single,
                stream_half,
                uniform,
                sum,
                max,
                reduce_rows,
                repeat_rows,
                accumulate,
                accumulate_rows,
            };

            table!(@ $($features)?; unary(op: Unary, a: Arg, out: *mut f32, n: usize));
            table!(@ $($features)?; binary(op: Binary, a: Arg, b: Arg, out: *mut f32, n: usize));
            table!(@ $($features)?; pair(ops: (Arithmetic, Arithmetic), a: Arg, b: Arg, c: Arg, out: *mut f32, n: usize));
            table!(@ $($features)?; compare(op: Compare, a: Arg, b: Arg, out: *mut f32, n: usize));
            table!(@ $($features)?; select(c: Arg, a: Arg, b: Arg, out: *mut f32, n: usize));
            table!(@ $($features)?; unary_identity(a: Arg, out: *mut f32, n: usize));
            table!(@ $($features)?; keep(a: Arg, out: *mut f32, n: usize));
            table!(@ $($features)?; to_integers(a: Arg, out: *mut i32, n: usize));
            table!(@ $($features)?; widen(a: *const bf16, out: *mut f32, n: usize));
            table!(@ $($features)?; narrow(a: Arg, out: *mut bf16, n: usize));
            table!(@ $($features)?; narrow_at_random(a: Arg, key: (u64, u32, u64), out: *mut bf16, n: usize));
            table!(@ $($features)?; stream_single(a: Arg, out: *mut f32, n: usize));
            table!(@ $($features)?; stream_half(a: Arg, out: *mut bf16, n: usize));
            table!(@ $($features)?; uniform(seed: u64, stream: u32, first: u64, out: *mut f32, n: usize));
            table!(@ $($features)?; sum(a: *const f32, n: usize) -> f32);
            table!(@ $($features)?; max(a: *const f32, n: usize) -> f32);
            table!(@ $($features)?; reduce_rows(is_max: bool, a: *const f32, rows: usize, n: usize, out: *mut f32));
            table!(@ $($features)?; repeat_rows(a: *const f32, rows: usize, n: usize, out: *mut f32));
            table!(@ $($features)?; accumulate(is_max: bool, a: Arg, into: *mut f32, n: usize));
            table!(@ $($features)?; accumulate_rows(is_max: bool, a: Arg, rows: usize, into: *mut f32, n: usize));
        }
    };
    (@ $($features:literal)?; $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?) => {
        $(#[target_feature(enable = $features)])?
        unsafe fn $name($($argument: $type),*) $(-> $result)? {
            // SAFETY: the caller's promise is passed on.
            unsafe { tape::$name($($argument),*) }
        }
    };
}

table!(portable);
#[cfg(target_arch = "x86_64")]
table!(avx2, "avx2,fma");
#[cfg(target_arch = "x86_64")]
table!(avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma");

#[cfg(test)]
mod tests {
    use super::*;

    /// Every table gives the same bits: nothing is contracted, sums have lanes of their own.
    #[test]
    fn all_instruction_sets_give_the_same_bits() {
        let a: Vec<f32> = (0..777).map(|i| (i as f32 * 0.731).sin() * 3.0 + 0.01).collect();
        let b: Vec<f32> = (0..777).map(|i| (i as f32 * 0.377).cos() * 2.0 + 0.02).collect();
        let results = |isa: Isa| {
            let l = loops(isa);
            let mut out = vec![0.0f32; 777];
            let mut half = vec![bf16::ZERO; 777];
            let mut bits: Vec<u32> = vec![];
            let (x, y) = (Arg::Vector(a.as_ptr()), Arg::Vector(b.as_ptr()));
            let mut keep = |out: &[f32]| bits.extend(out.iter().map(|v| v.to_bits()));
            // SAFETY: all slices have 777 elements; only instruction sets that were detected are asked for.
            unsafe {
                for op in [Unary::Neg, Unary::Exp, Unary::Recip, Unary::Tanh, Unary::Erf, Unary::Abs] {
                    (l.unary)(op, x, out.as_mut_ptr(), 777);
                    keep(&out);
                }
                for op in [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Maximum, Binary::Minimum] {
                    (l.binary)(op, x, y, out.as_mut_ptr(), 777);
                    keep(&out);
                    (l.binary)(op, Arg::Value(1.5), y, out.as_mut_ptr(), 777);
                    keep(&out);
                }
                // A pair is two loops, to the bit.
                let z = Arg::Vector(a.as_ptr().add(1));
                let named = [
                    (Arithmetic::Add, Binary::Add, false),
                    (Arithmetic::Sub, Binary::Sub, false),
                    (Arithmetic::SubFrom, Binary::Sub, true),
                    (Arithmetic::Mul, Binary::Mul, false),
                ];
                let mut two = vec![0.0f32; 776];
                for (first, second) in named.iter().flat_map(|f| named.iter().map(move |s| (f, s))) {
                    for (x, y, z) in [(x, y, z), (x, Arg::Value(0.3), z), (Arg::Value(1.7), y, Arg::Value(0.1))] {
                        (l.pair)((first.0, second.0), x, y, z, out.as_mut_ptr(), 776);
                        let (p, q) = if first.2 { (y, x) } else { (x, y) };
                        (l.binary)(first.1, p, q, two.as_mut_ptr(), 776);
                        let made = Arg::Vector(two.as_ptr());
                        let (p, q) = if second.2 { (z, made) } else { (made, z) };
                        (l.binary)(second.1, p, q, two.as_mut_ptr(), 776);
                        assert_eq!(out[..776], two);
                        keep(&out);
                    }
                }
                for op in [Compare::Lt, Compare::Le, Compare::Eq] {
                    (l.compare)(op, x, y, out.as_mut_ptr(), 777);
                    keep(&out);
                }
                (l.select)(x, y, Arg::Value(0.0), out.as_mut_ptr(), 777);
                keep(&out);
                let small: Vec<f32> = a.iter().map(|v| v * 1e-38).collect();
                (l.keep)(Arg::Vector(small.as_ptr()), out.as_mut_ptr(), 777);
                assert!(out.iter().zip(&small).all(|(o, s)| *o == if s.is_normal() { *s } else { 0.0 }));
                keep(&out);
                (l.narrow)(x, half.as_mut_ptr(), 777);
                (l.widen)(half.as_ptr(), out.as_mut_ptr(), 777);
                keep(&out);
                (l.narrow_at_random)(x, (7, 1 << 31, 11), half.as_mut_ptr(), 777);
                (l.widen)(half.as_ptr(), out.as_mut_ptr(), 777);
                keep(&out);
                (l.stream_half)(y, half.as_mut_ptr(), 777);
                (l.widen)(half.as_ptr(), out.as_mut_ptr(), 777);
                keep(&out);
                (l.uniform)(7, 3, 11, out.as_mut_ptr(), 777);
                keep(&out);
                (l.accumulate)(false, x, out.as_mut_ptr(), 777);
                keep(&out);
                let mut row_by_row = out.clone();
                (l.accumulate_rows)(false, x, 7, out.as_mut_ptr(), 111);
                for row in 0..7 {
                    (l.accumulate)(false, x.at(row * 111), row_by_row.as_mut_ptr(), 111);
                }
                assert_eq!(out, row_by_row);
                // 89 columns: blocks of each size.
                (l.accumulate_rows)(true, x, 8, out.as_mut_ptr(), 89);
                for row in 0..8 {
                    (l.accumulate)(true, x.at(row * 89), row_by_row.as_mut_ptr(), 89);
                }
                assert_eq!(out, row_by_row);
                keep(&out);
                keep(&[(l.sum)(a.as_ptr(), 777), (l.max)(b.as_ptr(), 777)]);
                // Rows of a length that no vector divides.
                let (mut reduced, mut repeated) = ([0.0f32; 25], vec![f32::NAN; 25 * 31 + tape::SLACK]);
                for is_max in [false, true] {
                    (l.reduce_rows)(is_max, a.as_ptr(), 25, 31, reduced.as_mut_ptr());
                    for (row, got) in a.chunks_exact(31).zip(&reduced) {
                        let one = if is_max { (l.max)(row.as_ptr(), 31) } else { (l.sum)(row.as_ptr(), 31) };
                        assert_eq!(got.to_bits(), one.to_bits());
                    }
                    (l.repeat_rows)(reduced.as_ptr(), 25, 31, repeated.as_mut_ptr());
                    for (row, value) in repeated.chunks_exact(31).zip(&reduced) {
                        assert!(row.iter().all(|got| got.to_bits() == value.to_bits()));
                    }
                    keep(&repeated[..25 * 31]);
                }
            }
            bits
        };
        let expected = results(Isa::Portable);
        for isa in Isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect()) {
            assert!(results(isa) == expected, "{isa:?}");
        }
    }
}
