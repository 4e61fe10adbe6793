//! A layer of an image: a compressed archive of files.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::sha256;

/// Files that belong to root.
pub(super) struct Layer {
    archive: tar::Builder<Vec<u8>>,
}

impl Default for Layer {
    fn default() -> Self {
        Self { archive: tar::Builder::new(Vec::new()) }
    }
}

impl Layer {
    /// A directory that belongs to `owner`.
    pub(super) fn directory(&mut self, path: &str, mode: u32, owner: u64) -> Result<()> {
        let mut header = header(tar::EntryType::Directory, mode, 0);
        header.set_uid(owner);
        header.set_gid(owner);
        self.archive.append_data(&mut header, path, &[][..]).with_context(|| format!("cannot add {path}"))
    }

    /// A file with these contents.
    pub(super) fn file(&mut self, path: &str, mode: u32, contents: &[u8]) -> Result<()> {
        append(&mut self.archive, path, mode, contents)
    }

    /// A file of this machine, under another name.
    pub(super) fn copy(&mut self, from: &Path, path: &str, mode: u32) -> Result<()> {
        self.file(path, mode, &fs::read(from).with_context(|| format!("cannot read {}", from.display()))?)
    }

    /// The digest of the archive, and the archive compressed.
    pub(super) fn finish(self) -> Result<(String, Vec<u8>)> {
        let archive = self.archive.into_inner()?;
        let mut compressed = GzEncoder::new(Vec::new(), Compression::default());
        compressed.write_all(&archive)?;
        Ok((sha256(&archive), compressed.finish()?))
    }
}

/// Adds a file of root's to an archive; the same contents always make the same archive.
pub(super) fn append<W: Write>(
    archive: &mut tar::Builder<W>,
    path: &str,
    mode: u32,
    contents: &[u8],
) -> Result<()> {
    let mut header = header(tar::EntryType::Regular, mode, contents.len());
    archive.append_data(&mut header, path, contents).with_context(|| format!("cannot add {path}"))
}

fn header(kind: tar::EntryType, mode: u32, size: usize) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header.set_mtime(0);
    header
}
