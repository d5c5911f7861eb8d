//! Batch statistics.

use super::own::{Source, Target};
use super::text::{Draft, Parameters, blocks};
use crate::launch::{Access, Address, Block};

const THREADS: usize = 256;
/// Threads along the columns, at most.
const LANES: usize = 32;
/// Blocks that sum, about: enough to fill a GPU.
const BLOCKS: usize = 1024;
/// Threads that combine the chunks of a column.
const BEHIND: usize = 8;

/// Mean and population variance of each column: each thread sums the differences from the first row of its chunk and
/// their squares; chunks are combined in their order, in double precision, after Chan, Golub and LeVeque (1979).
pub fn moments(x: &Source, rows: usize, cols: usize, to: Target) -> Vec<Draft> {
    // Neighbouring columns are read 16 bytes at a time where rows divide so.
    let fits = |v: &usize| cols.is_multiple_of(*v) && x.at.offset.is_multiple_of(v * x.element.bytes());
    let vector = [16 / x.element.bytes(), 4, 2, 1].into_iter().find(fits).unwrap_or(1);
    let lanes = cols.div_ceil(vector).next_power_of_two().min(LANES);
    let (groups, width) = (THREADS / lanes, lanes * vector);
    let tiles = cols.div_ceil(width);
    let chunks = BLOCKS.div_ceil(tiles).clamp(1, rows.div_ceil(4 * groups));
    let chunk = rows.div_ceil(chunks);
    let chunks = rows.div_ceil(chunk);
    let partials = Address { block: Block::Scratch, offset: 0 };
    let bytes = chunks * cols * 3 * 4;

    let mut parameters = Parameters::default();
    x.parameter(&mut parameters, "p");
    parameters.widen_last(vector * x.element.bytes());
    parameters.raw("float *w", partials, bytes, Access::Write, 4);
    let text = format!(
        "    __shared__ float room[{groups}][{width}];
    const u32 lane = threadIdx.x % {lanes}, group = threadIdx.x / {lanes};
    const u32 col = (blockIdx.y * {lanes} + lane) * {vector};
    const u64 first = (u64)blockIdx.x * {chunk};
    const u64 end = first + {chunk} < {rows} ? first + {chunk} : {rows};
    float sum[{vector}] = {{}}, square[{vector}] = {{}}, pivot[{vector}] = {{}};
    if (col < {cols}) {{
        load<{vector}>(pivot, p + (first * {cols} + col));
#pragma unroll 4
        for (u64 row = first + group; row < end; row += {groups}) {{
            float x[{vector}];
            load<{vector}>(x, p + (row * {cols} + col));
#pragma unroll
            for (int e = 0; e < {vector}; e++) {{
                const float d = x[e] - pivot[e];
                sum[e] += d;
                square[e] += d * d;
            }}
        }}
    }}
    float *to = w + (u64)blockIdx.x * {three};
    for (int part = 0; part < 2; part++) {{
#pragma unroll
        for (int e = 0; e < {vector}; e++) room[group][lane * {vector} + e] = part == 0 ? sum[e] : square[e];
        __syncthreads();
        for (u32 c = threadIdx.x; c < {width}; c += {THREADS}) {{
            float v = room[0][c];
            for (int g = 1; g < {groups}; g++) v += room[g][c];
            const u32 at = blockIdx.y * {width} + c;
            if (at < {cols}) to[{cols} * (1 + part) + at] = v;
        }}
        __syncthreads();
    }}
    if (group == 0 && col < {cols})
        for (int e = 0; e < {vector}; e++) to[col + e] = pivot[e];
",
        three = 3 * cols,
    );
    let first = parameters.draft(THREADS as u32, [blocks(chunks), blocks(tiles), 1], &text);

    let mut parameters = Parameters::default();
    parameters.raw("const float *w", partials, bytes, Access::Read, 4);
    parameters.write("q", to.element, to.at, 2 * cols, to.node, Access::Write);
    let columns = THREADS / BEHIND;
    let text = format!(
        "    __shared__ double counts[{BEHIND}][{columns}], means[{BEHIND}][{columns}], squares[{BEHIND}][{columns}];
    const u32 x = threadIdx.x % {columns}, y = threadIdx.x / {columns};
    const u32 col = blockIdx.x * {columns} + x;
    double count = 0.0, mean = 0.0, square = 0.0;
    if (col < {cols}) {{
        const u32 last = (y + 1) * {span} < {chunks} ? (y + 1) * {span} : {chunks};
        for (u32 i = y * {span}; i < last; i++) {{
            const float *from = w + (u64)i * {three} + col;
            const double n = i + 1 < {chunks} ? {chunk} : {rest};
            const double sum = from[{cols}], here = from[0] + sum / n;
            const double delta = here - mean, all = count + n;
            square += from[{two}] - sum * sum / n + delta * delta * count * n / all;
            mean += delta * n / all;
            count = all;
        }}
    }}
    counts[y][x] = count;
    means[y][x] = mean;
    squares[y][x] = square;
    __syncthreads();
    if (y != 0 || col >= {cols}) return;
    for (int i = 1; i < {BEHIND}; i++) {{
        const double n = counts[i][x], all = count + n;
        if (n == 0.0) continue;
        const double delta = means[i][x] - mean;
        square += squares[i][x] + delta * delta * count * n / all;
        mean += delta * n / all;
        count = all;
    }}
    narrow((float)mean, q[col]);
    narrow((float)(square > 0.0 ? square / count : square == square ? 0.0 : square), q[{cols} + col]);
",
        span = chunks.div_ceil(BEHIND),
        two = 2 * cols,
        three = 3 * cols,
        rest = rows - (chunks - 1) * chunk,
    );
    let second = parameters.draft(THREADS as u32, [blocks(cols.div_ceil(columns)), 1, 1], &text);
    vec![first, second]
}
