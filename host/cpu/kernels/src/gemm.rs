//! Matrix multiplication: batched, with any strides.

use crate::blocked::{DenseRows, Problem, Rows, Strided, Target, multiply};
use crate::elements::{Elements, ElementsMut};
use crate::threads::ThreadPool;

/// Batch dimensions of a [`Gemm`] at most.
pub const MAX_BATCH_DIMS: usize = 3;

/// `C = alpha * A * B (+ C) (+ bias)` for each index of the batch dimensions; strides count elements.
///
/// A is `m` by `k`, B is `k` by `n`, C is `m` by `n` with neighbouring columns. Strides of A and B may be anything:
/// exchanged for a transposed operand, zero for one that is broadcast.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a> {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A and rows of B.
    pub k: usize,
    /// Sizes of the batch dimensions, outermost first; at most [`MAX_BATCH_DIMS`].
    pub batch: &'a [usize],
    /// Row and column stride of A.
    pub a_strides: (usize, usize),
    /// Stride of A along each batch dimension.
    pub a_batch: &'a [usize],
    /// Row and column stride of B.
    pub b_strides: (usize, usize),
    /// Stride of B along each batch dimension.
    pub b_batch: &'a [usize],
    /// Distance of two rows of C.
    pub c_row_stride: usize,
    /// Stride of C along each batch dimension.
    pub c_batch: &'a [usize],
    /// Add to what C holds, or overwrite it.
    pub accumulate: bool,
    /// `n` values, added to each row.
    pub bias: Option<&'a [f32]>,
    /// Factor of the product; not applied to the bias.
    pub alpha: f32,
}

impl<'a> Gemm<'a> {
    /// One product of three row-major, contiguous matrices.
    pub fn contiguous(m: usize, n: usize, k: usize) -> Gemm<'a> {
        Gemm {
            m,
            n,
            k,
            batch: &[],
            a_strides: (k, 1),
            a_batch: &[],
            b_strides: (n, 1),
            b_batch: &[],
            c_row_stride: n,
            c_batch: &[],
            accumulate: false,
            bias: None,
            alpha: 1.0,
        }
    }
}

/// A batch dimension with the strides of A, B and C.
#[derive(Clone, Copy, Default)]
struct BatchDim {
    len: usize,
    a: usize,
    b: usize,
    c: usize,
}

/// The batch dimensions, innermost first.
#[derive(Clone, Copy, Default)]
struct Batch {
    dims: [BatchDim; MAX_BATCH_DIMS],
    count: usize,
}

impl Batch {
    fn offset(&self, mut index: usize, stride: impl Fn(&BatchDim) -> usize) -> usize {
        let mut offset = 0;
        for dim in &self.dims[..self.count] {
            offset += index % dim.len * stride(dim);
            index /= dim.len;
        }
        offset
    }

    fn size(&self) -> usize {
        self.dims[..self.count].iter().map(|dim| dim.len).product()
    }
}

struct BatchRows {
    batch: Batch,
    row: usize,
}

impl Rows for BatchRows {
    fn offsets(&self, batch: usize, row: usize, offsets: &mut [usize]) {
        let start = self.batch.offset(batch, |dim| dim.c);
        DenseRows { start, row: self.row, batch: 0 }.offsets(0, row, offsets);
    }
}

/// Runs the multiplication; the same bits for any number of threads.
///
/// If A or B is bf16, both are multiplied as bf16 (an f32 operand is rounded) and summed in f32; a result in bf16 is
/// rounded once, after accumulation and bias.
///
/// # Panics
/// If a slice is shorter than its strides reach, if elements of C overlap, or if there are more batch dimensions
/// than [`MAX_BATCH_DIMS`] or strides for fewer: broken invariants of the caller, checked once per call.
pub fn gemm(pool: &ThreadPool, g: &Gemm, a: Elements, b: Elements, mut c: ElementsMut) {
    let dims = g.batch.len();
    assert!(
        dims <= MAX_BATCH_DIMS && g.a_batch.len() == dims && g.b_batch.len() == dims && g.c_batch.len() == dims,
        "gemm: {dims} batch dimensions, strides for {}, {} and {}",
        g.a_batch.len(),
        g.b_batch.len(),
        g.c_batch.len()
    );
    if g.m == 0 || g.n == 0 || g.batch.contains(&0) {
        return;
    }
    let mut batch = Batch::default();
    for dim in (0..dims).rev().filter(|&dim| g.batch[dim] > 1) {
        batch.dims[batch.count] =
            BatchDim { len: g.batch[dim], a: g.a_batch[dim], b: g.b_batch[dim], c: g.c_batch[dim] };
        batch.count += 1;
    }
    check(g, &batch, a.len(), b.len(), c.len());

    // Rows that share B and follow each other across a batch dimension are rows of one larger product.
    let mut m = g.m;
    while batch.count > 0 {
        let dim = batch.dims[0];
        if dim.b != 0 || dim.a != m * g.a_strides.0 || dim.c != m * g.c_row_stride {
            break;
        }
        m *= dim.len;
        batch.dims.rotate_left(1);
        batch.count -= 1;
    }
    let (mut n, mut a_strides, mut b_strides, mut row) = (g.n, g.a_strides, g.b_strides, g.c_row_stride);
    let (mut a, mut b, mut swapped) = (a, b, false);
    if n == 1 && m > 1 && row == 1 && g.bias.is_none() {
        // A column of results is a row of the transposed product, which fills the vectors.
        (a, b) = (b, a);
        (a_strides, b_strides) = ((b_strides.1, b_strides.0), (a_strides.1, a_strides.0));
        (n, m, row, swapped) = (m, 1, m, true);
    }
    let problem = Problem {
        m,
        n,
        k: g.k,
        batch: batch.size(),
        alpha: g.alpha,
        accumulate: g.accumulate,
        bias: g.bias,
        bias_stride: 0,
        half: a.is_bf16() || b.is_bf16(),
        moments: 0,
    };
    let a_offset = |index| batch.offset(index, |dim| if swapped { dim.b } else { dim.a });
    let b_offset = |index| batch.offset(index, |dim| if swapped { dim.a } else { dim.b });
    let (c, rows) = (Target::new(&mut c), BatchRows { batch, row });
    macro_rules! product {
        ($a:expr, $b:expr) => {{
            let a = Strided { data: $a, line: a_strides.0, depth: a_strides.1, batch: a_offset };
            let b = Strided { data: $b, line: b_strides.1, depth: b_strides.0, batch: b_offset };
            // SAFETY: `check` compared the largest offset of each operand with its length, and found that no two
            // elements of C are the same.
            unsafe { multiply(pool, &problem, &a, &b, c, &rows, &mut []) }
        }};
    }
    match (a, b) {
        (Elements::F32(a), Elements::F32(b)) => product!(a, b),
        (Elements::F32(a), Elements::Bf16(b)) => product!(a, b),
        (Elements::Bf16(a), Elements::F32(b)) => product!(a, b),
        (Elements::Bf16(a), Elements::Bf16(b)) => product!(a, b),
    }
}

/// Compares what the strides reach with what the slices hold.
fn check(g: &Gemm, batch: &Batch, a: usize, b: usize, c: usize) {
    let reach = |rows: usize, cols: usize, strides: (usize, usize), stride: fn(&BatchDim) -> usize| {
        let dims = batch.dims[..batch.count].iter().map(|dim| (dim.len - 1).saturating_mul(stride(dim)));
        let matrix = [(rows - 1).saturating_mul(strides.0), (cols - 1).saturating_mul(strides.1)];
        dims.chain(matrix).fold(1usize, usize::saturating_add)
    };
    if g.k > 0 {
        let (a_needs, b_needs) = (reach(g.m, g.k, g.a_strides, |dim| dim.a), reach(g.k, g.n, g.b_strides, |dim| dim.b));
        assert!(a_needs <= a, "gemm: A has {} elements, its strides reach {a_needs}", a);
        assert!(b_needs <= b, "gemm: B has {} elements, its strides reach {b_needs}", b);
    }
    let c_needs = reach(g.m, g.n, (g.c_row_stride, 1), |dim| dim.c);
    assert!(c_needs <= c, "gemm: C has {} elements, its strides reach {c_needs}", c);
    if let Some(bias) = g.bias {
        assert!(bias.len() >= g.n, "gemm: {} biases for {} columns", bias.len(), g.n);
    }
    // Elements of C are distinct if each stride steps over everything that the smaller ones reach.
    let mut dims = [(1, g.n), (g.c_row_stride, g.m), (usize::MAX, 1), (usize::MAX, 1), (usize::MAX, 1)];
    for (slot, dim) in dims[2..].iter_mut().zip(&batch.dims[..batch.count]) {
        *slot = (dim.c, dim.len);
    }
    dims.sort_unstable();
    let mut reached = 0usize;
    for (stride, len) in dims.into_iter().filter(|&(_, len)| len > 1) {
        assert!(stride > reached, "gemm: elements of C overlap: stride {stride} after a reach of {reached}");
        reached = reached.saturating_add((len - 1).saturating_mul(stride));
    }
}
