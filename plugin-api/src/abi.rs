//! The binary boundary: a frozen table of three functions that exchange UTF-8 text.
//!
//! All functions may be called from any thread, one call at a time for each plugin; strings are owned by the side that
//! made them and are freed through abi_stable's own tables. No function unwinds: a panic is caught inside the plugin.
//! The table is frozen: what is new travels as new requests, which an older plugin refuses by name.

use abi_stable::StableAbi;
use abi_stable::library::RootModule;
use abi_stable::package_version_strings;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RResult, RStr, RString};

/// The version of the table and of the request format.
pub const ABI_VERSION: u32 = 1;

/// Receives a plugin's log lines: level (1 error … 5 trace) and text. The host's function; any thread may call it.
#[repr(C)]
#[derive(Clone, Copy, StableAbi)]
pub struct Log {
    pub line: extern "C" fn(level: u8, text: RStr<'_>),
}

/// What a plugin library exports.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModuleRef)))]
pub struct PluginModule {
    /// [`ABI_VERSION`] of the plugin's build; read before any function is called.
    pub abi_version: u32,
    /// The [`crate::describe::Descriptor`] as JSON.
    pub describe: extern "C" fn() -> RResult<RString, RString>,
    /// Answers a [`crate::export::Request`] in JSON; the error is a sentence for people.
    pub answer: extern "C" fn(request: RStr<'_>) -> RResult<RString, RString>,
    /// Gives the plugin the host's log: a cdylib has a standard library, and so a logger, of its own.
    #[sabi(last_prefix_field)]
    pub set_log: extern "C" fn(log: Log),
}

impl RootModule for PluginModuleRef {
    abi_stable::declare_root_module_statics! {PluginModuleRef}
    const BASE_NAME: &'static str = "clip_host_plugin";
    const NAME: &'static str = "clip-host plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}
