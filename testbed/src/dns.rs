//! A DNS server whose zone is changed while it runs.
//!
//! It answers over UDP and TCP on one port, follows a CNAME as far as its own zone goes, and knows nothing
//! beyond it: every other name does not exist.

mod services;

use std::collections::{HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::time::timeout;

pub(crate) use services::DOMAIN;

use crate::background::Background;
use crate::node::Machine;

/// What a name can be made to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsFault {
    /// The name does not exist, whatever the zone says.
    NxDomain,
    /// The server cannot tell.
    ServFail,
    /// The server does not want to tell.
    Refused,
    /// There is no answer at all.
    Drop,
    /// The answer over UDP says that it is too long, so that the client has to ask over TCP.
    Truncate,
}

/// One question that was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The name, in lower case and without the dot at its end.
    pub name: String,
    /// The type of the records asked for, such as `CNAME`.
    pub record_type: String,
    /// Whether it came over TCP.
    pub over_tcp: bool,
}

/// The zone, and what was asked so far.
#[derive(Default)]
pub struct DnsState {
    zone: HashMap<Name, Vec<Record>>,
    fault: Option<DnsFault>,
    faults: HashMap<Name, DnsFault>,
    questions: Vec<Question>,
}

/// The running server, on a thread of its own; dropping it ends it.
pub struct DnsStandIn {
    address: SocketAddr,
    state: Arc<watch::Sender<DnsState>>,
    _server: Background,
    _services: Option<Background>,
}

impl DnsStandIn {
    /// Starts a server with an empty zone on a free port of 127.0.0.1.
    pub fn start() -> Result<Self> {
        Self::serve(bind()?)
    }

    /// The same on port 53 of a machine, where its pods look for it, with the names of a cluster's Services.
    pub fn start_on(machine: &Machine, cluster: kube::Config) -> Result<Self> {
        let address = SocketAddr::from((Machine::ADDRESS, 53));
        let mut dns = Self::serve(machine.within_network(|| try_bind(address).context("cannot listen"))?)?;
        let follow = services::follow(cluster, Arc::clone(&dns.state));
        dns._services = Some(Background::spawn("dns-services", follow)?);
        Ok(dns)
    }

    fn serve((udp, tcp): (std::net::UdpSocket, std::net::TcpListener)) -> Result<Self> {
        let address = udp.local_addr()?;
        let state = Arc::new(watch::Sender::new(DnsState::default()));
        let server = Background::spawn("dns-stand-in", serve(udp, tcp, Arc::clone(&state)))?;
        Ok(Self { address, state, _server: server, _services: None })
    }

    /// Where it listens, over UDP and TCP.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes `name` an alias of `target`, and nothing else.
    pub fn cname(&self, name: &str, target: &str, ttl: u32) -> Result<()> {
        let (name, target) = (parse(name)?, parse(target)?);
        let record = Record::from_rdata(name.clone(), ttl, RData::CNAME(CNAME(target)));
        self.state.send_modify(|state| {
            state.zone.insert(name, vec![record]);
        });
        Ok(())
    }

    /// Adds an address to `name`.
    pub fn a(&self, name: &str, ip: Ipv4Addr, ttl: u32) -> Result<()> {
        let name = parse(name)?;
        let record = Record::from_rdata(name.clone(), ttl, RData::A(A(ip)));
        self.state.send_modify(|state| state.zone.entry(name).or_default().push(record));
        Ok(())
    }

    /// Forgets all records of `name`.
    pub fn remove(&self, name: &str) -> Result<()> {
        let name = parse(name)?;
        self.state.send_modify(|state| {
            state.zone.remove(&name);
        });
        Ok(())
    }

    /// Misbehaves for every name, until [`heal`](Self::heal).
    pub fn inject(&self, fault: DnsFault) {
        self.state.send_modify(|state| state.fault = Some(fault));
    }

    /// Misbehaves for one name, until [`heal`](Self::heal).
    pub fn inject_for(&self, name: &str, fault: DnsFault) -> Result<()> {
        let name = parse(name)?;
        self.state.send_modify(|state| {
            state.faults.insert(name, fault);
        });
        Ok(())
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.state.send_modify(|state| {
            state.fault = None;
            state.faults.clear();
        });
    }

    /// All questions so far, oldest first.
    pub fn questions(&self) -> Vec<Question> {
        self.state.borrow().questions.clone()
    }

    /// How often `name` was asked for, whatever the type.
    pub fn count(&self, name: &str) -> usize {
        self.state.borrow().count(name)
    }

    /// Waits until `condition` holds; an error tells the questions so far if it does not within `limit`.
    pub async fn wait_for(
        &self,
        mut condition: impl FnMut(&DnsState) -> bool,
        limit: Duration,
    ) -> Result<()> {
        let mut state = self.state.subscribe();
        let waited =
            timeout(limit, state.wait_for(|state| condition(state))).await.map(|result| result.is_ok());
        if waited != Ok(true) {
            bail!("DNS did not see what was waited for within {limit:?}; questions: {:#?}", self.questions());
        }
        Ok(())
    }
}

impl DnsState {
    /// All questions so far, oldest first.
    pub fn questions(&self) -> &[Question] {
        &self.questions
    }

    /// How often `name` was asked for, whatever the type.
    pub fn count(&self, name: &str) -> usize {
        let name = name.trim_end_matches('.').to_lowercase();
        self.questions.iter().filter(|question| question.name == name).count()
    }

    /// The answer to a query; `None` is silence.
    fn answer(&self, request: &Message, query: &Query, over_tcp: bool) -> Option<Message> {
        let fault = self.faults.get(&query.name().to_lowercase()).copied().or(self.fault);
        let mut answer = Message::response(request.metadata.id, OpCode::Query);
        answer.metadata.recursion_desired = request.metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        // The very name that was asked, since clients vary its case to recognise their answers.
        answer.add_query(query.clone());
        match fault {
            Some(DnsFault::Drop) => return None,
            Some(DnsFault::Truncate) if !over_tcp => answer.metadata.truncation = true,
            Some(DnsFault::NxDomain) => answer.metadata.response_code = ResponseCode::NXDomain,
            Some(DnsFault::ServFail) => answer.metadata.response_code = ResponseCode::ServFail,
            Some(DnsFault::Refused) => answer.metadata.response_code = ResponseCode::Refused,
            Some(DnsFault::Truncate) | None => self.look_up(query, &mut answer),
        }
        Some(answer)
    }

    fn look_up(&self, query: &Query, answer: &mut Message) {
        let mut name = query.name().clone();
        let mut seen = HashSet::new();
        while seen.insert(name.to_lowercase()) {
            let Some(records) = self.zone.get(&name.to_lowercase()) else {
                // An alias that leads out of the zone is an answer, an unknown name is none.
                if answer.answers.is_empty() {
                    answer.metadata.response_code = ResponseCode::NXDomain;
                }
                return;
            };
            let mut next = None;
            for record in records {
                if let RData::CNAME(CNAME(target)) = &record.data {
                    next = Some(target.clone());
                } else if record.record_type() != query.query_type() {
                    continue;
                }
                let mut record = record.clone();
                record.name = name.clone();
                answer.add_answer(record);
            }
            match next {
                Some(target) if query.query_type() != RecordType::CNAME => name = target,
                _ => return,
            }
        }
    }
}

/// A name as the zone keeps it.
fn parse(name: &str) -> Result<Name> {
    let mut parsed =
        Name::from_ascii(name).with_context(|| format!("{name:?} is no DNS name"))?.to_lowercase();
    parsed.set_fqdn(true);
    Ok(parsed)
}

/// One port for both transports: whichever TCP gets may be taken for UDP.
fn bind() -> Result<(std::net::UdpSocket, std::net::TcpListener)> {
    for _ in 0..100 {
        if let Ok(sockets) = try_bind((Ipv4Addr::LOCALHOST, 0).into()) {
            return Ok(sockets);
        }
    }
    bail!("no port is free for both UDP and TCP");
}

fn try_bind(address: SocketAddr) -> Result<(std::net::UdpSocket, std::net::TcpListener)> {
    let tcp = std::net::TcpListener::bind(address)?;
    let udp = std::net::UdpSocket::bind(tcp.local_addr()?)?;
    tcp.set_nonblocking(true)?;
    udp.set_nonblocking(true)?;
    Ok((udp, tcp))
}

async fn serve(udp: std::net::UdpSocket, tcp: std::net::TcpListener, state: Arc<watch::Sender<DnsState>>) {
    let (udp, tcp) = match (UdpSocket::from_std(udp), TcpListener::from_std(tcp)) {
        (Ok(udp), Ok(tcp)) => (udp, tcp),
        (Err(error), _) | (_, Err(error)) => {
            return eprintln!("testbed: the DNS stand-in cannot listen: {error}");
        }
    };
    tokio::join!(serve_udp(udp, &state), serve_tcp(tcp, &state));
}

async fn serve_udp(socket: UdpSocket, state: &watch::Sender<DnsState>) {
    let mut buffer = [0; 4096];
    loop {
        // A caller that is gone makes the next read fail on some systems; the one after it does not.
        let Ok((length, caller)) = socket.recv_from(&mut buffer).await else { continue };
        if let Some(answer) = answer(&buffer[..length], state, false) {
            let _ = socket.send_to(&answer, caller).await;
        }
    }
}

async fn serve_tcp(listener: TcpListener, state: &Arc<watch::Sender<DnsState>>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let state = Arc::clone(state);
        tokio::spawn(async move {
            // An error is a caller that went away.
            let _ = serve_stream(stream, &state).await;
        });
    }
}

async fn serve_stream(mut stream: TcpStream, state: &watch::Sender<DnsState>) -> Result<()> {
    loop {
        let mut request = vec![0; stream.read_u16().await?.into()];
        stream.read_exact(&mut request).await?;
        if let Some(answer) = answer(&request, state, true) {
            stream.write_u16(answer.len().try_into()?).await?;
            stream.write_all(&answer).await?;
        }
    }
}

/// Notes the question, and answers it. What is no question gets no answer.
fn answer(request: &[u8], state: &watch::Sender<DnsState>, over_tcp: bool) -> Option<Vec<u8>> {
    let request = Message::from_vec(request).ok()?;
    let query = request.queries.first().filter(|_| request.metadata.message_type == MessageType::Query)?;
    let question = Question {
        name: query.name().to_lowercase().to_ascii().trim_end_matches('.').into(),
        record_type: query.query_type().to_string(),
        over_tcp,
    };
    state.send_modify(|state| state.questions.push(question));
    state.borrow().answer(&request, query, over_tcp)?.to_vec().ok()
}
