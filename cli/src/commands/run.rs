//! `hull run`: a program from an image in a new virtual machine.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hull_sandbox::config::{SandboxConfig, check_name};
use hull_sandbox::container::Streams;
use hull_sandbox::host::Host;
use hull_sandbox::network::cni::{self, PortMapping};
use hull_sandbox::network::{Network, has_user};
use hull_sandbox::registry::{Phase, Record};
use hull_sandbox::root::{Base, Disk, Root, Writes};
use hull_sandbox::share::{RootSource, enter_mount_namespace};
use hull_sandbox::superblock::Kind;
use hull_settings::{RunNetwork, Settings};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::args::{ProcessOptions, Run};
use crate::image::{Image, Store};
use crate::mounts::Mounts;
use crate::spec::{self, Container, Program};
use crate::streams::Attach;
use crate::supervise::{Content, Files, Plan, interrupted, supervise};
use crate::{Error, Outcome, terminal};

/// The status of a program that Ctrl-C kept from starting: 128 + SIGINT.
const INTERRUPTED: u8 = 130;
/// The file in the state directory that has the network that was picked and said last.
const NETWORK_SAID: &str = "default-network";
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(super) fn run(args: Run, host: Host, settings: &Settings) -> Outcome {
    if args.detach && !args.detached_owner {
        choose_network(args.net.as_deref(), settings).tell(&host);
        return detach();
    }
    let detached = args.detached_owner;
    let network = choose_network(args.net.as_deref(), settings);
    if detached {
        // A session of its own keeps the owner from the signals of the user's terminal.
        rustix::process::setsid()?;
    }
    let prepared = (|| {
        if !detached {
            network.tell(&host);
        }
        // Before any thread exists: mounts made from here on end with this process.
        enter_mount_namespace()?;
        plan(args, &network.text, host, settings)
    })();
    let outcome = prepared.and_then(|Prepared { plan, images: _images }| {
        let id = plan.record.id.clone();
        let started = || {
            // Whoever asked may have gone, which is no reason to stop.
            if detached && let Err(error) = report(&format!("ok {id}")) {
                tracing::debug!("not reported: {error}");
            }
        };
        super::runtime()?.block_on(supervise(plan, started))
    });
    match outcome {
        Err(error) if interrupted(&error) => Ok(INTERRUPTED),
        Err(error) => {
            if detached {
                report(&format!("error {}", crate::one_line(&error.to_string())))?;
            }
            Err(error)
        }
        code => code,
    }
}

/// A plan, and what keeps the images' layers in the store while it is carried out.
struct Prepared {
    plan: Plan,
    images: Vec<Image>,
}

fn plan(args: Run, network: &str, host: Host, settings: &Settings) -> Result<Prepared, Error> {
    let mut words = args.words.into_iter();
    let store = Store::open(&host.data_dir)?;
    let image = match &args.rootfs {
        Some(_) => None,
        None => {
            let reference = words.next().ok_or("no image; name one, or a root directory with --rootfs")?;
            Some(store.resolve(&reference)?)
        }
    };
    let mut command: Vec<String> = words.collect();
    if command.first().is_some_and(|word| word == "--") {
        command.remove(0);
    }

    let id = random_id()?;
    let root = match (&args.rootfs, &image) {
        (Some(path), _) => root_at(path)?,
        (None, Some(image)) => Root::of_host(RootSource::Layers(image.layers().to_vec())),
        (None, None) => unreachable!("an image was resolved unless --rootfs is given"),
    };
    let root = match args.storage_size {
        Some(bytes) => with_disk(root, bytes)?,
        None => root,
    };
    let streams = streams(&args.process)?;
    let guest_user = guest_user(&args.process, image.as_ref(), &root);
    let program = program(&args.process, image.as_ref(), &root, command)?;
    let capabilities = crate::capabilities::held(&args.cap_add, &args.cap_drop)?;
    let program = Program { limits: args.ulimit, capabilities, ..program };
    let hostname = args.hostname.unwrap_or_else(|| id.clone());
    let mounts = Mounts::parse(&args.volume, &args.mount, &args.tmpfs, &args.disk)?;
    let mut mounted = mounts.images().map(|reference| store.resolve(reference)).collect::<Result<Vec<_>, _>>()?;
    let image_layers = mounted.iter().map(|image| image.layers().to_vec()).collect();
    let stop_signal = match image.as_ref().and_then(Image::stop_signal) {
        Some(name) => super::parse_signal(name)?,
        None => 15,
    };
    // What does not fit the field is too many in any case.
    let guest = &settings.guest;
    let wanted_cpus = args.cpus.unwrap_or(guest.default_vcpus.value.get());
    let cpus = u8::try_from(wanted_cpus).unwrap_or(u8::MAX);
    if u64::from(cpus) != wanted_cpus {
        return Err(hull_sandbox::config::ConfigError::Cpus(cpus).into());
    }
    let memory_mib = args.memory.unwrap_or(guest.default_memory_mib.value.get());
    let kernel_params = [guest.kernel_params.value.as_str(), &args.kernel_params];
    let kernel_params = kernel_params.into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(" ");
    args.name.as_deref().map_or(Ok(()), check_name)?;
    let name = match (&args.rootfs, &image) {
        (Some(directory), _) => directory.display().to_string(),
        (None, image) => image.as_ref().map(|image| image.name().to_owned()).unwrap_or_default(),
    };
    let record = Record {
        id: id.clone(),
        name: args.name.clone(),
        phase: Phase::Created,
        created_at_s: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        owner_pid: std::process::id(),
        vmm_pid: None,
        image: name,
        command: program.args.clone(),
        cpus,
        memory_mib,
        terminal: args.process.tty,
        stop_signal,
        exit_code: None,
        failure: None,
        process: spec::process(&program),
        guest_user,
        disks: mounts.disks.iter().map(|disk| disk.path.clone()).collect(),
    };
    let config = SandboxConfig {
        id,
        name: args.name,
        cpus,
        max_cpus: cpus,
        memory_mib,
        hostname: hostname.clone(),
        sysctls: HashMap::new(),
        kernel_params,
        network: parse_network(network, &args.publish)?,
        boot_timeout: Duration::from_secs(args.boot_timeout),
    };
    let files = Files { servers: args.dns, extra_hosts: args.add_host };
    let attach = if args.detached_owner { Attach::Nowhere } else { Attach::Own };
    let disks = mounts.disks.len();
    let container = Container { read_only: args.read_only, hostname, shm_bytes: args.shm_size, disks };
    let content = Content { root, container, mounts, image_layers, files };
    let plan = Plan { host, config, record, program, content, streams, attach, remove: args.rm };
    mounted.extend(image);
    Ok(Prepared { plan, images: mounted })
}

/// The root that `--rootfs` names.
fn root_at(path: &Path) -> Result<Root, Error> {
    let path = super::absolute(path)?;
    if std::fs::metadata(&path)?.is_dir() {
        return Ok(Root::of_host(RootSource::Directory(path)));
    }
    let kind = Kind::of_disk(&path)?;
    let read_only = kind.is_read_only();
    let disk = Disk { path, fstype: kind.name().to_owned(), options: Vec::new(), read_only };
    let writes = if read_only { Writes::Memory } else { Writes::Base };
    Ok(Root { base: Base::Disks(vec![disk]), writes, options: Vec::new() })
}

/// The same root, with changes going to a new disk instead.
fn with_disk(root: Root, bytes: u64) -> Result<Root, Error> {
    hull_sandbox::ext4::check_size(bytes)?;
    let base = match root.base {
        Base::Disks(disks) => Base::Disks(disks.into_iter().map(|disk| Disk { read_only: true, ..disk }).collect()),
        base @ Base::Host(_) => base,
    };
    // As for the layers of an image on the host: names of directories may be redirected freely, and what is written need not
    // survive the guest.
    Ok(Root {
        base,
        writes: Writes::NewDisk(bytes),
        options: vec!["redirect_dir=on".to_owned(), "volatile".to_owned()],
    })
}

/// Whom the user, or else the image, wants the program to run as.
fn wanted_user<'a>(options: &'a ProcessOptions, image: Option<&'a Image>) -> &'a str {
    options.user.as_deref().or(image.and_then(Image::user)).unwrap_or_default()
}

/// The same, where the guest is to look it up: in a root on disks, which only the guest reads, or one that changes on a disk.
fn guest_user(options: &ProcessOptions, image: Option<&Image>, root: &Root) -> Option<String> {
    let wanted = Some(wanted_user(options, image)).filter(|wanted| !wanted.is_empty()).unwrap_or("0");
    let is_guests = matches!(root.base, Base::Disks(_)) || root.writes != Writes::Base;
    is_guests.then(|| wanted.to_owned())
}

/// What the image says of its program, changed by what the user says.
fn program(
    options: &ProcessOptions,
    image: Option<&Image>,
    root: &Root,
    command: Vec<String>,
) -> Result<Program, Error> {
    let mut args: Vec<String> = image.map(|image| image.entrypoint().to_vec()).unwrap_or_default();
    if command.is_empty() {
        args.extend(image.map(|image| image.cmd().to_vec()).unwrap_or_default());
    } else {
        args.extend(command);
    }
    if args.is_empty() {
        return Err("no command; the image names none, so give one after it".into());
    }
    let mut env: Vec<String> = image.map(|image| image.env().to_vec()).unwrap_or_default();
    if !env.iter().any(|variable| variable.starts_with("PATH=")) {
        env.push(DEFAULT_PATH.to_owned());
    }
    if options.tty && !env.iter().any(|variable| variable.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    let wanted = wanted_user(options, image);
    let layers = match &root.base {
        Base::Host(RootSource::Directory(directory)) => Some(std::slice::from_ref(directory)),
        Base::Host(RootSource::Layers(layers)) => Some(layers.as_slice()),
        Base::Disks(_) => None,
    };
    let user = match layers {
        Some(layers) => crate::image::user::resolve(wanted, layers)?,
        // Only the guest reads those, and puts the real one in its place, with a home.
        None => hull_sandbox::user::resolve("0", b"", b"")?,
    };
    if layers.is_some() && !env.iter().any(|variable| variable.starts_with("HOME=")) {
        env.push(format!("HOME={}", user.home));
    }
    apply_env(&mut env, &options.env);
    let workdir = options.workdir.clone().or(image.and_then(Image::workdir).map(str::to_owned));
    let workdir = workdir.filter(|dir| !dir.is_empty()).unwrap_or_else(|| "/".to_owned());
    if !workdir.starts_with('/') {
        return Err(format!("the working directory {workdir} is not absolute; start it with /").into());
    }
    Ok(Program {
        args,
        env,
        workdir,
        uid: user.uid,
        gid: user.gid,
        additional_gids: user.additional_gids,
        terminal: options.tty,
        limits: Vec::new(),
        capabilities: Vec::new(),
    })
}

/// Sets or replaces variables; one without a value comes from hull's own environment, or is left out.
pub(super) fn apply_env(env: &mut Vec<String>, changes: &[String]) {
    for change in changes {
        let (name, value) = match change.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (change.as_str(), std::env::var(change).ok()),
        };
        env.retain(|variable| variable.split_once('=').is_none_or(|(other, _)| other != name));
        if let Some(value) = value {
            env.push(format!("{name}={value}"));
        }
    }
}

/// Which streams the options ask for.
pub(super) fn streams(options: &ProcessOptions) -> Result<Streams, Error> {
    if !options.tty {
        return Ok(Streams::Pipes { stdin: options.interactive });
    }
    if options.interactive && !terminal::is_interactive() {
        return Err("standard input is no terminal; leave out -t, or run hull in one".into());
    }
    let (columns, rows) = terminal::size();
    Ok(Streams::Terminal { columns, rows })
}

/// A network as `--net` takes it, and whether hull picked it itself.
struct Choice {
    text: String,
    picked: bool,
}

/// What is asked for, or what the settings say, or the best that the host has.
fn choose_network(asked: Option<&str>, settings: &Settings) -> Choice {
    match (asked, &settings.run.network.value) {
        (Some(text), _) => Choice { text: text.to_owned(), picked: false },
        (None, RunNetwork::Fixed(text)) => Choice { text: text.clone(), picked: false },
        (None, RunNetwork::Auto) => Choice { text: pick(cni::first(), has_user), picked: true },
    }
}

fn pick(configured: Option<String>, has_user: impl FnOnce() -> bool) -> String {
    match configured {
        Some(name) => format!("cni:{name}"),
        None if has_user() => "user".to_owned(),
        None => "none".to_owned(),
    }
}

impl Choice {
    /// Says in one line what was picked, unless that has been said since the host started.
    fn tell(&self, host: &Host) {
        let said = host.state_dir.join(NETWORK_SAID);
        if !self.picked || std::fs::read_to_string(&said).is_ok_and(|before| before == self.text) {
            return;
        }
        let why = match self.text.as_str() {
            "none" => ", since no network is configured for CNI and passt is not installed",
            "user" => ", since no network is configured for CNI",
            _ => ", the first that is configured",
        };
        eprintln!("hull: the network is {}{why}; --net or run.network of the settings says otherwise", self.text);
        // Where it cannot be noted it is said again.
        let _ = std::fs::create_dir_all(&host.state_dir).and_then(|()| std::fs::write(&said, &self.text));
    }
}

/// Reads `none`, `netns:PATH`, `cni:NAME` or `user`, and with the last two the ports to publish.
fn parse_network(text: &str, publish: &[String]) -> Result<Network, Error> {
    let ports = publish.iter().map(|text| parse_port(text)).collect::<Result<Vec<_>, _>>()?;
    match text.split_once(':') {
        Some(("cni", name)) if !name.is_empty() => Ok(Network::Cni { name: name.to_owned(), ports }),
        None if text == "user" => Ok(Network::User { ports }),
        _ if !ports.is_empty() => Err(format!("-p needs --net cni:NAME or --net user; --net is {text}").into()),
        None if text == "none" => Ok(Network::None),
        Some(("netns", path)) if !path.is_empty() => Ok(Network::Namespace(std::path::absolute(path)?)),
        _ => Err(format!("{text} is no network; use none, netns:PATH, cni:NAME or user").into()),
    }
}

/// Reads `[ADDRESS:]HOST:GUEST[/tcp|/udp]`.
fn parse_port(text: &str) -> Result<PortMapping, Error> {
    let wrong = || Error::from(format!("{text} is no port; write HOST:GUEST, ADDRESS:HOST:GUEST, or either with /udp"));
    let (numbers, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    // An address may have colons itself.
    let (rest, container) = numbers.rsplit_once(':').ok_or_else(wrong)?;
    let (address, host) = rest.rsplit_once(':').map_or((None, rest), |(address, host)| (Some(address), host));
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(wrong);
    let address = address.map(|address| address.trim_matches(['[', ']']).parse().map_err(|_| wrong())).transpose()?;
    if !matches!(protocol, "tcp" | "udp") {
        return Err(wrong());
    }
    Ok(PortMapping {
        host_ip: address,
        host_port: number(host)?,
        container_port: number(container)?,
        protocol: protocol.to_owned(),
    })
}

/// An identifier: 12 hexadecimal digits, as long as people are used to.
pub(super) fn random_id() -> Result<String, Error> {
    let mut bytes = [0; 6];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Starts this command anew as the container's owner, in the background, and waits until the program runs there.
fn detach() -> Outcome {
    let mut arguments = std::env::args_os().skip(1).collect::<Vec<_>>();
    // Behind the verb, before the image and its command.
    let verb = arguments.iter().position(|word| word == "run").ok_or("the verb run is missing")?;
    arguments.insert(verb + 1, "--detached-owner".into());
    let mut owner = std::process::Command::new(std::env::current_exe()?)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut answer = String::new();
    if let Some(stdout) = &mut owner.stdout {
        stdout.read_to_string(&mut answer)?;
    }
    match answer.trim_end().split_once(' ') {
        Some(("ok", id)) => {
            println!("{id}");
            Ok(0)
        }
        Some(("error", message)) => Err(message.to_owned().into()),
        _ => Err(format!("the container's owner ended without a word ({})", owner.wait()?).into()),
    }
}

/// Tells the process that waits in [`detach`], and lets go of the pipe to it.
fn report(message: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{message}")?;
    stdout.flush()?;
    rustix::stdio::dup2_stdout(File::options().write(true).open("/dev/null")?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_none_or_a_namespace() {
        let parse = |text: &str| parse_network(text, &[]);
        assert_eq!(parse("none").unwrap(), Network::None);
        assert_eq!(parse("netns:/run/netns/a:b").unwrap(), Network::Namespace("/run/netns/a:b".into()));
        assert_eq!(parse("cni:x").unwrap(), Network::Cni { name: "x".into(), ports: Vec::new() });
        assert_eq!(parse("user").unwrap(), Network::User { ports: Vec::new() });
        assert!(matches!(parse_network("user", &["1:2".to_owned()]), Ok(Network::User { ports }) if ports.len() == 1));
        for text in ["", "netns", "netns:", "host", "none:", "cni:", "cni", "user:"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        assert!(parse_network("none", &["1:2".to_owned()]).is_err());
    }

    #[test]
    fn what_is_configured_comes_before_passt() {
        assert_eq!(pick(Some("web".into()), || unreachable!()), "cni:web");
        assert_eq!(pick(None, || true), "user");
        assert_eq!(pick(None, || false), "none");
        let mut settings = Settings::default();
        assert!(!choose_network(Some("none"), &settings).picked);
        settings.run.network.value = RunNetwork::Fixed("user".into());
        let choice = choose_network(None, &settings);
        assert_eq!((choice.text.as_str(), choice.picked), ("user", false));
    }

    #[test]
    fn what_was_picked_is_said_once() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host { state_dir: dir.path().join("state"), ..Host::discover().unwrap() };
        let said = host.state_dir.join(NETWORK_SAID);
        Choice { text: "user".into(), picked: false }.tell(&host);
        assert!(!said.exists());
        for text in ["user", "user", "cni:web"] {
            Choice { text: text.into(), picked: true }.tell(&host);
            assert_eq!(std::fs::read_to_string(&said).unwrap(), text);
        }
    }

    #[test]
    fn ports_have_an_address_and_protocol_or_not() {
        let port = |text: &str| {
            let port = parse_port(text).unwrap();
            (port.host_ip.map(|ip| ip.to_string()), port.host_port, port.container_port, port.protocol)
        };
        assert_eq!(port("8080:80"), (None, 8080, 80, "tcp".into()));
        assert_eq!(port("127.0.0.1:53:53/udp"), (Some("127.0.0.1".into()), 53, 53, "udp".into()));
        assert_eq!(port("[::1]:1:2"), (Some("::1".into()), 1, 2, "tcp".into()));
        for text in ["", "80", "80:", ":80", "0:80", "80:65536", "x:80", "1:2:3", "80:80/sctp"] {
            assert!(parse_port(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn variables_replace_those_of_the_image() {
        let mut env = vec!["A=1".to_owned(), "AB=2".to_owned()];
        apply_env(&mut env, &["A=3".to_owned(), "C=".to_owned(), "HULL_TEST_UNSET".to_owned()]);
        assert_eq!(env, ["AB=2", "A=3", "C="]);
    }

    #[test]
    fn a_root_on_a_disk_is_the_guests_to_look_into() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let mut disk = vec![0; 2048];
        disk[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        std::fs::write(&image, &disk).unwrap();
        let options = ProcessOptions { interactive: false, tty: false, env: Vec::new(), workdir: None, user: None };
        let erofs = root_at(&image).unwrap();
        assert_eq!(erofs.writes, Writes::Memory);
        assert_eq!(guest_user(&options, None, &erofs).as_deref(), Some("0"));
        let directory = root_at(dir.path()).unwrap();
        assert_eq!(guest_user(&options, None, &directory), None);
        let command = || vec!["true".to_owned()];
        assert!(!program(&options, None, &erofs, command()).unwrap().env.iter().any(|name| name.starts_with("HOME=")));
        assert!(program(&options, None, &directory, command()).unwrap().env.contains(&"HOME=/".to_owned()));
        // With a disk of its own the root below is only read.
        let sized = with_disk(directory, 32 << 20).unwrap();
        assert_eq!(
            (&sized.writes, guest_user(&options, None, &sized).as_deref()),
            (&Writes::NewDisk(32 << 20), Some("0"))
        );
        disk[1024..1028].fill(0);
        disk[1080..1082].copy_from_slice(&[0x53, 0xef]);
        std::fs::write(&image, &disk).unwrap();
        let ext4 = root_at(&image).unwrap();
        let read_only = |root: &Root| matches!(&root.base, Base::Disks(disks) if disks[0].read_only);
        assert_eq!((&ext4.writes, read_only(&ext4)), (&Writes::Base, false));
        assert!(read_only(&with_disk(ext4, 32 << 20).unwrap()));
        assert!(with_disk(root_at(&image).unwrap(), 1).is_err());
    }

    #[test]
    fn identifiers_are_fit_to_be_names() {
        assert!(check_name(&random_id().unwrap()).is_ok());
    }
}
