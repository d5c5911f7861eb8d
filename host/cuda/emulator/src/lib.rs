//! Rendered CUDA C, compiled by the host's C++ compiler and run on the CPU: barriers, warps and all. It is slow and needs a
//! C++ compiler, so it is for tests: what the GPU would compute is checked where there is none.
//!
//! Each launch sees its arguments through copies with poisoned margins. A kernel that reads or writes outside what its
//! launch declares, or leaves a part of a result unwritten, is found at once.

mod products;

use clip_host_cuda::launch::{Access, Argument, Convolution, Function, Launch, Product, Work};
use clip_host_cuda::library::{Libraries, Ready};
use clip_host_cuda::machine::{Handle, Machine, MachineError, Recording, Result};
use clip_host_cuda::render::PRELUDE;
use clip_host_cuda_driver::blas::Gemm;
use clip_host_cuda_driver::compile;
use clip_host_cuda_driver::dnn::Conv;
use libloading::Library;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// Bytes before and after a launch's view of memory.
const MARGIN: usize = 4096;
/// Bytes of a thread's stack, and the most threads of a block; as in `shim.hpp`.
const STACK: usize = 64 << 10;
const THREADS: usize = 1024;
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

type Entry = unsafe extern "C" fn(*mut *mut u8);
type Run = unsafe extern "C" fn(Entry, *mut *mut u8, *const u32, u32, *mut u8) -> i32;

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
    moments: Vec<Instant>,
    recording: Option<Vec<Recorded>>,
    recordings: Vec<Vec<Recorded>>,
}

/// Work with its function and the addresses of its arguments.
type Recorded = (Handle, Work, Vec<u64>);

#[derive(Debug)]
struct Compiled {
    name: String,
    entry: Entry,
    run: Run,
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
                Ok(Emulator { compiler, libraries: true, archs: archs()?, state: Mutex::default() })
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

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked while it held the lock has failed already.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn compile(&self, functions: &[&Function]) -> Result<Vec<Compiled>> {
        for arch in &self.archs {
            for function in functions {
                let compiled = compile::compile(&function.source(), *arch, &clip_host_cuda::gpu::OPTIONS);
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
            // Argument types are read off the function itself.
            let _ = write!(text, "\nstatic void {name}{body}\n");
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
                // SAFETY: both symbols were written above with these types; the library lives as long as they do.
                let (entry, run) = unsafe {
                    let entry = library.get::<Entry>(format!("entry_{}", function.name).as_bytes()).map_err(missing)?;
                    (*entry, *library.get::<Run>(b"clip_host_run").map_err(missing)?)
                };
                Ok(Compiled { name: function.name.clone(), entry, run, _library: library.clone() })
            })
            .collect()
    }
}

/// Memory that some arguments of a launch share, copied for it.
struct View {
    start: u64,
    end: u64,
    copy: Vec<u64>,
}

impl View {
    fn bytes(&mut self) -> &mut [u8] {
        let len = self.copy.len() * 8;
        // SAFETY: the vector's own memory, as bytes.
        unsafe { std::slice::from_raw_parts_mut(self.copy.as_mut_ptr().cast(), len) }
    }

    /// Where an address lies in the copy: with the same alignment as in memory.
    fn at(&self, address: u64) -> usize {
        MARGIN + (self.start % 256 + address - self.start) as usize
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

    fn launch(&mut self, function: Handle, launch: &Launch, addresses: &[u64]) -> Result<()> {
        let Some(Compiled { name, entry, run, .. }) = self.functions.get(function.0) else {
            return Err(MachineError::new("a launch", "the function is not loaded"));
        };
        let (name, entry, run) = (name.clone(), *entry, *run);
        let mut views: Vec<View> = Vec::new();
        let mut ranges: Vec<(u64, u64)> =
            launch.arguments.iter().zip(addresses).map(|(a, &at)| (at, at + a.bytes as u64)).collect();
        ranges.sort_unstable();
        for (start, end) in ranges {
            match views.last_mut() {
                Some(last) if start < last.end => last.end = last.end.max(end),
                _ => views.push(View { start, end, copy: vec![] }),
            }
        }
        for view in &mut views {
            let bytes = 2 * MARGIN + 256 + (view.end - view.start) as usize;
            view.copy = vec![u64::from_ne_bytes([POISON; 8]); bytes.div_ceil(8) + 32];
        }
        let find = |views: &[View], at: u64| views.iter().position(|v| v.start <= at && at < v.end).unwrap_or(0);
        let arguments: Vec<(&Argument, u64)> = launch.arguments.iter().zip(addresses.iter().copied()).collect();
        for &(argument, at) in arguments.iter().filter(|(a, _)| a.access != Access::Write) {
            let from = self.slice(at, argument.bytes)?.to_vec();
            let number = find(&views, at);
            let view = &mut views[number];
            let start = view.at(at);
            view.bytes()[start..start + from.len()].copy_from_slice(&from);
        }
        let mut pointers: Vec<*mut u8> = Vec::new();
        for &(_, at) in &arguments {
            let number = find(&views, at);
            let view = &mut views[number];
            let start = view.at(at);
            pointers.push(view.bytes()[start..].as_mut_ptr());
        }
        let before: Vec<Vec<u64>> = views.iter().map(|v| v.copy.clone()).collect();
        if self.stacks.is_empty() {
            self.stacks = vec![0; STACK / 8 * THREADS + 8];
        }
        let room = self.stacks.as_mut_ptr() as usize;
        let stacks = self.stacks.as_mut_ptr().cast::<u8>().wrapping_add(room.next_multiple_of(64) - room);
        // SAFETY: the entry takes as many pointers as the launch has arguments; a wild write is found below, if it does
        // not leave the copies altogether.
        if unsafe { run(entry, pointers.as_mut_ptr(), launch.grid.as_ptr(), launch.block[0], stacks) } != 0 {
            return Err(MachineError::new(format!("launching {name}"), "its threads wait for each other forever"));
        }
        for (view, before) in views.iter_mut().zip(before) {
            let mut allowed = vec![false; view.copy.len() * 8];
            for &(argument, at) in arguments.iter().filter(|(a, _)| a.access != Access::Read) {
                if view.start <= at && at < view.end {
                    let start = view.at(at);
                    allowed[start..start + argument.bytes].fill(true);
                }
            }
            let mut old = View { start: view.start, end: view.end, copy: before };
            let (old, new) = (old.bytes(), view.bytes());
            let wild = (0..new.len()).find(|&i| !allowed[i] && old[i] != new[i]);
            if let Some(byte) = wild {
                let why = format!("it wrote byte {byte} of a view of {} bytes, outside its arguments", new.len());
                return Err(MachineError::new(format!("launching {name}"), why));
            }
        }
        for &(argument, at) in arguments.iter().filter(|(a, _)| a.access != Access::Read) {
            let number = find(&views, at);
            let view = &mut views[number];
            let start = view.at(at);
            let new = view.bytes()[start..start + argument.bytes].to_vec();
            let read = |other: &Argument, there: u64| {
                other.access != Access::Write && there < at + argument.bytes as u64 && at < there + other.bytes as u64
            };
            let poisoned = new.chunks_exact(4).position(|word| word == [POISON; 4]);
            if argument.access == Access::Write
                && !arguments.iter().any(|&(other, there)| read(other, there))
                && let Some(word) = poisoned
            {
                return Err(MachineError::new(
                    format!("launching {name}"),
                    format!("it did not write word {word} of a result"),
                ));
            }
            self.slice(at, argument.bytes)?.copy_from_slice(&new);
        }
        Ok(())
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
