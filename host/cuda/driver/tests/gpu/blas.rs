//! Products against a loop in f64.

use crate::{Random, close, downloaded, gpu, rounded, uploaded};
use clip_host_cuda_driver::blas::{Blas, Epilogue, Gemm, Matrix, Operands};
use clip_host_cuda_driver::{Compute, CudaError, Device, DeviceMemory, Element, Queue};

const WORKSPACE: usize = 32 << 20;

/// cuBLASLt, or why the test is skipped: a GPU may be there without it.
fn blas(test: &str, device: &Device) -> Option<Blas> {
    match Blas::open(device) {
        Ok(blas) => Some(blas),
        Err(error @ CudaError::Library { .. }) => {
            println!("{test}: SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The elements that a matrix of so many rows takes, with all its gaps, and its batch.
fn elements(matrix: &Matrix, rows: usize, batch: usize) -> usize {
    rows * matrix.leading + (batch - 1) * matrix.batch_stride
}

/// What a product is run on: host copies, rounded as the device has them, and device memory.
struct Case {
    gemm: Gemm,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    memory: [DeviceMemory; 3],
    workspace: DeviceMemory,
}

impl Case {
    fn new(device: &Device, gemm: Gemm, seed: u64) -> Case {
        let mut random = Random(seed);
        let mut filled = |matrix: &Matrix, rows| -> Vec<f32> {
            let numbers = random.numbers(elements(matrix, rows, gemm.batch));
            numbers.into_iter().map(|number| rounded(number, matrix.element)).collect()
        };
        let a = filled(&gemm.a, if gemm.a.transposed { gemm.k } else { gemm.m });
        let b = filled(&gemm.b, if gemm.b.transposed { gemm.n } else { gemm.k });
        let c = filled(&gemm.c, gemm.m);
        let memory = [
            uploaded(device, &a, gemm.a.element),
            uploaded(device, &b, gemm.b.element),
            uploaded(device, &c, gemm.c.element),
        ];
        Case { gemm, a, b, c, memory, workspace: device.alloc(WORKSPACE).unwrap() }
    }

    fn operands(&self) -> Operands {
        let [a, b, c] = self.memory.each_ref().map(DeviceMemory::address);
        Operands { a, b, c, workspace: self.workspace.address(), ..Operands::default() }
    }

    /// alpha · op(a) · op(b) + beta · c in f64, and the same of the absolute values: what errors are measured by.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let gemm = &self.gemm;
        let mut sums: Vec<f64> = self.c.iter().map(|c| f64::from(*c)).collect();
        let mut sizes = vec![0.0; sums.len()];
        let at = |matrix: &Matrix, batch: usize, row: usize, column: usize| {
            let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
            batch * matrix.batch_stride + row * matrix.leading + column
        };
        for batch in 0..gemm.batch {
            for (row, column) in (0..gemm.m).flat_map(|row| (0..gemm.n).map(move |column| (row, column))) {
                let terms = (0..gemm.k).map(|k| {
                    f64::from(self.a[at(&gemm.a, batch, row, k)]) * f64::from(self.b[at(&gemm.b, batch, k, column)])
                });
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + f64::abs(term)));
                let index = at(&gemm.c, batch, row, column);
                let before = f64::from(gemm.beta) * sums[index];
                sums[index] = f64::from(gemm.alpha) * sum + before;
                sizes[index] = f64::from(gemm.alpha.abs()) * size + before.abs();
            }
        }
        (sums, sizes)
    }

    /// How far off a result may be: its sum in f32 in any order, rounded operands with TF32, the rounded result.
    fn tolerance(&self, size: f64, value: f64) -> f64 {
        let sum = (self.gemm.k as f64 + 2.0) * 2.0_f64.powi(-24);
        let operands = if self.gemm.compute == Compute::Tf32 { 2.0_f64.powi(-9) } else { 0.0 };
        // Relative, and for the smallest numbers of half precision absolute.
        let (result, least) = match self.gemm.c.element {
            Element::F32 => (0.0, 1e-30),
            Element::F16 => (2.0_f64.powi(-11), 2.0_f64.powi(-25)),
            Element::Bf16 => (2.0_f64.powi(-8), 1e-30),
        };
        size * (sum + operands) + value.abs() * result + least
    }

    /// Checks the result on the device, gaps included: they must be as they were.
    fn check(&self, device: &Device) {
        let (sums, sizes) = self.expected();
        let got = downloaded(device, &self.memory[2], self.gemm.c.element);
        close(&format!("{:?}", self.gemm), &got, &sums, |index| match sizes[index] {
            // A gap.
            0.0 => 0.0,
            size => self.tolerance(size, sums[index]),
        });
    }
}

/// Every way of transposing, with gaps between the rows.
fn transposes(gemm: Gemm) -> Vec<Gemm> {
    [(false, false), (false, true), (true, false), (true, true)]
        .into_iter()
        .map(|(a, b)| {
            let leading = |transposed, rows, columns| if transposed { rows + 8 } else { columns + 8 };
            Gemm {
                a: Matrix { transposed: a, leading: leading(a, gemm.m, gemm.k), ..gemm.a },
                b: Matrix { transposed: b, leading: leading(b, gemm.k, gemm.n), ..gemm.b },
                c: Matrix { leading: gemm.n + 16, ..gemm.c },
                ..gemm
            }
        })
        .collect()
}

#[test]
fn products_of_all_kinds() {
    let Some((_alone, device)) = gpu("products_of_all_kinds") else { return };
    let Some(blas) = blas("products_of_all_kinds", &device) else { return };
    println!("cuBLASLt {}", Blas::version().unwrap());
    let kinds = [
        (Element::F32, Element::F32, Compute::F32),
        (Element::F32, Element::F32, Compute::Tf32),
        (Element::Bf16, Element::F32, Compute::F32),
        (Element::Bf16, Element::Bf16, Compute::F32),
        (Element::F16, Element::F32, Compute::F32),
        (Element::F16, Element::F16, Compute::F32),
    ];
    for (operands, result, compute) in kinds {
        let gemm = Gemm { compute, alpha: 0.75, beta: 0.0, ..Gemm::dense(48, 40, 72, operands, result) };
        for gemm in transposes(gemm).into_iter().chain(transposes(Gemm { beta: -0.5, ..gemm })) {
            let case = Case::new(&device, gemm, 11);
            let plan = blas.plan(&gemm, WORKSPACE, 0).unwrap();
            plan.run(&case.operands(), Queue::Compute).unwrap();
            case.check(&device);
        }
    }
}

#[test]
fn products_of_odd_sizes() {
    let Some((_alone, device)) = gpu("products_of_odd_sizes") else { return };
    let Some(blas) = blas("products_of_odd_sizes", &device) else { return };
    for (m, n, k) in [(1, 1, 1), (5, 7, 3), (1, 33, 129), (130, 1, 65)] {
        let gemm = Gemm { alignment: 4, ..Gemm::dense(m, n, k, Element::F32, Element::F32) };
        let case = Case::new(&device, gemm, 12);
        blas.plan(&gemm, WORKSPACE, 0).unwrap().run(&case.operands(), Queue::Compute).unwrap();
        case.check(&device);
    }
}

#[test]
fn batches_of_products() {
    let Some((_alone, device)) = gpu("batches_of_products") else { return };
    let Some(blas) = blas("batches_of_products", &device) else { return };
    for element in [Element::F32, Element::Bf16] {
        for mut gemm in transposes(Gemm { batch: 3, ..Gemm::dense(24, 16, 32, element, element) }) {
            gemm.a.batch_stride = 64 * 64;
            gemm.c.batch_stride = 24 * gemm.c.leading;
            // All products of the batch share b.
            let case = Case::new(&device, gemm, 13);
            blas.plan(&gemm, WORKSPACE, 0).unwrap().run(&case.operands(), Queue::Compute).unwrap();
            case.check(&device);
        }
    }
}

/// The tanh approximation and its derivative.
fn gelu(x: f64) -> (f64, f64) {
    let scale = (2.0 / std::f64::consts::PI).sqrt();
    let tanh = (scale * (x + 0.044715 * x.powi(3))).tanh();
    let inner = scale * (1.0 + 3.0 * 0.044715 * x * x);
    (0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner)
}

#[test]
fn epilogues() {
    let Some((_alone, device)) = gpu("epilogues") else { return };
    let Some(blas) = blas("epilogues", &device) else { return };
    let (m, n, k) = (64, 48, 32);
    for element in [Element::F32, Element::Bf16] {
        let mut random = Random(14);
        let mut random = |count| -> Vec<f32> { (0..count).map(|_| rounded(2.0 * random.number(), element)).collect() };
        let (bias, kept) = (random(n), random(m * n));
        for epilogue in [
            Epilogue::Bias,
            Epilogue::GeluTanh,
            Epilogue::BiasGeluTanh,
            Epilogue::BiasGeluTanhKept { leading: n },
            Epilogue::GeluTanhGradient { leading: n },
            Epilogue::GeluTanhGradientBiasGradient { leading: n },
        ] {
            let gemm = Gemm { epilogue, ..Gemm::dense(m, n, k, element, element) };
            let plan = match blas.plan(&gemm, WORKSPACE, 0) {
                Ok(plan) => plan,
                // cuBLASLt documents GELU and its gradient for 16-bit types first of all; which others it has depends on
                // the GPU. A bias every type has.
                Err(error) if element == Element::F32 && epilogue != Epilogue::Bias => {
                    println!("epilogues: no {epilogue:?} of f32: {error}");
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            let case = Case::new(&device, gemm, 15);
            let (bias_memory, kept_memory) = (uploaded(&device, &bias, element), uploaded(&device, &kept, element));
            let operands =
                Operands { bias: bias_memory.address(), auxiliary: kept_memory.address(), ..case.operands() };
            plan.run(&operands, Queue::Compute).unwrap();

            let (sums, sizes) = case.expected();
            let with_bias = |index: usize| sums[index] + f64::from(bias[index % n]);
            let expected: Vec<f64> = (0..m * n)
                .map(|index| match epilogue {
                    Epilogue::Bias => with_bias(index),
                    Epilogue::GeluTanh => gelu(sums[index]).0,
                    Epilogue::BiasGeluTanh | Epilogue::BiasGeluTanhKept { .. } => gelu(with_bias(index)).0,
                    _ => sums[index] * gelu(f64::from(kept[index])).1,
                })
                .collect();
            // The GPU's tanh is good to about 2^-11, which counts up to three times; a derivative is at most 1.13.
            let tolerance = |index: usize| {
                1.2 * case.tolerance(sizes[index] + 2.0, expected[index]) + (1.0 + sums[index].abs()) * 2.0_f64.powi(-9)
            };
            close(&format!("{gemm:?}"), &downloaded(&device, &case.memory[2], element), &expected, tolerance);
            if matches!(epilogue, Epilogue::BiasGeluTanhKept { .. }) {
                let inputs: Vec<f64> = (0..m * n).map(with_bias).collect();
                let tolerance = |index: usize| case.tolerance(sizes[index] + 2.0, inputs[index]);
                close("what goes into the GELU", &downloaded(&device, &kept_memory, element), &inputs, tolerance);
            }
            if matches!(epilogue, Epilogue::GeluTanhGradientBiasGradient { .. }) {
                let gradient: Vec<f64> =
                    (0..n).map(|column| (0..m).map(|row| expected[row * n + column]).sum()).collect();
                let tolerance = |column: usize| {
                    (0..m).map(|row| tolerance(row * n + column)).sum::<f64>()
                        + gradient[column].abs() * 2.0_f64.powi(-8)
                };
                close("the bias's gradient", &downloaded(&device, &bias_memory, element), &gradient, tolerance);
            }
        }
    }
}

#[test]
fn the_same_plan_gives_the_same_bits() {
    let Some((_alone, device)) = gpu("the_same_plan_gives_the_same_bits") else { return };
    let Some(blas) = blas("the_same_plan_gives_the_same_bits", &device) else { return };
    // Few rows and a long sum: a case for splitting k.
    let gemm = Gemm::dense(64, 64, 16384, Element::Bf16, Element::F32);
    let case = Case::new(&device, gemm, 16);
    let fastest = blas.fastest(&gemm, WORKSPACE, &case.operands()).unwrap();
    for choice in [0, fastest] {
        let plan = blas.plan(&gemm, WORKSPACE, choice).unwrap();
        println!("choice {choice}: {} bytes of workspace", plan.workspace_bytes());
        assert_eq!(plan.choice(), choice);
        let mut results = Vec::new();
        for _ in 0..5 {
            plan.run(&case.operands(), Queue::Compute).unwrap();
            results.push(downloaded(&device, &case.memory[2], Element::F32));
        }
        assert!(results.iter().all(|result| *result == results[0]), "choice {choice}");
        case.check(&device);
        // The same from a graph.
        let graph = device.capture(|| plan.run(&case.operands(), Queue::Compute)).unwrap();
        device.clear(case.memory[2].address(), case.memory[2].bytes(), Queue::Compute).unwrap();
        device.replay(&graph).unwrap();
        assert_eq!(downloaded(&device, &case.memory[2], Element::F32), results[0]);
    }
}

#[test]
fn operands_outside_of_memory_are_refused() {
    let Some((_alone, device)) = gpu("operands_outside_of_memory_are_refused") else { return };
    let Some(blas) = blas("operands_outside_of_memory_are_refused", &device) else { return };
    let gemm = Gemm::dense(16, 16, 16, Element::F32, Element::F32);
    let case = Case::new(&device, gemm, 17);
    let plan = blas.plan(&gemm, WORKSPACE, 0).unwrap();
    let good = case.operands();
    for bad in [Operands { a: good.a + 16, ..good }, Operands { b: 0, ..good }, Operands { c: good.c + 1024, ..good }] {
        assert!(matches!(plan.run(&bad, Queue::Compute), Err(CudaError::Range { .. })), "{bad:?}");
    }
    let unaligned = Operands { a: good.a + 4, ..good };
    assert!(matches!(plan.run(&unaligned, Queue::Compute), Err(CudaError::Argument { .. })));
    assert!(matches!(blas.plan(&gemm, WORKSPACE, 1000), Err(CudaError::Argument { .. })));
}
