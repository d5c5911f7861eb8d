//! A process for each check. The parent starts this program again with `--in-process NAME`; the child answers with a line
//! of JSON on stdout, among which the plugin may print whatever it likes.

use super::report::{Facts, Fault, Finding, Row};
use super::{Check, Subject, checks, library};
use crate::cli::PluginsCheckArgs;
use crate::error::CliError;
use crate::output;
use crate::settings;
use clip_host_plugins::Plugin;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The child's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// The answer to [`library::LOADS`].
    Loaded(Facts),
    Found(Finding),
    Fault(Fault),
}

/// Sets the answer apart from what the plugin prints.
#[derive(Serialize, Deserialize)]
struct Envelope {
    clip_host_check: Message,
}

/// Starts the children, and removes their files at the end.
pub struct Children<'a> {
    args: &'a PluginsCheckArgs,
    program: PathBuf,
    scratch: PathBuf,
}

impl Drop for Children<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.scratch);
    }
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> CliError {
    CliError::Failed(format!(
        "cannot {what} the process that checks the plugin: {error}\nhint: is the system out of resources?"
    ))
}

/// How a child ended.
enum Ended {
    Answered(Message),
    /// It said nothing; its exit status.
    Silent(String),
    TimeOut,
}

impl<'a> Children<'a> {
    pub fn new(args: &'a PluginsCheckArgs) -> Result<Self, CliError> {
        let program = std::env::current_exe().map_err(|e| failed("find", &e))?;
        let scratch = std::env::temp_dir().join(format!("clip-host-check-{}", std::process::id()));
        std::fs::create_dir_all(&scratch).map_err(|e| failed("make a folder for", &e))?;
        Ok(Children { args, program, scratch })
    }

    /// Loads the library.
    pub fn load(&self) -> Result<(Row, Option<Facts>), CliError> {
        let begin = Instant::now();
        let ended = self.ask(&library::LOADS, None)?;
        let seconds = begin.elapsed().as_secs_f64();
        if let Ended::Answered(Message::Loaded(facts)) = ended {
            let Facts { kind, id, version, abi, sha256 } = &facts;
            let told = format!("It is {kind} `{id}` {version}, of ABI {abi}, sha256 {sha256}.");
            return Ok((Row::new(&library::LOADS, Ok(Finding::Ok(told)), seconds), Some(facts)));
        }
        Ok((self.row(&library::LOADS, ended, seconds), None))
    }

    /// Runs a check, in a second process too if it wants one.
    pub fn check(&self, check: &Check) -> Result<Row, CliError> {
        let begin = Instant::now();
        let mut ended = self.ask(check, None)?;
        if let Ended::Answered(Message::Found(Finding::Again(before))) = &ended {
            ended = self.ask(check, Some(before))?;
        }
        Ok(self.row(check, ended, begin.elapsed().as_secs_f64()))
    }

    fn row(&self, check: &Check, ended: Ended, seconds: f64) -> Row {
        let hung = matches!(ended, Ended::TimeOut);
        let limit = self.args.timeout;
        let outcome = match ended {
            Ended::Answered(Message::Found(finding)) => Ok(finding),
            Ended::Answered(Message::Fault(fault)) => Err(fault),
            Ended::Answered(Message::Loaded(_)) => Err(Fault::told("the process answered another question")),
            Ended::Silent(status) => Err(Fault::new(
                "running the check",
                "an answer",
                format!("the end of the process: {status}"),
                "the plugin crashed it, or left it with `exit` or `abort`; a debugger or its own tests show where",
            )),
            Ended::TimeOut => Err(Fault::new(
                "running the check",
                format!("an answer within {limit} s"),
                "none",
                "is there a loop whose end depends on a size or a setting? --timeout gives slow plugins more time",
            )),
        };
        Row { hung, ..Row::new(check, outcome, seconds) }
    }

    fn ask(&self, check: &Check, before: Option<&Value>) -> Result<Ended, CliError> {
        let mut command = Command::new(&self.program);
        command.args(["plugins", "check", "--in-process", check.name, "--scratch"]).arg(&self.scratch);
        if let Some(config) = &self.args.config {
            command.arg(format!("--config={config}"));
        }
        for path in &self.args.path {
            command.arg("--path").arg(path);
        }
        let command = command.arg("--").arg(&self.args.file);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(|e| failed("start", &e))?;
        // Written and read on threads of their own: a child that does not read, or prints a lot, must not hang this one.
        let (input, pipe) = (child.stdin.take(), child.stdout.take());
        let text = before.map(Value::to_string).unwrap_or_default();
        std::thread::spawn(move || {
            if let Some(mut input) = input {
                // A child that is gone needs no input.
                let _ = input.write_all(text.as_bytes());
            }
        });
        let (sender, answer) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut pipe) = pipe {
                let _ = pipe.read_to_end(&mut text);
            }
            let _ = sender.send(text);
        });
        let limit = Instant::now() + Duration::from_secs(self.args.timeout);
        let status = loop {
            match child.try_wait().map_err(|e| failed("wait for", &e))? {
                Some(status) => break status,
                None if Instant::now() >= limit => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Ok(Ended::TimeOut);
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        // A process that the plugin started may hold the pipe open for ever.
        let text = answer.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut messages = text.lines().filter_map(|line| serde_json::from_str::<Envelope>(line).ok());
        Ok(match messages.next_back() {
            // What crashes after its answer has crashed all the same.
            Some(envelope) if status.success() => Ended::Answered(envelope.clip_host_check),
            _ => Ended::Silent(status.to_string()),
        })
    }
}

/// In the child: runs a check and prints the answer.
pub fn answer(args: &PluginsCheckArgs, name: &str) -> Result<(), CliError> {
    let message = match in_process(args, name) {
        Ok(message) => message,
        Err(fault) => Message::Fault(fault),
    };
    // A line of its own, whatever the plugin left unfinished.
    output::line("")?;
    output::json(&Envelope { clip_host_check: message })
}

fn in_process(args: &PluginsCheckArgs, name: &str) -> Result<Message, Fault> {
    let mut given = String::new();
    std::io::stdin().read_to_string(&mut given).map_err(Fault::told)?;
    let before: Option<Value> = serde_json::from_str(&given).ok();
    if name == library::SCAN_TIME {
        return library::scan_time(args, before).map(Message::Found);
    }
    let plugin = Arc::new(Plugin::load(&args.file).map_err(Fault::told)?);
    if name == library::LOADS.name {
        return Ok(Message::Loaded(Facts {
            kind: plugin.kind(),
            id: plugin.id().into(),
            version: plugin.version().into(),
            abi: plugin.descriptor().abi,
            sha256: plugin.sha256().into(),
        }));
    }
    let check = checks(plugin.kind()).into_iter().find(|check| check.name == name);
    let check = check.ok_or_else(|| Fault::told(format!("there is no check `{name}` of a {}", plugin.kind())))?;
    let config = settings::complete(&plugin, args.config.as_deref().unwrap_or("()"));
    let config = match config {
        Ok(config) => config,
        Err(CliError::Failed(text)) if name == library::SETTINGS => return Err(Fault::told(text)),
        Err(_) if check.needs_settings => {
            let why = "the settings are refused: see the check `settings`.";
            return Ok(Message::Found(Finding::Skipped(why.into())));
        }
        Err(_) => Value::Null,
    };
    let subject = Subject { args, plugin, config, before };
    (check.run)(&subject).map(Message::Found)
}
