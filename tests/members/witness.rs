//! A member without a database.

use std::sync::{Arc, Mutex};

use replite::{Db, Witness, lease};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use crate::support::{alone, within};
use crate::world::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_and_a_witness_survive_the_loss_of_any_one() {
    let world = World::new(3);
    let (mut one, mut other) = (world.open(0).await, world.open(1).await);
    let mut witness = world.witness(2).await;
    let mut both = [one.clone(), other.clone()];
    let txid = write(&both, 1).await;
    all_have(&both, txid).await;
    let view = members_are(&one, "three voters", |view| all_vote(view, 3)).await;
    let it = view.members.iter().find(|member| member.url == world.url(2)).unwrap();
    assert!(it.witness && it.votes, "{view}");
    assert!(!world.path(2).exists() && world.members_directory(2).exists());

    // Without the witness.
    within("its end", witness.shutdown()).await;
    write(&both, 2).await;
    tokio::time::sleep(TIME * 2).await;
    let txid = write(&both, 3).await;
    all_have(&both, txid).await;
    witness = world.witness(2).await;
    let again = members_are(&one, "three voters", |view| all_vote(view, 3)).await;
    assert_eq!(id_at(&view, &world.url(2)), id_at(&again, &world.url(2)));
    assert_eq!(witness.members().await.unwrap().members.len(), 3);
    assert_eq!(witness.problem(), None);

    // Without either of the two.
    end([one]).await;
    write(std::slice::from_ref(&other), 4).await;
    one = world.open(0).await;
    both[0] = one.clone();
    let txid = write(&both, 5).await;
    all_have(&both, txid).await;
    members_are(&one, "three voters", |view| all_vote(view, 3)).await;
    end([other]).await;
    write(std::slice::from_ref(&one), 6).await;
    other = world.open(1).await;
    both[1] = other.clone();
    let txid = write(&both, 7).await;
    all_have(&both, txid).await;
    assert!(!world.path(2).exists());
    end([one, other]).await;
    within("its end", witness.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_is_one_of_the_members_or_nothing() {
    let world = World::with_more(2, 1);
    let refused = Witness::start(world.config(2)).await.unwrap_err();
    assert!(refused.to_string().contains(&world.url(2)), "{refused}");
    let refused = Witness::start(world.config(0).lease(lease::Fixed::primary())).await.unwrap_err();
    assert!(refused.to_string().contains("lease::Members"), "{refused}");
}

/// Keeps the lines of this process.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

struct Text(String);

impl tracing::field::Visit for Text {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!("{}={value:?} ", field.name());
    }
}

impl<S: tracing::Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(format!("{} {}", event.metadata().level(), text.0));
    }
}

/// Two are no better than one: it is told. Three are.
#[test]
fn two_members_are_told_that_they_are_too_few() {
    if !alone(two_members_are_told_that_they_are_too_few) {
        return;
    }
    let lines = Lines::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(lines.clone())).unwrap();
    let told = |part: &str| lines.0.lock().unwrap().iter().filter(|line| line.contains(part)).count();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let world = World::new(3);
        let dbs = world.open_all().await;
        write(&dbs, 1).await;
        members_are(&dbs[0], "three voters", |view| all_vote(view, 3)).await;
        end(dbs).await;
        assert_eq!(told("survive the loss of none"), 0);

        let world = World::new(2);
        let dbs = world.open_all().await;
        write(&dbs, 1).await;
        comes("the warning of both", || told("survive the loss of none") == 2).await;
        assert_eq!(told("WARN message=so few members survive the loss of none"), 2);
        end(dbs).await;
        let db: Db = world.open(0).await;
        comes("the warning after a restart", || told("survive the loss of none") == 3).await;
        end([db]).await;
    });
}
