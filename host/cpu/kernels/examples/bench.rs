//! Speed of the kernels on the shapes of ResNet-50 and DistilBERT: `bench [threads] [filter] [cpu]`; with `cpu` (and always
//! for one thread) time is what the processors spent, which other programs disturb less than the clock.

use std::hint::black_box;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clip_host_cpu_kernels::{
    ConvShape, Elements, ElementsMut, Gemm, Pool2dShape, ThreadPool, bf16, column_moments, conv2d_forward,
    conv2d_input_grad, conv2d_weight_grad, copy_strided, gather_rows, gemm, max_pool2d_backward, max_pool2d_forward,
    peak, scatter_add_rows,
};

const BUDGET: Duration = Duration::from_millis(150);

fn main() {
    let mut arguments = std::env::args().skip(1);
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = arguments.next().and_then(|threads| threads.parse().ok()).unwrap_or(cores);
    let filter = arguments.next().unwrap_or_default();
    BY_PROCESSOR.store(threads == 1 || arguments.next().is_some_and(|clock| clock == "cpu"), Ordering::Relaxed);
    let pool = ThreadPool::new(threads);
    let limit = peak::measure(&pool, BUDGET);
    PEAK.get_or_init(|| limit.gemm_gflops);
    println!(
        "{threads} threads, {}: gemm {:.0} GFLOP/s, copy {:.1} GB/s",
        pool.isa().name(),
        limit.gemm_gflops,
        limit.copy_gbytes
    );
    for (name, bench) in
        [("gemm", gemms as fn(&ThreadPool)), ("attention", attention), ("conv", convolutions), ("memory", memory)]
    {
        if name.contains(&filter) {
            bench(&pool);
        }
    }
}

/// Seconds per call: by the processors' time, or the fastest run by the clock.
fn fastest(mut work: impl FnMut()) -> f64 {
    if !BY_PROCESSOR.load(Ordering::Relaxed) {
        return peak::fastest(BUDGET, work);
    }
    let Some(_) = processor_time() else { return peak::fastest(BUDGET, work) };
    work();
    let (begin, start, mut runs) = (Instant::now(), processor_time().unwrap_or_default(), 0);
    while runs < 3 || begin.elapsed() < BUDGET {
        work();
        runs += 1;
    }
    (processor_time().unwrap_or_default() - start) / runs as f64
}

/// Multiplications and additions per second of a large product in f32, in units of 10^9.
static PEAK: OnceLock<f64> = OnceLock::new();

/// GFLOP/s, and the share of the peak in f32.
fn share(flops: f64, seconds: f64) -> String {
    let rate = flops / seconds / 1e9;
    format!("{rate:.0} ({:.0} %)", 100.0 * rate / PEAK.get().unwrap_or(&f64::NAN))
}

static BY_PROCESSOR: AtomicBool = AtomicBool::new(false);

/// Seconds that this process has run on a processor, where the system tells, shared out to its threads.
fn processor_time() -> Option<f64> {
    let (mut total, mut threads) = (0.0, 0);
    for thread in std::fs::read_dir("/proc/self/task").ok()? {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        total += text.split(' ').next()?.parse::<f64>().ok()?;
        threads += 1;
    }
    Some(total * 1e-9 / threads as f64)
}

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|at| (at * 7919 % 1000) as f32 / 500.0 - 1.0).collect()
}

fn halves(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

use {Elements::Bf16, Elements::F32};

fn gemms(pool: &ThreadPool) {
    for (m, n, k) in [
        (1024, 1024, 1024),
        (480, 768, 768),
        (480, 2304, 768),
        (800, 768, 768),
        (800, 3072, 768),
        (800, 768, 3072),
        (768, 3072, 800),
        (3072, 768, 800),
        (480, 3072, 768),
        (480, 768, 3072),
        (768, 768, 480),
        (3072, 768, 480),
        (768, 3072, 480),
        (1, 1024, 1024),
        (16, 256, 2048),
    ] {
        let (a, b, mut c) = (values(m * k), values(k * n), vec![0f32; m * n]);
        let (half_a, half_b, mut half_c) = (halves(&a), halves(&b), halves(&c));
        let flops = (2 * m * n * k) as f64;
        let plain = Gemm::contiguous(m, n, k);
        let variants = [
            ("A B", plain),
            ("A B'", Gemm { b_strides: (1, k), ..plain }),
            ("A' B", Gemm { a_strides: (1, m), ..plain }),
        ];
        print!("gemm {m}x{n}x{k}:");
        for (name, g) in variants {
            let single = fastest(|| gemm(pool, &g, F32(&a), F32(&b), ElementsMut::F32(black_box(&mut c))));
            let (x, y) = (Bf16(&half_a), Bf16(&half_b));
            let half = fastest(|| gemm(pool, &g, x, y, ElementsMut::Bf16(black_box(&mut half_c))));
            print!("  {name} {}, bf16 {}", share(flops, single), share(flops, half));
        }
        println!();
    }
}

fn attention(pool: &ThreadPool) {
    for (images, heads, tokens, width) in [(16, 12, 30, 64), (16, 12, 197, 64)] {
        let model = heads * width;
        let (q, v) = (values(images * tokens * model), values(images * tokens * model));
        let mut scores = vec![0f32; images * heads * tokens * tokens];
        let mut out = vec![0f32; images * tokens * model];
        let batch = [images, heads];
        let (dense, split) = ([heads * tokens * tokens, tokens * tokens], [tokens * model, width]);
        let scale = Gemm {
            m: tokens,
            n: tokens,
            k: width,
            batch: &batch,
            a_strides: (model, 1),
            a_batch: &split,
            b_strides: (1, model),
            b_batch: &split,
            c_row_stride: tokens,
            c_batch: &dense,
            accumulate: false,
            bias: None,
            alpha: 0.125,
        };
        let mix = Gemm {
            n: width,
            k: tokens,
            a_strides: (tokens, 1),
            a_batch: &dense,
            b_strides: (model, 1),
            c_row_stride: model,
            c_batch: &split,
            alpha: 1.0,
            ..scale
        };
        let flops = (2 * images * heads * tokens * tokens * width) as f64;
        let first = fastest(|| gemm(pool, &scale, F32(&q), F32(&v), ElementsMut::F32(black_box(&mut scores))));
        let second = fastest(|| gemm(pool, &mix, F32(&scores), F32(&v), ElementsMut::F32(black_box(&mut out))));
        let rates = (flops / first / 1e9, flops / second / 1e9);
        println!("attention {tokens} tokens: Q K' {:.0}  P V {:.0} GFLOP/s", rates.0, rates.1);
    }
}

fn convolutions(pool: &ThreadPool) {
    // Seconds and operations by family (1x1, 3x3, stem), direction and type.
    let mut total = [[[0.0; 2]; 3]; 3];
    let mut work = [0.0; 3];
    let families = ["1x1", "3x3", "7x7"];
    // Input size, input and output channels, kernel, stride, and how often ResNet-50 has it.
    for (size, in_c, out_c, kernel, stride, times) in [
        (224, 3, 64, 7, 2, 1),
        (56, 64, 64, 1, 1, 1),
        (56, 64, 64, 3, 1, 3),
        (56, 64, 256, 1, 1, 4),
        (56, 256, 64, 1, 1, 2),
        (56, 256, 128, 1, 1, 1),
        (56, 128, 128, 3, 2, 1),
        (56, 256, 512, 1, 2, 1),
        (28, 128, 128, 3, 1, 3),
        (28, 128, 512, 1, 1, 4),
        (28, 512, 128, 1, 1, 3),
        (28, 512, 256, 1, 1, 1),
        (28, 256, 256, 3, 2, 1),
        (28, 512, 1024, 1, 2, 1),
        (14, 256, 256, 3, 1, 5),
        (14, 256, 1024, 1, 1, 6),
        (14, 1024, 256, 1, 1, 5),
        (14, 1024, 512, 1, 1, 1),
        (14, 512, 512, 3, 2, 1),
        (14, 1024, 2048, 1, 2, 1),
        (7, 512, 512, 3, 1, 2),
        (7, 512, 2048, 1, 1, 3),
        (7, 2048, 512, 1, 1, 2),
    ] {
        let padding = kernel / 2;
        let out = ConvShape::output_size(size, kernel, stride, padding, 1);
        let shape = ConvShape {
            batch: 16,
            in_h: size,
            in_w: size,
            in_c,
            out_h: out,
            out_w: out,
            out_c,
            kernel: (kernel, kernel),
            stride: (stride, stride),
            padding: (padding, padding),
            dilation: (1, 1),
            groups: 1,
        };
        let (input, weight, output) =
            (values(shape.input_len()), values(shape.weight_len()), values(shape.output_len()));
        let (mut x, mut w, mut y) = (input.clone(), weight.clone(), output.clone());
        let flops = shape.flops() as f64;
        let (half_input, half_output) = (halves(&input), halves(&output));
        let (mut half_x, mut half_y) = (half_input.clone(), half_output.clone());
        let mut moments = vec![0.0; 2 * out_c];
        let weights = F32(&weight);
        let mut forward = |input: Elements, y: ElementsMut| {
            conv2d_forward(pool, &shape, input, weights, None, y, false, Some(&mut moments))
        };
        let forward = [
            fastest(|| forward(F32(&input), ElementsMut::F32(black_box(&mut y)))),
            fastest(|| forward(Bf16(&half_input), ElementsMut::Bf16(black_box(&mut half_y)))),
        ];
        let input_grad = |y: Elements, x: ElementsMut| conv2d_input_grad(pool, &shape, y, weights, x, false);
        let input_grad = [
            fastest(|| input_grad(F32(&output), ElementsMut::F32(black_box(&mut x)))),
            fastest(|| input_grad(Bf16(&half_output), ElementsMut::Bf16(black_box(&mut half_x)))),
        ];
        let mut weight_grad =
            |x: Elements, y: Elements| conv2d_weight_grad(pool, &shape, x, y, black_box(&mut w), false);
        let weight_grad = [
            fastest(|| weight_grad(F32(&input), F32(&output))),
            fastest(|| weight_grad(Bf16(&half_input), Bf16(&half_output))),
        ];
        let seconds = [forward, input_grad, weight_grad];
        let [forward, input_grad, weight_grad] =
            seconds.map(|[single, half]| format!("{}, bf16 {}", share(flops, single), share(flops, half)));
        println!(
            "conv {size:>3} px {in_c:>4} -> {out_c:>4} {kernel}x{kernel}/{stride} x{times}: \
             forward {forward}  input grad {input_grad}  weight grad {weight_grad}"
        );
        let family = kernel / 2 - usize::from(kernel == 7);
        for (total, seconds) in total[family].iter_mut().flatten().zip(seconds.iter().flatten()) {
            *total += seconds * times as f64;
        }
        work[family] += flops * times as f64;
    }
    println!("ResNet-50, batch 16, milliseconds (share of the f32 peak), forward with moments:");
    for ((family, total), work) in families.iter().zip(&total).zip(work) {
        for (direction, [single, half]) in ["forward", "input grad", "weight grad"].iter().zip(total) {
            println!(
                "  {family} {direction}: f32 {:.1} ms, {}; bf16 {:.1} ms, {}",
                single * 1e3,
                share(work, *single),
                half * 1e3,
                share(work, *half)
            );
        }
    }
    let sum = |kind: usize| total.iter().flatten().map(|seconds| seconds[kind]).sum::<f64>() * 1e3;
    println!("  in all: f32 {:.1} ms, bf16 {:.1} ms", sum(0), sum(1));
}

fn memory(pool: &ThreadPool) {
    let bandwidth =
        |name: &str, bytes: usize, seconds: f64| println!("{name}: {:.1} GB/s", bytes as f64 / seconds / 1e9);
    let (n, c, h, w) = (16, 64, 112, 112);
    let (input, mut out) = (values(n * c * h * w), vec![0f32; n * c * h * w]);
    let bytes = input.len() * 4;
    let plain = || copy_strided(pool, &[n * c * h * w], &[1], F32(&input), ElementsMut::F32(&mut out));
    bandwidth("plain copy", bytes, fastest(plain));
    let to_nhwc =
        || copy_strided(pool, &[n, h, w, c], &[c * h * w, w, 1, h * w], F32(&input), ElementsMut::F32(&mut out));
    bandwidth("NCHW to NHWC", bytes, fastest(to_nhwc));
    let to_nchw =
        || copy_strided(pool, &[n, c, h, w], &[c * h * w, 1, w * c, c], F32(&input), ElementsMut::F32(&mut out));
    bandwidth("NHWC to NCHW", bytes, fastest(to_nchw));
    let (half, mut half_out) = (halves(&input), halves(&input));
    let widen = || copy_strided(pool, &[n * c * h * w], &[1], Bf16(&half), ElementsMut::F32(&mut out));
    bandwidth("bf16 to f32 (f32)", bytes, fastest(widen));
    let narrow = || copy_strided(pool, &[n * c * h * w], &[1], F32(&input), ElementsMut::Bf16(&mut half_out));
    bandwidth("f32 to bf16 (f32)", bytes, fastest(narrow));
    let (shape, strides) = ([n, h, w, c], [c * h * w, w, 1, h * w]);
    let to_nhwc = || copy_strided(pool, &shape, &strides, Bf16(&half), ElementsMut::Bf16(&mut half_out));
    bandwidth("NCHW to NHWC in bf16", bytes / 2, fastest(to_nhwc));
    let mut moments = vec![0.0; 2 * c];
    let column = || column_moments(pool, F32(&input), n * h * w, c, black_box(&mut moments));
    bandwidth("column moments", bytes, fastest(column));
    let column = || column_moments(pool, Bf16(&half), n * h * w, c, black_box(&mut moments));
    bandwidth("column moments of bf16", bytes / 2, fastest(column));
    let heads = || {
        copy_strided(
            pool,
            &[16, 12, 1024, 64],
            &[12 * 64 * 1024, 64, 768, 1],
            F32(&input),
            ElementsMut::F32(&mut out[..12_582_912]),
        )
    };
    bandwidth("split heads", 12_582_912 * 4, fastest(heads));

    let shape = Pool2dShape {
        batch: n,
        in_h: h,
        in_w: w,
        out_h: 56,
        out_w: 56,
        channels: c,
        kernel: (3, 3),
        stride: (2, 2),
        padding: (1, 1),
    };
    let (mut pooled, incoming) = (vec![0f32; shape.output_len()], values(shape.output_len()));
    let forward = fastest(|| max_pool2d_forward(pool, &shape, F32(&input), ElementsMut::F32(black_box(&mut pooled))));
    bandwidth("max pool forward (input)", bytes, forward);
    let backward =
        || max_pool2d_backward(pool, &shape, F32(&input), F32(&incoming), ElementsMut::F32(black_box(&mut out)));
    bandwidth("max pool backward (input)", bytes, fastest(backward));

    let (table, ids) = (values(30_522 * 768), (0..480).map(|at| at * 61 % 30_522).collect::<Vec<i32>>());
    let (mut rows, mut grad) = (vec![0f32; 480 * 768], table.clone());
    let seconds = fastest(|| gather_rows(pool, F32(&table), 768, &ids, black_box(&mut rows)).unwrap_or(()));
    bandwidth("gather", rows.len() * 4, seconds);
    let seconds = fastest(|| scatter_add_rows(pool, &rows, 768, &ids, black_box(&mut grad)).unwrap_or(()));
    bandwidth("scatter add", rows.len() * 4, seconds);

    for kernel in [3, 7] {
        let shape = ConvShape {
            batch: n,
            in_h: 56,
            in_w: 56,
            in_c: 96,
            out_h: 56,
            out_w: 56,
            out_c: 96,
            kernel: (kernel, kernel),
            stride: (1, 1),
            padding: (kernel / 2, kernel / 2),
            dilation: (1, 1),
            groups: 96,
        };
        let (x, weight, mut y) = (values(shape.input_len()), values(shape.weight_len()), values(shape.output_len()));
        let mut w = weight.clone();
        let flops = shape.flops() as f64;
        let forward = fastest(|| {
            conv2d_forward(pool, &shape, F32(&x), F32(&weight), None, ElementsMut::F32(&mut y), false, None)
        });
        let weight_grad = fastest(|| conv2d_weight_grad(pool, &shape, F32(&x), F32(&y), &mut w, false));
        let rates = (flops / forward / 1e9, flops / weight_grad / 1e9);
        println!("depthwise {kernel}x{kernel}: forward {:.1}, weight grad {:.1} GFLOP/s", rates.0, rates.1);
    }
}
