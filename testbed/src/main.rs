//! `cargo testbed`: what the tests run on, to be used by hand.

mod up_node;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use testbed::aws::AwsStandIn;
use testbed::binaries;
use testbed::build::{self, Profile};
use testbed::capture::capture;
use testbed::controlplane::ControlPlane;
use testbed::image::Image;
use testbed::operator::{ROLE, SUBJECT};
use testbed::{generated, scale, soak, testbed_dir, until_interrupted};

/// How many bytes the operator's image may have, compressed.
const MAX_IMAGE: usize = 30_000_000;

/// A real Kubernetes control plane and a stand-in for AWS, on this machine.
#[derive(Parser)]
#[command(name = "testbed")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start both, and keep them until Ctrl-C.
    Up {
        /// With a node, on which pods run: install the chart, and run a Deployment that has a friendly name.
        #[arg(long)]
        node: bool,
        /// Do not wait for Ctrl-C at the end.
        #[arg(long, requires = "node")]
        once: bool,
        /// This binary of the operator, instead of one that is compiled now.
        #[arg(long, requires = "node", value_name = "PATH")]
        operator: Option<PathBuf>,
    },
    /// Write the files that are generated: the CRD, `manifests/`, and the tables in the chart's README.
    Generate,
    /// Write the operator's image, as it is shipped, as an OCI archive. Fails if it is larger than we promise.
    Image {
        /// The archive.
        file: PathBuf,
        /// The operator's binary; default: that of this tree, as it is shipped.
        #[arg(long, value_name = "FILE")]
        operator: Option<PathBuf>,
    },
    /// Faults chosen at random under load, with what must always hold checked all along. Fails if anything did not.
    Soak {
        /// How long faults go on.
        #[arg(long, default_value_t = 30.0)]
        minutes: f64,
        /// Which faults, and when; default: another one each time.
        #[arg(long)]
        seed: Option<u64>,
        /// How many pods are created in each second.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rate: u32,
        /// Compile the operator as tests have it, and not as it is shipped.
        #[arg(long)]
        debug: bool,
        /// Another binary of the operator than the one of this tree.
        #[arg(long, value_name = "FILE", conflicts_with = "debug")]
        operator: Option<PathBuf>,
    },
    /// Build Go programs that have not been built yet, and print where they are.
    Build {
        /// Which; all by default.
        programs: Vec<Programs>,
    },
    /// Measure how the controller's cost grows with the number of namespaces. Takes about five minutes for each size.
    Scale {
        /// How many namespaces, one cluster after the other.
        #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [100, 1000, 10_000])]
        namespaces: Vec<usize>,
        /// How many aliases, in a cluster of its own; 0 for none.
        #[arg(long, value_name = "N", default_value_t = 1000)]
        aliases: usize,
        /// The operator's binary; default: that of this tree, as it is shipped.
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
    },
    /// Write AdmissionReviews of an API server into a directory, as benches/fixtures has them.
    Capture {
        /// Where to.
        dir: PathBuf,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Programs {
    /// kube-apiserver, etcd and kubectl.
    Controlplane,
    /// kubelet, kube-controller-manager, kube-scheduler and kube-proxy.
    Node,
    /// helm.
    Helm,
    /// What runs in containers.
    Images,
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Up { node: true, once, operator } => until_interrupted(up_node::up(once, operator)).await,
        Command::Up { .. } => until_interrupted(hold()).await,
        Command::Scale { namespaces, aliases, binary } => {
            until_interrupted(scale::run(binary, &namespaces, aliases)).await
        }
        Command::Generate => generate().await,
        Command::Image { file, operator } => image(&file, operator).await,
        Command::Soak { minutes, seed, rate, debug, operator } => {
            let profile = if debug { Profile::Dev } else { Profile::Release };
            until_interrupted(soak(minutes, seed, rate, operator, profile)).await
        }
        Command::Build { programs } => build(&programs),
        Command::Capture { dir } => until_interrupted(capture(&dir)).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn generate() -> Result<()> {
    for (path, contents) in generated::files().await? {
        fs::write(&path, contents).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

async fn soak(
    minutes: f64,
    seed: Option<u64>,
    rate: u32,
    operator: Option<PathBuf>,
    profile: Profile,
) -> Result<()> {
    let duration = Duration::try_from_secs_f64(minutes * 60.0).context("--minutes")?;
    let seed = seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let operator = build::operator_or(operator, profile).await?;
    soak::run(&operator, soak::Settings { duration, seed, rate }).await
}

async fn image(file: &Path, operator: Option<PathBuf>) -> Result<()> {
    let operator = build::operator_or(operator, Profile::Release).await?;
    let image = Image::operator(&operator)?;
    image.write_archive("ecr-cname", file)?;
    let size = image.size();
    println!("{}: {size} bytes to download", file.display());
    ensure!(size < MAX_IMAGE, "the image is larger than {MAX_IMAGE} bytes");
    Ok(())
}

fn build(programs: &[Programs]) -> Result<()> {
    let programs = if programs.is_empty() { Programs::value_variants() } else { programs };
    for programs in programs {
        let paths = match programs {
            Programs::Controlplane => {
                let built = binaries::locate()?;
                vec![built.kube_apiserver, built.etcd, built.kubectl]
            }
            Programs::Node => {
                let built = binaries::node()?;
                vec![built.kubelet, built.kube_controller_manager, built.kube_scheduler, built.kube_proxy]
            }
            Programs::Helm => vec![binaries::helm()?],
            Programs::Images => {
                let built = binaries::images()?;
                vec![built.pause, built.app]
            }
        };
        for path in paths {
            println!("{}", path.display());
        }
    }
    Ok(())
}

/// Starts everything, and never returns unless that fails.
async fn hold() -> Result<()> {
    eprintln!("testbed: starting the control plane");
    let control_plane = ControlPlane::start().await?;
    // Without it no pod can be made, and no controller runs that would make it.
    control_plane.service_account("default", "default").await?;
    let aws = AwsStandIn::start(control_plane.issuer())?;
    aws.role(ROLE).trusts_subject(SUBJECT);
    let credentials = aws.issue_credentials(ROLE, Duration::from_secs(7 * 24 * 60 * 60))?;

    let (kubeconfig, env) = (testbed_dir().join("kubeconfig"), testbed_dir().join("env"));
    write_private(&kubeconfig, &fs::read_to_string(control_plane.kubeconfig())?)?;
    let mut exports = format!("export KUBECONFIG='{}'\n", kubeconfig.display());
    for (name, value) in aws.env_credentials(&credentials) {
        exports.push_str(&format!("export {name}='{value}'\n"));
    }
    write_private(&env, &exports)?;

    println!("The API server is at {}, AWS at {}.", control_plane.url(), aws.url());
    println!("Logs are in {}.", control_plane.dir().display());
    println!();
    println!("In another terminal:");
    println!();
    println!("    . '{}'", env.display());
    println!("    kubectl get namespaces");
    println!();
    println!("Ctrl-C ends all of it.");
    std::future::pending().await
}

/// Credentials, if only of things that run on this machine.
fn write_private(path: &Path, contents: &str) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    let options = fs::File::options().write(true).create(true).truncate(true).mode(0o600).clone();
    let written = options.open(path).and_then(|mut file| file.write_all(contents.as_bytes()));
    written.with_context(|| format!("cannot write {}", path.display()))
}
