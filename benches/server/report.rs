//! What was measured, as a table for `docs/performance.md` and a plot for README.

use std::{fmt::Write as _, time::Duration};

use testbed::usage::Usage;

use crate::load::Measured;

/// One server and one fixture in one round.
pub struct Round {
    pub server: &'static str,
    pub fixture: &'static str,
    pub fixed: Measured,
    pub saturated: Measured,
}

/// Prints the tables.
pub fn print(
    fixtures: &[(&str, String)],
    rounds: &[Round],
    memory: &[(&str, u64, Usage)],
    to_ready: &[Duration],
    binary: u64,
) {
    println!("| | | baseline | ecr-cname | ratio |");
    println!("|---|---|---|---|---|");
    for (fixture, title) in fixtures {
        let row = |what: &str, digits: usize, of: Value| {
            let (bare, ours) =
                (median(rounds, "baseline", fixture, of), median(rounds, "ecr-cname", fixture, of));
            let ratio = ratio(rounds, fixture, of);
            println!("| {title} | {what} | {bare:.digits$} | {ours:.digits$} | {ratio:.2} |");
        };
        row("CPU per request at 2,000/s, µs", 1, |r| r.fixed.cpu_us);
        row("p50 at 2,000/s, µs", 0, |r| r.fixed.p50_us);
        row("p99 at 2,000/s, µs", 0, |r| r.fixed.p99_us);
        row("p99.9 at 2,000/s, µs", 0, |r| r.fixed.p999_us);
        row("requests/s at saturation", 0, |r| r.saturated.rate);
        row("CPU per request at saturation, µs", 1, |r| r.saturated.cpu_us);
    }
    println!();
    for (server, requests, usage) in memory {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        println!(
            "{server}: peak RSS {:.1} MiB after {requests} requests, {:.1} MiB at the end",
            mib(usage.peak_rss),
            mib(usage.rss)
        );
    }
    let mut to_ready = to_ready.to_vec();
    to_ready.sort();
    println!(
        "start to ready: median {:?}, least {:?}, most {:?}; binary {:.1} MiB",
        to_ready[to_ready.len() / 2],
        to_ready[0],
        to_ready[to_ready.len() - 1],
        binary as f64 / f64::from(1 << 20)
    );
}

/// What is looked at of a round.
type Value = fn(&Round) -> f64;

fn of<'a>(rounds: &'a [Round], server: &'a str, fixture: &'a str) -> impl Iterator<Item = &'a Round> {
    rounds.iter().filter(move |r| r.server == server && r.fixture == fixture)
}

fn median(rounds: &[Round], server: &str, fixture: &str, value: Value) -> f64 {
    middle(of(rounds, server, fixture).map(value).collect())
}

/// The median of the ratios within each round: what disturbs a round disturbs both servers.
fn ratio(rounds: &[Round], fixture: &str, value: Value) -> f64 {
    let pairs = of(rounds, "ecr-cname", fixture).zip(of(rounds, "baseline", fixture));
    middle(pairs.map(|(ours, bare)| value(ours) / value(bare)).collect())
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Two panels of bars: CPU per request at the fixed rate, and requests per second at saturation.
pub fn plot(rounds: &[Round]) -> String {
    const SIZES: [(&str, &str, &str); 3] = [
        ("create-2", "8 KB", "2 containers"),
        ("create-4", "15 KB", "4 containers"),
        ("create-26", "85 KB", "26 containers"),
    ];
    let mut svg = String::from(HEAD);
    let panels: [(&str, &str, f64, usize, Value); 2] = [
        ("CPU per request at 2,000 requests/s", "µs, less is better", 24.0, 1, |r| r.fixed.cpu_us),
        ("Requests per second on one core", "more is better", 424.0, 0, |r| r.saturated.rate),
    ];
    for (title, unit, left, digits, value) in panels {
        let all = SIZES.iter().flat_map(|(fixture, ..)| {
            ["baseline", "ecr-cname"].map(|server| median(rounds, server, fixture, value))
        });
        let most = all.fold(0.0, f64::max);
        // Writing to a String cannot fail.
        let _ = writeln!(svg, r#"<text class="lane" x="{left}" y="38">{title}</text>"#);
        let _ = writeln!(svg, r#"<text class="sub" x="{left}" y="57">{unit}</text>"#);
        for (i, (fixture, size, containers)) in SIZES.iter().enumerate() {
            let top = 76.0 + 62.0 * i as f64;
            let _ = writeln!(svg, r#"<text class="who" x="{left}" y="{:.0}">{size}</text>"#, top + 17.0);
            let _ =
                writeln!(svg, r#"<text class="sub" x="{left}" y="{:.0}">{containers}</text>"#, top + 36.0);
            for (j, (server, class)) in [("baseline", "bare"), ("ecr-cname", "us")].iter().enumerate() {
                let value = median(rounds, server, fixture, value);
                let (x, y, width) = (left + 96.0, top + 22.0 * j as f64, value / most * 190.0);
                let _ = writeln!(
                    svg,
                    r#"<rect class="{class}" x="{x}" y="{y}" width="{width:.1}" height="18" rx="3"/><text class="p" x="{:.1}" y="{:.1}">{}</text>"#,
                    x + width + 6.0,
                    y + 13.5,
                    grouped(value, digits)
                );
            }
        }
    }
    svg += "</svg>\n";
    svg
}

/// A number with a comma between thousands.
fn grouped(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let (whole, fraction) =
        text.split_once('.').map_or((text.as_str(), ""), |(whole, _)| (whole, &text[whole.len()..]));
    let mut out = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out + fraction
}

const HEAD: &str = r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 306" width="820" height="306" role="img" aria-labelledby="t d">
<title id="t">What the webhook costs beside a bare handler</title>
<desc id="d">Bars for three sizes of admission requests. Left: server CPU per request at 2,000 requests per second. Right: requests per second at saturation. Each compares a bare axum and rustls handler, which only reads the body, with ecr-cname. The figures are in docs/performance.md.</desc>
<style>
  .bg { fill: #ffffff; stroke: #d0d7de }
  text { font-family: -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .lane { font-size: 17px; font-weight: 600 }
  .sub { font-size: 12.5px; fill: #59636e }
  .who { font-size: 14.5px; font-weight: 600 }
  .p { font-size: 13px }
  .bare { fill: #8c959f }
  .us { fill: #bc6c00 }
  @media (prefers-color-scheme: dark) {
    .bg { fill: #0d1117; stroke: #3d444d }
    text { fill: #f0f6fc }
    .sub { fill: #9198a1 }
    .bare { fill: #7d8590 }
    .us { fill: #d29922 }
  }
</style>
<rect class="bg" x="0.5" y="0.5" width="819" height="305" rx="10"/>
<rect class="bare" x="24" y="272" width="14" height="14" rx="3"/><text class="p" x="44" y="284">bare axum + rustls handler that only reads the body</text>
<rect class="us" x="424" y="272" width="14" height="14" rx="3"/><text class="p" x="444" y="284">ecr-cname webhook: parsed, decided, patched</text>
"##;
