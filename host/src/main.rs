//! `clip-host`: trains CLIP-style image-text models from recipes, with plugins.
//!
//! One subcommand is one file in `commands`; `cli` has their flags, `error` the exit codes.

mod cli;
mod commands;
mod error;
mod logging;
mod output;
mod prepare;
mod profile;
mod settings;
mod units;

use clap::Parser;
use cli::{BenchCommand, Cli, Command, DataCommand, PluginsCommand};
use error::CliError;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // clap's own text; `--help` and `--version` arrive here too, with exit code 0.
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { error::USAGE } else { 0 });
        }
    };
    logging::start(cli.verbose, cli.quiet);
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    match cli.command {
        Command::Run(args) => commands::run::run(args),
        Command::Grid(args) => commands::grid::run(&args),
        Command::Check(args) => commands::check::run(&args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Eval(args) => commands::eval::run(args),
        Command::Plugins(PluginsCommand::List(args)) => commands::plugins::list(&args),
        Command::Plugins(PluginsCommand::Inspect(args)) => commands::plugins::inspect(&args),
        Command::Plugins(PluginsCommand::New(args)) => commands::plugins_new::run(&args),
        Command::Plugins(PluginsCommand::Check(args)) => commands::plugins_check::run(&args),
        Command::Replay(args) => commands::replay::run(&args),
        Command::Data(DataCommand::Synth(args)) => commands::data::synth(args),
        Command::Data(DataCommand::Index(args)) => commands::data::index(&args),
        Command::Bench(BenchCommand::Step(args)) => commands::bench::step(args),
        Command::Bench(BenchCommand::Data(args)) => commands::bench::data(&args),
        Command::Bench(BenchCommand::Peak(args)) => commands::peak::run(&args),
        Command::Bench(BenchCommand::LuminalCuda(args)) => commands::luminal_cuda::run(&args),
    }
}
