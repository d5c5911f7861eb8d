//! `clip-host bench peak`: this machine's limits.

use crate::cli::BenchPeakArgs;
use crate::error::CliError;
use crate::units::table;
use crate::{output, prepare};
use clip_host_cpu::ThreadPool;
use clip_host_cpu::peak::Peaks;
use serde_json::{Value, json};
use std::time::Duration;

pub const COPY_NOTE: &str = "bytes read plus bytes written";

pub fn run(args: &BenchPeakArgs) -> Result<(), CliError> {
    let Ok(budget) = Duration::try_from_secs_f64(args.seconds) else {
        let hint = "give a number of seconds such as 0.5";
        return Err(CliError::Usage(format!("--seconds {} is not a length of time\nhint: {hint}", args.seconds)));
    };
    let all = prepare::threads(args.threads.map_or(0, usize::from));
    let pool = ThreadPool::new(1);
    let isa = pool.isa().name();
    let mut peaks = vec![Peaks::measure(&pool, budget)];
    if all > 1 {
        peaks.push(Peaks::measure(&ThreadPool::new(all), budget));
    }
    if args.json {
        let peaks: Vec<Value> = peaks.iter().map(json_form).collect();
        return output::json(&json!({ "instruction_set": isa, "copy_note": COPY_NOTE, "peaks": peaks }));
    }
    let mut rows = vec![["threads", "f32 GFLOP/s", "bf16 GFLOP/s", "copy GB/s"].map(String::from).to_vec()];
    rows.extend(peaks.iter().map(|p| {
        let [single, half, copy] = [p.gemm_f32, p.gemm_bf16, p.copy].map(|x| format!("{x:.1}"));
        vec![p.threads.to_string(), single, half, copy]
    }));
    output::print(&format!("{}instruction set {isa}; copy: {COPY_NOTE}\n", table(&rows, 0)))
}

/// The limits as JSON shows them.
pub fn json_form(peaks: &Peaks) -> Value {
    json!({
        "threads": peaks.threads,
        "gemm_f32_gflops": peaks.gemm_f32,
        "gemm_bf16_gflops": peaks.gemm_bf16,
        "copy_gbytes_per_second": peaks.copy,
    })
}
