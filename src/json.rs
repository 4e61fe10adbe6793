//! A pull scanner over JSON: the fields that are asked for are read, all others are skipped 64 bytes at a time.
//!
//! An admission review is mostly what the decision does not need: `managedFields`, probes, environment, the old object.
//! What is *read* is checked in full: structure, types, escapes, UTF-8, fields that come twice. Of what is *skipped*, only
//! strings and brackets are followed, as far as it takes to find its end; what else is wrong in there goes unnoticed, and
//! cannot reach the answer. Nothing here recurses, however deep the input.

mod block;

use std::{borrow::Cow, fmt::Display};

/// Whether a text stands in a string of JSON as it is, without an escape.
#[must_use]
pub fn is_plain(text: &str) -> bool {
    block::end_of_plain_text(text.as_bytes()) == text.len()
}

/// Where and why a text is not the JSON that was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(Box<str>);

/// A place in a JSON text, from which values are read one after the other.
#[derive(Debug)]
pub struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
    /// What was skipped, for tests.
    #[cfg(test)]
    pub(crate) skipped: Vec<std::ops::Range<usize>>,
}

type Result<T> = std::result::Result<T, Error>;

impl<'a> Scanner<'a> {
    /// Begins a text.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            #[cfg(test)]
            skipped: Vec::new(),
        }
    }

    /// Reads an object. `field` is called for each of the `known` fields that is there, and must read its value. Other
    /// fields are skipped, and all that follow when the last known one has been read. At most 32 are known.
    ///
    /// # Errors
    /// What comes is no object, or one of the known fields comes twice before all of them were read.
    #[inline]
    pub fn object(
        &mut self,
        known: &[&'static str],
        mut field: impl FnMut(&mut Self, &'static str) -> Result<()>,
    ) -> Result<()> {
        self.fields(known, &mut field)
    }

    /// One loop for all objects: a request finds few of its instructions in the cache, so there should be few.
    #[inline(never)]
    fn fields(
        &mut self,
        known: &[&'static str],
        field: &mut dyn FnMut(&mut Self, &'static str) -> Result<()>,
    ) -> Result<()> {
        self.expect(b'{', "an object")?;
        if self.take(b'}') {
            return Ok(());
        }
        let mut unread = u32::MAX.unbounded_shr(32 - known.len() as u32);
        loop {
            self.expect(b'"', "the name of a field")?;
            #[cfg(test)]
            let start = self.at - 1;
            let name = self.name()?;
            self.expect(b':', "`:`")?;
            match known.iter().enumerate().find(|(_, known)| known.as_bytes() == name.as_ref()) {
                Some((i, known)) => {
                    if unread & 1 << i == 0 {
                        return Err(self.duplicate(&name));
                    }
                    field(self, known)?;
                    unread &= !(1 << i);
                    if unread == 0 {
                        return self.skip_rest();
                    }
                }
                None => {
                    self.skip()?;
                    #[cfg(test)]
                    self.skipped.push(start..self.at);
                }
            }
            if !self.take(b',') {
                return self.expect(b'}', "`,` or `}`");
            }
        }
    }

    /// Reads an array. `element` is called for each element, and must read it.
    ///
    /// # Errors
    /// What comes is no array.
    #[inline]
    pub fn array(&mut self, mut element: impl FnMut(&mut Self, usize) -> Result<()>) -> Result<()> {
        self.expect(b'[', "an array")?;
        if self.take(b']') {
            return Ok(());
        }
        for index in 0.. {
            element(self, index)?;
            if !self.take(b',') {
                break;
            }
        }
        self.expect(b']', "`,` or `]`")
    }

    /// Reads `null`, or by `read` what else there is.
    ///
    /// # Errors
    /// Those of `read`.
    #[inline]
    pub fn nullable<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<Option<T>> {
        if self.peek() == Some(b'n') { self.literal("null").map(|()| None) } else { read(self).map(Some) }
    }

    /// Reads a string, which borrows from the text unless it holds an escape.
    ///
    /// # Errors
    /// What comes is no string, or one that JSON does not allow.
    pub fn text(&mut self) -> Result<Cow<'a, str>> {
        self.expect(b'"', "a string")?;
        let (raw, has_escapes) = self.raw_string()?;
        if has_escapes {
            return self.unescape(raw).map(Cow::Owned);
        }
        std::str::from_utf8(raw).map(Cow::Borrowed).map_err(|_| self.error("a string that is not UTF-8"))
    }

    /// Ends the text.
    ///
    /// # Errors
    /// Something follows.
    pub fn end(&mut self) -> Result<()> {
        if self.peek().is_some() { Err(self.error("trailing characters")) } else { Ok(()) }
    }

    /// An error that says what is wrong with what was read last.
    #[cold]
    pub fn error(&self, what: impl Display) -> Error {
        let read = self.bytes.get(..self.at).unwrap_or_default();
        let line = read.iter().filter(|byte| **byte == b'\n').count() + 1;
        let column = read.iter().rev().take_while(|byte| **byte != b'\n').count();
        Error(format!("{what} at line {line} column {column}").into())
    }

    #[cold]
    fn expected(&mut self, what: &str) -> Error {
        if self.at >= self.bytes.len() {
            return self.error(format_args!("EOF where {what} was expected"));
        }
        self.at += 1;
        self.error(format_args!("expected {what}"))
    }

    #[cold]
    fn duplicate(&self, name: &[u8]) -> Error {
        self.error(format_args!("duplicate field `{}`", String::from_utf8_lossy(name)))
    }

    /// The next byte that is no white space.
    #[inline]
    fn peek(&mut self) -> Option<u8> {
        loop {
            let byte = *self.bytes.get(self.at)?;
            if !matches!(byte, b' ' | b'\n' | b'\t' | b'\r') {
                return Some(byte);
            }
            self.at += 1;
        }
    }

    #[inline]
    fn take(&mut self, byte: u8) -> bool {
        let there = self.peek() == Some(byte);
        self.at += usize::from(there);
        there
    }

    #[inline]
    fn expect(&mut self, byte: u8, what: &str) -> Result<()> {
        if self.take(byte) { Ok(()) } else { Err(self.expected(what)) }
    }

    fn literal(&mut self, literal: &str) -> Result<()> {
        let there = self.bytes.get(self.at..).is_some_and(|rest| rest.starts_with(literal.as_bytes()));
        self.at += if there { literal.len() } else { 0 };
        if there { Ok(()) } else { Err(self.expected(literal)) }
    }

    /// The name of a field, after its opening quote. Whether it is UTF-8 is of no interest unless it is a known one.
    #[inline]
    fn name(&mut self) -> Result<Cow<'a, [u8]>> {
        let (raw, has_escapes) = self.raw_string()?;
        if !has_escapes {
            return Ok(Cow::Borrowed(raw));
        }
        self.unescape(raw).map(|name| Cow::Owned(name.into_bytes()))
    }

    /// What a string holds as it is written, and whether that has escapes. Begins after the opening quote.
    #[inline]
    fn raw_string(&mut self) -> Result<(&'a [u8], bool)> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let mut has_escapes = false;
        let mut end = 0;
        loop {
            end += block::end_of_plain_text(rest.get(end..).unwrap_or_default());
            match rest.get(end) {
                Some(b'"') => break,
                Some(b'\\') => {
                    has_escapes = true;
                    end += 2;
                }
                Some(_) => {
                    self.at += end;
                    return Err(self.error("a control character in a string"));
                }
                None => {
                    self.at = self.bytes.len();
                    return Err(self.expected("the end of a string"));
                }
            }
        }
        self.at += end + 1;
        Ok((rest.get(..end).unwrap_or_default(), has_escapes))
    }

    /// Decodes a string with escapes, which is rare.
    #[cold]
    fn unescape(&self, raw: &[u8]) -> Result<String> {
        let quoted = [b"\"", raw, b"\""].concat();
        serde_json::from_slice(&quoted).map_err(|_| self.error("an invalid string"))
    }

    /// Skips what remains of an object after the value of a field.
    #[inline]
    fn skip_rest(&mut self) -> Result<()> {
        if self.take(b'}') {
            return Ok(());
        }
        self.expect(b',', "`,` or `}`")?;
        #[cfg(test)]
        let start = self.at;
        self.skip_to(block::end_of_container, "the end of an object")?;
        #[cfg(test)]
        self.skipped.push(start..self.at - 1);
        Ok(())
    }

    /// Skips a value.
    #[inline]
    fn skip(&mut self) -> Result<()> {
        let Some(first) = self.peek() else { return Err(self.expected("a value")) };
        match first {
            b'"' => {
                self.at += 1;
                self.skip_to(block::end_of_string, "the end of a string")?;
            }
            b'{' | b'[' => {
                self.at += 1;
                self.skip_to(block::end_of_container, "the end of an object or array")?;
            }
            b't' => self.literal("true")?,
            b'f' => self.literal("false")?,
            b'n' => self.literal("null")?,
            b'-' | b'0'..=b'9' => {
                let rest = self.bytes.get(self.at..).unwrap_or_default();
                let number = |byte: &&u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
                self.at += rest.iter().take_while(number).count();
            }
            _ => return Err(self.expected("a value")),
        }
        Ok(())
    }

    #[inline]
    fn skip_to(&mut self, end: fn(&[u8]) -> Option<usize>, what: &str) -> Result<()> {
        match self.bytes.get(self.at..).and_then(end) {
            Some(end) => {
                self.at += end + 1;
                Ok(())
            }
            None => {
                self.at = self.bytes.len();
                Err(self.expected(what))
            }
        }
    }
}
