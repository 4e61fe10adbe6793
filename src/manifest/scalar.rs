//! Scalars: the value of a text, typed as kubectl types it (YAML 1.1, as in Go's `yaml.v2`), and the text of a string.

use granit_parser::ScalarStyle;
use serde_json::{Number, Value};

/// The value of a scalar, as kubectl reads it, but for infinity and NaN, which JSON does not have: they stay strings.
pub(super) fn resolve(text: &str, style: ScalarStyle, tag: Option<&str>) -> Value {
    match tag {
        None if style != ScalarStyle::Plain => Value::String(text.to_owned()),
        None | Some("null" | "bool" | "int" | "float") => match text {
            "" | "~" | "null" | "Null" | "NULL" => Value::Null,
            "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "y" | "Y" | "on" | "On" | "ON" => {
                Value::Bool(true)
            }
            "false" | "False" | "FALSE" | "no" | "No" | "NO" | "n" | "N" | "off" | "Off" | "OFF" => {
                Value::Bool(false)
            }
            _ => number(text).unwrap_or_else(|| Value::String(text.to_owned())),
        },
        Some(_) => Value::String(text.to_owned()),
    }
}

/// The number that a plain scalar stands for.
fn number(text: &str) -> Option<Value> {
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        return None;
    }
    let text = text.replace('_', "");
    let (negative, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) => (text.starts_with('-'), digits),
        None => (false, text.as_str()),
    };
    let (radix, whole) = match digits.get(..2) {
        Some("0x" | "0X") => (16, digits.get(2..)?),
        Some("0o" | "0O") => (8, digits.get(2..)?),
        Some("0b" | "0B") => (2, digits.get(2..)?),
        Some(_) if digits.starts_with('0') => (8, digits.get(1..)?),
        _ => (10, digits),
    };
    if whole.starts_with(|c: char| c.is_ascii_hexdigit())
        && let Ok(whole) = i128::from_str_radix(whole, radix)
    {
        let whole = if negative { -whole } else { whole };
        if let Some(number) = Number::from_i128(whole) {
            return Some(Value::Number(number));
        }
    }
    let (mantissa, exponent) = digits.split_once(['e', 'E']).unwrap_or((digits, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let is_float = all_digits(whole) && all_digits(fraction) && all_digits(exponent);
    if !is_float || (whole.is_empty() && fraction.is_empty()) || exponent.is_empty() {
        return None;
    }
    text.parse().ok().and_then(Number::from_f64).map(Value::Number)
}

/// A scalar as it is written, in the given style where that can hold it; never in more than one line.
pub(super) fn literal(value: &str, style: ScalarStyle) -> String {
    let printable = value.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    match style {
        ScalarStyle::SingleQuoted if printable => format!("'{}'", value.replace('\'', "''")),
        ScalarStyle::Plain | ScalarStyle::Literal | ScalarStyle::Folded if is_plain(value) => {
            value.to_owned()
        }
        _ => {
            // What JSON and YAML read alike.
            let mut quoted = String::from('"');
            for c in value.chars() {
                match c {
                    '"' | '\\' => quoted.extend(['\\', c]),
                    ' '..='~' | '\u{10000}'.. => quoted.push(c),
                    _ => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
                }
            }
            quoted + "\""
        }
    }
}

/// Whether every YAML reader takes an unquoted text for just this string. There are more such texts, but all ordinary
/// image references and field names are among these.
fn is_plain(text: &str) -> bool {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/' | ':' | '@');
    let typed = ["null", "true", "false", "yes", "no", "on", "off", "y", "n"];
    text.chars().all(safe)
        && !text.ends_with(':')
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || (c.is_ascii_digit() && text.contains('/')))
        && !typed.contains(&text.to_ascii_lowercase().as_str())
}
