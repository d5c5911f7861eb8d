//! What can be checked without a GPU: that every function is found, that convolutions can be described, and, where the
//! driver's library is there though no GPU is, that engines are found and plans built for a GPU that is only described.

use super::*;
use crate::driver::Driver;

/// An H200, as cuDNN writes down a device's properties.
const H200: &str = r#"{"maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],"regsPerBlock":65536,
    "multiProcessorCount":132,"smCountOrigin":0,"warpSize":32,"maxSharedMemoryPerBlock":49152,
    "maxSharedMemoryPerBlockOptin":232448,"oversizedSharedMemoryPerBlock":0,"reservedSharedMemoryPerBlock":1024,
    "maxRegistersPerSM":65536,"maxCtasPerSM":32,"maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,"pciDeviceId":9013,
    "isTccDriver":0,"supportCoopLaunch":1,"smClockRateKHz":1980000,"memClockRateKHz":3201000,"memoryBusWidth":6144,
    "l2CacheSize":62914560,"deviceName":"NVIDIA H200","deviceVer":900,"driverVer":13000,"smVersion":900,
    "totalGlobalMem":150110011392,"cudaDeviceId":0,"sharedMemPerMultiprocessor":233472}"#;

const CONV: Conv = Conv {
    batch: 32,
    input: [56, 56],
    channels: 64,
    kernel: [3, 3],
    filters: 64,
    output: [56, 56],
    stride: [1, 1],
    padding: [1, 1],
    dilation: [1, 1],
    groups: 1,
    element: Element::Bf16,
    compute: Compute::F32,
    direction: Direction::Forward,
};

const DIRECTIONS: [Direction; 3] = [Direction::Forward, Direction::InputGradient, Direction::WeightGradient];

/// A GPU that is only described. Nothing where cuDNN is not there, or too old for that, or, as it does not load its own parts without the driver's
/// library, where that is not; says so then.
fn properties(test: &str) -> Option<Descriptor> {
    if matches!(Dnn::version(), Ok(..90_800)) {
        println!("{test}: SKIPPED: cuDNN before 9.8 plans for no GPU that is only described");
        return None;
    }
    let described = || {
        println!("{test}: cuDNN {}", Dnn::version()?);
        let mut properties = Descriptor::new(Kind::DeviceProperties)?;
        properties.text(attribute::DEVICE_PROPERTIES_JSON, H200)?;
        properties.finish("an H200")
    };
    match described() {
        Ok(properties) => Some(properties),
        Err(error) => {
            println!("{test}: SKIPPED: {error}");
            let without_driver = matches!(&error, CudaError::Call { name, .. }
                if name == "CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED" && Driver::get().is_err());
            assert!(matches!(error, CudaError::Library { .. }) || without_driver, "{error}");
            None
        }
    }
}

#[test]
fn parts_of_a_convolution_can_be_described() {
    if properties("parts_of_a_convolution_can_be_described").is_none() {
        return;
    }
    for element in [Element::F32, Element::F16, Element::Bf16] {
        tensor(X, [2, 8, 5, 7], element).unwrap();
    }
    // The library says what it does not like.
    let error = Descriptor::new(Kind::Tensor).unwrap().finish("nothing").err().unwrap();
    let CudaError::Call { library: "cuDNN", name, text, .. } = &error else { panic!("{error}") };
    assert!(name.starts_with("CUDNN_STATUS_BAD_PARAM") && !text.is_empty(), "{error}");
}

#[test]
fn plans_are_built_for_a_gpu_that_is_only_described() {
    let Some(properties) = properties("plans_are_built_for_a_gpu_that_is_only_described") else { return };
    let target = Target::Properties(&properties);
    let convs = [
        CONV,
        Conv { kernel: [1, 1], padding: [0, 0], filters: 256, ..CONV },
        Conv { stride: [2, 2], output: [28, 28], ..CONV },
        Conv { groups: 2, ..CONV },
        Conv { groups: 64, ..CONV },
        Conv { dilation: [2, 2], padding: [2, 2], ..CONV },
        Conv {
            input: [224, 224],
            channels: 3,
            kernel: [7, 7],
            stride: [2, 2],
            padding: [3, 3],
            output: [112, 112],
            ..CONV
        },
        // Padded before the first row and column only.
        Conv { kernel: [2, 2], ..CONV },
    ];
    let kinds = [
        (Element::Bf16, Compute::F32),
        (Element::F16, Compute::F32),
        (Element::F32, Compute::F32),
        (Element::F32, Compute::Tf32),
    ];
    for conv in convs {
        for (element, compute) in kinds {
            for direction in DIRECTIONS {
                let conv = Conv { element, compute, direction, ..conv };
                let graph = Arc::new(Graph::new(&conv, target).unwrap());
                let candidates = graph.candidates(target).unwrap();
                let count = candidates.len();
                let built = candidates.into_iter().find_map(|config| Built::new(graph.clone(), config, target).ok());
                let built = built.unwrap_or_else(|| panic!("none of {count} candidates for {conv:?}"));
                println!("{count} candidates, {} bytes: {conv:?}", built.workspace_bytes);
            }
        }
    }
}

#[test]
fn senseless_convolutions_are_refused() {
    assert_eq!(CONV.check().unwrap(), [1, 1]);
    for (bad, expected) in [
        (Conv { batch: 0, ..CONV }, "at least 1"),
        (Conv { stride: [0, 1], ..CONV }, "at least 1"),
        (Conv { groups: 3, ..CONV }, "multiples of 3"),
        (Conv { output: [54, 56], padding: [1, 1], ..CONV }, "an output of the size"),
        (Conv { channels: usize::MAX, ..CONV }, "device memory"),
        (Conv { batch: 1 << 31, ..CONV }, "device memory"),
    ] {
        let error = bad.check().unwrap_err().to_string();
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
}

#[test]
fn padding_behind_is_as_before_or_what_it_takes() {
    // Rows that no place of the filter reaches.
    let even = Conv { input: [8, 8], output: [4, 4], stride: [2, 2], ..CONV };
    assert_eq!(even.check().unwrap(), [1, 1]);
    // TensorFlow's "same": none before, one behind.
    let same = Conv { padding: [0, 0], ..even };
    assert_eq!(same.check().unwrap(), [1, 1]);
    let wide = Conv { input: [7, 8], output: [4, 4], stride: [2, 2], padding: [0, 1], ..CONV };
    assert_eq!(wide.check().unwrap(), [2, 1]);
    let small = Conv { input: [1, 1], output: [1, 1], kernel: [5, 5], stride: [9, 9], ..CONV };
    assert_eq!(small.check().unwrap(), [3, 3]);
}
