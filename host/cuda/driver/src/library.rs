//! Finding and loading CUDA's libraries; the order of places is in the crate's documentation.

use crate::error::CudaError;
use libloading::Library;
use std::env;
use std::ffi::OsStr;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

/// Folders to search first, separated by colons.
pub(crate) const PATH_VARIABLE: &str = "CLIP_HOST_CUDA_PATH";

/// One of CUDA's libraries.
pub(crate) struct Wanted {
    /// File names that would do, the newest first.
    pub files: &'static [&'static str],
    /// How the names of files begin that it loads by name, without looking beside itself.
    pub companions: Option<&'static str>,
    /// What it is needed for: "cannot …".
    pub purpose: &'static str,
    /// Where it comes from: "hint: …".
    pub source_hint: &'static str,
}

pub(crate) static DRIVER: Wanted = Wanted {
    files: &["libcuda.so.1"],
    companions: None,
    purpose: "use a GPU",
    source_hint: "NVIDIA's driver installs it",
};

pub(crate) static NVRTC: Wanted = Wanted {
    files: &["libnvrtc.so.13", "libnvrtc.so.12"],
    companions: Some("libnvrtc-builtins.so."),
    purpose: "compile CUDA kernels",
    source_hint: "CUDA installs it, so does `pip install nvidia-cuda-nvrtc`",
};

pub(crate) static CUBLAS_LT: Wanted = Wanted {
    files: &["libcublasLt.so.13", "libcublasLt.so.12"],
    companions: None,
    purpose: "multiply matrices on a GPU",
    source_hint: "CUDA installs it, so does `pip install nvidia-cublas`",
};

pub(crate) static CUDNN: Wanted = Wanted {
    files: &["libcudnn.so.9"],
    companions: None,
    purpose: "convolve images on a GPU",
    source_hint: "cuDNN 9 has it, so does `pip install nvidia-cudnn-cu13` (cu12 for CUDA 12)",
};

/// A library that stays loaded until the process ends.
pub(crate) struct Loaded {
    library: ManuallyDrop<Library>,
    /// Its path; the file's name alone where the loader found it.
    pub path: PathBuf,
}

impl Loaded {
    /// The function `name`.
    ///
    /// # Safety
    /// `F` must be the type of a pointer to that C function.
    pub unsafe fn function<F: Copy>(&self, name: &'static str) -> Result<F, CudaError> {
        // SAFETY: the caller vouches for the type; the pointer stays good because the library is never closed.
        match unsafe { self.library.get::<F>(name.as_bytes()) } {
            Ok(symbol) => Ok(*symbol),
            Err(error) => Err(CudaError::Symbol {
                library: self.path.display().to_string(),
                symbol: name,
                message: error.to_string(),
            }),
        }
    }
}

/// Declares a table of C functions and how it is filled from a library: one field for each function, under its C name.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($name:ident: fn($($argument:ty),* $(,)?) -> $result:ty;)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case)]
        pub(crate) struct $table { $(pub $name: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl $table {
            /// Every function of the table, or which one the library lacks.
            pub fn load(library: &$crate::library::Loaded) -> Result<$table, $crate::error::CudaError> {
                // SAFETY: the declared types are those of CUDA's headers, the same in its versions 12 and 13.
                Ok(unsafe { $table { $($name: library.function(stringify!($name))?,)* } })
            }
        }
    };
}
pub(crate) use functions;

/// Where a library may be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Place {
    /// A folder.
    Folder(PathBuf),
    /// Wherever the system's loader looks.
    Loader,
}

/// Loads the library from the first of the usual places that has it, preferring the version of the driver's `major`.
pub(crate) fn open(wanted: &Wanted, major: Option<u32>) -> Result<Loaded, CudaError> {
    let mut files = wanted.files.to_vec();
    if let Some(major) = major {
        let suffix = format!(".so.{major}");
        files.sort_by_key(|file| !file.ends_with(&suffix));
    }
    open_in(wanted, &files, &places())
}

fn open_in(wanted: &Wanted, files: &[&str], places: &[Place]) -> Result<Loaded, CudaError> {
    let mut looked_in = Vec::new();
    for place in places {
        for (index, file) in files.iter().enumerate() {
            let path = match place {
                Place::Folder(folder) => folder.join(file),
                Place::Loader => PathBuf::from(file),
            };
            let there = *place == Place::Loader || path.exists();
            if !there {
                if index + 1 == files.len() {
                    looked_in.push(path.with_file_name("").display().to_string());
                }
                continue;
            }
            // SAFETY: loading runs the library's initialisers; these are NVIDIA's, from where the user's system or the
            // user's own variable says that they are.
            match unsafe { Library::new(&path) } {
                Ok(library) => {
                    if let (Place::Folder(folder), Some(prefix)) = (place, wanted.companions) {
                        load_companions(folder, prefix);
                    }
                    return Ok(Loaded { library: ManuallyDrop::new(library), path });
                }
                Err(error) if *place == Place::Loader => looked_in.push(format!("the loader's path ({error})")),
                Err(error) => looked_in.push(format!("{} ({error})", path.display())),
            }
        }
    }
    Err(CudaError::Library {
        library: files.join(" or "),
        purpose: wanted.purpose,
        looked_in,
        source_hint: wanted.source_hint,
    })
}

/// Loads the files of `folder` whose names begin with `prefix`, to stay: a library that asks for one of them by its name
/// gets what is loaded under that name. Where one cannot be loaded, the library that asks will say so.
fn load_companions(folder: &Path, prefix: &str) {
    let Ok(entries) = folder.read_dir() else { return };
    let is_companion = |path: &PathBuf| path.file_name().and_then(OsStr::to_str).is_some_and(|n| n.starts_with(prefix));
    for path in entries.flatten().map(|entry| entry.path()).filter(is_companion) {
        // SAFETY: it is NVIDIA's, as the library beside it.
        if let Ok(library) = unsafe { Library::new(&path) } {
            let _stays = ManuallyDrop::new(library);
        }
    }
}

/// All places, in the order in which they are tried.
fn places() -> Vec<Place> {
    let mut places = Vec::new();
    let named = env::var_os(PATH_VARIABLE).unwrap_or_default();
    for root in env::split_paths(&named).filter(|root| !root.as_os_str().is_empty()) {
        // Shown also where there is no such folder: a typing error must be seen.
        places.push(Place::Folder(root.clone()));
        places.extend(folders_under(&root).into_iter().map(Place::Folder));
    }
    places.push(Place::Loader);
    let mut roots: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"]
        .into_iter()
        .filter_map(env::var_os)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
        .collect();
    roots.extend(env::var_os("HOME").filter(|home| !home.is_empty()).map(|home| Path::new(&home).join(".local")));
    roots.push(PathBuf::from("/usr/local/cuda"));
    roots.extend(subfolders(Path::new("/usr/local"), "cuda-"));
    roots.extend(["/opt/cuda", "/usr/local", "/usr"].map(PathBuf::from));
    for folder in roots.iter().flat_map(|root| folders_under(root)) {
        let place = Place::Folder(folder);
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

/// The folders under `root` that hold libraries in an installation of CUDA, of Python wheels, or of a system's packages.
fn folders_under(root: &Path) -> Vec<PathBuf> {
    let (target, multiarch) = match cfg!(target_arch = "x86_64") {
        true => ("targets/x86_64-linux/lib", "lib/x86_64-linux-gnu"),
        false => ("targets/sbsa-linux/lib", "lib/aarch64-linux-gnu"),
    };
    let mut folders: Vec<PathBuf> = ["lib64", "lib", target, multiarch, "lib/wsl/lib"].map(|sub| root.join(sub)).into();
    let mut packages = vec![root.to_path_buf(), root.join("site-packages")];
    for python in ["lib", "lib64"].iter().flat_map(|sub| subfolders(&root.join(sub), "python3")) {
        packages.extend(["site-packages", "dist-packages"].map(|sub| python.join(sub)));
    }
    for wheel in packages.iter().flat_map(|packages| subfolders(&packages.join("nvidia"), "")) {
        folders.push(wheel.join("lib"));
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

/// The folders in `folder` whose names begin with `prefix`, the last in the alphabet (the newest version) first.
fn subfolders(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    let begins = |path: &PathBuf| path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(prefix));
    let mut found: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir() && begins(path)).collect();
    found.sort();
    found.reverse();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A folder of this test's own.
    fn folder(name: &str) -> PathBuf {
        let folder = env::temp_dir().join(format!("clip_host_cuda_library_{name}_{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn a_missing_library_is_named_with_every_place() {
        let places = [Place::Folder("/no/such/folder".into()), Place::Loader];
        let wanted = Wanted {
            files: &["libnothing.so.2", "libnothing.so.1"],
            companions: None,
            purpose: "try",
            source_hint: "there is none",
        };
        let Err(error) = open_in(&wanted, wanted.files, &places) else { panic!("loaded a library that is not there") };
        let CudaError::Library { library, looked_in, .. } = &error else { panic!("got {error:?}") };
        assert_eq!(library, "libnothing.so.2 or libnothing.so.1");
        assert_eq!(looked_in[0], "/no/such/folder/");
        assert!(looked_in[1..].iter().all(|place| place.starts_with("the loader's path (")), "{looked_in:?}");
        let text = error.to_string();
        assert!(text.starts_with("cannot try: expected the library libnothing.so.2 or"), "{text}");
        assert!(text.contains("\nhint: there is none, or name the folder that holds it in CLIP_HOST_CUDA_PATH"));
    }

    #[test]
    fn a_file_that_is_no_library_says_why() {
        let folder = folder("no_library");
        fs::write(folder.join("libnothing.so.1"), "text").unwrap();
        let wanted =
            Wanted { files: &["libnothing.so.1"], companions: None, purpose: "try", source_hint: "there is none" };
        let Err(error) = open_in(&wanted, wanted.files, &[Place::Folder(folder.clone())]) else {
            panic!("loaded text")
        };
        let CudaError::Library { looked_in, .. } = &error else { panic!("got {error:?}") };
        assert!(looked_in[0].starts_with(&format!("{} (", folder.join("libnothing.so.1").display())), "{looked_in:?}");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn installations_and_wheels_are_searched() {
        let root = folder("layouts");
        for sub in ["lib64", "nvidia/cu13/lib", "lib/python3.12/site-packages/nvidia/cudnn/lib", "nvidia/cudnn/lib"] {
            fs::create_dir_all(root.join(sub)).unwrap();
        }
        let expected =
            ["lib64", "lib", "nvidia/cudnn/lib", "nvidia/cu13/lib", "lib/python3.12/site-packages/nvidia/cudnn/lib"]
                .map(|sub| root.join(sub));
        assert_eq!(folders_under(&root), expected);
        fs::remove_dir_all(root).unwrap();
    }
}
