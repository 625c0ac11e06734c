//! `lease::ObjectStore` over Azure's emulator, where that is installed.

use std::sync::Arc;

use replite::lease::{ObjectStore, Store, SwapError};
use replite::testing::lease::conformance;
use replite_stores::azure::{Azurite, CONTAINER};

async fn emulator() -> Option<Azurite> {
    let azurite = Azurite::start().await.unwrap();
    if azurite.is_none() {
        println!("skipped: azurite is not here");
    }
    azurite
}

fn store(azurite: &Azurite, prefix: &str) -> ObjectStore {
    ObjectStore::with_options(&format!("az://{CONTAINER}/{prefix}"), azurite.options()).unwrap()
}

#[tokio::test]
async fn it_keeps_the_contract() {
    let Some(azurite) = emulator().await else { return };
    conformance(|| Arc::new(store(&azurite, "app"))).await.unwrap();
}

#[tokio::test]
async fn what_was_written_is_read_with_the_same_version() {
    let Some(azurite) = emulator().await else { return };
    let store = store(&azurite, "app");
    assert_eq!(store.read().await.unwrap(), None);
    let first = store.swap(None, b"{\"a\": 1}").await.unwrap();
    assert_eq!(store.read().await.unwrap().unwrap().version, first);
    let second = store.swap(Some(&first), b"{\"a\": 1}").await.unwrap();
    assert_eq!(store.read().await.unwrap().unwrap().version, second);
    let refused = store.swap(Some(&first), b"{}").await;
    assert!(matches!(refused, Err(SwapError::Conflict)), "{refused:?}");
    let nowhere = ObjectStore::with_options("az://no-such-container", azurite.options()).unwrap();
    let why = nowhere.read().await.unwrap_err().to_string();
    assert!(why.contains("make the bucket first"), "{why}");
    let mut options = azurite.options();
    options[1].1 = "b2Ygbm8gb25l".into();
    let stranger = ObjectStore::with_options(&format!("az://{CONTAINER}/app"), options).unwrap();
    let refused = stranger.swap(Some(&second), b"{}").await;
    let Err(SwapError::Unavailable(why)) = refused else { panic!("{refused:?}") };
    assert!(why.contains("403") && !why.contains("b2Ygbm8gb25l"), "{why}");
}
