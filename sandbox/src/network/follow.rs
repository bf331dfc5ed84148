//! Follows a namespace that a sandbox has: interfaces, addresses, routes and rules that come or go there later come and go in
//! the guest.
//!
//! The kernel announces changes; what it announces is not looked at, only that there was something. Then the namespace is
//! looked at anew. An interface that has gone goes first, since another one may come under its name: the agent is told,
//! lets go of the device, and the VMM takes it off the bus. One that has come, and is up, gets a tap as those from the
//! start did; the VMM puts it on the bus and the agent finds it there. In the end the agent is told of the namespace as it is
//! now, if that is another description than before.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hull_protocol::agent::{self as wire, AddDeviceRequest, RemoveDeviceRequest};
use hull_vmm_api::config::{NetConfig, Resource};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::task::JoinHandle;

use super::attachment::{HostEnd, Joined, MAX_INTERFACES, Place, describe_links, is_for_guest};
use super::describe::{self, Link};
use super::error::{NetworkError, interface_step, namespace_step};
use super::netlink::Netlink;
use super::redirect;
use crate::agent::{Agent, AgentError, answer, long, short};
use crate::control::{Control, ControlError, Request, Response};

/// Groups of announcements (`<linux/rtnetlink.h>`): links, addresses, routes and rules of both families. Neighbours are
/// left out: the host's own discoveries among them never end.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// How long things must have been quiet before they are looked at: changes come in bursts.
const QUIET: Duration = Duration::from_millis(20);
/// How long a burst may last before it is looked at all the same.
const PATIENCE: Duration = Duration::from_secs(1);
/// Enough for one announcement; the rest of a longer one is of no interest.
const ANNOUNCEMENT_BYTES: usize = 4096;

/// Listens in a namespace. Announcements wait in here until [`start`](Self::start).
#[derive(Debug)]
pub(super) struct Follower {
    /// A netlink socket. The type is that of other sockets with datagrams, since tokio has none for these, and receiving is
    /// the same for all.
    socket: UnixDatagram,
    netlink: Netlink,
}

/// Following, until it is dropped.
#[derive(Debug)]
pub(super) struct Following(JoinHandle<()>);

/// What is known of the namespace and its guest.
pub(super) struct Known {
    pub(super) place: Place,
    pub(super) joined: Vec<Joined>,
    /// What the agent has been told, and has done.
    pub(super) told: wire::Network,
    pub(super) agent: Agent,
    /// The VMM's control socket.
    pub(super) control: PathBuf,
}

/// A change that is not followed.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("the guest refuses: {0}")]
    Agent(#[from] AgentError),
}

impl Follower {
    /// Listens in the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // rtnetlink is the protocol with the number 0.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        let groups = GROUPS.iter().fold(0, |groups, group| groups | 1 << (group - 1));
        bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { socket: socket.into(), netlink: Netlink::open()? })
    }

    /// Follows from what is known. In a tokio runtime.
    pub(super) fn start(self, known: Known) -> io::Result<Following> {
        let Self { socket, netlink } = self;
        let socket = tokio::net::UnixDatagram::from_std(socket)?;
        Ok(Following(tokio::spawn(follow(socket, Followed::new(netlink, known)))))
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn follow(socket: tokio::net::UnixDatagram, mut followed: Followed) {
    loop {
        if let Err(error) = quiet(&socket).await {
            tracing::warn!("changes of the network are not followed any more: {error}");
            return;
        }
        // The next change brings another try.
        if let Err(error) = followed.catch_up().await {
            tracing::warn!("a change of the network is not followed: {error}");
        }
    }
}

struct Followed {
    netlink: Netlink,
    /// How many interfaces there have been, for their devices' names.
    made: usize,
    /// Taps of Hull's own: one stays for a while after its interface has gone, until the VMM has let go of it.
    taps: HashSet<u32>,
    /// Those that could not be taken, of which it has been said.
    refused: HashSet<u32>,
    /// Those of the interfaces that there are. They announce no changes, so they stay as they were found.
    sysctls: HashMap<String, String>,
    place: Place,
    joined: Vec<Joined>,
    /// What the guest has; None after the agent has refused a part of it.
    told: Option<wire::Network>,
    agent: Agent,
    control: PathBuf,
}

impl Followed {
    fn new(netlink: Netlink, known: Known) -> Self {
        let Known { place, joined, told, agent, control } = known;
        Self {
            netlink,
            made: joined.len(),
            taps: joined.iter().map(|joined| joined.tap).collect(),
            refused: HashSet::new(),
            sysctls: told.sysctls.clone(),
            place,
            joined,
            told: Some(told),
            agent,
            control,
        }
    }

    /// Brings the guest up to what the namespace has. A step that fails keeps no other waiting; the first error is the one
    /// to tell of.
    async fn catch_up(&mut self) -> Result<(), FollowError> {
        let links = describe::links(&mut self.netlink).map_err(namespace_step("list the interfaces"))?;
        let is_here = |index: &u32| links.iter().any(|link| link.index == *index);
        self.refused.retain(is_here);
        self.taps.retain(is_here);
        let parted = self.part(&links).await;
        for link in &links {
            if self.joined.iter().any(|joined| joined.link.index == link.index)
                || self.taps.contains(&link.index)
                || self.refused.contains(&link.index)
            {
                continue;
            }
            let joined = match is_for_guest(link, &links) {
                Ok(false) => continue,
                Ok(true) => self.join(link).await,
                Err(error) => Err(error.into()),
            };
            if let Err(error) = joined {
                self.refused.insert(link.index);
                tracing::warn!("an interface that has come is not taken: {error}");
            }
        }
        let adapted = self.adapt(&links).await;
        let told = self.tell(&links).await;
        parted.and(adapted).and(told)
    }

    /// Lets go of the interfaces that are not among `links` any more.
    async fn part(&mut self, links: &[Link]) -> Result<(), FollowError> {
        let is_here = |joined: &Joined| links.iter().any(|link| link.index == joined.link.index);
        let (here, gone) = std::mem::take(&mut self.joined).into_iter().partition(is_here);
        self.joined = here;
        let gone: Vec<Joined> = gone;
        if gone.is_empty() {
            return Ok(());
        }
        let mut outcome = Ok(());
        for joined in &gone {
            let of_interface = |path: &String| path.split('/').any(|part| part == joined.link.name);
            self.sysctls.retain(|path, _| !of_interface(path));
            let forgotten = self.place.forget(joined.link.index);
            outcome = outcome.and(forgotten.map_err(FollowError::from));
        }
        // Whatever the guest says of it: what is gone is gone.
        let told = self.tell(links).await;
        outcome = outcome.and(told);
        for joined in gone {
            let unplugged = self.unplug(&joined.device).await;
            outcome = outcome.and(unplugged);
        }
        outcome
    }

    /// Gives the guest an interface that has come.
    async fn join(&mut self, link: &Link) -> Result<(), FollowError> {
        if self.joined.len() == MAX_INTERFACES {
            return Err(NetworkError::TooMany { found: MAX_INTERFACES + 1, most: MAX_INTERFACES }.into());
        }
        let (joined, end, sysctls) = self.place.join(link, format!("net{}", self.made))?;
        self.made += 1;
        self.taps.insert(joined.tap);
        let plugged = self.plug(&joined.device, end).await;
        if let Err(error) = plugged {
            self.place.let_go(&mut self.netlink, link.index);
            return Err(error);
        }
        self.joined.push(joined);
        self.sysctls.extend(sysctls);
        Ok(())
    }

    /// Takes over the MTUs that interfaces have now, whether they do without ARP and whether their links are up.
    async fn adapt(&mut self, links: &[Link]) -> Result<(), FollowError> {
        let mut outcome = Ok(());
        for at in 0..self.joined.len() {
            let Some(now) = links.iter().find(|link| link.index == self.joined[at].link.index) else { continue };
            let resized = self.resize(at, now.mtu);
            self.joined[at].link.no_arp = now.no_arp;
            let set = self.set_carrier(at, now.has_carrier).await;
            outcome = outcome.and(resized).and(set);
        }
        outcome
    }

    /// Takes over an MTU, as far as the guest's device allows for it.
    fn resize(&mut self, at: usize, mtu: u32) -> Result<(), FollowError> {
        let joined = &mut self.joined[at];
        let mtu = mtu.min(joined.most_mtu);
        if mtu != joined.link.mtu {
            redirect::resize(&mut self.netlink, joined.tap, mtu)
                .map_err(interface_step(&joined.link.name, "change the MTU of the tap beside it"))?;
            joined.link.mtu = mtu;
        }
        Ok(())
    }

    async fn set_carrier(&mut self, at: usize, up: bool) -> Result<(), FollowError> {
        let Joined { link, device, .. } = &self.joined[at];
        if up != link.has_carrier {
            self.call(Request::SetLink { id: device.clone(), up }, Vec::new()).await?;
            self.joined[at].link.has_carrier = up;
        }
        Ok(())
    }

    /// Tells the agent what the namespace has, whose interfaces are `links`, if that is news.
    async fn tell(&mut self, links: &[Link]) -> Result<(), FollowError> {
        let taken: Vec<Link> = self.joined.iter().map(|joined| joined.link.clone()).collect();
        let described = describe_links(&mut self.netlink, &taken, links)?;
        let described = wire::Network { sysctls: self.sysctls.clone(), ..described };
        if self.told.as_ref() != Some(&described) {
            self.told = None;
            self.agent.update_network(&described).await?;
            self.told = Some(described);
        }
        Ok(())
    }

    /// Puts a device on the guest's bus, and waits until the guest has it.
    async fn plug(&self, device: &str, end: HostEnd) -> Result<(), FollowError> {
        let HostEnd { backend, queues, mac, mtu, link_down } = end;
        let attached = (0..queues.len()).map(Resource::Attached).collect();
        let net = NetConfig { id: device.to_owned(), backend, queues: attached, mac, mtu, link_down };
        let Response::Added { pci_address } = self.call(Request::AddNet(net), queues).await? else {
            return Err(ControlError::Connection(io::ErrorKind::InvalidData.into()).into());
        };
        let request = AddDeviceRequest { pci_address, ..Default::default() };
        if let Err(error) = answer("AddDevice", self.agent.sandbox.add_device(long(), &request).await) {
            self.unplug(device).await?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes a device off the guest's bus, and lets go of its tap with it, even if the guest does not.
    async fn unplug(&self, device: &str) -> Result<(), FollowError> {
        if let Response::Status(status) = self.call(Request::Status, Vec::new()).await?
            && let Some(found) = status.devices.into_iter().find(|found| found.id == device)
        {
            let request = RemoveDeviceRequest { pci_address: found.pci_address, ..Default::default() };
            match answer("RemoveDevice", self.agent.sandbox.remove_device(short(), &request).await) {
                Err(error) if !error.is_not_found() => {
                    tracing::warn!("the guest does not let go of {device}: {error}");
                }
                _ => {}
            }
        }
        self.call(Request::RemoveDevice { id: device.to_owned() }, Vec::new()).await?;
        Ok(())
    }

    async fn call(&self, request: Request, files: Vec<OwnedFd>) -> Result<Response, ControlError> {
        let control = self.control.clone();
        // The VMM answers soon, but this thread has others to serve.
        let called = tokio::task::spawn_blocking(move || Control::connect(&control)?.call_with(&request, &files));
        called.await.map_err(|error| ControlError::Connection(error.into()))?
    }
}

/// Waits for an announcement, and then until there has been none for a while.
async fn quiet(socket: &tokio::net::UnixDatagram) -> io::Result<()> {
    drain(socket).await?;
    let patience = Instant::now() + PATIENCE;
    while Instant::now() < patience {
        match tokio::time::timeout(QUIET, drain(socket)).await {
            Ok(more) => more?,
            Err(_quiet) => break,
        }
    }
    Ok(())
}

/// Takes announcements away, once there is one.
async fn drain(socket: &tokio::net::UnixDatagram) -> io::Result<()> {
    let mut announcement = [0; ANNOUNCEMENT_BYTES];
    socket.readable().await?;
    loop {
        match socket.try_recv(&mut announcement) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // More than the socket holds: something was announced, and that is all that counts.
            Err(error) if rustix::io::Errno::from_io_error(&error) == Some(rustix::io::Errno::NOBUFS) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    use hull_vmm_api::control::{State, Status};
    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    use super::super::tests::{Namespace, namespace, noted};
    use super::super::{NOTE, inside, open};
    use super::*;

    /// What is followed for a guest whose agent has died.
    struct Scene {
        namespace: Namespace,
        followed: Followed,
        /// What the VMM was asked.
        asked: mpsc::Receiver<Request>,
        dir: tempfile::TempDir,
    }

    /// A VMM that refuses to change anything.
    fn refusing_vmm(socket: &std::path::Path) -> mpsc::Receiver<Request> {
        let (tell, asked) = mpsc::channel();
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let mut line = String::new();
                stream.read_line(&mut line).unwrap();
                let request: Request = serde_json::from_str(&line).unwrap();
                let response = match request {
                    Request::Status => {
                        Response::Status(Status { state: State::Running, cpus: 1, memory_mib: 64, devices: Vec::new() })
                    }
                    _ => Response::Error { message: "not today".to_owned() },
                };
                if tell.send(request).is_err() {
                    return;
                }
                let answer = serde_json::to_string(&response).unwrap() + "\n";
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
        });
        asked
    }

    impl Scene {
        fn new(namespace: Option<Namespace>) -> Option<Self> {
            let namespace = namespace?;
            let dir = tempfile::tempdir().unwrap();
            let control = dir.path().join("control");
            let asked = refusing_vmm(&control);
            let handle = open(&namespace.path).unwrap();
            let netlink = inside(&namespace.path, &handle, || Netlink::open().unwrap()).unwrap();
            let place = Place::new(&namespace.path, handle, 1, dir.path().join(NOTE), Some((0, 0)));
            let (stream, _) = tokio::net::UnixStream::pair().unwrap();
            let agent = Agent::over(stream, &control);
            let known = Known { place, joined: Vec::new(), told: wire::Network::default(), agent, control };
            Some(Self { namespace, followed: Followed::new(netlink, known), asked, dir })
        }

        /// Has the guest have an interface from the start; answers what the VMM has of it.
        fn take(&mut self, name: &str) -> HostEnd {
            let links = describe::links(&mut self.namespace.netlink).unwrap();
            let link = links.iter().find(|link| link.name == name).unwrap();
            let device = format!("net-{name}");
            let (joined, end, _) = self.followed.place.join(link, device).unwrap();
            self.followed.taps.insert(joined.tap);
            self.followed.joined.push(joined);
            end
        }

        fn noted(&self) -> Vec<u32> {
            noted(&self.dir.path().join(NOTE))
        }

        /// The devices that the VMM was asked to add, with a plus, or remove, with a minus.
        fn asked(&self) -> Vec<String> {
            let device = |request| match request {
                Request::AddNet(net) => Some(format!("+{}", net.id)),
                Request::RemoveDevice { id } => Some(format!("-{id}")),
                _ => None,
            };
            self.asked.try_iter().filter_map(device).collect()
        }
    }

    /// Runs in a runtime for this one thread.
    fn run(work: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
    }

    #[test]
    fn all_that_has_gone_is_taken_off_the_bus_and_its_taps_are_nothing_that_has_come() {
        run(async {
            let Some(mut scene) = Scene::new(Namespace::new()) else { return };
            // The VMM holds the taps, now and afterwards.
            let _ends = ["eth0", "peer"].map(|name| scene.take(name));
            assert_eq!(scene.noted().len(), 2);
            let mut eth0 = LinkMessage::default();
            eth0.header.index = scene.namespace.index("eth0").unwrap();
            // Its other end goes with it.
            scene.namespace.netlink.call(RouteNetlinkMessage::DelLink(eth0), 0).unwrap();
            for (asked, is_done) in [(&["-net-eth0", "-net-peer"][..], false), (&[], true)] {
                assert_eq!(scene.followed.catch_up().await.is_ok(), is_done);
                assert_eq!(scene.asked(), asked);
                assert!(scene.namespace.index("hull1").is_some() && scene.namespace.index("hull2").is_none());
                assert_eq!((scene.noted(), scene.followed.refused.len()), (vec![], 0));
            }
        });
    }

    #[test]
    fn an_interface_that_the_guest_does_not_get_is_let_go() {
        run(async {
            let Some(mut scene) = Scene::new(namespace()) else { return };
            let eth0 = scene.namespace.index("eth0").unwrap();
            for asked in [&["+net0"][..], &[]] {
                scene.followed.catch_up().await.unwrap();
                assert_eq!(scene.asked(), asked);
                assert_eq!(scene.noted(), [0; 0]);
                assert_eq!(scene.namespace.found(), redirect::Found::Nothing);
                assert!(scene.followed.refused.contains(&eth0));
            }
        });
    }

    #[test]
    fn an_mtu_is_taken_over_up_to_the_one_with_which_the_interface_came() {
        run(async {
            let Some(mut scene) = Scene::new(Namespace::new()) else { return };
            let _ends = ["eth0", "peer"].map(|name| scene.take(name));
            for (mtu, of_guest) in [(1600, 1450), (1400, 1400), (1500, 1450)] {
                let mut change = LinkMessage::default();
                change.header.index = scene.namespace.index("eth0").unwrap();
                change.attributes.push(LinkAttribute::Mtu(mtu));
                scene.namespace.netlink.call(RouteNetlinkMessage::SetLink(change), 0).unwrap();
                scene.followed.catch_up().await.unwrap_err();
                assert_eq!(scene.followed.joined[0].link.mtu, of_guest);
                let links = describe::links(&mut scene.namespace.netlink).unwrap();
                let tap = links.iter().find(|link| link.index == scene.followed.joined[0].tap).unwrap();
                assert_eq!(tap.mtu, of_guest);
            }
        });
    }
}
