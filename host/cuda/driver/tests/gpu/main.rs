//! What needs a GPU. On a machine without one each test prints why it is skipped, and checks that the error says what is
//! missing.

mod blas;
mod device;
mod dnn;
mod stand_in;

use clip_host_cuda_driver::{CudaError, Device, DeviceMemory, Element};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The GPU, for one test at a time: a capture allows no other work on it. Nothing where there is none.
pub fn gpu(test: &str) -> Option<(MutexGuard<'static, ()>, Device)> {
    static GPU: Mutex<()> = Mutex::new(());
    let alone = GPU.lock().unwrap_or_else(PoisonError::into_inner);
    match Device::open(0) {
        Ok(device) => {
            println!("{test}: {} {:?}", device.name(), device.compute_capability());
            Some((alone, device))
        }
        Err(error) => {
            println!("{test}: SKIPPED: {error}");
            match &error {
                CudaError::Library { library, looked_in, .. } => {
                    assert_eq!(library, "libcuda.so.1");
                    assert!(looked_in.iter().any(|place| place.starts_with("the loader's path (")), "{looked_in:?}");
                }
                CudaError::NoDevice { index: 0, count: 0 } => {}
                // A driver that is there and does not work is no reason to skip.
                other => panic!("{other}"),
            }
            None
        }
    }
}

/// Numbers from a seed (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Uniform in -1 to 1.
    pub fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    pub fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }
}

/// The bytes of numbers, as the device has them.
pub fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

pub fn numbers(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect()
}

/// A number as the element has it, rounded to nearest, ties to even.
pub fn rounded(number: f32, element: Element) -> f32 {
    decode(&encode(&[number], element), element)[0]
}

/// Numbers in device memory's form.
pub fn encode(numbers: &[f32], element: Element) -> Vec<u8> {
    match element {
        Element::F32 => bytes(numbers),
        Element::Bf16 => numbers.iter().flat_map(|number| bf16(*number).to_le_bytes()).collect(),
        Element::F16 => numbers.iter().flat_map(|number| f16(*number).to_le_bytes()).collect(),
    }
}

/// Numbers from device memory's form.
pub fn decode(bytes: &[u8], element: Element) -> Vec<f32> {
    let halves = || bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]]));
    match element {
        Element::F32 => numbers(bytes),
        Element::Bf16 => halves().map(|bits| f32::from_bits(u32::from(bits) << 16)).collect(),
        Element::F16 => halves().map(from_f16).collect(),
    }
}

fn bf16(number: f32) -> u16 {
    let bits = number.to_bits();
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// For numbers that are normal in half precision, or zero: those of these tests, except the smallest.
fn f16(number: f32) -> u16 {
    let bits = number.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    // Below the smallest normal number: to zero.
    if number.abs() < 2.0_f32.powi(-14) {
        return sign;
    }
    let magnitude = (bits & 0x7fff_ffff) - (112 << 23);
    sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) as u16
}

fn from_f16(bits: u16) -> f32 {
    let (sign, exponent, mantissa) = (u32::from(bits >> 15), u32::from(bits >> 10 & 31), u32::from(bits & 1023));
    let magnitude = match exponent {
        0 => mantissa as f32 * 2.0_f32.powi(-24),
        31 => f32::INFINITY,
        _ => f32::from_bits((exponent + 112) << 23 | mantissa << 13),
    };
    if sign == 1 { -magnitude } else { magnitude }
}

#[test]
fn half_precision_numbers_survive() {
    for number in [0.0, 1.0, -1.5, 0.333_251_95, 65504.0, -6.103_515_6e-5, 1.0 - 2.0_f32.powi(-11)] {
        assert_eq!(rounded(number, Element::F16), number, "f16");
    }
    assert_eq!(rounded(1.0 + 2.0_f32.powi(-11), Element::F16), 1.0, "a tie goes to even");
    assert_eq!(rounded(1.0 + 3.0 * 2.0_f32.powi(-11), Element::F16), 1.0 + 2.0_f32.powi(-9), "a tie goes to even");
    assert_eq!(rounded(1.0 + 2.0_f32.powi(-8), Element::Bf16), 1.0, "a tie goes to even");
    assert_eq!(rounded(-3.140_625, Element::Bf16), -3.140_625);
}

/// Device memory with these numbers in it.
pub fn uploaded(device: &Device, numbers: &[f32], element: Element) -> DeviceMemory {
    let memory = device.alloc(numbers.len() * element.bytes()).unwrap();
    device.upload(memory.address(), &encode(numbers, element)).unwrap();
    memory
}

/// The numbers in device memory.
pub fn downloaded(device: &Device, memory: &DeviceMemory, element: Element) -> Vec<f32> {
    let mut bytes = vec![0; memory.bytes()];
    device.download(memory.address(), &mut bytes).unwrap();
    decode(&bytes, element)
}

/// Checks numbers against what they should be, give or take: the first that is off is told.
pub fn close(what: &str, got: &[f32], expected: &[f64], tolerance: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let (error, allowed) = ((f64::from(*got) - expected).abs(), tolerance(index));
        // Written so that a NaN fails.
        assert!(
            error <= allowed,
            "{what}, element {index}: expected {expected}, got {got}, off by {error} > {allowed}"
        );
    }
}
