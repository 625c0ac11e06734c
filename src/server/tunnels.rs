//! Places for channels that are inside of requests.

use std::sync::{Arc, Mutex};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::handshake::{Refusal, UsedHeads};
use crate::lock::lock;
use crate::secret::Rights;

/// Channels at one time: room for all the replicas and for peers that ask.
const TUNNELS_MAX: usize = 256;
/// Of these, channels of followers.
const FOLLOWERS_MAX: usize = TUNNELS_MAX / 2;
/// Channels in which no secret was proved yet.
const UNPROVED_MAX: usize = 32;

/// All places. Those in which nothing was proved yet are apart, so that they are in no member's
/// way.
#[derive(Debug)]
pub(super) struct Tunnels {
    unproved: Arc<Semaphore>,
    all: Arc<Semaphore>,
    followers: Arc<Semaphore>,
    used: UsedHeads,
}

/// The place of one channel, while that lasts.
#[derive(Debug)]
pub(super) struct TunnelPlace {
    tunnels: Arc<Tunnels>,
    held: Mutex<HeldPlace>,
}

#[derive(Debug)]
enum HeldPlace {
    Unproved(#[expect(dead_code, reason = "it is there to be dropped")] OwnedSemaphorePermit),
    Proved(#[expect(dead_code, reason = "they are there to be dropped")] Vec<OwnedSemaphorePermit>),
}

impl Tunnels {
    pub(super) fn new() -> Arc<Tunnels> {
        let places = |most| Arc::new(Semaphore::new(most));
        Arc::new(Tunnels {
            unproved: places(UNPROVED_MAX),
            all: places(TUNNELS_MAX),
            followers: places(FOLLOWERS_MAX),
            used: UsedHeads::default(),
        })
    }

    /// Heads that were used.
    pub(super) fn used(&self) -> &UsedHeads {
        &self.used
    }

    /// A place for a channel that begins.
    pub(super) fn begin(self: &Arc<Self>) -> Result<Arc<TunnelPlace>, Refusal> {
        let place = self.unproved.clone().try_acquire_owned().map_err(|_| Refusal::Busy)?;
        Ok(Arc::new(TunnelPlace { tunnels: self.clone(), held: Mutex::new(HeldPlace::Unproved(place)) }))
    }
}

impl TunnelPlace {
    /// A secret was proved inside.
    pub(super) fn proved(&self, rights: Rights) -> Result<(), Refusal> {
        let mut held = lock(&self.held);
        if let HeldPlace::Proved(_) = *held {
            return Ok(());
        }
        let Tunnels { all, followers, .. } = &*self.tunnels;
        let needed = [Some(all), (rights == Rights::Follower).then_some(followers)];
        let places = needed.into_iter().flatten().map(|of| of.clone().try_acquire_owned());
        *held = HeldPlace::Proved(places.collect::<Result<_, _>>().map_err(|_| Refusal::Busy)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_proves_nothing_is_in_no_members_way_and_followers_have_a_half() {
        let tunnels = Tunnels::new();
        let begin = || tunnels.begin();
        let strangers: Vec<_> = (0..UNPROVED_MAX).map(|_| begin().unwrap()).collect();
        assert_eq!(begin().unwrap_err(), Refusal::Busy);
        drop(strangers);
        let proved = |rights| {
            let place = begin().unwrap();
            place.proved(rights).map(|()| place)
        };
        let mut held: Vec<_> = (0..FOLLOWERS_MAX).map(|_| proved(Rights::Follower).unwrap()).collect();
        assert_eq!(proved(Rights::Follower).unwrap_err(), Refusal::Busy);
        held.extend((FOLLOWERS_MAX..TUNNELS_MAX).map(|_| proved(Rights::Member).unwrap()));
        assert_eq!(proved(Rights::Member).unwrap_err(), Refusal::Busy);
        held[0].proved(Rights::Follower).unwrap();
        held.pop();
        proved(Rights::Member).unwrap();
    }
}
