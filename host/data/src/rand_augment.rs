//! RandAugment as the studies use it (Cubuk et al. 2020, "RandAugment", in the form used by ALBEF): `num_ops` operations
//! drawn with replacement from a list of ten, each applied with a probability of one half, all at one magnitude of 0 to
//! 10; shears, translations and rotations go either way.
//!
//! The operations reproduce the studies' OpenCV and NumPy arithmetic (golden-tested), with one deliberate change:
//! sharpness clips to 0..255 where theirs wraps round.

use serde::{Deserialize, Serialize};

use crate::config::setting;
use crate::decode::RgbImage;
use crate::error::DataError;
use crate::rng::Rng;

/// Grey that geometric operations fill with.
const FILL: i32 = 128;

/// Largest magnitude.
pub const MAX_MAGNITUDE: f64 = 10.0;

/// Settings of RandAugment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RandAugmentConfig {
    /// Operations drawn for each image.
    pub num_ops: usize,
    /// Strength, 0 to 10.
    pub magnitude: f64,
    /// Probability with which a drawn operation is applied.
    pub probability: f64,
}

impl Default for RandAugmentConfig {
    fn default() -> Self {
        RandAugmentConfig { num_ops: 2, magnitude: 7.0, probability: 0.5 }
    }
}

impl RandAugmentConfig {
    pub(crate) fn check(&self) -> Vec<DataError> {
        let mut errors = Vec::new();
        let hint = "the studies use (num_ops: 2, magnitude: 7, probability: 0.5)";
        if self.num_ops > 100 {
            errors.push(setting("augment.rand_augment.num_ops", "0 to 100", self.num_ops, hint));
        }
        if !(0.0..=MAX_MAGNITUDE).contains(&self.magnitude) {
            errors.push(setting("augment.rand_augment.magnitude", "0 to 10", self.magnitude, hint));
        }
        if !(0.0..=1.0).contains(&self.probability) {
            errors.push(setting("augment.rand_augment.probability", "0 to 1", self.probability, hint));
        }
        errors
    }
}

/// One operation with its argument.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Op {
    /// Nothing.
    Identity,
    /// Stretches each channel to 0..255.
    AutoContrast,
    /// Equalises each channel's histogram.
    Equalize,
    /// Times a factor.
    Brightness(f32),
    /// Away from a smoothed image by a factor; 1 changes nothing.
    Sharpness(f32),
    /// Rows move by factor · y.
    ShearX(f32),
    /// Columns move by factor · x.
    ShearY(f32),
    /// To the left by pixels.
    TranslateX(f32),
    /// Upwards by pixels.
    TranslateY(f32),
    /// Counter-clockwise by degrees.
    Rotate(f64),
}

/// How many operations [`Op::at`] knows.
const OPS: u64 = 10;

impl Op {
    /// The operation of a number below ten at a magnitude; `negative` turns its direction round.
    pub fn at(number: u64, magnitude: f64, negative: bool) -> Op {
        let level = magnitude / MAX_MAGNITUDE;
        let signed = |value: f64| if negative { -value } else { value };
        match number {
            0 => Op::Identity,
            1 => Op::AutoContrast,
            2 => Op::Equalize,
            3 => Op::Brightness((level * 1.8 + 0.1) as f32),
            4 => Op::Sharpness((level * 1.8 + 0.1) as f32),
            5 => Op::ShearX(signed(level * 0.3) as f32),
            6 => Op::ShearY(signed(level * 0.3) as f32),
            7 => Op::TranslateX(signed(level * 10.0) as f32),
            8 => Op::TranslateY(signed(level * 10.0) as f32),
            _ => Op::Rotate(signed(level * 30.0)),
        }
    }

    /// Applies the operation in place; `scratch` is recycled memory.
    pub fn apply(self, image: &mut RgbImage, scratch: &mut Vec<u8>) {
        let (w, h) = (image.width as f64, image.height as f64);
        match self {
            Op::Identity => {}
            Op::AutoContrast => per_channel_table(image, auto_contrast),
            Op::Equalize => per_channel_table(image, equalize),
            Op::Brightness(factor) => {
                let table = std::array::from_fn(|v| (v as f32 * factor).clamp(0.0, 255.0) as u8);
                image.pixels.iter_mut().for_each(|p: &mut u8| *p = lookup(&table, *p));
            }
            Op::Sharpness(factor) => sharpness(image, factor, scratch),
            Op::ShearX(f) => warp(image, [1.0, f64::from(f), 0.0, 0.0, 1.0, 0.0], scratch),
            Op::ShearY(f) => warp(image, [1.0, 0.0, 0.0, f64::from(f), 1.0, 0.0], scratch),
            Op::TranslateX(d) => warp(image, [1.0, 0.0, -f64::from(d), 0.0, 1.0, 0.0], scratch),
            Op::TranslateY(d) => warp(image, [1.0, 0.0, 0.0, 0.0, 1.0, -f64::from(d)], scratch),
            Op::Rotate(degrees) => {
                let (sin, cos) = degrees.to_radians().sin_cos();
                let (cx, cy) = (w / 2.0, h / 2.0);
                let m = [cos, sin, (1.0 - cos) * cx - sin * cy, -sin, cos, sin * cx + (1.0 - cos) * cy];
                warp(image, m, scratch);
            }
        }
    }
}

/// Draws and applies the operations of one image.
pub fn rand_augment(config: &RandAugmentConfig, rng: &mut Rng, image: &mut RgbImage, scratch: &mut Vec<u8>) {
    for _ in 0..config.num_ops {
        // Always three draws, so that one operation's outcome does not shift the next one's numbers.
        let (number, apply, negative) = (rng.below(OPS), rng.chance(config.probability), rng.chance(0.5));
        if apply {
            Op::at(number, config.magnitude, negative).apply(image, scratch);
        }
    }
}

#[inline]
fn lookup(table: &[u8; 256], value: u8) -> u8 {
    table[usize::from(value)]
}

/// Maps each channel through a table made from its histogram; None leaves the channel alone.
fn per_channel_table(image: &mut RgbImage, make: impl Fn(&[u32; 256]) -> Option<[u8; 256]>) {
    let mut histograms = [[0u32; 256]; 3];
    for pixel in image.pixels.chunks_exact(3) {
        for (histogram, &value) in histograms.iter_mut().zip(pixel) {
            histogram[usize::from(value)] += 1;
        }
    }
    let identity = std::array::from_fn(|v| v as u8);
    let tables = histograms.map(|h| make(&h).unwrap_or(identity));
    for pixel in image.pixels.chunks_exact_mut(3) {
        for (value, table) in pixel.iter_mut().zip(&tables) {
            *value = lookup(table, *value);
        }
    }
}

fn auto_contrast(histogram: &[u32; 256]) -> Option<[u8; 256]> {
    let low = histogram.iter().position(|&n| n > 0)?;
    let high = histogram.iter().rposition(|&n| n > 0)?;
    if high <= low {
        return None;
    }
    let scale = 255.0 / (high - low) as f64;
    let offset = -(low as f64) * scale;
    Some(std::array::from_fn(|v| (v as f64 * scale + offset).clamp(0.0, 255.0) as u8))
}

fn equalize(histogram: &[u32; 256]) -> Option<[u8; 256]> {
    let last = histogram.iter().rposition(|&n| n > 0)?;
    let step = (histogram.iter().sum::<u32>() - histogram[last]) / 255;
    if step == 0 {
        return None;
    }
    let mut sum = step / 2;
    Some(std::array::from_fn(|v| {
        let value = (sum / step).min(255) as u8;
        sum += histogram[v];
        value
    }))
}

/// Blends with a 3×3 smoothing (weights 1, centre 5, over 13); the border row and column stay.
fn sharpness(image: &mut RgbImage, factor: f32, scratch: &mut Vec<u8>) {
    let (w, h) = (image.width, image.height);
    if w < 3 || h < 3 {
        return;
    }
    let stride = w * 3;
    scratch.clear();
    scratch.extend_from_slice(&image.pixels);
    for y in 1..h - 1 {
        let (above, here, below) = (
            &scratch[(y - 1) * stride..y * stride],
            &scratch[y * stride..(y + 1) * stride],
            &scratch[(y + 1) * stride..(y + 2) * stride],
        );
        let out = &mut image.pixels[y * stride..(y + 1) * stride];
        for i in 3..stride - 3 {
            let column = |k: usize| u32::from(above[k]) + u32::from(here[k]) + u32::from(below[k]);
            let sum = column(i - 3) + column(i) + column(i + 3) + 4 * u32::from(here[i]);
            // Rounded to nearest; 13 is odd, so there are no ties.
            let smooth = ((2 * sum + 13) / 26) as f32;
            out[i] = (smooth + factor * (f32::from(here[i]) - smooth)).clamp(0.0, 255.0) as u8;
        }
    }
}

/// OpenCV's `warpAffine` with bilinear interpolation and a constant border, including its fixed-point arithmetic:
/// coordinates in 1/1024 rounded to 1/32 of a pixel, weights in 1/1024.
///
/// `m` maps source to target, as its callers in the studies write it; the inverse is applied to target pixels.
fn warp(image: &mut RgbImage, m: [f64; 6], scratch: &mut Vec<u8>) {
    let det = m[0] * m[4] - m[1] * m[3];
    let d = if det == 0.0 { 0.0 } else { 1.0 / det };
    let (a, b, c, e) = (m[4] * d, -m[1] * d, -m[3] * d, m[0] * d);
    let (tx, ty) = (-a * m[2] - b * m[5], -c * m[2] - e * m[5]);
    let fixed = |v: f64| (v * 1024.0).round_ties_even() as i64;
    let (w, h) = (image.width as i64, image.height as i64);
    scratch.clear();
    scratch.extend_from_slice(&image.pixels);
    let source: &[u8] = scratch;
    for y in 0..h {
        // Half of 1/32 pixel, for rounding by the shift below.
        let x0 = fixed(b * y as f64 + tx) + 16;
        let y0 = fixed(e * y as f64 + ty) + 16;
        let row = &mut image.pixels[(y * w * 3) as usize..((y + 1) * w * 3) as usize];
        for (x, out) in row.chunks_exact_mut(3).enumerate() {
            let sx = (x0 + fixed(a * x as f64)) >> 5;
            let sy = (y0 + fixed(c * x as f64)) >> 5;
            let (fx, fy) = ((sx & 31) as i32, (sy & 31) as i32);
            let (px, py) = (sx >> 5, sy >> 5);
            let weights = [(32 - fx) * (32 - fy), fx * (32 - fy), (32 - fx) * fy, fx * fy];
            if px >= 0 && py >= 0 && px + 1 < w && py + 1 < h {
                let at = ((py * w + px) * 3) as usize;
                let (top, bottom) = (&source[at..at + 6], &source[at + (w * 3) as usize..][..6]);
                for k in 0..3 {
                    let sum = weights[0] * i32::from(top[k])
                        + weights[1] * i32::from(top[k + 3])
                        + weights[2] * i32::from(bottom[k])
                        + weights[3] * i32::from(bottom[k + 3]);
                    out[k] = ((sum + 512) >> 10) as u8;
                }
            } else {
                let tap = |x: i64, y: i64, k: usize| {
                    let inside = (0..w).contains(&x) && (0..h).contains(&y);
                    if inside { i32::from(source[((y * w + x) * 3) as usize + k]) } else { FILL }
                };
                for (k, o) in out.iter_mut().enumerate() {
                    let sum = weights[0] * tap(px, py, k)
                        + weights[1] * tap(px + 1, py, k)
                        + weights[2] * tap(px, py + 1, k)
                        + weights[3] * tap(px + 1, py + 1, k);
                    *o = ((sum + 512) >> 10) as u8;
                }
            }
        }
    }
}
