//! clip-host-plugins
