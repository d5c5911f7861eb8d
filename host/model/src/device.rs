//! Where programs run: the same plan on the CPU or on a GPU, behind one face.

use crate::ModelError;
use clip_host_compiler::kernel::Element;
use clip_host_compiler::plan::Plan;
use clip_host_cpu::ThreadPool;
use clip_host_cuda::Machine;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a model lives.
#[derive(Clone, Debug, Default)]
pub enum Device {
    #[default]
    Cpu,
    /// A GPU, or what stands for one in tests.
    Cuda(Arc<dyn Machine>),
}

impl Device {
    /// For people.
    pub fn name(&self) -> String {
        match self {
            Device::Cpu => "CPU".into(),
            Device::Cuda(machine) => machine.name(),
        }
    }
}

/// A device with the threads of the host.
#[derive(Clone)]
pub struct Engine {
    pub device: Device,
    pub pool: Arc<ThreadPool>,
}

impl Engine {
    /// The CPU with so many threads; 0: one for each core.
    pub fn new(device: Device, threads: usize) -> Engine {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        Engine { device, pool: Arc::new(ThreadPool::new(threads)) }
    }
}

/// A model's persistent tensors by name, shared by its programs.
pub(crate) enum Tensors {
    Cpu(clip_host_cpu::Store),
    Cuda(clip_host_cuda::Store),
}

impl Tensors {
    pub(crate) fn new(engine: &Engine) -> Tensors {
        match &engine.device {
            Device::Cpu => Tensors::Cpu(clip_host_cpu::Store::default()),
            Device::Cuda(machine) => Tensors::Cuda(clip_host_cuda::Store::new(machine.clone())),
        }
    }

    /// Makes a tensor (zero) if it is not there, kept as `element`.
    pub(crate) fn entry(&mut self, name: &str, len: usize, element: Element) -> Result<(), ModelError> {
        match self {
            Tensors::Cpu(store) => drop(store.entry_of(name, len, element)),
            Tensors::Cuda(store) => drop(store.entry(name, len, element)?),
        }
        Ok(())
    }

    /// Number of a tensor's elements.
    pub(crate) fn len(&self, name: &str) -> Option<usize> {
        match self {
            Tensors::Cpu(store) => store.elements(name),
            Tensors::Cuda(store) => store.len(name),
        }
    }

    /// A part of a tensor, `None` if it is not there.
    pub(crate) fn read(&self, name: &str, offset: usize, len: usize) -> Result<Option<Cow<'_, [f32]>>, ModelError> {
        Ok(match self {
            Tensors::Cpu(store) => store.values(name, offset..offset + len),
            Tensors::Cuda(store) => store.get(name, offset, len)?.map(Cow::Owned),
        })
    }

    /// Gives a part of a tensor new values, rounded to nearest where it is kept in half precision. What is not there is passed
    /// over.
    pub(crate) fn write(&mut self, name: &str, offset: usize, values: &[f32]) -> Result<(), ModelError> {
        self.fill(name, offset, values.len(), |part| part.copy_from_slice(values))
    }

    /// As [`Tensors::write`], in place where that can be: `f` gets zeros or the old values, and writes all.
    pub(crate) fn fill(
        &mut self,
        name: &str,
        offset: usize,
        len: usize,
        f: impl FnOnce(&mut [f32]),
    ) -> Result<(), ModelError> {
        match self {
            Tensors::Cpu(store) => {
                if let Some(part) = store.get_mut(name).and_then(|s| s.get_mut(offset..offset + len)) {
                    f(part);
                } else if store.elements(name).is_some_and(|elements| offset + len <= elements) {
                    let mut values = vec![0.0; len];
                    f(&mut values);
                    store.set(name, offset, &values);
                }
            }
            Tensors::Cuda(store) if store.has(name) => {
                let mut values = vec![0.0; len];
                f(&mut values);
                store.set(name, offset, &values)?;
            }
            Tensors::Cuda(_) => {}
        }
        Ok(())
    }

    /// Bytes of all tensors.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Tensors::Cpu(store) => store.bytes(),
            Tensors::Cuda(store) => store.bytes(),
        }
    }
}

/// A plan made ready on a device.
pub(crate) enum Runner {
    Cpu(Box<clip_host_cpu::Executor>),
    Cuda(Box<OnGpu>),
}

/// A GPU's program, with the times that the CPU's keeps itself.
pub(crate) struct OnGpu {
    executor: clip_host_cuda::Executor,
    /// Which of `phases` each kernel counts in.
    phase_of: Vec<usize>,
    phases: [f64; 3],
    /// Seconds of each kernel over all runs, if they are measured.
    total: Option<Vec<f64>>,
    spans: Vec<(Instant, Instant)>,
    began: Instant,
}

impl Runner {
    /// Prepares a plan; persistent leaves are found in, or added to, the tensors.
    pub(crate) fn new(plan: Plan, engine: &Engine, tensors: &mut Tensors) -> Result<Runner, ModelError> {
        Ok(match (&engine.device, tensors) {
            (Device::Cpu, Tensors::Cpu(store)) => {
                Runner::Cpu(Box::new(clip_host_cpu::Executor::new(plan, engine.pool.clone(), store)?))
            }
            (Device::Cuda(machine), Tensors::Cuda(store)) => {
                let kernels = plan.kernels.len();
                let executor = clip_host_cuda::Executor::new(plan, machine.clone(), store)?;
                let phase_of = vec![0; kernels];
                let (phases, began) = ([0.0; 3], Instant::now());
                Runner::Cuda(Box::new(OnGpu { executor, phase_of, phases, total: None, spans: vec![], began }))
            }
            _ => return Err(clip_host_cpu::ExecuteError::Store.into()),
        })
    }

    pub(crate) fn plan(&self) -> &Plan {
        match self {
            Runner::Cpu(executor) => executor.plan(),
            Runner::Cuda(on) => on.executor.plan(),
        }
    }

    /// Fills an f32 input; one that the program does not read is passed over.
    pub(crate) fn set_f32(&mut self, name: &str, values: &[f32]) -> Result<(), ModelError> {
        match self {
            Runner::Cpu(executor) => Ok(executor.set_f32(name, values)?),
            Runner::Cuda(on) => Ok(on.executor.set_f32(name, values)?),
        }
    }

    /// Fills an i32 input; one that the program does not read is passed over.
    pub(crate) fn set_i32(&mut self, name: &str, values: &[i32]) -> Result<(), ModelError> {
        match self {
            Runner::Cpu(executor) => Ok(executor.set_i32(name, values)?),
            Runner::Cuda(on) => Ok(on.executor.set_i32(name, values)?),
        }
    }

    /// Fills an input of images with their pixels `[batch, size, size, 3]`, normalised by looking their levels up.
    /// Without pixels, those that were sent ahead are taken.
    pub(crate) fn set_pixels(
        &mut self,
        name: &str,
        pixels: Option<&[u8]>,
        levels: &[[f32; 256]; 3],
    ) -> Result<(), ModelError> {
        match self {
            Runner::Cpu(executor) => {
                let Some(pixels) = pixels else { return Err(sent_to_cpu(name)) };
                let Some([n, 3, height, width]) = executor.input_shape(name) else { return Ok(()) };
                let plane = height * width;
                let mut images = vec![0.0; n * 3 * plane];
                for (at, pixel) in pixels.chunks_exact(3).enumerate().take(n * plane) {
                    for (channel, &level) in pixel.iter().enumerate() {
                        images[(at / plane * 3 + channel) * plane + at % plane] = levels[channel][usize::from(level)];
                    }
                }
                Ok(executor.set_f32(name, &images)?)
            }
            Runner::Cuda(on) => Ok(on.executor.set_pixels(name, pixels, levels)?),
        }
    }

    /// Begins to copy the coming run's pixels to a GPU.
    pub(crate) fn send_pixels(&mut self, name: &str, pixels: &[u8]) -> Result<(), ModelError> {
        match self {
            Runner::Cpu(_) => Err(sent_to_cpu(name)),
            Runner::Cuda(on) => Ok(on.executor.send_pixels(name, pixels)?),
        }
    }

    /// Begins to run the program; on the CPU, runs it.
    pub(crate) fn start(&mut self, tensors: &mut Tensors, seed: u64) -> Result<(), ModelError> {
        match (self, tensors) {
            (Runner::Cpu(executor), Tensors::Cpu(store)) => Ok(executor.run(store, seed)?),
            (Runner::Cuda(on), Tensors::Cuda(_)) => on.start(seed),
            _ => Err(clip_host_cpu::ExecuteError::Store.into()),
        }
    }

    /// Waits for what [`Runner::start`] began.
    pub(crate) fn finish(&mut self) -> Result<(), ModelError> {
        match self {
            Runner::Cpu(_) => Ok(()),
            Runner::Cuda(on) => on.finish(),
        }
    }

    /// Runs the program once. `seed` drives its random numbers.
    pub(crate) fn run(&mut self, tensors: &mut Tensors, seed: u64) -> Result<(), ModelError> {
        self.start(tensors, seed)?;
        self.finish()
    }

    /// A result of the last run, contiguous; `None` if there is none of this name.
    pub(crate) fn output(&self, tensors: &Tensors, name: &str) -> Result<Option<Vec<f32>>, ModelError> {
        match (self, tensors) {
            (Runner::Cpu(executor), Tensors::Cpu(store)) => Ok(executor.output(store, name)),
            (Runner::Cuda(on), _) => Ok(on.executor.output(name)?),
            _ => Err(clip_host_cpu::ExecuteError::Store.into()),
        }
    }

    /// Says which phase each kernel belongs to.
    pub(crate) fn set_phases(&mut self, of: Vec<usize>) {
        match self {
            Runner::Cpu(executor) => executor.set_phases(of),
            Runner::Cuda(on) => on.phase_of = of,
        }
    }

    /// Seconds of the last run, by phase; on a GPU only if kernels are measured.
    pub(crate) fn phases(&self) -> [f64; 3] {
        match self {
            Runner::Cpu(executor) => executor.phases,
            Runner::Cuda(on) => on.phases,
        }
    }

    /// From now on measures every kernel.
    pub(crate) fn time_kernels(&mut self) {
        match self {
            Runner::Cpu(executor) => executor.time_launches(),
            Runner::Cuda(on) => {
                on.executor.time_kernels();
                on.total = Some(vec![0.0; on.phase_of.len()]);
            }
        }
    }

    /// Seconds that each of the plan's kernels took so far, if they are measured.
    pub(crate) fn timings(&self) -> Option<&[f64]> {
        match self {
            Runner::Cpu(executor) => executor.timings(),
            Runner::Cuda(on) => on.total.as_deref(),
        }
    }

    /// When each of the plan's kernels began and ended in the last run, if they are measured; else empty.
    pub(crate) fn spans(&self) -> &[(Instant, Instant)] {
        match self {
            Runner::Cpu(executor) => executor.spans(),
            Runner::Cuda(on) => &on.spans,
        }
    }
}

/// Nothing is sent ahead to where the images are already.
fn sent_to_cpu(name: &str) -> ModelError {
    clip_host_cpu::ExecuteError::Unknown { what: "GPU to send ahead to, for", name: name.into() }.into()
}

impl OnGpu {
    fn start(&mut self, seed: u64) -> Result<(), ModelError> {
        self.began = Instant::now();
        Ok(self.executor.start(seed)?)
    }

    fn finish(&mut self) -> Result<(), ModelError> {
        self.executor.finish()?;
        let (Some(total), Some(milliseconds)) = (&mut self.total, self.executor.timings()) else { return Ok(()) };
        self.phases = [0.0; 3];
        self.spans.clear();
        // The device's clock has no common start with the host's: kernels are shown one after the other.
        let mut at = self.began;
        for (kernel, ms) in milliseconds.iter().enumerate() {
            let seconds = ms.max(0.0) / 1e3;
            total[kernel] += seconds;
            self.phases[self.phase_of[kernel].min(2)] += seconds;
            let end = at + Duration::from_secs_f64(seconds);
            self.spans.push((at, end));
            at = end;
        }
        Ok(())
    }
}
