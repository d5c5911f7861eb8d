//! Where the time of training steps goes: a trace of every kernel, and tables against the machine's limits.
//!
//! The trace is in Chrome's trace event format, as ui.perfetto.dev and chrome://tracing read it.

use crate::error::CliError;
use crate::units::{counted, percent, table};
use clip_host_compiler::cost::Kind;
use clip_host_cpu::peak::Peaks;
use clip_host_model::{KernelInfo, Owner, Phase, part};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long each of the machine's limits is measured.
pub const BUDGET: Duration = Duration::from_millis(300);

/// The track of whole steps; those of the phases follow.
const STEPS: usize = 1;

/// A step that was measured.
struct Step {
    /// The batch's arrival; the step's kernels come after.
    begun: Instant,
    input: Duration,
    whole: Duration,
    kernels: Vec<(Instant, Instant)>,
}

/// What was measured so far.
pub struct Profile {
    path: PathBuf,
    file: BufWriter<File>,
    peaks: Peaks,
    kernels: Vec<KernelInfo>,
    steps: Vec<Step>,
}

impl Profile {
    /// Opens the trace's file, then measures the machine's limits: that it cannot be written is told at once.
    pub fn create(path: &Path, peaks: impl FnOnce() -> Result<Peaks, CliError>) -> Result<Profile, CliError> {
        let file = File::create(path).map_err(|error| refused(path, &error))?;
        let (path, file) = (path.to_path_buf(), BufWriter::new(file));
        let peaks = peaks()?;
        // The most memory that the process reports is to be the steps' own; only Linux can forget the measurement's.
        #[cfg(target_os = "linux")]
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        Ok(Profile { path, file, peaks, kernels: Vec::new(), steps: Vec::new() })
    }

    /// Says what the kernels are whose times follow.
    pub fn describe(&mut self, kernels: Vec<KernelInfo>) {
        self.kernels = kernels;
    }

    /// Takes a step in: when it began, the time that its batch took, and when its kernels began and ended.
    pub fn step(&mut self, begun: Instant, input: Duration, spans: &[(Instant, Instant)]) {
        self.steps.push(Step { begun, input, whole: begun.elapsed(), kernels: spans.to_vec() });
    }

    /// Writes the trace.
    pub fn write(&mut self) -> Result<(), CliError> {
        let events = self.events();
        let written = write_trace(&mut self.file, &events);
        written.and_then(|()| self.file.flush()).map_err(|error| refused(&self.path, &error))
    }

    /// Seconds that a kernel would take at the machine's limit: of products where it is one, else of copies.
    fn ideal(&self, kernel: &KernelInfo) -> f64 {
        match kernel.kind.is_product() {
            true => kernel.cost.flops / (self.gemm(kernel) * 1e9),
            false => kernel.cost.bytes() as f64 / (self.peaks.copy * 1e9),
        }
    }

    /// The limit of products of the kernel's operands.
    fn gemm(&self, kernel: &KernelInfo) -> f64 {
        self.peaks.gemm(kernel.reads.iter().any(|b| b.element == "bf16"))
    }

    fn events(&self) -> Vec<Value> {
        let Some(first) = self.steps.first() else { return vec![] };
        let micros = |at: Instant| at.duration_since(first.begun).as_secs_f64() * 1e6;
        let name = |what: &str, track: usize, name: &str| json!({ "ph": "M", "pid": 1, "tid": track, "name": what, "args": { "name": name } });
        let mut events = vec![name("process_name", STEPS, "clip-host"), name("thread_name", STEPS, "steps")];
        events.extend(Phase::ALL.into_iter().map(|phase| name("thread_name", track(phase), phase.name())));
        for (number, step) in self.steps.iter().enumerate() {
            let whole = |name: String, dur: Duration| {
                json!({
                    "ph": "X", "pid": 1, "tid": STEPS, "name": name, "cat": "step", "ts": micros(step.begun),
                    "dur": dur.as_secs_f64() * 1e6,
                })
            };
            events.push(whole(format!("step {number}"), step.whole));
            events.push(whole("batch".into(), step.input));
            for (kernel, &(begun, ended)) in self.kernels.iter().zip(&step.kernels) {
                let seconds = (ended - begun).as_secs_f64();
                let (gflop, gbyte) = (kernel.cost.flops / 1e9, kernel.cost.bytes() as f64 / 1e9);
                let rate = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
                events.push(json!({
                    "ph": "X", "pid": 1, "tid": track(kernel.phase), "name": kernel.name, "cat": kernel.kind.name(),
                    "ts": micros(begun), "dur": seconds * 1e6,
                    "args": {
                        "part": kernel.part(),
                        "computes": computes(kernel),
                        "GFLOP": gflop,
                        "MB": gbyte * 1e3,
                        "GFLOP/s": rate(gflop),
                        "GB/s": rate(gbyte),
                        "share_of_gemm_peak": rate(gflop) / self.gemm(kernel),
                        "share_of_copy_peak": rate(gbyte) / self.peaks.copy,
                    },
                }));
            }
        }
        events
    }

    /// Sums over a selection of kernels; `None` if there are none.
    fn sum(&self, name: &str, select: impl Fn(&KernelInfo) -> bool) -> Option<Row> {
        let mut row = Row { name: name.into(), ..Row::default() };
        for (index, kernel) in self.kernels.iter().enumerate().filter(|(_, k)| select(k)) {
            let seconds = self.steps.iter().filter_map(|s| s.kernels.get(index)).map(|(a, b)| (*b - *a).as_secs_f64());
            row.kernels += 1;
            row.seconds += seconds.sum::<f64>() / self.steps.len().max(1) as f64;
            row.ideal += self.ideal(kernel);
            row.flops += kernel.cost.flops;
            row.bytes += kernel.cost.bytes() as f64;
            *(if kernel.kind.is_product() { &mut row.products } else { &mut row.others }) += 1;
        }
        (row.kernels > 0).then_some(row)
    }

    fn by_kind(&self) -> Vec<Row> {
        Kind::ALL.into_iter().filter_map(|kind| self.sum(kind.name(), |k| k.kind == kind)).collect()
    }

    fn by_part(&self) -> Vec<Row> {
        let owners = [Owner::Image, Owner::Text, Owner::Shared];
        let parts = [Phase::Forward, Phase::Backward].into_iter().flat_map(|p| owners.map(|o| part(p, o)));
        let all = parts.chain([part(Phase::Update, Owner::Shared)]);
        all.filter_map(|name| self.sum(&name, |k| k.part() == name)).collect()
    }

    /// Mean seconds of a step.
    fn step_seconds(&self) -> f64 {
        self.steps.iter().map(|s| s.whole.as_secs_f64()).sum::<f64>() / self.steps.len().max(1) as f64
    }

    /// The tables, for people.
    pub fn tables(&self) -> String {
        let step = self.step_seconds();
        let peaks = &self.peaks;
        let mut text = format!(
            "\nlimits with {} threads: f32 products {:.1} GFLOP/s, bf16 products {:.1} GFLOP/s, copy {:.1} GB/s (read + \
             written)\n",
            peaks.threads, peaks.gemm_f32, peaks.gemm_bf16, peaks.copy
        );
        for (title, mut rows) in [("kind", self.by_kind()), ("part", self.by_part())] {
            rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
            let head = [title, "kernels", "ms", "share", "GFLOP/s", "GB/s", "of peak", ""].map(String::from).to_vec();
            let mut cells = vec![head];
            cells.extend(rows.iter().map(|row| row.cells(step)));
            let rest = step - rows.iter().map(|r| r.seconds).sum::<f64>();
            let outside = ["outside kernels".into(), String::new(), format!("{:.2}", rest * 1e3), percent(rest / step)];
            cells.push(outside.to_vec());
            text += &format!("\n{}", table(&cells, 0));
        }
        text += &format!("\ntrace: {} (open it in ui.perfetto.dev)\n", self.path.display());
        text
    }

    /// The tables, for programs.
    pub fn json_form(&self) -> Value {
        let step = self.step_seconds();
        let rows = |rows: Vec<Row>| rows.iter().map(|r| r.json(step)).collect::<Vec<_>>();
        json!({
            "trace": self.path.display().to_string(),
            "peaks": crate::commands::peak::json_form(&self.peaks),
            "kinds": rows(self.by_kind()),
            "parts": rows(self.by_part()),
        })
    }
}

/// Kernels together.
#[derive(Default)]
struct Row {
    name: String,
    kernels: usize,
    products: usize,
    others: usize,
    /// A step's, on average.
    seconds: f64,
    /// At the machine's limits.
    ideal: f64,
    flops: f64,
    bytes: f64,
}

impl Row {
    /// What limits these kernels.
    fn limit(&self) -> &'static str {
        match (self.products, self.others) {
            (_, 0) => "products",
            (0, _) => "copy",
            _ => "both",
        }
    }

    fn rate(&self, amount: f64) -> f64 {
        if self.seconds > 0.0 { amount / self.seconds } else { 0.0 }
    }

    fn cells(&self, step: f64) -> Vec<String> {
        vec![
            self.name.clone(),
            self.kernels.to_string(),
            format!("{:.2}", self.seconds * 1e3),
            percent(self.seconds / step),
            format!("{:.1}", self.rate(self.flops / 1e9)),
            format!("{:.1}", self.rate(self.bytes / 1e9)),
            percent(self.rate(self.ideal)),
            self.limit().into(),
        ]
    }

    fn json(&self, step: f64) -> Value {
        json!({
            "name": self.name,
            "kernels": self.kernels,
            "ms": self.seconds * 1e3,
            "share_of_step": self.seconds / step,
            "gflop": self.flops / 1e9,
            "megabytes": self.bytes / 1e6,
            "gflops": self.rate(self.flops / 1e9),
            "gbytes_per_second": self.rate(self.bytes / 1e9),
            "share_of_peak": self.rate(self.ideal),
            "peak": self.limit(),
        })
    }
}

fn track(phase: Phase) -> usize {
    STEPS + 1 + phase as usize
}

/// What a kernel computes, for the trace's details.
fn computes(kernel: &KernelInfo) -> String {
    kernel.ops.iter().map(counted).collect::<Vec<_>>().join(" ")
}

fn write_trace(out: &mut impl Write, events: &[Value]) -> std::io::Result<()> {
    out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n")?;
    for (index, event) in events.iter().enumerate() {
        if index > 0 {
            out.write_all(b",\n")?;
        }
        serde_json::to_writer(&mut *out, event)?;
    }
    out.write_all(b"\n]}\n")
}

fn refused(path: &Path, error: &std::io::Error) -> CliError {
    CliError::Failed(format!(
        "cannot write the trace {}: {error}\nhint: --profile takes the name of a file in a folder that is there, on a \
         disk with room",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clip_host_compiler::cost::Cost;

    fn kernel(kind: Kind, phase: Phase, flops: f64, read: u64) -> KernelInfo {
        KernelInfo {
            name: kind.name().into(),
            ops: vec![("mul", 2), ("exp", 1)],
            kind,
            phase,
            owner: Owner::Image,
            cost: Cost { flops, read, ..Cost::default() },
            reads: vec![],
            writes: vec![],
        }
    }

    /// Two kernels, at half and at a quarter of their limits.
    fn profile() -> Profile {
        let folder = std::env::temp_dir().join(format!("clip-host-profile-{}", std::process::id()));
        let peaks = Peaks { threads: 1, gemm_f32: 100.0, gemm_bf16: 200.0, copy: 10.0 };
        let mut profile = Profile::create(&folder, || Ok(peaks)).unwrap();
        std::fs::remove_file(&folder).unwrap();
        let (conv, fused) = (Kind::Conv, Kind::Fused);
        profile.describe(vec![kernel(conv, Phase::Forward, 5e7, 10), kernel(fused, Phase::Backward, 1e6, 5_000_000)]);
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let kernels = vec![(at(2), at(3)), (at(4), at(6))];
        profile.steps.push(Step { begun, input: Duration::from_millis(1), whole: Duration::from_millis(10), kernels });
        profile
    }

    #[test]
    fn shares_are_of_the_limit_that_counts() {
        let profile = profile();
        let rows = profile.by_kind();
        let shares: Vec<_> = rows.iter().map(|r| (r.name.as_str(), r.rate(r.ideal), r.limit())).collect();
        assert_eq!(shares, [("conv", 0.5, "products"), ("fused", 0.25, "copy")]);
        let parts: Vec<_> = profile.by_part().into_iter().map(|r| r.name).collect();
        assert_eq!(parts, ["image forward", "image backward"]);
        let text = profile.tables();
        assert!(text.contains("outside kernels           7.00  70.0 %"), "{text}");
    }

    #[test]
    fn the_trace_has_an_event_for_each_kernel() {
        let mut text = Vec::new();
        write_trace(&mut text, &profile().events()).unwrap();
        let trace: Value = serde_json::from_slice(&text).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let kernels: Vec<&Value> = events.iter().filter(|e| e["ph"] == "X" && e["cat"] != "step").collect();
        let times: Vec<_> = kernels.iter().map(|e| (e["ts"].as_f64().unwrap(), e["dur"].as_f64().unwrap())).collect();
        assert_eq!(times, [(2000.0, 1000.0), (4000.0, 2000.0)]);
        assert_eq!(kernels[0]["args"]["share_of_gemm_peak"], 0.5);
        assert_eq!(kernels[1]["args"]["share_of_copy_peak"], 0.25);
        assert_eq!(kernels[1]["args"]["computes"], "mul×2 exp");
        // Every track has a name.
        let tracks =
            |what: &str| events.iter().filter(|e| e["ph"] == what).map(|e| e["tid"].clone()).collect::<Vec<_>>();
        assert!(tracks("X").iter().all(|t| tracks("M").contains(t)), "{events:?}");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_told() {
        let peaks = Peaks { threads: 1, gemm_f32: 1.0, gemm_bf16: 1.0, copy: 1.0 };
        let refused = Profile::create(Path::new("/no/such/folder/trace.json"), || Ok(peaks)).err();
        assert!(
            matches!(refused, Some(CliError::Failed(text)) if text.contains("/no/such/folder") && text.contains("hint:"))
        );
    }
}
