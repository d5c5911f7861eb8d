//! clip-host-cpu-kernels
