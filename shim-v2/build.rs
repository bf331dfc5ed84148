//! Generates the messages that containerd's own schemas do not have.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .include("proto")
        .input("proto/cri.proto")
        .input("proto/streaming.proto")
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generator's own mod.rs starts with an inner attribute, which a file that is included may not.
    std::fs::write(out.join("generated.rs"), "pub mod cri;\npub mod streaming;\n")?;
    Ok(())
}
