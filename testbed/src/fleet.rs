//! The operator as it is deployed: some replicas of each role, with the webhook's behind its Service.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::task::spawn_blocking;

use crate::aws::AwsStandIn;
use crate::controlplane::ControlPlane;
use crate::eventually;
use crate::operator::{Operator, Start};
use crate::service::WebhookService;

/// How long a replica may take to end, or to take the lead.
const PATIENCE: Duration = Duration::from_secs(60);

/// A role of the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `ecr-cname webhook`.
    Webhook,
    /// `ecr-cname controller`.
    Controller,
}

/// Replicas of both roles. Dropping it kills them.
pub struct Fleet<'a> {
    binary: &'a Path,
    control_plane: &'a ControlPlane,
    aws: &'a AwsStandIn,
    starts: [Start; 2],
    started: usize,
    service: WebhookService,
    webhooks: Vec<Operator>,
    controllers: Vec<Operator>,
}

impl<'a> Fleet<'a> {
    /// Starts two replicas of each role, and waits until all are ready.
    ///
    /// # Errors
    /// One is not.
    pub async fn start(
        binary: &'a Path,
        control_plane: &'a ControlPlane,
        aws: &'a AwsStandIn,
        webhook: Start,
        controller: Start,
    ) -> Result<Self> {
        let service = WebhookService::start(control_plane)?;
        // A replica serves on for as long as the API server may take to learn that it is not ready any more.
        let delay = ["--shutdown-delay=2s"];
        let starts = [webhook.behind(&service).args(delay), controller.behind(&service)];
        let (webhooks, controllers) = (Vec::new(), Vec::new());
        let mut fleet =
            Self { binary, control_plane, aws, starts, started: 0, service, webhooks, controllers };
        // The webhooks are ready once a controller has made the certificate.
        for role in [Role::Webhook, Role::Webhook, Role::Controller, Role::Controller] {
            fleet.spawn(role).await?;
        }
        for operator in fleet.webhooks.iter().chain(&fleet.controllers) {
            operator.wait_ready().await?;
        }
        fleet.service.converged(PATIENCE).await?;
        Ok(fleet)
    }

    /// The replicas of a role, oldest first.
    #[must_use]
    pub fn replicas(&self, role: Role) -> &[Operator] {
        match role {
            Role::Webhook => &self.webhooks,
            Role::Controller => &self.controllers,
        }
    }

    /// Starts one more replica, and waits until it is ready.
    ///
    /// # Errors
    /// It is not.
    pub async fn add(&mut self, role: Role) -> Result<()> {
        self.spawn(role).await?;
        let newest = self.replicas(role).last().context("it was just added")?;
        newest.wait_ready().await?;
        self.service.converged(PATIENCE).await
    }

    async fn spawn(&mut self, role: Role) -> Result<()> {
        self.started += 1;
        let (name, start) = match role {
            Role::Webhook => ("webhook", &self.starts[0]),
            Role::Controller => ("controller", &self.starts[1]),
        };
        let start = start.clone().named(&format!("{name}-{}", self.started));
        let operator = Operator::spawn(self.binary, self.control_plane, self.aws, start).await?;
        match role {
            Role::Webhook => {
                self.service.add(&operator);
                self.webhooks.push(operator);
            }
            Role::Controller => self.controllers.push(operator),
        }
        Ok(())
    }

    /// Tells a replica to end, and waits until it has. Its endpoint goes at the same time, as that of a pod that is deleted.
    ///
    /// # Errors
    /// It does not, or says that it failed.
    pub async fn terminate(&mut self, role: Role, index: usize) -> Result<()> {
        let operator = self.take(role, index);
        operator.process().terminate()?;
        self.service.remove(&operator);
        ended(operator, true).await?;
        self.service.converged(PATIENCE).await
    }

    /// Kills a replica. Its endpoint goes when a probe has missed it. Returns when it was killed.
    ///
    /// # Errors
    /// It cannot be killed.
    pub async fn kill(&mut self, role: Role, index: usize) -> Result<Instant> {
        let operator = self.take(role, index);
        let killed = Instant::now();
        operator.process().kill()?;
        let operator = ended(operator, false).await?;
        self.service.missed(&operator, PATIENCE).await?;
        self.service.remove(&operator);
        self.service.converged(PATIENCE).await?;
        Ok(killed)
    }

    fn take(&mut self, role: Role, index: usize) -> Operator {
        match role {
            Role::Webhook => self.webhooks.remove(index),
            Role::Controller => self.controllers.remove(index),
        }
    }

    /// Replaces all replicas of a role, one after the other, each new one before an old one, as a Deployment does.
    ///
    /// # Errors
    /// A new one is not ready, or an old one does not end well.
    pub async fn roll(&mut self, role: Role) -> Result<()> {
        for _ in 0..self.replicas(role).len() {
            self.add(role).await?;
            self.terminate(role, 0).await?;
        }
        Ok(())
    }

    /// Waits until exactly one controller says that it leads; returns its index.
    ///
    /// # Errors
    /// None does.
    pub async fn leader(&self) -> Result<usize> {
        eventually(PATIENCE, async || {
            let mut leaders = Vec::new();
            for (index, controller) in self.controllers.iter().enumerate() {
                if controller.metric("ecr_cname_leader").await.is_ok_and(|leads| leads > 0.0) {
                    leaders.push(index);
                }
            }
            let [leader] = leaders[..] else {
                bail!("{} of {} controllers lead", leaders.len(), self.controllers.len());
            };
            Ok(leader)
        })
        .await
    }
}

/// Waits until a process has ended.
async fn ended(operator: Operator, well: bool) -> Result<Operator> {
    spawn_blocking(move || {
        let process = operator.process();
        let status = process.wait(PATIENCE).with_context(|| format!("{} does not end", process.name()))?;
        ensure!(!well || status.success(), "{}: {status}\n{}", process.name(), process.log_tail(20));
        Ok(operator)
    })
    .await?
}
