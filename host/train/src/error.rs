//! Why a run could not start, go on or end well.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

/// Everything that ends a run before its time. All but [`TrainError::Bug`] can be put right by who started it.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// `--out` names a folder with something in it.
    #[error(
        "run folder: expected a new or empty folder, {path} holds {found}\n\
         hint: choose another --out, or continue that run with --resume {path}",
        path = path.display()
    )]
    FolderInUse {
        /// The folder.
        path: PathBuf,
        /// One of the things in it.
        found: String,
    },
    /// A folder that is not a run's.
    #[error("run folder: expected a run in {path}, {problem}\nhint: {hint}", path = path.display())]
    NoRun {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// Another process trains in the folder.
    #[error(
        "run folder: {path} is in use by another clip-host process\nhint: wait for it to end, or stop it",
        path = path.display()
    )]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// The system refused a file operation.
    #[error("run folder: cannot {action} {path}: {source}\nhint: {hint}", path = path.display(), hint = hint(source))]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A checkpoint that is damaged or of another kind.
    #[error("checkpoint {path}: {problem}\nhint: {hint}", path = path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// Weights to begin with that do not fit, or are none.
    #[error("weights {path}: {problem}\nhint: {hint}", path = path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// The data of the run is no longer what it was trained with.
    #[error(
        "resume: the data has changed: the run was trained with {expected}, now there are {got}\n\
         hint: positions and per-sample tables no longer fit; restore the data and batch size, or start a new run"
    )]
    DataChanged {
        /// As the checkpoint says.
        expected: String,
        /// As it is now.
        got: String,
    },
    /// A step failed; NaN above all.
    #[error("training stopped at epoch {epoch}, step {step}: {problem}\nhint: {hint}")]
    Step {
        /// From 0.
        epoch: u64,
        /// From 0, over the whole run.
        step: u64,
        /// What happened.
        problem: String,
        /// What to do, with the last good checkpoint.
        hint: String,
    },
    /// The recipe, at places that only the assembled whole shows.
    #[error("{0}")]
    Recipe(String),
    /// A plugin refused or misbehaved.
    #[error("{0}")]
    Plugin(String),
    /// The model could not be assembled or compiled.
    #[error("{0}")]
    Model(String),
    /// The data pipeline ended.
    #[error(transparent)]
    Data(#[from] clip_host_data::DataError),
    /// The evaluation has no result.
    #[error(transparent)]
    Eval(#[from] clip_host_eval::EvalError),
    /// A fault of this program.
    #[error("internal error: {0}\nhint: this is a bug; report it with the recipe")]
    Bug(String),
}

/// Shorthand for `map_err`.
pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TrainError {
    let path = path.to_owned();
    move |source| TrainError::Io { action, path, source }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "the disk is full; the checkpoints written before are whole: make room and continue with --resume"
        }
        io::ErrorKind::FileTooLarge => {
            "larger than the file system or `ulimit -f` allows; the checkpoints written before are whole: raise the limit \
             and continue with --resume"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "check the folder's permissions, or choose another --out"
        }
        io::ErrorKind::NotFound => "check the path; parts of a run folder must not be moved while it is in use",
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
            "a file is where a folder should be, or the other way round"
        }
        _ => "check that the folder is on a mounted, writable disk",
    }
}
