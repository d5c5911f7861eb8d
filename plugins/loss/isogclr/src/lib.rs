//! isogclr
