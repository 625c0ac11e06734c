//! Rust source as tokens: without comments, with line numbers.

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    pub(crate) line: usize,
    pub(crate) kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    /// A name or a keyword.
    Word(String),
    /// One character, or `::`.
    Sign(&'static str),
    /// A string, a character, a number or a lifetime: nothing in it counts.
    Opaque,
}

impl Token {
    pub(crate) fn word(&self) -> Option<&str> {
        match &self.kind {
            Kind::Word(word) => Some(word),
            _ => None,
        }
    }

    pub(crate) fn is(&self, text: &str) -> bool {
        match &self.kind {
            Kind::Word(word) => word == text,
            Kind::Sign(sign) => *sign == text,
            Kind::Opaque => false,
        }
    }

    /// Whether brackets go one deeper (1) or end (-1) here.
    pub(crate) fn depth(&self) -> i32 {
        match self.kind {
            Kind::Sign("{" | "(" | "[") => 1,
            Kind::Sign("}" | ")" | "]") => -1,
            _ => 0,
        }
    }
}

/// Signs that the rules ask for. All others are `"?"`.
const SIGNS: [&str; 18] =
    ["::", "{", "}", "(", ")", "[", "]", "<", ">", ";", ",", "#", "*", "=", "!", "&", "$", ":"];

pub(crate) fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let (mut rest, mut line) = (text, 1);
    while !rest.is_empty() {
        let (used, kind) = next(rest);
        tokens.extend(kind.map(|kind| Token { line, kind }));
        line += rest[..used].matches('\n').count();
        rest = &rest[used..];
    }
    tokens
}

/// The length of what comes next, and what it is; `None` for a space or a comment.
fn next(rest: &str) -> (usize, Option<Kind>) {
    let first = rest.chars().next().unwrap_or(' ');
    if first.is_whitespace() {
        return (first.len_utf8(), None);
    }
    if rest.starts_with("//") {
        return (rest.find('\n').unwrap_or(rest.len()), None);
    }
    if rest.starts_with("/*") {
        return (block_comment(rest), None);
    }
    if let Some(used) = string(rest).or_else(|| quoted(rest)) {
        return (used, Some(Kind::Opaque));
    }
    if first.is_ascii_digit() {
        return (number(rest), Some(Kind::Opaque));
    }
    if is_part(first) {
        let raw = if rest.starts_with("r#") { 2 } else { 0 };
        let used = raw + rest[raw..].find(|c| !is_part(c)).unwrap_or(rest.len() - raw);
        return (used, Some(Kind::Word(rest[raw..used].to_string())));
    }
    let sign = SIGNS.into_iter().find(|sign| rest.starts_with(sign));
    (sign.map_or(first.len_utf8(), str::len), Some(Kind::Sign(sign.unwrap_or("?"))))
}

fn is_part(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Comments in blocks may stand in one another.
fn block_comment(rest: &str) -> usize {
    let (mut at, mut depth) = (2, 1);
    while depth > 0 && at < rest.len() {
        match &rest.as_bytes()[at..] {
            [b'/', b'*', ..] => (at, depth) = (at + 2, depth + 1),
            [b'*', b'/', ..] => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
    }
    at
}

/// The length of a string, raw and of bytes, too.
fn string(rest: &str) -> Option<usize> {
    let prefix = ["br", "cr", "r", "b", "c", ""].into_iter().find(|prefix| {
        let after = rest.strip_prefix(prefix).map(|after| after.trim_start_matches('#'));
        after.is_some_and(|after| after.starts_with('"'))
    })?;
    let raw = prefix.ends_with('r');
    let hashes = rest[prefix.len()..].len() - rest[prefix.len()..].trim_start_matches('#').len();
    if hashes > 0 && !raw {
        return None;
    }
    let begin = prefix.len() + hashes + 1;
    if raw {
        let end = format!("\"{}", "#".repeat(hashes));
        return Some(begin + rest[begin..].find(&end)? + end.len());
    }
    Some(begin + unescaped(&rest[begin..], b'"')? + 1)
}

/// The length of a character in quotes, or of a lifetime.
fn quoted(rest: &str) -> Option<usize> {
    let prefix = if rest.starts_with("b'") { 1 } else { 0 };
    let inner = rest[prefix..].strip_prefix('\'')?;
    let first = inner.chars().next()?;
    let closed = inner[first.len_utf8()..].starts_with('\'');
    if first == '\\' || closed {
        return Some(prefix + 1 + unescaped(inner, b'\'')? + 1);
    }
    Some(1 + inner.find(|c| !is_part(c)).unwrap_or(inner.len()))
}

fn unescaped(text: &str, end: u8) -> Option<usize> {
    let mut bytes = text.bytes().enumerate();
    while let Some((at, byte)) = bytes.next() {
        if byte == b'\\' {
            bytes.next();
        } else if byte == end {
            return Some(at);
        }
    }
    None
}

/// `1..2` is two numbers, `1.5` is one.
fn number(rest: &str) -> usize {
    let whole = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
    let fraction =
        rest[whole..].strip_prefix('.').filter(|after| after.starts_with(|c: char| c.is_ascii_digit()));
    fraction.map_or(whole, |after| whole + 1 + after.find(|c| !is_part(c)).unwrap_or(after.len()))
}

// ---- that it reads what is written

#[cfg(test)]
fn words(text: &str) -> Vec<(usize, String)> {
    tokens(text).iter().filter_map(|t| Some((t.line, t.word()?.to_string()))).collect()
}

#[test]
fn comments_and_literals_are_no_words() {
    let text = "a // b\n/* c /* d */ e */ f \"g \\\" h\" 'i' '\\'' b'\"' r#\"j \" k\"# br\"l\" 'm n 1u8 1.5e3 r#o 1..p\nq";
    let expected = [(1, "a"), (2, "f"), (2, "n"), (2, "o"), (2, "p"), (3, "q")];
    assert_eq!(words(text), expected.map(|(line, word)| (line, word.to_string())));
}
