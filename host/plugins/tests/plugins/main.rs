//! Plugins as the host meets them: libraries on disk, built by the tests themselves.

#[path = "../../../../tests/support/fixtures.rs"]
mod fixtures;

mod abi;
mod config;
mod first_party;
mod load;
mod registry;
