//! The DNS stand-in, asked by the resolver that production uses.

#![allow(clippy::expect_used, clippy::panic)] // a test fails by panicking

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{RData, RecordType};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use testbed::dns::{DnsFault, DnsStandIn};

fn resolver(dns: &DnsStandIn) -> Result<TokioResolver> {
    let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
    for connection in &mut connections {
        connection.port = dns.address().port();
    }
    let server = NameServerConfig::new(dns.address().ip(), true, connections);
    let config = ResolverConfig::from_name_servers(vec![server]);
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    let options = builder.options_mut();
    options.timeout = Duration::from_millis(300);
    options.attempts = 0;
    options.cache_size = 0;
    Ok(builder.build()?)
}

fn code(error: &NetError) -> Option<ResponseCode> {
    match error {
        NetError::Dns(hickory_resolver::net::DnsError::NoRecordsFound(none)) => Some(none.response_code),
        NetError::Dns(hickory_resolver::net::DnsError::ResponseCode(code)) => Some(*code),
        _ => None,
    }
}

const ALIAS: &str = "docker-ecr.internal.example.io.";
const TARGET: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";

#[tokio::test]
async fn an_alias_leads_to_its_target() -> Result<()> {
    let dns = DnsStandIn::start()?;
    dns.cname(ALIAS, TARGET, 30)?;
    let resolver = resolver(&dns)?;

    let answer = resolver.lookup(ALIAS, RecordType::CNAME).await?;
    let record = answer.answers().first().context("no answer")?;
    assert_eq!(record.ttl, 30);
    let RData::CNAME(target) = &record.data else { panic!("not a CNAME: {record}") };
    assert_eq!(target.to_string(), format!("{TARGET}."));

    dns.a(TARGET, Ipv4Addr::new(192, 0, 2, 1), 5)?;
    let addresses: Vec<_> = resolver.lookup_ip(ALIAS).await?.iter().collect();
    assert_eq!(addresses, [Ipv4Addr::new(192, 0, 2, 1)]);

    dns.cname(ALIAS, "other.example.io", 5)?;
    let answer = resolver.lookup(ALIAS, RecordType::CNAME).await?;
    assert!(answer.answers().iter().any(|record| record.data.to_string() == "other.example.io."));
    dns.wait_for(|state| state.count("Docker-ECR.internal.example.io") >= 3, Duration::from_secs(5)).await
}

#[tokio::test]
async fn what_is_not_there_does_not_exist() -> Result<()> {
    let dns = DnsStandIn::start()?;
    dns.a("host.example.io", Ipv4Addr::LOCALHOST, 5)?;
    let resolver = resolver(&dns)?;

    let error = resolver.lookup("nothing.example.io.", RecordType::CNAME).await.expect_err("no such name");
    assert_eq!(code(&error), Some(ResponseCode::NXDomain));
    let error = resolver.lookup("host.example.io.", RecordType::CNAME).await.expect_err("no such record");
    assert_eq!(code(&error), Some(ResponseCode::NoError));
    dns.remove("host.example.io")?;
    let error = resolver.lookup("host.example.io.", RecordType::A).await.expect_err("no such name any more");
    assert_eq!(code(&error), Some(ResponseCode::NXDomain));
    Ok(())
}

#[tokio::test]
async fn faults_come_and_go() -> Result<()> {
    let dns = DnsStandIn::start()?;
    dns.cname(ALIAS, TARGET, 30)?;
    let resolver = resolver(&dns)?;
    let look_up = || resolver.lookup(ALIAS, RecordType::CNAME);

    dns.inject(DnsFault::ServFail);
    assert_eq!(code(&look_up().await.expect_err("a failure")), Some(ResponseCode::ServFail));
    dns.inject(DnsFault::Drop);
    assert!(matches!(look_up().await.expect_err("silence"), NetError::Timeout));
    dns.heal();
    look_up().await?;

    dns.inject_for(ALIAS, DnsFault::NxDomain)?;
    assert_eq!(code(&look_up().await.expect_err("no such name")), Some(ResponseCode::NXDomain));

    dns.heal();
    dns.inject_for(ALIAS, DnsFault::Truncate)?;
    look_up().await?;
    assert!(dns.questions().iter().any(|question| question.over_tcp && question.record_type == "CNAME"));
    Ok(())
}
