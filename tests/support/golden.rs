//! Reads a golden case: its tensors, its entry in the manifest, and comparison by the manifest's rule.
//!
//! A plain file, so that crates include it with `#[path]`; it needs `safetensors` and `serde_json`. Test code: a case that
//! is missing or malformed panics.
#![allow(dead_code)]

use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// One case of `tests/golden`.
pub struct Case {
    pub name: String,
    /// The case's entry in the manifest.
    pub entry: serde_json::Value,
    tensors: HashMap<String, Vec<f64>>,
}

impl Case {
    /// Reads `tests/golden/<family>/<name>.safetensors`; the including crate lies anywhere in the workspace.
    pub fn load(family: &str, name: &str) -> Self {
        let root = folder();
        let manifest = std::fs::read(root.join("manifest.json")).expect("the manifest can be read");
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("the manifest is JSON");
        let cases = manifest["cases"].as_array().unwrap();
        let entry = cases.iter().find(|c| c["family"] == family && c["name"] == name);
        let entry = entry.unwrap_or_else(|| panic!("no case {family}/{name} in the manifest")).clone();
        let tensors = read_tensors(&root.join(family).join(format!("{name}.safetensors")));
        Case { name: name.into(), entry, tensors }
    }

    pub fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    /// All elements of a tensor.
    pub fn tensor(&self, name: &str) -> &[f64] {
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor `{name}` in case {}", self.name))
    }

    /// Sizes of a tensor.
    pub fn shape(&self, name: &str) -> Vec<usize> {
        let shape = self.entry["tensors"][name]["shape"].as_array().unwrap();
        shape.iter().map(|n| n.as_u64().unwrap() as usize).collect()
    }

    /// The elements of a tensor at one step, its leading index.
    pub fn step(&self, name: &str, step: usize) -> &[f64] {
        let all = self.tensor(name);
        let width = all.len() / self.shape(name)[0];
        &all[step * width..(step + 1) * width]
    }

    /// A number among the hyperparameters.
    pub fn number(&self, name: &str) -> f64 {
        let value = &self.entry["hyperparameters"][name];
        value.as_f64().unwrap_or_else(|| panic!("hyperparameter `{name}` of case {} is {value}", self.name))
    }

    pub fn count(&self, name: &str) -> usize {
        self.number(name) as usize
    }

    /// Compares with a tensor at one step: |x − y| <= tolerance·max(1, max|y|).
    pub fn compare_step(&self, name: &str, step: usize, got: &[f64], tolerance: f64) {
        close(&format!("{} {name} at step {step}", self.name), got, self.step(name, step), tolerance);
    }
}

/// The folder of all golden files: in the workspace that the test was built from, or in that of the variable
/// `CLIP_HOST_TEST_ROOT`.
pub fn folder() -> PathBuf {
    if let Some(root) = std::env::var_os("CLIP_HOST_TEST_ROOT") {
        return Path::new(&root).join("tests/golden");
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = manifest.ancestors().map(|folder| folder.join("tests/golden"));
    folders.find(|folder| folder.is_dir()).expect("the crate lies in the workspace")
}

/// The elements of all tensors of a safetensors file.
pub fn read_tensors(path: &Path) -> HashMap<String, Vec<f64>> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.iter().map(|(key, view)| (key.to_string(), to_f64(view.dtype(), view.data()))).collect()
}

/// Fails unless |x − y| <= tolerance·max(1, max|y|) for all elements. NaN fails.
pub fn close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: number of elements");
    let bound = tolerance * expected.iter().fold(1.0f64, |m, y| m.max(y.abs()));
    for (i, (x, y)) in got.iter().zip(expected).enumerate() {
        assert!((x - y).abs() <= bound, "{what}, element {i}: expected {y}, got {x} (bound {bound:e})");
    }
}

fn to_f64(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes.chunks_exact(N).map(|chunk| read(chunk.try_into().unwrap())).collect()
    }
    match dtype {
        Dtype::F64 => each(bytes, f64::from_le_bytes),
        Dtype::F32 => each(bytes, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::I64 => each(bytes, |b| i64::from_le_bytes(b) as f64),
        Dtype::U8 => bytes.iter().map(|&b| f64::from(b)).collect(),
        other => panic!("golden tensors of type {other:?} are not read"),
    }
}
