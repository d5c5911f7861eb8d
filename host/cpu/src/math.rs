//! Elementwise functions in f32, written without branches so that loops over them vectorise. Errors are a few units in
//! the last place (measured in the tests against f64).

// Coefficients stand as published.
#![allow(clippy::excessive_precision)]

/// eˣ: the argument is reduced by multiples of ln 2 to ±½ ln 2, where a polynomial of degree 6 is used (Cephes).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³: adding and subtracting it rounds to an integer
    let clamped = x.clamp(-104.0, 89.0);
    let n = (clamped * std::f32::consts::LOG2_E + MAGIC) - MAGIC;
    let r = clamped - n * 0.693_359_375;
    let r = r - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.000_000_1e-1;
    let value = p * r * r + r + 1.0;
    // 2ⁿ in two factors, so that neither leaves the range of exponents.
    let half = ((n * 0.5 + MAGIC) - MAGIC).clamp(-126.0, 127.0);
    let result = value * power_of_two(half) * power_of_two(n - half);
    // The clamp drops NaN on some processors: bring it back.
    if x.is_nan() { x } else { result }
}

#[inline(always)]
fn power_of_two(n: f32) -> f32 {
    // SAFETY: |n| is at most 127 (or NaN never reaches here: the caller clamps), so that it fits.
    let bits = unsafe { n.to_int_unchecked::<i32>() };
    f32::from_bits(((bits + 127) << 23) as u32)
}

/// ln x; −∞ at 0, NaN below (Cephes).
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    let tiny = x < f32::MIN_POSITIVE;
    let scaled = if tiny { x * 8_388_608.0 } else { x };
    let bits = scaled.to_bits();
    let mut e = ((bits >> 23) as i32 - 126) as f32 - if tiny { 23.0 } else { 0.0 };
    let mut m = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000);
    let low = m < std::f32::consts::FRAC_1_SQRT_2;
    e = if low { e - 1.0 } else { e };
    m = if low { m + m - 1.0 } else { m - 1.0 };
    let z = m * m;
    let mut p = 7.037_683_6e-2;
    p = p * m - 1.151_461e-1;
    p = p * m + 1.167_699_9e-1;
    p = p * m - 1.242_014_1e-1;
    p = p * m + 1.424_932_3e-1;
    p = p * m - 1.666_805_7e-1;
    p = p * m + 2.000_071_5e-1;
    p = p * m - 2.499_999_4e-1;
    p = p * m + 3.333_333e-1;
    let y = m * z * p + e * -2.121_944_4e-4 - 0.5 * z;
    let result = m + y + e * 0.693_359_375;
    let result = if x == 0.0 { f32::NEG_INFINITY } else { result };
    let result = if x < 0.0 { f32::NAN } else { result };
    if x.is_nan() || x == f32::INFINITY { x } else { result }
}

/// tanh x: an odd polynomial near 0 (Cephes), 1 − 2 / (e²ˣ + 1) beyond.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let z = x * x;
    let mut p = -5.704_988_7e-3;
    p = p * z + 2.063_908_9e-2;
    p = p * z - 5.373_971_5e-2;
    p = p * z + 1.333_144_2e-1;
    p = p * z - 3.333_328_2e-1;
    let near = p * z * x + x;
    let far = (1.0 - 2.0 / (exp(a + a) + 1.0)).copysign(x);
    let result = if a < 0.625 { near } else { far };
    if x.is_nan() { x } else { result }
}

/// erf x: x P(x²) / Q(x²) with two polynomials of degree 5, fitted to the smallest relative error (2e-8 before rounding)
/// where erf is not yet 1 in f32.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    const ONE_FROM: f32 = 3.92;
    let clamped = x.clamp(-ONE_FROM, ONE_FROM);
    let z = clamped * clamped;
    let mut p = 2.050_122_9e-6;
    p = p * z + 2.848_788e-4;
    p = p * z + 3.765_435_4e-3;
    p = p * z + 5.274_817e-2;
    p = p * z + 1.904_022_1e-1;
    p = p * z + std::f32::consts::FRAC_2_SQRT_PI;
    let mut q = 3.809_187_5e-5;
    q = q * z + 1.162_491_6e-3;
    q = q * z + 1.496_885_5e-2;
    q = q * z + 1.141_073_6e-1;
    q = q * z + 5.020_723_3e-1;
    q = q * z + 1.0;
    let inside = (clamped * p / q).clamp(-1.0, 1.0);
    let result = if x.abs() < ONE_FROM { inside } else { 1f32.copysign(x) };
    if x.is_nan() { x } else { result }
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
        assert_eq!(ln(0.0), f32::NEG_INFINITY);
        assert_eq!(ln(1.0), 0.0);
        assert!((f64::from(ln(1e-42)) - f64::from(1e-42f32).ln()).abs() < 1e-4);
        assert!(ln(-1.0).is_nan() && exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan() && erf(f32::NAN).is_nan());
        assert_eq!((tanh(20.0), tanh(-20.0), erf(9.0), erf(-9.0)), (1.0, -1.0, 1.0, -1.0));
    }
}
