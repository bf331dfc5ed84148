//! What tests leave of pods and sandboxes in a lab: `traces FILE`. Where there is no such file it is written, with what there is now; where
//! there is one, what is there besides must go within a minute. `tests/traced` asks before a lab's tests and after them.

use std::path::PathBuf;

use fixture::cri::{Traces, eventually};

fn main() {
    let file = PathBuf::from(std::env::args_os().nth(1).expect("traces FILE"));
    match std::fs::read(&file) {
        Ok(before) => {
            let before: Traces = serde_json::from_slice::<Vec<String>>(&before).expect("a list of names").into();
            eventually("nothing is left", || before.are_all());
        }
        Err(_) => {
            let now = serde_json::to_vec(&Traces::now().list()).expect("names are JSON");
            std::fs::write(file, now).expect("the file can be written");
        }
    }
}
