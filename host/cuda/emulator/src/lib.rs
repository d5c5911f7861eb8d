//! Rendered CUDA C, compiled by the host's C++ compiler and run on the CPU: barriers, warps and all. It is slow and needs a
//! C++ compiler, so it is for tests: what the GPU would compute is checked where there is none.
//!
//! Each launch sees its arguments through copies with poisoned margins. A kernel that reads or writes outside what its
//! launch declares, or leaves a part of a result unwritten, is found at once.
//!
//! A GPU runs threads and blocks in no order. [`Emulator::in_other_orders`] therefore repeats launches with other orders of
//! blocks and of a block's threads, and other poison: results that differ in any byte are a race, or come from memory that
//! nobody wrote.

mod launch;
mod products;

use clip_host_cuda::launch::{Convolution, Function, Launch, Product, Work};
use clip_host_cuda::library::{Libraries, Ready};
use clip_host_cuda::machine::{Handle, Machine, MachineError, Recording, Result};
use clip_host_cuda::render::PRELUDE;
use clip_host_cuda_driver::blas::Gemm;
use clip_host_cuda_driver::compile;
use clip_host_cuda_driver::dnn::Conv;
use libloading::Library;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// What is nobody's: as f32, bf16 and f16 not a number, as an id -1.
const POISON: u8 = 0xff;

/// Compute capabilities in the variable `CLIP_HOST_EMULATOR_ARCHS`, as `80,90`: NVRTC compiles every kernel for them too.
fn archs() -> Result<Vec<(u32, u32)>> {
    let text = std::env::var("CLIP_HOST_EMULATOR_ARCHS").unwrap_or_default();
    let number = |part: &str| {
        let number: u32 = part.trim().parse().map_err(|_| {
            MachineError::new("reading CLIP_HOST_EMULATOR_ARCHS", format!("expected numbers such as 80,90, got {text}"))
        })?;
        Ok((number / 10, number % 10))
    };
    text.split(',').filter(|part| !part.trim().is_empty()).map(number).collect()
}

/// Which launches run in other orders as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Orders {
    #[default]
    Ascending,
    /// The first launch of each function and grid.
    First,
    /// Every launch.
    Every,
}

/// Which launches the variable `CLIP_HOST_EMULATOR_ORDERS` asks for: with `1`, every one.
fn orders() -> Orders {
    match std::env::var("CLIP_HOST_EMULATOR_ORDERS").is_ok_and(|v| v == "1") {
        true => Orders::Every,
        false => Orders::Ascending,
    }
}

/// The host as a GPU.
#[derive(Debug)]
pub struct Emulator {
    compiler: String,
    /// Whether it stands in for the vendor's libraries too.
    libraries: bool,
    /// GPUs that every kernel is compiled for as well.
    archs: Vec<(u32, u32)>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Memory by address.
    memory: BTreeMap<u64, Vec<u64>>,
    names: HashMap<String, usize>,
    functions: Vec<Compiled>,
    /// Of the threads of a block, end to end; untouched ones take no memory.
    stacks: Vec<u64>,
    orders: Orders,
    /// Functions and grids that ran in other orders.
    reordered: HashSet<(usize, [u32; 3])>,
    moments: Vec<Instant>,
    recording: Option<Vec<Recorded>>,
    recordings: Vec<Vec<Recorded>>,
}

/// Work with its function and the addresses of its arguments.
type Recorded = (Handle, Work, Vec<u64>);

#[derive(Debug)]
struct Compiled {
    name: String,
    entry: launch::Entry,
    run: launch::Run,
    /// First byte of its shared memory, and one past the last.
    shared: [usize; 2],
    _library: Arc<Library>,
}

impl Emulator {
    /// The emulator; an error that says what is missing.
    ///
    /// # Errors
    /// If there is no C++ compiler (`CXX`, else `c++`), or the processor is not an x86-64.
    pub fn new() -> Result<Emulator> {
        if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
            return Err(MachineError::new("starting the emulator", "it runs on x86-64 Linux only"));
        }
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        match Command::new(&compiler).arg("--version").output() {
            Ok(output) if output.status.success() => {
                let state = Mutex::new(State { orders: orders(), ..State::default() });
                Ok(Emulator { compiler, libraries: true, archs: archs()?, state })
            }
            _ => {
                let why = format!("`{compiler}` does not run (hint: install a C++ compiler or set CXX)");
                Err(MachineError::new("starting the emulator", why))
            }
        }
    }

    /// The emulator of a machine without the vendor's libraries: every kernel is rendered.
    pub fn without_libraries(self) -> Emulator {
        Emulator { libraries: false, ..self }
    }

    /// The first launch of each function and grid runs in other orders as well; with `CLIP_HOST_EMULATOR_ORDERS=1` in the
    /// environment every launch does, of any emulator.
    pub fn in_other_orders(self) -> Emulator {
        let state = self.state.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let orders = if state.orders == Orders::Every { Orders::Every } else { Orders::First };
        Emulator { state: Mutex::new(State { orders, ..state }), ..self }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked while it held the lock has failed already.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn compile(&self, functions: &[&Function]) -> Result<Vec<Compiled>> {
        for arch in &self.archs {
            // Many at a time, since all stand on the same.
            for functions in functions.chunks(32) {
                let source = functions.iter().fold(PRELUDE.to_string(), |text, f| text + &f.definition());
                let compiled = compile::compile(&source, *arch, &clip_host_cuda::gpu::OPTIONS);
                compiled.map_err(|e| MachineError::new(format!("compiling for sm_{}{}", arch.0, arch.1), e))?;
            }
        }
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("clip-host-emulator-{}-{number}", std::process::id()));
        let io = |what: &str, e: std::io::Error| MachineError::new(format!("{what} {}", folder.display()), e);
        std::fs::create_dir_all(&folder).map_err(|e| io("making", e))?;
        let compiled = self.compile_in(&folder, functions);
        std::fs::remove_dir_all(&folder).map_err(|e| io("removing", e))?;
        compiled
    }

    fn compile_in(&self, folder: &std::path::Path, functions: &[&Function]) -> Result<Vec<Compiled>> {
        let mut text = include_str!("shim.hpp").to_string();
        text += PRELUDE;
        text += include_str!("after_prelude.hpp");
        for Function { name, text: body, .. } in functions {
            let arguments = body[..body.find("\n{").unwrap_or(0)].matches('*').count();
            let values: Vec<String> = (0..arguments).map(|i| format!("(A{i})a[{i}]")).collect();
            let _ = write!(
                text,
                "\n#undef __shared__\n#define __shared__ static __attribute__((section(\"shared_{name}\")))\n\
                 static void {name}{body}\n"
            );
            // A section's ends have names; it is not there where nothing is shared.
            for (end, symbol) in ["start", "stop"].iter().zip(["begin", "end"]) {
                let _ = write!(
                    text,
                    "extern \"C\" __attribute__((weak, visibility(\"hidden\"))) char __{end}_shared_{name}[];\n\
                     extern \"C\" char *shared_{symbol}_{name}() {{ return __{end}_shared_{name}; }}\n"
                );
            }
            // Argument types are read off the function itself.
            let types: Vec<String> = (0..arguments).map(|i| format!("typename A{i}")).collect();
            let names: Vec<String> = (0..arguments).map(|i| format!("A{i}")).collect();
            let _ = write!(
                text,
                "template <{}> static void call_{name}(void (*f)({}), void **a) {{ f({}); }}\n\
                 extern \"C\" void entry_{name}(void **a) {{ call_{name}({name}, a); }}\n",
                types.join(", "),
                names.join(", "),
                values.join(", ")
            );
        }
        let (source, library) = (folder.join("kernels.cpp"), folder.join("kernels.so"));
        std::fs::write(&source, &text).map_err(|e| MachineError::new("writing kernels", e))?;
        let output = Command::new(&self.compiler)
            .args(["-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", "-o"])
            .arg(&library)
            .arg(&source)
            .output()
            .map_err(|e| MachineError::new("compiling kernels", e))?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            let first: String = errors.lines().take(30).collect::<Vec<_>>().join("\n");
            let kept: PathBuf = std::env::temp_dir().join("clip-host-emulator-failed.cpp");
            let _ = std::fs::copy(&source, &kept);
            return Err(MachineError::new("compiling kernels", format!("{first}\n(the text is {})", kept.display())));
        }
        let missing = |e: libloading::Error| MachineError::new("loading kernels", e);
        // SAFETY: the library is what was compiled just now; it runs nothing when it is loaded.
        let library = Arc::new(unsafe { Library::new(&library) }.map_err(missing)?);
        functions
            .iter()
            .map(|function| {
                // SAFETY: all symbols were written above with these types; the library lives as long as they do.
                let (entry, run, shared) = unsafe {
                    let name = |what: &str| format!("{what}_{}", function.name);
                    let entry = library.get::<launch::Entry>(name("entry").as_bytes()).map_err(missing)?;
                    let end = |what: &str| library.get::<launch::End>(name(what).as_bytes()).map_err(missing);
                    let shared = [end("shared_begin")?() as usize, end("shared_end")?() as usize];
                    (*entry, *library.get::<launch::Run>(b"clip_host_run").map_err(missing)?, shared)
                };
                Ok(Compiled { name: function.name.clone(), entry, run, shared, _library: library.clone() })
            })
            .collect()
    }
}

impl State {
    /// The memory at an address.
    fn slice(&mut self, address: u64, bytes: usize) -> Result<&mut [u8]> {
        let outside = || MachineError::new("a copy", format!("{bytes} bytes at {address:#x} are outside any memory"));
        let (start, block) = self.memory.range_mut(..=address).next_back().ok_or_else(outside)?;
        let offset = (address - start) as usize;
        if offset + bytes > block.len() * 8 {
            return Err(outside());
        }
        // SAFETY: inside the block, as just checked.
        Ok(unsafe { std::slice::from_raw_parts_mut(block.as_mut_ptr().cast::<u8>().add(offset), bytes) })
    }
}

impl Libraries for Emulator {
    fn product(&self, _: &Gemm) -> Option<Ready> {
        // A workspace like the library's, so that its place is checked too.
        self.libraries.then_some(Ready { number: 0, workspace: 512 })
    }

    fn convolution(&self, _: &Conv) -> Option<Ready> {
        self.libraries.then_some(Ready { number: 0, workspace: 256 })
    }
}

impl Machine for Emulator {
    fn name(&self) -> String {
        "the host's emulator".into()
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        let mut state = self.state();
        // Room to start at a multiple of 256.
        let mut block = vec![0u64; (bytes + 256).div_ceil(8)];
        let start = block.as_mut_ptr() as u64;
        state.memory.insert(start, block);
        Ok(start.next_multiple_of(256))
    }

    fn free(&self, address: u64) {
        let mut state = self.state();
        let start = state.memory.range(..=address).next_back().map(|(&start, _)| start);
        if let Some(start) = start {
            state.memory.remove(&start);
        }
    }

    fn upload(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.state().slice(address, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    fn send(&self, _: usize, address: u64, bytes: &[u8]) -> Result<()> {
        self.upload(address, bytes)
    }

    fn receive(&self, _: usize) -> Result<()> {
        Ok(())
    }

    fn release(&self, _: usize) -> Result<()> {
        Ok(())
    }

    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(self.state().slice(address, bytes.len())?);
        Ok(())
    }

    fn load(&self, functions: &[Function]) -> Result<Vec<Handle>> {
        let mut state = self.state();
        let new: Vec<&Function> = functions.iter().filter(|f| !state.names.contains_key(&f.name)).collect();
        if !new.is_empty() {
            for compiled in self.compile(&new)? {
                let number = state.functions.len();
                state.names.insert(compiled.name.clone(), number);
                state.functions.push(compiled);
            }
        }
        Ok(functions.iter().map(|f| Handle(state.names[&f.name])).collect())
    }

    fn launch(&self, function: Handle, launch: &Launch, arguments: &[u64]) -> Result<()> {
        let mut state = self.state();
        if let Some(recording) = &mut state.recording {
            recording.push((function, Work::Launch(launch.clone()), arguments.to_vec()));
            return Ok(());
        }
        state.launch(function, launch, arguments)
    }

    fn multiply(&self, product: &Product, arguments: &[u64]) -> Result<()> {
        let mut state = self.state();
        if let Some(recording) = &mut state.recording {
            recording.push((Handle(product.ready), Work::Product(product.clone()), arguments.to_vec()));
            return Ok(());
        }
        products::multiply(&mut state, product, arguments)
    }

    fn convolve(&self, convolution: &Convolution, arguments: &[u64]) -> Result<()> {
        let mut state = self.state();
        if let Some(recording) = &mut state.recording {
            let work = Work::Convolution(convolution.clone());
            recording.push((Handle(convolution.ready), work, arguments.to_vec()));
            return Ok(());
        }
        products::convolve(&mut state, convolution, arguments)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn begin_recording(&self) -> Result<bool> {
        self.state().recording = Some(vec![]);
        Ok(true)
    }

    fn end_recording(&self) -> Result<Recording> {
        let mut state = self.state();
        let recorded = state.recording.take().ok_or_else(|| MachineError::new("recording", "it was not begun"))?;
        state.recordings.push(recorded);
        Ok(Recording(state.recordings.len() - 1))
    }

    fn replay(&self, recording: Recording) -> Result<()> {
        let mut state = self.state();
        let recorded = state.recordings.get(recording.0).cloned().unwrap_or_default();
        recorded.iter().try_for_each(|(function, work, arguments)| match work {
            Work::Launch(launch) => state.launch(*function, launch, arguments),
            Work::Product(product) => products::multiply(&mut state, product, arguments),
            Work::Convolution(convolution) => products::convolve(&mut state, convolution, arguments),
        })
    }

    fn forget(&self, recording: Recording) {
        if let Some(recorded) = self.state().recordings.get_mut(recording.0) {
            recorded.clear();
        }
    }

    fn note_moment(&self) -> Result<()> {
        self.state().moments.push(Instant::now());
        Ok(())
    }

    fn moments(&self) -> Result<Vec<f64>> {
        let moments = std::mem::take(&mut self.state().moments);
        let first = moments.first().copied();
        Ok(moments.iter().map(|m| first.map_or(0.0, |f| (*m - f).as_secs_f64() * 1e3)).collect())
    }
}
