//! The golden numbers again, with the GPU's kernels on the emulator.

#[path = "replay.rs"]
mod replay;
