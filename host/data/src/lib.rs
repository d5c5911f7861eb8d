//! clip-host-data
