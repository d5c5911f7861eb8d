//! What a matrix or an image consists of.

/// The type of one number in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit IEEE.
    F32,
    /// 16-bit IEEE.
    F16,
    /// The upper half of an [`Element::F32`].
    Bf16,
}

impl Element {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
        }
    }
}

/// How products of [`Element::F32`] numbers are formed; sums are f32 in any case. For 16-bit numbers it makes no difference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compute {
    /// In f32.
    #[default]
    F32,
    /// On tensor cores, from operands rounded to TF32 (10 bits of mantissa).
    Tf32,
}
