//! Generates the messages and the ttrpc stubs from the schema.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .include("proto")
        .input("proto/agent.proto")
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .run()?;
    // The generators' own mod.rs starts with an inner attribute, which a file that is included may not.
    std::fs::write(out.join("generated.rs"), "pub mod agent;\npub mod agent_ttrpc;\n")?;
    Ok(())
}
