//! Those that may ask little, and those that ask what makes no sense.

use bytes::Bytes;
use tokio_util::task::TaskTracker;

use super::*;
use crate::handshake::{self, MEMBERS_PATH};
use crate::lease::{SwapError, Version};
use crate::members::MemberChange;
use crate::net::{Endpoint, OpenResponse};

fn follower_keys() -> Keyring {
    Keyring::with_followers(&[], &[Secret::fixed([8; 32])]).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_may_read_and_no_more() {
    let world = World::new(3);
    let witnesses = world.start_all().await;
    let store = world.outside();
    let version = store.swap(None, b"the record").await.unwrap();
    let follower = MembersFromOutside::new(asker(follower_keys()), world.urls());
    // One that does not lead hears of it a moment later.
    let read = within("the record", async {
        loop {
            match follower.read().await.unwrap() {
                Some(read) => return read,
                None => tokio::time::sleep(LOOK).await,
            }
        }
    })
    .await;
    assert_eq!((&read.record[..], &read.version), (&b"the record"[..], &version));
    let url = world.urls()[1].clone();
    let asks: [&dyn Fn() -> Ask; 5] = [
        &|| Ask::Introduce,
        &|| Ask::Begin,
        &|| Ask::Change { change: MemberChange::Add { url: url.clone() }, passed: false },
        &|| Ask::Change { change: MemberChange::Remove { url: url.clone() }, passed: true },
        &|| Ask::Change { change: MemberChange::Replace { url: url.clone(), id: 5 }, passed: true },
    ];
    for ask in asks {
        let refused = follower.ask_any(ask).await.unwrap_err();
        assert_eq!(refused.matches("may only read").count(), 3, "{refused}");
    }
    let swapped = follower.swap(Some(&version), b"another").await;
    assert!(matches!(&swapped, Err(SwapError::Unavailable(_))), "{swapped:?}");
    assert_eq!(store.read().await.unwrap().unwrap().version, version);
    assert_eq!(witnesses[0].members().await.unwrap().members.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_secret_asks_nothing() {
    let world = World::new(1);
    let _witness = world.start_all().await;
    let stranger = asker(Keyring::new(&[Secret::fixed([9; 32])]).unwrap());
    let outside = MembersFromOutside::new(stranger, world.urls());
    outside.read().await.unwrap_err();
    let swapped = outside.swap(None, b"theirs").await;
    assert!(matches!(swapped, Err(SwapError::Unavailable(_))), "{swapped:?}");
    assert_eq!(world.outside().read().await.unwrap(), None);
}

/// A member that says what it wants on its connection.
struct Raw {
    opened: OpenResponse,
    heard: Vec<u8>,
}

impl Raw {
    async fn connect(world: &World, prove: bool) -> Raw {
        let asker = asker(member_keys());
        let to = Endpoint::parse(&world.urls()[0]).unwrap();
        let (knock, opened) = asker.knock(&to, MEMBERS_PATH, &TaskTracker::new()).await.unwrap();
        let answer = handshake::read_head((opened.status, &opened.headers), &knock, &asker.keys);
        let Ok((answer, _)) = answer else { panic!("{answer:?}") };
        let mut raw = Raw { opened, heard: Vec::new() };
        let mut proof = handshake::prove_members(&knock, &answer.nonce, &asker.keys).to_vec();
        if !prove {
            proof[3] ^= 1;
        }
        raw.say(&proof).await;
        raw
    }

    /// They may have hung up already.
    async fn say(&mut self, bytes: &[u8]) {
        let _ = self.opened.request.send_data(Bytes::copy_from_slice(bytes)).await;
    }

    async fn say_frame(&mut self, json: &[u8]) {
        let length = (json.len() as u32).to_le_bytes();
        self.say(&[&length[..], json].concat()).await;
    }

    /// The next answer; none: they hung up.
    async fn hear(&mut self) -> Option<String> {
        loop {
            if let Some((head, rest)) = self.heard.split_first_chunk() {
                let length = u32::from_le_bytes(*head) as usize;
                if rest.len() >= length {
                    let text = String::from_utf8(rest[..length].to_vec()).unwrap();
                    self.heard.drain(..4 + length);
                    return Some(text);
                }
            }
            match within("an answer", self.opened.body.next()).await {
                Some(Ok(bytes)) => self.heard.extend_from_slice(&bytes),
                _ => return None,
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused_and_the_member_goes_on() {
    let world = World::new(1);
    let witnesses = world.start_all().await;
    let version = world.outside().swap(None, b"the record").await.unwrap();

    assert_eq!(Raw::connect(&world, false).await.hear().await, None, "a wrong proof");

    // A length that no message has ends the connection, whatever follows.
    for length in [u32::MAX, 512 * 1024 + 1] {
        let mut raw = Raw::connect(&world, true).await;
        raw.say(&length.to_le_bytes()).await;
        assert_eq!(raw.hear().await, None, "{length}");
    }

    // What has a number is answered, and the connection goes on.
    let id = u64::from_str_radix(witnesses[0].members().await.unwrap().members[0].id.as_ref().unwrap(), 16)
        .unwrap();
    let deep = |text: &str| {
        format!("[1,{text}{}{}{}]", "[".repeat(100_000), "]".repeat(100_000), "}".repeat(text.len() / 8))
    };
    let vote = r#"{"leader_id":{"term":18446744073709551615,"node_id":5},"committed":true}"#;
    let other = r#"{"leader_id":{"term":1,"node_id":5},"committed":true}"#;
    let entry = r#"{"log_id":{"leader_id":{"term":1,"node_id":5},"index":7},"payload":"Blank"}"#;
    let wrong = [
        r#"[1,"fly"]"#.to_owned(),
        deep(""),
        deep(r#"{"swap":"#),
        r#"[1,{"swap":{}}]"#.into(),
        r#"[1,{"change":{"change":{"add":{}},"passed":false}}]"#.into(),
        format!(r#"[1,{{"vote":{{"to":{id},"rpc":{{"vote":{vote},"last_log_id":null}}}}}}]"#),
        format!(
            r#"[1,{{"append":{{"to":{id},"rpc":{{"vote":{other},
            "prev_log_id":null,"leader_commit":null,"entries":[{entry}]}}}}}}]"#
        ),
        format!(r#"[1,{{"vote":{{"to":12345,"rpc":{{"vote":{other},"last_log_id":null}}}}}}]"#),
        r#"[1,{"change":{"change":{"replace":{"url":"replite://h:1","id":5}},"passed":true}}]"#.into(),
        r#"[1,{"change":{"change":{"add":{"url":"not a url"}},"passed":true}}]"#.into(),
    ];
    let mut raw = Raw::connect(&world, true).await;
    for json in &wrong {
        raw.say_frame(json.as_bytes()).await;
        let said = raw.hear().await.expect(json);
        assert!(said.starts_with(r#"[1,{"unable":{"may_be_done":false,"#), "{json}: {said}");
    }
    // What has none is not.
    for json in ["", "{}", "[]", "\u{0}", "[[[[[[[["] {
        raw.say_frame(json.as_bytes()).await;
    }
    raw.say_frame(br#"[2,"read"]"#).await;
    let said = raw.hear().await.unwrap();
    assert!(said.starts_with(r#"[2,{"register":"#), "{said}");

    let read = world.outside().read().await.unwrap().unwrap();
    assert_eq!(read.version, version);
    world.outside().swap(Some(&version), b"the next").await.unwrap();
    let old = world.outside().swap(Some(&Version::new("1-1-1")), b"x").await;
    assert!(matches!(old, Err(SwapError::Conflict)), "{old:?}");
    assert_eq!(witnesses[0].problem(), None);
}
