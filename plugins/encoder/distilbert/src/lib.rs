//! distilbert
