//! What this machine must have to be a node.

use std::fmt;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

/// Programs, and the packages of Debian and Ubuntu that have them.
const PROGRAMS: [(&str, &str); 8] = [
    ("containerd", "containerd"),
    ("ctr", "containerd"),
    ("runc", "runc"),
    ("iptables", "iptables"),
    ("ip", "iproute2"),
    ("mount", "mount"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
];

/// CNI plugins.
const PLUGINS: [&str; 3] = ["ptp", "host-local", "loopback"];

/// Where distributions put CNI plugins.
const PLUGIN_DIRS: [&str; 3] = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirements {
    /// The directory with the CNI plugins.
    pub(super) cni_plugins: PathBuf,
}

/// What there is not, for people to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    what: Vec<String>,
    packages: Vec<&'static str>,
}

impl Requirements {
    /// Looks for everything that a node needs.
    ///
    /// # Errors
    /// Something is missing; all of it is told at once.
    pub fn check() -> Result<Self, Missing> {
        let mut missing = Missing { what: Vec::new(), packages: Vec::new() };
        if !cfg!(target_os = "linux") {
            missing.what.push("Linux".into());
            return Err(missing);
        }
        if !geteuid().is_root() {
            missing.what.push(
                "root (namespaces, mounts and containers need it; try `sudo -E env \"PATH=$PATH\" …`)".into(),
            );
        }
        for (program, package) in PROGRAMS {
            if find_program(program).is_none() {
                missing.add(format!("the program {program}"), package);
            }
        }
        let plugins = PLUGIN_DIRS
            .map(PathBuf::from)
            .into_iter()
            .find(|dir| PLUGINS.iter().all(|name| dir.join(name).is_file()));
        let Some(cni_plugins) = plugins else {
            missing.add(
                format!("the CNI plugins {} in one of {}", PLUGINS.join(", "), PLUGIN_DIRS.join(", ")),
                "containernetworking-plugins",
            );
            return Err(missing);
        };
        if missing.what.is_empty() { Ok(Self { cni_plugins }) } else { Err(missing) }
    }
}

impl Missing {
    fn add(&mut self, what: String, package: &'static str) {
        self.what.push(what);
        if !self.packages.contains(&package) {
            self.packages.push(package);
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "this machine cannot be a node; it lacks {}", self.what.join("; "))?;
        if !self.packages.is_empty() {
            write!(f, ".\nOn Debian and Ubuntu: apt-get install {}", self.packages.join(" "))?;
        }
        Ok(())
    }
}

impl std::error::Error for Missing {}

/// Looks where root's programs are, too, which are not in everybody's PATH.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|path| Path::is_file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_the_command_that_installs_it() {
        let mut missing = Missing { what: Vec::new(), packages: Vec::new() };
        missing.add("the program containerd".into(), "containerd");
        missing.add("the program ctr".into(), "containerd");
        missing.add("the program runc".into(), "runc");
        assert_eq!(
            missing.to_string(),
            "this machine cannot be a node; it lacks the program containerd; the program ctr; the program runc.\n\
             On Debian and Ubuntu: apt-get install containerd runc"
        );
    }
}
