//! What must hold for the sources and the documents as a whole.

mod prose;
