//! clip-host-graph
