//! The example as three instances.

#[path = "../../support/notes.rs"]
mod notes;
#[path = "../../../tests/support/lib.rs"]
mod support;

#[test]
fn an_application_on_sqlx_replicates() {
    notes::every_instance_takes_every_request("notes-sqlx");
}

#[test]
fn the_example_differs_from_the_same_one_without_replite_by_a_few_lines() {
    let (with, without) =
        (include_str!("../examples/notes/main.rs"), include_str!("../examples/notes/alone.rs"));
    let (more, less) = notes::lines_of_difference(with, without);
    // As the README and the page say.
    assert_eq!((more, less), (13, 8));
}
