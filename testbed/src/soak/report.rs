//! What came of a soak.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use super::fault::{Fault, Loss};
use super::invariants::Sample;
use crate::load;

/// One fault that was made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trial {
    pub(super) fault: Fault,
    /// When it began, and when everything worked again.
    pub(super) from: Instant,
    pub(super) to: Instant,
    /// How long after its end everything worked again.
    pub(super) converged: Duration,
    /// Pods that were not stored meanwhile.
    pub(super) failed: usize,
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fault, converged, failed, .. } = self;
        write!(f, "{fault:<38} converged {:>5.1} s after it was over", converged.as_secs_f64())?;
        if *failed > 0 { write!(f, ", {failed} pods not stored") } else { Ok(()) }
    }
}

/// What came of it all.
pub(super) struct Report {
    pub(super) trials: Vec<Trial>,
    pub(super) load: load::Report,
    pub(super) violations: Vec<String>,
    pub(super) checks: usize,
    /// What each process took that was there all along: at first, at last, and the most.
    pub(super) lasting: Vec<(String, [Sample; 3])>,
    /// How many processes there were in all, and the most that any of them took.
    pub(super) all: (usize, Sample),
}

/// Judges what was stored and what was not.
pub(super) fn judge(trials: &[Trial], load: &load::Report, violations: &mut Vec<String>) {
    violations.extend(load.unrewritten.iter().map(|pod| format!("stored unrewritten: {pod}")));
    for failure in &load.failed {
        let during = trials
            .iter()
            .find(|t| t.loss() != Loss::None && failure.failed >= t.from && failure.sent <= t.to);
        let allowed = match during.map(Trial::loss) {
            Some(Loss::ApiServer) => true,
            Some(Loss::Connections) => {
                ["connection refused", "connection reset", "EOF", "broken pipe", "closed idle connection"]
                    .iter()
                    .any(|died| failure.error.contains(died))
            }
            Some(Loss::None) | None => false,
        };
        if !allowed {
            let during = trials.iter().find(|t| failure.failed >= t.from && failure.sent <= t.to);
            let during = during.map_or_else(|| "no fault".to_owned(), |trial| trial.fault.to_string());
            violations.push(format!("not stored, during {during}: {}", failure.error));
        }
    }
}

impl Trial {
    fn loss(&self) -> Loss {
        self.fault.loss()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut by_fault: BTreeMap<Fault, Vec<&Trial>> = BTreeMap::new();
        for trial in &self.trials {
            by_fault.entry(trial.fault).or_default().push(trial);
        }
        writeln!(
            f,
            "\n| fault | trials | pods not stored | converged: median | slowest |\n|---|--:|--:|--:|--:|"
        )?;
        for (fault, trials) in by_fault {
            let mut times: Vec<f64> = trials.iter().map(|t| t.converged.as_secs_f64()).collect();
            times.sort_by(f64::total_cmp);
            let failed: usize = trials.iter().map(|t| t.failed).sum();
            let median = times.get(times.len() / 2).copied().unwrap_or_default();
            let slowest = times.last().copied().unwrap_or_default();
            writeln!(f, "| {fault} | {} | {failed} | {median:.1} s | {slowest:.1} s |", trials.len())?;
        }
        writeln!(
            f,
            "\n| process | MiB: first quarter | last quarter | most | file descriptors: first | last | most |"
        )?;
        writeln!(f, "|---|--:|--:|--:|--:|--:|--:|")?;
        for (name, [first, last, most]) in &self.lasting {
            let (a, b, c) = (first.rss_mib, last.rss_mib, most.rss_mib);
            let (d, e, g) = (first.descriptors, last.descriptors, most.descriptors);
            writeln!(f, "| {name} | {a} | {b} | {c} | {d} | {e} | {g} |")?;
        }
        let (count, most) = self.all;
        writeln!(f, "| all {count} | | | {} | | | {} |", most.rss_mib, most.descriptors)?;
        let load::Report { stored, unrewritten, failed, slowest } = &self.load;
        writeln!(
            f,
            "\n{} faults; {stored} pods stored, {} of them unrewritten, {} not stored, the slowest after {slowest:.1?}; \
             {} looks at pull secrets",
            self.trials.len(),
            unrewritten.len(),
            failed.len(),
            self.checks,
        )?;
        writeln!(f, "{} violations", self.violations.len())?;
        for violation in &self.violations {
            writeln!(f, "  {violation}")?;
        }
        Ok(())
    }
}
