//! The measure of the prose: short sentences, plain words, narrow comments.
//!
//! It counts over the documents and over the comments of `src`, rustdoc included. Code blocks and
//! headings do not count. Each item of a list and each cell of a table begins a new sentence. A link
//! counts by its text, and inline code counts as one word.

use std::fmt::Write;

use crate::sources::{files, read};

/// A sentence of more words is long.
const LONG: usize = 25;

/// How many of a hundred sentences may be long.
const LONG_PERCENT: usize = 3;

/// No sentence has more words.
const LONGEST: usize = 40;

/// The widest comment in `src`, in columns, its indent included.
const COMMENT_WIDTH: usize = 100;

/// The widest line in `src`, in columns.
const LINE_WIDTH: usize = 110;

/// Documents beside those in `docs`.
const DOCUMENTS: [&str; 5] =
    ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benches/README.md"];

/// Words that hide the actor or mean two things, and what to write instead.
const BANNED: [(&str, &str); 3] = [
    ("whoever", "name the actor"),
    ("nobody", "name the actor, or say `no process`, `no thread`, `no one else`"),
    ("behind", "`after` in time or place, `late` or `lags` for a delay"),
];

/// One of these among the next words makes an honest `behind`.
const HONEST_BEHIND: [&str; 10] =
    ["proxy", "proxies", "balancer", "balancers", "gateway", "nginx", "firewall", "nat", "tls", "feature"];

/// How many words after `behind` may tell what it is behind of.
const HONEST_REACH: usize = 4;

/// How many words of a sentence a message shows.
const SHOWN: usize = 12;

/// Ends with a full stop without ending the sentence.
const ABBREVIATIONS: [&str; 6] = ["e.g.", "i.e.", "etc.", "vs.", "cf.", "ca."];

/// Stands for inline code: a word that can begin a sentence.
const CODE: char = '`';

// ---- where the prose is

/// A document or a source, and its sentences.
struct Text {
    file: String,
    sentences: Vec<Sentence>,
}

fn documents() -> Vec<Text> {
    let names = DOCUMENTS.iter().map(|name| name.to_string()).chain(files("docs", "md"));
    let text = |file: String| Text { sentences: of_markdown(&numbered(&read(&file))), file };
    names.map(text).collect()
}

fn sources() -> Vec<Text> {
    let text = |file: String| Text { sentences: of_source(&read(&file)), file };
    files("src", "rs").into_iter().map(text).collect()
}

// ---- from files to sentences

/// A line and its number, counted from 1.
type Line = (usize, String);

#[derive(Debug)]
struct Sentence {
    line: usize,
    words: Vec<String>,
}

impl Sentence {
    /// What a message shows of it, from a word on.
    fn excerpt(&self, from: usize) -> String {
        let shown: Vec<&str> = self.words[from..].iter().take(SHOWN).map(String::as_str).collect();
        let (before, after) = (from > 0, from + SHOWN < self.words.len());
        let dots = |are: bool| if are { "..." } else { "" };
        format!("{}{}{}", dots(before), shown.join(" "), dots(after))
    }
}

fn numbered(text: &str) -> Vec<Line> {
    text.lines().enumerate().map(|(at, line)| (at + 1, line.to_string())).collect()
}

/// The sentences of all comments that have lines of their own.
fn of_source(text: &str) -> Vec<Sentence> {
    let mut sentences = Vec::new();
    let mut group: (&str, Vec<Line>) = ("", Vec::new());
    for (at, line) in text.lines().enumerate() {
        let (marker, comment) = comment(line).unwrap_or(("", ""));
        if marker != group.0 {
            sentences.extend(of_markdown(&group.1));
            group = (marker, Vec::new());
        }
        if !marker.is_empty() {
            group.1.push((at + 1, comment.to_string()));
        }
    }
    sentences.extend(of_markdown(&group.1));
    sentences
}

/// The marker of a line that is all comment, and its text.
fn comment(line: &str) -> Option<(&'static str, &str)> {
    let line = line.trim_start();
    let of = |marker: &'static str| line.strip_prefix(marker).map(|text| (marker, text));
    of("///").or_else(|| of("//!")).or_else(|| of("//"))
}

fn of_markdown(lines: &[Line]) -> Vec<Sentence> {
    blocks(lines).iter().flat_map(|block| split(block)).collect()
}

/// Paragraphs, items of lists and cells of tables: what a sentence does not reach across.
fn blocks(lines: &[Line]) -> Vec<Vec<Line>> {
    let mut blocks = vec![Vec::new()];
    let mut fence: Option<&str> = None;
    for (number, line) in lines {
        let text = line.trim_start().trim_start_matches('>').trim();
        let opens = ["```", "~~~"].into_iter().find(|mark| text.starts_with(mark));
        if fence.is_some() || opens.is_some() {
            fence = if fence.is_none() { opens } else { fence.filter(|mark| !text.starts_with(mark)) };
            blocks.push(Vec::new());
        } else if text.is_empty() || is_heading(text) || text.starts_with("<!--") || is_definition(text) {
            blocks.push(Vec::new());
        } else if text.starts_with('|') {
            blocks.extend(cells(text).into_iter().map(|cell| vec![(*number, cell)]));
            blocks.push(Vec::new());
        } else {
            let (item, text) = without_bullet(text);
            if item {
                blocks.push(Vec::new());
            }
            blocks.last_mut().unwrap().push((*number, text.to_string()));
        }
    }
    blocks
}

fn is_heading(text: &str) -> bool {
    text.trim_start_matches('#').starts_with(' ') && text.starts_with('#')
}

/// `[name]: address`, the target of links.
fn is_definition(text: &str) -> bool {
    text.starts_with('[') && text.split_once("]: ").is_some_and(|(name, _)| !name[1..].contains(['[', ']']))
}

fn without_bullet(text: &str) -> (bool, &str) {
    let number = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let counted = (number.len() < text.len()).then(|| number.strip_prefix(". ")).flatten();
    let rest = ["- ", "* ", "+ "].into_iter().find_map(|bullet| text.strip_prefix(bullet)).or(counted);
    (rest.is_some(), rest.unwrap_or(text))
}

/// The cells of a table's row; of the row that draws its line, none.
fn cells(row: &str) -> Vec<String> {
    if row.chars().all(|c| "|-: ".contains(c)) {
        return Vec::new();
    }
    row.replace("\\|", "/").split('|').map(str::to_string).collect()
}

/// Without marks of Markdown. The ends of the lines stay where they are.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let used = match c {
            '`' => code(rest, &mut plain),
            ']' => target(rest, &mut plain),
            '[' | '*' => 1,
            _ => {
                plain.push(c);
                c.len_utf8()
            }
        };
        rest = &rest[used..];
    }
    plain
}

/// Puts one word for inline code; gives its length.
fn code(rest: &str, plain: &mut String) -> usize {
    let ticks = rest.len() - rest.trim_start_matches('`').len();
    let inner = &rest[ticks..];
    plain.push(CODE);
    let Some(end) = inner.find(&rest[..ticks]) else { return ticks };
    plain.extend(inner[..end].chars().filter(|c| *c == '\n'));
    end + 2 * ticks
}

/// Skips a link's target, if it has one, from the bracket on that ends its text.
fn target(rest: &str, plain: &mut String) -> usize {
    let end = match rest[1..].chars().next() {
        Some('(') => rest.find(')'),
        Some('[') => rest[1..].find(']').map(|at| at + 1),
        _ => None,
    };
    let used = end.map_or(1, |end| end + 1);
    plain.extend(rest[..used].chars().filter(|c| *c == '\n'));
    used
}

/// The sentences of a block.
fn split(block: &[Line]) -> Vec<Sentence> {
    let text = block.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>().join("\n");
    let text = plain(&text);
    let lines = text.lines().zip(block);
    let words = lines.flat_map(|(text, (number, _))| text.split_whitespace().map(|word| (*number, word)));
    let words: Vec<(usize, &str)> = words.collect();
    let mut sentences = vec![];
    let mut sentence = Sentence { line: 0, words: vec![] };
    for (at, (line, word)) in words.iter().enumerate() {
        if word.contains(|c: char| c.is_alphanumeric() || c == CODE) {
            if sentence.words.is_empty() {
                sentence.line = *line;
            }
            sentence.words.push(word.to_string());
        }
        if ends(word, words.get(at + 1).map(|(_, next)| *next)) && !sentence.words.is_empty() {
            sentences.push(std::mem::replace(&mut sentence, Sentence { line: 0, words: vec![] }));
        }
    }
    sentences
}

/// Whether a sentence ends with this word, when that one follows.
fn ends(word: &str, next: Option<&str>) -> bool {
    let Some(next) = next else { return true };
    let word = word.trim_end_matches(['"', '\'', ')', '”', '’']);
    let first = next.trim_start_matches(['"', '\'', '(', '“', '‘']).chars().next().unwrap_or(' ');
    if word.ends_with("...") || word.ends_with('…') {
        return first.is_uppercase();
    }
    word.ends_with(['.', '!', '?']) && !ABBREVIATIONS.contains(&word) && !first.is_lowercase()
}

// ---- the rules

fn assert_none_too_long(texts: &[Text]) {
    let mut said = String::new();
    for text in texts {
        for sentence in text.sentences.iter().filter(|sentence| sentence.words.len() > LONGEST) {
            let (file, line, words) = (&text.file, sentence.line, sentence.words.len());
            writeln!(said, "{file}:{line}: {words} words: {}", sentence.excerpt(0)).unwrap();
        }
    }
    let count = said.lines().count();
    assert!(said.is_empty(), "{count} sentences have more than {LONGEST} words; split them:\n{said}");
}

fn assert_few_long(texts: &[Text]) {
    let long = |text: &Text| text.sentences.iter().filter(|s| s.words.len() > LONG).count();
    let all: usize = texts.iter().map(|text| text.sentences.len()).sum();
    let too_long: usize = texts.iter().map(long).sum();
    if too_long * 100 <= all * LONG_PERCENT {
        return;
    }
    let mut sorted: Vec<&Text> = texts.iter().filter(|text| long(text) > 0).collect();
    sorted.sort_by_key(|text| std::cmp::Reverse(long(text)));
    let mut said = String::new();
    for text in sorted {
        let (count, sum) = (long(text), text.sentences.len());
        let worst = text.sentences.iter().max_by_key(|s| s.words.len()).unwrap();
        let share = 100.0 * count as f64 / sum as f64;
        let (file, line, words) = (&text.file, worst.line, worst.words.len());
        writeln!(said, "{file}: {count} of {sum} ({share:.1} %); line {line} has {words} words").unwrap();
    }
    let share = 100.0 * too_long as f64 / all as f64;
    panic!(
        "{too_long} of {all} sentences ({share:.1} %) have more than {LONG} words, \
         {LONG_PERCENT} % may; most of them are in:\n{said}"
    );
}

fn assert_plain_words(texts: &[Text]) {
    let mut said = String::new();
    for text in texts {
        for sentence in &text.sentences {
            for (at, word, instead) in banned(sentence) {
                let (file, line, shown) = (&text.file, sentence.line, sentence.excerpt(at.saturating_sub(5)));
                writeln!(said, "{file}:{line}: \"{word}\" ({instead}): {shown}").unwrap();
            }
        }
    }
    let count = said.lines().count();
    assert!(said.is_empty(), "{count} times a word that the prose goes without:\n{said}");
}

/// Where in the sentence which of the banned words is, and what to write instead.
fn banned(sentence: &Sentence) -> Vec<(usize, &'static str, &'static str)> {
    let bare = |word: &String| word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
    let words: Vec<String> = sentence.words.iter().map(bare).collect();
    let mut found = Vec::new();
    for (at, word) in words.iter().enumerate() {
        let mut after = words[at + 1..].iter().take(HONEST_REACH);
        let honest = word == "behind" && after.any(|next| HONEST_BEHIND.contains(&next.as_str()));
        let bad = BANNED.iter().filter(|(bad, _)| bad == word && !honest);
        found.extend(bad.map(|(bad, instead)| (at, *bad, *instead)));
    }
    found
}

fn assert_narrow(width: usize, what: &str, counts: impl Fn(&str) -> bool) {
    let mut said = String::new();
    for file in files("src", "rs") {
        for (number, line) in numbered(&read(&file)) {
            let columns = line.chars().count();
            if columns > width && counts(&line) {
                writeln!(said, "{file}:{number}: {columns} columns").unwrap();
            }
        }
    }
    let count = said.lines().count();
    assert!(said.is_empty(), "{count} {what} are wider than {width} columns:\n{said}");
}

#[test]
fn no_sentence_of_a_document_is_too_long() {
    assert_none_too_long(&documents());
}

#[test]
fn no_sentence_of_a_comment_is_too_long() {
    assert_none_too_long(&sources());
}

#[test]
fn few_sentences_of_documents_are_long() {
    assert_few_long(&documents());
}

#[test]
fn few_sentences_of_comments_are_long() {
    assert_few_long(&sources());
}

#[test]
fn documents_use_plain_words() {
    assert_plain_words(&documents());
}

#[test]
fn comments_use_plain_words() {
    assert_plain_words(&sources());
}

#[test]
fn comments_are_narrow() {
    assert_narrow(COMMENT_WIDTH, "comments", |line| comment(line).is_some());
}

#[test]
fn lines_are_narrow() {
    assert_narrow(LINE_WIDTH, "lines", |_| true);
}

// ---- that the rules count what they say

fn counts(markdown: &str) -> Vec<(usize, usize)> {
    of_markdown(&numbered(markdown)).iter().map(|s| (s.line, s.words.len())).collect()
}

#[test]
fn full_stops_end_sentences() {
    assert_eq!(counts("One two. Three\nfour five! `Six` seven?"), [(1, 2), (1, 3), (2, 2)]);
    assert_eq!(counts("It waits 1 s, 2 s ... 60 s, e.g. Monday. (And then.)"), [(1, 10), (1, 2)]);
    assert_eq!(counts("Version 3.51.3 of `a. B` is no end, nor is x.rs here."), [(1, 11)]);
}

#[test]
fn blocks_end_sentences() {
    assert_eq!(
        counts("# A heading\n\none two\n\n- three\n  four\n- five\n\n1. six"),
        [(3, 2), (5, 2), (7, 1), (9, 1)]
    );
    assert_eq!(counts("| a b | c |\n|---|:--|\n| `d` e | – |"), [(1, 2), (1, 1), (3, 2)]);
    assert_eq!(counts("one\n```text\ntwo. Three\n```\nfour"), [(1, 1), (5, 1)]);
}

#[test]
fn links_count_by_their_text() {
    assert_eq!(counts("See [two words](an address.md#x) and [`Code`][target] or [Name]."), [(1, 7)]);
    assert_eq!(counts("The [link\nreaches](far) on. `Code\ntoo` does.\n\n[a]: b c"), [(1, 4), (2, 2)]);
}

#[test]
fn comments_are_prose() {
    let sentences = of_source("//! One two.\n\n/// Three\n/// four.\nfn five() {\n    // Six.\n}\n");
    let counts: Vec<_> = sentences.iter().map(|s| (s.line, s.words.len())).collect();
    assert_eq!(counts, [(1, 2), (3, 2), (6, 1)]);
}

#[test]
fn banned_words_are_found() {
    let words = |text: &str| -> Vec<&str> {
        of_markdown(&numbered(text)).iter().flat_map(banned).map(|(_, word, _)| word).collect()
    };
    assert_eq!(words("Whoever waits, nobody\nis behind."), ["whoever", "nobody", "behind"]);
    assert_eq!(words("A node behind a reverse proxy, `nobody`."), [""; 0]);
}
