//! Which process has the other end of a connection.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::OnceLock;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// Of `linux/sock_diag.h`, `linux/netlink.h` and `netinet/in.h`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const AF_INET: u8 = 2;
const IPPROTO_TCP: u8 = 6;
/// The head of a message; and where the name of the descriptor is in the answer.
const HEAD_BYTES: usize = 16;
const INODE_AT: usize = HEAD_BYTES + 68;

/// The name that descriptors of the connection from this port to that one have, on the loopback
/// address. None: there is no such connection, or no process has it any more.
pub(super) fn descriptor(from: u16, to: u16) -> Option<String> {
    static ANSWERS: OnceLock<bool> = OnceLock::new();
    // The table of all connections costs ten milliseconds and more, also where there are few.
    let inode = match ANSWERS.get_or_init(answers) {
        true => asked(from, to).unwrap_or_else(|_| listed(from, to)),
        false => listed(from, to),
    }?;
    Some(format!("socket:[{inode}]"))
}

/// Whether a process has such a descriptor.
pub(super) fn has(process: u32, descriptor: &str) -> bool {
    let Ok(all) = std::fs::read_dir(format!("/proc/{process}/fd")) else { return false };
    all.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == Path::new(descriptor)))
}

/// Whether the system finds a connection that is there. Where it has no such table, it says of each
/// that there is none.
fn answers() -> bool {
    let made = || -> io::Result<Option<u32>> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        asked(stream.local_addr()?.port(), stream.peer_addr()?.port())
    };
    made().is_ok_and(|found| found.is_some())
}

/// Asks the system for this one connection. Not every sandbox lets a process do so.
fn asked(from: u16, to: u16) -> io::Result<Option<u32>> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(netlink::SOCK_DIAG))?;
    send(&socket, &question(from, to), SendFlags::empty())?;
    let mut answer = [0; 4096];
    let (_, bytes) = recv(&socket, &mut answer, RecvFlags::empty())?;
    let inode = answer[..bytes].get(INODE_AT..INODE_AT + 4).and_then(|inode| inode.try_into().ok());
    if answer[4..6] != SOCK_DIAG_BY_FAMILY.to_ne_bytes() {
        let error = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
        return match io::Error::from_raw_os_error(-error) {
            none if none.kind() == io::ErrorKind::NotFound => Ok(None),
            other => Err(other),
        };
    }
    Ok(inode.map(u32::from_ne_bytes).filter(|inode| *inode != 0))
}

/// A `nlmsghdr` and an `inet_diag_req_v2`.
fn question(from: u16, to: u16) -> Vec<u8> {
    let mut address = [0; 16];
    address[..4].copy_from_slice(&Ipv4Addr::LOCALHOST.octets());
    let mut body = vec![AF_INET, IPPROTO_TCP, 0, 0];
    // In any state; of any interface; whatever its cookie is.
    body.extend_from_slice(&u32::MAX.to_ne_bytes());
    body.extend_from_slice(&[from.to_be_bytes(), to.to_be_bytes()].concat());
    body.extend_from_slice(&[address, address].concat());
    body.extend_from_slice(&[0, u32::MAX, u32::MAX].map(u32::to_ne_bytes).concat());
    let length = (HEAD_BYTES + body.len()) as u32;
    let kind = [SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST].map(u16::to_ne_bytes).concat();
    [&length.to_ne_bytes()[..], &kind, &[0; 8], &body].concat()
}

/// Looks through all connections. Others may have the same port at one end, also one that has ended.
fn listed(from: u16, to: u16) -> Option<u32> {
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    let address = |port: u16| format!("0100007F:{port:04X}");
    let (local, remote) = (address(from), address(to));
    let line = table.lines().find(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next() == Some(&local) && words.next() == Some(&remote)
    })?;
    line.split_whitespace().nth(9)?.parse().ok().filter(|inode| *inode != 0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_connection_is_found_by_its_ports_in_both_ways() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let streams: Vec<_> = (0..50).map(|_| TcpStream::connect(to).unwrap()).collect();
        for stream in &streams {
            let from = stream.local_addr().unwrap().port();
            let link = std::fs::read_link(format!("/proc/self/fd/{}", stream.as_raw_fd())).unwrap();
            let found = descriptor(from, to.port()).unwrap();
            assert_eq!(Path::new(&found), link);
            assert!(has(std::process::id(), &found));
            // Also where the system answers no questions.
            let asked = answers().then(|| asked(from, to.port()).unwrap());
            for inode in asked.into_iter().chain([listed(from, to.port())]) {
                assert_eq!(inode.map(|inode| format!("socket:[{inode}]")).as_ref(), Some(&found));
            }
        }
    }

    #[test]
    fn one_that_is_not_there_is_not_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().port();
        assert_eq!((descriptor(1, to), listed(1, to)), (None, None));
    }
}
