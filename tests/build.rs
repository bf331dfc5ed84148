//! Generates CRI's messages for the fixture.

fn main() {
    println!("cargo::rerun-if-changed=proto");
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/cri.proto")
        .customize(protobuf_codegen::Customize::default().gen_mod_rs(false))
        .out_dir(&out)
        .run_from_script();
    // The file itself starts with inner attributes, which a file that is included may not.
    std::fs::write(out.join("generated.rs"), "pub mod cri;\n").expect("the file can be written");
}
