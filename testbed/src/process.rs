//! A child process that cannot outlive us.
//!
//! A destructor alone does not do: values in a `static` are never dropped, and SIGKILL asks nobody. So
//! every child has a watchdog beside it, a shell that reads from a pipe whose other end is ours alone.
//! However we end, the kernel closes that end, the read returns, and the watchdog kills the child and all
//! that the child has started.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

/// Waits for the go-ahead, then becomes the program; without one (we died) it just ends.
const STARTER: &str = r#"read -r _ && exec "$@" </dev/null"#;

/// A line says that the child is gone; the end of input, that we are.
const WATCHDOG: &str = r#"read -r _ && exit; kill -s KILL -- "-$1""#;

/// How long a dropped process may take to be gone; nothing resists SIGKILL for long.
const DROP_TIMEOUT: Duration = Duration::from_secs(10);

/// A running program with a process group of its own and its output in a file.
///
/// Signals go to the whole group. Dropping kills it.
pub struct Process {
    name: String,
    pid: Pid,
    log: PathBuf,
    end: Arc<End>,
}

/// How the process ended, once it has.
#[derive(Default)]
struct End {
    status: Mutex<Option<ExitStatus>>,
    ended: Condvar,
}

impl Process {
    /// Starts `command`, appending what it prints to the file `log`.
    ///
    /// Of `command` the program, the arguments, the changes to single environment variables and the
    /// working directory count; standard input is empty.
    pub fn spawn(name: &str, command: &Command, log: &Path) -> Result<Self> {
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open {} for the output of {name}", log.display()))?;

        let mut starter = Command::new("/bin/sh");
        starter.args(["-c", STARTER, "sh"]).arg(command.get_program()).args(command.get_args());
        for (variable, value) in command.get_envs() {
            match value {
                Some(value) => starter.env(variable, value),
                None => starter.env_remove(variable),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            starter.current_dir(dir);
        }
        let mut child = starter
            .process_group(0)
            .stdin(Stdio::piped())
            .stderr(output.try_clone()?)
            .stdout(output)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let pid = Pid::from_child(&child);

        let mut watchdog = Command::new("/bin/sh")
            .args(["-c", WATCHDOG, "sh"])
            .arg(child.id().to_string())
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start the watchdog of {name}"))?;
        let lifeline = watchdog.stdin.take().context("the watchdog has no standard input")?;

        // Only now may the program run: there is no moment at which it runs unwatched.
        let mut go = child.stdin.take().context("the starter has no standard input")?;
        go.write_all(b"go\n").with_context(|| format!("cannot start {name}"))?;

        let end = Arc::new(End::default());
        std::thread::Builder::new().name(format!("wait-{name}")).spawn({
            let end = Arc::clone(&end);
            move || attend(child, pid, watchdog, lifeline, &end)
        })?;
        Ok(Self { name: name.into(), pid, log: log.into(), end })
    }

    /// What the process was called when it was started.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The id of the program itself, not of a shell around it.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends SIGKILL.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL)
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Sends SIGSTOP, and returns when it has worked: the process keeps its connections, and does nothing
    /// any more.
    pub fn pause(&self) -> Result<()> {
        self.signal_and(Signal::STOP, || {
            wait_unreaped(self.pid, WaitIdOptions::STOPPED | WaitIdOptions::EXITED);
        })
    }

    /// Sends SIGCONT, which undoes [`pause`](Self::pause).
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Whether the process has not ended yet.
    pub fn is_running(&self) -> bool {
        self.end.lock().is_none()
    }

    /// Waits until the process has ended; `None` if it still runs after `timeout`.
    pub fn wait(&self, timeout: Duration) -> Option<ExitStatus> {
        let status = self.end.lock();
        let (status, _) = self
            .end
            .ended
            .wait_timeout_while(status, timeout, |status| status.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        *status
    }

    /// Everything that was printed so far, also by earlier processes with the same log file.
    pub fn log(&self) -> Result<String> {
        let bytes = fs::read(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The last `lines` lines of the log, for error messages.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log().unwrap_or_else(|error| format!("{error:#}"));
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.signal_and(signal, || {})
    }

    fn signal_and(&self, signal: Signal, then: impl FnOnce()) -> Result<()> {
        // Under this lock nobody reaps, so the id cannot have passed to a stranger.
        let status = self.end.lock();
        if status.is_none() {
            kill_process_group(self.pid, signal).with_context(|| format!("cannot signal {}", self.name))?;
            then();
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
        self.wait(DROP_TIMEOUT);
    }
}

impl End {
    fn lock(&self) -> MutexGuard<'_, Option<ExitStatus>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the child to end, and calls off the watchdog then.
fn attend(mut child: Child, pid: Pid, mut watchdog: Child, mut lifeline: ChildStdin, end: &End) {
    // First wait without reaping, so that the id stays taken until the lock is held.
    wait_unreaped(pid, WaitIdOptions::EXITED);
    let mut status = end.lock();
    *status = child.wait().ok();
    let _ = lifeline.write_all(b"ended\n");
    drop(status);
    end.ended.notify_all();
    let _ = watchdog.wait();
}

/// Waits for a change of a child, and leaves it there to be seen by the next one who waits.
fn wait_unreaped(pid: Pid, change: WaitIdOptions) {
    while let Err(rustix::io::Errno::INTR) = waitid(WaitId::Pid(pid), change | WaitIdOptions::NOWAIT) {}
}
