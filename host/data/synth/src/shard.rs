//! WebDataset tars, as img2dataset lays them out.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Writes one tar under a temporary name; [`Shard::finish`] syncs and renames it, so that a shard is whole or absent.
pub struct Shard {
    builder: tar::Builder<BufWriter<File>>,
    temporary: PathBuf,
    path: PathBuf,
}

impl Shard {
    /// Starts the shard that will appear at `path`.
    ///
    /// # Errors
    /// When the temporary file beside it cannot be created.
    pub fn create(path: &Path) -> io::Result<Self> {
        let temporary = temporary(path);
        let builder = tar::Builder::new(BufWriter::new(File::create(&temporary)?));
        Ok(Self { builder, temporary, path: path.to_owned() })
    }

    /// Appends a member. Owner, mode and time are constants, so that equal content gives equal bytes.
    ///
    /// # Errors
    /// When writing fails (a full disk, say).
    pub fn add(&mut self, name: &str, data: &[u8]) -> io::Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_path(name)?;
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        self.builder.append(&header, data)
    }

    /// Ends the archive, syncs it and gives it its name.
    ///
    /// # Errors
    /// When writing, syncing or renaming fails; the temporary file is then removed.
    pub fn finish(self) -> io::Result<()> {
        let Self { builder, temporary, path } = self;
        let written = builder
            .into_inner()
            .and_then(|file| file.into_inner().map_err(io::IntoInnerError::into_error))
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&temporary, &path));
        if written.is_err() {
            // The first error is the one to report.
            let _ = fs::remove_file(&temporary);
        }
        written
    }
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
}

/// Writes a whole file under a temporary name and renames it.
///
/// # Errors
/// When writing, syncing or renaming fails.
pub fn write_atomically(path: &Path, data: &[u8]) -> io::Result<()> {
    let temporary = temporary(path);
    let mut file = File::create(&temporary)?;
    file.write_all(data)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}
