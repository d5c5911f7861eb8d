//! `clip-host plugins check`: is a library a plugin that a run can rely on?
//!
//! A library runs its own code as soon as it is opened, so the checks run in a child process: a plugin that crashes or
//! hangs there is a failed check here.

use crate::cli::PluginsCheckArgs;
use crate::error::CliError;
use crate::output;
use clip_host_plugin_api::describe::Kind;
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::loss::LossRequest;
use clip_host_plugin_api::optimizer::{OptimizerRequest, ParamInfo, ScalarsRequest};
use clip_host_plugin_api::scheduler::{Progress, ScheduleRequest};
use clip_host_plugins::Plugin;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// One check and its outcome.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Check {
    name: String,
    ok: bool,
    detail: String,
}

impl Check {
    fn new(name: &str, result: Result<String, String>) -> Check {
        let ok = result.is_ok();
        Check { name: name.into(), ok, detail: result.unwrap_or_else(|error| error) }
    }
}

pub fn run(args: &PluginsCheckArgs) -> Result<(), CliError> {
    if args.in_process {
        // One line for each check as it is done: what a crash leaves behind is then known.
        return check(args, &mut |check| output::json(&check));
    }
    let checks = in_child(args)?;
    let ok = checks.iter().all(|check| check.ok);
    if args.json {
        output::json(&serde_json::json!({"ok": ok, "file": args.file, "checks": checks}))?;
    } else {
        for check in &checks {
            let mark = if check.ok { "ok     " } else { "FAILED " };
            output::line(&format!("{mark} {:22} {}", check.name, check.detail))?;
        }
    }
    if ok { Ok(()) } else { Err(CliError::Reported) }
}

/// Runs the checks in a child process, with a time limit.
fn in_child(args: &PluginsCheckArgs) -> Result<Vec<Check>, CliError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        CliError::Failed(format!(
            "cannot {what} the process that checks the plugin: {error}\nhint: is the system out of resources?"
        ))
    };
    let program = std::env::current_exe().map_err(|e| failed("find", &e))?;
    let mut child = Command::new(program)
        .args(["plugins", "check", "--in-process"])
        .arg(&args.file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|e| failed("start", &e))?;
    // Read on a thread of its own, so that a plugin that prints a lot cannot fill the pipe and hang.
    let pipe = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let limit = Instant::now() + Duration::from_secs(args.timeout);
    let status = loop {
        match child.try_wait().map_err(|e| failed("wait for", &e))? {
            Some(status) => break Some(status),
            None if Instant::now() >= limit => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let text = reader.join().unwrap_or_default();
    // Lines of the plugin's own are passed over.
    let mut checks: Vec<Check> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    match status {
        Some(status) if status.success() => {}
        Some(status) => checks.push(Check::new("ends well", Err(format!("the plugin ended the process: {status}")))),
        None => {
            let detail = format!("the plugin did not answer within {} s", args.timeout);
            checks.push(Check::new("answers in time", Err(detail)));
        }
    }
    Ok(checks)
}

type Report<'a> = &'a mut dyn FnMut(Check) -> Result<(), CliError>;

fn check(args: &PluginsCheckArgs, report: Report) -> Result<(), CliError> {
    let plugin = match Plugin::load(&args.file) {
        Ok(plugin) => plugin,
        Err(error) => return report(Check::new("loads", Err(error.to_string()))),
    };
    report(Check::new("loads", Ok(format!("sha256 {}", plugin.sha256()))))?;
    report(Check::new("describes itself", described(&plugin)))?;
    let config = match plugin.complete(&serde_json::Map::new()) {
        Ok(config) => config,
        Err(errors) => {
            let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
            return report(Check::new("default settings", Err(text.join("; "))));
        }
    };
    report(Check::new("default settings", Ok("fit the schema".into())))?;
    let unknown = serde_json::Map::from_iter([("no_such_setting".to_string(), Value::Bool(true))]);
    let refuses = match plugin.complete(&unknown) {
        Err(_) => Ok("are refused".into()),
        Ok(_) => Err("are accepted in silence: add #[serde(deny_unknown_fields)] to the settings".into()),
    };
    report(Check::new("unknown settings", refuses))?;
    match plugin.kind() {
        Kind::Loss => loss(&plugin, &config, report),
        Kind::Encoder => encoder(&plugin, &config, report),
        Kind::Optimizer => optimizer(&plugin, &config, report),
        Kind::Scheduler => scheduler(&plugin, &config, report),
    }
}

fn described(plugin: &Plugin) -> Result<String, String> {
    let descriptor = plugin.descriptor();
    if descriptor.doc.trim().is_empty() {
        return Err("its DOC is empty: say in a sentence what it computes and where it was published".into());
    }
    Ok(format!("{} `{}` {}", descriptor.kind, descriptor.id, descriptor.version))
}

fn ops(fragment: Result<clip_host_plugin_api::ir::Fragment, clip_host_plugins::PluginError>) -> Result<String, String> {
    fragment.map(|fragment| format!("{} ops", fragment.nodes.len())).map_err(|error| error.to_string())
}

fn loss(plugin: &Plugin, config: &Value, report: Report) -> Result<(), CliError> {
    for (batch, embed_dim) in [(2, 4), (3, 8), (8, 16), (128, 256)] {
        let request = LossRequest { config: config.clone(), batch, embed_dim, dataset_size: 1000 };
        let built = ops(plugin.fragment(&Request::Loss(request)));
        report(Check::new(&format!("builds, batch {batch}"), built))?;
    }
    Ok(())
}

fn encoder(plugin: &Plugin, config: &Value, report: Report) -> Result<(), CliError> {
    let build = |batch, input, training| {
        let request = EncoderRequest { config: config.clone(), batch, input, training };
        ops(plugin.fragment(&Request::Encoder(request)))
    };
    let image = InputShape::Image { height: 224, width: 224 };
    let text = InputShape::Text { length: 30 };
    // It reads one or the other; what it says of images is shown if it wants neither.
    let (name, input) = match (build(2, image, true), build(2, text, true)) {
        (Err(_), Ok(_)) => ("text", text),
        _ => ("images", image),
    };
    for batch in [1, 2, 16] {
        for training in [true, false] {
            let mode = if training { "training" } else { "evaluation" };
            let built = build(batch, input, training);
            report(Check::new(&format!("{name}, batch {batch}, {mode}"), built))?;
        }
    }
    Ok(())
}

fn optimizer(plugin: &Plugin, config: &Value, report: Report) -> Result<(), CliError> {
    for shape in [vec![], vec![7], vec![5, 7], vec![3, 4, 3, 3]] {
        let info = ParamInfo { name: "weight".into(), shape: shape.clone(), weight_decay: 0.01 };
        let request = OptimizerRequest { config: config.clone(), info };
        let built = ops(plugin.fragment(&Request::Optimizer(request)));
        report(Check::new(&format!("builds, shape {shape:?}"), built))?;
    }
    let names = |step, lr| {
        let answer = plugin.scalars(&ScalarsRequest { config: config.clone(), step, lr });
        answer
            .map_err(|error| error.to_string())
            .map(|answer| answer.scalars.into_iter().map(|(name, _)| name).collect())
    };
    let compare = || -> Result<String, String> {
        let first: Vec<String> = names(1, 0.0)?;
        for (step, lr) in [(2, 1e-3), (1000, 1e-3), (1_000_000, 1e-6)] {
            let later: Vec<String> = names(step, lr)?;
            if later != first {
                return Err(format!("step 1 names [{}], step {step} names [{}]", first.join(", "), later.join(", ")));
            }
        }
        Ok(format!("[{}] at every step", first.join(", ")))
    };
    report(Check::new("scalars", compare()))
}

fn scheduler(plugin: &Plugin, config: &Value, report: Report) -> Result<(), CliError> {
    let walk = |metric: Option<f64>| -> Result<String, String> {
        let (epochs, steps_per_epoch) = (3, 10);
        let mut state = Value::Null;
        let (mut low, mut high) = (f64::INFINITY, 0.0f64);
        for step in 0..epochs * steps_per_epoch {
            let progress = Progress {
                base_lr: 1e-3,
                step,
                steps_per_epoch,
                total_steps: epochs * steps_per_epoch,
                epoch: step / steps_per_epoch,
                epochs,
                metric,
                // One at the end of each epoch.
                evaluations: metric.map_or(0, |_| step / steps_per_epoch),
            };
            let answer = plugin.schedule(&ScheduleRequest { config: config.clone(), progress, state });
            let answer = answer.map_err(|error| error.to_string())?;
            (low, high) = (low.min(answer.lr), high.max(answer.lr));
            state = answer.state;
        }
        Ok(format!("from {low:.2e} to {high:.2e} at a base rate of 1e-3"))
    };
    report(Check::new("rates, no metric", walk(None)))?;
    report(Check::new("rates, with a metric", walk(Some(0.5))))
}
