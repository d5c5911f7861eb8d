//! Encoded image to 8-bit RGB, as Pillow's `Image.open(...).convert("RGB")` gives it.
//!
//! JPEG, PNG and WebP, told apart by their first bytes and not by their names. Alpha is dropped without blending, grey
//! and palette images are widened, 16-bit channels keep their high byte, and EXIF orientation is ignored.

use std::io::Cursor;

use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use crate::stats::{BadSample, SkipCause};

/// Most pixels of an image: a small file may claim any size, and memory must not follow it.
pub const MAX_PIXELS: usize = 1 << 27;

/// Longest side that the JPEG decoder is allowed.
const MAX_SIDE: usize = 1 << 16;

/// An 8-bit RGB image, `[height, width, 3]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RgbImage {
    /// Pixels a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height · width · 3` bytes.
    pub pixels: Vec<u8>,
}

impl RgbImage {
    /// Sets the size, keeping the allocation; the contents are unspecified.
    pub fn resize_to(&mut self, width: usize, height: usize) {
        (self.width, self.height) = (width, height);
        self.pixels.resize(width * height * 3, 0);
    }
}

/// Decodes into recycled buffers.
#[derive(Debug, Default)]
pub struct Decoder {
    scratch: Vec<u8>,
}

impl Decoder {
    /// Decodes a file.
    ///
    /// # Errors
    /// [`BadSample`] with the cause: no known format, cut short, refused by its decoder, or too large.
    pub fn decode(&mut self, file: &[u8], out: &mut RgbImage) -> Result<(), BadSample> {
        match file {
            [0xff, 0xd8, ..] => self.jpeg(file, out),
            [0x89, b'P', b'N', b'G', ..] => self.png(file, out),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => self.webp(file, out),
            [] => Err(BadSample::new(SkipCause::TruncatedImage, "the image has no bytes")),
            _ => {
                let start: String = file.iter().take(8).map(|b| format!("{b:02x} ")).collect();
                Err(BadSample::new(SkipCause::UnsupportedImage, format!("no JPEG, PNG or WebP; starts with {start}")))
            }
        }
    }

    fn jpeg(&mut self, file: &[u8], out: &mut RgbImage) -> Result<(), BadSample> {
        // The decoder fills up what is missing with grey; Pillow refuses such files, and so do we.
        if !jpeg_is_complete(file) {
            return Err(BadSample::new(SkipCause::TruncatedImage, "the JPEG has no end-of-image mark"));
        }
        let bad = |e: zune_jpeg::errors::DecodeErrors| BadSample::new(SkipCause::CorruptImage, format!("JPEG: {e}"));
        if has_separate_scans(file) {
            return self.separate_scans(file, out);
        }
        let options = DecoderOptions::default().set_max_width(MAX_SIDE).set_max_height(MAX_SIDE);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(file), options);
        decoder.decode_headers().map_err(bad)?;
        let (width, height) = decoder.dimensions().unwrap_or((0, 0));
        check_size(width, height)?;
        // CMYK is converted here: Pillow's formula is not the decoder's.
        let wanted = match decoder.input_colorspace() {
            Some(ColorSpace::Luma) => ColorSpace::Luma,
            Some(ColorSpace::CMYK) => ColorSpace::CMYK,
            Some(ColorSpace::YCCK) => ColorSpace::YCCK,
            _ => ColorSpace::RGB,
        };
        decoder.set_options(options.jpeg_set_out_colorspace(wanted));
        out.resize_to(width, height);
        if wanted == ColorSpace::RGB {
            return decoder.decode_into(&mut out.pixels).map_err(bad);
        }
        let size = decoder.output_buffer_size().unwrap_or(0);
        self.scratch.resize(size, 0);
        decoder.decode_into(&mut self.scratch).map_err(bad)?;
        match wanted {
            ColorSpace::Luma => from_grey(&self.scratch, 1, &mut out.pixels),
            ColorSpace::YCCK => {
                ycck_to_inverted_cmyk(&mut self.scratch);
                from_inverted_cmyk(&self.scratch, &mut out.pixels);
            }
            _ => from_inverted_cmyk(&self.scratch, &mut out.pixels),
        }
        Ok(())
    }

    /// Sequential JPEGs with a scan for each component: zune-jpeg 0.5 mixes up their planes where chroma is subsampled.
    fn separate_scans(&mut self, file: &[u8], out: &mut RgbImage) -> Result<(), BadSample> {
        let bad = |e: jpeg_decoder::Error| BadSample::new(SkipCause::CorruptImage, format!("JPEG: {e}"));
        let mut decoder = jpeg_decoder::Decoder::new(file);
        decoder.set_max_decoding_buffer_size(4 * MAX_PIXELS);
        decoder.read_info().map_err(bad)?;
        let Some(info) = decoder.info() else {
            return Err(BadSample::new(SkipCause::CorruptImage, "JPEG: no frame header"));
        };
        check_size(info.width.into(), info.height.into())?;
        let pixels = decoder.decode().map_err(bad)?;
        out.resize_to(info.width.into(), info.height.into());
        match info.pixel_format {
            jpeg_decoder::PixelFormat::L8 => from_grey(&pixels, 1, &mut out.pixels),
            jpeg_decoder::PixelFormat::RGB24 => out.pixels.copy_from_slice(&pixels),
            jpeg_decoder::PixelFormat::CMYK32 => from_inverted_cmyk(&pixels, &mut out.pixels),
            jpeg_decoder::PixelFormat::L16 => {
                return Err(BadSample::new(SkipCause::UnsupportedImage, "a JPEG with 16 bits a sample"));
            }
        }
        Ok(())
    }

    fn png(&mut self, file: &[u8], out: &mut RgbImage) -> Result<(), BadSample> {
        let bad = |e: png::DecodingError| match e {
            png::DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                BadSample::new(SkipCause::TruncatedImage, "the PNG ends too early")
            }
            e => BadSample::new(SkipCause::CorruptImage, format!("PNG: {e}")),
        };
        let limits = png::Limits { bytes: 8 * MAX_PIXELS };
        let mut decoder = png::Decoder::new_with_limits(Cursor::new(file), limits);
        decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
        let (width, height) = decoder.read_header_info().map_err(bad)?.size();
        let (width, height) = (width as usize, height as usize);
        check_size(width, height)?;
        let mut reader = decoder.read_info().map_err(bad)?;
        let size = reader.output_buffer_size().unwrap_or(0);
        self.scratch.resize(size, 0);
        let info = reader.next_frame(&mut self.scratch).map_err(bad)?;
        out.resize_to(width, height);
        let pixels = &self.scratch[..info.buffer_size().min(size)];
        match info.color_type {
            png::ColorType::Rgb => out.pixels.copy_from_slice(pixels),
            png::ColorType::Rgba => drop_alpha(pixels, &mut out.pixels),
            png::ColorType::Grayscale => from_grey(pixels, 1, &mut out.pixels),
            png::ColorType::GrayscaleAlpha => from_grey(pixels, 2, &mut out.pixels),
            png::ColorType::Indexed => {
                return Err(BadSample::new(SkipCause::CorruptImage, "PNG: a palette image without its palette"));
            }
        }
        Ok(())
    }

    fn webp(&mut self, file: &[u8], out: &mut RgbImage) -> Result<(), BadSample> {
        // RIFF: the four bytes after the name are the length of all that follows them.
        let length = file.get(4..8).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes) as usize;
        if file.len() < length.saturating_add(8) {
            return Err(BadSample::new(SkipCause::TruncatedImage, "the WebP is shorter than its header says"));
        }
        let bad = |e: image_webp::DecodingError| match e {
            image_webp::DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                BadSample::new(SkipCause::TruncatedImage, "the WebP ends too early")
            }
            e => BadSample::new(SkipCause::CorruptImage, format!("WebP: {e}")),
        };
        let mut decoder = image_webp::WebPDecoder::new(Cursor::new(file)).map_err(bad)?;
        let (width, height) = decoder.dimensions();
        check_size(width as usize, height as usize)?;
        let size = decoder.output_buffer_size().unwrap_or(0);
        out.resize_to(width as usize, height as usize);
        if !decoder.has_alpha() {
            return decoder.read_image(&mut out.pixels).map_err(bad);
        }
        self.scratch.resize(size, 0);
        decoder.read_image(&mut self.scratch).map_err(bad)?;
        drop_alpha(&self.scratch, &mut out.pixels);
        Ok(())
    }
}

fn check_size(width: usize, height: usize) -> Result<(), BadSample> {
    match width.checked_mul(height) {
        Some(0) => Err(BadSample::new(SkipCause::CorruptImage, format!("{width}×{height} pixels"))),
        Some(n) if n <= MAX_PIXELS => Ok(()),
        _ => Err(BadSample::new(SkipCause::ImageTooLarge, format!("{width}×{height} pixels"))),
    }
}

/// Whether an end-of-image marker follows the first scan. In coded data 0xff is always followed by 0x00 or a restart
/// marker, so the pair ff d9 is the marker; the search starts at the scan because a thumbnail in the header has its own.
fn jpeg_is_complete(file: &[u8]) -> bool {
    let mut at = 2;
    // Segments: ff, marker, two bytes of length that count themselves.
    while let Some(&[0xff, marker]) = file.get(at..at + 2) {
        if marker == 0xff {
            at += 1;
            continue;
        }
        let Some(&[high, low]) = file.get(at + 2..at + 4) else { return false };
        at += 2 + usize::from(u16::from_be_bytes([high, low]));
        if marker == 0xda {
            break;
        }
    }
    let Some(scans) = file.get(at..) else { return false };
    // From the end, where the marker nearly always is.
    scans.windows(2).rev().any(|pair| pair == [0xff, 0xd9])
}

fn drop_alpha(rgba: &[u8], rgb: &mut [u8]) {
    for (out, pixel) in rgb.chunks_exact_mut(3).zip(rgba.chunks_exact(4)) {
        out.copy_from_slice(&pixel[..3]);
    }
}

/// Grey, or grey with alpha (`channels` = 2), to RGB.
fn from_grey(grey: &[u8], channels: usize, rgb: &mut [u8]) {
    for (out, pixel) in rgb.chunks_exact_mut(3).zip(grey.chunks_exact(channels)) {
        out.fill(pixel[0]);
    }
}

/// YCCK (Adobe's transform 2) to CMYK, in place: the first three channels are YCbCr of what CMY are the negatives of.
fn ycck_to_inverted_cmyk(pixels: &mut [u8]) {
    for pixel in pixels.chunks_exact_mut(4) {
        let [y, cb, cr] = [f32::from(pixel[0]), f32::from(pixel[1]) - 128.0, f32::from(pixel[2]) - 128.0];
        let rgb = [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb];
        for (out, value) in pixel.iter_mut().zip(rgb) {
            *out = 255 - value.round().clamp(0.0, 255.0) as u8;
        }
    }
}

/// CMYK as Adobe writes it into JPEG (inverted: 255 is no ink) to RGB as Pillow does: each colour times the paper's
/// white, `255 − (c·k' / 255 + k)` with k' = 255 − k, which in inverted values is `c·k / 255`, rounded.
fn from_inverted_cmyk(cmyk: &[u8], rgb: &mut [u8]) {
    for (out, pixel) in rgb.chunks_exact_mut(3).zip(cmyk.chunks_exact(4)) {
        let key = u32::from(pixel[3]);
        for (o, &c) in out.iter_mut().zip(&pixel[..3]) {
            // Pillow's MULDIV255 on the ink values.
            let t = (255 - u32::from(c)) * key + 128;
            *o = (key as i32 - (((t >> 8) + t) >> 8) as i32).clamp(0, 255) as u8;
        }
    }
}

/// Whether a sequential JPEG's first scan holds fewer components than its frame.
fn has_separate_scans(file: &[u8]) -> bool {
    let mut components = None;
    let mut at = 2;
    while let Some(&[0xff, marker, high, low]) = file.get(at..at + 4).and_then(|m| m.first_chunk::<4>()) {
        match marker {
            // Fill bytes before a marker.
            0xff => {
                at += 1;
                continue;
            }
            0xc0 | 0xc1 => components = file.get(at + 9).copied(),
            0xda => return components.is_some_and(|n| file.get(at + 4).is_some_and(|&scan| scan < n)),
            _ => {}
        }
        at += 2 + usize::from(u16::from_be_bytes([high, low]));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(file: &[u8]) -> Result<RgbImage, SkipCause> {
        let mut image = RgbImage::default();
        Decoder::default().decode(file, &mut image).map(|()| image).map_err(|bad| bad.cause)
    }

    fn png(color: png::ColorType, depth: png::BitDepth, width: u32, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut encoder = png::Encoder::new(&mut out, width, 1);
        encoder.set_color(color);
        encoder.set_depth(depth);
        encoder.write_header().unwrap().write_image_data(data).unwrap();
        out
    }

    #[test]
    fn every_kind_of_png_becomes_rgb() {
        use png::{BitDepth, ColorType};
        let pixels = |file: Vec<u8>| decode(&file).unwrap().pixels;
        assert_eq!(pixels(png(ColorType::Grayscale, BitDepth::One, 2, &[0b0100_0000])), [0, 0, 0, 255, 255, 255]);
        assert_eq!(pixels(png(ColorType::Grayscale, BitDepth::Sixteen, 1, &[7, 200])), [7, 7, 7]);
        assert_eq!(pixels(png(ColorType::GrayscaleAlpha, BitDepth::Eight, 1, &[9, 0])), [9, 9, 9]);
        assert_eq!(pixels(png(ColorType::Rgb, BitDepth::Sixteen, 1, &[1, 99, 2, 99, 3, 99])), [1, 2, 3]);
        assert_eq!(pixels(png(ColorType::Rgba, BitDepth::Eight, 1, &[1, 2, 3, 0])), [1, 2, 3]);
    }

    /// The sample data's own encoder writes a scan for each component.
    #[test]
    fn a_scan_for_each_component() {
        let colours = [[250u8, 20, 30], [20, 240, 40], [30, 50, 230], [240, 230, 40]];
        let pixels: Vec<u8> = (0..64 * 64).flat_map(|i| colours[i % 64 / 32 + 2 * (i / 64 / 32)]).collect();
        for sampling in [jpeg_encoder::SamplingFactor::F_1_1, jpeg_encoder::SamplingFactor::F_2_2] {
            for optimized in [false, true] {
                let mut file = Vec::new();
                let mut encoder = jpeg_encoder::Encoder::new(&mut file, 90);
                encoder.set_sampling_factor(sampling);
                encoder.set_optimized_huffman_tables(optimized);
                encoder.encode(&pixels, 64, 64, jpeg_encoder::ColorType::Rgb).unwrap();
                assert_eq!(has_separate_scans(&file), optimized, "the encoder has changed its scans");
                let image = decode(&file).unwrap();
                let total: u32 = image.pixels.iter().zip(&pixels).map(|(a, b)| u32::from(a.abs_diff(*b))).sum();
                assert!(total < 5 * pixels.len() as u32, "{sampling:?} {optimized}: {total}");
            }
        }
    }

    #[test]
    fn webp_with_and_without_alpha() {
        let rgba = [1, 2, 3, 255, 40, 50, 60, 0, 70, 80, 90, 128, 5, 5, 5, 5];
        let mut file = Vec::new();
        image_webp::WebPEncoder::new(&mut file).encode(&rgba, 2, 2, image_webp::ColorType::Rgba8).unwrap();
        assert_eq!(decode(&file[..file.len() - 12]).unwrap_err(), SkipCause::TruncatedImage);
        let image = decode(&file).unwrap();
        assert_eq!((image.width, image.height), (2, 2));
        assert_eq!(image.pixels[..3], [1, 2, 3]);
        let rgb = [1, 2, 3, 4, 5, 6];
        let mut file = Vec::new();
        image_webp::WebPEncoder::new(&mut file).encode(&rgb, 1, 2, image_webp::ColorType::Rgb8).unwrap();
        assert_eq!(decode(&file).unwrap().pixels, rgb);
    }

    #[test]
    fn what_is_no_image_is_told_apart() {
        assert_eq!(decode(b""), Err(SkipCause::TruncatedImage));
        assert_eq!(decode(b"GIF89a"), Err(SkipCause::UnsupportedImage));
        assert_eq!(decode(b"\xff\xd8\xff"), Err(SkipCause::TruncatedImage));
        assert_eq!(decode(b"\xff\xd8\xff\xda\x00\x02\xff\xd9"), Err(SkipCause::CorruptImage));
    }

    /// A thumbnail's end mark in the header does not make a cut image whole.
    #[test]
    fn the_end_mark_is_searched_after_the_header() {
        let thumbnail = b"\xff\xd8\xff\xe1\x00\x06\x00\xff\xd9\x00\xff\xda\x00\x02\x11\x22";
        assert!(!jpeg_is_complete(thumbnail));
        let mut whole = thumbnail.to_vec();
        whole.extend_from_slice(b"\xff\xd9trailing");
        assert!(jpeg_is_complete(&whole));
    }

    /// Full ink of one colour without black, as YCCK: pure cyan is the YCbCr of red (76, 85, 255), negated.
    #[test]
    fn ycck_and_cmyk_arithmetic() {
        let mut pixels = [76, 85, 255, 255];
        ycck_to_inverted_cmyk(&mut pixels);
        assert!(pixels[0] <= 1 && pixels[1] >= 254 && pixels[2] >= 254, "{pixels:?}");
        let mut rgb = [0; 3];
        from_inverted_cmyk(&[0, 255, 255, 255], &mut rgb);
        assert_eq!(rgb, [0, 255, 255]);
        from_inverted_cmyk(&[255, 128, 0, 0], &mut rgb);
        assert_eq!(rgb, [0, 0, 0]);
    }
}
