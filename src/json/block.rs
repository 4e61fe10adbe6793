//! Quotes and brackets of JSON, found 64 bytes at a time.
//!
//! One bit stands for one byte. That an odd number of quotes before it puts a byte into a string, and how runs of
//! backslashes are told apart without a branch, is the method of simdjson: <https://arxiv.org/abs/1902.08318>, section 3.

use fearless_simd::{Level, Simd, SimdBase as _, SimdMask as _, dispatch, u8x16, u8x64};

/// Where of 64 bytes some are, the first byte in the lowest bit.
#[derive(Debug, Default, PartialEq, Eq)]
struct Bits {
    quotes: u64,
    backslashes: u64,
    /// `{` and `[`.
    opening: u64,
    /// `}` and `]`.
    closing: u64,
}

/// What one block must know of those before it.
#[derive(Default)]
struct Carry {
    /// 1 if a backslash before the block escapes its first byte.
    escaped: u64,
    /// All ones if the block begins within a string.
    in_string: u64,
}

/// The place of the quote that ends a string, in bytes that begin within it.
pub(super) fn end_of_string(bytes: &[u8]) -> Option<usize> {
    dispatch!(Level::new(), simd => find(simd, bytes, InString::default()))
}

/// The place of the bracket that ends an object or array, in bytes that begin within it. The two kinds of brackets are
/// not told apart: in JSON they nest, and text that is not JSON is only skipped.
pub(super) fn end_of_container(bytes: &[u8]) -> Option<usize> {
    dispatch!(Level::new(), simd => find(simd, bytes, InContainer::default()))
}

/// How many bytes come before the first quote, backslash or control character, or the end. What is read are short strings, so
/// this takes 16 bytes at a time, with what every processor of its kind has.
#[inline]
pub(super) fn end_of_plain_text(bytes: &[u8]) -> usize {
    dispatch!(Level::baseline(), simd => plain_text(simd, bytes))
}

#[inline(always)]
fn plain_text<S: Simd>(simd: S, bytes: &[u8]) -> usize {
    let (blocks, rest) = bytes.as_chunks::<16>();
    for (i, block) in blocks.iter().enumerate() {
        let bytes = u8x16::from_slice(simd, block);
        let stops = bytes.simd_eq(b'"') | bytes.simd_eq(b'\\') | bytes.simd_lt(b' ');
        let stops = stops.to_bitmask();
        if stops != 0 {
            return i * 16 + stops.trailing_zeros() as usize;
        }
    }
    blocks.len() * 16 + rest.iter().take_while(|byte| !matches!(byte, b'"' | b'\\' | ..b' ')).count()
}

/// What is looked for, 64 bytes after 64 bytes.
trait Search {
    /// The place in this block, if it is there.
    fn step(&mut self, bits: Bits) -> Option<usize>;
}

/// With the widest vectors that this processor has. The last block is filled up with zeros.
#[inline(always)]
fn find<S: Simd>(simd: S, bytes: &[u8], mut search: impl Search) -> Option<usize> {
    let (blocks, rest) = bytes.as_chunks::<64>();
    for (i, block) in blocks.iter().enumerate() {
        if let Some(found) = search.step(bits(simd, block)) {
            return Some(i * 64 + found);
        }
    }
    let mut last = [0; 64];
    last.get_mut(..rest.len())?.copy_from_slice(rest);
    search.step(bits(simd, &last)).map(|found| blocks.len() * 64 + found)
}

#[derive(Default)]
struct InString {
    carry: Carry,
}

impl Search for InString {
    #[inline(always)]
    fn step(&mut self, bits: Bits) -> Option<usize> {
        let quotes = bits.quotes & !self.carry.escaped_by(bits.backslashes);
        (quotes != 0).then(|| quotes.trailing_zeros() as usize)
    }
}

#[derive(Default)]
struct InContainer {
    carry: Carry,
    /// How many containers have begun in it and not ended.
    depth: u64,
}

impl Search for InContainer {
    #[inline(always)]
    fn step(&mut self, bits: Bits) -> Option<usize> {
        let quotes = bits.quotes & !self.carry.escaped_by(bits.backslashes);
        let in_string = parity(quotes) ^ self.carry.in_string;
        self.carry.in_string = if in_string >> 63 == 1 { u64::MAX } else { 0 };
        let (opening, mut closing) = (bits.opening & !in_string, bits.closing & !in_string);
        // Most blocks cannot end it, whatever their order.
        if u64::from(closing.count_ones()) <= self.depth {
            self.depth = self.depth + u64::from(opening.count_ones()) - u64::from(closing.count_ones());
            return None;
        }
        let mut closed = 0;
        while closing != 0 {
            let at = closing.trailing_zeros();
            let opened = u64::from((opening & ((1 << at) - 1)).count_ones());
            if self.depth + opened == closed {
                return Some(at as usize);
            }
            closed += 1;
            closing &= closing - 1;
        }
        self.depth = self.depth + u64::from(opening.count_ones()) - closed;
        None
    }
}

impl Carry {
    /// The bytes that a backslash before them escapes.
    #[inline(always)]
    fn escaped_by(&mut self, backslashes: u64) -> u64 {
        if backslashes == 0 {
            return std::mem::take(&mut self.escaped);
        }
        const EVEN: u64 = 0x5555_5555_5555_5555;
        let backslashes = backslashes & !self.escaped;
        let after_one = backslashes << 1 | self.escaped;
        // A run that begins at an odd place carries into the even place after it, if it has an odd length.
        let odd_starts = backslashes & !EVEN & !after_one;
        let (even_runs, overflow) = odd_starts.overflowing_add(backslashes);
        self.escaped = u64::from(overflow);
        (EVEN ^ (even_runs << 1)) & after_one
    }
}

/// For each bit, whether the number of bits up to it is odd.
#[inline(always)]
fn parity(mut bits: u64) -> u64 {
    for shift in [1, 2, 4, 8, 16, 32] {
        bits ^= bits << shift;
    }
    bits
}

#[inline(always)]
fn bits<S: Simd>(simd: S, block: &[u8; 64]) -> Bits {
    let bytes = u8x64::from_slice(simd, block);
    // This bit makes a brace of a bracket, and a brace or bracket of nothing else.
    let braces = bytes | 0x20;
    Bits {
        quotes: bytes.simd_eq(b'"').to_bitmask(),
        backslashes: bytes.simd_eq(b'\\').to_bitmask(),
        opening: braces.simd_eq(b'{').to_bitmask(),
        closing: braces.simd_eq(b'}').to_bitmask(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes among which those that matter are frequent.
    fn bytes(length: impl Into<proptest::collection::SizeRange>) -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![
            4 => proptest::sample::select(b"\"\\{}[]".as_slice()),
            1 => any::<u8>(),
        ];
        proptest::collection::vec(byte, length)
    }

    /// The same, one byte after the other.
    fn slow_end(bytes: &[u8], mut in_string: bool, mut depth: i64) -> Option<usize> {
        let mut escaped = false;
        for (i, byte) in bytes.iter().enumerate() {
            if std::mem::take(&mut escaped) {
                // An escaped quote is none; an escaped bracket is one nevertheless.
                if *byte == b'"' || *byte == b'\\' {
                    continue;
                }
            }
            match byte {
                b'\\' => escaped = true,
                b'"' if depth == 0 => return Some(i),
                b'"' => in_string = !in_string,
                b'{' | b'[' if !in_string && depth > 0 => depth += 1,
                b'}' | b']' if !in_string && depth > 0 => {
                    depth -= 1;
                    if depth == 0 {
                        return Some(i);
                    }
                }
                _ => {}
            }
        }
        None
    }

    proptest! {
        #[test]
        fn every_bit_is_where_its_byte_is(bytes in bytes(64)) {
            let block = bytes.as_slice().try_into().unwrap();
            let expected = Bits {
                quotes: naive(&bytes, b"\""),
                backslashes: naive(&bytes, b"\\"),
                opening: naive(&bytes, b"{["),
                closing: naive(&bytes, b"}]"),
            };
            for level in [Level::new(), Level::baseline()] {
                prop_assert_eq!(&dispatch!(level, simd => bits(simd, block)), &expected);
            }
        }

        #[test]
        fn plain_text_ends_where_it_does_byte_by_byte(bytes in "[a-z]{0,40}[\u{0}-\u{1f}\"\\\\ ~\u{7f}-\u{ff}]?[a-z\"]{0,20}") {
            let stops = |byte: &u8| matches!(byte, b'"' | b'\\' | ..b' ');
            let expected = bytes.bytes().position(|byte| stops(&byte)).unwrap_or(bytes.len());
            prop_assert_eq!(end_of_plain_text(bytes.as_bytes()), expected);
        }

        #[test]
        fn a_string_ends_where_it_does_byte_by_byte(bytes in bytes(0..300)) {
            prop_assert_eq!(end_of_string(&bytes), slow_end(&bytes, true, 0));
        }

        #[test]
        fn a_container_ends_where_it_does_byte_by_byte(bytes in bytes(0..300)) {
            prop_assert_eq!(end_of_container(&bytes), slow_end(&bytes, false, 1));
        }

        /// Without quotes in the way, so that the depth gets somewhere.
        #[test]
        fn depth_is_counted_over_many_blocks(bytes in "[\\[\\]{} ]{0,400}", deep in 0usize..300) {
            let bytes = ["[".repeat(deep).as_bytes(), bytes.as_bytes(), "]".repeat(deep).as_bytes()].concat();
            prop_assert_eq!(end_of_container(&bytes), slow_end(&bytes, false, 1));
        }
    }

    fn naive(bytes: &[u8], wanted: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |bits, byte| bits << 1 | u64::from(wanted.contains(byte)))
    }
}
