//! Pillow's antialiased resampling of 8-bit RGB, with a crop box cut out first (torchvision's `resized_crop`).
//!
//! Bicubic is the cubic convolution kernel with a = −0.5 (Keys 1981), widened by the reduction factor when shrinking;
//! rows are filtered first, rounded to 8 bit, then columns.

use fast_image_resize::images::{CroppedImage, Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer as Convolver};

use crate::decode::RgbImage;
use crate::stats::{BadSample, SkipCause};

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

/// Resizes with recycled buffers.
#[derive(Debug, Default)]
pub struct Resizer {
    convolver: Convolver,
}

impl Resizer {
    /// Cuts out a box and resizes it to `out.width × out.height`, which the caller has set. Pixels outside of the box
    /// have no influence.
    ///
    /// # Errors
    /// [`BadSample`] if the box does not lie in the image.
    pub fn resize(
        &mut self,
        image: &RgbImage,
        crop: CropBox,
        filter: Filter,
        out: &mut RgbImage,
    ) -> Result<(), BadSample> {
        if (crop.width, crop.height) == (out.width, out.height) {
            return copy_box(image, crop, out);
        }
        let bad = |e: &dyn std::fmt::Display| BadSample::new(SkipCause::CorruptImage, format!("resize: {e}"));
        let source = ImageRef::new(image.width as u32, image.height as u32, &image.pixels, PixelType::U8x3)
            .map_err(|e| bad(&e))?;
        let source = CroppedImage::new(
            &source,
            crop.left as u32,
            crop.top as u32,
            crop.width as u32,
            crop.height as u32,
        )
        .map_err(|e| bad(&e))?;
        let (width, height) = (out.width as u32, out.height as u32);
        let mut target =
            Image::from_slice_u8(width, height, &mut out.pixels, PixelType::U8x3).map_err(|e| bad(&e))?;
        let filter = match filter {
            Filter::Bicubic => FilterType::CatmullRom,
            Filter::Bilinear => FilterType::Bilinear,
        };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
        self.convolver.resize(&source, &mut target, &options).map_err(|e| bad(&e))
    }
}

/// Nothing to resample: Pillow copies too.
fn copy_box(image: &RgbImage, crop: CropBox, out: &mut RgbImage) -> Result<(), BadSample> {
    if crop.left + crop.width > image.width || crop.top + crop.height > image.height {
        return Err(BadSample::new(SkipCause::CorruptImage, "resize: the crop box does not lie in the image"));
    }
    for (y, row) in out.pixels.chunks_exact_mut(crop.width * 3).enumerate() {
        let start = ((crop.top + y) * image.width + crop.left) * 3;
        row.copy_from_slice(&image.pixels[start..start + crop.width * 3]);
    }
    Ok(())
}
