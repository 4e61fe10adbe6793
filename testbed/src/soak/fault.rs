//! The faults of a soak, and how they are made.

use std::fmt;
use std::time::Duration;

use anyhow::{Result, ensure};
use ecr_cname::crd::RegistryAlias;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

use super::{ALIASES, Soak, create_alias, ready};
use crate::apiproxy;
use crate::aws;
use crate::eventually;
use crate::fleet::Role;

/// The replica of each role that is not ended or killed, so that its memory can be watched for the whole time.
const SPARED: usize = 0;
/// Any other.
const VICTIM: usize = 1;

/// Something that goes wrong, or is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    WebhookReplaced,
    WebhookKilled,
    ControllerReplaced,
    ControllerKilled,
    LeaderSuspended,
    ApiServerKilled,
    ApiServerRestarted,
    EtcdRestarted,
    EtcdCompacted,
    ConnectionsSilenced,
    ApiServerSlow,
    WritesRefused,
    AnswersLost,
    AwsFails,
    AwsRefusesConnections,
    AwsSilent,
    AliasMoved,
    AliasAddedAndRemoved,
}

/// What pods may be lost to a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// None.
    None,
    /// Those whose connection to a webhook died, or could not be made.
    Connections,
    /// Those that the API server could not take.
    ApiServer,
}

impl Fault {
    pub(super) const ALL: [Self; 18] = [
        Self::WebhookReplaced,
        Self::WebhookKilled,
        Self::ControllerReplaced,
        Self::ControllerKilled,
        Self::LeaderSuspended,
        Self::ApiServerKilled,
        Self::ApiServerRestarted,
        Self::EtcdRestarted,
        Self::EtcdCompacted,
        Self::ConnectionsSilenced,
        Self::ApiServerSlow,
        Self::WritesRefused,
        Self::AnswersLost,
        Self::AwsFails,
        Self::AwsRefusesConnections,
        Self::AwsSilent,
        Self::AliasMoved,
        Self::AliasAddedAndRemoved,
    ];

    pub(super) fn loss(self) -> Loss {
        match self {
            Self::WebhookKilled => Loss::Connections,
            Self::ApiServerKilled | Self::ApiServerRestarted | Self::EtcdRestarted => Loss::ApiServer,
            _ => Loss::None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::WebhookReplaced => "webhook replaced (SIGTERM)",
            Self::WebhookKilled => "webhook killed (SIGKILL)",
            Self::ControllerReplaced => "controller replaced (SIGTERM)",
            Self::ControllerKilled => "controller killed (SIGKILL)",
            Self::LeaderSuspended => "leader suspended past its Lease",
            Self::ApiServerKilled => "API server killed and started",
            Self::ApiServerRestarted => "API server stopped and started",
            Self::EtcdRestarted => "etcd stopped and started",
            Self::EtcdCompacted => "etcd compacted",
            Self::ConnectionsSilenced => "connections to the API server silent",
            Self::ApiServerSlow => "API server slow (2 s)",
            Self::WritesRefused => "writes refused (409, 429, 500, 503)",
            Self::AnswersLost => "answers to writes lost",
            Self::AwsFails => "AWS fails in various ways",
            Self::AwsRefusesConnections => "AWS refuses connections",
            Self::AwsSilent => "AWS says nothing",
            Self::AliasMoved => "alias moved to another registry",
            Self::AliasAddedAndRemoved => "alias added and removed",
        })
    }
}

impl Soak<'_> {
    /// Makes it happen; returns when it is over.
    pub(super) async fn cause(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::WebhookReplaced => self.replace(Role::Webhook).await,
            Fault::WebhookKilled => self.kill(Role::Webhook).await,
            Fault::ControllerReplaced => self.replace(Role::Controller).await,
            Fault::ControllerKilled => self.kill(Role::Controller).await,
            Fault::LeaderSuspended => self.suspend_leader().await,
            Fault::ApiServerKilled => {
                self.control_plane.kill_apiserver().await?;
                self.control_plane.start_apiserver().await
            }
            Fault::ApiServerRestarted => {
                self.control_plane.stop_apiserver().await?;
                self.control_plane.start_apiserver().await
            }
            Fault::EtcdRestarted => {
                self.control_plane.stop_etcd().await?;
                self.control_plane.start_etcd().await
            }
            Fault::EtcdCompacted => self.control_plane.compact_etcd().await,
            Fault::ConnectionsSilenced => {
                self.proxies.iter().for_each(|proxy| proxy.silence_connections());
                Ok(())
            }
            Fault::ApiServerSlow => {
                let slow = apiproxy::Fault::Delay(Duration::from_secs(2));
                self.proxies.iter().for_each(|proxy| proxy.inject(slow, |_| true));
                self.for_a_while().await
            }
            Fault::WritesRefused => {
                let status = self.random.choice([409, 429, 500, 503]).unwrap_or(503);
                let refuse = apiproxy::Fault::Answer(status, Some(1));
                self.proxies[1].inject(refuse, |call| call.is_write() && !call.is_lease());
                self.for_a_while().await
            }
            Fault::AnswersLost => {
                self.proxies[1].inject_times(3, apiproxy::Fault::LoseAnswer, apiproxy::Call::is_write);
                self.for_a_while().await
            }
            Fault::AwsFails => {
                use aws::Fault::{
                    AccessDenied, ClockSkew, CloseConnection, EmptyToken, ExpiredToken, Hang, HugeBody,
                    MalformedBody, ServerError, Throttle,
                };
                let faults = [
                    AccessDenied,
                    ClockSkew,
                    CloseConnection,
                    EmptyToken,
                    ExpiredToken,
                    Hang,
                    HugeBody,
                    MalformedBody,
                    ServerError,
                    Throttle,
                ];
                let fault = self.random.choice(faults).unwrap_or(ServerError);
                self.aws.inject(fault, aws::Scope::all());
                self.for_a_while().await
            }
            Fault::AwsRefusesConnections => {
                self.relay.refuse();
                self.for_a_while().await
            }
            Fault::AwsSilent => {
                self.relay.silence();
                self.for_a_while().await
            }
            Fault::AliasMoved => self.move_alias().await,
            Fault::AliasAddedAndRemoved => self.add_and_remove_alias().await,
        }
    }

    /// Lets what was injected last for a while, and heals it.
    async fn for_a_while(&mut self) -> Result<()> {
        self.pause(4, 12).await;
        self.proxies.iter().for_each(|proxy| proxy.heal());
        self.aws.heal();
        self.relay.restore();
        Ok(())
    }

    async fn replace(&mut self, role: Role) -> Result<()> {
        self.fleet.add(role).await?;
        self.fleet.terminate(role, VICTIM).await
    }

    async fn kill(&mut self, role: Role) -> Result<()> {
        self.fleet.kill(role, VICTIM).await?;
        self.fleet.add(role).await
    }

    async fn suspend_leader(&mut self) -> Result<()> {
        let leader = self.fleet.leader().await?;
        let (suspended, other) = (leader, if leader == SPARED { VICTIM } else { SPARED });
        let controllers = self.fleet.replicas(Role::Controller);
        controllers[suspended].process().pause()?;
        let taken_over = eventually(Duration::from_secs(30), async || {
            let leads = controllers[other].metric("ecr_cname_leader").await?;
            ensure!(leads > 0.0, "nobody took over from a leader that was suspended");
            Ok(())
        })
        .await;
        controllers[suspended].process().resume()?;
        taken_over
    }

    async fn move_alias(&mut self) -> Result<()> {
        self.moved = !self.moved;
        let (name, _, registries) = ALIASES[1];
        let api: Api<RegistryAlias> = Api::all(self.control_plane.kube_client()?);
        let patch = json!({"spec": {"registry": registries[usize::from(self.moved)]}});
        api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    async fn add_and_remove_alias(&mut self) -> Result<()> {
        self.numbered += 1;
        let name = format!("added-{}", self.numbered);
        create_alias(self.control_plane, &name, &format!("{name}.example.io"), ALIASES[0].2[0]).await?;
        ready(self.control_plane, &name).await?;
        let api: Api<RegistryAlias> = Api::all(self.control_plane.kube_client()?);
        api.delete(&name, &DeleteParams::default()).await?;
        Ok(())
    }
}
