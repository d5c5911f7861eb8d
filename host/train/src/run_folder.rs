//! The folder of a run.
//!
//! ```text
//! runs/isogclr_radam-20260131-120000/
//!   recipe.ron       the resolved recipe: defaults written out, overrides applied
//!   plugins.json     file, version and SHA-256 of each plugin
//!   metrics.jsonl    one JSON object per line
//!   events.out.tfevents.1769860800.clip-host   the same for TensorBoard
//!   checkpoints/     step-0000000123.safetensors
//!   report.html      curves
//!   weights/         image_encoder.safetensors, text_encoder.safetensors, heads.safetensors, at the end
//!   summary.json     how the run ended; there only while the run is complete
//! ```
//!
//! A folder is never overwritten: a new run wants a new or empty one, `--resume` goes on in an old one.

use crate::atomic;
use crate::error::{Result, TrainError, io_error};
use crate::tensorboard;
use crate::train_loop::Summary;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// An open run folder. While it is open no other process can open it for training.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// Held until the process ends, however it ends.
    _lock: File,
}

/// One plugin as `plugins.json` records it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginRecord {
    /// What it is in the run: `image_encoder`, `loss`, …
    pub role: String,
    /// The plugin's id.
    pub id: String,
    /// The plugin crate's version.
    pub version: String,
    /// The library it was loaded from.
    pub file: PathBuf,
    /// Hash of that file.
    pub sha256: String,
}

const LOCK: &str = ".lock";
const RECIPE: &str = "recipe.ron";
const PLUGINS: &str = "plugins.json";
const METRICS: &str = "metrics.jsonl";
const SUMMARY: &str = "summary.json";

impl RunFolder {
    /// Makes the folder of a new run: `out`, or else `runs/<recipe's name>-<date and time>`. `recipe` is the resolved
    /// recipe's text.
    ///
    /// # Errors
    /// [`TrainError::FolderInUse`] if `out` holds anything, [`TrainError::Io`].
    pub fn create(out: Option<&Path>, recipe_path: &Path, recipe: &str) -> Result<RunFolder> {
        let path = match out {
            Some(path) => {
                fs::create_dir_all(path).map_err(io_error("create", path))?;
                refuse_used(path)?;
                path.to_path_buf()
            }
            None => {
                let name = recipe_path.file_stem().map_or("run".into(), |name| name.to_string_lossy());
                let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
                make_unique(Path::new("runs"), &format!("{name}-{}", timestamp(seconds)))?
            }
        };
        let folder = RunFolder { _lock: lock(&path)?, path };
        folder.begin(recipe)?;
        Ok(folder)
    }

    /// Opens the folder of a run that goes on. `recipe` is a resolved recipe for a run that was killed before it had
    /// written its own, or its folder: then the run starts from the beginning there, so that a job script may always say
    /// `run RECIPE --resume DIR`.
    ///
    /// # Errors
    /// [`TrainError::NoRun`] if there is none, [`TrainError::Locked`] if another process is at it.
    pub fn resume(path: &Path, recipe: Option<&str>) -> Result<RunFolder> {
        let no_run = |problem: &str, hint: &str| TrainError::NoRun {
            path: path.to_path_buf(),
            problem: problem.into(),
            hint: hint.into(),
        };
        if recipe.is_some() && !path.exists() {
            fs::create_dir_all(path).map_err(io_error("create", path))?;
        }
        if !path.is_dir() {
            return Err(no_run("it is no folder", "--resume takes the run folder that an earlier `run` named"));
        }
        let has_recipe = path.join(RECIPE).is_file();
        match recipe {
            None if !has_recipe => {
                return Err(no_run(
                    "there is no recipe.ron in it",
                    "name the run folder itself; if its run was stopped at once, start it again with its recipe",
                ));
            }
            _ if !has_recipe => refuse_used(path)?,
            _ => {}
        }
        let folder = RunFolder { path: path.to_path_buf(), _lock: lock(path)? };
        match recipe {
            Some(recipe) if !has_recipe => folder.begin(recipe)?,
            _ => fs::create_dir_all(folder.checkpoints()).map_err(io_error("create", &folder.checkpoints()))?,
        }
        Ok(folder)
    }

    fn begin(&self, recipe: &str) -> Result<()> {
        fs::create_dir_all(self.checkpoints()).map_err(io_error("create", &self.checkpoints()))?;
        self.write_recipe(recipe)
    }

    /// Writes the resolved recipe.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn write_recipe(&self, recipe: &str) -> Result<()> {
        atomic::write(&self.recipe(), |file| file.write_all(recipe.as_bytes()))
    }

    /// Removes the folder of a run that failed before its first step, so that the same command can be given again. Does
    /// nothing to a folder with a checkpoint, metrics or anything of somebody else in it. True if it is gone.
    pub fn remove_if_unused(path: &Path) -> bool {
        let used = fs::metadata(path.join(METRICS)).is_ok_and(|file| file.len() > 0)
            || fs::read_dir(checkpoints_of(path)).is_ok_and(|mut inside| inside.next().is_some());
        if used {
            return false;
        }
        for name in [RECIPE, PLUGINS, METRICS, LOCK] {
            // What cannot be removed keeps the folder, which is the answer then.
            let _ = fs::remove_file(path.join(name));
        }
        tensorboard::remove(path);
        let _ = fs::remove_dir(checkpoints_of(path));
        fs::remove_dir(path).is_ok()
    }

    /// Records the run's plugins. Answers with the plugins that were others when the run began, old and new.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn record_plugins(&self, plugins: &[PluginRecord]) -> Result<Vec<(PluginRecord, PluginRecord)>> {
        let path = self.path.join(PLUGINS);
        let before: Vec<PluginRecord> =
            fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let changed = plugins.iter().filter_map(|now| {
            let old = before.iter().find(|old| old.role == now.role)?;
            (old.id != now.id || old.sha256 != now.sha256).then(|| (old.clone(), now.clone()))
        });
        let changed = changed.collect();
        let text = serde_json::to_string_pretty(plugins).map_err(|e| TrainError::Bug(e.to_string()))?;
        atomic::write(&path, |file| writeln!(file, "{text}"))?;
        Ok(changed)
    }

    /// Records how a complete run ended: the last file that it writes.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn write_summary(&self, summary: &Summary) -> Result<()> {
        let text = serde_json::to_string_pretty(summary).map_err(|e| TrainError::Bug(e.to_string()))?;
        atomic::write(&self.path.join(SUMMARY), |file| writeln!(file, "{text}"))
    }

    /// Takes the record away from a run that goes on, which is not complete then.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn remove_summary(&self) -> Result<()> {
        let path = self.path.join(SUMMARY);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the resolved recipe is.
    pub fn recipe(&self) -> PathBuf {
        self.path.join(RECIPE)
    }

    /// Where the metrics are.
    pub fn metrics(&self) -> PathBuf {
        metrics_of(&self.path)
    }

    /// Where the checkpoints are.
    pub fn checkpoints(&self) -> PathBuf {
        checkpoints_of(&self.path)
    }

    /// Where the trained weights are for other programs.
    pub fn weights(&self) -> PathBuf {
        self.path.join("weights")
    }

    /// Where the curves are.
    pub fn report(&self) -> PathBuf {
        self.path.join("report.html")
    }
}

/// The recipe in a run folder, for those that only read it.
///
/// # Errors
/// [`TrainError::NoRun`] if there is none.
pub fn recipe_of(path: &Path) -> Result<PathBuf> {
    let recipe = path.join(RECIPE);
    if recipe.is_file() {
        return Ok(recipe);
    }
    Err(TrainError::NoRun {
        path: path.to_path_buf(),
        problem: "there is no recipe.ron in it".into(),
        hint: "name the run folder that `clip-host run` named in its last line".into(),
    })
}

/// How the run in a folder ended; `None` if it is not complete.
///
/// # Errors
/// [`TrainError::Io`]; [`TrainError::NoRun`] if the record is damaged.
pub fn summary_of(path: &Path) -> Result<Option<Summary>> {
    let file = path.join(SUMMARY);
    let bytes = match fs::read(&file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("read", &file)(error)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| TrainError::NoRun {
        path: path.to_path_buf(),
        problem: format!("its {SUMMARY} cannot be read: {error}"),
        hint: "remove that file; the run then goes on from its newest checkpoint".into(),
    })
}

/// The log of a run folder.
pub fn metrics_of(path: &Path) -> PathBuf {
    path.join(METRICS)
}

/// The folder of checkpoints in a run folder.
pub fn checkpoints_of(path: &Path) -> PathBuf {
    path.join("checkpoints")
}

/// What an earlier start of the same run, killed before its recipe was written, may have left counts as empty.
fn refuse_used(path: &Path) -> Result<()> {
    let leftovers = [LOCK, "checkpoints", ".recipe.ron.tmp"];
    for entry in fs::read_dir(path).map_err(io_error("list", path))? {
        let entry = entry.map_err(io_error("list", path))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let empty_folder = || fs::read_dir(entry.path()).is_ok_and(|mut inside| inside.next().is_none());
        let left = leftovers.contains(&name.as_str()) && (name != "checkpoints" || empty_folder());
        if !left {
            return Err(TrainError::FolderInUse { path: path.to_path_buf(), found: name });
        }
    }
    Ok(())
}

/// Makes `parent/name`, or the first of `parent/name-2`, … that is not there.
fn make_unique(parent: &Path, name: &str) -> Result<PathBuf> {
    fs::create_dir_all(parent).map_err(io_error("create", parent))?;
    let mut path = parent.join(name);
    for number in 2.. {
        match fs::create_dir(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => path = parent.join(format!("{name}-{number}")),
            made => return made.map(|()| path.clone()).map_err(io_error("create", &path)),
        }
    }
    Ok(path)
}

fn lock(path: &Path) -> Result<File> {
    let file = path.join(LOCK);
    let open = File::options().create(true).append(true).open(&file).map_err(io_error("create", &file))?;
    match open.try_lock() {
        Ok(()) => Ok(open),
        Err(TryLockError::WouldBlock) => Err(TrainError::Locked { path: path.to_path_buf() }),
        // A file system without locks: one process at a time is then for the user to see to.
        Err(TryLockError::Error(error)) => {
            tracing::debug!("no lock on {}: {error}", file.display());
            Ok(open)
        }
    }
}

/// `20260131-120000`, in UTC.
fn timestamp(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 1 March of the year 0, in cycles of 400 years (146,097 days): leap days fall at the end of years.
    let days = days + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Months from March on: 153 days in every five.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + cycle * 400 + carry;
    format!("{year:04}{month:02}{day:02}-{:02}{:02}{:02}", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::folder;

    #[test]
    fn timestamps_follow_the_calendar() {
        for (seconds, expected) in [
            (0, "19700101-000000"),
            (951_782_400, "20000229-000000"),
            (1_709_251_199, "20240229-235959"),
            (1_767_225_599, "20251231-235959"),
            (4_107_542_400, "21000301-000000"),
        ] {
            assert_eq!(timestamp(seconds), expected);
        }
    }

    #[test]
    fn a_folder_with_anything_in_it_is_refused_and_says_how_to_go_on() {
        let dir = folder("used");
        let out = dir.join("a/b");
        drop(RunFolder::create(Some(&out), Path::new("r.ron"), "()").unwrap());
        assert_eq!(fs::read_to_string(out.join("recipe.ron")).unwrap(), "()");
        let error = RunFolder::create(Some(&out), Path::new("r.ron"), "()").unwrap_err().to_string();
        assert!(error.contains("recipe.ron") && error.contains("--resume"), "{error}");
        fs::write(dir.join("notes"), "mine").unwrap();
        assert!(matches!(RunFolder::create(Some(&dir), Path::new("r.ron"), "()"), Err(TrainError::FolderInUse { .. })));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn resume_wants_a_run() {
        let dir = folder("resume");
        let missing = RunFolder::resume(&dir.join("none"), None).unwrap_err();
        assert!(matches!(missing, TrainError::NoRun { .. }), "{missing}");
        drop(RunFolder::resume(&dir.join("new"), Some("()")).unwrap());
        assert_eq!(fs::read_to_string(dir.join("new/recipe.ron")).unwrap(), "()");
        fs::remove_dir_all(dir.join("new")).unwrap();
        let empty = RunFolder::resume(&dir, None).unwrap_err();
        assert!(empty.to_string().contains("recipe.ron"), "{empty}");
        // Killed before anything was written: the recipe makes it a run.
        drop(RunFolder::resume(&dir, Some("(seed: 1)")).unwrap());
        drop(RunFolder::resume(&dir, Some("(seed: 2)")).unwrap());
        assert_eq!(fs::read_to_string(dir.join("recipe.ron")).unwrap(), "(seed: 1)");
        // Something else than a run is not made one.
        fs::remove_file(dir.join("recipe.ron")).unwrap();
        fs::write(dir.join("notes"), "mine").unwrap();
        assert!(matches!(RunFolder::resume(&dir, Some("()")), Err(TrainError::FolderInUse { .. })));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn only_a_run_without_a_step_is_removed() {
        let dir = folder("unused");
        let out = dir.join("run");
        drop(RunFolder::create(Some(&out), Path::new("r.ron"), "()").unwrap());
        drop(tensorboard::EventFile::open(&out, &[]).unwrap());
        assert!(RunFolder::remove_if_unused(&out) && !out.exists());
        for used in ["metrics.jsonl", "checkpoints/step-0000000001.safetensors", "notes"] {
            drop(RunFolder::create(Some(&out), Path::new("r.ron"), "()").unwrap());
            fs::write(out.join(used), "x").unwrap();
            assert!(!RunFolder::remove_if_unused(&out), "{used}");
            assert_eq!(fs::read_to_string(out.join(used)).unwrap(), "x");
            fs::remove_dir_all(&out).unwrap();
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn one_process_at_a_time() {
        let dir = folder("lock");
        let out = dir.join("run");
        let first = RunFolder::create(Some(&out), Path::new("r.ron"), "()").unwrap();
        assert!(matches!(RunFolder::resume(&out, None), Err(TrainError::Locked { .. })));
        drop(first);
        assert!(RunFolder::resume(&out, None).is_ok());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn names_that_are_taken_get_a_number() {
        let dir = folder("unique");
        assert_eq!(make_unique(&dir, "a").unwrap(), dir.join("a"));
        assert_eq!(make_unique(&dir, "a").unwrap(), dir.join("a-2"));
        assert_eq!(make_unique(&dir, "a").unwrap(), dir.join("a-3"));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_summary_is_there_while_the_run_is_complete() {
        let dir = folder("summary");
        let run = RunFolder::create(Some(&dir), Path::new("r.ron"), "()").unwrap();
        assert_eq!(summary_of(&dir).unwrap(), None);
        let summary = Summary { steps: 3, metrics: [("mean_recall".into(), 0.1 + 0.2)].into(), ..Summary::default() };
        run.write_summary(&summary).unwrap();
        assert_eq!(summary_of(&dir).unwrap(), Some(summary));
        run.remove_summary().unwrap();
        run.remove_summary().unwrap();
        assert_eq!(summary_of(&dir).unwrap(), None);
        fs::write(dir.join(SUMMARY), "{").unwrap();
        let error = summary_of(&dir).unwrap_err().to_string();
        assert!(error.contains("summary.json") && error.contains("hint: remove that file"), "{error}");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_plugin_that_changed_is_told() {
        let dir = folder("plugins");
        let run = RunFolder::create(Some(&dir), Path::new("r.ron"), "()").unwrap();
        let record = |sha256: &str| PluginRecord {
            role: "loss".into(),
            id: "clip".into(),
            version: "0.1.0".into(),
            file: "libclip.so".into(),
            sha256: sha256.into(),
        };
        assert_eq!(run.record_plugins(&[record("aa")]).unwrap(), []);
        assert_eq!(run.record_plugins(&[record("aa")]).unwrap(), []);
        assert_eq!(run.record_plugins(&[record("bb")]).unwrap(), [(record("aa"), record("bb"))]);
        fs::remove_dir_all(dir).unwrap();
    }
}
