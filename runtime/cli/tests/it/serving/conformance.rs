//! The protocol against a live tritonserver: every probe is sent to both, and the page of the results is compared. The same
//! probes are sent to endpoints of a cluster, in `endpoints`.

mod endpoints;
mod onnx_file;

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::examples::example;
use crate::python::python_with;
use crate::support::{Started, repository, text_of};

/// Brings tritonserver 2.51.0, its Python backend, and Triton's clients.
const TRITON: &str = "nvidia-pytriton==0.7.0";

const PAGE: &str = "docs/oip-conformance.md";

/// When set, the page is written instead of compared.
const WRITE: &str = "MOBULA_WRITE_PAGES";

/// What begins the page's part about endpoints, which ends the page.
const ENDPOINTS_HEAD: &str = "\n## At an endpoint\n";

/// How long a tritonserver may take to load the models of the probes.
const START_LIMIT: Duration = Duration::from_secs(120);

/// A part of the page, which one test finds out.
enum Part {
    /// What a tritonserver and the protocol's server answer.
    Calls,
    /// What endpoints answer otherwise.
    Endpoints,
}

#[test]
fn answers_are_a_live_tritonservers_but_for_the_differences_that_the_page_lists() {
    let Some(python) = python_with("tritonserver", &[TRITON]) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let Some((_triton, http, grpc)) = tritonserver(&python, dir.path()) else {
        return;
    };
    let (_server, address, token) = identity_server();
    let output = Command::new(&python)
        .arg(program("run.py"))
        .args([&http, &grpc, &address, &token])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text_of(&output));
    let found = String::from_utf8(output.stdout).unwrap();
    compare_with_page(Part::Calls, &found);
}

/// Compares a part of the page with what was found, or writes it and leaves the other part as it is.
fn compare_with_page(part: Part, found: &str) {
    let page = repository(PAGE);
    let text = std::fs::read_to_string(&page).unwrap_or_default();
    let end = text.find(ENDPOINTS_HEAD).unwrap_or(text.len());
    let (calls, endpoints) = text.split_at(end);
    let (known, new) = match part {
        Part::Calls => (calls, format!("{found}{endpoints}")),
        Part::Endpoints => (endpoints, format!("{calls}{found}")),
    };
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&page, new).unwrap();
        return;
    }
    assert!(
        found == known,
        "this part of {PAGE} is not what was found; {WRITE}=1 writes it:\n{found}"
    );
}

fn program(name: &str) -> PathBuf {
    repository("runtime/cli/tests/programs/oip_conformance").join(name)
}

/// A port that was free a moment ago.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn port(address: &str) -> &str {
    address.rsplit_once(':').unwrap().1
}

/// A tritonserver with the models of the probes and its two addresses; `None`, and a line that says why, where it does
/// not run.
fn tritonserver(python: &Path, dir: &Path) -> Option<(Started, String, String)> {
    let (http, grpc) = (free_address(), free_address());
    let log = dir.join("tritonserver.log");
    let file = std::fs::File::create(&log).unwrap();
    let child = Command::new(python)
        .arg(program("triton.py"))
        .arg(dir)
        .args([port(&http), port(&grpc)])
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    let mut triton = Started(child);
    let deadline = Instant::now() + START_LIMIT;
    // It listens once all models are loaded.
    while TcpStream::connect(&http).is_err() || TcpStream::connect(&grpc).is_err() {
        let ended = triton.0.try_wait().unwrap();
        if ended.is_some() || Instant::now() > deadline {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = said.lines().collect();
            let end = lines[lines.len().saturating_sub(10)..].join("\n");
            eprintln!("skipped: tritonserver does not run here:\n{end}");
            return None;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Some((triton, http, grpc))
}

/// Our side: the example, its address and the token of its callers.
fn identity_server() -> (Started, String, String) {
    let child = Command::new(example("identity_server"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut server = Started(child);
    let mut line = String::new();
    let said = server.0.stdout.take().unwrap();
    BufReader::new(said).read_line(&mut line).unwrap();
    let (address, token) = line.trim().split_once(' ').unwrap();
    (server, address.to_owned(), token.to_owned())
}
