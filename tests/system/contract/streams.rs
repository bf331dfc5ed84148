//! Where standard streams go. FIFOs and the streaming service have further tests with containerd.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

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
        let (mut out, mut err) = (File::open(stdout).unwrap(), File::open(stderr).unwrap());
        // A client that goes is not the end: containerd may have been restarted, and open it again.
        for words in [b"one\n", b"two\n"] {
            // Without waiting for somebody who reads it.
            let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
            let mut client = File::options().write(true).custom_flags(flags).open(&stdin).unwrap();
            client.write_all(words).unwrap();
            drop(client);
            let mut came = [0; 4];
            out.read_exact(&mut came).unwrap();
            assert_eq!(&came, words);
        }
        assert_eq!(shim.status("fifo", "").await, Status::RUNNING);
        shim.close_input("fifo", "").await;
        assert_eq!(shim.wait_task("fifo", "").await, 0);
        // The readers' end comes with the deletion at the latest.
        shim.delete_task("fifo", "").await.unwrap();
        let (mut rest, mut wrong) = (String::new(), String::new());
        out.read_to_string(&mut rest).unwrap();
        err.read_to_string(&mut wrong).unwrap();
        assert_eq!((rest.as_str(), wrong.as_str()), ("", "wrong\n"));
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
        let input = File::options().write(true).open(stdin).unwrap();
        // It ends with what is yet to be written.
        shim.close_input("much", "cat").await;
        let through = tokio::task::spawn_blocking(move || {
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
