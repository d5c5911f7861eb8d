//! Against the numbers of the public reference implementations (`tests/golden/eval`).

use clip_host_eval::retrieval::retrieval;
use clip_host_eval::zeroshot::{class_weights, top_k};
use safetensors::SafeTensors;
use std::path::PathBuf;

struct Golden(Vec<u8>);

impl Golden {
    fn load(name: &str) -> Self {
        let path =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../../tests/golden/eval/{name}.safetensors"));
        Golden(std::fs::read(path).unwrap())
    }
    fn bytes(&self, name: &str) -> (Vec<usize>, Vec<u8>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }
    fn f32s(&self, name: &str) -> Vec<f32> {
        self.bytes(name).1.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
    fn f64(&self, name: &str) -> f64 {
        f64::from_le_bytes(self.bytes(name).1.try_into().unwrap())
    }
    fn ids(&self, name: &str) -> Vec<u32> {
        self.bytes(name).1.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    }
}

#[track_caller]
fn close(name: &str, got: f64, expected: f64) {
    assert!((got - expected).abs() <= 1e-9, "{name}: {got}, expected {expected}");
}

#[test]
fn five_captions_per_image() {
    for case in ["retrieval", "retrieval_k_test"] {
        let golden = Golden::load(case);
        let (images, texts) = (golden.f32s("image_embeddings"), golden.f32s("text_embeddings"));
        let found = retrieval(&images, &texts, 32, &golden.ids("caption_image"), 2).unwrap();
        for (i, k) in ["1", "5", "10"].iter().enumerate() {
            close(k, 100.0 * found.image_to_text.recall[i], golden.f64(&format!("txt_r{k}")));
            close(k, 100.0 * found.text_to_image.recall[i], golden.f64(&format!("img_r{k}")));
        }
        close("txt_r_mean", 100.0 * found.image_to_text.mean_recall(), golden.f64("txt_r_mean"));
        close("img_r_mean", 100.0 * found.text_to_image.mean_recall(), golden.f64("img_r_mean"));
        close("r_mean", 100.0 * found.mean_recall(), golden.f64("r_mean"));
        if case == "retrieval" {
            assert_eq!(found.image_to_text.ranks, golden.ids("rank_text_of_image"));
            assert_eq!(found.text_to_image.ranks, golden.ids("rank_image_of_text"));
        }
    }
}

#[test]
fn one_caption_per_image() {
    for case in ["openclip_metrics_caption0", "openclip_metrics_caption3"] {
        let golden = Golden::load(case);
        let (images, texts) = (golden.f32s("image_embeddings"), golden.f32s("text_embeddings"));
        let pairs: Vec<u32> = (0..40).collect();
        let found = retrieval(&images, &texts, 32, &pairs, 1).unwrap();
        assert_eq!(found.image_to_text.ranks, golden.ids("rank_text_of_image"));
        assert_eq!(found.text_to_image.ranks, golden.ids("rank_image_of_text"));
        let mut compared = 0;
        for (name, value) in found.metrics().iter().filter(|(name, _)| !name.ends_with("mean_recall")) {
            close(name, *value, golden.f64(name));
            compared += 1;
        }
        assert_eq!(compared, 10);
    }
}

#[test]
fn zero_shot() {
    let golden = Golden::load("zeroshot");
    let weights = class_weights(&golden.f32s("template_embeddings"), 17, 3, 32).unwrap();
    for (i, (got, expected)) in weights.iter().zip(golden.f32s("class_weights")).enumerate() {
        assert!((got - expected).abs() <= 1e-5, "{i}: {got}, expected {expected}");
    }
    let ks = [1, 3, 5, 10];
    let found = top_k(&golden.f32s("image_embeddings"), &golden.ids("labels"), &weights, 32, &ks).unwrap();
    for (k, accuracy) in ks.iter().zip(found) {
        close(&format!("top{k}"), 100.0 * accuracy, golden.f64(&format!("zeroshot_top{k}")));
    }
}
