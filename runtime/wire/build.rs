//! Compiles the control API's protocol with protox, so that no `protoc` is needed for it.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["mobula/v1/control.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // The views are printed as JSON by the command line: field names are those of the proto.
        .type_attribute(".", "#[derive(serde::Serialize)]")
        // Has secrets in it; a `Debug` of its own leaves them out.
        .skip_debug([".mobula.v1.JobSpec"])
        // Ordered, so that the same state always prints the same text.
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
