//! clip-host-cpu
