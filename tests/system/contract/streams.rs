//! Where standard streams go. FIFOs and the streaming service have further tests with containerd.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use super::*;

#[test]
fn streams_fifo_carries_input_and_output_and_their_ends() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let [stdin, stdout, stderr] = ["in", "out", "err"].map(|name| {
            let path = shim.dir.join(format!("fifo.{name}"));
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            path
        });
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let request = CreateTaskRequest {
            stdin: text(&stdin),
            stdout: text(&stdout),
            stderr: text(&stderr),
            ..create("fifo", &shim.bundle("fifo", &["/bin/sh", "-c", "cat; echo wrong >&2"]))
        };
        shim.tasks().create(patience(), &request).await.unwrap();
        shim.start_task("fifo", "").await.unwrap();
        let read = |path: PathBuf| {
            tokio::task::spawn_blocking(move || {
                let mut text = String::new();
                File::open(path).unwrap().read_to_string(&mut text).unwrap();
                text
            })
        };
        let (out, err) = (read(stdout), read(stderr));
        let writer = tokio::task::spawn_blocking(move || {
            File::options().write(true).open(stdin).unwrap().write_all(b"through\n").unwrap();
        });
        writer.await.unwrap();
        assert_eq!(shim.wait_task("fifo", "").await, 0);
        // The readers' end comes with the deletion at the latest.
        shim.delete_task("fifo", "").await.unwrap();
        assert_eq!((out.await.unwrap().as_str(), err.await.unwrap().as_str()), ("through\n", "wrong\n"));
    });
}

#[test]
fn streams_fifo_carries_much_through_an_exec_unchanged() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("much", "sleep 1000").await;
        let [stdin, stdout] = ["much.in", "much.out"].map(|name| {
            let path = shim.dir.join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            path
        });
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let request =
            ExecProcessRequest { stdin: text(&stdin), stdout: text(&stdout), ..exec("much", "cat", "exec cat") };
        shim.tasks().exec(patience(), &request).await.unwrap();
        shim.start_task("much", "cat").await.unwrap();
        let through = tokio::task::spawn_blocking(move || {
            let input = File::options().write(true).open(stdin).unwrap();
            fixture::noise::comes_back(input, File::open(stdout).unwrap(), 32);
        });
        assert_eq!(shim.wait_task("much", "cat").await, 0);
        shim.delete_task("much", "cat").await.unwrap();
        through.await.unwrap();
        shim.remove_task("much").await;
    });
}

#[test]
fn streams_file_is_made_and_added_to() {
    run(async {
        let (shim, _) = Shim::shared().await;
        for text in ["one\n", "one\none\n"] {
            let out = shim.dir.join("made/too/file.out");
            let request = CreateTaskRequest {
                stdout: format!("file://{}", out.display()),
                ..create("file", &shim.bundle("file", &["/bin/sh", "-c", "echo one"]))
            };
            shim.tasks().create(patience(), &request).await.unwrap();
            shim.start_task("file", "").await.unwrap();
            shim.wait_task("file", "").await;
            shim.delete_task("file", "").await.unwrap();
            assert_eq!(std::fs::read_to_string(out).unwrap(), text);
        }
    });
}

#[test]
fn streams_binary_gets_both_outputs_its_arguments_and_the_names() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let (program, log) = (shim.dir.join("log it"), shim.dir.join("binary.log"));
        let program_at = program.display().to_string().replace(' ', "%20");
        let uri = |scheme: &str| format!("{scheme}://{program_at}?{}=a+word", log.display());
        let bundle = shim.bundle("binary", &["/bin/sh", "-c", "echo out; echo err >&2"]);
        let request = |uri: String| CreateTaskRequest { stdout: uri.clone(), stderr: uri, ..create("binary", &bundle) };
        for (scheme, ready) in [("binary", ""), ("binary-v2", "printf r >&5; ")] {
            let script = format!(
                "#!/bin/sh\n{ready}exec 5>&-\n\
                 {{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $2\"; cat <&3; cat <&4; echo end; }} >\"$1\"\n"
            );
            std::fs::write(&program, script).unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
            shim.tasks().create(patience(), &request(uri(scheme))).await.unwrap();
            shim.start_task("binary", "").await.unwrap();
            shim.wait_task("binary", "").await;
            shim.delete_task("binary", "").await.unwrap();
            says(&log, "tests/binary a word\nout\nerr\nend\n");
            std::fs::remove_file(&log).unwrap();
        }
        // Of the second version, one that dies before it reads is no logger.
        std::fs::write(&program, "#!/bin/sh\nexit 1\n").unwrap();
        let (code, message) = refused(shim.tasks().create(patience(), &request(uri("binary-v2"))).await);
        assert_eq!(code, Code::INTERNAL, "{message}");
        assert!(message.contains("before it said that it reads"), "{message}");

        let missing = CreateTaskRequest { stdout: "binary:///no/such/logger".into(), ..create("binary", &bundle) };
        let (code, message) = refused(shim.tasks().create(patience(), &missing).await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        assert!(message.contains("/no/such/logger"), "{message}");
    });
}
