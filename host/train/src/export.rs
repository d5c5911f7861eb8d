//! The trained weights for other programs, in `weights/` of the run folder.
//!
//! Each encoder is a safetensors file under the names that its published weights have: timm loads
//! `image_encoder.safetensors` of a ResNet, Hugging Face transformers `text_encoder.safetensors` of a DistilBERT. The
//! linear heads into the shared space belong to neither and are in `heads.safetensors`. What only training needs (moments
//! of the optimizer, tables of the loss) is in checkpoints alone.

use crate::error::{Result, io_error};
use crate::tensor_file::{self, Entry, little_endian};
use clip_host_model::{NamedTensor, Role};
use safetensors::tensor::Dtype;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Files, the beginnings of names that each of them holds, and whether they are cut off.
const FILES: [(&str, &[&str], bool); 3] = [
    ("image_encoder.safetensors", &["image_encoder."], true),
    ("text_encoder.safetensors", &["text_encoder."], true),
    ("heads.safetensors", &["image_proj.", "text_proj."], false),
];

/// Writes the weights and running statistics among `tensors` to `folder`, which is made. A file that would be empty is
/// not written. PyTorch counts batches (`num_batches_tracked`) in whole numbers, so these are I64 in the files.
///
/// # Errors
/// [`TrainError::Io`](crate::TrainError::Io): a full disk, above all.
pub fn write(folder: &Path, tensors: &[NamedTensor<'_>]) -> Result<()> {
    fs::create_dir_all(folder).map_err(io_error("create", folder))?;
    // Without it transformers refuses a file.
    let metadata = BTreeMap::from([("format", "pt".to_string())]);
    for (file, prefixes, cut) in FILES {
        let of_file = |tensor: &&NamedTensor<'_>| tensor.role != Role::Optimizer;
        let mut entries: Vec<Entry<'_>> =
            tensors.iter().filter(of_file).filter_map(|tensor| entry(tensor, prefixes, cut)).collect();
        // Wide elements first: so each tensor is aligned to its own.
        entries.sort_by(|a, b| b.dtype.cmp(&a.dtype).then(a.name.cmp(b.name)));
        if !entries.is_empty() {
            tensor_file::write(&folder.join(file), &metadata, &entries)?;
        }
    }
    Ok(())
}

/// The tensor as a file of names that begin with one of `prefixes` holds it, if it does.
fn entry<'a>(tensor: &'a NamedTensor<'_>, prefixes: &[&str], cut: bool) -> Option<Entry<'a>> {
    let rest = prefixes.iter().find_map(|prefix| tensor.name.strip_prefix(prefix))?;
    let (dtype, data) = match rest.rsplit('.').next() {
        Some("num_batches_tracked") => {
            let counts = tensor.data.iter().flat_map(|&count| (count as i64).to_le_bytes());
            (Dtype::I64, Cow::Owned(counts.collect()))
        }
        _ => (Dtype::F32, little_endian(&tensor.data)),
    };
    Some(Entry { name: if cut { rest } else { &tensor.name }, dtype, shape: &tensor.shape, data })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::folder;
    use safetensors::SafeTensors;

    const DATA: [f32; 6] = [1.5, -0.0, f32::MIN_POSITIVE, 3e38, 7.0, -7.25];

    fn tensor(name: &str, role: Role, shape: &[usize]) -> NamedTensor<'static> {
        let data = &DATA[6 - shape.iter().product::<usize>()..];
        NamedTensor { name: name.into(), role, shape: shape.to_vec(), data: data.into() }
    }

    /// Name, type, shape and bytes of all tensors in the order of their places.
    fn read(path: &Path) -> Vec<(String, Dtype, Vec<usize>, Vec<u8>)> {
        let bytes = fs::read(path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let names = metadata.offset_keys();
        let one = |name: String| {
            let view = file.tensor(&name).unwrap();
            (name, view.dtype(), view.shape().to_vec(), view.data().to_vec())
        };
        names.into_iter().map(one).collect()
    }

    #[test]
    fn encoders_have_the_public_names() {
        let dir = folder("export");
        let mut tensors = vec![
            tensor("image_encoder.conv1.weight", Role::Param, &[1, 3, 2, 1]),
            tensor("image_encoder.bn1.weight", Role::Param, &[3]),
            tensor("text_encoder.embeddings.word_embeddings.weight", Role::Param, &[3, 2]),
            tensor("image_proj.weight", Role::Param, &[2, 2]),
            tensor("text_proj.weight", Role::Param, &[2, 2]),
            tensor("image_encoder.bn1.running_var", Role::State, &[3]),
            tensor("loss.s_I", Role::State, &[5]),
            tensor("loss.temperature", Role::Param, &[]),
            tensor("optimizer.exp_avg.image_encoder.conv1.weight", Role::Optimizer, &[6]),
        ];
        tensors.push(NamedTensor {
            data: DATA[4..5].into(),
            ..tensor("image_encoder.bn1.num_batches_tracked", Role::State, &[])
        });
        write(&dir, &tensors).unwrap();
        // An earlier end of the same run is replaced.
        write(&dir, &tensors).unwrap();

        let bytes = |data: &[f32]| data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let one = |name: &str, shape: &[usize]| {
            let elements = shape.iter().product::<usize>();
            (name.to_string(), Dtype::F32, shape.to_vec(), bytes(&DATA[6 - elements..]))
        };
        assert_eq!(
            read(&dir.join("image_encoder.safetensors")),
            [
                ("bn1.num_batches_tracked".to_string(), Dtype::I64, vec![], 7i64.to_le_bytes().to_vec()),
                one("bn1.running_var", &[3]),
                one("bn1.weight", &[3]),
                one("conv1.weight", &[1, 3, 2, 1]),
            ]
        );
        assert_eq!(read(&dir.join("text_encoder.safetensors")), [one("embeddings.word_embeddings.weight", &[3, 2])]);
        let heads = [one("image_proj.weight", &[2, 2]), one("text_proj.weight", &[2, 2])];
        assert_eq!(read(&dir.join("heads.safetensors")), heads);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 3);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn without_heads_there_is_no_file_of_them_and_errors_name_theirs() {
        let dir = folder("export-few");
        let tensors = [tensor("image_encoder.fc.weight", Role::Param, &[2])];
        write(&dir.join("a/b"), &tensors).unwrap();
        assert_eq!(fs::read_dir(dir.join("a/b")).unwrap().count(), 1);
        fs::write(dir.join("file"), "").unwrap();
        let error = write(&dir.join("file"), &tensors).unwrap_err().to_string();
        assert!(error.contains("file") && error.contains("hint:"), "{error}");
        let twice = [tensor("image_encoder.a", Role::Param, &[2]), tensor("image_encoder.a", Role::Param, &[2])];
        let error = write(&dir, &twice).unwrap_err().to_string();
        assert!(error.contains("two tensors are called `a`"), "{error}");
        fs::remove_dir_all(dir).unwrap();
    }
}
