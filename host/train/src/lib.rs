//! clip-host-train
