//! dynamic-temperature
