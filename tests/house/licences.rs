//! Every crate that this one is built from has a licence that `deny.toml` lists.

use std::process::Command;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The licences that are accepted.
fn accepted() -> Vec<String> {
    let text = std::fs::read_to_string(format!("{ROOT}/deny.toml")).unwrap();
    let list = text.lines().find_map(|line| line.strip_prefix("allow = [")).expect("a list in one line");
    list.split('"').skip(1).step_by(2).map(str::to_string).collect()
}

/// Name and licence of each crate, for this machine and with all features; none where cargo can't
/// tell, such as from a registry's package without its lock file.
fn crates() -> Option<Vec<(String, String)>> {
    let cargo = std::env::var("CARGO").unwrap_or("cargo".into());
    let version = Command::new("rustc").arg("-vV").output().ok()?.stdout;
    let version = String::from_utf8(version).ok()?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "))?;
    let metadata = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--locked", "--offline", "--all-features"])
        .args(["--filter-platform", host, "--manifest-path"])
        .arg(format!("{ROOT}/Cargo.toml"))
        .output()
        .ok()?;
    let text = String::from_utf8(metadata.stdout).ok().filter(|_| metadata.status.success())?;
    // A package begins with its name, its version and its id, and its licence follows.
    let field =
        |rest: &str| rest.strip_prefix('"').and_then(|rest| rest.split('"').next().map(str::to_string));
    let packages = text.split("{\"name\":").skip(1).filter(|package| {
        package.find("\"version\":\"").is_some_and(|at| package[..at].matches('"').count() == 2)
    });
    let of = |package: &str| {
        let (_, licence) = package.split_once("\"license\":")?;
        Some((field(package)?, field(licence).unwrap_or_default()))
    };
    packages.map(of).collect()
}

/// Whether an expression of SPDX can be met.
fn holds(expression: &str, accepted: &[String]) -> bool {
    let expression = expression.replace('/', " OR ");
    // The outermost operators, the weakest first.
    for (operator, any) in [(" OR ", true), (" AND ", false)] {
        let parts = split(&expression, operator);
        if parts.len() > 1 {
            let mut holding = parts.iter().map(|part| holds(part, accepted));
            return if any { holding.any(|holds| holds) } else { holding.all(|holds| holds) };
        }
    }
    let alone = expression.trim();
    match alone.strip_prefix('(').and_then(|inner| inner.strip_suffix(')')) {
        Some(inner) => holds(inner, accepted),
        None => accepted.iter().any(|known| known == alone),
    }
}

/// The parts between an operator that is in no brackets.
fn split<'a>(expression: &'a str, operator: &str) -> Vec<&'a str> {
    let (mut parts, mut begins, mut depth) = (Vec::new(), 0, 0);
    for (at, c) in expression.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth == 0 && at >= begins && expression[at..].starts_with(operator) => {
                parts.push(&expression[begins..at]);
                begins = at + operator.len();
            }
            _ => {}
        }
    }
    parts.push(&expression[begins..]);
    parts
}

#[test]
fn every_crate_has_a_licence_that_is_accepted() {
    let accepted = accepted();
    let Some(crates) = crates() else {
        println!("skipped: cargo does not tell the crates here");
        return;
    };
    assert!(crates.len() > 50, "cargo told of {} crates", crates.len());
    let others: Vec<_> = crates.iter().filter(|(_, licence)| !holds(licence, &accepted)).collect();
    assert!(others.is_empty(), "not in deny.toml: {others:?}");
}

#[test]
fn expressions_of_licences_are_read() {
    let accepted = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].map(str::to_string);
    for (expression, right) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("GPL-3.0/MIT", true),
        ("ISC AND GPL-3.0", false),
        ("(MIT OR GPL-3.0) AND ISC", true),
        ("(MIT AND GPL-3.0) OR GPL-2.0", false),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("", false),
    ] {
        assert_eq!(holds(expression, &accepted), right, "{expression}");
    }
}
