//! Comparison with Pillow, torchvision, OpenCV and Hugging Face's tokenizer: their results are in `tests/golden`, whose
//! manifest names the programs and the tolerances used here.

use std::path::PathBuf;

use clip_host_data::augment::{ImageTransform, flip_horizontal};
use clip_host_data::config::DataConfig;
use clip_host_data::decode::{Decoder, RgbImage};
use clip_host_data::rand_augment::Op;
use clip_host_data::resize::{CropBox, Filter, Resizer};
use clip_host_data::text::{CaptionTokenizer, TextConfig, clean_caption};
use safetensors::SafeTensors;

fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path)
}

fn rgb(tensors: &SafeTensors, name: &str) -> RgbImage {
    let t = tensors.tensor(name).unwrap();
    RgbImage { height: t.shape()[0], width: t.shape()[1], pixels: t.data().to_vec() }
}

fn integers(tensors: &SafeTensors, name: &str) -> Vec<i64> {
    tensors.tensor(name).unwrap().data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Largest, 99th percentile and mean of the absolute differences, in grey levels.
fn difference(a: &RgbImage, b: &RgbImage) -> (u8, u8, f64) {
    assert_eq!((a.width, a.height), (b.width, b.height));
    let mut d: Vec<u8> = a.pixels.iter().zip(&b.pixels).map(|(x, y)| x.abs_diff(*y)).collect();
    d.sort_unstable();
    let mean = d.iter().map(|&v| f64::from(v)).sum::<f64>() / d.len() as f64;
    (d[d.len() - 1], d[(d.len() * 99).div_ceil(100) - 1], mean)
}

fn resized(image: &RgbImage, crop: CropBox, filter: Filter, width: usize, height: usize) -> RgbImage {
    let mut out = RgbImage::default();
    out.resize_to(width, height);
    Resizer::default().resize(image, crop, filter, &mut out).unwrap();
    out
}

const IMAGES: [&str; 7] =
    ["photo_jpeg", "wide_jpeg_exif", "small_png", "gray_jpeg", "rgba_png", "cmyk_jpeg", "palette_png"];

#[test]
fn decoding_is_pillows_within_the_jpeg_tolerance() {
    for name in IMAGES {
        let bytes = std::fs::read(golden(&format!("images/{name}.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut image = RgbImage::default();
        Decoder::default().decode(tensors.tensor("file_bytes").unwrap().data(), &mut image).unwrap();
        let (max, p99, mean) = difference(&image, &rgb(&tensors, "rgb"));
        if name.ends_with("png") {
            assert_eq!(max, 0, "{name}");
        } else {
            assert!(p99 <= 8 && mean <= 0.8, "{name}: max {max}, p99 {p99}, mean {mean}");
        }
    }
}

#[test]
fn resizing_and_cropping_is_pillows_to_the_last_bit() {
    for name in IMAGES {
        let bytes = std::fs::read(golden(&format!("images/{name}.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let image = rgb(&tensors, "rgb");
        let whole = resized(&image, CropBox::whole(&image), Filter::Bicubic, 64, 64);
        assert_eq!(difference(&whole, &rgb(&tensors, "resized")).0, 0, "{name}: resized");
        let b = integers(&tensors, "crop_box");
        let crop = CropBox { top: b[0] as usize, left: b[1] as usize, height: b[2] as usize, width: b[3] as usize };
        let mut crop = resized(&image, crop, Filter::Bicubic, 64, 64);
        assert_eq!(difference(&crop, &rgb(&tensors, "crop")).0, 0, "{name}: crop");
        flip_horizontal(&mut crop);
        assert_eq!(crop, rgb(&tensors, "crop_flipped"), "{name}: flip");

        // The zero-shot transform: shorter side to 56, bilinear, then the central square.
        let (w, h) = (image.width, image.height);
        let (w, h) = if w <= h { (56, 56 * h / w) } else { (56 * w / h, 56) };
        let small = resized(&image, CropBox::whole(&image), Filter::Bilinear, w, h);
        let middle = |n: usize| ((n - 56) as f64 / 2.0).round_ties_even() as usize;
        let centre = CropBox { top: middle(h), left: middle(w), height: 56, width: 56 };
        let centre = resized(&small, centre, Filter::Bilinear, 56, 56);
        assert_eq!(difference(&centre, &rgb(&tensors, "zero_shot_crop")).0, 0, "{name}: zero_shot_crop");
    }
}

#[test]
fn normalising_is_torchvisions() {
    let mut compared = 0;
    for name in IMAGES {
        let bytes = std::fs::read(golden(&format!("images/{name}.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let Ok(want) = tensors.tensor("normalized") else { continue };
        let mut got = vec![0f32; 3 * 64 * 64];
        ImageTransform::new(&DataConfig::default()).normalize(&rgb(&tensors, "crop_flipped"), &mut got);
        for (g, w) in got.iter().zip(want.data().chunks_exact(4)) {
            let w = f32::from_le_bytes(w.try_into().unwrap());
            assert!((g - w).abs() <= 1e-6, "{name}: {g} {w}");
        }
        compared += 1;
    }
    assert!(compared >= 3);
}

/// Every operation of RandAugment at every level that the golden data has.
#[test]
fn augmentation_operations_are_the_studies() {
    let mut compared = 0;
    for name in ["photo", "wide", "nonsquare", "low_contrast", "flat"] {
        let bytes = std::fs::read(golden(&format!("images/ops_{name}.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        for tensor in tensors.names() {
            let Some(op) = tensor.strip_prefix("op.") else { continue };
            let mut parts = op.split('.');
            let kind = parts.next().unwrap();
            let magnitude = parts.next().map_or(7.0, |l| l.strip_prefix("level").unwrap().parse().unwrap());
            let suffix = parts.next();
            let numbers = [
                "identity",
                "autocontrast",
                "equalize",
                "brightness",
                "sharpness",
                "shearx",
                "sheary",
                "translatex",
                "translatey",
                "rotate",
            ];
            // Colour, contrast, posterize and solarize are not in the studies' list.
            let Some(number) = numbers.iter().position(|n| *n == kind) else { continue };
            if kind == "sharpness" && suffix != Some("clipped") {
                continue;
            }
            let mut image = rgb(&tensors, "image");
            Op::at(number as u64, magnitude, suffix == Some("neg")).apply(&mut image, &mut Vec::new());
            let (max, _, mean) = difference(&image, &rgb(&tensors, tensor));
            // The manifest allows geometric operations 4 grey levels; emulating OpenCV's fixed point needs none.
            assert_eq!(max, 0, "{name} {op}: mean difference {mean}");
            compared += 1;
        }
    }
    assert!(compared > 70, "{compared}");
}

#[derive(serde::Deserialize)]
struct Caption {
    raw: String,
    pre_caption: String,
}

#[test]
fn captions_are_cleaned_and_tokenised_as_by_the_studies() {
    let captions: Vec<Caption> = serde_json::from_slice(&std::fs::read(golden("text/captions.json")).unwrap()).unwrap();
    let bytes = std::fs::read(golden("text/bert_ids.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(captions.len(), 60);
    for (clean, prefix) in [(true, ""), (false, "raw_")] {
        let config = TextConfig { vocab: "vocab.txt".into(), clean, ..TextConfig::default() };
        let tokenizer = CaptionTokenizer::open(&config, &golden("text")).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.pad_id(), tokenizer.max_length()), (30522, 0, 30));
        let want_ids = integers(&tensors, &format!("{prefix}input_ids"));
        let want_mask = integers(&tensors, &format!("{prefix}attention_mask"));
        for (i, caption) in captions.iter().enumerate() {
            if clean {
                assert_eq!(clean_caption(&caption.raw, 30), caption.pre_caption, "{:?}", caption.raw);
            }
            let mut ids = [-1; 30];
            let count = tokenizer.encode(&caption.raw, &mut ids).unwrap();
            let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
            assert_eq!(ids, want_ids[i * 30..(i + 1) * 30], "{prefix} {:?}", caption.raw);
            assert_eq!(count as i64, want_mask[i * 30..(i + 1) * 30].iter().sum::<i64>(), "{:?}", caption.raw);
        }
    }
}
