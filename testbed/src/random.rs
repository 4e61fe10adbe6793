//! Names and secrets nobody can guess.

use anyhow::{Result, anyhow};
use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

fn bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_| anyhow!("the system has no random bytes"))?;
    Ok(bytes)
}

/// `prefix` and 48 characters that were drawn at random.
pub(crate) fn secret(prefix: &str) -> Result<String> {
    Ok(format!("{prefix}{}", URL_SAFE_NO_PAD.encode(bytes::<36>()?)))
}

/// Sixteen hexadecimal digits in upper case.
pub(crate) fn id() -> Result<String> {
    Ok(format!("{:016X}", u64::from_ne_bytes(bytes()?)))
}

/// A number from `range`.
pub(crate) fn number(range: std::ops::Range<u16>) -> Result<u16> {
    Ok(range.start + u16::from_ne_bytes(bytes()?) % (range.end - range.start))
}
