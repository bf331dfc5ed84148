//! Layers and images made by hand, down to what no tool would write.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use hull_cli::image::{Digest, Image, ImageError, Store};
use serde_json::{Value, json};

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether this process may do what `why` says; says so if not.
pub(crate) fn may(permitted: bool, why: &str) -> bool {
    if !permitted {
        println!("skipped: {why} is not permitted here");
    }
    permitted
}

/// Whether trusted attributes can be set in a temporary directory.
pub(crate) fn may_mark_opaque() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    may(rustix::fs::setxattr(dir.path(), "trusted.overlay.opaque", b"y", flags).is_ok(), "setting trusted attributes")
}

/// An archive under construction. Owners are this process's, so that ordinary users can unpack it.
#[derive(Clone, Default)]
pub(crate) struct Layer(pub(crate) Vec<u8>);

#[derive(Clone)]
pub(crate) struct Fields {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: u64,
    pub(crate) device: (u32, u32),
}

impl Default for Fields {
    fn default() -> Self {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { mode: 0o755, uid, gid, mtime: 1_000_000_000, device: (0, 0) }
    }
}

impl Layer {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn entry(mut self, kind: u8, name: &[u8], link: &[u8], data: &[u8], fields: &Fields) -> Self {
        let mut header = tar::Header::new_gnu();
        {
            let raw = header.as_gnu_mut().unwrap();
            raw.name[..name.len()].copy_from_slice(name);
            raw.linkname[..link.len()].copy_from_slice(link);
        }
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_size(data.len() as u64);
        header.set_mode(fields.mode);
        header.set_uid(fields.uid.into());
        header.set_gid(fields.gid.into());
        header.set_mtime(fields.mtime);
        header.set_device_major(fields.device.0).unwrap();
        header.set_device_minor(fields.device.1).unwrap();
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, data: impl AsRef<[u8]>) -> Self {
        self.entry(b'0', name.as_bytes(), b"", data.as_ref(), &Fields { mode: 0o644, ..Fields::default() })
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.entry(b'5', name.as_bytes(), b"", b"", &Fields::default())
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(b'2', name.as_bytes(), target.as_bytes(), b"", &Fields::default())
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(b'1', name.as_bytes(), target.as_bytes(), b"", &Fields::default())
    }

    /// A pax header for the entry that follows.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length = (1..6).map(|digits| rest + digits).find(|n| rest + n.to_string().len() == *n).unwrap();
            data.extend(format!("{length} {key}=").as_bytes());
            data.extend(*value);
            data.push(b'\n');
        }
        self.entry(b'x', b"pax", b"", &data, &Fields::default())
    }

    /// The finished archive.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        [self.0.as_slice(), &[0; 1024]].concat()
    }
}

pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(data: &[u8]) -> Vec<u8> {
    zstd::encode_all(data, 1).unwrap()
}

pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A layer as a blob: its media type, its bytes, and the diff id that the configuration gives it.
pub(crate) struct Blob {
    pub(crate) media_type: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) diff_id: Digest,
}

/// An image and the files of its OCI layout; tests may change any of them before it is written.
pub(crate) struct Build {
    pub(crate) layers: Vec<Blob>,
    pub(crate) config: Value,
    pub(crate) platform: Option<Value>,
    pub(crate) name: Option<String>,
}

impl Build {
    pub(crate) fn new() -> Self {
        let config = json!({
            "architecture": architecture(), "os": "linux", "created": "2024-01-02T03:04:05Z",
            "config": {
                "Entrypoint": ["/bin/app"], "Cmd": ["serve"], "Env": ["A=b"], "User": "app", "WorkingDir": "/srv",
                "StopSignal": "SIGINT", "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/data": {}}, "Healthcheck": {},
            },
        });
        Self { layers: Vec::new(), config, platform: None, name: None }
    }

    pub(crate) fn of(layers: impl IntoIterator<Item = Layer>) -> Self {
        layers.into_iter().fold(Self::new(), |build, layer| build.layer("", layer.bytes()))
    }

    pub(crate) fn layer(mut self, suffix: &str, tar: Vec<u8>) -> Self {
        let bytes = match suffix {
            "+gzip" => gzip(&tar),
            "+zstd" => zstd(&tar),
            _ => tar.clone(),
        };
        self.layers.push(Blob { media_type: format!("{LAYER}{suffix}"), bytes, diff_id: Digest::of(&tar) });
        self
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.config.clone();
        config["rootfs"] = json!({
            "type": "layers", "diff_ids": self.layers.iter().map(|layer| layer.diff_id.to_string()).collect::<Vec<_>>(),
        });
        serde_json::to_vec(&config).unwrap()
    }

    /// The files of the layout, `index.json` last.
    pub(crate) fn files(&self) -> Vec<(String, Vec<u8>)> {
        let mut files = vec![("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())];
        let mut put = |media_type: &str, bytes: Vec<u8>| {
            let digest = Digest::of(&bytes);
            let descriptor = json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()});
            files.push((format!("blobs/sha256/{}", digest.hex()), bytes));
            descriptor
        };
        let layers: Vec<Value> = self.layers.iter().map(|layer| put(&layer.media_type, layer.bytes.clone())).collect();
        let config = put(CONFIG, self.config());
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        let mut manifest = put(MANIFEST, serde_json::to_vec(&manifest).unwrap());
        if let Some(platform) = &self.platform {
            manifest["platform"] = platform.clone();
        }
        if let Some(name) = &self.name {
            manifest["annotations"] = json!({"io.containerd.image.name": name});
        }
        files.push(("index.json".to_owned(), index(&[manifest])));
        files
    }

    /// The docker archive's files.
    pub(crate) fn docker_files(&self) -> Vec<(String, Vec<u8>)> {
        let config = self.config();
        let config_name = format!("{}.json", Digest::of(&config).hex());
        let mut files = vec![(config_name.clone(), config)];
        let mut names = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            names.push(format!("{number}/layer.tar"));
            files.push((format!("{number}/layer.tar"), layer.bytes.clone()));
        }
        let tags = self.name.iter().collect::<Vec<_>>();
        let manifest = json!([{"Config": config_name, "RepoTags": tags, "Layers": names}]);
        files.push(("manifest.json".to_owned(), serde_json::to_vec(&manifest).unwrap()));
        files
    }

    /// Writes the layout into a directory.
    pub(crate) fn write(&self, directory: &Path) -> PathBuf {
        write_files(directory, &self.files())
    }
}

pub(crate) fn index(manifests: &[Value]) -> Vec<u8> {
    serde_json::to_vec(&json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests})).unwrap()
}

pub(crate) fn write_files(directory: &Path, files: &[(String, Vec<u8>)]) -> PathBuf {
    for (name, bytes) in files {
        let path = directory.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    directory.to_owned()
}

/// Writes files as an archive.
pub(crate) fn write_archive(path: &Path, files: &[(String, Vec<u8>)]) -> PathBuf {
    let archive = files.iter().fold(Layer::new(), |archive, (name, bytes)| archive.file(name, bytes));
    std::fs::write(path, archive.bytes()).unwrap();
    path.to_owned()
}

/// A store, a place for sources, and a directory that nothing may touch.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
    pub(crate) store: Store,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/file"), "untouched").unwrap();
        Self { dir, store }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes the image and loads it.
    pub(crate) fn load(&self, build: &Build) -> Result<Image, ImageError> {
        let source = tempfile::tempdir_in(self.dir.path()).unwrap();
        self.store.load(&build.write(source.path()), None)
    }

    /// Loads an image of one layer.
    pub(crate) fn unpack(&self, layer: Layer) -> Result<Image, ImageError> {
        self.load(&Build::of([layer]))
    }

    /// The text of the error that loading this layer gives, all traces of which must be gone.
    pub(crate) fn refuse(&self, layer: Layer) -> String {
        let error = self.unpack(layer).expect_err("it must be refused").to_string();
        self.assert_nothing_left();
        error
    }

    pub(crate) fn assert_nothing_left(&self) {
        for name in ["store/tmp", "store/layers", "store/images", "store/names", "store/blobs", "store/unpacking"] {
            let left = std::fs::read_dir(self.path(name)).into_iter().flatten().count();
            assert_eq!(left, 0, "something is left in {name}");
        }
        assert_eq!(std::fs::read_to_string(self.path("outside/file")).unwrap(), "untouched");
        assert_eq!(std::fs::read_dir(self.path("outside")).unwrap().count(), 1);
    }
}

/// All paths below a directory, sorted.
pub(crate) fn tree(directory: &Path) -> Vec<String> {
    fn walk(directory: &Path, prefix: &str, all: &mut Vec<String>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{prefix}{}", entry.file_name().as_bytes().escape_ascii());
            if entry.file_type().unwrap().is_dir() {
                walk(&entry.path(), &format!("{name}/"), all);
            }
            all.push(name);
        }
    }
    let mut all = Vec::new();
    walk(directory, "", &mut all);
    all.sort();
    all
}
