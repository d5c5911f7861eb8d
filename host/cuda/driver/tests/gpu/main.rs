//! What needs a GPU. On a machine without one each test prints why it is skipped, and checks that the error says what is
//! missing.

mod device;

use clip_host_cuda_driver::{CudaError, Device};
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
