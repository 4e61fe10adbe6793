//! Process-wide things only: the crypto provider, the flags, the runtime, the exit code.

use std::{process::ExitCode, time::Duration};

use clap::Parser as _;
use ecr_cname::{
    args::{Cli, Command, LogArgs},
    cleanup, offline, probe, run, telemetry,
};

fn main() -> ExitCode {
    // It fails only if there is one already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match dispatch(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Webhook { process, webhook } => {
            serve(&process.log.clone(), run::run(process, Some(webhook), None))
        }
        Command::Controller { process, controller } => {
            serve(&process.log.clone(), run::run(process, None, Some(controller)))
        }
        Command::Run { process, webhook, controller } => {
            serve(&process.log.clone(), run::run(process, Some(webhook), Some(controller)))
        }
        Command::Cleanup { cleanup: args } => {
            serve(&args.log.clone(), async move { cleanup::cleanup(&args).await })
        }
        Command::Rewrite(args) => Ok(offline::rewrite(&args)),
        Command::Resolve(args) => Ok(offline::resolve(&args)),
        Command::Crd => offline::crd(),
        Command::Probe(args) => {
            probe::probe(&args)?;
            println!("the webhook answers");
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn serve(log: &LogArgs, work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
    telemetry::init(log.log_format, &log.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    // A name that is being looked up by the system cannot be cancelled; it is not waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result.map(|()| ExitCode::SUCCESS)
}
