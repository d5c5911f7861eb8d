//! What can go wrong with a plugin. Every message says what was attempted, what was expected and what was got; a last
//! line `hint: …` says what to do about it.

use clip_host_plugin_api::abi::ABI_VERSION;
use clip_host_plugin_api::describe::Kind;
use clip_host_plugin_api::ir::IR_VERSION;
use std::fmt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a file could not be loaded as a plugin.
#[derive(Debug, Error)]
pub enum LoadError {
    /// There is no such file, or it may not be read.
    #[error(
        "cannot read the plugin {}: expected a library file, got: {error}\nhint: check the path in the recipe or in {}",
        file.display(), crate::registry::PATH_VARIABLE
    )]
    Unreadable { file: PathBuf, error: std::io::Error },
    /// The operating system does not open the file as a library.
    #[error(
        "cannot open the plugin {}: expected a dynamic library for this machine ({}-{}), got: {message}\n\
         hint: build it here with `cargo build --release`; its crate needs `crate-type = [\"cdylib\"]`",
        file.display(), std::env::consts::ARCH, std::env::consts::OS
    )]
    NotALibrary { file: PathBuf, message: String },
    /// A library, but no plugin.
    #[error(
        "{} holds no plugin: expected the symbol that `export_plugin!` makes, got a library without it\n\
         hint: its crate needs a line like `export_plugin!(loss, MyLoss);` (and the feature that it stands behind, if any)",
        file.display()
    )]
    NoPlugin { file: PathBuf },
    /// Another version of the boundary.
    #[error(
        "cannot use the plugin {}: expected ABI version {expected}, got {got}\n\
         hint: {}",
        file.display(), other_abi_hint(*expected, *got)
    )]
    OtherAbi { file: PathBuf, expected: u32, got: u32 },
    /// The function table is not laid out as this host's; the long report is in [`LoadError::details`].
    #[error(
        "cannot use the plugin {}: expected the function table of ABI version {ABI_VERSION}, got {got}\n\
         hint: rebuild the plugin with the clip-host-plugin-api that belongs to this host (--verbose shows what differs)",
        file.display()
    )]
    Layout { file: PathBuf, got: String, details: String },
    /// The plugin does not say what it is.
    #[error(
        "cannot use the plugin {}: expected a description of itself, got: {message}\n\
         hint: this is a fault in the plugin; `cargo test` in its crate may show more",
        file.display()
    )]
    Describe { file: PathBuf, message: String },
}

fn other_abi_hint(expected: u32, got: u32) -> &'static str {
    match got > expected {
        true => "rebuild the plugin with the clip-host-plugin-api that belongs to this host, or update the host",
        false => "rebuild the plugin with the clip-host-plugin-api that belongs to this host",
    }
}

impl LoadError {
    /// The file that was to be loaded.
    pub fn file(&self) -> &Path {
        match self {
            LoadError::Unreadable { file, .. }
            | LoadError::NotALibrary { file, .. }
            | LoadError::NoPlugin { file }
            | LoadError::OtherAbi { file, .. }
            | LoadError::Layout { file, .. }
            | LoadError::Describe { file, .. } => file,
        }
    }

    /// The long form, for `--verbose`: kilobytes of text where table layouts differ.
    pub fn details(&self) -> Option<&str> {
        match self {
            LoadError::Layout { details, .. } => Some(details),
            _ => None,
        }
    }
}

/// A plugin as errors name it: "loss plugin `clip` 0.1.0 (plugins/libclip_loss_clip.so)".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    pub kind: Kind,
    pub id: String,
    pub version: String,
    pub file: PathBuf,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} plugin `{}` {} ({})", self.kind, self.id, self.version, self.file.display())
    }
}

/// Why a loaded plugin's answer could not be used.
#[derive(Debug, Error)]
pub enum PluginError {
    /// The plugin itself says no: its settings, its inputs, a mistake in its formula, a panic.
    #[error("{who} could not build {what}: {message}{}", refused_hint(message))]
    Refused { who: Box<Who>, what: &'static str, message: String },
    /// The question does not suit the plugin's kind.
    #[error(
        "{who} was asked for {what}, which only {expected} plugins give\nhint: name it in the recipe's section of its own kind"
    )]
    WrongKind { who: Box<Who>, what: &'static str, expected: Kind },
    /// The answer was written for a newer host.
    #[error(
        "{who} answered with IR version {got}, this host reads up to {IR_VERSION}\n\
         hint: update the host, or rebuild the plugin with the host's clip-host-plugin-api"
    )]
    NewerIr { who: Box<Who>, got: u32 },
    /// The answer is not what the contract says.
    #[error(
        "{who} answered the request for {what} wrongly: expected {expected}, got {got}\nhint: this is a fault in the plugin; report it to its author"
    )]
    Malformed { who: Box<Who>, what: &'static str, expected: String, got: String },
    /// A number that training cannot go on with.
    #[error(
        "{who} gave {what}: expected {expected}, got {got}\nhint: check its settings in the recipe; if they are sound, this is a fault in the plugin"
    )]
    Number { who: Box<Who>, what: String, expected: &'static str, got: String },
}

fn refused_hint(message: &str) -> &'static str {
    match message.starts_with("the plugin panicked") {
        true => "\nhint: this is a fault in the plugin; report it to its author",
        false => "",
    }
}

impl PluginError {
    /// The plugin that answered.
    pub fn who(&self) -> &Who {
        match self {
            PluginError::Refused { who, .. }
            | PluginError::WrongKind { who, .. }
            | PluginError::NewerIr { who, .. }
            | PluginError::Malformed { who, .. }
            | PluginError::Number { who, .. } => who,
        }
    }
}

/// Why a plugin could not be had from the registry.
#[derive(Debug, Error)]
pub enum RegistryError {
    /// No plugin of that kind has the id.
    #[error("there is no {kind} plugin `{id}`; searched: {}{}\nhint: {hint}", listed(searched), failed(failures))]
    Unknown { kind: Kind, id: String, hint: String, searched: Vec<PathBuf>, failures: Vec<String> },
    /// Two different files claim one id.
    #[error(
        "two different plugins call themselves {kind} `{id}`: {} and {}\n\
         hint: remove one, or name the file in the recipe with `path: \"…\"`",
        first.display(), second.display()
    )]
    Ambiguous { kind: Kind, id: String, first: PathBuf, second: PathBuf },
    /// A file that was named explicitly is no usable plugin.
    #[error(transparent)]
    Load(#[from] std::sync::Arc<LoadError>),
    /// A named file or folder does not exist.
    #[error("cannot search {} for plugins: {message}\nhint: check `plugins: (path: […])` in the recipe and {}", path.display(), crate::registry::PATH_VARIABLE)]
    Search { path: PathBuf, message: String },
    /// The file named with `path` holds another plugin.
    #[error("expected the {kind} plugin `{id}` in {}, got {found}\nhint: correct `plugin` or `path` in the recipe", found.file.display())]
    Other { kind: Kind, id: String, found: Box<Who> },
    /// The file is not the one that the recipe pins.
    #[error(
        "{who} is not the one that the recipe pins: expected sha256 {expected}, got {got}\nhint: use the pinned file, or update `sha256` after checking the new one"
    )]
    Pin { who: Box<Who>, expected: String, got: String },
}

impl RegistryError {
    /// The long form, for `--verbose`, where there is one.
    pub fn details(&self) -> Option<&str> {
        match self {
            RegistryError::Load(error) => error.details(),
            _ => None,
        }
    }
}

fn listed(paths: &[PathBuf]) -> String {
    match paths {
        [] => "nothing".into(),
        paths => paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "),
    }
}

fn failed(failures: &[String]) -> String {
    failures.iter().map(|f| format!("\nnot usable: {f}")).collect()
}
