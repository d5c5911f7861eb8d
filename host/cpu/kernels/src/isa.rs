//! The instruction set that the kernels use, chosen once at run time.

use std::sync::OnceLock;

/// An instruction set with its own micro-kernels, in ascending order of capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, whatever the compiler makes of it.
    Portable,
    /// AVX2 with fused multiply-add: 6x16 tiles.
    Avx2,
    /// AVX-512 with BW, DQ and VL: 12x32 tiles. Operands of bf16 are widened while they are packed.
    Avx512,
    /// The same with the dot products of AVX512_BF16: operands of bf16 are multiplied in pairs.
    Avx512Bf16,
}

impl Isa {
    /// Every instruction set, weakest first.
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    /// The best instruction set of this processor.
    pub fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let words = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq");
            if avx2 && words && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                let pairs = is_x86_feature_detected!("avx512bf16");
                return if pairs { Isa::Avx512Bf16 } else { Isa::Avx512 };
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// The instruction set that is fastest on this processor.
    ///
    /// Where a dot product of bf16 takes as long as four fused multiply-adds of f32 (Intel's cores: measured 0.58 and
    /// 0.14 ns), it does half the work in the same time, and [`Isa::Avx512`] is the better choice. AMD's cores take one
    /// for the other. The maker decides, not a clock, so that a machine always gives the same bits.
    pub fn fastest() -> Isa {
        let detected = Isa::detect();
        #[cfg(target_arch = "x86_64")]
        if detected == Isa::Avx512Bf16 {
            let maker = std::arch::x86_64::__cpuid(0);
            let amd = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"enti"), u32::from_le_bytes(*b"cAMD")];
            if [maker.ebx, maker.edx, maker.ecx] != amd {
                return Isa::Avx512;
            }
        }
        detected
    }

    /// [`Isa::fastest`], or what the environment variable `CLIP_HOST_CPU` names, as far as the processor has it
    /// (`portable`, `avx2`, `avx512` or `avx512bf16`; anything else counts as none). Read once.
    pub fn selected() -> Isa {
        static SELECTED: OnceLock<Isa> = OnceLock::new();
        *SELECTED.get_or_init(|| Isa::capped(std::env::var("CLIP_HOST_CPU").ok().as_deref()))
    }

    fn capped(name: Option<&str>) -> Isa {
        name.and_then(Isa::parse).map_or_else(Isa::fastest, |named| named.min(Isa::detect()))
    }

    /// The name used by `CLIP_HOST_CPU`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
        }
    }

    fn parse(name: &str) -> Option<Isa> {
        Isa::ALL.into_iter().find(|isa| isa.name().eq_ignore_ascii_case(name.trim()))
    }
}

/// Defines a function that is compiled once per instruction set and takes the one to use as its first argument; the
/// compiler vectorises each copy with what it may assume. No copy contracts products and sums, so that all of them
/// give the same bits.
macro_rules! per_isa {
    ($(#[$attribute:meta])* $vis:vis fn $name:ident $(<$($generic:ident: $bound:path),*>)?
        ($($argument:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$attribute])*
        $vis fn $name $(<$($generic: $bound),*>)? (isa: $crate::isa::Isa, $($argument: $type),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn portable $(<$($generic: $bound),*>)? ($($argument: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$($generic: $bound),*>)? ($($argument: $type),*) {
                portable($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$($generic: $bound),*>)? ($($argument: $type),*) {
                portable($($argument),*)
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a pool has no instruction set that was not detected.
                $crate::isa::Isa::Avx512 | $crate::isa::Isa::Avx512Bf16 => unsafe { avx512($($argument),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::isa::Isa::Avx2 => unsafe { avx2($($argument),*) },
                _ => portable($($argument),*),
            }
        }
    };
}
pub(crate) use per_isa;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for isa in Isa::ALL {
            assert_eq!(Isa::parse(isa.name()), Some(isa));
        }
        assert_eq!(Isa::parse(" AVX2 "), Some(Isa::Avx2));
        assert_eq!(Isa::parse("sse9"), None);
        assert!(Isa::selected() <= Isa::detect());
        assert_eq!(Isa::capped(Some("portable")), Isa::Portable);
        assert_eq!(Isa::capped(Some("avx2")), Isa::Avx2.min(Isa::detect()));
        assert_eq!(Isa::capped(Some("avx512bf16")), Isa::detect());
        assert_eq!(Isa::capped(Some("")), Isa::fastest());
        assert_eq!(Isa::capped(None), Isa::fastest());
    }
}
