//! clip-host-compiler
