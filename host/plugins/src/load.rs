//! From a library file to a checked table of functions.
//!
//! The order of the checks: the file is read and hashed; it is whole; the system opens it; it has the root symbol; its
//! abi_stable and C ABI are ours; its ABI version is ours; its table has our layout, and names our ABI version too; it
//! describes itself. Libraries are never unloaded: what they handed out (functions, statics, thread-local destructors)
//! may be in use until the process ends.

use crate::error::LoadError;
use crate::plugin::Plugin;
use abi_stable::library::{
    AbiHeaderRef, LibHeader, LibraryError, ROOT_MODULE_LOADER_NAME, ROOT_MODULE_LOADER_NAME_WITH_NUL, RootModule,
};
use abi_stable::std_types::{RResult, RStr};
use clip_host_plugin_api::abi::{ABI_VERSION, Log, PluginModuleRef};
use clip_host_plugin_api::describe::Descriptor;
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::path::Path;

thread_local! {
    /// The plugin that this thread is calling: the log callback is one function for all plugins.
    static CALLING: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Runs a call into a plugin so that its log lines carry its name.
pub(crate) fn calling<R>(name: &'static str, call: impl FnOnce() -> R) -> R {
    let before = CALLING.replace(Some(name));
    let result = call();
    CALLING.set(before);
    result
}

/// A plugin's log line becomes a `tracing` event with the target `plugin`.
extern "C" fn forward(level: u8, text: RStr<'_>) {
    // A subscriber that panics must not unwind into the plugin: that would end the process.
    let _ = std::panic::catch_unwind(|| {
        let (plugin, text) = (CALLING.get().unwrap_or("?"), text.as_str());
        match level {
            0 | 1 => tracing::error!(target: "plugin", plugin, "{text}"),
            2 => tracing::warn!(target: "plugin", plugin, "{text}"),
            3 => tracing::info!(target: "plugin", plugin, "{text}"),
            4 => tracing::debug!(target: "plugin", plugin, "{text}"),
            _ => tracing::trace!(target: "plugin", plugin, "{text}"),
        }
    });
}

/// A file's bytes and their SHA-256 in lower-case hexadecimal.
pub(crate) struct Contents {
    pub bytes: Vec<u8>,
    pub sha256: String,
}

/// Reads a library file.
pub(crate) fn read(file: &Path) -> Result<Contents, LoadError> {
    let bytes = std::fs::read(file).map_err(|error| LoadError::Unreadable { file: file.into(), error })?;
    let sha256 = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Contents { bytes, sha256 })
}

impl Contents {
    /// Whether the file names the root symbol. A library without it is no plugin, and a scan then has no reason to open
    /// it, which would run its initialisers.
    pub(crate) fn may_be_plugin(&self) -> bool {
        memchr::memmem::find(&self.bytes, ROOT_MODULE_LOADER_NAME.as_bytes()).is_some()
    }

    /// How long an ELF file would have to be, if it is shorter: a copy that was cut. The system maps such a file all the
    /// same, and the process dies of SIGBUS at the first touch of what is not there. None for whole files and for other
    /// formats, whose loaders check by themselves.
    fn cut(&self) -> Option<u64> {
        let bytes = &self.bytes;
        // 64 bits, little-endian.
        if !bytes.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        let number = |at: u64, width: usize| -> Option<u64> {
            let at = usize::try_from(at).ok()?;
            let mut number = [0; 8];
            number[..width].copy_from_slice(bytes.get(at..at.checked_add(width)?)?);
            Some(u64::from_le_bytes(number))
        };
        const HEADER: u64 = 64;
        let needed = || -> Option<u64> {
            let (table, entry, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
            let mut needed = table.saturating_add(entry * count);
            for i in 0..count {
                // Offset and size of a segment in the file; a table that is cut ends the search.
                let header = table.saturating_add(i * entry);
                let (Some(offset), Some(size)) =
                    (number(header.saturating_add(8), 8), number(header.saturating_add(32), 8))
                else {
                    break;
                };
                needed = needed.max(offset.saturating_add(size));
            }
            Some(needed)
        };
        let needed = needed().unwrap_or(HEADER);
        (needed > bytes.len() as u64).then_some(needed)
    }
}

/// Loads the plugin in `file`. Blocks for a few milliseconds; the library stays in memory for good.
pub fn load(file: &Path) -> Result<Plugin, LoadError> {
    let contents = read(file)?;
    open(file, contents)
}

/// Loads a file that was read and hashed.
pub(crate) fn open(file: &Path, contents: Contents) -> Result<Plugin, LoadError> {
    if let Some(needed) = contents.cut() {
        let message = format!("{} of {needed} bytes: the file is cut short", contents.bytes.len());
        return Err(LoadError::NotALibrary { file: file.into(), message });
    }
    // A bare file name would make the system search its library path instead of the working folder.
    let path = file.canonicalize().map_err(|error| LoadError::Unreadable { file: file.into(), error })?;
    let module = module(&path).map_err(|error| error.into_load_error(file))?;
    if module.abi_version() != ABI_VERSION {
        return Err(LoadError::OtherAbi { file: file.into(), expected: ABI_VERSION, got: module.abi_version() });
    }
    (module.set_log())(Log { line: forward });
    let descriptor = describe(module).map_err(|message| LoadError::Describe { file: file.into(), message })?;
    Ok(Plugin::new(descriptor, file.into(), contents.sha256, module.answer()))
}

/// What stands in the way of a library's function table.
enum Obstacle {
    NotALibrary(String),
    NoPlugin,
    OtherAbi(u32),
    Library(LibraryError),
}

impl Obstacle {
    fn into_load_error(self, file: &Path) -> LoadError {
        let file = file.to_path_buf();
        let error = match self {
            Obstacle::NotALibrary(message) => return LoadError::NotALibrary { file, message },
            Obstacle::NoPlugin => return LoadError::NoPlugin { file },
            Obstacle::OtherAbi(got) => return LoadError::OtherAbi { file, expected: ABI_VERSION, got },
            Obstacle::Library(error) => error,
        };
        let got = match &error {
            LibraryError::InvalidAbiHeader(found) => {
                format!("one made by another abi_stable (its ABI {}.{})", found.abi_major, found.abi_minor)
            }
            LibraryError::InvalidCAbi { .. } => "one whose compiler passes values differently".into(),
            LibraryError::AbiInstability(_) => "one with other fields or types".into(),
            LibraryError::RootModule { err, .. } => {
                let message = format!("no function table: {}", one_line(&err.to_string()));
                return LoadError::Describe { file, message };
            }
            other => one_line(&other.to_string()),
        };
        LoadError::Layout { file, got, details: error.to_string() }
    }
}

/// abi_stable frames its messages with newlines.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Opens a library and checks its table's layout.
///
/// This is `lib_header_from_path(path)?.check_layout()` with errors told apart. Not `load_from_file`, which caches one
/// module for each *type* and so returns the first plugin for every path.
fn module(path: &Path) -> Result<PluginModuleRef, Obstacle> {
    // SAFETY: opening runs the library's initialisers. The user chose the file or the folder to take plugins from, as
    // with any program that he installs; a Rust cdylib has no initialisers but the standard library's.
    let library = unsafe { libloading::Library::new(path) }.map_err(|error| Obstacle::NotALibrary(cause(&error)))?;
    // Leaked even when refused: a library whose code ran once may have left thread-local destructors behind.
    let library = Box::leak(Box::new(library));
    // SAFETY: the symbol is a static `LibHeader` that begins with an `AbiHeader`; its address is what a reference to it
    // holds. `upgrade` checks the magic bytes and the version in that header before it reads anything behind it.
    let header = unsafe { library.get::<AbiHeaderRef>(ROOT_MODULE_LOADER_NAME_WITH_NUL.as_bytes()) };
    let header: AbiHeaderRef = *header.map_err(|_| Obstacle::NoPlugin)?;
    let library = header.upgrade().map_err(Obstacle::Library)?;
    match abi_version(library) {
        Some(got) if got != ABI_VERSION => Err(Obstacle::OtherAbi(got)),
        _ => library.check_layout::<PluginModuleRef>().map_err(Obstacle::Library),
    }
}

/// The ABI version of a library, before anything is known of its table: the major version of the crate that the table is
/// from, which stands in the header. None if the header is not that of such a table (the ABI begins with version 1); the
/// layout's check then tells what it is.
fn abi_version(library: &LibHeader) -> Option<u32> {
    let header = library.root_mod_consts();
    let ours = header.base_name().as_str() == PluginModuleRef::BASE_NAME;
    let version = header.version_strings().parsed().ok()?.major;
    (ours && version > 0).then_some(version)
}

/// The system's own words.
fn cause(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}

fn describe(module: PluginModuleRef) -> Result<Descriptor, String> {
    let text = match (module.describe())() {
        RResult::ROk(text) => text,
        RResult::RErr(message) => return Err(message.into_string()),
    };
    let descriptor: Descriptor =
        serde_json::from_str(&text).map_err(|error| format!("text that is not a description ({error})"))?;
    let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if descriptor.id.is_empty() || !descriptor.id.chars().all(valid) {
        return Err(format!("the id `{}`, where only lower-case letters, digits and `_` are allowed", descriptor.id));
    }
    if !descriptor.schema.is_object() {
        return Err("a schema of the settings that is not an object".into());
    }
    Ok(descriptor)
}
