//! Images for containers, made without a container engine: layers in, an OCI image out.

mod layer;
mod operator;

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use aws_lc_rs::digest;
use serde_json::{Value, json};

use crate::binaries;
use layer::Layer;

/// The media type of manifests.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// An image for the platform of this machine.
#[derive(Debug, Clone)]
pub struct Image {
    manifest: Blob,
    blobs: Vec<Blob>,
}

/// Bytes that are named by their digest.
#[derive(Debug, Clone)]
pub struct Blob {
    /// `sha256:` and the digest.
    pub digest: String,
    /// What it is.
    pub media_type: &'static str,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Image {
    /// The image of every pod's sandbox.
    pub fn pause() -> Result<Self> {
        Self::of_program(&binaries::images()?.pause, "pause")
    }

    /// A small application: it serves; with the arguments `exit 0` it does its work and ends.
    pub fn app() -> Result<Self> {
        Self::of_program(&binaries::images()?.app, "app")
    }

    /// The image of the operator, laid out as the last stage of `Dockerfile` has it.
    pub fn operator(binary: &Path) -> Result<Self> {
        operator::image(binary)
    }

    fn of_program(program: &Path, name: &str) -> Result<Self> {
        let mut layer = Layer::default();
        layer.copy(program, name, 0o755)?;
        Self::new(vec![layer], &json!({ "Entrypoint": [format!("/{name}")] }))
    }

    fn new(layers: Vec<Layer>, config: &Value) -> Result<Self> {
        let (mut blobs, mut diff_ids) = (Vec::new(), Vec::new());
        for layer in layers {
            let (diff_id, bytes) = layer.finish()?;
            diff_ids.push(diff_id);
            blobs.push(Blob::new(LAYER, bytes));
        }
        let config = json!({
            "architecture": architecture()?,
            "os": "linux",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = Blob::new(CONFIG, config.to_string().into());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor(),
            "layers": blobs.iter().map(Blob::descriptor).collect::<Vec<_>>(),
        });
        blobs.push(config);
        Ok(Self { manifest: Blob::new(MANIFEST, manifest.to_string().into()), blobs })
    }

    /// The manifest.
    pub fn manifest(&self) -> &Blob {
        &self.manifest
    }

    /// The manifest, config or layer with this digest.
    pub fn blob(&self, digest: &str) -> Option<&Blob> {
        self.blobs.iter().chain([&self.manifest]).find(|blob| blob.digest == digest)
    }

    /// How many bytes a node downloads.
    pub fn size(&self) -> usize {
        self.blobs.iter().map(|blob| blob.bytes.len()).sum()
    }

    /// Writes the image as an OCI archive, from which it is imported under `name`.
    pub fn write_archive(&self, name: &str, path: &Path) -> Result<()> {
        let mut manifest = self.manifest.descriptor();
        manifest["annotations"] = json!({ "io.containerd.image.name": name });
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest] });

        let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        let mut archive = tar::Builder::new(file);
        layer::append(&mut archive, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        layer::append(&mut archive, "index.json", 0o644, index.to_string().as_bytes())?;
        for blob in self.blobs.iter().chain([&self.manifest]) {
            let name = format!("blobs/{}", blob.digest.replace(':', "/"));
            layer::append(&mut archive, &name, 0o644, &blob.bytes)?;
        }
        archive.finish().with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Blob {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Self {
        Self { digest: sha256(&bytes), media_type, bytes }
    }

    fn descriptor(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.bytes.len() })
    }
}

fn sha256(bytes: &[u8]) -> String {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// This machine's, as images name it.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => Err(anyhow!("no image is made for the architecture {other}")),
    }
}
