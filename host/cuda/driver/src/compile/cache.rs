//! Compiled kernels on disk: one file for each source, architecture, options and version of NVRTC.

use super::{compile, version};
use crate::error::CudaError;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

/// First bytes of every entry; behind them the SHA-256 of the rest, and the cubin.
const MAGIC: &[u8; 16] = b"clip-host cubin\n";
const DIGEST_BYTES: usize = 32;

/// A folder of compiled kernels. Any number of threads and processes may use it at once, and files may be deleted from it
/// at any time: an entry that is missing or damaged is compiled again.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Uses `folder`, which is made if it is not there.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Cache, CudaError> {
        let folder = folder.into();
        fs::create_dir_all(&folder).map_err(|error| file_error("make the kernel cache", &folder, &error))?;
        Ok(Cache { folder })
    }

    /// The cubin of [`compile`], from the folder if it is there.
    ///
    /// # Errors
    /// Those of [`compile`], and [`CudaError::File`] if the entry cannot be written.
    pub fn get_or_compile(&self, source: &str, arch: (u32, u32), options: &[&str]) -> Result<Vec<u8>, CudaError> {
        let path = self.path(source, arch, options)?;
        if let Some(cubin) = fs::read(&path).ok().and_then(decode) {
            return Ok(cubin);
        }
        let cubin = compile(source, arch, options)?;
        self.write(&path, &cubin).map_err(|error| file_error("write to the kernel cache", &path, &error))?;
        Ok(cubin)
    }

    /// Where the entry is, or will be.
    pub fn path(&self, source: &str, arch: (u32, u32), options: &[&str]) -> Result<PathBuf, CudaError> {
        let (major, minor) = version()?;
        let mut hash = Sha256::new();
        // Each part with its length: no two lists of parts run together to the same bytes.
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        for number in [major, minor, arch.0, arch.1] {
            part(&number.to_le_bytes());
        }
        part(source.as_bytes());
        options.iter().for_each(|option| part(option.as_bytes()));
        let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(self.folder.join(format!("{name}.sm_{}{}.cubin", arch.0, arch.1)))
    }

    /// A reader sees all of the entry or nothing of it: it is written under a name of its own, then renamed.
    fn write(&self, path: &Path, cubin: &[u8]) -> std::io::Result<()> {
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let serial = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("{}.{serial}.tmp", process::id()));
        let written = File::create(&temporary).and_then(|mut file| {
            file.write_all(MAGIC)?;
            file.write_all(&Sha256::digest(cubin))?;
            file.write_all(cubin)?;
            drop(file);
            fs::rename(&temporary, path)
        });
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }
}

/// The cubin in an entry, unless it is damaged.
fn decode(mut entry: Vec<u8>) -> Option<Vec<u8>> {
    let rest = entry.strip_prefix(MAGIC)?;
    let (digest, cubin) = rest.split_at_checked(DIGEST_BYTES)?;
    if digest != Sha256::digest(cubin).as_slice() {
        return None;
    }
    entry.drain(..MAGIC.len() + DIGEST_BYTES);
    Some(entry)
}

fn file_error(what: &str, path: &Path, error: &std::io::Error) -> CudaError {
    CudaError::File { what: format!("{what} {}", path.display()), message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_entry_is_no_entry() {
        let mut entry = [MAGIC.as_slice(), &Sha256::digest(b"cubin"), b"cubin"].concat();
        assert_eq!(decode(entry.clone()).as_deref(), Some(b"cubin".as_slice()));
        for length in 0..entry.len() {
            assert_eq!(decode(entry[..length].to_vec()), None, "cut to {length} bytes");
        }
        for index in 0..entry.len() {
            entry[index] ^= 1;
            assert_eq!(decode(entry.clone()), None, "byte {index} changed");
            entry[index] ^= 1;
        }
    }
}
