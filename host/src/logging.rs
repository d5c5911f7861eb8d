//! Log lines on stderr.

use clip_host_train::progress::clear_bar;
use std::io::IsTerminal;
use tracing_subscriber::filter::LevelFilter;

/// Starts logging: warnings and information by default, more with `-v`, errors only with `-q`.
pub fn start(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(verbose > 0)
        .with_writer(|| {
            // A line must not run into the progress bar.
            clear_bar();
            std::io::stderr()
        })
        .init();
}
