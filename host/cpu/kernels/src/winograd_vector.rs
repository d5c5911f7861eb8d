//! Vectors of f32 for code that is written once and compiled for each instruction set.
//!
//! A value of a vector type exists only where its instruction set does: the functions that make one are unsafe, so
//! that arithmetic on values need not be. Everything is inlined into functions that enable the instruction set.

use crate::elements::{Element, bf16};
use crate::isa::Isa;
use std::ops::{Add, Sub};

/// Some lanes of f32.
pub(crate) trait Vector: Copy + Add<Output = Self> + Sub<Output = Self> {
    /// Number of lanes: a divisor of 16.
    const LANES: usize;
    /// Rows of a register tile of the products, and its columns in vectors.
    const TILE: (usize, usize);

    /// The same value in all lanes.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn splat(value: f32) -> Self;

    /// Neighbouring values.
    ///
    /// # Safety
    /// As [`splat`](Self::splat), and `LANES` values are readable.
    unsafe fn load(from: *const f32) -> Self;

    /// The first `count` of neighbouring values, and zeros.
    ///
    /// # Safety
    /// As [`splat`](Self::splat), and `count` values are readable.
    unsafe fn load_first(from: *const f32, count: usize) -> Self;

    /// # Safety
    /// `LANES` values are writable.
    unsafe fn store(self, to: *mut f32);

    /// Stores the first `count` lanes.
    ///
    /// # Safety
    /// `count` values are writable.
    unsafe fn store_first(self, to: *mut f32, count: usize);

    /// `self + factor * other`, rounded once where the instruction set has it.
    fn plus(self, factor: Self, other: Self) -> Self;

    /// `self + factor * other`.
    #[inline(always)]
    fn plus_scaled(self, factor: f32, other: Self) -> Self {
        // SAFETY: there is a value of the type, and so the instruction set.
        self.plus(unsafe { Self::splat(factor) }, other)
    }

    /// `factor * self`.
    fn scaled(self, factor: f32) -> Self;

    /// Neighbouring values of bf16.
    ///
    /// # Safety
    /// As [`load`](Self::load).
    unsafe fn load_half(from: *const bf16) -> Self;

    /// Each lane rounded to bf16, to nearest even; NaN stays NaN.
    fn rounded(self) -> Self;

    /// Stores the upper halves of all lanes.
    ///
    /// # Safety
    /// `LANES` values are writable.
    unsafe fn store_half(self, to: *mut bf16);
}

/// A type that operands are stored as.
pub(crate) trait Load: Copy + Sync {
    /// The first `count` of neighbouring values, and zeros.
    ///
    /// # Safety
    /// The processor has the instruction set, and `count` values, at most `LANES`, are readable.
    unsafe fn load<V: Vector>(from: *const Self, count: usize) -> V;
}

/// A type that results are stored as.
pub(crate) trait Store: Load + Send {
    /// Stores the first `count` lanes, and returns all as they would be stored.
    ///
    /// # Safety
    /// `count` values, at most `LANES`, are writable.
    unsafe fn store<V: Vector>(value: V, to: *mut Self, count: usize) -> V;
}

impl Load for f32 {
    // SAFETY: what the caller promises is with the trait, here and below.
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const f32, count: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { if count == V::LANES { V::load(from) } else { V::load_first(from, count) } }
    }
}

impl Store for f32 {
    // SAFETY: as above.
    #[inline(always)]
    unsafe fn store<V: Vector>(value: V, to: *mut f32, count: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { if count == V::LANES { value.store(to) } else { value.store_first(to, count) } }
        value
    }
}

/// Single precision of which an operand is to have what bf16 has.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Rounded(#[allow(dead_code)] f32);

impl Load for Rounded {
    // SAFETY: as above.
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Rounded, count: usize) -> V {
        // SAFETY: the caller's promise; the type is a float.
        unsafe { <f32 as Load>::load::<V>(from.cast(), count).rounded() }
    }
}

impl Load for bf16 {
    // SAFETY: as above.
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const bf16, count: usize) -> V {
        // SAFETY: the caller's promise; the copy has as many values as any vector.
        unsafe {
            if count == V::LANES {
                return V::load_half(from);
            }
            let mut lanes = [bf16::ZERO; 16];
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
            V::load_half(lanes.as_ptr())
        }
    }
}

impl Store for bf16 {
    // SAFETY: as above.
    #[inline(always)]
    unsafe fn store<V: Vector>(value: V, to: *mut bf16, count: usize) -> V {
        let value = value.rounded();
        // SAFETY: the caller's promise; the copy has as many values as any vector.
        unsafe {
            if count == V::LANES {
                value.store_half(to);
            } else {
                let mut lanes = [bf16::ZERO; 16];
                value.store_half(lanes.as_mut_ptr());
                std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
            }
        }
        value
    }
}

/// Eight lanes in plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Plain([f32; 8]);

impl Add for Plain {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Plain(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }
}

impl Sub for Plain {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Plain(std::array::from_fn(|lane| self.0[lane] - other.0[lane]))
    }
}

impl Vector for Plain {
    const LANES: usize = 8;
    const TILE: (usize, usize) = (4, 1);

    // SAFETY: nothing to promise.
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Plain([value; 8])
    }

    // SAFETY: what the caller promises is with the trait, here and below.
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Plain(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    // SAFETY: as above.
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        let mut lanes = [0.0; 8];
        // SAFETY: the caller's promise.
        lanes.iter_mut().enumerate().take(count).for_each(|(lane, value)| *value = unsafe { from.add(lane).read() });
        Plain(lanes)
    }

    // SAFETY: as above.
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    // SAFETY: as above.
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        // SAFETY: the caller's promise.
        self.0.iter().enumerate().take(count).for_each(|(lane, value)| unsafe { to.add(lane).write(*value) });
    }

    #[inline(always)]
    fn plus(self, factor: Self, other: Self) -> Self {
        Plain(std::array::from_fn(|lane| self.0[lane] + factor.0[lane] * other.0[lane]))
    }

    #[inline(always)]
    fn scaled(self, factor: f32) -> Self {
        Plain(self.0.map(|value| factor * value))
    }

    // SAFETY: as above.
    #[inline(always)]
    unsafe fn load_half(from: *const bf16) -> Self {
        // SAFETY: the caller's promise.
        Plain(unsafe { from.cast::<[bf16; 8]>().read_unaligned() }.map(Element::widen))
    }

    #[inline(always)]
    fn rounded(self) -> Self {
        Plain(self.0.map(|value| bf16::narrow(value).widen()))
    }

    // SAFETY: as above.
    #[inline(always)]
    unsafe fn store_half(self, to: *mut bf16) {
        let halves = self.0.map(|value| bf16::from_bits((value.to_bits() >> 16) as u16));
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[bf16; 8]>().write_unaligned(halves) }
    }
}

/// Work that is written once for every vector type.
pub(crate) trait Work {
    /// Does the work; to be inlined, with all that it calls.
    ///
    /// # Safety
    /// The processor has the instruction set of `V`; what else the work asks for is with its type.
    unsafe fn run<V: Vector>(&self);
}

/// Does the work with the vectors of an instruction set.
///
/// # Safety
/// The instruction set was detected; what else the work asks for is with its type.
pub(crate) unsafe fn with_vectors<W: Work>(isa: Isa, work: &W) {
    // SAFETY: the caller's promise.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            isa if isa >= Isa::Avx512 => x86::run_avx512(work),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::run_avx2(work),
            _ => work.run::<Plain>(),
        }
    }
}

/// Rows of a register tile with an instruction set.
pub(crate) fn tile_rows(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        isa if isa >= Isa::Avx512 => x86::Avx512::TILE.0,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::Avx2::TILE.0,
        _ => Plain::TILE.0,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Vector, Work};
    use crate::elements::bf16;
    use std::arch::x86_64::*;
    use std::ops::{Add, Sub};

    /// Eight lanes of AVX2 with fused multiply-add.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256);

    /// Sixteen lanes of AVX-512F.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    /// # Safety
    /// See [`super::with_vectors`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn run_avx2<W: Work>(work: &W) {
        // SAFETY: the caller's promise.
        unsafe { work.run::<Avx2>() }
    }

    /// # Safety
    /// See [`super::with_vectors`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn run_avx512<W: Work>(work: &W) {
        // SAFETY: the caller's promise.
        unsafe { work.run::<Avx512>() }
    }

    impl Add for Avx2 {
        type Output = Self;
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: there is a value of the type, and so the instruction set; the same below.
            Avx2(unsafe { _mm256_add_ps(self.0, other.0) })
        }
    }

    impl Sub for Avx2 {
        type Output = Self;
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: as above.
            Avx2(unsafe { _mm256_sub_ps(self.0, other.0) })
        }
    }

    /// Lanes below `count`.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn first_lanes(count: usize) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
    }

    impl Vector for Avx2 {
        const LANES: usize = 8;
        const TILE: (usize, usize) = (6, 2);

        // SAFETY: what the caller promises is with the trait, here and below.
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller's promise.
            Avx2(unsafe { _mm256_set1_ps(value) })
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller's promise.
            Avx2(unsafe { _mm256_loadu_ps(from) })
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn load_first(from: *const f32, count: usize) -> Self {
            // SAFETY: the caller's promise; masked lanes are not read.
            Avx2(unsafe { _mm256_maskload_ps(from, first_lanes(count)) })
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller's promise.
            unsafe { _mm256_storeu_ps(to, self.0) }
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, count: usize) {
            // SAFETY: the caller's promise; masked lanes are not written.
            unsafe { _mm256_maskstore_ps(to, first_lanes(count), self.0) }
        }

        #[inline(always)]
        fn plus(self, factor: Self, other: Self) -> Self {
            // SAFETY: there is a value of the type, and so the instruction set; the same below.
            Avx2(unsafe { _mm256_fmadd_ps(factor.0, other.0, self.0) })
        }

        #[inline(always)]
        fn scaled(self, factor: f32) -> Self {
            // SAFETY: as above.
            Avx2(unsafe { _mm256_mul_ps(_mm256_set1_ps(factor), self.0) })
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn load_half(from: *const bf16) -> Self {
            // SAFETY: the caller's promise.
            unsafe {
                let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves)))
            }
        }

        #[inline(always)]
        fn rounded(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let bits = _mm256_castps_si256(self.0);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                let nan = _mm256_or_ps(self.0, _mm256_castsi256_ps(_mm256_set1_epi32(0x40_0000)));
                let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0);
                let value = _mm256_blendv_ps(_mm256_castsi256_ps(near), nan, is_nan);
                Avx2(_mm256_and_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(!0xffff))))
            }
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn store_half(self, to: *mut bf16) {
            // SAFETY: the caller's promise.
            unsafe {
                let halves = _mm256_srli_epi32::<16>(_mm256_castps_si256(self.0));
                let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(halves, halves));
                _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
            }
        }
    }

    impl Add for Avx512 {
        type Output = Self;
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: there is a value of the type, and so the instruction set; the same below.
            Avx512(unsafe { _mm512_add_ps(self.0, other.0) })
        }
    }

    impl Sub for Avx512 {
        type Output = Self;
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_sub_ps(self.0, other.0) })
        }
    }

    /// Lanes below `count`, at most sixteen.
    #[inline(always)]
    fn first_bits(count: usize) -> __mmask16 {
        ((1u32 << count) - 1) as __mmask16
    }

    impl Vector for Avx512 {
        const LANES: usize = 16;
        const TILE: (usize, usize) = (12, 2);

        // SAFETY: what the caller promises is with the trait, here and below.
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller's promise.
            Avx512(unsafe { _mm512_set1_ps(value) })
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller's promise.
            Avx512(unsafe { _mm512_loadu_ps(from) })
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn load_first(from: *const f32, count: usize) -> Self {
            // SAFETY: the caller's promise; masked lanes are not read.
            Avx512(unsafe { _mm512_maskz_loadu_ps(first_bits(count), from) })
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, count: usize) {
            // SAFETY: the caller's promise; masked lanes are not written.
            unsafe { _mm512_mask_storeu_ps(to, first_bits(count), self.0) }
        }

        #[inline(always)]
        fn plus(self, factor: Self, other: Self) -> Self {
            // SAFETY: there is a value of the type, and so the instruction set; the same below.
            Avx512(unsafe { _mm512_fmadd_ps(factor.0, other.0, self.0) })
        }

        #[inline(always)]
        fn scaled(self, factor: f32) -> Self {
            // SAFETY: as above.
            Avx512(unsafe { _mm512_mul_ps(_mm512_set1_ps(factor), self.0) })
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn load_half(from: *const bf16) -> Self {
            // SAFETY: the caller's promise.
            unsafe {
                let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves)))
            }
        }

        #[inline(always)]
        fn rounded(self) -> Self {
            // SAFETY: as above.
            unsafe {
                let bits = _mm512_castps_si512(self.0);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
                let value = _mm512_mask_or_epi32(near, is_nan, bits, _mm512_set1_epi32(0x40_0000));
                Avx512(_mm512_castsi512_ps(_mm512_and_si512(value, _mm512_set1_epi32(!0xffff))))
            }
        }

        // SAFETY: as above.
        #[inline(always)]
        unsafe fn store_half(self, to: *mut bf16) {
            // SAFETY: the caller's promise.
            unsafe {
                let halves = _mm512_srli_epi32::<16>(_mm512_castps_si512(self.0));
                _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(halves));
            }
        }
    }
}
