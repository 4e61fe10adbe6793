//! A Go module of the test bed, and the programs that are built from it.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use aws_lc_rs::digest;

use super::progress::Progress;
use crate::process::Process;
use crate::workspace;

/// A build on a slow machine takes some minutes; one that takes this long will not end.
const BUILD_TIMEOUT: Duration = Duration::from_secs(60 * 60);

/// How often a build that is waited for says that it is still alive.
const PROGRESS: Duration = Duration::from_secs(10);

/// A program that can be built.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program {
    pub(super) name: &'static str,
    pub(super) package: &'static str,
}

/// A Go module below `testbed/`.
#[derive(Debug)]
pub(super) struct GoModule {
    name: &'static str,
    dir: PathBuf,
    /// That of the product it is there for, such as `v1.36.3`.
    version: String,
    /// Changes with every change of the module's own files.
    hash: String,
    ldflags: String,
}

impl GoModule {
    /// Reads the module `testbed/NAME`; its version is that of the module `product` which it requires.
    pub(super) fn read(name: &'static str, product: Option<&str>) -> Result<Self> {
        let dir = workspace::root().join("testbed").join(name);
        let go_mod = read(&dir.join("go.mod"))?;
        let version = match product {
            Some(product) => required_version(&go_mod, product)?.to_owned(),
            None => String::new(),
        };
        let hash = hash(&dir)?;
        Ok(Self { name, dir, version, hash, ldflags: String::new() })
    }

    /// The version of the product.
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// What the linker is told besides.
    pub(super) fn ldflags(self, ldflags: String) -> Self {
        Self { ldflags, ..self }
    }

    /// Builds those programs that have not been built yet, and returns the directory of all of them.
    pub(super) fn build(&self, programs: &[Program]) -> Result<PathBuf> {
        let bin = workspace::testbed_dir().join("bin");
        let dir = bin.join(self.key());
        let missing = || programs.iter().filter(|program| !dir.join(program.name).is_file());
        if missing().next().is_none() {
            return Ok(dir);
        }

        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let _building = lock(&bin.join(".lock"))?;
        // Whoever held the lock before may have built them.
        if missing().next().is_some() {
            let names: Vec<&str> = missing().map(|program| program.name).collect();
            eprintln!("testbed: building {} from source, once: {}", self.title(), names.join(", "));
        }
        for program in missing() {
            self.go_build(program, &dir)?;
        }
        Ok(dir)
    }

    /// The name of the directory that holds the built programs.
    fn key(&self) -> String {
        [self.name, &self.version, &self.hash]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("-")
    }

    fn title(&self) -> String {
        format!("testbed/{} {}", self.name, self.version).trim_end().to_owned()
    }

    /// Builds one program, and moves it into place only when it is done.
    fn go_build(&self, program: &Program, dir: &Path) -> Result<()> {
        let go = find_in_path("go").with_context(|| {
            format!(
                "{} is built with Go, and there is no `go` in PATH: install Go 1.26 or later from https://go.dev/dl/",
                program.name
            )
        })?;
        let unfinished = dir.join(format!(".{}", program.name));
        let mut command = Command::new(go);
        command
            .args(["build", "-trimpath", "-ldflags"])
            // Symbols only cost space.
            .arg(format!("-s -w {}", self.ldflags))
            .arg("-o")
            .arg(&unfinished)
            .arg(program.package)
            .current_dir(&self.dir)
            .env("CGO_ENABLED", "0")
            .env("GOWORK", "off");

        let name = program.name;
        let log = dir.join(format!("{name}.log"));
        let build = Process::spawn(name, &command, &log)?;
        let progress = Progress::start(name);
        let status = loop {
            if let Some(status) = build.wait(PROGRESS) {
                break status;
            }
            if progress.elapsed() > BUILD_TIMEOUT {
                bail!("the build of {name} did not end within {BUILD_TIMEOUT:?}:\n{}", build.log_tail(20));
            }
            progress.tick();
        };
        ensure!(status.success(), "the build of {name} failed ({status}):\n{}", build.log_tail(20));
        progress.done();
        fs::remove_file(&log).with_context(|| format!("cannot remove {}", log.display()))?;
        let place = dir.join(name);
        fs::rename(&unfinished, &place).with_context(|| format!("cannot move {name} to {}", place.display()))
    }
}

/// Takes the lock that lets one process at a time build.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            eprintln!("testbed: waiting for another process that builds Go programs");
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    Ok(file)
}

/// A digest over the files of a module: what it requires, and what it has of its own.
fn hash(dir: &Path) -> Result<String> {
    let mut files = Vec::new();
    list(dir, &mut files)?;
    files.sort();
    let mut context = digest::Context::new(&digest::SHA256);
    for file in files {
        let name = file.strip_prefix(dir).unwrap_or(&file).to_string_lossy();
        context.update(format!("{name}\0{}\0", read(&file)?).as_bytes());
    }
    Ok(context.finish().as_ref().iter().take(6).map(|byte| format!("{byte:02x}")).collect())
}

fn list(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else if path.file_name().is_some_and(|name| name == "go.mod" || name == "go.sum")
            || path.extension().is_some_and(|extension| extension == "go")
        {
            files.push(path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn required_version<'a>(go_mod: &'a str, product: &str) -> Result<&'a str> {
    go_mod
        .lines()
        .find_map(|line| {
            let mut words = line.trim().trim_start_matches("require ").split_whitespace();
            (words.next() == Some(product)).then(|| words.next()).flatten()
        })
        .with_context(|| format!("go.mod does not say which version of {product} it requires"))
}

fn find_in_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version_in_a_block_and_on_a_line_of_its_own() -> Result<()> {
        let product = "k8s.io/kubernetes";
        let block = "require (\n\tk8s.io/kubelet v0.1.0\n\tk8s.io/kubernetes v1.36.3 // indirect\n)";
        assert_eq!(required_version(block, product)?, "v1.36.3");
        assert_eq!(required_version("require k8s.io/kubernetes v1.37.0", product)?, "v1.37.0");
        assert!(required_version("module example.io", product).is_err());
        Ok(())
    }

    #[test]
    fn the_directory_follows_the_module() -> Result<()> {
        let module = GoModule::read("controlplane", Some("k8s.io/kubernetes"))?;
        assert_eq!(module.hash.len(), 12);
        assert_eq!(module.key(), format!("controlplane-{}-{}", module.version, module.hash));
        assert_eq!(GoModule { version: String::new(), ..module }.key().matches('-').count(), 1);
        Ok(())
    }
}
