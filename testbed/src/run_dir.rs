//! A directory for the files of one run.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::{random, workspace};

/// A directory that lives as long as this value, and is swept away later if the process dies before.
///
/// Whoever holds the lock on its `lock` file owns it. The kernel releases that lock however a process
/// ends, so a directory that can be locked is a dead one.
pub(crate) struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Makes a new directory, and removes those of processes that are gone.
    pub(crate) fn create() -> Result<Self> {
        let runs = workspace::testbed_dir().join("run");
        fs::create_dir_all(&runs).with_context(|| format!("cannot create {}", runs.display()))?;

        // Between making a directory and locking it nobody else may sweep.
        let sweeping = File::create(runs.join(".lock"))?;
        sweeping.lock()?;
        sweep(&runs)?;

        let path = runs.join(format!("{}-{}", std::process::id(), random::id()?));
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let lock = File::create(path.join("lock"))?;
        lock.lock()?;
        Ok(Self { path, _lock: lock })
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn sweep(runs: &Path) -> Result<()> {
    for entry in fs::read_dir(runs)? {
        let path = entry?.path();
        if !path.is_dir() {
            continue;
        }
        let abandoned = match File::open(path.join("lock")) {
            Ok(lock) => lock.try_lock().is_ok(),
            Err(_) => true,
        };
        if abandoned {
            // Its owner may be removing it at this moment.
            let _ = fs::remove_dir_all(&path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeps_the_dead_and_keeps_the_living() -> Result<()> {
        let living = RunDir::create()?;
        let dead = workspace::testbed_dir().join("run").join(format!("dead-{}", random::id()?));
        fs::create_dir(&dead)?;
        File::create(dead.join("lock"))?;

        let _other = RunDir::create()?;

        assert!(living.path().exists());
        assert!(!dead.exists());
        Ok(())
    }

    #[test]
    fn goes_with_its_owner() -> Result<()> {
        let dir = RunDir::create()?;
        let path = dir.path().to_owned();
        drop(dir);
        assert!(!path.exists());
        Ok(())
    }
}
