//! clip-host-plugin-api
