//! A machine within the machine: what a node does to its host happens in namespaces.
//!
//! Processes, mounts and network are its own, `/etc` and `/var` are overlays, `/run` is empty. So the host keeps
//! its iptables rules, its `/etc/hosts`, its port 443 and its containerd, and when the first process of the machine
//! ends the kernel takes everything else away, however it ended: containers, mounts, bridges and rules.
//!
//! Cgroups are the host's; the janitor removes them.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::janitor::{Janitor, Turn};
use super::requirements::Requirements;
use crate::controlplane::SERVICES;
use crate::process::Process;
use crate::run_dir::RunDir;

/// The link between host and machine. The range is for benchmarks of networks, so nobody's own network has it.
const HOST_ADDRESS: &str = "198.18.0.1/30";
const MACHINE_ADDRESS: &str = "198.18.0.2/30";
const LINK: &str = "ecr-cname0";

const START_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// A running machine; dropping it ends it and all that runs in it. There is one at a time on a host.
pub struct Machine {
    // Dropped in this order: another may start only when everything is gone.
    init: Process,
    _janitor: Janitor,
    cni_plugins: PathBuf,
    run: RunDir,
}

impl Machine {
    /// The address of the machine. The host reaches it, and so do the pods.
    pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

    /// Waits until no other machine runs on this host, and starts one. Blocks.
    ///
    /// # Errors
    /// The host is not fit for it, or the machine does not start.
    pub fn start() -> Result<Self> {
        let Requirements { cni_plugins } = Requirements::check()?;
        let turn = Turn::wait()?;
        favour_pods();
        let run = RunDir::create()?;

        let mut unshare = Command::new("unshare");
        unshare
            .args([
                "--mount",
                "--net",
                "--pid",
                "--fork",
                "--mount-proc",
                "--kill-child",
                "--",
                "/bin/sh",
                "-c",
            ])
            .arg(include_str!("init.sh"))
            .arg("init")
            .arg(run.path())
            .args([MACHINE_ADDRESS, SERVICES]);
        let init = Process::spawn("machine", &unshare, &run.path().join("machine.log"))?;
        let janitor = turn.employ(init.pid(), LINK, run.path())?;
        let machine = Self { init, _janitor: janitor, cni_plugins, run };
        machine.connect()?;
        machine.wait_ready()?;
        Ok(machine)
    }

    /// A program that is yet to be started in here, with the machine's own files, processes and network.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let pid = self.init.pid();
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={pid}"))
            .args(["--mount", "--net"])
            // The first process came to be after `unshare` had changed the namespace of its children.
            .arg(format!("--pid=/proc/{pid}/ns/pid_for_children"))
            .arg("--")
            .arg(program.as_ref());
        without_proxy(&mut command);
        command
    }

    /// A program that is yet to be started with the host's files and processes, and the machine's network.
    pub fn command_in_network(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.network().display())).arg("--").arg(program.as_ref());
        without_proxy(&mut command);
        command
    }

    /// Does something with the machine's network: a socket that is opened there stays there.
    #[cfg(target_os = "linux")]
    pub fn within_network<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        use std::os::fd::AsFd as _;

        use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

        let network = File::open(self.network()).context("the machine has no network")?;
        // Namespaces belong to threads: this one goes in, and never comes back.
        let inside = || {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
                .context("cannot enter the machine's network")?;
            work()
        };
        std::thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// There are machines on Linux only.
    #[cfg(not(target_os = "linux"))]
    pub fn within_network<T: Send>(&self, _work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        bail!("there is no machine")
    }

    /// Writes a file of the machine's own, in its `/etc` or `/var`.
    pub fn write(&self, path: &str, contents: &str) -> Result<()> {
        self.fill(r#"mkdir -p "$(dirname "$1")" && rm -f "$1" && cat >"$1""#, path, contents)
    }

    /// Adds to a file of the machine's own, in its `/etc` or `/var`.
    pub fn append(&self, path: &str, contents: &str) -> Result<()> {
        self.fill(r#"mkdir -p "$(dirname "$1")" && cat >>"$1""#, path, contents)
    }

    // From within: a link on the way leads to the machine's own files then, and not to the host's.
    fn fill(&self, script: &str, path: &str, contents: &str) -> Result<()> {
        let input = self.run.path().join("input");
        fs::write(&input, contents)?;
        let mut command = self.command("/bin/sh");
        command.args(["-c", script, "sh", path]).stdin(File::open(&input)?);
        self.run(&mut command).with_context(|| format!("cannot write {path} of the machine"))?;
        Ok(())
    }

    /// Runs a program in here to its end, and returns what it prints; its complaints are the error.
    pub fn run(&self, command: &mut Command) -> Result<String> {
        let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
        ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// A directory of the host that is also the machine's, for data and logs. It goes with the machine.
    pub fn dir(&self) -> &Path {
        self.run.path()
    }

    /// Where the CNI plugins are.
    pub(super) fn cni_plugins(&self) -> &Path {
        &self.cni_plugins
    }

    fn network(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.init.pid()).into()
    }

    /// Puts one end of a cable into the machine.
    fn connect(&self) -> Result<()> {
        let host = fs::read_link("/proc/self/ns/net")?;
        let deadline = Instant::now() + START_TIMEOUT;
        // `unshare` starts as a shell with the host's network.
        while fs::read_link(self.network()).map_or(true, |network| network == host) {
            self.still_starting(deadline)?;
        }
        // Should even the janitor have been killed.
        let _ = Command::new("ip").args(["link", "delete", LINK]).output();
        let pid = self.init.pid().to_string();
        for args in [
            &["link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", &pid][..],
            &["address", "add", HOST_ADDRESS, "dev", LINK],
            &["link", "set", LINK, "up"],
        ] {
            self.run(Command::new("ip").args(args))?;
        }
        Ok(())
    }

    fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        while self.init.log()?.trim_end() != "ready" {
            self.still_starting(deadline)?;
        }
        Ok(())
    }

    fn still_starting(&self, deadline: Instant) -> Result<()> {
        let ended = self.init.wait(Duration::from_millis(20));
        if ended.is_some() || Instant::now() > deadline {
            bail!("the machine for the node did not start:\n{}", self.init.log_tail(20));
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The first process ends by itself, and `unshare` after it, when all others are gone.
        let _ = self.init.terminate();
        self.init.wait(STOP_TIMEOUT);
    }
}

/// A proxy of the developer's leads nowhere near the machine.
fn without_proxy(command: &mut Command) {
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
}

/// Gives all pods together as much of the processors as they want. By default all of them have the share of one single
/// process of the host, so that a build beside them lets every time limit pass. Where that is not allowed, pods are slow.
fn favour_pods() {
    let (version1, version2) = (Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup"));
    let (hierarchy, file, most) = if version2.join("cgroup.controllers").is_file() {
        (version2, "cpu.weight", "10000")
    } else if version1.join("cpu.shares").is_file() {
        (version1, "cpu.shares", "262144")
    } else {
        return;
    };
    let pods = hierarchy.join("k8s.io");
    let _ = fs::create_dir_all(&pods).and_then(|()| fs::write(pods.join(file), most));
}
