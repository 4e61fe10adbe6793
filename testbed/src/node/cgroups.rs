//! The cgroups of containers. They are the host's: namespaces do not hide them, and nobody removes them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::workspace;

/// Where containerd keeps what it knows of running containers, below the directory of a machine.
pub(super) const CONTAINERD_STATE: &str = "containerd-state";

/// Where cgroups are, and below it, in each hierarchy, those of the containers that kubelet runs.
const ROOT: &str = "/sys/fs/cgroup";
const PODS: &str = "k8s.io";

/// Gives all pods together as much of the processors as they want. By default all of them have the share of one single
/// process of the host, so that a build beside them lets every time limit pass.
pub(super) fn favour_pods() {
    let (version1, version2) = (Path::new(ROOT).join("cpu"), Path::new(ROOT));
    let (hierarchy, file, most) = if version2.join("cgroup.controllers").is_file() {
        (version2, "cpu.weight", "10000")
    } else if version1.join("cpu.shares").is_file() {
        (version1.as_path(), "cpu.shares", "262144")
    } else {
        return;
    };
    // Where that is not allowed, pods are slow.
    let pods = hierarchy.join(PODS);
    let _ = fs::create_dir_all(&pods).and_then(|()| fs::write(pods.join(file), most));
}

/// Removes what machines have left that were killed. There is one machine at a time, so every directory is of a dead one.
pub(super) fn remove_of_the_dead() {
    for run in fs::read_dir(workspace::testbed_dir().join("run")).into_iter().flatten().flatten() {
        remove(&run.path());
    }
}

/// Removes the cgroups of a machine's containers, which are empty by now. One that is not empty is not removed.
pub(super) fn remove(run: &Path) {
    let tasks = run.join(CONTAINERD_STATE).join("io.containerd.runtime.v2.task").join(PODS);
    let Ok(containers) = fs::read_dir(tasks) else { return };
    let containers: Vec<_> = containers.flatten().map(|entry| entry.file_name()).collect();
    for hierarchy in hierarchies() {
        for container in &containers {
            let _ = fs::remove_dir(hierarchy.join(PODS).join(container));
        }
        let _ = fs::remove_dir(hierarchy.join(PODS));
    }
}

/// Version 2 has one hierarchy, version 1 several.
fn hierarchies() -> impl Iterator<Item = PathBuf> {
    let several = fs::read_dir(ROOT).into_iter().flatten().flatten().map(|entry| entry.path());
    several.filter(|path| path.is_dir()).chain([ROOT.into()])
}
