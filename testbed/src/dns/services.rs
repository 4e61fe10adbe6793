//! The names of Services, as the DNS of a cluster has them.

use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::Result;
use futures::StreamExt as _;
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record};
use k8s_openapi::api::core::v1::Service;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Config, ResourceExt as _};
use tokio::sync::watch;

use super::{DnsState, parse};

/// The domain of the cluster.
pub(crate) const DOMAIN: &str = "cluster.local";

/// Clients may keep an address for as long, in seconds; other tests make Services of the same name.
const TTL: u32 = 1;

/// Keeps `SERVICE.NAMESPACE.svc.cluster.local` in the zone for all Services of a cluster, for ever.
pub(super) async fn follow(cluster: Config, state: Arc<watch::Sender<DnsState>>) {
    let client = match kube::Client::try_from(cluster) {
        Ok(client) => client,
        Err(error) => return eprintln!("testbed: DNS cannot follow Services: {error}"),
    };
    let services = watcher(Api::<Service>::all(client), watcher::Config::default()).default_backoff();
    let mut services = std::pin::pin!(services);
    while let Some(event) = services.next().await {
        // The watch tries again by itself.
        let (service, exists) = match event {
            Ok(Event::Apply(service) | Event::InitApply(service)) => (service, true),
            Ok(Event::Delete(service)) => (service, false),
            Ok(Event::Init | Event::InitDone) | Err(_) => continue,
        };
        let Ok(name) = name(&service) else { continue };
        let address = address(&service).filter(|_| exists);
        state.send_modify(|state| match address {
            Some(address) => {
                let record = Record::from_rdata(name.clone(), TTL, RData::A(A(address)));
                state.zone.insert(name, vec![record]);
            }
            None => {
                state.zone.remove(&name);
            }
        });
    }
}

fn name(service: &Service) -> Result<Name> {
    let namespace = service.namespace().unwrap_or_default();
    parse(&format!("{}.{namespace}.svc.{DOMAIN}", service.name_any()))
}

fn address(service: &Service) -> Option<Ipv4Addr> {
    service.spec.as_ref()?.cluster_ip.as_ref()?.parse().ok()
}
