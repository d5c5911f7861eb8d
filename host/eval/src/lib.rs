//! clip-host-eval
