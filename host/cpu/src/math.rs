//! Elementwise functions in f32, for any [`Lane`] and without branches, so that loops over them vectorise. Errors are a few
//! units in the last place (measured in the tests against f64).

// Coefficients stand as published.
#![allow(clippy::excessive_precision)]

use std::ops::{Add, Div, Mul, Sub};

/// What the functions compute with: one number, or what records the instructions for many. Every operation rounds once,
/// to nearest even, so that both give the same bits.
pub trait Lane:
    Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Add<f32, Output = Self>
    + Sub<f32, Output = Self>
    + Mul<f32, Output = Self>
{
    /// The same number in every lane; `self` only says where.
    fn constant(self, value: f32) -> Self;

    /// `self > low ? self : low`; NaN becomes `low`.
    fn at_least(self, low: f32) -> Self;

    /// `self < high ? self : high`; NaN becomes `high`.
    fn at_most(self, high: f32) -> Self;

    fn abs(self) -> Self;

    /// The magnitude of `self` with the sign of another.
    fn copysign(self, sign: Self) -> Self;

    /// 2ⁿ of an integer n from -126 to 127.
    fn power_of_two(self) -> Self;

    /// e of m · 2ᵉ with m in [½, 1), of a positive normal number.
    fn exponent(self) -> Self;

    /// m of m · 2ᵉ with m in [½, 1), of a positive normal number.
    fn mantissa(self) -> Self;

    /// `self < bound ? yes : no`.
    fn if_less(self, bound: f32, yes: Self, no: Self) -> Self;

    /// `self == value ? yes : no`.
    fn if_equal(self, value: f32, yes: Self, no: Self) -> Self;

    /// Whether `self` is NaN.
    fn if_nan(self, yes: Self, no: Self) -> Self;
}

impl Lane for f32 {
    #[inline(always)]
    fn constant(self, value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn at_least(self, low: f32) -> f32 {
        if self > low { self } else { low }
    }

    #[inline(always)]
    fn at_most(self, high: f32) -> f32 {
        if self < high { self } else { high }
    }

    #[inline(always)]
    fn abs(self) -> f32 {
        f32::abs(self)
    }

    #[inline(always)]
    fn copysign(self, sign: f32) -> f32 {
        f32::copysign(self, sign)
    }

    #[inline(always)]
    fn power_of_two(self) -> f32 {
        // SAFETY: the number is from -126 to 127, as the callers' bounds see to also for NaN.
        let bits = unsafe { self.to_int_unchecked::<i32>() };
        f32::from_bits((bits.wrapping_add(127) as u32) << 23)
    }

    #[inline(always)]
    fn exponent(self) -> f32 {
        ((self.to_bits() >> 23) as i32 - 126) as f32
    }

    #[inline(always)]
    fn mantissa(self) -> f32 {
        f32::from_bits((self.to_bits() & 0x007f_ffff) | 0x3f00_0000)
    }

    #[inline(always)]
    fn if_less(self, bound: f32, yes: f32, no: f32) -> f32 {
        if self < bound { yes } else { no }
    }

    #[inline(always)]
    fn if_equal(self, value: f32, yes: f32, no: f32) -> f32 {
        if self == value { yes } else { no }
    }

    #[inline(always)]
    fn if_nan(self, yes: f32, no: f32) -> f32 {
        if self.is_nan() { yes } else { no }
    }
}

/// x, or 0 if it is subnormal.
#[inline(always)]
pub fn without_subnormals<L: Lane>(x: L) -> L {
    x.abs().if_less(f32::MIN_POSITIVE, x.constant(0.0), x)
}

/// eˣ: the argument is reduced by multiples of ln 2 to ±½ ln 2, where a polynomial of degree 6 is used (Cephes). Results
/// below the smallest normal number are 0: processors multiply subnormal ones a hundred times slower, and the softmax of a
/// masked score would be full of them.
#[inline(always)]
pub fn exp<L: Lane>(x: L) -> L {
    /// Just above the logarithm of the smallest normal number.
    const LOWEST: f32 = -87.336_54;
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³: adding and subtracting it rounds to an integer
    let clamped = x.at_least(LOWEST).at_most(89.0);
    let n = (clamped * std::f32::consts::LOG2_E + MAGIC) - MAGIC;
    let r = clamped - n * 0.693_359_375;
    let r = r - n * -2.121_944_4e-4;
    let mut p = r * 1.987_569_1e-4 + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.000_000_1e-1;
    let value = p * r * r + r + 1.0;
    // 2ⁿ in two factors: 2¹²⁸ is no number.
    let most = n.at_most(127.0);
    let result = value * most.power_of_two() * (n - most).power_of_two();
    // The bounds drop NaN: bring it back.
    x.if_nan(x, x.if_less(LOWEST, x.constant(0.0), result))
}

/// ln x; −∞ at 0, NaN below (Cephes).
#[inline(always)]
pub fn ln<L: Lane>(x: L) -> L {
    let scaled = x.if_less(f32::MIN_POSITIVE, x * 8_388_608.0, x);
    let e = scaled.exponent() - x.if_less(f32::MIN_POSITIVE, x.constant(23.0), x.constant(0.0));
    let m = scaled.mantissa();
    let e = m.if_less(std::f32::consts::FRAC_1_SQRT_2, e - 1.0, e);
    let m = m.if_less(std::f32::consts::FRAC_1_SQRT_2, m + m - 1.0, m - 1.0);
    let z = m * m;
    let mut p = m * 7.037_683_6e-2 - 1.151_461e-1;
    p = p * m + 1.167_699_9e-1;
    p = p * m - 1.242_014_1e-1;
    p = p * m + 1.424_932_3e-1;
    p = p * m - 1.666_805_7e-1;
    p = p * m + 2.000_071_5e-1;
    p = p * m - 2.499_999_4e-1;
    p = p * m + 3.333_333e-1;
    let y = m * z * p + e * -2.121_944_4e-4 - z * 0.5;
    let result = m + y + e * 0.693_359_375;
    let result = x.if_equal(0.0, x.constant(f32::NEG_INFINITY), result);
    let result = x.if_less(0.0, x.constant(f32::NAN), result);
    x.if_nan(x, x.if_equal(f32::INFINITY, x, result))
}

/// tanh x: an odd polynomial near 0 (Cephes), 1 − 2 / (e²ˣ + 1) beyond.
#[inline(always)]
pub fn tanh<L: Lane>(x: L) -> L {
    let a = x.abs();
    let z = x * x;
    let mut p = z * -5.704_988_7e-3 + 2.063_908_9e-2;
    p = p * z - 5.373_971_5e-2;
    p = p * z + 1.333_144_2e-1;
    p = p * z - 3.333_328_2e-1;
    let near = p * z * x + x;
    let far = (x.constant(1.0) - x.constant(2.0) / (exp(a + a) + 1.0)).copysign(x);
    x.if_nan(x, a.if_less(0.625, near, far))
}

/// erf x: x P(x²) / Q(x²) with two polynomials of degree 5, fitted to the smallest relative error (2e-8 before rounding)
/// where erf is not yet 1 in f32.
#[inline(always)]
pub fn erf<L: Lane>(x: L) -> L {
    const ONE_FROM: f32 = 3.92;
    let clamped = x.at_least(-ONE_FROM).at_most(ONE_FROM);
    let z = clamped * clamped;
    let mut p = z * 2.050_122_9e-6 + 2.848_788e-4;
    p = p * z + 3.765_435_4e-3;
    p = p * z + 5.274_817e-2;
    p = p * z + 1.904_022_1e-1;
    p = p * z + std::f32::consts::FRAC_2_SQRT_PI;
    let mut q = z * 3.809_187_5e-5 + 1.162_491_6e-3;
    q = q * z + 1.496_885_5e-2;
    q = q * z + 1.141_073_6e-1;
    q = q * z + 5.020_723_3e-1;
    q = q * z + 1.0;
    let inside = (clamped * p / q).at_least(-1.0).at_most(1.0);
    let result = x.abs().if_less(ONE_FROM, inside, x.constant(1.0).copysign(x));
    x.if_nan(x, result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clip_host_plugin_api::interpret;

    /// The largest error of `f` against `exact` over a grid, relative to max(|exact|, floor).
    fn worst(f: fn(f32) -> f32, exact: fn(f64) -> f64, low: f64, high: f64, floor: f64) -> f64 {
        (0..200_000)
            .map(|i| {
                let x = (low + (high - low) * f64::from(i) / 200_000.0) as f32;
                let y = exact(f64::from(x));
                (f64::from(f(x)) - y).abs() / y.abs().max(floor)
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_close_to_f64() {
        assert!(worst(exp, f64::exp, -87.0, 88.5, 0.0) < 2.5e-7);
        assert!(worst(ln, f64::ln, 1e-6, 20.0, 1e-2) < 2.5e-7);
        assert!(worst(tanh, f64::tanh, -10.0, 10.0, 0.0) < 4e-7);
        assert!(worst(erf, interpret::erf, -5.0, 5.0, 0.0) < 6e-7);
    }

    #[test]
    fn edges_are_right() {
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(100.0), f32::INFINITY);
        assert!(exp(-87.33).is_normal() && exp(88.72) > 3e38);
        // No result is subnormal, and little is lost.
        let mut x = -87.0f32;
        while x > -104.0 {
            assert!(exp(x) == 0.0 || exp(x).is_normal(), "{x}");
            x = x.next_down();
        }
        assert_eq!(exp(-87.34), 0.0);
        assert_eq!(ln(0.0), f32::NEG_INFINITY);
        assert_eq!(ln(1.0), 0.0);
        assert!((f64::from(ln(1e-42)) - f64::from(1e-42f32).ln()).abs() < 1e-4);
        assert!(ln(-1.0).is_nan() && exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan() && erf(f32::NAN).is_nan());
        assert_eq!((tanh(20.0), tanh(-20.0), erf(9.0), erf(-9.0)), (1.0, -1.0, 1.0, -1.0));
    }
}
