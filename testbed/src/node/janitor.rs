//! Clears away what a machine leaves on its host.
//!
//! A destructor alone does not do, for the reasons that [`crate::process`] gives. So a shell waits beside the machine for
//! our end, and for the machine's.

use std::fs::{self, File, TryLockError};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context as _, Result};

/// Where every checkout looks, whatever its target directory.
const LOCK: &str = "/run/lock/ecr-cname-testbed-node.lock";

/// The right to have a machine on this host. There is one at a time.
pub(super) struct Turn {
    lock: File,
}

/// The shell that waits. Dropping it waits until everything is clean, if the machine is gone.
pub(super) struct Janitor {
    shell: Child,
    lifeline: Option<ChildStdin>,
}

impl Turn {
    /// Waits until there is no machine on this host.
    pub(super) fn wait() -> Result<Self> {
        if let Some(dir) = Path::new(LOCK).parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let lock = File::create(LOCK).with_context(|| format!("cannot create {LOCK}"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("testbed: another node runs on this machine; waiting for its end ({LOCK})");
                lock.lock()?;
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        Ok(Self { lock })
    }

    /// Passes the turn on to a janitor, who gives it back when everything of the machine is gone.
    pub(super) fn employ(self, machine: u32, link: &str, dir: &Path) -> Result<Janitor> {
        let mut shell = Command::new("/bin/sh")
            .args(["-c", include_str!("janitor.sh"), "janitor", &machine.to_string(), link])
            .arg(dir)
            // Ctrl-C is for us.
            .process_group(0)
            .stdin(Stdio::piped())
            // A lock belongs to everyone who holds the open file.
            .stdout(self.lock)
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start the janitor of the machine")?;
        let lifeline = shell.stdin.take();
        Ok(Janitor { shell, lifeline })
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        self.lifeline.take();
        let _ = self.shell.wait();
    }
}
