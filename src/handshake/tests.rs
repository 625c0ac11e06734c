//! Each field counts, and so does the connection.

use super::*;
use crate::channel::{Binding, Channel, Plaintext};
use crate::secret::{Rights, Secret};

fn keys(byte: u8) -> Keyring {
    Keyring::new(&[Secret::fixed([byte; 32])]).unwrap()
}

/// What a proof by this secret is known by.
fn own(byte: u8) -> Proved {
    let keys = keys(byte);
    keys.proved(Purpose::Knock, &[], &keys.prove(Purpose::Knock, &[])).unwrap()
}

fn knock() -> Knock {
    Knock {
        version: VERSION,
        cluster: "blå".into(),
        database: "app".into(),
        node: NodeId::from_u128(1),
        incarnation: Incarnation::from_u128(2),
        nonce: [7; 32],
        binding: Binding::NONE,
    }
}

#[test]
fn a_knock_survives_its_headers_and_holds_for_every_field() {
    let headers = knock().headers(&keys(1)).unwrap();
    assert_eq!(Knock::read(&headers, &keys(1), Binding::NONE), Ok((knock(), own(1))));
    let other = Err(Stranger::OtherSecret(knock().node));
    assert_eq!(Knock::read(&headers, &keys(2), Binding::NONE), other, "another secret");
    for name in [H_VERSION, H_CLUSTER, H_DATABASE, H_NODE, H_INCARNATION, H_NONCE, H_PROOF] {
        let mut missing = headers.clone();
        missing.remove(&name);
        assert_eq!(Knock::read(&missing, &keys(1), Binding::NONE), Err(Stranger::Passer), "without {name}");
    }
    for (name, value) in [
        (H_VERSION, "4".to_string()),
        (H_CLUSTER, "other".into()),
        (H_DATABASE, "other".into()),
        (H_NODE, NodeId::from_u128(9).to_string()),
        (H_INCARNATION, Incarnation::from_u128(9).to_string()),
        (H_NONCE, hex(&[8; 32])),
        (H_PROOF, hex(&[8; 32])),
        (H_PROOF, "zz".repeat(32)),
        (H_PROOF, "00".repeat(31)),
    ] {
        let mut changed = headers.clone();
        changed.insert(name.clone(), text(&value).unwrap());
        assert!(Knock::read(&changed, &keys(1), Binding::NONE).is_err(), "{name} changed");
    }
}

#[test]
fn an_answer_holds_for_the_knock_that_it_answers() {
    let answer =
        Answer { node: NodeId::from_u128(5), incarnation: Incarnation::from_u128(6), nonce: [9; 32] };
    let headers = answer.headers(&knock(), &keys(1)).unwrap();
    let read = |headers: &HeaderMap, knock: &Knock, k| Answer::read(headers, knock, &keys(k));
    assert_eq!(read(&headers, &knock(), 1).unwrap().unwrap().0, answer);
    assert!(matches!(read(&headers, &knock(), 2), Some(Err(PeerProblem::Secret))));
    let other = Knock { nonce: [8; 32], ..knock() };
    assert!(matches!(read(&headers, &other, 1), Some(Err(PeerProblem::Secret))), "a recorded answer");
    let mut newer = headers.clone();
    newer.insert(H_VERSION, 4u32.into());
    assert!(matches!(read(&newer, &knock(), 1), Some(Err(PeerProblem::Version { theirs: 4, .. }))));
    assert!(read(&HeaderMap::new(), &knock(), 1).is_none());
}

#[test]
fn a_follower_is_answered_by_its_own_secret_and_answers_no_member() {
    let secret = |byte| Secret::fixed([byte; 32]);
    let member = Keyring::with_followers(&[secret(1)], &[secret(3), secret(2)]).unwrap();
    let follower = Keyring::with_followers(&[], &[secret(2)]).unwrap();
    let answer =
        Answer { node: NodeId::from_u128(5), incarnation: Incarnation::from_u128(6), nonce: [9; 32] };
    let (read, proved) = Knock::read(&knock().headers(&follower).unwrap(), &member, Binding::NONE).unwrap();
    assert_eq!((read, proved.rights()), (knock(), Rights::Follower));
    let headers = answer.headers(&knock(), &member.towards(proved)).unwrap();
    assert!(Answer::read(&headers, &knock(), &follower).unwrap().is_ok(), "by the secret that it has");
    // One follower that poses as a primary to another deceives that one, and no member.
    let posed = answer.headers(&knock(), &follower).unwrap();
    assert!(Answer::read(&posed, &knock(), &follower).unwrap().is_ok());
    assert!(matches!(Answer::read(&posed, &knock(), &member), Some(Err(PeerProblem::Secret))));
    // A member's knock is nothing to a follower.
    let of_member = knock().headers(&member).unwrap();
    assert!(Knock::read(&of_member, &follower, Binding::NONE).is_err());
}

#[test]
fn refusals_are_understood_by_the_other_side() {
    let read = |r: Refusal| Refusal::read(&r.headers(), "app").unwrap().to_string();
    assert!(read(Refusal::Cluster("blå".into())).starts_with("it belongs to cluster \"blå\": "));
    assert!(read(Refusal::Database).starts_with("it does not serve database \"app\": "));
    assert_eq!(read(Refusal::NotPrimary(None)), "it is not the primary");
    assert_eq!(read(Refusal::Busy), "it refused: busy");
    assert!(read(Refusal::Follower).contains("members only"));
    let key: crate::peer::PeerKey = "0f".repeat(32).parse().unwrap();
    for told in [None, Some(key)] {
        let headers = Refusal::DuplicateNode(told).headers();
        let problem = Refusal::read(&headers, "app").unwrap();
        assert!(matches!(problem, PeerProblem::DuplicateNode(read) if read == told), "{problem}");
        assert_eq!(problem.to_string().contains("of key 0f0f0f0f"), told.is_some(), "{problem}");
    }
    let Some(PeerProblem::Version { theirs: 3, ours: 3 }) = Refusal::read(&Refusal::Version.headers(), "app")
    else {
        panic!("version")
    };
    let headers = Refusal::NotPrimary(Some("http://a/_replite".into())).headers();
    assert_eq!(headers[H_PRIMARY], "http://a/_replite");
    assert!(Refusal::read(&HeaderMap::new(), "app").is_none());
}

/// An address of this machine that others can reach, if it has one. Nothing is sent.
fn own_address() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback())
}

/// What every process can prove proves nothing of another machine, whatever the URL says.
#[tokio::test]
async fn without_a_secret_no_other_machine_is_spoken_to() {
    let Some(ip) = own_address() else { return };
    let listener = tokio::net::TcpListener::bind((ip, 0)).await.unwrap();
    for plaintext in [Plaintext::Loopback, Plaintext::AnyNetwork] {
        let asker = Asker {
            keys: Keyring::new(&[]).unwrap(),
            cluster: "main".into(),
            database: "app".into(),
            node: NodeId::from_u128(1),
            incarnation: Incarnation::from_u128(2),
            channel: Channel::ephemeral(Some(plaintext)).unwrap(),
        };
        for scheme in ["http", "replite"] {
            let to = format!("{scheme}://{}", listener.local_addr().unwrap());
            let to = crate::net::Endpoint::parse(&to).unwrap();
            let knocked = asker.knock(&to, STREAM_PATH, &tokio_util::task::TaskTracker::new()).await;
            let problem = knocked.err().expect("refused").to_string();
            assert!(problem.contains("not on this machine"), "{problem}");
        }
    }
}
