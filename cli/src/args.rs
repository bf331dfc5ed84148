//! What the command line may say.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};

/// Runs containers in virtual machines of their own.
#[derive(Debug, Parser)]
#[command(name = "hull", version, disable_help_subcommand = true, max_term_width = 100)]
pub(crate) struct Args {
    /// Say on standard error what is being done.
    #[arg(long, global = true)]
    pub debug: bool,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Run a program from an image in a new virtual machine
    Run(Box<Run>),
    /// Run another program in a running container
    Exec(Exec),
    /// List containers
    Ps(Ps),
    /// Send a signal to a container's first process
    Kill(Kill),
    /// Ask containers to end, and make them after a while
    Stop(Stop),
    /// Remove containers that have ended
    Rm(Rm),
    /// Print what a container printed
    Logs(Logs),
    /// Show what containers use
    Stats(Stats),
    /// Show all that is known of containers, as JSON
    Inspect(Inspect),
    /// Manage the images in the local store
    #[command(subcommand)]
    Image(Image),
    /// Change the disks of running containers
    #[command(subcommand)]
    Disk(Disk),
    /// Say whether this host can run Hull, and what to do where it cannot
    Check(Check),
    /// Show or check the settings of this node
    #[command(subcommand)]
    Config(Config),
    /// Boot a kernel of your own in a bare virtual machine
    Boot(Boot),
}

/// Options that `run` and `exec` share.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct ProcessOptions {
    /// Pass standard input on to the program
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the program a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Set a variable in the program's environment; without a value, take it from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Run in this directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// Run as this user, by name or number, with an optional group
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Run {
    #[command(flatten)]
    pub process: ProcessOptions,
    /// Remove the container when it ends
    #[arg(long)]
    pub rm: bool,
    /// Run in the background and print the container's identifier
    #[arg(short, long, conflicts_with = "tty")]
    pub detach: bool,
    /// Name the container
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Virtual CPUs, 1 to 64; by default guest.default_vcpus of Hull's settings, which is 1 unless set
    #[arg(long, value_name = "N")]
    pub cpus: Option<u64>,
    /// Memory of the virtual machine, in MiB; what is not used is not taken from the host. By default
    /// guest.default_memory_mib of Hull's settings, which is 512 unless set
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u64>,
    /// Show a file or directory of the host to the container; options are ro, rw, noexec, nosuid, nodev,
    /// cache=never|auto|always, and uid=N and gid=N for the user and group of the host that the container's root is there
    #[arg(short, long, value_name = "SRC:DST[:OPTION,…]")]
    pub volume: Vec<String>,
    /// Mount something: type=bind, tmpfs, image or disk, then src=, dst=, ro; for bind cache=, uid=, gid=, for tmpfs tmpfs-size= and
    /// tmpfs-mode=, for disk fstype= (ext4 unless given) and cache=
    #[arg(long, value_name = "type=TYPE,…")]
    pub mount: Vec<String>,
    /// Mount memory of the guest; options are size=, mode=, uid=, gid=, ro, exec, suid, dev
    #[arg(long, value_name = "DST[:OPTION,…]")]
    pub tmpfs: Vec<String>,
    /// Give the guest a disk, a raw file or block device; /dev/vda onwards in the container. Options are ro, and cache=none to go past
    /// the host's page cache, which cache=writeback, the usual, uses, and serial= for the number that the guest reads
    #[arg(long, value_name = "FILE[:OPTION,…]")]
    pub disk: Vec<String>,
    /// Size of /dev/shm, in bytes or with a unit k, m or g; 0 is no limit
    #[arg(long, value_name = "SIZE", default_value = "64m", value_parser = crate::mounts::bytes)]
    pub shm_size: u64,
    /// Limit what each process may use, such as nofile=1024:4096; -1 is no limit
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = crate::ulimit::parse)]
    pub ulimit: Vec<crate::ulimit::Limit>,
    /// Give root in the container a capability that it has not, such as NET_ADMIN, or ALL
    #[arg(long, value_name = "CAPABILITY,…", value_delimiter = ',', value_parser = crate::capabilities::parse)]
    pub cap_add: Vec<crate::capabilities::Named>,
    /// Take a capability from it, or ALL
    #[arg(long, value_name = "CAPABILITY,…", value_delimiter = ',', value_parser = crate::capabilities::parse)]
    pub cap_drop: Vec<crate::capabilities::Named>,
    /// The container's network: none; all interfaces of a namespace, netns:PATH; one that the CNI configuration of a
    /// name makes, cni:NAME; connections on the host by passt, user. By default run.network of Hull's settings, which is,
    /// unless set, the first that CNI has, else user where passt is installed, else none
    #[arg(long, value_name = "NETWORK", overrides_with = "net")]
    pub net: Option<String>,
    /// Lead a port of the host to one of the container; needs the network user, or a CNI one with the plugin portmap
    #[arg(short, long, value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    pub publish: Vec<String>,
    /// A name server for the container, instead of the namespace's or the host's
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<std::net::IpAddr>,
    /// A line for the container's /etc/hosts
    #[arg(long, value_name = "NAME:ADDRESS", value_parser = crate::dns::parse_host)]
    pub add_host: Vec<(String, std::net::IpAddr)>,
    /// The container's host name; by default its identifier
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Refuse changes to the container's root
    #[arg(long)]
    pub read_only: bool,
    /// Use this as the container's root instead of an image: a directory, or a raw file or block device with ext4 or xfs, which changes go to,
    /// or with erofs or squashfs, which stays as it is while changes go to the guest's memory
    #[arg(long, value_name = "DIR|FILE|DEVICE")]
    pub rootfs: Option<PathBuf>,
    /// Have changes to the root go to a new disk of at most this size, in bytes or with a unit k, m, g or t, which goes with the container;
    /// the root below it stays as it is. Takes mkfs.ext4 (e2fsprogs)
    #[arg(long, value_name = "SIZE", value_parser = crate::mounts::bytes)]
    pub storage_size: Option<u64>,
    /// How long the guest may take to come up, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, overrides_with = "boot_timeout")]
    pub boot_timeout: u64,
    /// Words to add to the guest kernel's command line, after those of Hull's settings
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true)]
    pub kernel_params: String,
    /// This is the process that --detach leaves behind; set by hull itself
    #[arg(long, hide = true)]
    pub detached_owner: bool,
    /// The image (an OCI layout directory or archive, a docker archive, or a name in the local store), unless --rootfs is
    /// given; then the command and its arguments
    #[arg(value_name = "IMAGE [COMMAND]", trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Exec {
    #[command(flatten)]
    pub process: ProcessOptions,
    /// Name or identifier of the container
    #[arg(value_name = "CONTAINER")]
    pub container: String,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub command: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Ps {
    /// Also those that have ended
    #[arg(short, long)]
    pub all: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Kill {
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL")]
    pub signal: String,
    /// Send it to every process of the container
    #[arg(long)]
    pub all: bool,
    #[arg(value_name = "CONTAINER", required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Stop {
    /// Seconds to wait before killing
    #[arg(short, long, default_value_t = 10)]
    pub time: u64,
    #[arg(value_name = "CONTAINER", required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Rm {
    /// End those that run
    #[arg(short, long)]
    pub force: bool,
    #[arg(value_name = "CONTAINER", required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Logs {
    #[arg(value_name = "CONTAINER")]
    pub container: String,
    /// Put each line's time before it
    #[arg(short, long)]
    pub timestamps: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Stats {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Those to show; by default all that run
    #[arg(value_name = "CONTAINER")]
    pub containers: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Inspect {
    #[arg(value_name = "CONTAINER", required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Unpack an image into the store
    Load {
        /// An OCI layout directory or archive, or a docker archive
        #[arg(value_name = "FILE")]
        source: PathBuf,
        /// Name it, instead of what the image itself says
        #[arg(long, value_name = "NAME[:TAG]")]
        name: Option<String>,
    },
    /// Make an image of one layer from an archive of a root file system
    Import {
        /// A tar archive, plain or compressed with gzip or zstd
        #[arg(value_name = "FILE")]
        archive: PathBuf,
        /// What to call it
        #[arg(value_name = "NAME[:TAG]")]
        name: String,
    },
    /// Write an image of the store as an OCI archive
    ///
    /// Layers are packed anew, so the image has digests of its own there, always the same.
    Export {
        /// The file to write; it appears when it is complete
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        #[arg(value_name = "IMAGE")]
        image: String,
    },
    /// Remove layers that no image and no container uses, and what pulls that were killed have left
    Prune {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Fetch an image from a registry into the store
    ///
    /// Registries are spoken to over HTTPS, those on loopback addresses also without TLS. Credentials come from
    /// $DOCKER_CONFIG/config.json or ~/.docker/config.json, and the credential helpers that are named there. A pull that was
    /// killed goes on where it was.
    Pull {
        /// The image, with its registry; the tag is latest unless given
        #[arg(value_name = "REGISTRY/NAME[:TAG|@DIGEST]")]
        reference: String,
        /// Show no progress
        #[arg(short, long)]
        quiet: bool,
    },
    /// List the images in the store
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove images, and layers that nothing needs any more
    Rm {
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Disk {
    /// Have the guest use all of a disk whose file or device has grown, and print its size in bytes
    ///
    /// A file system on the disk grows by its own tool, such as resize2fs. A disk in use cannot shrink.
    Resize {
        /// Name or identifier of the container
        #[arg(value_name = "CONTAINER")]
        container: String,
        /// The disk, as it was given to `hull run` or by its name in the container, such as vda
        #[arg(value_name = "FILE|NAME")]
        disk: String,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Check {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Config {
    /// Print the settings in force, and where each comes from
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what is wrong in the settings; status 1 where something is
    Check {
        /// Check this file by itself, instead of those in force
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Print a file that explains every setting
    Example,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Boot {
    /// An uncompressed x86-64 vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Its initial RAM file system
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// A raw disk image or block device, /dev/vda onwards in the guest; options are ro, cache=none and cache=writeback
    #[arg(long, value_name = "FILE[:OPTION,…]")]
    pub disk: Vec<String>,
    /// The kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "console=hvc0 panic=-1")]
    pub cmdline: String,
    /// Virtual CPUs, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u64,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub memory: u64,
    /// Pass this terminal's input on to the guest's console hvc0
    #[arg(long)]
    pub console: bool,
}
