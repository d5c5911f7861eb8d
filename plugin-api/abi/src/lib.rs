//! The binary boundary: a frozen table of three functions that exchange UTF-8 text.
//!
//! All functions may be called from any thread, one call at a time for each plugin; strings are owned by the side that
//! made them and are freed through abi_stable's own tables. No function unwinds: a panic is caught inside the plugin.
//!
//! # Versions
//!
//! The table is a crate of its own, because a library carries the version of the crate that its types are from, and
//! libraries of another major version are refused. This one stays 1.0.0 while the plugin API and the host go on:
//!
//! - What is new travels as a new request, which an older plugin refuses by name, or as a new field of a request, which
//!   an older plugin passes over, or of an answer, which is optional to the host. Ops are appended to the IR, which has a
//!   version of its own. All this leaves every built library as good as it was.
//! - Should the table itself have to change, this crate is copied to `abi/v2`, version 2.0.0, with [`ABI_VERSION`] 2. A
//!   host then depends on both, loads libraries of either, and has tests/fixtures/abi to prove it; a host that knows
//!   version 1 only refuses the new ones by their version before it reads anything else of them.

use abi_stable::StableAbi;
use abi_stable::library::RootModule;
use abi_stable::package_version_strings;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RResult, RStr, RString};

/// The version of the table and of the way requests are written: the major version of this crate.
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
    /// The plugin's description of itself as JSON.
    pub describe: extern "C" fn() -> RResult<RString, RString>,
    /// Answers a request in JSON; the error is a sentence for people.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_abi_version_is_the_crates_major_version() {
        assert_eq!(env!("CARGO_PKG_VERSION"), format!("{ABI_VERSION}.0.0"));
    }
}
