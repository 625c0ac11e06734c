//! One module of the crate, as far as the rules ask for it. What is built for tests only is not
//! in it.

use crate::tokens::{Kind, Token, tokens};

#[derive(Debug, Default)]
pub(crate) struct Module {
    /// `["engine", "file"]`; the root has none.
    pub(crate) path: Vec<String>,
    pub(crate) file: String,
    /// Of the file, without what is built for tests only. A module in another's file has 0.
    pub(crate) lines: usize,
    /// Its modules in files of their own.
    pub(crate) declared: Vec<String>,
    pub(crate) uses: Vec<Use>,
    /// Paths in the code, `a::b` and longer.
    pub(crate) paths: Vec<(usize, Vec<String>)>,
    pub(crate) functions: Vec<Function>,
    /// Structs, enums, unions, traits and aliases.
    pub(crate) types: Vec<(usize, String)>,
    /// Where `unsafe` is said.
    pub(crate) unsafe_at: Vec<usize>,
    /// How often it begins a block or an `impl`.
    pub(crate) unsafe_blocks: usize,
    /// Where `unwrap` is called, or a macro for drafts.
    pub(crate) shortcuts: Vec<(usize, String)>,
}

/// Macros for drafts.
const DRAFTS: [&str; 6] = ["todo", "unimplemented", "dbg", "print", "println", "eprintln"];

/// One name that a `use` brings in. `use a::{b, c as d};` are two.
#[derive(Debug, PartialEq)]
pub(crate) struct Use {
    pub(crate) line: usize,
    /// The name in this module; `*` for all.
    pub(crate) name: String,
    pub(crate) path: Vec<String>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Function {
    pub(crate) line: usize,
    pub(crate) name: String,
    pub(crate) lines: usize,
}

impl Module {
    /// The module of a file, and after it those that have their braces in the same file.
    pub(crate) fn read(file: &str, path: &[String], text: &str) -> Vec<Module> {
        let (kept, test_lines) = without_tests(&tokens(text));
        let mut reader = Reader { tokens: &kept, at: 0, modules: Vec::new() };
        let module = Module { path: path.to_vec(), file: file.to_string(), ..Module::default() };
        reader.module(module);
        let mut modules = reader.modules;
        modules.reverse();
        modules[0].lines = text.lines().count() - test_lines;
        modules
    }

    pub(crate) fn name(&self) -> String {
        if self.path.is_empty() { "the root".to_string() } else { self.path.join("::") }
    }
}

// ---- without tests

/// The tokens of what is built without tests, and how many lines the others have.
fn without_tests(all: &[Token]) -> (Vec<Token>, usize) {
    let (mut kept, mut lines, mut at) = (Vec::new(), 0, 0);
    while let Some(token) = all.get(at) {
        let attribute = token.is("#") && all.get(at + 1).is_some_and(|t| t.is("["));
        if attribute && is_for_tests(&all[at + 2..closing(all, at + 1)]) {
            let end = item_end(all, at);
            lines += all[end - 1].line - token.line + 1;
            at = end;
        } else {
            kept.push(token.clone());
            at += 1;
        }
    }
    (kept, lines)
}

/// Whether this attribute, without its brackets, leaves its item to builds for tests and fuzzing.
fn is_for_tests(attribute: &[Token]) -> bool {
    let [cfg, open, condition @ .., _] = attribute else { return false };
    cfg.is("cfg") && open.is("(") && needs_test(condition)
}

fn needs_test(condition: &[Token]) -> bool {
    let word = condition.first().and_then(Token::word);
    let parts = || condition.get(2..condition.len().saturating_sub(1)).map(by_comma).unwrap_or_default();
    match word {
        Some("test" | "fuzzing" | "doctest") => condition.len() == 1,
        Some("all") => parts().into_iter().any(needs_test),
        Some("any") => parts().into_iter().all(needs_test),
        _ => false,
    }
}

fn by_comma(tokens: &[Token]) -> Vec<&[Token]> {
    let mut depth = 0;
    let parts = tokens.split(|token| {
        depth += token.depth();
        depth == 0 && token.is(",")
    });
    parts.filter(|part| !part.is_empty()).collect()
}

/// Where the bracket at `at` closes.
fn closing(tokens: &[Token], at: usize) -> usize {
    let mut depth = 0;
    for (place, token) in tokens.iter().enumerate().skip(at) {
        depth += token.depth();
        if depth == 0 {
            return place;
        }
    }
    panic!("line {}: a bracket does not close", tokens[at].line)
}

/// One after the last token of the item whose attributes begin at `at`.
fn item_end(tokens: &[Token], mut at: usize) -> usize {
    while tokens[at].is("#") {
        at = closing(tokens, at + 1) + 1;
    }
    let item =
        tokens[at..].iter().filter_map(Token::word).find(|w| !matches!(*w, "pub" | "crate" | "in" | "super"));
    let (comma_ends, brace_ends) = match item {
        Some("use" | "const" | "static" | "let" | "type") => (false, false),
        Some("fn" | "async" | "unsafe" | "impl" | "mod" | "struct" | "enum" | "trait" | "macro_rules") => {
            (false, true)
        }
        _ => (true, true),
    };
    while let Some(token) = tokens.get(at) {
        match token.kind {
            Kind::Sign("{") if brace_ends => return closing(tokens, at) + 1,
            Kind::Sign("{" | "(" | "[") => at = closing(tokens, at),
            Kind::Sign("}" | ")" | "]") => return at,
            Kind::Sign(";") => return at + 1,
            Kind::Sign(",") if comma_ends => return at + 1,
            _ => (),
        }
        at += 1;
    }
    at
}

// ---- items

struct Reader<'a> {
    tokens: &'a [Token],
    at: usize,
    /// Those that are read, a module after the ones in it.
    modules: Vec<Module>,
}

impl Reader<'_> {
    fn peek(&self, ahead: usize) -> Option<&Token> {
        self.tokens.get(self.at + ahead)
    }

    fn next_is(&self, ahead: usize, text: &str) -> bool {
        self.peek(ahead).is_some_and(|token| token.is(text))
    }

    /// Reads to the brace that closes the module, or to the file's end.
    fn module(&mut self, mut module: Module) {
        // What each open brace belongs to: whether it is an `impl` or a `trait`.
        let mut braces: Vec<bool> = Vec::new();
        let mut has_members = false;
        while let Some(token) = self.tokens.get(self.at) {
            match token.word() {
                Some("use") => {
                    self.at += 1;
                    self.use_tree(&mut module.uses, &[]);
                    continue;
                }
                Some("mod") => self.submodule(&mut module),
                Some("pub") if self.next_is(1, "(") => self.at = closing(self.tokens, self.at + 1),
                Some("fn") => module.functions.extend(self.function()),
                Some("unsafe") => {
                    module.unsafe_at.push(token.line);
                    module.unsafe_blocks += usize::from(self.next_is(1, "{") || self.next_is(1, "impl"));
                }
                Some("unwrap") => module.shortcuts.push((token.line, "unwrap".to_string())),
                Some(word) if DRAFTS.contains(&word) && self.next_is(1, "!") => {
                    module.shortcuts.push((token.line, word.to_string()));
                }
                Some("impl") if self.begins_item() => has_members = true,
                Some(word @ ("struct" | "enum" | "union" | "trait" | "type")) => {
                    let associated = word == "type" && braces.last() == Some(&true);
                    let name = self.peek(1).and_then(Token::word).filter(|_| !associated);
                    module.types.extend(name.map(|name| (token.line, name.to_string())));
                    has_members |= word == "trait";
                }
                Some(_) => self.path(&mut module),
                None if token.is("{") => braces.push(std::mem::take(&mut has_members)),
                None if token.is("}") && braces.pop().is_none() => break,
                None => (),
            }
            self.at += 1;
        }
        self.modules.push(module);
    }

    /// `impl` in a type follows a colon, an arrow or a bracket; an item does not.
    fn begins_item(&self) -> bool {
        let before = self.at.checked_sub(1).map(|at| &self.tokens[at]);
        before.is_none_or(|t| ["}", "{", ";", "]", "unsafe"].iter().any(|end| t.is(end)))
    }

    /// Stands on `mod` at first and on the item's last token in the end.
    fn submodule(&mut self, module: &mut Module) {
        let Some(name) = self.peek(1).and_then(Token::word).map(str::to_string) else { return };
        if self.next_is(2, ";") {
            module.declared.push(name);
            self.at += 2;
        } else if self.next_is(2, "{") {
            let path = module.path.iter().cloned().chain([name]).collect();
            self.at += 3;
            self.module(Module { path, file: module.file.clone(), ..Module::default() });
        }
    }

    /// The function whose `fn` is here. A function's type and a declaration without a body are none.
    fn function(&self) -> Option<Function> {
        let (line, name) = (self.peek(0)?.line, self.peek(1)?.word()?.to_string());
        let mut at = self.at + 2;
        while let Some(token) = self.tokens.get(at) {
            match token.kind {
                Kind::Sign("{") => {
                    let last = self.tokens[closing(self.tokens, at)].line;
                    return Some(Function { line, name, lines: last - line + 1 });
                }
                Kind::Sign(";") => return None,
                Kind::Sign("(" | "[") => at = closing(self.tokens, at),
                _ => (),
            }
            at += 1;
        }
        None
    }

    /// A path in the code; stands on its last token in the end.
    fn path(&mut self, module: &mut Module) {
        let mut segments = Vec::new();
        let line = self.tokens[self.at].line;
        loop {
            segments.extend(self.peek(0).and_then(Token::word).map(str::to_string));
            if !self.next_is(1, "::") || self.peek(2).and_then(Token::word).is_none() {
                break;
            }
            self.at += 2;
        }
        if segments.len() > 1 {
            module.paths.push((line, segments));
        }
    }

    /// A `use`, or a part of it within braces. Stands after it in the end: after the comma or the
    /// semicolon, or on the brace that closes.
    fn use_tree(&mut self, uses: &mut Vec<Use>, prefix: &[String]) {
        let mut path = prefix.to_vec();
        let mut renamed = None;
        while let Some(token) = self.tokens.get(self.at) {
            match &token.kind {
                Kind::Sign("{") => {
                    self.at += 1;
                    while !self.next_is(0, "}") {
                        self.use_tree(uses, &path);
                    }
                    self.at += 1;
                    self.at += usize::from(self.next_is(0, ",") || self.next_is(0, ";"));
                    return;
                }
                Kind::Sign("," | ";" | "}") => break,
                Kind::Word(word) if word == "as" => {
                    renamed = self.peek(1).and_then(Token::word).map(str::to_string);
                    self.at += 1;
                }
                Kind::Word(word) if word == "self" && !path.is_empty() => (),
                Kind::Word(word) => path.push(word.clone()),
                Kind::Sign("*") => renamed = Some("*".to_string()),
                _ => (),
            }
            self.at += 1;
        }
        let line = self.tokens[self.at - 1].line;
        self.at += usize::from(!self.next_is(0, "}"));
        let name = renamed.or_else(|| path.last().cloned()).unwrap_or_default();
        uses.push(Use { line, name, path });
    }
}

// ---- that it reads what is written

fn read(text: &str) -> Module {
    Module::read("src/a.rs", &["a".to_string()], text).swap_remove(0)
}

#[test]
fn use_trees_are_read() {
    let module = read(
        "use crate::b;\npub(in crate::x) use super::{self, c::{D as E, f::*},\n self as g, };\nfn h() { use i::j; }",
    );
    let uses: Vec<String> =
        module.uses.iter().map(|u| format!("{} {}={}", u.line, u.name, u.path.join("::"))).collect();
    assert_eq!(
        uses,
        ["1 b=crate::b", "2 super=super", "2 E=super::c::D", "2 *=super::c::f", "3 g=super", "4 j=i::j"]
    );
    assert_eq!(module.paths, []);
}

#[test]
fn paths_are_read() {
    let module = read("pub(in crate::x) fn f(a: b::C) -> d::E<f::G> {\n Vec::<h::I>::new(a.j, k::l::m())\n}");
    let paths: Vec<String> =
        module.paths.iter().map(|(line, path)| format!("{line} {}", path.join("::"))).collect();
    assert_eq!(paths, ["1 b::C", "1 d::E", "1 f::G", "2 h::I", "2 k::l::m"]);
}

#[test]
fn what_is_for_tests_is_left_out() {
    let text = "#[cfg(test)]\nuse a::{b};\n#[cfg(unix)]\nmod c;\n#[cfg(all(test, unix))]\n#[x]\nmod d;\n\
                struct E {\n #[cfg(test)]\n f: g::H,\n i: j::K,\n}\n\
                #[cfg(any(test, all(fuzzing, feature = \"x\")))]\nfn l() -> M<N, O> {\n p::q();\n}\n\
                #[cfg(any(test, feature = \"x\"))]\nfn r() {}\n#[cfg(not(test))]\nmod s;\n";
    let module = read(text);
    assert_eq!(module.declared, ["c", "s"]);
    assert_eq!(module.uses, []);
    assert_eq!(module.paths, [(11, vec!["j".to_string(), "K".to_string()])]);
    assert_eq!(module.functions, [Function { line: 18, name: "r".to_string(), lines: 1 }]);
    assert_eq!(module.lines, 21 - 1 - 2 - 3 - 2 - 4);
}

#[test]
fn types_and_functions_are_read() {
    let text = "struct A;\npub(crate) enum B {}\nimpl C for A {\n type D = u8;\n fn e(f: fn(u8), g: impl H) -> [u8; 2]\n {\n \
                type I = u8;\n unsafe { j().unwrap(); todo!() }\n }\n}\ntrait K { type L; fn m(); }\nmod n { type O = A; }";
    let module = read(text);
    let types: Vec<(usize, &str)> = module.types.iter().map(|(line, name)| (*line, name.as_str())).collect();
    assert_eq!(types, [(1, "A"), (2, "B"), (7, "I"), (11, "K")]);
    assert_eq!(module.functions, [Function { line: 5, name: "e".to_string(), lines: 5 }]);
    assert_eq!((module.unsafe_at, module.unsafe_blocks), (vec![8], 1));
    assert_eq!(module.shortcuts, [(8, "unwrap".to_string()), (8, "todo".to_string())]);
    let inner = Module::read("src/a.rs", &[], text).pop().unwrap();
    assert_eq!((inner.path, inner.types), (vec!["n".to_string()], vec![(12, "O".to_string())]));
}
