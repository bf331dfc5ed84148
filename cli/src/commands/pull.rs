//! `hull image pull`: what is seen of it while it goes on.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::image::Digest;
use crate::image::pull::Progress;
use crate::output;

/// Digits of a digest that tell layers apart.
const SHOWN: usize = 12;

/// Bars where standard error is a terminal, else a line for each step, or nothing.
pub(super) fn progress(quiet: bool) -> Arc<dyn Progress> {
    if quiet {
        Arc::new(Silence)
    } else if std::io::stderr().is_terminal() {
        Arc::new(Bars::default())
    } else {
        Arc::new(Lines)
    }
}

struct Silence;

impl Progress for Silence {
    fn starts(&self, _: Digest, _: u64) {}
    fn has(&self, _: Digest, _: u64) {}
    fn unpacks(&self, _: Digest) {}
    fn done(&self, _: Digest) {}
}

struct Lines;

impl Progress for Lines {
    fn starts(&self, layer: Digest, size: u64) {
        eprintln!("layer {}: {}", short(layer), output::bytes(size));
    }

    fn has(&self, _: Digest, _: u64) {}

    fn unpacks(&self, layer: Digest) {
        eprintln!("layer {}: downloaded", short(layer));
    }

    fn done(&self, layer: Digest) {
        eprintln!("layer {}: done", short(layer));
    }
}

struct Bars {
    all: MultiProgress,
    layers: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Default for Bars {
    fn default() -> Self {
        // Ten times a second is as often as somebody can read.
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        Self { all, layers: Mutex::default() }
    }
}

impl Bars {
    fn layers(&self) -> MutexGuard<'_, HashMap<Digest, ProgressBar>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, layer: Digest, act: impl FnOnce(&ProgressBar)) {
        if let Some(bar) = self.layers().get(&layer) {
            act(bar);
        }
    }
}

impl Progress for Bars {
    fn starts(&self, layer: Digest, size: u64) {
        let template = "{prefix}  {bar:30}  {binary_bytes:>11} / {binary_total_bytes:11} {msg}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.all.add(ProgressBar::new(size).with_style(style).with_prefix(short(layer)));
        bar.set_message("waiting");
        self.layers().insert(layer, bar);
    }

    fn has(&self, layer: Digest, bytes: u64) {
        self.with(layer, |bar| {
            if bar.message() == "waiting" {
                bar.set_message("");
            }
            bar.set_position(bytes);
        });
    }

    fn unpacks(&self, layer: Digest) {
        self.with(layer, |bar| bar.set_message("unpacking"));
    }

    fn done(&self, layer: Digest) {
        self.with(layer, |bar| bar.finish_with_message("done"));
    }
}

fn short(layer: Digest) -> String {
    layer.hex().chars().take(SHOWN).collect()
}
