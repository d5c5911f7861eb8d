//! How the program ends.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | something is wrong that the message says how to put right |
//! | 2 | the command line is wrong |
//! | 130 | stopped by Ctrl-C or SIGTERM; `--resume` goes on |

use std::process::ExitCode;

/// Exit code of a wrong command line.
pub const USAGE: u8 = 2;

/// Why a command did not end well.
#[derive(Debug, PartialEq, Eq)]
pub enum CliError {
    /// One readable block, hints included.
    Failed(String),
    /// As [`CliError::Failed`], but everything has been printed already.
    Reported,
    /// A wrong command line that clap could not know to be wrong.
    Usage(String),
    /// Stopped by a signal, with everything saved.
    Interrupted,
    /// Who reads our output has had enough.
    BrokenPipe,
}

impl CliError {
    /// Prints the error and gives the exit code.
    pub fn report(self) -> ExitCode {
        let print = |text: &str| {
            // If stderr is closed there is nobody left to tell.
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "error: {text}");
        };
        match self {
            CliError::Failed(text) => print(&text),
            CliError::Reported => {}
            CliError::Usage(text) => {
                print(&text);
                return ExitCode::from(USAGE);
            }
            CliError::Interrupted => return ExitCode::from(130),
            CliError::BrokenPipe => return ExitCode::SUCCESS,
        }
        ExitCode::from(1)
    }
}

/// Every library error is shown as it is: they say what was attempted, expected and found, and a hint.
macro_rules! shown {
    ($($error:ty),* $(,)?) => {$(
        impl From<$error> for CliError {
            fn from(error: $error) -> Self {
                CliError::Failed(error.to_string())
            }
        }
    )*};
}

shown!(
    clip_host_recipe::RecipeErrors,
    clip_host_recipe::RecipeError,
    clip_host_plugins::RegistryError,
    clip_host_plugins::PluginError,
    clip_host_plugins::LoadError,
    clip_host_data_synth::SynthError,
);

impl From<clip_host_model::ModelError> for CliError {
    fn from(error: clip_host_model::ModelError) -> Self {
        CliError::Failed(clip_host_train::assemble::with_hint_line(&error.to_string()))
    }
}

impl From<clip_host_data::DataError> for CliError {
    fn from(error: clip_host_data::DataError) -> Self {
        CliError::Failed(crate::prepare::with_source(&error))
    }
}

impl From<clip_host_train::TrainError> for CliError {
    fn from(error: clip_host_train::TrainError) -> Self {
        match error {
            clip_host_train::TrainError::Data(error) => error.into(),
            error => CliError::Failed(error.to_string()),
        }
    }
}
