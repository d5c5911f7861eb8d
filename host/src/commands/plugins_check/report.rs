//! What a check finds, and how it is told.

use super::Check;
use crate::error::CliError;
use crate::output;
use clip_host_plugin_api::describe::Kind;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a check comes to that finds nothing wrong.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// All is well; a sentence with the facts.
    Ok(String),
    /// There is nothing to check, or it would take too long; why.
    Skipped(String),
    /// A second process must have a look: it gets this value.
    Again(Value),
}

/// What is wrong.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fault {
    /// What was attempted, expected and got.
    pub problem: String,
    pub hint: Option<String>,
}

impl Fault {
    pub fn new(
        attempted: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
        hint: impl Into<String>,
    ) -> Fault {
        let problem = format!("{}: expected {}, got {}", attempted.into(), expected.into(), got.into());
        Fault { problem, hint: Some(hint.into()) }
    }

    /// An error as it tells itself; its hint is taken out of its words.
    pub fn told(error: impl std::fmt::Display) -> Fault {
        let text = error.to_string();
        match text.split_once("\nhint: ") {
            Some((problem, hint)) => Fault { problem: problem.into(), hint: Some(hint.into()) },
            None => Fault { problem: text, hint: None },
        }
    }

    /// The same, with what was being done at the time.
    pub fn during(self, what: impl std::fmt::Display) -> Fault {
        Fault { problem: format!("{what}: {}", self.problem), hint: self.hint }
    }
}

/// What the parent must know of a plugin that loads.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Facts {
    pub kind: Kind,
    pub id: String,
    pub version: String,
    pub abi: u32,
    pub sha256: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Ok,
    Failed,
    Skipped,
}

/// A line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: &'static str,
    pub status: Status,
    /// What was checked.
    pub about: &'static str,
    /// What was found.
    pub detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    pub seconds: f64,
    /// Whether the check ran out of time.
    #[serde(skip)]
    pub hung: bool,
}

impl Row {
    pub fn new(check: &Check, outcome: Result<Finding, Fault>, seconds: f64) -> Row {
        let (status, detail, hint) = match outcome {
            Ok(Finding::Ok(detail)) => (Status::Ok, detail, None),
            Ok(Finding::Skipped(why)) => (Status::Skipped, why, None),
            // A second process never asks for a third.
            Ok(Finding::Again(_)) => (Status::Skipped, "the second process came to no end.".into(), None),
            Err(Fault { problem, hint }) => (Status::Failed, problem, hint),
        };
        Row { name: check.name, status, about: check.about, detail, hint, seconds, hung: false }
    }

    pub fn skipped(check: &Check, why: &str) -> Row {
        Row::new(check, Ok(Finding::Skipped(why.into())), 0.0)
    }

    /// The row as people read it; what is wrong stands on lines of its own.
    pub fn print(&self) -> Result<(), CliError> {
        let Row { name, about, detail, .. } = self;
        match self.status {
            Status::Ok => output::line(&format!("ok      {name:22} {about} {detail}")),
            Status::Skipped => output::line(&format!("skipped {name:22} {about} Skipped: {detail}")),
            Status::Failed => {
                let hint = self.hint.as_ref().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
                let wrong = format!("{detail}{hint}").replace('\n', "\n        ");
                output::line(&format!("FAILED  {name:22} {about}\n        {wrong}"))
            }
        }
    }
}
