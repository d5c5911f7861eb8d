//! What runs work: a GPU, or in tests an emulator on the host.

use crate::launch::{Convolution, Function, Launch, Product};
use crate::library::Libraries;
use std::fmt::Debug;
use thiserror::Error;

/// Why a machine could not do what it was asked.
#[derive(Debug, Error)]
#[error("{what} failed: {why}")]
pub struct MachineError {
    /// What was attempted.
    pub what: String,
    /// The cause, with a hint where there is one.
    pub why: String,
}

impl MachineError {
    /// An error from any cause.
    pub fn new(what: impl Into<String>, why: impl ToString) -> MachineError {
        MachineError { what: what.into(), why: why.to_string() }
    }
}

/// The result of a machine's call.
pub type Result<T> = std::result::Result<T, MachineError>;

/// A function made ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle(pub usize);

/// A recorded sequence of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Recording(pub usize);

/// Memory and work in one stream: everything happens in the order of the calls. Launches may still be under way when a call
/// returns; [`Machine::download`] and [`Machine::synchronize`] wait for them.
pub trait Machine: Libraries + Send + Sync + Debug {
    /// For people: the device's name.
    fn name(&self) -> String;

    /// Takes memory, filled with zeros, at a multiple of 256 bytes.
    fn alloc(&self, bytes: usize) -> Result<u64>;

    /// Gives memory back that [`Machine::alloc`] gave.
    fn free(&self, address: u64);

    /// Writes host bytes to memory. The bytes may be changed once the call returns.
    fn upload(&self, address: u64, bytes: &[u8]) -> Result<()>;

    /// Begins to copy bytes to memory beside the stream, through page-locked memory of the slot's own; the bytes may be changed
    /// once the call returns. There are two slots.
    fn send(&self, slot: usize, address: u64, bytes: &[u8]) -> Result<()>;

    /// Makes later work wait until what was sent through the slot has arrived.
    fn receive(&self, slot: usize) -> Result<()>;

    /// Notes that the work enqueued so far is the last to read what the slot sent: the next copy into it waits for that.
    fn release(&self, slot: usize) -> Result<()>;

    /// Reads memory, after all work before.
    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()>;

    /// Compiles functions. Those that are known already are not compiled again.
    fn load(&self, functions: &[Function]) -> Result<Vec<Handle>>;

    /// Enqueues a launch; `arguments` are the addresses of the launch's arguments.
    fn launch(&self, function: Handle, launch: &Launch, arguments: &[u64]) -> Result<()>;

    /// Enqueues a library's product.
    fn multiply(&self, product: &Product, arguments: &[u64]) -> Result<()>;

    /// Enqueues a library's convolution.
    fn convolve(&self, convolution: &Convolution, arguments: &[u64]) -> Result<()>;

    /// Waits for all work.
    fn synchronize(&self) -> Result<()>;

    /// From now on records work instead of doing it. `false` if the machine cannot.
    fn begin_recording(&self) -> Result<bool>;

    /// Ends the recording.
    fn end_recording(&self) -> Result<Recording>;

    /// Does recorded work.
    fn replay(&self, recording: Recording) -> Result<()>;

    /// Forgets recorded work, with the memory that it keeps.
    fn forget(&self, recording: Recording);

    /// Milliseconds that each piece of work takes, measured on the device between calls of this function: it notes a
    /// moment in the stream. [`Machine::moments`] gives them.
    fn note_moment(&self) -> Result<()>;

    /// Milliseconds of the noted moments since the first one; forgets them.
    fn moments(&self) -> Result<Vec<f64>>;
}
