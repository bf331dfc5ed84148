//! Several sandboxes at once.

use fixture::{Said, busybox, hull};

#[test]
fn twenty_run_side_by_side() {
    let children: Vec<_> = (0..20)
        .map(|number| {
            let word = format!("number {number}");
            (word.clone(), hull(["run", "--rm", "--memory", "64", &busybox(), "echo", &word]).spawn())
        })
        .collect();
    for (word, child) in children {
        let said = Said::new(child.wait_with_output().unwrap());
        assert_eq!(said.ok(), word);
    }
}
