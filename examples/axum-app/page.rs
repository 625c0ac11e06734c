//! The one page.

use std::fmt::Write;

use replite::Role;

use crate::store::Note;

pub(crate) fn render(url: &str, role: Role, query: &str, notes: &[Note]) -> String {
    let mut list = String::new();
    for note in notes {
        // Writing to a String does not fail.
        let _ = write!(
            list,
            "<li data-id=\"{}\"><p>{}</p><small>{} &middot; {} <button class=\"gone\">delete</button></small></li>",
            note.id,
            escape(&note.text),
            escape(&note.created),
            escape(if note.node.is_empty() { "elsewhere" } else { &note.node }),
        );
    }
    include_str!("page.html")
        .replace("{{url}}", &escape(url))
        .replace("{{role}}", &role.to_string())
        .replace("{{query}}", &escape(query))
        // Last: what users wrote is not searched for places to fill.
        .replace("{{notes}}", &list)
}

/// Makes a text safe between tags and in quoted attributes.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            // A search text must not be taken for a place to fill.
            '{' => safe.push_str("&#123;"),
            c => safe.push(c),
        }
    }
    safe
}
