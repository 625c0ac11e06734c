//! Who goes, and who stays.

use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;

const LIMITS: DoorLimits = DoorLimits { unproved: 8, of_source: 4, proved: 4, followers: 2, forwards: 1 };

fn from(address: &str) -> CameFrom {
    CameFrom::of(address.parse().unwrap())
}

fn enter(places: &Arc<DoorPlaces>, address: &str) -> DoorPlace {
    places.enter(from(address)).unwrap().0
}

/// Whether a place is held still.
fn stays(place: &DoorPlace) -> bool {
    !place.0.cut.is_cancelled()
}

#[test]
fn a_source_takes_its_own_places_silent_ones_first_and_then_the_oldest() {
    let places = DoorPlaces::new(LIMITS);
    let other = enter(&places, "10.0.0.2");
    let own: Vec<_> = (0..4).map(|_| enter(&places, "10.0.0.1")).collect();
    own[0].spoke();
    own[2].spoke();
    let mut later = Vec::new();
    for expected in [1, 3] {
        let (place, gone) = places.enter(from("10.0.0.1")).unwrap();
        assert_eq!(gone, Some(from("10.0.0.1")));
        place.spoke();
        later.push(place);
        assert!(!stays(&own[expected]) && stays(&own[0]) && stays(&own[2]));
    }
    later.push(enter(&places, "10.0.0.1"));
    assert!(!stays(&own[0]) && stays(&own[2]), "all speak: the oldest goes");
    assert!(stays(&other) && later.iter().all(stays));
}

#[test]
fn where_all_places_are_taken_one_of_the_source_with_most_goes() {
    let places = DoorPlaces::new(LIMITS);
    let honest = enter(&places, "10.0.0.9");
    let many: Vec<_> = (0..4).map(|_| enter(&places, "10.0.0.1")).collect();
    let some: Vec<_> = (0..3).map(|_| enter(&places, "10.0.0.2")).collect();
    many.iter().for_each(DoorPlace::spoke);
    let (_place, gone) = places.enter(from("10.0.0.3")).unwrap();
    assert_eq!(gone, Some(from("10.0.0.1")), "though these speak, and others do not");
    assert!(stays(&honest) && some.iter().all(stays) && !stays(&many[0]));
    // However many come of a source, its own go.
    for _ in 0..1000 {
        let _ = enter(&places, "10.0.0.2");
    }
    assert!(stays(&honest), "a silent one of a source that has one");
}

#[test]
fn what_proved_a_secret_is_in_no_strangers_reach_and_followers_have_a_half() {
    let places = DoorPlaces::new(LIMITS);
    let proved = |rights| {
        let place = enter(&places, "10.0.0.1");
        place.proved(rights).then_some(place)
    };
    let mut held = vec![proved(DoorGuest::Follower).unwrap(), proved(DoorGuest::Follower).unwrap()];
    assert!(proved(DoorGuest::Follower).is_none());
    held.extend([proved(DoorGuest::Member).unwrap(), proved(DoorGuest::Member).unwrap()]);
    assert!(proved(DoorGuest::Member).is_none());
    for _ in 0..100 {
        let _ = enter(&places, "10.0.0.1");
    }
    let strangers: Vec<_> = (0..20).map(|n| enter(&places, &format!("10.0.1.{n}"))).collect();
    assert!(held.iter().all(|place| stays(place) && place.proved(DoorGuest::Follower)));
    assert!(!strangers[0].proved(DoorGuest::Member), "it is cut by now");
    drop(held.pop());
    drop(proved(DoorGuest::Member).unwrap());
    drop(held.remove(0));
    proved(DoorGuest::Follower).unwrap();
    drop((held, strangers));
    let taken = lock(&places.taken);
    assert_eq!((taken.unproved.len(), taken.proved, taken.followers), (0, 0, 0));
}

#[test]
fn connections_for_forwarded_requests_take_nothing_of_the_others() {
    let places = DoorPlaces::new(LIMITS);
    let enter = || enter(&places, "10.0.0.1");
    let forwards = enter();
    assert!(forwards.proved(DoorGuest::Forwards) && !enter().proved(DoorGuest::Forwards));
    let members: Vec<_> = (0..LIMITS.proved).map(|_| enter()).collect();
    assert!(members.iter().all(|place| place.proved(DoorGuest::Member)));
    drop((forwards, members));
    assert!(enter().proved(DoorGuest::Forwards));
    assert_eq!(lock(&places.taken).forwards, 0);
}

#[test]
fn who_proved_nothing_gives_way_to_what_needs_a_descriptor() {
    let places = DoorPlaces::new(LIMITS);
    assert!(!places.give_way());
    let [proved, stranger] = [enter(&places, "10.0.0.1"), enter(&places, "10.0.0.1")];
    assert!(proved.proved(DoorGuest::Member));
    assert!(places.give_way() && !stays(&stranger) && stays(&proved));
    assert!(!places.give_way() && stays(&proved));
}

#[test]
fn a_network_of_ipv6_is_one_source() {
    assert_eq!(from("2001:db8:1:2::1"), from("2001:db8:1:2:ffff::9"));
    assert_ne!(from("2001:db8:1:2::1"), from("2001:db8:1:3::1"));
    assert_eq!(from("::ffff:10.0.0.1"), from("10.0.0.1"));
    assert_ne!(from("10.0.0.2"), from("10.0.0.1"));
    assert_eq!(from("2001:db8:1:2::1").to_string(), "2001:db8:1:2::/64");
}

#[tokio::test(start_paused = true)]
async fn who_proves_nothing_has_to_go_after_a_while() {
    let places = DoorPlaces::new(LIMITS);
    let [silent, proved, cut] = [1, 2, 3].map(|n| enter(&places, &format!("10.0.0.{n}")));
    assert!(proved.proved(DoorGuest::Member));
    places.give_way();
    let began = Instant::now();
    // The oldest went.
    silent.lost().await;
    assert!(began.elapsed() < PROOF_LIMIT);
    cut.lost().await;
    assert!(began.elapsed() >= PROOF_LIMIT);
    let longer = tokio::time::timeout(10 * PROOF_LIMIT, proved.lost()).await;
    assert!(longer.is_err(), "what proved a secret stays");
}

#[tokio::test]
async fn who_says_a_whole_first_record_of_tls_has_spoken() {
    let places = DoorPlaces::new(LIMITS);
    let record = [&[22, 3, 1, 0, 100][..], &[7; 100]].concat();
    for (said, whole) in [(&record[..], true), (&record[..104], false), (&[22], false), (&[0; 4096], false)] {
        for piece in [1, 3, 4096] {
            let place = enter(&places, "10.0.0.1");
            let (mut theirs, ours) = duplex(4096);
            theirs.write_all(said).await.unwrap();
            drop(theirs);
            let mut ours = Guarded::new(ours, &place);
            let mut bytes = vec![0; piece];
            while ours.read(&mut bytes).await.unwrap() > 0 {}
            assert_eq!(lock(&places.taken).unproved[&place.0.number].spoke, whole, "{}", said.len());
        }
    }
}

#[tokio::test]
async fn little_is_read_before_a_secret_is_proved() {
    let places = DoorPlaces::new(LIMITS);
    for proves in [false, true] {
        let place = enter(&places, "10.0.0.1");
        let (mut theirs, ours) = duplex(4096);
        let sending = tokio::spawn(async move {
            let _ = theirs.write_all(&vec![0; 4 * UNPROVED_MAX_BYTES]).await;
        });
        let mut ours = Guarded::new(ours, &place);
        let mut whole = vec![0; UNPROVED_MAX_BYTES];
        ours.read_exact(&mut whole).await.unwrap();
        if proves {
            assert!(place.proved(DoorGuest::Member));
        }
        let rest = ours.read_to_end(&mut Vec::new()).await;
        assert_eq!(rest.is_ok(), proves, "{rest:?}");
        drop(ours);
        sending.await.unwrap();
    }
}
