//! `clip-host data`: making and indexing data.

use crate::cli::{IndexArgs, SynthArgs};
use crate::error::CliError;
use crate::{output, prepare};
use clip_host_data::names;
use clip_host_data::shard::Shard;
use clip_host_data_synth::{SynthConfig, generate};
use serde_json::json;

pub fn synth(args: SynthArgs) -> Result<(), CliError> {
    let config = SynthConfig {
        out: args.out,
        seed: args.seed,
        train: args.train,
        val: args.val,
        shard_size: args.shard_size,
        image_size: args.image_size,
        quality: args.quality,
        difficulty: args.difficulty,
        json: args.json,
        overwrite: args.overwrite,
    };
    let made = generate(&config)?;
    output::line(&format!(
        "{} training and {} held-out pairs in {} tars, {:.1} MB; {} tokens in {}, the longest caption has {}",
        config.train,
        config.val,
        made.train_shards.len() + made.val_shards.len(),
        made.bytes as f64 / 1e6,
        made.vocab_size,
        made.vocab.display(),
        made.longest_caption
    ))
}

pub fn index(args: &IndexArgs) -> Result<(), CliError> {
    let base = prepare::base()?;
    let mut rows = Vec::new();
    let (mut samples, mut failed) = (0, 0);
    for pattern in &args.shards {
        for file in names::resolve(pattern, &base)? {
            match Shard::open(&file) {
                Ok(shard) => {
                    samples += shard.len();
                    if !args.json {
                        output::line(&format!(
                            "{:8} samples  skipped {}  {}",
                            shard.len(),
                            shard.skipped(),
                            file.display()
                        ))?;
                    }
                    rows.push(json!({"file": file, "samples": shard.len(), "skipped": shard.skipped().counts()}));
                }
                // The other shards are looked at all the same: a broken download is often more than one file.
                Err(error) => {
                    failed += 1;
                    tracing::error!("{error}");
                    rows.push(json!({"file": file, "error": error.to_string()}));
                }
            }
        }
    }
    if args.json {
        output::json(&json!({"samples": samples, "shards": rows}))?;
    } else {
        output::line(&format!("{samples} samples in {} shards", rows.len() - failed))?;
    }
    match failed {
        0 => Ok(()),
        _ => Err(CliError::Failed(format!(
            "{failed} of {} shards cannot be used\nhint: see the messages above",
            rows.len()
        ))),
    }
}
