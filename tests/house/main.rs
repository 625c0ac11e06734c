//! What must hold for the sources and the documents as a whole.

mod documents;
mod floors;
mod graph;
mod licences;
mod module;
mod prose;
mod sizes;
mod sources;
mod tokens;
mod words;
