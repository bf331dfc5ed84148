//! Docker archives: what `docker save` wrote before it wrote OCI layouts.

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use super::{Chosen, Details, LayerBlob, Rest, Source, SourceError, diff_ids, parse};
use crate::image::digest::Digest;

/// One image in `manifest.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl Item {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }
}

pub(super) fn choose(source: &Source, name: Option<&str>) -> Result<Chosen, SourceError> {
    let mut items: Vec<Item> = parse("manifest.json", &source.read_small("manifest.json")?)?;
    let named = items.iter().position(|item| name.is_some_and(|name| item.tags().iter().any(|tag| tag == name)));
    let item = match (named, items.len()) {
        (Some(at), _) => items.swap_remove(at),
        (None, 0) => return Err(SourceError::MissingBlob("any image".to_owned())),
        (None, 1) => items.remove(0),
        (None, _) => {
            let names = items.iter().map(|item| item.tags().first().unwrap_or(&item.config).as_str());
            return Err(SourceError::Several {
                path: source.path.clone(),
                names: names.take(20).collect::<Vec<_>>().join(", "),
            });
        }
    };
    let config = source.read_small(&item.config)?;
    let digest = Digest::of(&config);
    // Docker names the file after its digest; others do as they please.
    let stem = item.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
    if let Some(expected) = Digest::from_hex(stem).filter(|expected| *expected != digest) {
        return Err(SourceError::Mismatch {
            blob: "the image's configuration does not have its digest".to_owned(),
            expected: expected.to_string(),
            found: digest.to_string(),
        });
    }
    let names = item.tags().to_vec();
    Ok(Chosen { digest, manifest: None, names, rest: Rest::Docker(item, config) })
}

pub(super) fn details(source: &Source, item: &Item, config: &[u8]) -> Result<Details, SourceError> {
    let config: ImageConfiguration = parse("the image's configuration", config)?;
    let files = item.layers.as_deref().unwrap_or_default();
    let mut layers = Vec::with_capacity(files.len());
    for (file, diff_id) in files.iter().zip(diff_ids(&config, files.len())?) {
        let region = source.blobs.find(file)?.ok_or_else(|| SourceError::MissingBlob(file.clone()))?;
        layers.push(LayerBlob { diff_id, digest: None, region });
    }
    Ok(Details { config, layers })
}
