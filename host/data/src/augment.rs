//! From a decoded image to the model's input: crop, flip, RandAugment, normalise.
//!
//! The order is the studies' (and torchvision's): random resized crop, horizontal flip, RandAugment, then scaling to
//! 0..1 and normalising by channel. The test transform squashes the whole image to the model's size. All random numbers
//! of a sample come from one stream keyed by (seed, epoch, sample id).

use serde::{Deserialize, Serialize};

use crate::config::{DataConfig, setting};
use crate::decode::RgbImage;
use crate::error::DataError;
use crate::rand_augment::{RandAugmentConfig, rand_augment};
use crate::resize::{CropBox, Filter, Resizer};
use crate::rng::Rng;
use crate::stats::BadSample;

/// Random resized crop (Szegedy et al. 2015): a box of random area and aspect ratio, resized to the model's size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RandomResizedCrop {
    /// Area of the box as a fraction of the image, lowest and highest.
    pub scale: (f64, f64),
    /// Width over height of the box, lowest and highest; drawn evenly on a logarithmic scale.
    pub ratio: (f64, f64),
}

impl Default for RandomResizedCrop {
    fn default() -> Self {
        RandomResizedCrop { scale: (0.5, 1.0), ratio: (3.0 / 4.0, 4.0 / 3.0) }
    }
}

/// Augmentation of training images. The default is the studies'; turn `horizontal_flip` off where captions speak of
/// left and right.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AugmentConfig {
    /// Random crop; None squashes the whole image to the model's size.
    pub random_resized_crop: Option<RandomResizedCrop>,
    /// Probability of a left-right flip.
    pub horizontal_flip: f64,
    /// RandAugment; None applies none.
    pub rand_augment: Option<RandAugmentConfig>,
}

impl Default for AugmentConfig {
    fn default() -> Self {
        AugmentConfig {
            random_resized_crop: Some(RandomResizedCrop::default()),
            horizontal_flip: 0.5,
            rand_augment: Some(RandAugmentConfig::default()),
        }
    }
}

impl AugmentConfig {
    /// The settings that are out of range.
    pub fn check(&self) -> Vec<DataError> {
        let mut errors = self.rand_augment.map_or_else(Vec::new, |r| r.check());
        if !(0.0..=1.0).contains(&self.horizontal_flip) {
            let hint = "it is a probability; 0 turns flipping off";
            errors.push(setting("augment.horizontal_flip", "0 to 1", self.horizontal_flip, hint));
        }
        if let Some(crop) = self.random_resized_crop {
            let (low, high) = crop.scale;
            if !(low > 0.0 && low <= high && high <= 1.0) {
                let expected = "(low, high) with 0 < low ≤ high ≤ 1";
                let hint = "the studies use (0.5, 1.0)";
                errors.push(setting("augment.random_resized_crop.scale", expected, format!("({low}, {high})"), hint));
            }
            let (low, high) = crop.ratio;
            if !(low > 0.0 && low <= high && high.is_finite()) {
                let expected = "(low, high) with 0 < low ≤ high";
                let hint = "the usual ratio is (0.75, 1.3333)";
                errors.push(setting("augment.random_resized_crop.ratio", expected, format!("({low}, {high})"), hint));
            }
        }
        errors
    }
}

/// Recycled memory of one thread's transforms.
#[derive(Debug, Default)]
pub struct TransformScratch {
    resizer: Resizer,
    image: RgbImage,
    bytes: Vec<u8>,
}

/// Image transform of a configuration: RGB of any size to normalised `[3, size, size]`.
#[derive(Debug, Clone)]
pub struct ImageTransform {
    size: usize,
    augment: AugmentConfig,
    /// Normalised value of each channel's 256 levels.
    levels: [[f32; 256]; 3],
}

impl ImageTransform {
    /// The transform of a configuration, whose ranges the caller has checked.
    pub fn new(config: &DataConfig) -> Self {
        let levels =
            std::array::from_fn(|c| std::array::from_fn(|v| (v as f32 / 255.0 - config.mean[c]) / config.std[c]));
        ImageTransform { size: config.image_size, augment: config.augment, levels }
    }

    /// Height and width of the output.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The training transform; writes `3 · size · size` numbers, channel by channel.
    ///
    /// # Errors
    /// [`BadSample`] if the image cannot be resized.
    pub fn train(
        &self,
        rng: &mut Rng,
        image: &RgbImage,
        scratch: &mut TransformScratch,
        out: &mut [f32],
    ) -> Result<(), BadSample> {
        self.augmented(rng, image, scratch)?;
        self.normalize(&scratch.image, out);
        Ok(())
    }

    /// The training transform without its last step; writes `size · size` pixels of three bytes. A GPU looks their levels up
    /// itself ([`ImageTransform::levels`]).
    ///
    /// # Errors
    /// As [`ImageTransform::train`].
    pub fn train_pixels(
        &self,
        rng: &mut Rng,
        image: &RgbImage,
        scratch: &mut TransformScratch,
        out: &mut [u8],
    ) -> Result<(), BadSample> {
        self.augmented(rng, image, scratch)?;
        out.copy_from_slice(&scratch.image.pixels);
        Ok(())
    }

    /// Normalised value of each channel's 256 levels: `(level / 255 − mean) / std`.
    pub fn levels(&self) -> &[[f32; 256]; 3] {
        &self.levels
    }

    /// Leaves the augmented image in the scratch.
    fn augmented(&self, rng: &mut Rng, image: &RgbImage, scratch: &mut TransformScratch) -> Result<(), BadSample> {
        let TransformScratch { resizer, image: small, bytes } = scratch;
        let crop = match &self.augment.random_resized_crop {
            Some(config) => random_crop(config, rng, image.width, image.height),
            None => CropBox::whole(image),
        };
        small.resize_to(self.size, self.size);
        resizer.resize(image, crop, Filter::Bicubic, small)?;
        if rng.chance(self.augment.horizontal_flip) {
            flip_horizontal(small);
        }
        if let Some(config) = &self.augment.rand_augment {
            rand_augment(config, rng, small, bytes);
        }
        Ok(())
    }

    /// The test transform: the whole image squashed to size, normalised.
    ///
    /// # Errors
    /// [`BadSample`] if the image cannot be resized.
    pub fn test(&self, image: &RgbImage, scratch: &mut TransformScratch, out: &mut [f32]) -> Result<(), BadSample> {
        let TransformScratch { resizer, image: small, .. } = scratch;
        small.resize_to(self.size, self.size);
        resizer.resize(image, CropBox::whole(image), Filter::Bicubic, small)?;
        self.normalize(small, out);
        Ok(())
    }

    /// `(level / 255 − mean) / std`, and from pixels to planes.
    pub fn normalize(&self, image: &RgbImage, out: &mut [f32]) {
        let plane = image.width * image.height;
        let (red, rest) = out.split_at_mut(plane);
        let (green, blue) = rest.split_at_mut(plane);
        for (((pixel, r), g), b) in image.pixels.chunks_exact(3).zip(red).zip(green).zip(blue) {
            *r = self.levels[0][usize::from(pixel[0])];
            *g = self.levels[1][usize::from(pixel[1])];
            *b = self.levels[2][usize::from(pixel[2])];
        }
    }
}

/// Mirrors an image left to right, in place.
pub fn flip_horizontal(image: &mut RgbImage) {
    for row in image.pixels.chunks_exact_mut(image.width * 3) {
        let (pixels, _) = row.as_chunks_mut::<3>();
        pixels.reverse();
    }
}

/// The box of a random resized crop, as torchvision draws it: ten tries, then the largest central box whose aspect
/// ratio is in range.
pub fn random_crop(config: &RandomResizedCrop, rng: &mut Rng, width: usize, height: usize) -> CropBox {
    let area = (width * height) as f64;
    let (log_low, log_high) = (config.ratio.0.ln(), config.ratio.1.ln());
    for _ in 0..10 {
        let target = area * rng.uniform(config.scale.0, config.scale.1);
        let ratio = rng.uniform(log_low, log_high).exp();
        let w = (target * ratio).sqrt().round_ties_even() as usize;
        let h = (target / ratio).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let top = rng.below((height - h + 1) as u64) as usize;
            let left = rng.below((width - w + 1) as u64) as usize;
            return CropBox { top, left, height: h, width: w };
        }
    }
    let ratio = width as f64 / height as f64;
    let (w, h) = if ratio < config.ratio.0 {
        (width, (width as f64 / config.ratio.0).round_ties_even() as usize)
    } else if ratio > config.ratio.1 {
        ((height as f64 * config.ratio.1).round_ties_even() as usize, height)
    } else {
        (width, height)
    };
    let (w, h) = (w.clamp(1, width), h.clamp(1, height));
    CropBox { top: (height - h) / 2, left: (width - w) / 2, height: h, width: w }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_crops_lie_inside_and_cover_the_ranges() {
        let config = RandomResizedCrop { scale: (0.2, 0.9), ratio: (0.5, 2.0) };
        let (width, height) = (300, 200);
        let mut rng = Rng::new(1);
        let (mut smallest, mut largest, mut narrowest, mut widest) = (1.0f64, 0.0f64, 9.0f64, 0.0f64);
        for _ in 0..3000 {
            let b = random_crop(&config, &mut rng, width, height);
            assert!(b.left + b.width <= width && b.top + b.height <= height && b.width > 0 && b.height > 0);
            let area = (b.width * b.height) as f64 / (width * height) as f64;
            let ratio = b.width as f64 / b.height as f64;
            assert!((0.19..0.91).contains(&area) && (0.49..2.05).contains(&ratio), "{b:?}");
            (smallest, largest) = (smallest.min(area), largest.max(area));
            (narrowest, widest) = (narrowest.min(ratio), widest.max(ratio));
        }
        assert!(smallest < 0.22 && largest > 0.86 && narrowest < 0.55 && widest > 1.9);
    }

    /// No box of the allowed ratio fits: the largest central one is taken.
    #[test]
    fn extreme_shapes_fall_back_to_the_centre() {
        let config = RandomResizedCrop::default();
        let mut rng = Rng::new(2);
        let wide = random_crop(&config, &mut rng, 1000, 10);
        assert_eq!(wide, CropBox { top: 0, left: 493, height: 10, width: 13 });
        let tall = random_crop(&config, &mut rng, 10, 1000);
        assert_eq!(tall, CropBox { top: 493, left: 0, height: 13, width: 10 });
        let dot = random_crop(&config, &mut rng, 1, 1);
        assert_eq!(dot, CropBox { top: 0, left: 0, height: 1, width: 1 });
    }

    #[test]
    fn no_augmentation_is_the_test_transform() {
        let augment = AugmentConfig { random_resized_crop: None, horizontal_flip: 0.0, rand_augment: None };
        let transform = ImageTransform::new(&DataConfig { image_size: 9, augment, ..DataConfig::default() });
        let image = RgbImage { width: 14, height: 5, pixels: (0..210).map(|i| (i * 13) as u8).collect() };
        let mut scratch = TransformScratch::default();
        let (mut train, mut test) = (vec![0.0; 243], vec![1.0; 243]);
        transform.train(&mut Rng::new(3), &image, &mut scratch, &mut train).unwrap();
        transform.test(&image, &mut scratch, &mut test).unwrap();
        assert_eq!(train, test);
    }

    #[test]
    fn flips_happen_as_often_as_asked_and_never_at_zero() {
        let image = RgbImage { width: 2, height: 1, pixels: vec![0, 0, 0, 255, 255, 255] };
        for (probability, range) in [(0.0, 0..=0), (1.0, 1000..=1000), (0.5, 440..=560)] {
            let augment = AugmentConfig { random_resized_crop: None, horizontal_flip: probability, rand_augment: None };
            let mut transform = ImageTransform::new(&DataConfig { augment, ..DataConfig::default() });
            transform.size = 2;
            let flips = (0..1000).filter(|&i| {
                let mut out = vec![0.0; 12];
                let mut rng = Rng::new(crate::rng::key(&[i]));
                transform.train(&mut rng, &image, &mut TransformScratch::default(), &mut out).unwrap();
                out[0] > out[1]
            });
            let flips = flips.count();
            assert!(range.contains(&flips), "{probability}: {flips}");
        }
    }
}
