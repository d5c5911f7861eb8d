//! Convolutions in their three directions against a loop in f64.

use crate::{Random, close, downloaded, gpu, rounded, uploaded};
use clip_host_cuda_driver::dnn::{Conv, ConvOperands, Direction, Dnn};
use clip_host_cuda_driver::{Compute, CudaError, Device, DeviceMemory, Element, Queue};

const WORKSPACE: usize = 256 << 20;
const DIRECTIONS: [Direction; 3] = [Direction::Forward, Direction::InputGradient, Direction::WeightGradient];

const CONV: Conv = Conv {
    batch: 2,
    input: [9, 8],
    channels: 16,
    kernel: [3, 3],
    filters: 24,
    output: [9, 8],
    stride: [1, 1],
    padding: [1, 1],
    dilation: [1, 1],
    groups: 1,
    element: Element::F32,
    compute: Compute::F32,
    direction: Direction::Forward,
};

/// cuDNN, or why the test is skipped: a GPU may be there without it.
fn dnn(test: &str, device: &Device) -> Option<Dnn> {
    match Dnn::open(device) {
        Ok(dnn) => Some(dnn),
        Err(error @ CudaError::Library { .. }) => {
            println!("{test}: SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// What a convolution is run on: host copies of x, w and y, rounded as the device has them, and device memory.
struct Case {
    conv: Conv,
    host: [Vec<f32>; 3],
    memory: [DeviceMemory; 3],
    workspace: DeviceMemory,
}

impl Case {
    fn new(device: &Device, conv: Conv, seed: u64) -> Case {
        let mut random = Random(seed);
        let host = conv
            .elements()
            .map(|count| -> Vec<f32> { (0..count).map(|_| rounded(random.number(), conv.element)).collect() });
        let memory = host.each_ref().map(|numbers| uploaded(device, numbers, conv.element));
        Case { conv, host, memory, workspace: device.alloc(WORKSPACE).unwrap() }
    }

    fn operands(&self) -> ConvOperands {
        let [x, w, y] = self.memory.each_ref().map(DeviceMemory::address);
        ConvOperands { x, w, y, workspace: self.workspace.address() }
    }

    /// Which of x, w and y is written.
    fn written(&self) -> usize {
        match self.conv.direction {
            Direction::InputGradient => 0,
            Direction::WeightGradient => 1,
            Direction::Forward => 2,
        }
    }

    /// What is written in f64, and the sums of the terms' absolute values: what errors are measured by.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let conv = &self.conv;
        let [x, w, y] = &self.host;
        let count = self.host[self.written()].len();
        let (mut sums, mut sizes) = (vec![0.0; count], vec![0.0; count]);
        let (channels, filters) = (conv.channels / conv.groups, conv.filters / conv.groups);
        // Every product of an x and a w that goes into a y.
        for image in 0..conv.batch {
            for (row, column) in grid(conv.output) {
                for (r, s) in grid(conv.kernel) {
                    let from = [(row, r, 0), (column, s, 1)].map(|(place, offset, axis)| {
                        (place * conv.stride[axis] + offset * conv.dilation[axis])
                            .checked_sub(conv.padding[axis])
                            .filter(|at| *at < conv.input[axis])
                    });
                    let [Some(x_row), Some(x_column)] = from else { continue };
                    for filter in 0..conv.filters {
                        for channel in 0..channels {
                            let x_channel = filter / filters * channels + channel;
                            let x_at = ((image * conv.input[0] + x_row) * conv.input[1] + x_column) * conv.channels
                                + x_channel;
                            let w_at = ((filter * conv.kernel[0] + r) * conv.kernel[1] + s) * channels + channel;
                            let y_at =
                                ((image * conv.output[0] + row) * conv.output[1] + column) * conv.filters + filter;
                            let (to, a, b) = match conv.direction {
                                Direction::Forward => (y_at, x[x_at], w[w_at]),
                                Direction::InputGradient => (x_at, y[y_at], w[w_at]),
                                Direction::WeightGradient => (w_at, x[x_at], y[y_at]),
                            };
                            let term = f64::from(a) * f64::from(b);
                            sums[to] += term;
                            sizes[to] += term.abs();
                        }
                    }
                }
            }
        }
        (sums, sizes)
    }

    /// Checks what was written. An error may be as large as that of a sum in f32 in any order, of operands rounded to TF32,
    /// and of the rounded result.
    fn check(&self, device: &Device) {
        let conv = &self.conv;
        let (sums, sizes) = self.expected();
        let terms = match conv.direction {
            Direction::Forward => conv.kernel[0] * conv.kernel[1] * conv.channels / conv.groups,
            Direction::InputGradient => conv.kernel[0] * conv.kernel[1] * conv.filters / conv.groups,
            Direction::WeightGradient => conv.batch * conv.output[0] * conv.output[1],
        };
        let sum = (terms as f64 + 2.0) * 2.0_f64.powi(-24);
        let operands = if conv.compute == Compute::Tf32 { 2.0_f64.powi(-9) } else { 0.0 };
        let (result, least) = match conv.element {
            Element::F32 => (0.0, 1e-30),
            Element::F16 => (2.0_f64.powi(-11), 2.0_f64.powi(-25)),
            Element::Bf16 => (2.0_f64.powi(-8), 1e-30),
        };
        let got = downloaded(device, &self.memory[self.written()], conv.element);
        close(&format!("{conv:?}"), &got, &sums, |index| {
            sizes[index] * (sum + operands) + sums[index].abs() * result + least
        });
    }
}

fn grid(size: [usize; 2]) -> impl Iterator<Item = (usize, usize)> {
    (0..size[0]).flat_map(move |row| (0..size[1]).map(move |column| (row, column)))
}

/// Convolutions that differ from each other in one thing each.
fn convolutions() -> Vec<Conv> {
    vec![
        CONV,
        Conv { kernel: [1, 1], padding: [0, 0], ..CONV },
        Conv { kernel: [1, 1], padding: [0, 0], stride: [2, 2], output: [5, 4], ..CONV },
        Conv { stride: [2, 2], output: [5, 4], ..CONV },
        Conv { stride: [2, 1], kernel: [3, 1], padding: [0, 0], output: [4, 8], ..CONV },
        Conv { padding: [0, 2], output: [7, 10], ..CONV },
        Conv { dilation: [2, 2], padding: [2, 2], ..CONV },
        Conv { groups: 2, channels: 32, filters: 16, ..CONV },
        Conv { groups: 16, channels: 16, filters: 16, ..CONV },
        // A first layer: three channels.
        Conv { channels: 3, kernel: [7, 7], padding: [3, 3], stride: [2, 2], output: [5, 4], ..CONV },
        // More zeros behind than before.
        Conv { padding: [0, 0], ..CONV },
    ]
}

#[test]
fn convolutions_in_all_directions() {
    let Some((_alone, device)) = gpu("convolutions_in_all_directions") else { return };
    let Some(dnn) = dnn("convolutions_in_all_directions", &device) else { return };
    println!("cuDNN {}", Dnn::version().unwrap());
    let kinds = [
        (Element::F32, Compute::F32),
        (Element::F32, Compute::Tf32),
        (Element::Bf16, Compute::F32),
        (Element::F16, Compute::F32),
    ];
    // All that is wrong is told at once, for the sake of who waits for a GPU.
    let mut failures = Vec::new();
    for conv in convolutions() {
        for (element, compute) in kinds {
            for direction in DIRECTIONS {
                let conv = Conv { element, compute, direction, ..conv };
                let case = Case::new(&device, conv, 21);
                match dnn.plan(&conv, WORKSPACE, 0).and_then(|plan| plan.run(&case.operands(), Queue::Compute)) {
                    Ok(()) => case.check(&device),
                    Err(error) => failures.push(error.to_string()),
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_same_plan_gives_the_same_bits() {
    let Some((_alone, device)) = gpu("the_same_plan_gives_the_same_bits") else { return };
    let Some(dnn) = dnn("the_same_plan_gives_the_same_bits", &device) else { return };
    for direction in DIRECTIONS {
        // Many images and few filters: a case for sums that are split.
        let conv = Conv { batch: 64, element: Element::Bf16, direction, ..CONV };
        let case = Case::new(&device, conv, 22);
        let fastest = dnn.fastest(&conv, WORKSPACE, &case.operands()).unwrap();
        for choice in [0, fastest] {
            let plan = dnn.plan(&conv, WORKSPACE, choice).unwrap();
            println!("{direction:?}, choice {choice}: {} bytes of workspace", plan.workspace_bytes());
            assert_eq!(plan.choice(), choice);
            let result = &case.memory[case.written()];
            let mut results = Vec::new();
            for queue in [Queue::Compute, Queue::Compute, Queue::Copy, Queue::Compute] {
                plan.run(&case.operands(), queue).unwrap();
                device.synchronize().unwrap();
                results.push(downloaded(&device, result, conv.element));
            }
            assert!(results.iter().all(|again| *again == results[0]), "{direction:?}, choice {choice}");
            case.check(&device);
            // The same from a graph, also when the plan and cuDNN are no longer in the caller's hands.
            let graph = device.capture(|| plan.run(&case.operands(), Queue::Compute)).unwrap();
            drop(plan);
            device.clear(result.address(), result.bytes(), Queue::Compute).unwrap();
            device.replay(&graph).unwrap();
            assert_eq!(downloaded(&device, result, conv.element), results[0], "{direction:?}, choice {choice}");
        }
    }
}

#[test]
fn operands_outside_of_memory_are_refused() {
    let Some((_alone, device)) = gpu("operands_outside_of_memory_are_refused") else { return };
    let Some(dnn) = dnn("operands_outside_of_memory_are_refused", &device) else { return };
    let case = Case::new(&device, CONV, 23);
    let plan = dnn.plan(&CONV, WORKSPACE, 0).unwrap();
    let good = case.operands();
    for bad in [ConvOperands { x: good.x + 16, ..good }, ConvOperands { w: 0, ..good }, ConvOperands { y: 16, ..good }]
    {
        assert!(matches!(plan.run(&bad, Queue::Compute), Err(CudaError::Range { .. })), "{bad:?}");
    }
    let unaligned = ConvOperands { x: good.x + 4, ..good };
    assert!(matches!(plan.run(&unaligned, Queue::Compute), Err(CudaError::Argument { .. })));
    assert!(matches!(dnn.plan(&CONV, WORKSPACE, 1000), Err(CudaError::Argument { .. })));
}
