//! PTX text to tokens.

use crate::error::ParseError;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// A name, a dotted opcode, a directive, or a special register: `ld.global.v4.u32`, `.reg`, `%tid.x`.
    Word,
    /// An integer or floating-point literal.
    Number,
    /// A string literal, without its quotes.
    Text,
    /// One character of punctuation.
    Mark(u8),
    /// The comment on a line that starts with `.loc`: LLVM tells there where code was inlined.
    LocationComment,
    /// The end of the text.
    End,
}

/// A token and the line (from 1) it starts on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<'a> {
    pub kind: TokenKind,
    pub text: &'a str,
    pub line: u32,
}

fn is_word_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || matches!(byte, b'_' | b'$' | b'%' | b'.')
}

fn is_word_part(byte: u8) -> bool {
    is_word_start(byte) || byte.is_ascii_digit()
}

/// Splits `text` into tokens, comments dropped but those of `.loc`; the last one is [`TokenKind::End`].
pub(crate) fn tokenize(text: &str) -> Result<Vec<Token<'_>>, ParseError> {
    let bytes = text.as_bytes();
    let at = |index: usize| bytes.get(index).copied().unwrap_or(0);
    let mut tokens = Vec::with_capacity(text.len() / 4);
    let (mut index, mut line, mut location_line) = (0, 1u32, 0);
    while index < bytes.len() {
        let (start, start_line, byte) = (index, line, bytes[index]);
        let kind = match byte {
            b'\n' => {
                line += 1;
                index += 1;
                continue;
            }
            b' ' | b'\t' | b'\r' | 0x0b | 0x0c => {
                index += 1;
                continue;
            }
            b'/' if at(index + 1) == b'/' => {
                while index < bytes.len() && bytes[index] != b'\n' {
                    index += 1;
                }
                if location_line != line {
                    continue;
                }
                TokenKind::LocationComment
            }
            b'/' if at(index + 1) == b'*' => {
                index += 2;
                while index < bytes.len() && !(bytes[index] == b'*' && at(index + 1) == b'/') {
                    line += u32::from(bytes[index] == b'\n');
                    index += 1;
                }
                index = (index + 2).min(bytes.len());
                continue;
            }
            b'"' => {
                index += 1;
                while index < bytes.len() && bytes[index] != b'"' {
                    line += u32::from(bytes[index] == b'\n');
                    index += if bytes[index] == b'\\' { 2 } else { 1 };
                }
                if index >= bytes.len() {
                    return Err(ParseError::syntax(start_line, "the string is not closed"));
                }
                index += 1;
                TokenKind::Text
            }
            b'0'..=b'9' => {
                while index < bytes.len() && (bytes[index].is_ascii_alphanumeric() || bytes[index] == b'.') {
                    let exponent = matches!(bytes[index], b'e' | b'E')
                        && matches!(at(index + 1), b'-' | b'+')
                        && text[start..index].contains('.');
                    index += if exponent { 2 } else { 1 };
                }
                TokenKind::Number
            }
            _ if is_word_start(byte) => {
                while index < bytes.len() {
                    if byte == b'.' && bytes[index] == b'.' && index > start {
                        // Directives may follow each other at once: `.reg.b16`.
                        break;
                    } else if is_word_part(bytes[index]) {
                        index += 1;
                    } else if bytes[index] == b':' && at(index + 1) == b':' && at(index + 2).is_ascii_alphanumeric() {
                        index += 2;
                    } else {
                        break;
                    }
                }
                TokenKind::Word
            }
            b',' | b';' | b'{' | b'}' | b'[' | b']' | b'(' | b')' | b'<' | b'>' | b'=' | b'|' | b'!' | b'@' | b'+'
            | b'-' | b':' | b'*' => {
                index += 1;
                TokenKind::Mark(byte)
            }
            _ => {
                let character = text[start..].chars().next().unwrap_or('?');
                return Err(ParseError::syntax(line, format!("unexpected character {character:?}")));
            }
        };
        let text = match kind {
            TokenKind::Text => &text[start + 1..index - 1],
            _ => &text[start..index],
        };
        if text == ".loc" {
            location_line = line;
        }
        tokens.push(Token { kind, text, line: start_line });
    }
    tokens.push(Token { kind: TokenKind::End, text: "", line });
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_their_dots_and_double_colons() {
        let tokens = tokenize("$L1: ld.shared::cta.v2.u32 {%r1, _}, [%rd2+-8]; // x\n.loc 1").unwrap();
        let texts: Vec<_> = tokens.iter().map(|token| token.text).collect();
        assert_eq!(
            texts,
            [
                "$L1",
                ":",
                "ld.shared::cta.v2.u32",
                "{",
                "%r1",
                ",",
                "_",
                "}",
                ",",
                "[",
                "%rd2",
                "+",
                "-",
                "8",
                "]",
                ";",
                ".loc",
                "1",
                ""
            ]
        );
        assert_eq!(tokens[tokens.len() - 2].line, 2);
    }

    #[test]
    fn directives_are_words_of_their_own() {
        let tokens = tokenize(".reg.b16 a; .shared::cta.b8").unwrap();
        let texts: Vec<_> = tokens.iter().map(|token| token.text).collect();
        assert_eq!(texts, [".reg", ".b16", "a", ";", ".shared::cta", ".b8", ""]);
    }

    #[test]
    fn unclosed_string_is_an_error() {
        assert!(tokenize(".file 1 \"abc").is_err());
        assert!(tokenize("\"\\").is_err());
    }
}
