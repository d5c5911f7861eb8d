//! What a person sees while a run goes: a bar on a terminal, plain lines in a file or pipe.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Whether a bar stands on the terminal's last line; log lines have to clear it first.
static BAR: AtomicBool = AtomicBool::new(false);

/// Wipes the bar off the terminal, if one is there, so that a log line does not run into it. The next step draws it anew.
pub fn clear_bar() {
    if BAR.swap(false, Ordering::Relaxed) {
        write(true, "\r\x1b[K");
    }
}

/// A failed write to the screen (a closed pipe) must not end a training run.
fn write(to_stderr: bool, text: &str) {
    let _ = match to_stderr {
        true => std::io::stderr().write_all(text.as_bytes()),
        false => std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush()),
    };
}

/// Shows how far a run is.
#[derive(Debug)]
pub struct Progress {
    bar: bool,
    /// Lines go to stderr where stdout belongs to JSON.
    lines_to_stderr: bool,
    quiet: bool,
    drawn: Option<Instant>,
}

/// Where a run is, for people.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// From 1.
    pub epoch: u64,
    /// Of the run.
    pub epochs: u64,
    /// Steps done.
    pub step: u64,
    /// At which step the run ends.
    pub last: u64,
    /// Mean loss of the last steps.
    pub loss: f64,
    /// Learning rate of the last step.
    pub lr: f64,
    /// Pairs a second.
    pub samples_per_second: f64,
    /// Seconds a step that training waited for data.
    pub data_wait: f64,
    /// Seconds to the end of the run.
    pub eta: f64,
}

/// Redraws a second.
const REDRAW: Duration = Duration::from_millis(100);
const WIDTH: u64 = 24;

impl Progress {
    /// A bar if stderr is a terminal; lines on stdout, or on stderr if `json` keeps stdout for itself.
    pub fn new(json: bool) -> Progress {
        let bar = std::io::stderr().is_terminal() && (json || std::io::stdout().is_terminal());
        Progress { bar, lines_to_stderr: json, quiet: false, drawn: None }
    }

    /// Shows nothing.
    pub fn quiet() -> Progress {
        Progress { bar: false, lines_to_stderr: false, quiet: true, drawn: None }
    }

    /// A step was done; `logged` if it is one that the log has a line for.
    pub fn step(&mut self, step: &Step, logged: bool) {
        if self.quiet {
            return;
        }
        if !self.bar {
            if logged {
                write(self.lines_to_stderr, &format!("{step}\n"));
            }
            return;
        }
        if logged || self.drawn.is_none_or(|at| at.elapsed() >= REDRAW) {
            self.drawn = Some(Instant::now());
            let done = (WIDTH * step.step).checked_div(step.last).unwrap_or(WIDTH).min(WIDTH);
            let bar: String = (0..WIDTH).map(|i| if i < done { '█' } else { '░' }).collect();
            // Without line wrapping, a narrow terminal cuts the line instead of scrolling at every redraw.
            write(true, &format!("\r\x1b[?7l{bar} {step}\x1b[K\x1b[?7h"));
            BAR.store(true, Ordering::Relaxed);
        }
    }

    /// A line that stays.
    pub fn line(&mut self, text: &str) {
        if self.quiet {
            return;
        }
        clear_bar();
        write(self.lines_to_stderr, &format!("{text}\n"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        clear_bar();
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Step { epoch, epochs, step, last, loss, lr, samples_per_second, data_wait, eta } = self;
        write!(
            f,
            "epoch {epoch}/{epochs}  step {step}/{last}  loss {loss:.4}  lr {lr:.2e}  \
             {samples_per_second:.1} samples/s  data wait {:.1} ms  ETA {}",
            1e3 * data_wait,
            duration(*eta)
        )
    }
}

/// `42s`, `3m05s`, `2h07m`, `4d03h`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86_400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        for (seconds, text) in [
            (0.2, "0s"),
            (59.4, "59s"),
            (59.6, "1m00s"),
            (3599.0, "59m59s"),
            (7620.0, "2h07m"),
            (356_400.0, "4d03h"),
            (f64::NAN, "?"),
            (f64::INFINITY, "?"),
            (-1.0, "?"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn a_line_says_everything() {
        let step = Step {
            epoch: 2,
            epochs: 30,
            step: 40,
            last: 900,
            loss: 2.71236,
            lr: 2e-4,
            samples_per_second: 412.34,
            data_wait: 0.0123,
            eta: 185.0,
        };
        let expected =
            "epoch 2/30  step 40/900  loss 2.7124  lr 2.00e-4  412.3 samples/s  data wait 12.3 ms  ETA 3m05s";
        assert_eq!(step.to_string(), expected);
    }
}
