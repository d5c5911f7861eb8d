//! Writing safetensors files piece by piece: no tensor is copied to be written.

use crate::atomic;
use crate::error::{Result, TrainError};
use safetensors::tensor::Dtype;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

/// One tensor of a file.
pub(crate) struct Entry<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    /// Its elements, little-endian.
    pub data: Cow<'a, [u8]>,
}

/// The bytes of f32 elements as files hold them.
pub(crate) fn little_endian(data: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(data))
    } else {
        Cow::Owned(data.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

/// Writes the tensors in the given order, the file whole or not at all.
///
/// # Errors
/// [`TrainError::Io`]; [`TrainError::Bug`] if two tensors have one name.
pub(crate) fn write(path: &Path, metadata: &BTreeMap<&str, String>, tensors: &[Entry<'_>]) -> Result<()> {
    let header = header(metadata, tensors)
        .map_err(|problem| TrainError::Bug(format!("safetensors file {}: {problem}", path.display())))?;
    atomic::write(path, |file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for tensor in tensors {
            out.write_all(&tensor.data)?;
        }
        out.flush()
    })
}

/// The header of tensors that follow each other, padded to 8 bytes.
fn header(metadata: &BTreeMap<&str, String>, tensors: &[Entry<'_>]) -> Result<Vec<u8>, String> {
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".into(), serde_json::json!(metadata));
    let mut offset = 0usize;
    for tensor in tensors {
        let end = offset + tensor.data.len();
        let dtype = serde_json::to_value(tensor.dtype).map_err(|e| e.to_string())?;
        let entry = serde_json::json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]});
        if entries.insert(tensor.name.to_string(), entry).is_some() {
            return Err(format!("two tensors are called `{}`", tensor.name));
        }
        offset = end;
    }
    let mut header = serde_json::to_vec(&entries).map_err(|e| e.to_string())?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}
