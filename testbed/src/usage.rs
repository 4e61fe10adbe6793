//! What a process takes of the machine, as Linux counts it: `proc_pid_stat(5)`, `proc_pid_status(5)`.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};

/// What a process has taken so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Time on a processor, in user and kernel mode.
    pub cpu: Duration,
    /// Resident memory now, in bytes.
    pub rss: u64,
    /// The most resident memory that it ever had, in bytes.
    pub peak_rss: u64,
}

impl Usage {
    /// Of the process with that id.
    ///
    /// # Errors
    /// There is no such process, or this is not Linux.
    pub fn of(pid: u32) -> Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
        };
        let (stat, status) = (read("stat")?, read("status")?);
        // The name in brackets may hold anything, so fields are counted from behind it.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 = [11, 12].iter().filter_map(|i| fields.get(*i)?.parse::<u64>().ok()).sum();
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let (rss, peak) = (kib("VmRSS:").context("no VmRSS")?, kib("VmHWM:").context("no VmHWM")?);
        // USER_HZ is 100 on every architecture that Linux calls it so.
        Ok(Self { cpu: Duration::from_millis(ticks * 10), rss: rss * 1024, peak_rss: peak * 1024 })
    }
}
