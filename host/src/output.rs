//! What goes to stdout.

use crate::error::CliError;
use serde::Serialize;
use std::io::{ErrorKind, Write};

/// Prints a text that ends its own lines.
pub fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(CliError::BrokenPipe),
        Err(error) => Err(CliError::Failed(format!("cannot write to stdout: {error}\nhint: is the disk full?"))),
    }
}

/// Prints a line.
pub fn line(text: &str) -> Result<(), CliError> {
    print(&format!("{text}\n"))
}

/// Prints one JSON value on a line.
pub fn json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string(value).map_err(|e| {
        CliError::Failed(format!("internal error: the answer has no JSON form: {e}\nhint: report this"))
    })?;
    line(&text)
}
