//! A whole cluster on this machine: control plane, node, and what stands for the world around it.

use std::sync::Arc;

use anyhow::Result;
use tokio::task::spawn_blocking;

use crate::aws::AwsStandIn;
use crate::controlplane::ControlPlane;
use crate::dns::DnsStandIn;
use crate::image::Image;
use crate::node::{Machine, Node};
use crate::operator::ROLE;
use crate::registry::{HOST, Registry};

/// The name under which the node has the operator's image.
const OPERATOR_IMAGE: [&str; 3] = ["testbed.invalid", "ecr-cname", "dev"];

/// A running cluster; dropping it ends it. There is one at a time on a machine.
pub struct Cluster {
    // Dropped in this order: the node before the API server, the machine last.
    /// Where pods run.
    pub node: Node,
    /// The registry that ECR's host name leads to.
    pub registry: Registry,
    /// The DNS server of the machine and its pods.
    pub dns: DnsStandIn,
    /// STS and ECR, as pods reach them.
    pub aws: AwsStandIn,
    /// The API server.
    pub control_plane: ControlPlane,
}

impl Cluster {
    /// Starts everything, and returns when pods can run.
    ///
    /// # Errors
    /// This machine is not fit for it (see [`Requirements`](crate::node::Requirements)), or something does not start.
    pub async fn start() -> Result<Self> {
        let machine = Arc::new(spawn_blocking(Machine::start).await??);
        let control_plane = ControlPlane::start_on(Arc::clone(&machine)).await?;
        let aws = AwsStandIn::start_on(control_plane.issuer(), &machine)?;

        let dns = DnsStandIn::start_on(&machine, control_plane.config())?;
        dns.a(HOST, Machine::ADDRESS, 60)?;
        machine.write("/etc/resolv.conf", &format!("nameserver {}\n", Machine::ADDRESS))?;

        let app = spawn_blocking(Image::app).await??;
        let registry = Registry::start_on(&machine, app, aws.tokens())?;
        machine.append("/etc/ssl/certs/ca-certificates.crt", registry.ca_pem())?;

        let node = Node::start(machine, &control_plane).await?;
        Ok(Self { node, registry, dns, aws, control_plane })
    }
    /// Puts the operator's image on the node.
    ///
    /// # Errors
    /// It cannot be imported.
    pub async fn load_operator(&self, image: Image) -> Result<()> {
        let [registry, repository, tag] = OPERATOR_IMAGE;
        self.node.import(image, &format!("{registry}/{repository}:{tag}")).await
    }

    /// Values for the chart: this image, IRSA, and the stand-in for AWS.
    #[must_use]
    pub fn values(&self) -> String {
        let [registry, repository, tag] = OPERATOR_IMAGE;
        let aws = self.aws.url();
        format!(
            "\
image: {{ registry: {registry}, repository: {repository}, tag: {tag} }}
aws: {{ roleArn: \"{ROLE}\" }}
controller:
  extraEnv:
    - {{ name: AWS_ENDPOINT_URL, value: \"{aws}\" }}
"
        )
    }
}
