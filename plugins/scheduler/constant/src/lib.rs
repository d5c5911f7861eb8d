//! constant
