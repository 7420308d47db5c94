//! Where the ranks of one group meet when each is a process: rank 0 listens, the others connect, and all exchange small
//! blobs (handles of their buffers) through it. Nothing here knows of GPUs.
//!
//! A rank first says who it is: protocol and crate version, rank, number of ranks, and the digest of its kernel. Rank 0 answers when all have come, or says to all that came why the group cannot be.

use std::fmt;
use std::fs::{self, Metadata};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What went wrong while ranks met.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RendezvousError {
    /// The address cannot be used.
    #[error("rendezvous address `{address}`: {problem}; it must be `unix:PATH` or `tcp:127.0.0.1:PORT`")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The rank is none of the group's.
    #[error("rank {rank} of {ranks}; ranks are 0 to {}", ranks.saturating_sub(1))]
    Rank {
        /// The rank.
        rank: usize,
        /// Number of ranks.
        ranks: usize,
    },
    /// Ranks that did not come, or went silent.
    #[error("{} did not come to {address} within {waited:?}", list(.missing))]
    Missing {
        /// The ranks.
        missing: Vec<usize>,
        /// Where they were expected.
        address: String,
        /// How long they were waited for.
        waited: Duration,
    },
    /// Rank 0 was not there, and whether it will come or has been there cannot be told.
    #[error(
        "rank 0 was not at {address} within {waited:?}; it has not been started, or has given up waiting and is gone"
    )]
    Nobody {
        /// Where it was expected.
        address: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A rank that does not fit the others.
    #[error("rank {rank} has {what} {theirs}, rank 0 has {ours}; all ranks must have the same")]
    Mismatch {
        /// The rank.
        rank: usize,
        /// What differs.
        what: &'static str,
        /// That rank's.
        theirs: String,
        /// Rank 0's.
        ours: String,
    },
    /// Two processes with the same rank.
    #[error("two processes came as rank {rank}; every process must have a rank of its own")]
    Twice {
        /// The rank.
        rank: usize,
    },
    /// A rank that cannot do its part.
    #[error("rank {rank} could not make its part of the {what}; its own error says why")]
    NotReady {
        /// The rank.
        rank: usize,
        /// What was made.
        what: &'static str,
    },
    /// Rank 0 says that the group cannot be.
    #[error("rank 0 reports: {reason}")]
    Refused {
        /// Its reason.
        reason: String,
    },
    /// A rank's connection broke.
    #[error("rank {rank} left the group: {source}")]
    Left {
        /// The rank.
        rank: usize,
        /// The reason.
        source: io::Error,
    },
    /// The operating system refused the address.
    #[error("cannot meet at {address}: {source}")]
    Io {
        /// The address.
        address: String,
        /// The reason.
        source: io::Error,
    },
}

fn list(ranks: &[usize]) -> String {
    let plural = if ranks.len() == 1 { "" } else { "s" };
    format!("rank{plural} {}", ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))
}

type Result<T> = std::result::Result<T, RendezvousError>;

/// A meeting point on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RendezvousAddress {
    /// A Unix socket: only users who may write to it can join.
    Unix(PathBuf),
    /// A port of the loopback interface: every user of the machine can join.
    Tcp(SocketAddr),
}

impl FromStr for RendezvousAddress {
    type Err = RendezvousError;

    fn from_str(address: &str) -> Result<Self> {
        let wrong = |problem: &str| RendezvousError::Address { address: address.into(), problem: problem.into() };
        match address.split_once(':') {
            Some(("unix", "")) => Err(wrong("the path is empty")),
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("tcp", host)) => match host.parse::<SocketAddr>() {
                Ok(socket) if !socket.ip().is_loopback() => Err(wrong("not on this machine's loopback interface")),
                Ok(socket) if socket.port() == 0 => Err(wrong("port 0 is not one that others can know")),
                Ok(socket) => Ok(Self::Tcp(socket)),
                Err(_) => Err(wrong("no IP address and port")),
            },
            _ => Err(wrong("no kind")),
        }
    }
}

impl fmt::Display for RendezvousAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(socket) => write!(f, "tcp:{socket}"),
        }
    }
}

/// Who comes to a rendezvous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Its rank.
    pub rank: usize,
    /// Number of ranks of the group.
    pub ranks: usize,
    /// Digest of the kernel that it runs.
    pub digest: [u8; 32],
}

/// All ranks of a group, met.
#[derive(Debug)]
pub struct Rendezvous {
    member: Member,
    address: String,
    timeout: Duration,
    /// Rank 0: all others, in rank order. Another rank: rank 0.
    peers: Vec<Box<dyn Connection>>,
}

/// How long a member waits for rank 0 beyond the time in which rank 0 itself gives up, so that it hears why.
const GRACE: Duration = Duration::from_secs(1);
/// How long a connection may take to say who it is.
const HELLO_TIME: Duration = Duration::from_secs(2);
/// Between two looks at what is not there yet.
const PAUSE: Duration = Duration::from_millis(2);
/// Largest blob: what is exchanged is handles and addresses.
const MAX_BLOB: usize = 1 << 20;

impl Rendezvous {
    /// Waits until all ranks have come, at most `timeout` from now.
    ///
    /// # Errors
    /// [`RendezvousError`], naming the rank that did not come or does not fit, on every rank that came.
    pub fn join(address: &RendezvousAddress, member: Member, timeout: Duration) -> Result<Self> {
        let Member { rank, ranks, .. } = member;
        if rank >= ranks {
            return Err(RendezvousError::Rank { rank, ranks });
        }
        let mut group = Self { member, address: address.to_string(), timeout, peers: Vec::new() };
        match rank {
            0 => group.gather(address)?,
            _ => group.come(address)?,
        }
        Ok(group)
    }

    /// Who this process is.
    pub fn member(&self) -> Member {
        self.member
    }

    /// How long ranks wait for each other.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Gives every rank's `blob` to every rank, in rank order. All ranks call this together, with blobs of one size of
    /// at most 1 MiB.
    ///
    /// # Errors
    /// [`RendezvousError`], naming the rank that went away or went silent.
    pub fn exchange(&mut self, blob: &[u8]) -> Result<Vec<Vec<u8>>> {
        match self.member.rank {
            0 => {
                let result = self.collect(blob).and_then(|blobs| {
                    let together = blobs.concat();
                    self.send_to_all(&together)?;
                    Ok(blobs)
                });
                result.inspect_err(|error| self.refuse(error))
            }
            _ => {
                // Rank 0 may come late by one timeout, and then wait for another rank for one more.
                let deadline = Instant::now() + 2 * self.timeout + GRACE;
                let connection = &mut self.peers[0];
                if let Err(source) = write_frame(connection.as_mut(), Kind::Blob, blob) {
                    // Before rank 0 left, it said why; a rank that comes late finds that still waiting for it.
                    return Err(match self.hear(Instant::now() + GRACE) {
                        Err(refused @ RendezvousError::Refused { .. }) => refused,
                        _ => left(0, source),
                    });
                }
                let together = self.hear(deadline)?;
                if together.len() != blob.len() * self.member.ranks {
                    return Err(left(0, invalid("its answer has another size")));
                }
                Ok((0..self.member.ranks).map(|rank| together[rank * blob.len()..][..blob.len()].to_vec()).collect())
            }
        }
    }

    /// Rank 0: waits for the hellos of all others.
    fn gather(&mut self, address: &RendezvousAddress) -> Result<()> {
        let Member { ranks, .. } = self.member;
        if ranks == 1 {
            return Ok(());
        }
        let listener = Listener::bind(address).map_err(|source| self.io(source))?;
        let deadline = Instant::now() + self.timeout;
        let mut came: Vec<Option<Box<dyn Connection>>> = (1..ranks).map(|_| None).collect();
        let result = self.accept_all(&listener, &mut came, deadline);
        self.peers = came.into_iter().flatten().collect();
        result.and_then(|()| self.send_to_all(&[])).inspect_err(|error| self.refuse(error))
    }

    fn accept_all(
        &self,
        listener: &Listener,
        came: &mut [Option<Box<dyn Connection>>],
        deadline: Instant,
    ) -> Result<()> {
        while came.iter().any(Option::is_none) {
            if Instant::now() >= deadline {
                let missing = (1..).zip(came.iter()).filter(|(_, peer)| peer.is_none()).map(|(rank, _)| rank).collect();
                return Err(self.missing(missing));
            }
            let Some(mut connection) = listener.accept().map_err(|source| self.io(source))? else {
                sleep(PAUSE);
                continue;
            };
            // Whoever does not speak our protocol is not one of ours.
            let Ok(hello) = Hello::read(connection.as_mut(), deadline.min(Instant::now() + HELLO_TIME)) else {
                continue;
            };
            let checked = self.check(&hello, came);
            let place = checked.inspect_err(|error| refuse(connection.as_mut(), error))?;
            came[place] = Some(connection);
        }
        Ok(())
    }

    /// The newcomer's place among the others.
    fn check(&self, hello: &Hello, came: &[Option<Box<dyn Connection>>]) -> Result<usize> {
        let ours = Hello::of(&self.member);
        let rank = hello.rank as usize;
        let mismatch = |what, theirs: String, ours: String| RendezvousError::Mismatch { rank, what, theirs, ours };
        if (hello.protocol, hello.version) != (ours.protocol, ours.version) {
            return Err(mismatch("version", hello.version(), ours.version()));
        }
        if hello.ranks != ours.ranks {
            return Err(mismatch("a group of ranks", hello.ranks.to_string(), ours.ranks.to_string()));
        }
        if hello.digest != ours.digest {
            return Err(mismatch("a kernel with digest", hex(&hello.digest), hex(&ours.digest)));
        }
        match rank.checked_sub(1).map(|place| came.get(place)) {
            Some(Some(None)) => Ok(rank - 1),
            Some(None) => Err(RendezvousError::Rank { rank, ranks: self.member.ranks }),
            None | Some(Some(Some(_))) => Err(RendezvousError::Twice { rank }),
        }
    }

    /// Another rank: connects, says who it is, and waits for rank 0's answer.
    fn come(&mut self, address: &RendezvousAddress) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        let mut connection = loop {
            match connect(address) {
                Ok(connection) => break connection,
                Err(error) if !is_absence(&error) => return Err(self.io(error)),
                Err(_) => {
                    if let RendezvousAddress::Unix(path) = address {
                        // Rank 0 will not listen there either.
                        refuse_other_files(path).map_err(|source| self.io(source))?;
                    }
                    if Instant::now() >= deadline {
                        return Err(RendezvousError::Nobody { address: self.address.clone(), waited: self.timeout });
                    }
                    sleep(PAUSE);
                }
            }
        };
        connection.write_all(&Hello::of(&self.member).bytes()).map_err(|source| left(0, source))?;
        self.peers = vec![connection];
        // Rank 0 listened before now, so by then it has given up.
        self.hear(Instant::now() + self.timeout + GRACE).map(|_| ())
    }

    /// Rank 0: its own blob and all others'.
    fn collect(&mut self, blob: &[u8]) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + self.timeout;
        let mut blobs = vec![blob.to_vec()];
        for index in 0..self.peers.len() {
            let rank = index + 1;
            let (_, theirs) =
                read_frame(self.peers[index].as_mut(), deadline).map_err(|error| self.lost(rank, error))?;
            if theirs.len() != blob.len() {
                let (theirs, ours) = (theirs.len().to_string(), blob.len().to_string());
                return Err(RendezvousError::Mismatch { rank, what: "a blob of bytes", theirs, ours });
            }
            blobs.push(theirs);
        }
        Ok(blobs)
    }

    fn send_to_all(&mut self, payload: &[u8]) -> Result<()> {
        (1..)
            .zip(&mut self.peers)
            .try_for_each(|(rank, peer)| write_frame(peer.as_mut(), Kind::Blob, payload).map_err(|e| left(rank, e)))
    }

    /// Another rank: what rank 0 says.
    fn hear(&mut self, deadline: Instant) -> Result<Vec<u8>> {
        match read_frame(self.peers[0].as_mut(), deadline) {
            Ok((Kind::Blob, payload)) => Ok(payload),
            Ok((Kind::Refusal, reason)) => {
                Err(RendezvousError::Refused { reason: String::from_utf8_lossy(&reason).into_owned() })
            }
            Err(error) => Err(self.lost(0, error)),
        }
    }

    fn refuse(&mut self, error: &RendezvousError) {
        self.peers.iter_mut().for_each(|peer| refuse(peer.as_mut(), error));
    }

    fn lost(&self, rank: usize, error: io::Error) -> RendezvousError {
        match error.kind() {
            io::ErrorKind::TimedOut => self.missing(vec![rank]),
            _ => left(rank, error),
        }
    }

    fn missing(&self, missing: Vec<usize>) -> RendezvousError {
        RendezvousError::Missing { missing, address: self.address.clone(), waited: self.timeout }
    }

    fn io(&self, source: io::Error) -> RendezvousError {
        RendezvousError::Io { address: self.address.clone(), source }
    }
}

fn left(rank: usize, source: io::Error) -> RendezvousError {
    RendezvousError::Left { rank, source }
}

/// Tells a peer why there will be no group. It may be gone; then there is nobody to tell.
fn refuse(peer: &mut dyn Connection, error: &RendezvousError) {
    let _ = write_frame(peer, Kind::Refusal, error.to_string().as_bytes());
}

fn hex(digest: &[u8]) -> String {
    digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn invalid(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

/// The first thing that a rank says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hello {
    protocol: u32,
    rank: u32,
    ranks: u32,
    digest: [u8; 32],
    version: [u8; 16],
}

impl Hello {
    const MAGIC: [u8; 8] = *b"ferromoe";
    const BYTES: usize = 8 + 3 * 4 + 32 + 16;

    fn of(member: &Member) -> Self {
        let mut version = [0; 16];
        let text = env!("CARGO_PKG_VERSION").as_bytes();
        version[..text.len().min(16)].copy_from_slice(&text[..text.len().min(16)]);
        Self { protocol: 1, rank: member.rank as u32, ranks: member.ranks as u32, digest: member.digest, version }
    }

    fn version(&self) -> String {
        let text = self.version.split(|&byte| byte == 0).next().unwrap_or(&[]);
        format!("{} (protocol {})", String::from_utf8_lossy(text), self.protocol)
    }

    fn bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&Self::MAGIC);
        for (place, number) in bytes[8..20].chunks_exact_mut(4).zip([self.protocol, self.rank, self.ranks]) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes[20..52].copy_from_slice(&self.digest);
        bytes[52..].copy_from_slice(&self.version);
        bytes
    }

    fn read(connection: &mut dyn Connection, deadline: Instant) -> io::Result<Self> {
        let mut bytes = [0; Self::BYTES];
        read_all(connection, &mut bytes, deadline)?;
        if bytes[..8] != Self::MAGIC {
            return Err(invalid("no rank of a group"));
        }
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut hello =
            Self { protocol: number(8), rank: number(12), ranks: number(16), digest: [0; 32], version: [0; 16] };
        hello.digest.copy_from_slice(&bytes[20..52]);
        hello.version.copy_from_slice(&bytes[52..]);
        Ok(hello)
    }
}

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Blob = 0,
    Refusal = 1,
}

fn write_frame(connection: &mut dyn Connection, kind: Kind, payload: &[u8]) -> io::Result<()> {
    connection.write_all(&[kind as u8])?;
    connection.write_all(&(payload.len() as u32).to_le_bytes())?;
    connection.write_all(payload)
}

fn read_frame(connection: &mut dyn Connection, deadline: Instant) -> io::Result<(Kind, Vec<u8>)> {
    let mut header = [0; 5];
    read_all(connection, &mut header, deadline)?;
    let [kind, a, b, c, d] = header;
    let kind = if kind == Kind::Blob as u8 { Kind::Blob } else { Kind::Refusal };
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    if length > MAX_BLOB {
        return Err(invalid("a frame larger than 1 MiB"));
    }
    let mut payload = vec![0; length];
    read_all(connection, &mut payload, deadline)?;
    Ok((kind, payload))
}

/// Fills `bytes`, or fails with `TimedOut` at the deadline.
fn read_all(connection: &mut dyn Connection, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        connection.limit_reads(left)?;
        match connection.read(bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => bytes = &mut bytes[count..],
            // A timeout of a socket; the deadline decides.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A stream socket of either kind.
trait Connection: Read + Write + Send + fmt::Debug {
    fn limit_reads(&self, time: Duration) -> io::Result<()>;
}

impl Connection for UnixStream {
    fn limit_reads(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))
    }
}

impl Connection for TcpStream {
    fn limit_reads(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))
    }
}

fn connect(address: &RendezvousAddress) -> io::Result<Box<dyn Connection>> {
    let connection: Box<dyn Connection> = match address {
        RendezvousAddress::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            stream.set_write_timeout(Some(HELLO_TIME))?;
            Box::new(stream)
        }
        RendezvousAddress::Tcp(socket) => {
            let stream = TcpStream::connect(socket)?;
            stream.set_write_timeout(Some(HELLO_TIME))?;
            Box::new(stream)
        }
    };
    Ok(connection)
}

/// Rank 0 is not there yet.
fn is_absence(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, Interrupted, NotFound, WouldBlock};
    matches!(error.kind(), NotFound | ConnectionRefused | Interrupted | WouldBlock)
}

/// Where rank 0 listens, until all have come.
enum Listener {
    Unix { listener: UnixListener, _file: SocketFile },
    Tcp(TcpListener),
}

impl Listener {
    fn bind(address: &RendezvousAddress) -> io::Result<Self> {
        Ok(match address {
            RendezvousAddress::Unix(path) => {
                let listener = bind_unix(path)?;
                let file = SocketFile::of(path)?;
                listener.set_nonblocking(true)?;
                Self::Unix { listener, _file: file }
            }
            RendezvousAddress::Tcp(socket) => {
                let listener = TcpListener::bind(socket)?;
                listener.set_nonblocking(true)?;
                Self::Tcp(listener)
            }
        })
    }

    fn accept(&self) -> io::Result<Option<Box<dyn Connection>>> {
        let accepted = match self {
            Self::Unix { listener, .. } => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(HELLO_TIME))?;
                Ok(Box::new(stream) as Box<dyn Connection>)
            }),
            Self::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(HELLO_TIME))?;
                Ok(Box::new(stream) as Box<dyn Connection>)
            }),
        };
        match accepted {
            Ok(connection) => Ok(Some(connection)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            // The peer was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The file of a bound Unix socket, removed when the group has met; what others have put in its place meanwhile stays.
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(&fs::symlink_metadata(path)?) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity) {
            // It may be gone by now, which is what is wanted.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode: the same for one file under all its names.
fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Binds a Unix socket; one that a dead process left behind is replaced, and nothing else is.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            refuse_other_files(path)?;
            match UnixStream::connect(path) {
                Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path)?;
                    UnixListener::bind(path)
                }
                _ => Err(io::Error::new(error.kind(), "a process listens there already")),
            }
        }
        other => other,
    }
}

/// Refuses a path at which there is something other than a socket: no group can meet there, and it is not ours to remove.
fn refuse_other_files(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is something that is not a socket; it must be a new path, or a socket that a group left behind",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const SHORT: Duration = Duration::from_millis(300);
    const LONG: Duration = Duration::from_secs(20);

    fn member(rank: usize, ranks: usize) -> Member {
        Member { rank, ranks, digest: [7; 32] }
    }

    /// A fresh Unix address; the folder lives as long as the first value.
    fn unix() -> (tempfile::TempDir, RendezvousAddress) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("group");
        (folder, RendezvousAddress::Unix(path))
    }

    fn free_tcp() -> RendezvousAddress {
        RendezvousAddress::Tcp(TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())
    }

    /// Joins each member in a thread of its own and exchanges its rank, four times over.
    fn meet(address: &RendezvousAddress, members: &[Member], timeout: Duration) -> Vec<Result<Vec<Vec<u8>>>> {
        thread::scope(|scope| {
            let threads: Vec<_> = members
                .iter()
                .map(|&member| {
                    scope.spawn(move || {
                        let mut group = Rendezvous::join(address, member, timeout)?;
                        (0..3).try_for_each(|_| group.exchange(&[]).map(|_| ()))?;
                        group.exchange(&[member.rank as u8; 3])
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn message(result: &Result<Vec<Vec<u8>>>) -> String {
        result.as_ref().unwrap_err().to_string()
    }

    #[test]
    fn all_ranks_get_all_blobs_in_rank_order() {
        let (folder, address) = unix();
        for address in [address, free_tcp()] {
            let members = [3, 0, 2, 1].map(|rank| member(rank, 4));
            for result in meet(&address, &members, LONG) {
                assert_eq!(result.unwrap(), [[0; 3], [1; 3], [2; 3], [3; 3]]);
            }
        }
        assert_eq!(folder.path().read_dir().unwrap().count(), 0, "the socket is removed");
    }

    #[test]
    fn one_rank_meets_itself() {
        let (_folder, address) = unix();
        assert_eq!(meet(&address, &[member(0, 1)], SHORT)[0].as_ref().unwrap(), &[[0; 3]]);
    }

    #[test]
    fn the_ranks_that_do_not_come_are_named_to_all_that_do() {
        let (_folder, address) = unix();
        let results = meet(&address, &[member(0, 5), member(2, 5), member(3, 5)], SHORT);
        let expected = format!("ranks 1, 4 did not come to {address} within 300ms");
        assert_eq!(message(&results[0]), expected);
        for result in &results[1..] {
            assert_eq!(message(result), format!("rank 0 reports: {expected}"));
        }
    }

    #[test]
    fn without_rank_0_the_others_say_so() {
        for address in [unix().1, free_tcp()] {
            let results = meet(&address, &[member(1, 2)], SHORT);
            let expected =
                format!("rank 0 was not at {address} within 300ms; it has not been started, or has given up");
            assert!(message(&results[0]).starts_with(&expected), "{results:?}");
        }
    }

    #[test]
    fn a_rank_with_another_kernel_is_named() {
        let (_folder, address) = unix();
        let other = Member { digest: [8; 32], ..member(1, 2) };
        let results = meet(&address, &[member(0, 2), other], LONG);
        let expected = "rank 1 has a kernel with digest 0808080808080808, rank 0 has 0707070707070707; \
                        all ranks must have the same";
        assert_eq!(message(&results[0]), expected);
        assert_eq!(message(&results[1]), format!("rank 0 reports: {expected}"));
    }

    #[test]
    fn a_rank_of_a_group_of_another_size_is_named() {
        let (_folder, address) = unix();
        let results = meet(&address, &[member(0, 2), member(1, 3)], LONG);
        assert!(message(&results[0]).starts_with("rank 1 has a group of ranks 3, rank 0 has 2"), "{results:?}");
    }

    #[test]
    fn two_processes_of_one_rank_are_refused() {
        let (_folder, address) = unix();
        let results = meet(&address, &[member(0, 3), member(1, 3), member(1, 3)], LONG);
        for result in &results {
            assert!(message(result).contains("two processes came as rank 1"), "{result:?}");
        }
    }

    #[test]
    fn a_rank_outside_the_group_is_refused_before_it_goes_anywhere() {
        let (_folder, address) = unix();
        assert_eq!(message(&meet(&address, &[member(2, 2)], LONG)[0]), "rank 2 of 2; ranks are 0 to 1");
    }

    #[test]
    fn another_version_is_named() {
        let (_folder, address) = unix();
        thread::scope(|scope| {
            let rank_0 = scope.spawn(|| Rendezvous::join(&address, member(0, 2), LONG));
            let mut old = Hello::of(&member(1, 2));
            old.version = *b"0.0.9\0\0\0\0\0\0\0\0\0\0\0";
            let mut connection = loop {
                match connect(&address) {
                    Ok(connection) => break connection,
                    Err(_) => sleep(PAUSE),
                }
            };
            connection.write_all(&old.bytes()).unwrap();
            let (kind, reason) = read_frame(connection.as_mut(), Instant::now() + LONG).unwrap();
            assert_eq!(kind, Kind::Refusal);
            let reason = String::from_utf8(reason).unwrap();
            assert!(reason.starts_with("rank 1 has version 0.0.9 (protocol 1), rank 0 has "), "{reason}");
            assert_eq!(rank_0.join().unwrap().unwrap_err().to_string(), reason);
        });
    }

    #[test]
    fn who_does_not_speak_the_protocol_is_passed_over() {
        let (_folder, address) = unix();
        thread::scope(|scope| {
            let rank_0 = scope.spawn(|| Rendezvous::join(&address, member(0, 2), LONG));
            while connect(&address).and_then(|mut stranger| stranger.write_all(&[b'x'; 100])).is_err() {
                sleep(PAUSE);
            }
            Rendezvous::join(&address, member(1, 2), LONG).unwrap();
            rank_0.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_rank_that_leaves_or_goes_silent_is_named_to_all() {
        for leaves in [true, false] {
            let (_folder, address) = unix();
            let timeout = if leaves { LONG } else { SHORT };
            thread::scope(|scope| {
                let others = [0, 1].map(|rank| {
                    let address = &address;
                    scope.spawn(move || {
                        let mut group = Rendezvous::join(address, member(rank, 3), timeout).unwrap();
                        group.exchange(&[1]).unwrap_err().to_string()
                    })
                });
                let group = Rendezvous::join(&address, member(2, 3), timeout).unwrap();
                let kept = if leaves {
                    drop(group);
                    None
                } else {
                    Some(group)
                };
                let [rank_0, rank_1] = others.map(|thread| thread.join().unwrap());
                let expected = if leaves { "rank 2 left the group: " } else { "rank 2 did not come to " };
                assert!(rank_0.starts_with(expected), "{rank_0}");
                assert_eq!(rank_1, format!("rank 0 reports: {rank_0}"));
                drop(kept);
            });
        }
    }

    #[test]
    fn blobs_of_different_sizes_are_refused() {
        let (_folder, address) = unix();
        thread::scope(|scope| {
            let rank_0 = scope.spawn(|| Rendezvous::join(&address, member(0, 2), LONG).unwrap().exchange(&[1, 2]));
            let rank_1 = Rendezvous::join(&address, member(1, 2), LONG).unwrap().exchange(&[1]);
            let expected = "rank 1 has a blob of bytes 1, rank 0 has 2; all ranks must have the same";
            assert_eq!(message(&rank_0.join().unwrap()), expected);
            assert_eq!(message(&rank_1), format!("rank 0 reports: {expected}"));
        });
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
        let (_folder, address) = unix();
        let RendezvousAddress::Unix(path) = &address else { unreachable!() };
        drop(UnixListener::bind(path).unwrap());
        assert!(path.exists());
        assert!(meet(&address, &[member(0, 2), member(1, 2)], LONG).iter().all(std::result::Result::is_ok));

        let _other = UnixListener::bind(path).unwrap();
        let error = message(&meet(&address, &[member(0, 2)], SHORT)[0]);
        assert!(error.starts_with(&format!("cannot meet at {address}: ")), "{error}");
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone_and_named_to_every_rank() {
        let (folder, address) = unix();
        let RendezvousAddress::Unix(path) = &address else { unreachable!() };
        let dead = folder.path().join("dead");
        drop(UnixListener::bind(&dead).unwrap());
        let make: [&dyn Fn(); 4] = [
            &|| fs::write(path, "precious").unwrap(),
            &|| fs::create_dir(path).unwrap(),
            &|| std::os::unix::fs::symlink(&dead, path).unwrap(),
            &|| std::os::unix::fs::symlink("absent", path).unwrap(),
        ];
        for make in make {
            make();
            let before = fs::symlink_metadata(path).unwrap();
            for result in meet(&address, &[member(0, 2), member(1, 2)], LONG) {
                let error = message(&result);
                let expected = format!("cannot meet at {address}: there is something that is not a socket");
                assert!(error.starts_with(&expected), "{error}");
            }
            let after = fs::symlink_metadata(path).unwrap();
            assert_eq!((identity(&before), before.len()), (identity(&after), after.len()));
            if after.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) }.unwrap();
        }
        assert!(dead.exists());
    }

    #[test]
    fn what_took_the_sockets_place_stays() {
        let (_folder, address) = unix();
        let RendezvousAddress::Unix(path) = &address else { unreachable!() };
        let listener = Listener::bind(&address).unwrap();
        fs::remove_file(path).unwrap();
        fs::write(path, "precious").unwrap();
        drop(listener);
        assert_eq!(fs::read(path).unwrap(), b"precious");
    }

    /// Rank 2 comes to the exchange when the others have given up, and hears that it was waited for.
    #[test]
    fn a_rank_that_comes_late_to_an_exchange_hears_why_the_others_are_gone() {
        for address in [unix(), (tempfile::tempdir().unwrap(), free_tcp())] {
            let (_folder, address) = address;
            thread::scope(|scope| {
                let others = [0, 1].map(|rank| {
                    let address = &address;
                    scope.spawn(move || {
                        let mut group = Rendezvous::join(address, member(rank, 3), SHORT).unwrap();
                        group.exchange(&[1]).unwrap_err().to_string()
                    })
                });
                let mut late = Rendezvous::join(&address, member(2, 3), SHORT).unwrap();
                let [rank_0, _] = others.map(|thread| thread.join().unwrap());
                assert_eq!(rank_0, format!("rank 2 did not come to {address} within 300ms"));
                assert_eq!(late.exchange(&[1]).unwrap_err().to_string(), format!("rank 0 reports: {rank_0}"));
                let error = late.exchange(&[1]).unwrap_err().to_string();
                assert!(error.starts_with("rank 0 left the group: "), "{error}");
            });
        }
    }

    #[test]
    fn addresses_are_read_and_written_alike() {
        for text in ["unix:/run/group", "unix:a:b", "tcp:127.0.0.1:29500", "tcp:[::1]:80"] {
            assert_eq!(text.parse::<RendezvousAddress>().unwrap().to_string(), text);
        }
        for (text, problem) in [
            ("unix:", "the path is empty"),
            ("tcp:10.0.0.1:80", "loopback"),
            ("tcp:127.0.0.1:0", "port 0"),
            ("tcp:localhost", "no IP address and port"),
            ("/run/group", "no kind"),
            ("file:/run/group", "no kind"),
        ] {
            let error = text.parse::<RendezvousAddress>().unwrap_err().to_string();
            assert!(error.contains(problem) && error.contains(text), "{error}");
        }
    }
}
