//! Following CNAMEs, against a model of any zone: with loops, dead ends, long ways and registries of strangers.

use std::sync::LazyLock;

use ecr_cname::{
    alias::{Host, Target},
    dns::{Dns, Problem},
};
use proptest::prelude::*;
use testbed::dns::DnsStandIn;
use tokio::runtime::Runtime;

const OURS: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com";
const THEIRS: &str = "666666666666.dkr.ecr.us-east-1.amazonaws.com";
const LOOKALIKE: &str = "123456789012.dkr.ecr.us-east-1.amazonaws.com.evil.example";
const MAX_HOPS: usize = 8;

/// What a name is in the zone.
#[derive(Clone, Debug)]
enum Record {
    Missing,
    Address,
    Cname(String),
}

static SERVER: LazyLock<(DnsStandIn, Dns, Runtime)> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let server = DnsStandIn::start().unwrap();
    let dns = runtime.block_on(async { Dns::new(Some(server.address())).unwrap() });
    (server, dns, runtime)
});

fn name(case: u32, index: usize) -> String {
    format!("n{index}.c{case}.example.io")
}

fn record() -> impl Strategy<Value = Result<usize, Record>> {
    prop_oneof![
        8 => (0usize..12).prop_map(Ok),
        1 => Just(Err(Record::Missing)),
        1 => Just(Err(Record::Address)),
        1 => Just(Err(Record::Cname(OURS.to_owned()))),
        1 => Just(Err(Record::Cname(OURS.to_uppercase()))),
        1 => Just(Err(Record::Cname(THEIRS.to_owned()))),
        1 => Just(Err(Record::Cname(LOOKALIKE.to_owned()))),
    ]
}

/// Where the way ends, in a word.
fn model(zone: &[Record], case: u32) -> &'static str {
    let mut at = 0;
    for _ in 0..MAX_HOPS {
        let Record::Cname(target) = &zone[at] else {
            return if matches!(zone[at], Record::Missing) { "DNSLookupFailed" } else { "NotAnECRHost" };
        };
        match target.to_lowercase().as_str() {
            OURS => return "found",
            THEIRS => return "AccountNotAllowed",
            // The next question is about it, and it does not exist; unless the way was too long already.
            LOOKALIKE => at = zone.len() - 1,
            next => at = (0..zone.len()).find(|i| name(case, *i) == next).unwrap(),
        }
    }
    "CNAMELoop"
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.min(10_000), ..ProptestConfig::default() })]

    #[test]
    fn leads_where_the_zone_says_and_nowhere_else(records in proptest::collection::vec(record(), 12), case in any::<u32>()) {
        let mut zone: Vec<Record> = records
            .into_iter()
            .map(|record| record.map_or_else(|r| r, |to| Record::Cname(name(case, to))))
            .collect();
        // Stands for whatever is not in the zone.
        zone.push(Record::Missing);
        let (server, dns, runtime) = &*SERVER;
        for (index, record) in zone.iter().enumerate() {
            match record {
                Record::Missing => {}
                Record::Address => server.a(&name(case, index), [127, 0, 0, 1].into(), 0).unwrap(),
                Record::Cname(target) => server.cname(&name(case, index), target, 0).unwrap(),
            }
        }
        let host: Host = name(case, 0).parse().unwrap();
        let target = Target::Cname { allowed_accounts: vec!["123456789012".to_owned()] };
        let followed = runtime.block_on(dns.follow(&host, &target));
        let word = followed.as_ref().map_or_else(Problem::reason, |(registry, _)| {
            assert_eq!(registry.as_str(), OURS);
            "found"
        });
        prop_assert_eq!(word, model(&zone, case), "{:?}", followed);
        for index in 0..zone.len() {
            server.remove(&name(case, index)).unwrap();
        }
    }
}

/// Servers that answer with anything at all: a problem within the bound on a look-up, and never a registry.
#[test]
fn answers_that_are_none_are_a_problem() {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut question = [0; 512];
        let mut seed = 1u32;
        while let Ok((length, client)) = socket.recv_from(&mut question) {
            // The right id, so that it is looked at, and then now more and now less of an answer.
            let mut answer = question[..length].to_vec();
            for (at, byte) in answer.iter_mut().enumerate().skip(2) {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if at > (seed >> 28) as usize * 2 {
                    *byte = (seed >> 24) as u8;
                }
            }
            answer[2] |= 0x80;
            answer.truncate(2 + (seed >> 20) as usize % length);
            let _ = socket.send_to(&answer, client);
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let dns = Dns::new(Some(address)).unwrap();
        let target = Target::Cname { allowed_accounts: vec!["123456789012".to_owned()] };
        let hosts: Vec<Host> = (0..200).map(|case| name(case, 0).parse().unwrap()).collect();
        let all = futures::future::join_all(hosts.iter().map(|host| dns.follow(host, &target)));
        for answer in tokio::time::timeout(std::time::Duration::from_secs(20), all).await.unwrap() {
            assert!(answer.is_err(), "{answer:?}");
        }
    });
}
