//! `weightfs diagnose`: how manifests and a model directory fit together, tensor by tensor.

use super::weights::WeightsArguments;
use crate::model::ModelDirectory;
use crate::source::diagnose;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
pub struct DiagnoseArguments {
    model_dir: PathBuf,
    #[command(flatten)]
    weights: WeightsArguments,
    /// Print every tensor, as JSON
    #[arg(long)]
    json: bool,
}

/// Success only if nothing is wrong.
pub fn run(a: DiagnoseArguments) -> anyhow::Result<ExitCode> {
    let directory = ModelDirectory::open(&a.model_dir)?;
    let found = diagnose(&directory, &a.weights.need_manifests(&directory)?)?;
    if a.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        println!("matched       {}", found.matched.len());
        let list = |title: &str, names: &[String]| {
            println!("{title:<13} {}", names.len());
            names.iter().for_each(|n| println!("    {n}"));
        };
        list("only live", &found.only_live);
        list("only on disk", &found.only_on_disk);
        let explained =
            |pairs: &[(String, String)]| pairs.iter().map(|(n, why)| format!("{n}: {why}")).collect::<Vec<_>>();
        list("opaque", &explained(&found.opaque));
        list("wrong", &explained(&found.wrong));
    }
    Ok(if found.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
