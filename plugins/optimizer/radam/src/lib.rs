//! radam
