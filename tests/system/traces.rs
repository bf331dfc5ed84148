//! What all tests of a lab together leave of pods and sandboxes there. `tests/run` asks before the first and after the last, by
//! `tests/traced`.

use std::path::PathBuf;

use fixture::cri::{Traces, eventually};

/// Names the file that has what there was before; where it is not there, this is before.
const FILE: &str = "HULL_TEST_TRACES";

#[test]
#[ignore = "it is about all the others; see tests/traced"]
fn nothing_is_left_of_a_labs_tests() {
    let file = PathBuf::from(std::env::var_os(FILE).expect("it is set"));
    match std::fs::read(&file) {
        Ok(before) => {
            let before: Traces = serde_json::from_slice::<Vec<String>>(&before).unwrap().into();
            eventually("nothing is left", || before.are_all());
        }
        Err(_) => std::fs::write(file, serde_json::to_vec(&Traces::now().list()).unwrap()).unwrap(),
    }
}
