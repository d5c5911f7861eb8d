//! Files that are there whole or not at all.

use crate::error::{Result, io_error};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The temporary name beside `path` that a file is written under first.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".tmp");
    path.with_file_name(name)
}

/// Has `write` fill a temporary file, forces it to the disk and moves it to `path`. Whatever happens in between, `path`
/// is the old file or the new one; the temporary file is removed if writing fails.
///
/// # Errors
/// If the file cannot be written: a full disk, above all.
pub(crate) fn write(path: &Path, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    let temporary = temporary(path);
    let written = File::create(&temporary).and_then(|mut file| {
        write(&mut file)?;
        file.sync_all()
    });
    if let Err(error) = written.and_then(|()| fs::rename(&temporary, path)) {
        // Gives the room back; that it may fail as well changes nothing.
        let _ = fs::remove_file(&temporary);
        return Err(io_error("write", path)(error));
    }
    sync_folder(path)
}

/// Makes the names in the folder of `path` last: a rename is safe only when its folder is on the disk as well.
fn sync_folder(path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // Only Unix opens folders as files.
    if cfg!(unix) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("sync the folder of", path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Error, Write};

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_rubbish() {
        let dir = crate::testing::folder("atomic");
        let path = dir.join("a.txt");
        write(&path, |file| file.write_all(b"old")).unwrap();
        let error = write(&path, |file| {
            file.write_all(b"half")?;
            Err(Error::from(std::io::ErrorKind::StorageFull))
        })
        .unwrap_err()
        .to_string();
        assert!(error.contains("a.txt") && error.contains("disk is full"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        write(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        fs::remove_dir_all(dir).unwrap();
    }
}
