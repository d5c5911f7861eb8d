//! Compiled loops against the interpreter: random kernels, the same bits.

use super::*;
use clip_host_compiler::kernel::{Input, Output, Pattern};
use clip_host_plugin_api::interpret::mix;
use clip_host_plugin_api::ir::{Binary, Compare, Unary};

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) >> 33) as usize % n
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

/// A kernel whose operands and results are nodes of their own: leaves, those of odd numbers in the arena.
struct Random {
    kernel: Fused,
    /// Elements of each node.
    sizes: Vec<usize>,
}

impl Random {
    fn place(&self, node: NodeId) -> Address {
        let node = node as usize;
        match node % 2 {
            0 => Address { block: node + 1, offset: 0 },
            _ => Address { block: 0, offset: self.sizes[..node].iter().map(|n| n.next_multiple_of(16) * 4).sum() },
        }
    }

    fn interpreted(&self, isa: Isa) -> Program {
        Program::interpreted(&self.kernel, isa, &|node| self.place(node))
    }

    fn compiled(&self, isa: Isa) -> Option<Program> {
        Program::compiled(&self.kernel, isa, &|node| self.place(node))
    }
}

/// A kernel of random operands, results, and between so many instructions; half of what these read is recent.
fn random(seed: u64, length: std::ops::Range<usize>) -> Random {
    let mut rng = Rng(seed);
    let rows = rng.pick(&[1, 1, 2, 3, 7, 30, 64, 250]);
    let cols = rng.pick(&[1, 3, 8, 9, 15, 16, 17, 30, 48, 64, 100, 1024, 1500, 5000]);
    let mut random = Random {
        kernel: Fused {
            rows,
            cols,
            dims: vec![rows, cols],
            inner: 1,
            inputs: vec![],
            code: vec![],
            outputs: vec![],
            nodes: vec![],
        },
        sizes: vec![],
    };
    let Random { kernel, sizes } = &mut random;
    for number in 0..1 + rng.below(10) {
        let (rank, pattern, size, halves) = match rng.below(6) {
            0 => (Rank::Full, Pattern::Column, cols, false),
            1 => (Rank::Row, Pattern::Same, rows, false),
            2 => (Rank::Scalar, Pattern::Same, 1, false),
            // The transpose's order.
            3 => (Rank::Full, Pattern::Strided(vec![1, rows]), rows * cols, false),
            _ => (Rank::Full, Pattern::Same, rows * cols, rng.below(3) == 0),
        };
        let dtype = if halves { Element::Bf16 } else { Element::F32 };
        kernel.inputs.push(Input { source: sizes.len() as NodeId, offset: 0, rank, dtype, pattern });
        kernel.code.push((Instr::Load(number), rank));
        sizes.push(size);
    }
    for _ in 0..length.start + rng.below(length.len()) {
        // Recent values more often, but old ones too: many are alive at once.
        let count = kernel.code.len();
        let mut any = || if rng.below(2) == 0 { count - 1 - rng.below(count.min(4)) } else { rng.below(count) };
        let (a, b, c) = (any(), any(), any());
        let rank = |r: usize| kernel.code[r].1;
        let step = match rng.below(12) {
            0 => (Instr::Const(rng.pick(&[0.0, 1.0, -0.5, 3.25])), Rank::Scalar),
            1 if rank(a) == Rank::Full => (Instr::RowSum(a), Rank::Row),
            2 if rank(a) == Rank::Full => (Instr::RowMax(a), Rank::Row),
            3 if rank(a) != Rank::Full => (Instr::Expand(a), Rank::Full),
            3 => (Instr::Random(rng.below(3) as u32), Rank::Full),
            4 | 5 => {
                let ops = [Unary::Neg, Unary::Exp, Unary::Abs, Unary::Tanh, Unary::Erf, Unary::Recip, Unary::Sqrt];
                (Instr::Unary(rng.pick(&ops), a), rank(a))
            }
            6 => (Instr::Compare(rng.pick(&[Compare::Lt, Compare::Le, Compare::Eq]), a, b), rank(a).max(rank(b))),
            7 => (Instr::Select(c, a, b), rank(a).max(rank(b)).max(rank(c))),
            _ => {
                let ops = [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Maximum, Binary::Minimum];
                (Instr::Binary(rng.pick(&ops), a, b), rank(a).max(rank(b)))
            }
        };
        kernel.code.push(step);
    }
    for number in 0..1 + rng.below(4) {
        let value = if number == 0 { kernel.code.len() - 1 } else { rng.below(kernel.code.len()) };
        let (store, dtype, size) = match (kernel.code[value].1, rng.below(6)) {
            (Rank::Full, 0 | 1) => (Store::SumRows { segment: rows }, Element::F32, cols),
            (Rank::Full, 2) => (Store::SumAll, Element::F32, 1),
            (Rank::Full, 3) => (Store::Each, Element::Bf16, rows * cols),
            (Rank::Full, _) => (Store::Each, Element::F32, rows * cols),
            (Rank::Row, _) => (Store::Each, Element::F32, rows),
            (Rank::Scalar, _) => continue,
        };
        // Now and then a result replaces an operand that is read in the same order.
        let replaced = kernel.inputs.iter().find(|i| {
            let same = i.rank == Rank::Full && i.pattern == Pattern::Same && i.dtype == dtype;
            same && i.source % 2 == 0 && store == Store::Each && kernel.outputs.iter().all(|o| o.target != i.source)
        });
        let target = match replaced.filter(|_| size == rows * cols && rng.below(3) == 0) {
            Some(input) => input.source,
            None => {
                sizes.push(size);
                sizes.len() as NodeId - 1
            }
        };
        let rounding = match (store, dtype, rng.below(2)) {
            (Store::Each, Element::Bf16, 0) => Rounding::Stochastic { stream: 1 << 31, first: rng.below(1 << 20) },
            _ => Rounding::Nearest,
        };
        kernel.outputs.push(Output { target, value, store, dtype, rounding });
    }
    random
}

/// Runs a program over memory of its own and gives back the bits of every node.
fn run(random: &Random, mut program: Program, pool: &ThreadPool) -> Vec<Vec<u32>> {
    let mut rng = Rng(random.sizes.len() as u64);
    let arena = random.sizes.iter().map(|n| n.next_multiple_of(16)).sum();
    let sizes = std::iter::once(arena).chain(random.sizes.iter().copied());
    let mut blocks: Vec<crate::memory::Buffer> = sizes.map(crate::memory::Buffer::new).collect();
    for value in blocks.iter_mut().flat_map(|block| block.as_mut_slice()) {
        // Read as bf16 they are numbers of ordinary size too. A few are so small that products of them are subnormal.
        let scale = if rng.below(8) == 0 { 1e-20 } else { 1e-3 };
        *value = f32::from_bits(((rng.below(4001) as f32 - 2000.0) * scale).to_bits() & !0xff | 0x3f);
    }
    let pointers: Vec<*mut f32> = blocks.iter_mut().map(|b| b.as_mut_slice().as_mut_ptr()).collect();
    // SAFETY: every node has its place.
    unsafe { program.run(pool, Memory { blocks: &pointers }, 5) };
    let nodes = (0..random.sizes.len()).map(|node| (random.place(node as NodeId), random.sizes[node]));
    let bits =
        |(at, n): (Address, usize)| blocks[at.block].as_slice()[at.offset / 4..][..n].iter().map(|v| v.to_bits());
    nodes.map(|node| bits(node).collect()).collect()
}

/// Equal bits, but for which NaN a NaN is.
fn assert_same(kernel: &Fused, got: &[Vec<u32>], expected: &[Vec<u32>], what: &str) {
    let halves = |node: usize| {
        let is = |id: NodeId, element| id as usize == node && element == Element::Bf16;
        kernel.inputs.iter().any(|i| is(i.source, i.dtype)) || kernel.outputs.iter().any(|o| is(o.target, o.dtype))
    };
    for (node, (got, expected)) in got.iter().zip(expected).enumerate() {
        for (at, (&g, &e)) in got.iter().zip(expected).enumerate() {
            let nan = |bits: u32| f32::from_bits(bits).is_nan();
            let same = match halves(node) {
                true => [16, 0].iter().all(|s| {
                    let (g, e) = (g >> s << 16, e >> s << 16);
                    g == e || nan(g) && nan(e)
                }),
                false => g == e || nan(g) && nan(e),
            };
            let (g, e) = (f32::from_bits(g), f32::from_bits(e));
            assert!(same, "{what}: node {node} [{at}] is {g:e}, expected {e:e} in {kernel:#?}");
        }
    }
}

#[test]
fn compiled_kernels_give_the_interpreters_bits() {
    if !native::is_supported(Isa::detect()) {
        eprintln!("skipped: no AVX-512 here");
        return;
    }
    let pools = [1, 2].map(|threads| ThreadPool::with_isa(threads, Isa::Avx512));
    let mut compiled = 0;
    // The long ones have more values at once than there are registers.
    for (seed, length) in (0..600).map(|s| (s, 2..30)).chain((600..660).map(|s| (s, 100..300))) {
        let random = random(seed, length);
        let expected = run(&random, random.interpreted(Isa::Portable), &pools[0]);
        for output in random.kernel.outputs.iter().filter(|o| o.target % 2 == 0 && o.dtype == Element::F32) {
            let subnormal = |bits: &u32| f32::from_bits(*bits).is_subnormal();
            let stays = output.store == Store::Each;
            assert!(!stays || !expected[output.target as usize].iter().any(subnormal), "what stays is normal");
        }
        if random.compiled(Isa::Avx512).is_none() {
            continue;
        }
        compiled += 1;
        for pool in &pools {
            let program = random.compiled(Isa::Avx512).expect("as just now");
            let got = run(&random, program, pool);
            assert_same(&random.kernel, &got, &expected, &format!("seed {seed}, {} threads", pool.threads()));
        }
    }
    assert!(compiled > 400, "{compiled} of 660 kernels were compiled");
}
