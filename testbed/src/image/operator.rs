//! The operator's image.
//!
//! The layout is that of the last stage of `Dockerfile`: a distroless base with glibc, CA certificates and a user who
//! is not root, and the binary. The base's files come from this machine, so the binary finds the libraries that it
//! was linked with.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Image, layer::Layer};

const CA_CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";
const NONROOT: u64 = 65532;

pub(super) fn image(binary: &Path) -> Result<Image> {
    let mut base = Layer::default();
    base.directory("tmp", 0o1777, 0)?;
    base.directory("home/nonroot", 0o700, NONROOT)?;
    base.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n")?;
    base.file("etc/group", 0o644, b"root:x:0:\nnobody:x:65534:\nnonroot:x:65532:\n")?;
    base.file("etc/nsswitch.conf", 0o644, b"hosts: files dns\n")?;
    let certificates = Path::new("/").join(CA_CERTIFICATES);
    if certificates.is_file() {
        base.copy(&certificates, CA_CERTIFICATES, 0o644)?;
    }
    for library in libraries(binary)? {
        base.copy(Path::new(&library), library.trim_start_matches('/'), 0o755)?;
    }

    let mut operator = Layer::default();
    operator.copy(binary, "usr/local/bin/ecr-cname", 0o755)?;

    Image::new(
        vec![base, operator],
        &json!({
            "User": "65532:65532",
            "WorkingDir": "/home/nonroot",
            "Env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                format!("SSL_CERT_FILE=/{CA_CERTIFICATES}"),
            ],
            "Entrypoint": ["/usr/local/bin/ecr-cname"],
            "ExposedPorts": { "8443/tcp": {}, "9090/tcp": {} },
        }),
    )
}

/// The shared libraries of a program, and the loader.
fn libraries(binary: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(binary).output().context("cannot run ldd")?;
    ensure!(
        output.status.success(),
        "ldd {}: {}",
        binary.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(parse_ldd(&String::from_utf8(output.stdout)?))
}

fn parse_ldd(output: &str) -> Vec<String> {
    output
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_names_libraries_and_the_loader_but_not_the_kernels() {
        let output = "\tlinux-vdso.so.1 (0x00007ffd3a5f6000)\n\
                      \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f2d1b000000)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f2d1b3f0000)\n";
        assert_eq!(parse_ldd(output), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
    }
}
