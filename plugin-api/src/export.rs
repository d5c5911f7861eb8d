//! From a trait implementation to an exported library: requests, panics and errors.

use crate::abi::{ABI_VERSION, Log, PluginModule, PluginModuleRef};
use crate::describe::{Descriptor, Kind, Plugin};
use crate::encoder::EncoderRequest;
use crate::graph::BuildError;
use crate::loss::LossRequest;
use crate::optimizer::{OptimizerRequest, ScalarsRequest};
use crate::scheduler::ScheduleRequest;
use abi_stable::prefix_type::PrefixTypeTrait;
use abi_stable::std_types::{RResult, RStr, RString};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Once, OnceLock};

/// What the host may ask. Requests are only ever appended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    Loss(LossRequest),
    Optimizer(OptimizerRequest),
    Scalars(ScalarsRequest),
    Encoder(EncoderRequest),
    Schedule(ScheduleRequest),
}

impl Request {
    pub(crate) fn refused_by<E: Entry>(&self) -> BuildError {
        let asked = match self {
            Request::Loss(_) => "a loss",
            Request::Optimizer(_) | Request::Scalars(_) => "an optimizer",
            Request::Encoder(_) => "an encoder",
            Request::Schedule(_) => "a scheduler",
        };
        BuildError::new(format!("`{}` is a plugin of kind {}, it was asked as {asked}", E::Plugin::ID, E::KIND))
    }
}

/// One kind of plugin as the boundary sees it.
pub trait Entry {
    type Plugin: Plugin;
    const KIND: Kind;
    /// [`crate::loss::Loss::HELD_CONSTANT`]; none for other kinds.
    const HELD_CONSTANT: Option<&'static str> = None;
    fn answer(request: Request) -> Result<String, BuildError>;
}

/// A plugin's settings from JSON; the error names the field.
pub(crate) fn config<P: Plugin>(value: &serde_json::Value) -> Result<P::Config, BuildError> {
    P::Config::deserialize(value).map_err(|e| BuildError::new(format!("settings of `{}`: {e}", P::ID)))
}

pub(crate) fn to_json(value: &impl Serialize) -> Result<String, BuildError> {
    serde_json::to_string(value).map_err(|e| BuildError::new(format!("the answer could not be written: {e}")))
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Sends a line to the host's log (level 1 error … 5 trace); before the host has connected it, nowhere.
pub fn log(level: u8, text: &str) {
    if let Some(log) = LOG.get() {
        (log.line)(level, RStr::from_str(text));
    }
}

extern "C" fn set_log(log: Log) {
    // A second host in one process keeps the first one's log.
    let _ = LOG.set(log);
    keep_panics_quiet();
}

thread_local! {
    /// Whether this thread is inside [`guard`].
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    /// Where the newest guarded panic happened.
    static PLACE: Cell<Option<String>> = const { Cell::new(None) };
}

/// Has a guarded panic remember its place instead of printing it: the host tells it as an error. A library has a standard
/// library of its own, and so a panic hook that the host's does not reach.
fn keep_panics_quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| match GUARDED.get() {
            true => PLACE.set(panic.location().map(ToString::to_string)),
            false => before(panic),
        }));
    });
}

/// The version of the plugin's crate, set by [`crate::export_plugin`].
pub trait Versioned: Entry {
    const VERSION: &'static str;
}

extern "C" fn describe<V: Versioned>() -> RResult<RString, RString> {
    guard(|| {
        let descriptor = Descriptor::of::<V::Plugin>(V::KIND, V::VERSION);
        to_json(&Descriptor { held_constant: V::HELD_CONSTANT.map(Into::into), ..descriptor })
    })
}

extern "C" fn answer<E: Entry>(request: RStr<'_>) -> RResult<RString, RString> {
    guard(|| {
        let request = serde_json::from_str(request.as_str()).map_err(|e| {
            BuildError::new(format!("the request is not one that this plugin (ABI {ABI_VERSION}) knows: {e}"))
        })?;
        E::answer(request)
    })
}

/// Runs plugin code so that neither an error nor a panic leaves it as anything but text.
fn guard(f: impl FnOnce() -> Result<String, BuildError>) -> RResult<RString, RString> {
    let outer = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    GUARDED.set(outer);
    match result {
        Ok(Ok(text)) => RResult::ROk(text.into()),
        Ok(Err(error)) => RResult::RErr(error.to_string().into()),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|s| s.to_string());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            let place = PLACE.take().map(|place| format!(" (at {place})")).unwrap_or_default();
            RResult::RErr(format!("the plugin panicked: {text}{place}").into())
        }
    }
}

/// The table of functions of a plugin.
pub fn module<V: Versioned>() -> PluginModuleRef {
    PluginModule { abi_version: ABI_VERSION, describe: describe::<V>, answer: answer::<V>, set_log }.leak_into_prefix()
}

/// Exports a plugin from its crate: `export_plugin!(loss, MyLoss);` — or `optimizer`, `encoder`, `scheduler`.
///
/// A library holds one plugin. A crate that others also link as a library puts the line behind a feature, because two
/// exports in one program collide.
#[macro_export]
macro_rules! export_plugin {
    (loss, $plugin:ty) => { $crate::export_plugin!(@ $crate::loss::LossEntry<$plugin>); };
    (optimizer, $plugin:ty) => { $crate::export_plugin!(@ $crate::optimizer::OptimizerEntry<$plugin>); };
    (encoder, $plugin:ty) => { $crate::export_plugin!(@ $crate::encoder::EncoderEntry<$plugin>); };
    (scheduler, $plugin:ty) => { $crate::export_plugin!(@ $crate::scheduler::SchedulerEntry<$plugin>); };
    (@ $entry:ty) => {
        const _: () = {
            struct Exported;
            impl $crate::export::Entry for Exported {
                type Plugin = <$entry as $crate::export::Entry>::Plugin;
                const KIND: $crate::describe::Kind = <$entry as $crate::export::Entry>::KIND;
                const HELD_CONSTANT: Option<&'static str> = <$entry as $crate::export::Entry>::HELD_CONSTANT;
                fn answer(request: $crate::export::Request) -> Result<String, $crate::graph::BuildError> {
                    <$entry as $crate::export::Entry>::answer(request)
                }
            }
            impl $crate::export::Versioned for Exported {
                const VERSION: &'static str = env!("CARGO_PKG_VERSION");
            }
            extern "C" fn root_module() -> $crate::abi_stable::library::RootModuleResult {
                $crate::abi_stable::library::__call_root_module_loader($crate::export::module::<Exported>)
            }
            // SAFETY: the constructor returns the very module type that the header is made for; the symbol's name is
            // abi_stable's own and is exported once for each library.
            #[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
            pub static ROOT: $crate::abi_stable::library::LibHeader = unsafe {
                $crate::abi_stable::library::LibHeader::from_constructor::<$crate::abi::PluginModuleRef>(
                    root_module,
                    $crate::abi_stable::library::CheckTypeLayout::Yes,
                )
            };
        };
    };
}

#[cfg(test)]
mod tests {
    /// The symbol that the macro spells out is the one that abi_stable looks for.
    #[test]
    fn exported_symbol_is_abi_stables() {
        assert_eq!(abi_stable::library::ROOT_MODULE_LOADER_NAME, "_1as_0lib_1header_0root_bmodule_bloader");
    }
}
