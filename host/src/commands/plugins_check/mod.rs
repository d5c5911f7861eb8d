//! `clip-host plugins check`: is a library a plugin that a run can rely on?
//!
//! A library runs its own code as soon as it is opened, so every check runs in a process of its own, with a limit of time:
//! a plugin that crashes, hangs or panics there has failed that check, and the others still run. Only a library that
//! cannot be loaded ends the checks.
//!
//! - [`child`]: the processes;
//! - [`report`]: what a check finds, and how it is told;
//! - [`library`], [`answers`]: what is asked of plugins of every kind;
//! - [`loss`], [`optimizer`], [`encoder`], [`scheduler`]: what is asked of each kind;
//! - [`gradient`]: gradients against finite differences; [`numbers`]: batches, and the formula in f32;
//!   [`state`]: checkpoints.

mod answers;
mod child;
mod encoder;
mod gradient;
mod library;
mod loss;
mod numbers;
mod optimizer;
mod report;
mod scheduler;
mod state;

use crate::cli::PluginsCheckArgs;
use crate::error::CliError;
use crate::output;
use child::Children;
use clip_host_plugin_api::describe::Kind;
use clip_host_plugins::Plugin;
use report::{Fault, Finding, Row, Status};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;

/// A check of a plugin.
struct Check {
    name: &'static str,
    /// What is checked, in a sentence.
    about: &'static str,
    /// Whether it is left out where the settings are refused.
    needs_settings: bool,
    run: fn(&Subject) -> Result<Finding, Fault>,
}

/// The plugin under test, as a check sees it.
struct Subject<'a> {
    args: &'a PluginsCheckArgs,
    plugin: Arc<Plugin>,
    /// Complete settings: those of `--config`, and defaults for the others.
    config: Value,
    /// What the first process of a check found, in the second: see [`Finding::Again`].
    before: Option<Value>,
}

impl Subject<'_> {
    /// A folder for files that are of use until the end of all checks.
    fn scratch(&self) -> PathBuf {
        self.args.scratch.clone().unwrap_or_else(std::env::temp_dir)
    }
}

/// The checks of a kind of plugin, in order.
fn checks(kind: Kind) -> Vec<&'static Check> {
    let own: &[Check] = match kind {
        Kind::Loss => &loss::CHECKS,
        Kind::Optimizer => &optimizer::CHECKS,
        Kind::Encoder => &encoder::CHECKS,
        Kind::Scheduler => &scheduler::CHECKS,
    };
    library::CHECKS.iter().chain(&answers::CHECKS).chain(own).collect()
}

/// After so many checks that ran out of time the others are left out: one limit after another would pass.
const HANGS: usize = 2;

pub fn run(args: &PluginsCheckArgs) -> Result<(), CliError> {
    if let Some(name) = &args.in_process {
        return child::answer(args, name);
    }
    let children = Children::new(args)?;
    let mut rows = Vec::new();
    // Printed one by one: a check may take its time.
    let mut tell = |row: Row| -> Result<(), CliError> {
        if !args.json {
            row.print()?;
        }
        rows.push(row);
        Ok(())
    };
    let (loads, facts) = children.load()?;
    tell(loads)?;
    let mut hangs = 0;
    for check in facts.iter().flat_map(|facts| checks(facts.kind)) {
        let row = match hangs < HANGS {
            true => children.check(check)?,
            false => Row::skipped(check, "two checks before it ran out of time."),
        };
        hangs += usize::from(row.hung);
        tell(row)?;
    }
    let count = |status| rows.iter().filter(|row| row.status == status).count();
    let (failed, skipped) = (count(Status::Failed), count(Status::Skipped));
    if args.json {
        output::json(&json!({"ok": failed == 0, "file": args.file, "plugin": facts, "checks": rows}))?;
    } else {
        output::line(&format!("{} checks, {failed} failed, {skipped} skipped", rows.len()))?;
    }
    if failed == 0 { Ok(()) } else { Err(CliError::Reported) }
}
