//! `clip-host bench luminal-cuda`: the encoders' forward passes by luminal's stock CUDA compiler, beside our plan's.

use crate::cli::BenchLuminalCudaArgs;
use crate::error::CliError;

#[cfg(not(feature = "luminal-cuda"))]
pub fn run(_: &BenchLuminalCudaArgs) -> Result<(), CliError> {
    Err(CliError::Failed(
        "bench luminal-cuda: this clip-host was built without luminal's CUDA compiler\n\
         hint: with a CUDA toolkit, `cargo build --release --features luminal-cuda`"
            .into(),
    ))
}

#[cfg(feature = "luminal-cuda")]
pub fn run(args: &BenchLuminalCudaArgs) -> Result<(), CliError> {
    built_in::run(args)
}

#[cfg(feature = "luminal-cuda")]
mod built_in {
    use super::{BenchLuminalCudaArgs, CliError};
    use crate::commands::bench::{Source, median};
    use crate::units::table;
    use crate::{output, prepare};
    use clip_host_model::stock::{self, StockRun};
    use clip_host_model::{EVAL_BATCH, ModelError, Session};
    use serde_json::json;
    use std::time::Instant;

    /// One tower on both sides.
    struct Tower {
        name: &'static str,
        ours_ms: Vec<f64>,
        ours: Vec<f32>,
        stock: StockRun,
    }

    pub fn run(args: &BenchLuminalCudaArgs) -> Result<(), CliError> {
        // Of the training step only the weights are needed, so that its batch is the smallest that every loss takes.
        let flags =
            [("train.batch_size", Some("2".to_string())), ("data.image_size", args.image_size.map(|n| n.to_string()))];
        let (recipe, config) = prepare::recipe(&args.recipe, &prepare::sets(&args.set, &flags))?;
        let plugins = prepare::plugins(&recipe)?;
        let dataset_size = prepare::synthetic_dataset(EVAL_BATCH);
        let mut session = Session::new(plugins.model(&recipe, &config, dataset_size, prepare::device(&recipe)?))?;
        let batch = Source::synthetic(&config, EVAL_BATCH, plugins.vocab_size().unwrap_or(30_522)).next(0)?;
        let steps = usize::from(args.steps);

        let stock = stock::encode_images(&session, &batch.images, steps)?;
        let (ours_ms, ours) = timed(steps, || session.encode_images(&batch.images))?;
        let image = Tower { name: "image", ours_ms, ours, stock };
        let (ids, mask) = (&batch.input_ids, &batch.attention_mask);
        let stock = stock::encode_texts(&session, ids, mask, steps)?;
        let (ours_ms, ours) = timed(steps, || session.encode_texts(ids, mask))?;
        print(args, vec![image, Tower { name: "text", ours_ms, ours, stock }])
    }

    /// Milliseconds of each call after the first, and what the last one gave.
    fn timed(
        runs: usize,
        mut f: impl FnMut() -> Result<Vec<f32>, ModelError>,
    ) -> Result<(Vec<f64>, Vec<f32>), ModelError> {
        let mut result = f()?;
        let mut times = Vec::new();
        for _ in 0..runs {
            let start = Instant::now();
            result = f()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok((times, result))
    }

    fn print(args: &BenchLuminalCudaArgs, towers: Vec<Tower>) -> Result<(), CliError> {
        let mut rows = vec![
            ["tower", "ours ms", "luminal_cuda ms", "ratio", "its compile s", "largest difference"]
                .map(String::from)
                .to_vec(),
        ];
        let mut found = Vec::new();
        for mut tower in towers {
            let mut stock_ms: Vec<f64> = tower.stock.times.iter().map(|t| t.as_secs_f64() * 1e3).collect();
            let (all_ours, all_stock) = (tower.ours_ms.clone(), stock_ms.clone());
            let (ours, stock) = (median(&mut tower.ours_ms), median(&mut stock_ms));
            let apart = tower.ours.iter().zip(&tower.stock.features).map(|(a, b)| f64::from((a - b).abs()));
            let apart = apart.fold(0.0, f64::max);
            let compile = tower.stock.compile_time.as_secs_f64();
            rows.push(vec![
                tower.name.into(),
                format!("{ours:.2}"),
                format!("{stock:.2}"),
                format!("{:.2}", stock / ours),
                format!("{compile:.1}"),
                format!("{apart:.1e}"),
            ]);
            found.push(json!({
                "tower": tower.name,
                "batch": EVAL_BATCH,
                "ours_ms": ours,
                "luminal_cuda_ms": stock,
                "ratio": stock / ours,
                "luminal_cuda_compile_seconds": compile,
                "largest_difference": apart,
                "ours_runs_ms": all_ours,
                "luminal_cuda_runs_ms": all_stock,
            }));
        }
        match args.json {
            true => output::json(&json!({ "towers": found })),
            false => output::print(&table(&rows, 1)),
        }
    }
}
