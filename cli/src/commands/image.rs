//! `hull image`: the local store.

use hull_sandbox::host::Host;

use crate::args::Image;
use crate::image::Store;
use crate::image::pull::{Patience, docker_config};
use crate::{Outcome, output};

pub(super) fn run(args: Image, host: &Host) -> Outcome {
    let store = Store::open(&host.data_dir)?;
    match args {
        Image::Load { source, name } => {
            let image = store.load(&source, name.as_deref())?;
            println!("{}", image.digest());
            Ok(0)
        }
        Image::Pull { reference, quiet } => {
            let image = store.pull(&reference, docker_config(), Patience::default(), super::pull::progress(quiet))?;
            println!("{}", image.digest());
            Ok(0)
        }
        Image::Ls { json } => {
            let images = store.list()?;
            if json {
                output::json(&images)?;
                return Ok(0);
            }
            let rows: Vec<Vec<String>> = images
                .iter()
                .map(|image| {
                    vec![
                        image.name.clone().unwrap_or_else(|| "<none>".to_owned()),
                        image.digest.chars().take(19).collect(),
                        output::bytes(image.size_bytes),
                        image.created.clone().unwrap_or_default(),
                    ]
                })
                .collect();
            output::table(&["NAME", "DIGEST", "SIZE", "CREATED"], &rows)?;
            Ok(0)
        }
        Image::Rm { images } => super::for_each(&images, |reference| Ok(store.remove(reference)?)),
    }
}
