//! First values of parameters and states: a function of the run's seed, the tensor's name and the element's index only.
//!
//! Element `i` is drawn from the word `i / 2` of a SplitMix64 stream (Steele, Lea and Flood 2014) that starts at a key of
//! seed and name. Nothing depends on the element before, so that blocks are drawn by any number of threads, and the
//! arithmetic is additions, multiplications, divisions and square roots alone, so that every machine draws the same bits.

use clip_host_cpu::ThreadPool;
use clip_host_plugin_api::interpret::mix;
use clip_host_plugin_api::ir::Init;
use std::f32::consts::{FRAC_PI_2, LN_2};
use std::sync::Mutex;

/// Elements that a thread draws at a time; even, so that pairs stay whole.
const BLOCK: usize = 1 << 14;
/// Words that are turned into values together: few enough for the stack, many for the vector units.
const WORDS: usize = 64;
/// Where a truncated normal distribution ends, in standard deviations.
const TRUNCATION: f32 = 2.0;

/// Fills a tensor with its first values.
///
/// Normal values reach as far as 5.77 standard deviations; truncated ones are redrawn until they lie within two, and
/// `std` is that of the distribution before truncation, as in `torch.nn.init.trunc_normal_`.
pub fn fill(pool: &ThreadPool, init: Init, seed: u64, name: &str, values: &mut [f32]) {
    let key = name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
    let blocks: Vec<Mutex<&mut [f32]>> = values.chunks_mut(BLOCK).map(Mutex::new).collect();
    pool.run(blocks.len(), &|index, _| {
        // Each block is taken once: a lock cannot be poisoned.
        if let Ok(mut block) = blocks[index].lock() {
            fill_block(init, key, (index * BLOCK) as u64, &mut block);
        }
    });
}

fn fill_block(init: Init, key: u64, first: u64, values: &mut [f32]) {
    match init {
        Init::Constant(value) => values.fill(value as f32),
        Init::Uniform { bound } => {
            draw(key, first, values, uniform_pair);
            values.iter_mut().for_each(|v| *v *= bound as f32);
        }
        Init::Normal { std } => {
            draw(key, first, values, normal_pair);
            values.iter_mut().for_each(|v| *v *= std as f32);
        }
        Init::TruncatedNormal { std } => {
            draw(key, first, values, normal_pair);
            for (index, value) in (first..).zip(values) {
                // A stream of the element's own: the next element's value does not depend on how often this is drawn.
                let again = mix(mix(key) ^ index);
                let mut attempt = 0;
                while value.abs() > TRUNCATION {
                    [*value, _] = normal_pair(word(again, attempt));
                    attempt += 1;
                }
                *value *= std as f32;
            }
        }
    }
}

/// The stream's word of this number.
fn word(key: u64, index: u64) -> u64 {
    mix(key.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// Turns words into pairs of values, beginning with the pair of the (even) element `first`.
fn draw(key: u64, first: u64, values: &mut [f32], pair: impl Fn(u64) -> [f32; 2]) {
    let mut words = [0; WORDS];
    let mut pairs = [[0.0; 2]; WORDS];
    for (group, values) in values.chunks_mut(2 * WORDS).enumerate() {
        let start = first / 2 + (group * WORDS) as u64;
        // Two loops over plain arrays: the compiler makes vector code of the second.
        for (index, w) in (start..).zip(&mut words) {
            *w = word(key, index);
        }
        for (w, p) in words.iter().zip(&mut pairs) {
            *p = pair(*w);
        }
        values.copy_from_slice(&pairs.as_flattened()[..values.len()]);
    }
}

/// Uniform in (-1, 1), 24 bits each.
fn uniform_pair(word: u64) -> [f32; 2] {
    [(word >> 32) as u32, word as u32].map(|bits| centred(bits >> 8) * 2.0)
}

/// Standard normal, both values of Box and Muller 1958: a radius from the upper half of a word, an angle from the lower.
fn normal_pair(word: u64) -> [f32; 2] {
    let radius = (-2.0 * ln_uniform((word >> 41) as u32)).sqrt();
    let (cos, sin) = cos_sin(word as u32);
    [radius * cos, radius * sin]
}

/// 24 bits as a number in (-½, ½): the middle of one of 2²⁴ equal parts.
fn centred(bits: u32) -> f32 {
    (2 * bits as i32 + 1 - (1 << 24)) as f32 / (1 << 25) as f32
}

/// The natural logarithm of (bits + ½) / 2²³ for 23 bits, to a few units in the last place.
fn ln_uniform(bits: u32) -> f32 {
    let x = (2 * bits as i32 + 1) as f32;
    // x = m·2ᵉ with m in [√½, √2): the series of ln below converges fast, and is exact about 1.
    let raw = x.to_bits() as i32;
    let exponent = (raw + (0x3f80_0000 - 0x3f35_04f3)) >> 23;
    let m = f32::from_bits((raw - ((exponent - 127) << 23)) as u32);
    let s = (m - 1.0) / (m + 1.0);
    let q = s * s;
    let series = 2.0 * s * (1.0 + q * (1.0 / 3.0 + q * (0.2 + q * (1.0 / 7.0 + q * (1.0 / 9.0)))));
    (exponent - 127 - 24) as f32 * LN_2 + series
}

/// Cosine and sine of a uniform angle: two bits choose the quarter of the circle, 24 the angle about its middle.
fn cos_sin(bits: u32) -> (f32, f32) {
    let quarter = bits >> 30;
    let a = centred((bits >> 6) & 0x00ff_ffff) * FRAC_PI_2;
    let q = a * a;
    // Taylor's series, a term's coefficient over that of the term before.
    let sin = a * (1.0 - q * (1.0 / 6.0) * (1.0 - q * 0.05 * (1.0 - q * (1.0 / 42.0) * (1.0 - q * (1.0 / 72.0)))));
    let tail = 1.0 - q * (1.0 / 30.0) * (1.0 - q * (1.0 / 56.0) * (1.0 - q * (1.0 / 90.0)));
    let cos = 1.0 - q * 0.5 * (1.0 - q * (1.0 / 12.0) * tail);
    let (x, y) = if quarter & 1 == 0 { (cos, sin) } else { (sin, cos) };
    let flip = |value: f32, sign: u32| f32::from_bits(value.to_bits() ^ (sign << 31));
    (flip(x, ((quarter + 1) >> 1) & 1), flip(y, quarter >> 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: usize = 400_001;

    fn drawn(threads: usize, init: Init, seed: u64, name: &str, count: usize) -> Vec<f32> {
        let mut values = vec![f32::NAN; count];
        fill(&ThreadPool::new(threads), init, seed, name, &mut values);
        values
    }

    /// Mean of a function over the values.
    fn mean(values: &[f32], f: impl Fn(f64) -> f64) -> f64 {
        values.iter().map(|&v| f(f64::from(v))).sum::<f64>() / values.len() as f64
    }

    #[test]
    fn normal_values_have_the_moments_and_tails_of_the_normal_distribution() {
        let values = drawn(2, Init::Normal { std: 1.0 }, 1, "w", COUNT);
        // Bounds are five standard errors of each estimate.
        let error = 5.0 / (COUNT as f64).sqrt();
        for (power, expected, spread) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0f64)] {
            let moment = mean(&values, |v| v.powi(power));
            assert!((moment - expected).abs() < error * spread.sqrt(), "moment {power}: {moment}");
        }
        for (bound, expected) in [(0.5, 0.382_925), (1.0, 0.682_689), (2.0, 0.954_500), (3.0, 0.997_300f64)] {
            let inside = mean(&values, |v| f64::from(v.abs() < bound));
            let spread = (expected * (1.0 - expected)).sqrt();
            assert!((inside - expected).abs() < error * spread, "within {bound}: {inside}");
        }
        let above = mean(&values, |v| f64::from(v > 0.0));
        assert!((above - 0.5).abs() < error / 2.0, "{above} above zero");
        let scaled = drawn(2, Init::Normal { std: 0.02 }, 1, "w", COUNT);
        assert!(scaled.iter().zip(&values).all(|(s, v)| *s == v * 0.02));
    }

    #[test]
    fn truncated_values_lie_within_two_standard_deviations() {
        let values = drawn(2, Init::TruncatedNormal { std: 0.5 }, 1, "w", COUNT);
        assert!(values.iter().all(|v| v.abs() <= 1.0));
        let largest = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        assert!(largest > 0.999, "the distribution ends at two standard deviations, not before: {largest}");
        let (first, second) = (mean(&values, |v| v), mean(&values, |v| v * v));
        // Variance of the standard normal distribution cut at ±2: 1 - 4φ(2)/(2Φ(2) - 1).
        assert!(first.abs() < 0.004 && (second - 0.25 * 0.773_741).abs() < 0.002, "{first} {second}");
        // What was within bounds at the first draw is as it was.
        let normal = drawn(1, Init::Normal { std: 0.5 }, 1, "w", COUNT);
        let same = normal.iter().zip(&values).filter(|(n, v)| n == v).count() as f64 / COUNT as f64;
        assert!((same - 0.9545).abs() < 0.002, "{same}");
    }

    #[test]
    fn uniform_values_fill_their_range_evenly() {
        let values = drawn(2, Init::Uniform { bound: 0.5 }, 1, "w", COUNT);
        assert!(values.iter().all(|v| v.abs() < 0.5));
        for tenth in 0..10 {
            let low = tenth as f64 / 10.0 - 0.5;
            let inside = mean(&values, |v| f64::from(v >= low && v < low + 0.1));
            assert!((inside - 0.1).abs() < 0.003, "from {low}: {inside}");
        }
    }

    #[test]
    fn neighbours_are_independent() {
        for init in [Init::Normal { std: 1.0 }, Init::Uniform { bound: 3f64.sqrt() }] {
            let values = drawn(1, init, 3, "w", COUNT);
            for lag in [1, 2, 3, 2 * WORDS, BLOCK] {
                let pairs = values.iter().zip(&values[lag..]).map(|(a, b)| f64::from(a * b));
                let correlation = pairs.sum::<f64>() / (COUNT - lag) as f64;
                assert!(correlation.abs() < 0.01, "lag {lag}: {correlation}");
            }
        }
    }

    #[test]
    fn values_depend_on_seed_name_and_index_alone() {
        for init in [Init::Normal { std: 1.0 }, Init::TruncatedNormal { std: 1.0 }, Init::Uniform { bound: 1.0 }] {
            let values = drawn(1, init, 1, "w", COUNT);
            assert_eq!(drawn(3, init, 1, "w", COUNT), values, "threads");
            assert_eq!(drawn(2, init, 1, "w", BLOCK + 7), values[..BLOCK + 7], "length");
            let differ = |other: Vec<f32>| other.iter().zip(&values).filter(|(a, b)| a == b).count() < 10;
            assert!(differ(drawn(1, init, 2, "w", COUNT)), "seed");
            assert!(differ(drawn(1, init, 1, "v", COUNT)), "name");
        }
        assert_eq!(drawn(2, Init::Constant(1.5), 1, "w", 3), [1.5; 3]);
        assert!(drawn(2, Init::Normal { std: 1.0 }, 1, "w", 0).is_empty());
    }

    #[test]
    fn logarithm_and_angle_agree_with_the_standard_library() {
        for i in 0..1 << 16 {
            // Both ends of the range and a walk through it.
            for bits in [i, (1 << 23) - 1 - i, i * 127] {
                let exact = ((f64::from(bits) + 0.5) / f64::from(1 << 23)).ln();
                let error = (f64::from(ln_uniform(bits)) - exact) / exact;
                assert!(error.abs() < 5e-7, "ln of {bits}: {error}");
            }
            let bits = i * 65_537;
            let angle = f64::from((bits >> 6) & 0xff_ffff) + 0.5 - f64::from(1 << 23);
            let turn = f64::from(bits >> 30) / 4.0 + angle / f64::from(1 << 26);
            let (sin, cos) = (turn * std::f64::consts::TAU).sin_cos();
            let got = cos_sin(bits);
            assert!((f64::from(got.0) - cos).abs() < 2e-7 && (f64::from(got.1) - sin).abs() < 2e-7, "{bits}: {got:?}");
        }
    }
}
