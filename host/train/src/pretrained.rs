//! Published weights to begin with: a safetensors file of timm, open_clip or Hugging Face transformers for an encoder.
//!
//! Encoders name their parameters as those libraries do, so that a file fits by its names. What stands before all of them
//! (`distilbert.` in a language model's file, `visual.` in a CLIP's) is found out; the old names `gamma` and `beta` of
//! layer norms count as `weight` and `bias`. Tensors that the encoder has not (a classifier) are left out, those that it
//! has must all be there: half an initialisation is a mistake that shows only after days.

use crate::error::{Result, TrainError, io_error};
use clip_host_model::{Role, Session};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::Path;

/// A tensor of an encoder: its name and shape.
pub type Expected = (String, Vec<usize>);

/// What was taken from a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// Tensors that the encoder took.
    pub taken: usize,
    /// Names of tensors that it has no use for, sorted.
    pub unused: Vec<String>,
    /// Of the file, in hexadecimal.
    pub sha256: String,
}

/// A file in memory.
pub struct Weights {
    bytes: Vec<u8>,
    file: std::path::PathBuf,
    sha256: String,
}

impl Weights {
    /// Reads a file; with `sha256` it must have that sum.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be read, [`TrainError::Weights`] if it is another one.
    pub fn read(file: &Path, sha256: Option<&str>) -> Result<Weights> {
        let bytes = fs::read(file).map_err(io_error("read the weights", file))?;
        let sum: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let weights = Weights { bytes, file: file.into(), sha256: sum };
        match sha256 {
            Some(expected) if expected != weights.sha256 => {
                let problem = format!("expected the SHA-256 {expected}, got {}", weights.sha256);
                Err(weights.error(problem, "it is not the file that the recipe was written for; fetch that one"))
            }
            _ => Ok(weights),
        }
    }

    fn error(&self, problem: String, hint: &str) -> TrainError {
        TrainError::Weights { path: self.file.clone(), problem, hint: hint.into() }
    }

    fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.bytes).map_err(|e| {
            let problem = format!("expected a safetensors file, got {} bytes that are none: {e}", self.bytes.len());
            self.error(problem, "save the weights with `safetensors.torch.save_file(model.state_dict(), FILE)`")
        })
    }

    /// Finds each of an encoder's tensors in the file: the names in the file, `None` where one may be missing, and what is
    /// left over.
    ///
    /// # Errors
    /// [`TrainError::Weights`] if the file is none, or a tensor is missing or of another shape.
    pub fn fit(&self, expected: &[Expected]) -> Result<(Vec<Option<String>>, Vec<String>)> {
        let tensors = self.tensors()?;
        let names = tensors.names();
        let prefix = prefix(&names, expected);
        let find = |name: &str| {
            let full = format!("{prefix}{name}");
            [Some(full.clone()), old_name(&full)].into_iter().flatten().find(|name| names.contains(&name.as_str()))
        };
        let found: Vec<Option<String>> = expected.iter().map(|(name, _)| find(name)).collect();
        // PyTorch's count of batches is no part of what a network computes.
        let missing: Vec<&str> = expected
            .iter()
            .zip(&found)
            .filter(|((name, _), found)| found.is_none() && !name.ends_with("num_batches_tracked"))
            .map(|((name, _), _)| name.as_str())
            .collect();
        if let Some(first) = missing.first() {
            let nearest = names.iter().min_by_key(|name| distance(name, &format!("{prefix}{first}")));
            let nearest = nearest.map_or(String::new(), |name| format!("; the nearest name in the file is `{name}`"));
            let problem = match missing.len() {
                1 => format!("expected a tensor `{prefix}{first}`, got none{nearest}"),
                n => format!("expected a tensor `{prefix}{first}` and {} more, got none{nearest}", n - 1),
            };
            return Err(self.error(problem, "choose the plugin and the preset that the weights were made with"));
        }
        for ((name, shape), found) in expected.iter().zip(&found) {
            let Some(found) = found else { continue };
            let view = tensors.tensor(found).map_err(|e| self.error(e.to_string(), "the file is damaged"))?;
            if view.shape() != shape && !(shape.is_empty() && view.shape() == [1]) {
                let problem = format!("tensor `{name}`: expected the shape {shape:?}, got {:?}", view.shape());
                let hint = "the encoder's settings (preset, image size, vocabulary) are not those that the weights were \
                    made with";
                return Err(self.error(problem, hint));
            }
        }
        let mut unused: Vec<String> =
            names.iter().filter(|name| !found.iter().flatten().any(|f| f == *name)).map(ToString::to_string).collect();
        unused.sort_unstable();
        Ok((found, unused))
    }

    /// Gives the tensors of a session whose names begin with `tower` and a dot the file's values.
    ///
    /// # Errors
    /// As [`Weights::fit`]; and if a tensor is of a type other than f32, f16, bf16, f64 or i64.
    pub fn load(&self, session: &mut Session, tower: &str) -> Result<Loaded> {
        let expected: Vec<Expected> = session
            .tensor_infos()
            .into_iter()
            .filter(|tensor| tensor.role != Role::Optimizer)
            .filter_map(|t| Some((t.name.strip_prefix(tower)?.strip_prefix('.')?.to_string(), t.shape)))
            .collect();
        let (found, unused) = self.fit(&expected)?;
        let tensors = self.tensors()?;
        let mut taken = 0;
        for ((name, _), found) in expected.iter().zip(&found) {
            let Some(found) = found else { continue };
            let view = tensors.tensor(found).map_err(|e| self.error(e.to_string(), "the file is damaged"))?;
            let values = values(&view).map_err(|problem| {
                self.error(format!("tensor `{found}`: {problem}"), "convert it, as by `tensor.float()` in PyTorch")
            })?;
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                let problem = format!("tensor `{found}`: expected numbers, got {} at element {at}", values[at]);
                return Err(self.error(problem, "the weights are of a training that failed"));
            }
            session
                .set_tensor(&format!("{tower}.{name}"), &values)
                .map_err(|error| TrainError::Model(error.to_string()))?;
            taken += 1;
        }
        Ok(Loaded { taken, unused, sha256: self.sha256.clone() })
    }
}

/// What stands before the encoder's names in a file: of all that would put one of them in the right place, what fits the most.
fn prefix(names: &[&str], expected: &[Expected]) -> String {
    let mut candidates = vec![""];
    // The first tensors may be named otherwise; some of a few will not be.
    for (name, _) in expected.iter().take(8) {
        let before = names.iter().filter_map(|full| full.strip_suffix(name.as_str()));
        candidates.extend(before.filter(|before| before.ends_with('.')));
    }
    candidates.sort_by_key(|candidate| candidate.len());
    candidates.dedup();
    let fits = |candidate: &str| {
        let has = |name: &str| names.iter().any(|full| full.strip_prefix(candidate) == Some(name));
        expected.iter().filter(|(name, _)| has(name)).count()
    };
    // Of equals, the shortest.
    candidates.into_iter().rev().max_by_key(|candidate| fits(candidate)).unwrap_or_default().to_string()
}

/// What a layer norm's tensor is called in files of the first BERTs.
fn old_name(name: &str) -> Option<String> {
    let (rest, last) = name.rsplit_once('.')?;
    let old = match last {
        "weight" => "gamma",
        "bias" => "beta",
        _ => return None,
    };
    rest.ends_with("LayerNorm").then(|| format!("{rest}.{old}"))
}

fn values(view: &TensorView<'_>) -> std::result::Result<Vec<f32>, String> {
    let data = view.data();
    // Chunks have the size of their type.
    Ok(match view.dtype() {
        Dtype::F32 => data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Dtype::F16 => data.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
        Dtype::BF16 => data.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        Dtype::F64 => data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes) as f32).collect(),
        Dtype::I64 => data.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as f32).collect(),
        other => return Err(format!("expected F32, F16, BF16, F64 or I64, got {other:?}")),
    })
}

/// Characters in which two names differ, from their ends.
fn distance(a: &str, b: &str) -> usize {
    let common = a.bytes().rev().zip(b.bytes().rev()).take_while(|(x, y)| x == y).count();
    a.len().max(b.len()) - common
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::folder;

    fn expected() -> Vec<Expected> {
        [
            ("embeddings.word_embeddings.weight", &[3, 2][..]),
            ("embeddings.LayerNorm.weight", &[2]),
            ("embeddings.LayerNorm.bias", &[2]),
            ("bn.num_batches_tracked", &[]),
        ]
        .map(|(name, shape)| (name.to_string(), shape.to_vec()))
        .into()
    }

    /// A file of f16 ones with these names and shapes.
    fn file(name: &str, tensors: &[(&str, &[usize])]) -> Weights {
        let one: Vec<u8> = f16::ONE.to_le_bytes().repeat(64);
        let views = tensors.iter().map(|(name, shape)| {
            let elements = shape.iter().product::<usize>();
            (*name, TensorView::new(Dtype::F16, shape.to_vec(), &one[..2 * elements]).unwrap())
        });
        let path = folder(&format!("pretrained-{name}")).join("weights.safetensors");
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        Weights::read(&path, None).unwrap()
    }

    fn problem<T>(result: Result<T>) -> String {
        result.err().map(|error| error.to_string()).unwrap()
    }

    #[test]
    fn names_fit_with_what_stands_before_them_and_old_endings() {
        let bert = file(
            "bert",
            &[
                ("bert.embeddings.word_embeddings.weight", &[3, 2]),
                ("bert.embeddings.LayerNorm.gamma", &[2]),
                ("bert.embeddings.LayerNorm.beta", &[2]),
                ("cls.predictions.bias", &[3]),
            ],
        );
        let (found, unused) = bert.fit(&expected()).unwrap();
        let found: Vec<Option<&str>> = found.iter().map(Option::as_deref).collect();
        assert_eq!(found[0], Some("bert.embeddings.word_embeddings.weight"));
        assert_eq!(found[1], Some("bert.embeddings.LayerNorm.gamma"));
        assert_eq!(found[2..], [Some("bert.embeddings.LayerNorm.beta"), None]);
        assert_eq!(unused, ["cls.predictions.bias"]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let short =
            file("short", &[("embeddings.word_embeddings.weight", &[3, 2]), ("embeddings.LayerNorm.bias", &[2])]);
        let text = problem(short.fit(&expected()));
        assert!(text.contains("`embeddings.LayerNorm.weight`") && text.contains("hint:"), "{text}");
        let wide = file(
            "wide",
            &[
                ("embeddings.word_embeddings.weight", &[3, 4]),
                ("embeddings.LayerNorm.weight", &[2]),
                ("embeddings.LayerNorm.bias", &[2]),
            ],
        );
        let text = problem(wide.fit(&expected()));
        assert!(text.contains("expected the shape [3, 2], got [3, 4]"), "{text}");
    }

    #[test]
    fn files_that_are_none_or_another_are_refused() {
        let folder = folder("pretrained-none");
        let path = folder.join("weights.bin");
        assert!(problem(Weights::read(&path, None)).contains("weights.bin"));
        fs::write(&path, "PK\u{3}\u{4} a zip archive, as torch.save writes them").unwrap();
        let text = problem(Weights::read(&path, None).unwrap().fit(&expected()));
        assert!(text.contains("expected a safetensors file") && text.contains("save_file"), "{text}");
        let text = problem(Weights::read(&path, Some(&"0".repeat(64))));
        assert!(text.contains("expected the SHA-256 0000"), "{text}");
    }

    #[test]
    fn numbers_of_every_type_are_read() {
        let read = |dtype, bytes: &[u8]| values(&TensorView::new(dtype, vec![2], bytes).unwrap());
        let f32s: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(read(Dtype::F32, &f32s).unwrap(), [1.5, -2.0]);
        let f16s: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        assert_eq!(read(Dtype::F16, &f16s).unwrap(), [1.5, -2.0]);
        let bf16s: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        assert_eq!(read(Dtype::BF16, &bf16s).unwrap(), [1.5, -2.0]);
        let f64s: Vec<u8> = [1.5f64, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(read(Dtype::F64, &f64s).unwrap(), [1.5, -2.0]);
        let i64s: Vec<u8> = [7i64, -2].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(read(Dtype::I64, &i64s).unwrap(), [7.0, -2.0]);
        assert!(read(Dtype::U8, &[1, 2]).unwrap_err().contains("U8"));
    }
}
