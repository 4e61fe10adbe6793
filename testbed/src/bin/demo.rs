//! `cargo demo`: the main job, on real parts, told in a few lines.

use std::{
    collections::BTreeMap,
    fmt::Display,
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::Parser;
use serde_json::Value;
use testbed::{
    aws::{AwsStandIn, Operation, Scope},
    build::{self, Profile},
    controlplane::ControlPlane,
    operator::{self, Operator, ROLE, SUBJECT, Start},
    until_interrupted,
};

const REGION: &str = "us-east-1";
const REGISTRY: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";

const ALIAS: &str = "\
apiVersion: ecr-cname.dev/v1alpha1
kind: RegistryAlias
metadata:
  name: internal
spec:
  host: docker-ecr.internal.example.io
  registry: 123456789012.dkr.ecr.us-east-1.amazonaws.com
";

const POD: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: shop
spec:
  containers:
    - name: app
      image: docker-ecr.internal.example.io/team/app:1
";

/// The main job of ecr-cname, on a real Kubernetes control plane and with a stand-in for AWS.
#[derive(Parser)]
#[command(name = "cargo demo")]
struct Args {
    /// Leave everything running until Ctrl-C, and print commands to try.
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    match until_interrupted(demo(Args::parse().keep)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the demo; with `keep`, holds everything afterwards until Ctrl-C.
async fn demo(keep: bool) -> Result<()> {
    let tell = Tell { color: std::io::stdout().is_terminal() };
    tell.title("ecr-cname: your own name for your ECR registry, on a real Kubernetes control plane");

    let binary = build::operator(Profile::Dev)?;
    let started = Instant::now();
    let control_plane = ControlPlane::start().await?;
    let version = control_plane.kubectl(&["version", "--output=json"]).await?;
    let version: Value = serde_json::from_str(&version)?;
    let version = version["serverVersion"]["gitVersion"].as_str().unwrap_or_default().to_owned();
    tell.done(
        started,
        format_args!("kube-apiserver {version} and etcd, with RBAC, at {}", control_plane.url()),
    );

    let aws = AwsStandIn::start(control_plane.issuer())?;
    aws.role(ROLE).trusts_subject(SUBJECT);
    tell.done(started, format_args!("a stand-in for AWS (STS and ECR over HTTP) at {}", aws.url()));

    operator::install(&control_plane).await?;
    let operator = Operator::start(&binary, &control_plane, &aws, Start::run()).await?;
    tell.done(started, format_args!("`ecr-cname run` as {SUBJECT}, with the rights of manifests/rbac.yaml"));

    tell.title("What a platform engineer writes, once");
    tell.block(ALIAS);
    control_plane.apply(ALIAS).await?;
    let asked = Instant::now();
    wait_ready(&control_plane).await.with_context(|| operator.process().log_tail(30))?;
    tell.command("kubectl wait --for=condition=Ready registryalias/internal");
    tell.line(format_args!("condition met after {} ms", asked.elapsed().as_millis()));

    tell.title("What a developer writes");
    tell.block(POD);
    control_plane.kubectl(&["create", "namespace", "shop"]).await?;
    control_plane.service_account("shop", "default").await?;
    control_plane.apply(POD).await?;

    tell.title("What the API server stored");
    let pod: Value = serde_json::from_str(
        &control_plane.kubectl(&["get", "pod", "web", "-n", "shop", "-o", "json"]).await?,
    )?;
    let image = pod["spec"]["containers"][0]["image"].as_str().unwrap_or_default();
    let secret_name = pod["spec"]["imagePullSecrets"][0]["name"].as_str().unwrap_or_default();
    let original =
        pod["metadata"]["annotations"]["ecr-cname.dev/original-images"].as_str().unwrap_or_default();
    tell.block(&format!(
        "metadata:\n  annotations:\n    ecr-cname.dev/original-images: {original}\nspec:\n  containers:\n    - name: app\n      image: {image}\n  imagePullSecrets:\n    - name: {secret_name}\n"
    ));
    ensure!(image == format!("{REGISTRY}/team/app:1"), "the pod was stored with the image {image:?}");
    ensure!(secret_name == "ecr-cname", "the pod was stored with the pull secret {secret_name:?}");

    tell.title("The pull secret in the developer's namespace");
    let held = held_token(&control_plane).await?;
    let current = aws.current_token(ROLE, REGION).context("AWS has handed out no token")?;
    tell.line(format_args!("the Secret holds a token for    {REGISTRY}"));
    tell.line(format_args!("the token in the Secret is      sha256:{}", digest(&held)));
    tell.line(format_args!("the token AWS handed out last   sha256:{}", digest(&current)));
    ensure!(held == current, "the Secret does not hold the current token");
    let count = |operation| aws.count(&Scope::of(operation));
    tell.line(format_args!(
        "calls to AWS: {} AssumeRoleWithWebIdentity (IRSA), {} GetAuthorizationToken",
        count(Operation::AssumeRoleWithWebIdentity),
        count(Operation::GetAuthorizationToken)
    ));

    tell.title("What the platform engineer sees");
    tell.command("kubectl get registryaliases");
    tell.block(&control_plane.kubectl(&["get", "registryaliases"]).await?);
    tell.block(&conditions(&control_plane).await?);

    tell.success("The pod names the canonical registry, and its pull secret holds the current token.");
    if keep {
        hold(&tell, &control_plane).await?;
    }
    Ok(())
}

async fn wait_ready(control_plane: &ControlPlane) -> Result<()> {
    let wait = ["wait", "--for=condition=Ready", "--timeout=30s", "registryalias/internal"];
    if let Err(error) = control_plane.kubectl(&wait).await {
        bail!("the alias does not become ready: {error:#}\n{}", conditions(control_plane).await?);
    }
    Ok(())
}

async fn conditions(control_plane: &ControlPlane) -> Result<String> {
    let alias = control_plane.kubectl(&["get", "registryalias", "internal", "-o", "json"]).await?;
    let alias: Value = serde_json::from_str(&alias)?;
    let text = |condition: &Value, key: &str| condition[key].as_str().unwrap_or_default().to_owned();
    let rows = alias["status"]["conditions"].as_array().into_iter().flatten().map(|c| {
        format!(
            "{:<14} {:<6} {:<18} {}\n",
            text(c, "type"),
            text(c, "status"),
            text(c, "reason"),
            text(c, "message")
        )
    });
    Ok(std::iter::once(format!("{:<14} {:<6} {:<18} MESSAGE\n", "CONDITION", "STATUS", "REASON"))
        .chain(rows)
        .collect())
}

/// The token in the pull secret of `shop`. The Secret follows its namespace within moments.
async fn held_token(control_plane: &ControlPlane) -> Result<String> {
    control_plane
        .kubectl(&["wait", "--for=create", "--timeout=30s", "--namespace=shop", "secret/ecr-cname"])
        .await?;
    let path = "jsonpath={.data.\\.dockerconfigjson}";
    let data = control_plane.kubectl(&["get", "secret", "ecr-cname", "-n", "shop", "-o", path]).await?;
    let config: BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>> =
        serde_json::from_slice(&STANDARD.decode(data)?).context("the Secret holds no docker config")?;
    let auth = config.get("auths").and_then(|a| a.get(REGISTRY)?.get("auth"));
    let auth = String::from_utf8(STANDARD.decode(auth.context("the Secret has no auth for the registry")?)?)?;
    Ok(auth.strip_prefix("AWS:").context("the user is not AWS")?.to_owned())
}

fn digest(token: &str) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes());
    digest.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

async fn hold(tell: &Tell, control_plane: &ControlPlane) -> Result<()> {
    tell.title("It goes on running. In another terminal, try:");
    tell.block(&format!(
        "export KUBECONFIG='{}'\n\
         kubectl describe registryalias internal\n\
         kubectl describe pod web -n shop\n\
         kubectl run again -n shop --image=docker-ecr.internal.example.io/team/app:2 --restart=Never\n\
         kubectl get pods -n shop -o 'custom-columns=NAME:.metadata.name,IMAGE:.spec.containers[*].image'\n\
         kubectl patch registryalias internal --type=merge -p '{{\"spec\":{{\"repositoryPrefix\":\"mirror\"}}}}'\n",
        control_plane.kubeconfig().display()
    ));
    tell.line(format_args!("Logs are in {}. Ctrl-C ends all of it.", control_plane.dir().display()));
    std::future::pending().await
}

/// Tells what happens: in colour on a terminal, as plain text elsewhere.
struct Tell {
    color: bool,
}

impl Tell {
    fn title(&self, text: &str) {
        let text = self.paint("1", text);
        self.out(format_args!("\n{text}\n\n"));
    }

    fn done(&self, since: Instant, what: impl Display) {
        let mark = self.paint("32", "✓");
        self.out(format_args!(
            "  {mark} {what} {}\n",
            self.paint("2", &format!("({:.1} s)", since.elapsed().as_secs_f64()))
        ));
    }

    fn command(&self, text: &str) {
        let text = self.paint("36", &format!("$ {text}"));
        self.out(format_args!("  {text}\n"));
    }

    fn line(&self, text: impl Display) {
        self.out(format_args!("  {text}\n"));
    }

    fn block(&self, text: &str) {
        text.lines().for_each(|line| self.line(line.trim_end()));
        self.out("\n");
    }

    fn success(&self, text: &str) {
        let mark = self.paint("32", "✓");
        self.out(format_args!("{mark} {}\n", self.paint("1", text)));
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn out(&self, text: impl Display) {
        // A reader that has seen enough is no error.
        let _ = write!(std::io::stdout(), "{text}");
    }
}
