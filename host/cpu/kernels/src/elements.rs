//! Element types: what tensors are stored as. Arithmetic is in f32 whatever the type.

pub use half::{bf16, f16};

/// A tensor to read.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// The upper half of single precision: the same range, 8 bits of mantissa.
    Bf16(&'a [bf16]),
}

/// A tensor to write.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// The upper half of single precision; results are rounded once, to nearest even.
    Bf16(&'a mut [bf16]),
}

impl Elements<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Elements::F32(values) => values.len(),
            Elements::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether these are [`Elements::Bf16`].
    pub fn is_bf16(&self) -> bool {
        matches!(self, Elements::Bf16(_))
    }
}

impl ElementsMut<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.as_elements().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same elements to read.
    pub fn as_elements(&self) -> Elements<'_> {
        match self {
            ElementsMut::F32(values) => Elements::F32(values),
            ElementsMut::Bf16(values) => Elements::Bf16(values),
        }
    }

    /// The same elements for a shorter time.
    pub fn reborrow(&mut self) -> ElementsMut<'_> {
        match self {
            ElementsMut::F32(values) => ElementsMut::F32(values),
            ElementsMut::Bf16(values) => ElementsMut::Bf16(values),
        }
    }
}

impl<'a> From<&'a [f32]> for Elements<'a> {
    fn from(values: &'a [f32]) -> Self {
        Elements::F32(values)
    }
}

impl<'a> From<&'a [bf16]> for Elements<'a> {
    fn from(values: &'a [bf16]) -> Self {
        Elements::Bf16(values)
    }
}

impl<'a> From<&'a mut [f32]> for ElementsMut<'a> {
    fn from(values: &'a mut [f32]) -> Self {
        ElementsMut::F32(values)
    }
}

impl<'a> From<&'a mut [bf16]> for ElementsMut<'a> {
    fn from(values: &'a mut [bf16]) -> Self {
        ElementsMut::Bf16(values)
    }
}

/// The value of a bf16; exact.
#[inline(always)]
pub fn widened(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// The nearest bf16, of two the even one; NaN stays NaN. Without branches, so that loops over it are vectorised.
#[inline(always)]
pub fn narrowed(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
}

/// A type that elements are stored as.
pub(crate) trait Element: Copy + Default + Send + Sync + 'static {
    /// The value; exact.
    fn widen(self) -> f32;

    /// The nearest value of this type, of two the even one; NaN stays NaN.
    fn narrow(value: f32) -> Self;

    /// The same values, where this type is f32.
    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]>;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn as_f32_mut(values: &mut [f32]) -> Option<&mut [f32]> {
        Some(values)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widened(self)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        narrowed(value)
    }

    #[inline(always)]
    fn as_f32_mut(_: &mut [bf16]) -> Option<&mut [f32]> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even() {
        let mut bits = 1u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            // Every other time halfway between two neighbours.
            for bits in [bits, bits & 0xffff_0000 | 0x8000] {
                let value = f32::from_bits(bits);
                let (got, expected) = (<bf16 as Element>::narrow(value), bf16::from_f32(value));
                assert!(got == expected && got.is_nan() == expected.is_nan() || value.is_nan() && got.is_nan());
                let back = got.widen();
                assert!(back == got.to_f32() || back.is_nan() && got.is_nan());
            }
        }
        for special in [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-40] {
            assert_eq!(<bf16 as Element>::narrow(special).to_bits(), bf16::from_f32(special).to_bits());
        }
        assert!(<bf16 as Element>::narrow(f32::NAN).is_nan());
        assert!(<bf16 as Element>::narrow(f32::from_bits(0xffff_ffff)).is_nan());
    }
}
