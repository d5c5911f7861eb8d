//! Pillow's antialiased resampling of 8-bit RGB, with a crop box cut out first (torchvision's `resized_crop`).
//!
//! Bicubic is the cubic convolution kernel with a = −0.5 (Keys 1981), widened by the reduction factor when shrinking.
//! Weights are fixed-point with 22 bits; rows are filtered first, rounded and clipped to 8 bit, then columns. This is
//! Pillow's arithmetic to the last bit, with integers only, so every CPU gives the same pixels.

use crate::decode::RgbImage;
use crate::stats::{BadSample, SkipCause};

/// Bits behind the point of the weights: 32 less 8 of the pixel and 2 of headroom for kernels that overshoot.
const PRECISION_BITS: u32 = 22;

/// A box of whole pixels inside an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CropBox {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl CropBox {
    /// The whole of an image.
    pub fn whole(image: &RgbImage) -> CropBox {
        CropBox { top: 0, left: 0, height: image.height, width: image.width }
    }
}

/// Resampling filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Cubic convolution, a = −0.5.
    Bicubic,
    /// Triangle.
    Bilinear,
}

impl Filter {
    /// Half the width of the kernel.
    fn support(self) -> f64 {
        match self {
            Filter::Bicubic => 2.0,
            Filter::Bilinear => 1.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Filter::Bilinear => (1.0 - x).max(0.0),
            Filter::Bicubic => {
                const A: f64 = -0.5;
                if x < 1.0 {
                    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * A
                } else {
                    0.0
                }
            }
        }
    }
}

/// The weights of one axis: for each output position the first input position, and its weights.
#[derive(Debug, Default)]
struct Axis {
    /// What the weights are for: input length, output length, filter.
    made_for: Option<(usize, usize, Filter)>,
    /// First input position, and where the weights start and end.
    spans: Vec<(usize, usize, usize)>,
    weights: Vec<i32>,
}

impl Axis {
    fn prepare(&mut self, input: usize, output: usize, filter: Filter) {
        if self.made_for == Some((input, output, filter)) {
            return;
        }
        self.made_for = Some((input, output, filter));
        self.spans.clear();
        self.weights.clear();
        let scale = input as f64 / output as f64;
        let filter_scale = scale.max(1.0);
        let support = filter.support() * filter_scale;
        let mut exact = Vec::with_capacity(2 * support.ceil() as usize + 1);
        for i in 0..output {
            let center = (i as f64 + 0.5) * scale;
            // Truncation towards zero, then clipping to the input, as Pillow does.
            let first = ((center - support + 0.5) as i64).max(0) as usize;
            let last = ((center + support + 0.5) as i64).clamp(0, input as i64) as usize;
            exact.clear();
            exact.extend((first..last).map(|x| filter.weight((x as f64 - center + 0.5) * (1.0 / filter_scale))));
            let sum: f64 = exact.iter().sum();
            let start = self.weights.len();
            self.weights.extend(exact.iter().map(|w| {
                let w = if sum != 0.0 { w / sum } else { *w } * f64::from(1u32 << PRECISION_BITS);
                // Half away from zero.
                (if w < 0.0 { w - 0.5 } else { w + 0.5 }) as i32
            }));
            self.spans.push((first, start, self.weights.len()));
        }
    }
}

/// Resizes with recycled buffers.
#[derive(Debug, Default)]
pub struct Resizer {
    horizontal: Axis,
    vertical: Axis,
    row: Vec<[u8; 4]>,
    narrow: Vec<u8>,
}

impl Resizer {
    /// Cuts out a box and resizes it to `out.width × out.height`, which the caller has set. Pixels outside of the box
    /// have no influence.
    ///
    /// # Errors
    /// [`BadSample`] if the box does not lie in the image, or has no pixels.
    pub fn resize(
        &mut self,
        image: &RgbImage,
        crop: CropBox,
        filter: Filter,
        out: &mut RgbImage,
    ) -> Result<(), BadSample> {
        let inside = crop.left + crop.width <= image.width && crop.top + crop.height <= image.height;
        if !inside || crop.width * crop.height * out.width * out.height == 0 {
            return Err(BadSample::new(SkipCause::CorruptImage, "resize: the crop box is empty or not in the image"));
        }
        if crop.width != out.width {
            self.horizontal.prepare(crop.width, out.width, filter);
        }
        if crop.height != out.height {
            self.vertical.prepare(crop.height, out.height, filter);
        }
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2, the only thing that the function asks for.
            unsafe { self.passes_avx2(image, crop, out) };
            return Ok(());
        }
        self.passes(image, crop, out);
        Ok(())
    }

    /// [`passes`](Self::passes) compiled for AVX2: the same integer arithmetic in wider registers.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn passes_avx2(&mut self, image: &RgbImage, crop: CropBox, out: &mut RgbImage) {
        self.passes(image, crop, out);
    }

    /// Both passes; an axis whose length does not change is copied.
    #[inline(always)]
    fn passes(&mut self, image: &RgbImage, crop: CropBox, out: &mut RgbImage) {
        let stride = out.width * 3;
        let only_horizontal = crop.height == out.height;
        self.narrow.resize(crop.height * stride, 0);
        let target = if only_horizontal { &mut out.pixels } else { &mut self.narrow };
        for (y, narrow) in target.chunks_exact_mut(stride).enumerate() {
            let start = ((crop.top + y) * image.width + crop.left) * 3;
            let source = &image.pixels[start..start + crop.width * 3];
            if crop.width == out.width {
                narrow.copy_from_slice(source);
            } else {
                filter_row(&self.horizontal, source, &mut self.row, narrow);
            }
        }
        if !only_horizontal {
            for (span, row) in self.vertical.spans.iter().zip(out.pixels.chunks_exact_mut(stride)) {
                let &(first, start, end) = span;
                filter_column(&self.vertical.weights[start..end], &self.narrow[first * stride..], stride, row);
            }
        }
    }
}

#[inline(always)]
fn clip(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Half a unit of the result, so that the shift rounds.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// One row of the horizontal pass. Pixels are widened to four bytes first, so that one register holds a pixel.
#[inline(always)]
fn filter_row(axis: &Axis, source: &[u8], row: &mut Vec<[u8; 4]>, out: &mut [u8]) {
    row.clear();
    row.extend(source.chunks_exact(3).map(|p| [p[0], p[1], p[2], 0]));
    for (&(first, start, end), out) in axis.spans.iter().zip(out.chunks_exact_mut(3)) {
        let weights = &axis.weights[start..end];
        let mut sum = [HALF; 4];
        for (pixel, &weight) in row[first..first + weights.len()].iter().zip(weights) {
            for c in 0..4 {
                sum[c] += i32::from(pixel[c]) * weight;
            }
        }
        out.copy_from_slice(&[clip(sum[0]), clip(sum[1]), clip(sum[2])]);
    }
}

/// One row of the vertical pass: the weighted sum of the rows that `source` starts with.
#[inline(always)]
fn filter_column(weights: &[i32], source: &[u8], stride: usize, out: &mut [u8]) {
    const LANES: usize = 32;
    let mut blocks = out.chunks_exact_mut(LANES);
    let mut at = 0;
    for block in &mut blocks {
        let mut sum = [HALF; LANES];
        for (k, &weight) in weights.iter().enumerate() {
            let pixels = &source[k * stride + at..k * stride + at + LANES];
            for i in 0..LANES {
                sum[i] += i32::from(pixels[i]) * weight;
            }
        }
        for i in 0..LANES {
            block[i] = clip(sum[i]);
        }
        at += LANES;
    }
    for (i, o) in blocks.into_remainder().iter_mut().enumerate() {
        let taps = weights.iter().enumerate();
        *o = clip(taps.fold(HALF, |sum, (k, &w)| sum + i32::from(source[k * stride + at + i]) * w));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// The portable passes and those of this CPU give the same pixels, for sizes that leave odd remainders.
    #[test]
    fn every_instruction_set_gives_the_same_pixels() {
        let mut rng = Rng::new(5);
        for (width, height, out_width, out_height) in
            [(40, 31, 17, 23), (13, 9, 64, 50), (97, 64, 11, 64), (8, 80, 8, 13)]
        {
            let pixels = (0..width * height * 3).map(|_| rng.next_u64() as u8).collect();
            let image = RgbImage { width, height, pixels };
            let crop = CropBox::whole(&image);
            let (mut a, mut b) = (RgbImage::default(), RgbImage::default());
            a.resize_to(out_width, out_height);
            b.resize_to(out_width, out_height);
            let mut resizer = Resizer::default();
            resizer.resize(&image, crop, Filter::Bicubic, &mut a).unwrap();
            resizer.passes(&image, crop, &mut b);
            assert_eq!(a, b, "{width}×{height} to {out_width}×{out_height}");
        }
    }

    #[test]
    fn a_box_outside_of_the_image_is_an_error() {
        let mut image = RgbImage::default();
        image.resize_to(4, 4);
        let mut out = image.clone();
        for crop in [
            CropBox { top: 0, left: 1, height: 4, width: 4 },
            CropBox { top: 4, left: 0, height: 1, width: 4 },
            CropBox { top: 0, left: 0, height: 0, width: 4 },
        ] {
            assert!(Resizer::default().resize(&image, crop, Filter::Bicubic, &mut out).is_err(), "{crop:?}");
        }
    }

    #[test]
    fn the_same_size_is_a_copy() {
        let image = RgbImage { width: 2, height: 1, pixels: vec![1, 2, 3, 4, 5, 6] };
        let mut out = RgbImage::default();
        out.resize_to(2, 1);
        Resizer::default().resize(&image, CropBox::whole(&image), Filter::Bicubic, &mut out).unwrap();
        assert_eq!(out, image);
    }
}
