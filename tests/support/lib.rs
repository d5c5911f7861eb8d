//! What the whole-system tests share.

pub mod fixtures;
pub mod golden;
pub mod host;
pub mod shards;
