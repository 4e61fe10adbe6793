//! kube-apiserver, etcd and kubectl.
//!
//! They are Go programs, pinned like any other dependency in `testbed/controlplane/go.mod`, and built from
//! source the first time they are needed. `KUBEBUILDER_ASSETS` names a directory that has them already.

use std::fs::{self, File, TryLockError};
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aws_lc_rs::digest;

use crate::process::Process;
use crate::workspace;

/// Where the control plane's programs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    /// The API server.
    pub kube_apiserver: PathBuf,
    /// Its storage.
    pub etcd: PathBuf,
    /// The command line client.
    pub kubectl: PathBuf,
}

/// Name and Go package of each program, quickest build first.
const PROGRAMS: [(&str, &str); 3] = [
    ("etcd", "go.etcd.io/etcd/server/v3"),
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
];

/// A build on a slow machine takes some minutes; one that takes this long will not end.
const BUILD_TIMEOUT: Duration = Duration::from_secs(60 * 60);

/// How often a build that is waited for says that it is still alive.
const PROGRESS: Duration = Duration::from_secs(10);

/// Finds the programs, and builds them if need be. Blocks, for minutes the first time.
pub fn locate() -> Result<Binaries> {
    if let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS").filter(|assets| !assets.is_empty()) {
        let binaries = Binaries::in_dir(Path::new(&assets));
        for path in binaries.all() {
            ensure!(path.is_file(), "KUBEBUILDER_ASSETS is set, but there is no {}", path.display());
        }
        return Ok(binaries);
    }

    let source = Source::read(&workspace::root().join("testbed/controlplane"))?;
    let bin = workspace::testbed_dir().join("bin");
    let binaries = Binaries::in_dir(&bin.join(source.key()));
    if binaries.exist() {
        return Ok(binaries);
    }

    fs::create_dir_all(&bin).with_context(|| format!("cannot create {}", bin.display()))?;
    let _building = lock(&bin.join(".lock"))?;
    // Whoever held the lock before may have built them.
    if !binaries.exist() {
        source.build(&bin)?;
    }
    Ok(binaries)
}

impl Binaries {
    fn in_dir(dir: &Path) -> Self {
        Self {
            kube_apiserver: dir.join("kube-apiserver"),
            etcd: dir.join("etcd"),
            kubectl: dir.join("kubectl"),
        }
    }

    fn all(&self) -> [&Path; 3] {
        [&self.kube_apiserver, &self.etcd, &self.kubectl]
    }

    fn exist(&self) -> bool {
        self.all().into_iter().all(Path::is_file)
    }
}

/// The Go module that the programs are built from.
struct Source {
    dir: PathBuf,
    /// The version of Kubernetes, such as `v1.36.3`.
    version: String,
    /// Changes with every change of `go.mod` and `go.sum`.
    hash: String,
}

impl Source {
    fn read(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let (go_mod, go_sum) = (read("go.mod")?, read("go.sum")?);
        let digest = digest::digest(&digest::SHA256, format!("{go_mod}\0{go_sum}").as_bytes());
        Ok(Self {
            dir: dir.into(),
            version: kubernetes_version(&go_mod)?.into(),
            hash: digest.as_ref().iter().take(6).map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    /// The name of the directory that holds the built programs.
    fn key(&self) -> String {
        format!("{}-{}", self.version, self.hash)
    }

    /// Builds all programs, and moves them into place only when the last one is done.
    fn build(&self, bin: &Path) -> Result<()> {
        let staging = bin.join(format!(".{}", self.key()));
        if staging.exists() {
            fs::remove_dir_all(&staging)?;
        }
        fs::create_dir_all(&staging)?;

        eprintln!(
            "testbed: building Kubernetes {} from source; this takes some minutes, and is done once.",
            self.version
        );
        for (name, package) in PROGRAMS {
            self.go_build(name, package, &staging)?;
        }

        let place = bin.join(self.key());
        if place.exists() {
            fs::remove_dir_all(&place)?;
        }
        fs::rename(&staging, &place)
            .with_context(|| format!("cannot move the programs to {}", place.display()))
    }

    fn go_build(&self, name: &str, package: &str, out: &Path) -> Result<()> {
        let go = find_in_path("go").context(
            "the programs of the control plane are built with Go, and there is no `go` in PATH: install \
             Go 1.26 or later from https://go.dev/dl/, or set KUBEBUILDER_ASSETS to a directory that has \
             kube-apiserver, etcd and kubectl",
        )?;
        let mut command = Command::new(go);
        command
            .args(["build", "-trimpath", "-ldflags"])
            .arg(ldflags(&self.version)?)
            .arg("-o")
            .arg(out.join(name))
            .arg(package)
            .current_dir(&self.dir)
            .env("CGO_ENABLED", "0")
            .env("GOWORK", "off");

        let log = out.join(format!("{name}.log"));
        let build = Process::spawn(name, &command, &log)?;
        let mut progress = Progress::start(name);
        let status = loop {
            if let Some(status) = build.wait(PROGRESS) {
                break status;
            }
            if progress.started.elapsed() > BUILD_TIMEOUT {
                bail!("the build of {name} did not end within {BUILD_TIMEOUT:?}:\n{}", build.log_tail(20));
            }
            progress.tick();
        };
        ensure!(status.success(), "the build of {name} failed ({status}):\n{}", build.log_tail(20));
        progress.done();
        fs::remove_file(&log).with_context(|| format!("cannot remove {}", log.display()))
    }
}

/// Takes the lock that lets one process at a time build.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            eprintln!("testbed: waiting for another process that builds the control plane");
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    Ok(file)
}

fn kubernetes_version(go_mod: &str) -> Result<&str> {
    go_mod
        .lines()
        .find_map(|line| {
            let mut words = line.trim().trim_start_matches("require ").split_whitespace();
            (words.next() == Some("k8s.io/kubernetes")).then(|| words.next()).flatten()
        })
        .context("go.mod does not say which version of k8s.io/kubernetes it requires")
}

/// A program that does not know its version is refused by clients; symbols only cost space.
fn ldflags(version: &str) -> Result<String> {
    let mut numbers = version.trim_start_matches('v').split('.');
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        bail!("{version} is no version of Kubernetes");
    };
    let package = "k8s.io/component-base/version";
    Ok(format!(
        "-s -w -X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
    ))
}

fn find_in_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// One line on standard error that says how long a build has taken so far.
struct Progress<'a> {
    name: &'a str,
    started: Instant,
    terminal: bool,
}

impl<'a> Progress<'a> {
    fn start(name: &'a str) -> Self {
        let progress = Self { name, started: Instant::now(), terminal: std::io::stderr().is_terminal() };
        if progress.terminal {
            progress.write("building");
        }
        progress
    }

    fn tick(&mut self) {
        self.write("building");
    }

    fn done(self) {
        self.write("built");
        if self.terminal {
            eprintln!();
        }
    }

    fn write(&self, what: &str) {
        let mut stderr = std::io::stderr().lock();
        let (name, seconds) = (self.name, self.started.elapsed().as_secs());
        // Nobody to tell is no reason to fail.
        let _ = if self.terminal {
            write!(stderr, "\r\x1b[Ktestbed: {what} {name} ({seconds} s)").and_then(|()| stderr.flush())
        } else {
            writeln!(stderr, "testbed: {what} {name} ({seconds} s)")
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version_in_a_block_and_on_a_line_of_its_own() -> Result<()> {
        let block = "require (\n\tk8s.io/kubelet v0.1.0\n\tk8s.io/kubernetes v1.36.3 // indirect\n)";
        assert_eq!(kubernetes_version(block)?, "v1.36.3");
        assert_eq!(kubernetes_version("require k8s.io/kubernetes v1.37.0")?, "v1.37.0");
        assert!(kubernetes_version("module example.io").is_err());
        Ok(())
    }

    #[test]
    fn the_version_is_linked_in() -> Result<()> {
        let flags = ldflags("v1.36.3")?;
        assert!(flags.contains("gitVersion=v1.36.3 "));
        assert!(flags.contains("gitMajor=1 "));
        assert!(flags.ends_with("gitMinor=36"));
        Ok(())
    }

    #[test]
    fn the_directory_follows_the_module() -> Result<()> {
        let source = Source::read(&workspace::root().join("testbed/controlplane"))?;
        assert!(source.key().starts_with("v1."));
        assert_eq!(source.key(), format!("{}-{}", source.version, source.hash));
        assert_eq!(source.hash.len(), 12);
        Ok(())
    }
}
