//! Where plugins come from: the search path, lookups, duplicates and pins.
//!
//! Searched are, in this order: the paths that the recipe names, [`PATH_VARIABLE`], the folder beside the executable.
//! Folders are not searched deeper. Libraries are opened when a plugin is first asked for, all of them, since only they
//! know their ids and since two plugins with one id are an error whichever comes first.

use crate::error::{LoadError, RegistryError};
use crate::load;
use crate::plugin::Plugin;
use clip_host_plugin_api::describe::Kind;
use clip_host_recipe::name_hint;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// A list of library files and folders, separated as in `PATH`.
pub const PATH_VARIABLE: &str = "CLIP_HOST_PLUGIN_PATH";

/// Endings of dynamic libraries. All three, since macOS systems use two of them.
const EXTENSIONS: [&str; 3] = ["so", "dylib", "dll"];

/// The plugins that one run or command may use.
pub struct Registry {
    searched: Vec<PathBuf>,
    candidates: Vec<Candidate>,
    /// Explicit paths that do not exist.
    missing: Vec<(PathBuf, String)>,
    loaded: OnceLock<Loaded>,
}

/// A file that may hold a plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    file: PathBuf,
    /// Named itself, not found in a folder: it must be a plugin.
    explicit: bool,
}

struct Loaded {
    /// By kind, then id.
    plugins: Vec<Arc<Plugin>>,
    /// Files that ought to be plugins and are not usable.
    failures: Vec<Failure>,
}

/// A file that ought to be a plugin and is not usable.
#[derive(Debug)]
pub struct Failure {
    pub error: Arc<LoadError>,
    /// Whether the file itself was named, in the recipe or in [`PATH_VARIABLE`]; such a failure fails every lookup.
    pub explicit: bool,
}

impl Registry {
    /// Lists the files of the search path; opens none yet. `explicit` are the files and folders that the recipe names.
    /// What is wrong with them is told by the first lookup.
    pub fn scan(explicit: &[PathBuf]) -> Registry {
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_path_buf()));
        // Cargo's own folder of build products: test programs run from there, beside libraries built for who knows what.
        let beside = beside.filter(|folder| folder.file_name() != Some(OsStr::new("deps")));
        Self::search(explicit, std::env::var_os(PATH_VARIABLE).as_deref(), beside.as_deref())
    }

    /// As [`Registry::scan`], with the search path's other two parts given: `list` as in [`PATH_VARIABLE`], and a folder.
    pub fn search(explicit: &[PathBuf], list: Option<&OsStr>, beside: Option<&Path>) -> Registry {
        let mut registry = Registry { searched: vec![], candidates: vec![], missing: vec![], loaded: OnceLock::new() };
        for path in explicit {
            if let Err(error) = registry.add(path, true) {
                registry.missing.push((path.clone(), error.to_string()));
            }
        }
        // An empty entry would be the working folder to a shell; libraries are not taken from there unasked.
        for path in std::env::split_paths(list.unwrap_or_default()).filter(|path| !path.as_os_str().is_empty()) {
            if let Err(error) = registry.add(&path, true) {
                tracing::warn!("{PATH_VARIABLE} names {}: {error}", path.display());
            }
        }
        if let Some(folder) = beside
            && let Err(error) = registry.add(folder, false)
        {
            tracing::debug!("cannot search {} for plugins: {error}", folder.display());
        }
        registry
    }

    /// Adds a file, or the libraries in a folder.
    fn add(&mut self, path: &Path, explicit: bool) -> std::io::Result<()> {
        if !std::fs::metadata(path)?.is_dir() {
            self.searched.push(path.into());
            self.candidates.push(Candidate { file: path.into(), explicit });
            return Ok(());
        }
        let mut files: Vec<PathBuf> = std::fs::read_dir(path)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.retain(|file| is_library(file));
        // The order of a folder's entries is the file system's whim.
        files.sort();
        self.candidates.extend(files.into_iter().map(|file| Candidate { file, explicit: false }));
        self.searched.push(path.into());
        Ok(())
    }

    /// The files and folders that are searched, in order.
    pub fn searched(&self) -> &[PathBuf] {
        &self.searched
    }

    /// All plugins, by kind and then id. Two different ones with one id are both in the list.
    pub fn list(&self) -> &[Arc<Plugin>] {
        &self.loaded().plugins
    }

    /// Libraries on the search path that export a plugin which cannot be used, and named files that are none.
    pub fn failures(&self) -> &[Failure] {
        &self.loaded().failures
    }

    /// The plugin of a kind by its id.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`] with the nearest id and the folders searched, [`RegistryError::Ambiguous`], and, for any
    /// lookup, what is wrong with an explicitly named file ([`RegistryError::Load`], [`RegistryError::Search`]).
    pub fn get(&self, kind: Kind, id: &str) -> Result<Arc<Plugin>, RegistryError> {
        if let Some((path, message)) = self.missing.first() {
            return Err(RegistryError::Search { path: path.clone(), message: message.clone() });
        }
        let loaded = self.loaded();
        if let Some(failure) = loaded.failures.iter().find(|failure| failure.explicit) {
            return Err(RegistryError::Load(failure.error.clone()));
        }
        let mut found = loaded.plugins.iter().filter(|plugin| plugin.kind() == kind && plugin.id() == id);
        match (found.next(), found.next()) {
            (Some(plugin), None) => Ok(plugin.clone()),
            (Some(first), Some(second)) => Err(RegistryError::Ambiguous {
                kind,
                id: id.into(),
                first: first.file().into(),
                second: second.file().into(),
            }),
            (None, _) => Err(self.unknown(kind, id)),
        }
    }

    /// The plugin that a recipe chooses: by kind and id, from `path` rather than the search path if that is given, and
    /// with the SHA-256 that the recipe pins, if it does.
    pub fn choose(
        &self,
        kind: Kind,
        id: &str,
        path: Option<&Path>,
        sha256: Option<&str>,
    ) -> Result<Arc<Plugin>, RegistryError> {
        let plugin = match path {
            None => self.get(kind, id)?,
            Some(path) => {
                let contents = load::read(path).map_err(Arc::new)?;
                // A plugin that the search found as well is one plugin, not two.
                let known = self.loaded().plugins.iter().find(|plugin| plugin.sha256() == contents.sha256);
                match known {
                    Some(plugin) => plugin.clone(),
                    None => Arc::new(load::open(path, contents).map_err(Arc::new)?),
                }
            }
        };
        if (plugin.kind(), plugin.id()) != (kind, id) {
            return Err(RegistryError::Other { kind, id: id.into(), found: Box::new(plugin.who().clone()) });
        }
        match sha256 {
            Some(expected) if !expected.eq_ignore_ascii_case(plugin.sha256()) => Err(RegistryError::Pin {
                who: Box::new(plugin.who().clone()),
                expected: expected.into(),
                got: plugin.sha256().into(),
            }),
            _ => Ok(plugin),
        }
    }

    fn unknown(&self, kind: Kind, id: &str) -> RegistryError {
        let loaded = self.loaded();
        let ids: Vec<&str> = loaded.plugins.iter().filter(|p| p.kind() == kind).map(|p| p.id()).collect();
        let other = loaded.plugins.iter().find(|plugin| plugin.id() == id);
        let hint = match other {
            Some(plugin) => format!("`{id}` is a plugin of kind {}", plugin.kind()),
            None if ids.is_empty() => {
                format!("no {kind} plugin was found at all: build the plugins, or set {PATH_VARIABLE} to their folder")
            }
            None => name_hint(id, &format!("{kind} plugins"), &ids).unwrap_or_default(),
        };
        let failures = loaded.failures.iter().map(|f| first_line(&f.error.to_string())).collect();
        RegistryError::Unknown { kind, id: id.into(), hint, searched: self.searched.clone(), failures }
    }

    fn loaded(&self) -> &Loaded {
        self.loaded.get_or_init(|| self.load())
    }

    /// Opens all candidates, each file's contents once.
    fn load(&self) -> Loaded {
        let mut plugins: Vec<Arc<Plugin>> = vec![];
        let mut failures: Vec<Failure> = vec![];
        let mut seen: HashSet<String> = HashSet::new();
        let named = self.candidates.iter().filter(|candidate| candidate.explicit);
        for Candidate { file, explicit } in named.chain(self.candidates.iter().filter(|candidate| !candidate.explicit))
        {
            let mut fail = |error: LoadError| {
                tracing::debug!("{error}");
                failures.push(Failure { error: Arc::new(error), explicit: *explicit });
            };
            let contents = match load::read(file) {
                Ok(contents) => contents,
                Err(error) => {
                    fail(error);
                    continue;
                }
            };
            if !explicit && !contents.may_be_plugin() {
                tracing::debug!("{} is a library, but no plugin", file.display());
                continue;
            }
            // One plugin that is found twice, under two paths or as a copy. Named files came first, so that a broken one
            // is told as such.
            if !seen.insert(contents.sha256.clone()) {
                continue;
            }
            match load::open(file, contents) {
                Ok(plugin) => {
                    tracing::debug!("loaded {plugin}");
                    plugins.push(Arc::new(plugin));
                }
                Err(error) => fail(error),
            }
        }
        plugins.sort_by(|a, b| (a.kind(), a.id(), a.file()).cmp(&(b.kind(), b.id(), b.file())));
        Loaded { plugins, failures }
    }
}

fn is_library(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().as_encoded_bytes();
    // Hidden files are what editors and copies in progress leave behind.
    let hidden = name.starts_with(b".");
    let library = file.extension().is_some_and(|end| EXTENSIONS.iter().any(|known| end.eq_ignore_ascii_case(known)));
    !hidden && library && file.is_file()
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().into()
}
