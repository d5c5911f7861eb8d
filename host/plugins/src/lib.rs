//! Finds, loads, checks and describes plugins: everything between a recipe's `plugin: "…"` and an IR fragment that the
//! host can trust.
//!
//! ```no_run
//! use clip_host_plugin_api::describe::Kind;
//! use clip_host_plugins::Registry;
//!
//! let registry = Registry::scan(&[]);
//! let loss = registry.get(Kind::Loss, "clip")?;
//! println!("{}", clip_host_plugins::inspect::text(&loss, None, false));
//! # Ok::<(), clip_host_plugins::RegistryError>(())
//! ```
//!
//! - [`registry`]: the search path, lookups by kind and id, duplicates, pins;
//! - [`load`]: from a file to a checked function table;
//! - [`plugin`]: a loaded plugin and the questions that the host asks it;
//! - [`config`]: a recipe's settings against the plugin's schema;
//! - [`inspect`]: what `plugins inspect` prints;
//! - [`error`]: everything that can go wrong, told for people.

pub mod config;
pub mod error;
pub mod inspect;
pub mod load;
pub mod plugin;
pub mod registry;

pub use config::ConfigError;
pub use error::{LoadError, PluginError, RegistryError};
pub use plugin::Plugin;
pub use registry::Registry;
