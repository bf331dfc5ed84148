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
        Image::Import { archive, name } => {
            println!("{}", store.import(&archive, &name)?.digest());
            Ok(0)
        }
        Image::Export { output, image } => {
            println!("{}", store.export(&image, &output)?);
            Ok(0)
        }
        Image::Prune { json } => {
            let freed = store.prune()?;
            if json {
                output::json(&freed)?;
                return Ok(0);
            }
            for item in &freed {
                println!("{} {}", item.kind, item.digest);
            }
            let total = freed.iter().map(|item| item.size_bytes).sum();
            println!("{} freed", output::bytes(total));
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
