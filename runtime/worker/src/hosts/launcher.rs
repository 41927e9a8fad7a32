//! Launching one host process: program, certificate, bootstrap file, environment, log, process.
//!
//! Invariants:
//! 1. The private key goes through a file of mode 0600, never through environment or arguments.
//! 2. A host inherits nothing but what is listed here; the job's own environment cannot replace
//!    what the agent sets.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mobula_core::id::{HostId, JobId};
use mobula_core::spec::Program;
use mobula_net::identity::{Credentials, PrivateKey};
use mobula_wire::host::{HostBootstrap, HostRole, ObjectStoreAccess, host_environment};
use mobula_wire::session::Welcome;

use super::action::Launch;
use super::files::JobDirs;
use super::limits::Limits;
use super::process::{HostProcess, ProcessSpec, Spawner};
use super::program::Programs;
use super::renewal::HostCertificate;
use crate::logs;
use crate::objects::Keys;
use crate::paths::write_private;
use crate::session_handle::SessionHandle;

/// What a host may inherit from the agent: where programs, libraries and temporary files are,
/// language and time zone, roots of trust, and how much to log.
const INHERITED: [&str; 14] = [
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "NO_COLOR",
    "AWS_SESSION_TOKEN",
];

/// A host that was started.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) process: HostProcess,
    pub(crate) certificate: HostCertificate,
}

/// Everything of one worker that a launch needs.
#[derive(Debug)]
pub(crate) struct Launcher {
    pub(crate) cluster_id: String,
    pub(crate) node_name: String,
    pub(crate) ca_pem: String,
    pub(crate) listen_ip: IpAddr,
    pub(crate) agent_socket: PathBuf,
    pub(crate) object_socket: PathBuf,
    pub(crate) object_keys: Keys,
    pub(crate) run_dir: PathBuf,
    pub(crate) job_dirs: JobDirs,
    pub(crate) limits: Limits,
    pub(crate) programs: Programs,
    pub(crate) spawner: Spawner,
    pub(crate) session: SessionHandle,
}

impl Launcher {
    /// Launches; the error is for people. What a host holds on to is given back by
    /// [`Launcher::forget`], whether it was started or not.
    pub(crate) async fn launch(
        &self,
        launch: &Launch,
        welcome: &Arc<Welcome>,
        log: &Path,
    ) -> Result<Launched, String> {
        let working_dir = self
            .job_dirs
            .prepare(
                launch.host,
                launch.job,
                &launch.files,
                &self.programs,
                &welcome.storage,
            )
            .await?;
        let program = self
            .programs
            .path(&launch.program, &welcome.storage)
            .await?;
        let credentials = self.certify(launch).await?;
        let bootstrap = HostBootstrap {
            cluster_id: self.cluster_id.clone(),
            job: launch.job,
            node: welcome.node,
            node_name: self.node_name.clone(),
            host: launch.host,
            role: launch.role.clone(),
            agent_socket: self.agent_socket.to_string_lossy().into_owned(),
            listen_ip: self.listen_ip.to_string(),
            api_addresses: welcome.api_addresses.clone(),
            ca_pem: self.ca_pem.clone(),
            certificate_pem: credentials.certificate_pem().to_owned(),
            key_pem: credentials.private_key().to_pem().to_owned(),
            storage: welcome.storage.clone(),
            object_store: Some(ObjectStoreAccess {
                socket: self.object_socket.to_string_lossy().into_owned(),
                key: self.object_keys.issue(launch.host, launch.job),
            }),
        };
        let bootstrap_path = self.run_dir.join(format!("{}.json", launch.host));
        let text = serde_json::to_vec(&bootstrap)
            .map_err(|error| format!("cannot write the host's bootstrap: {error}"))?;
        write_private(&bootstrap_path, &text)
            .map_err(|error| format!("cannot write `{}`: {error}", bootstrap_path.display()))?;
        let output = logs::create(log)
            .map_err(|error| format!("cannot open log `{}`: {error}", log.display()))?;
        let entrances = match &launch.resources {
            Some(resources) => self
                .limits
                .enter(launch.host, resources)
                .map_err(|error| format!("cannot limit what the host may use: {error}"))?,
            None => Vec::new(),
        };
        let spec = ProcessSpec {
            program,
            args: arguments(launch),
            env: environment(launch, welcome, &bootstrap_path, |name| {
                std::env::var_os(name)
            }),
            working_dir,
            output,
            entrances,
        };
        let process = self
            .spawner
            .spawn(spec)
            .await
            .map_err(|error| error.to_string())?;
        Ok(Launched {
            process,
            certificate: HostCertificate {
                job: launch.job,
                credentials,
            },
        })
    }

    /// Removes what a host leaves that is dead or was never started: a bootstrap that nobody read,
    /// and with the last host of a job its working directory.
    pub(crate) async fn forget(&self, host: HostId) {
        // Usually the host has removed it itself.
        let _ = std::fs::remove_file(self.run_dir.join(format!("{host}.json")));
        // One that has died has left already.
        self.limits.leave(host);
        self.object_keys.revoke(host);
        self.job_dirs.release(host).await;
    }

    async fn certify(&self, launch: &Launch) -> Result<Credentials, String> {
        let key = PrivateKey::generate().map_err(|error| error.to_string())?;
        let certificate_pem = self.sign(&key, launch.job, launch.host).await?;
        Credentials::new(&certificate_pem, key, &self.ca_pem).map_err(|error| error.to_string())
    }

    /// The next certificate of a host, for the key that it has.
    pub(crate) async fn renew(
        &self,
        host: HostId,
        certificate: HostCertificate,
    ) -> Result<HostCertificate, String> {
        let HostCertificate { job, credentials } = certificate;
        let certificate_pem = self.sign(credentials.private_key(), job, host).await?;
        let credentials = credentials
            .renewed(&certificate_pem)
            .map_err(|error| error.to_string())?;
        Ok(HostCertificate { job, credentials })
    }

    async fn sign(&self, key: &PrivateKey, job: JobId, host: HostId) -> Result<String, String> {
        let csr_pem = key
            .certificate_request()
            .map_err(|error| error.to_string())?;
        self.session.sign_host(csr_pem, job, host).await
    }
}

fn arguments(launch: &Launch) -> Vec<OsString> {
    let job_args = match &launch.role {
        HostRole::Driver { args, .. } => args.as_slice(),
        HostRole::Actors => &[],
    };
    let subcommand = match (&launch.program, &launch.role) {
        (Program::Builtin, HostRole::Actors) => Some("host"),
        (Program::Builtin, HostRole::Driver { .. }) => Some("builtin"),
        (Program::Artifact { .. }, _) => None,
    };
    subcommand
        .into_iter()
        .chain(job_args.iter().map(String::as_str))
        .map(OsString::from)
        .collect()
}

fn environment(
    launch: &Launch,
    welcome: &Welcome,
    bootstrap: &Path,
    own: impl Fn(&str) -> Option<OsString>,
) -> BTreeMap<OsString, OsString> {
    let keys = [
        &welcome.storage.access_key_env,
        &welcome.storage.secret_key_env,
    ];
    let inherited = INHERITED
        .into_iter()
        .chain(keys.into_iter().map(String::as_str))
        .filter(|name| !name.is_empty())
        .filter_map(|name| Some((OsString::from(name), own(name)?)));
    let job = launch
        .env
        .iter()
        .map(|(name, value)| (name.into(), value.into()));
    let secrets = launch
        .secrets
        .iter()
        .map(|(name, secret)| (name.into(), OsStr::from_bytes(secret.reveal()).to_owned()));
    let set = host_environment(&bootstrap.to_string_lossy())
        .into_iter()
        .map(|(name, value)| (name.into(), value.into()));
    let devices = [(
        OsString::from("CUDA_VISIBLE_DEVICES"),
        launch.visible_devices.clone().into(),
    )];
    inherited
        .chain(job)
        .chain(secrets)
        .chain(set)
        .chain(devices)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::id::{ActorId, Incarnation, NodeId, Term};
    use mobula_core::secret::Secret;
    use mobula_wire::host::BOOTSTRAP_ENV;
    use mobula_wire::session::StorageLocation;

    fn launch(program: Program, role: HostRole) -> Launch {
        Launch {
            host: HostId(1),
            job: JobId(1),
            program,
            role,
            env: [("A", "job"), ("PATH", "/job"), (BOOTSTRAP_ENV, "/forged")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            files: Vec::new(),
            secrets: [("TOKEN".to_owned(), Secret::new(b"hunter2".to_vec()))].into(),
            resources: None,
            visible_devices: "GPU-a".into(),
            owner: None,
        }
    }

    fn driver() -> HostRole {
        let args = vec!["--steps".to_owned(), "5".to_owned()];
        HostRole::Driver {
            actor: ActorId(1),
            incarnation: Incarnation(1),
            args,
        }
    }

    #[test]
    fn built_in_programs_get_a_subcommand_and_only_drivers_get_arguments() {
        let artifact = Program::Artifact {
            blake3: "ab".repeat(32),
            size_bytes: 1,
        };
        let cases = [
            (Program::Builtin, HostRole::Actors, vec!["host"]),
            (Program::Builtin, driver(), vec!["builtin", "--steps", "5"]),
            (artifact.clone(), HostRole::Actors, vec![]),
            (artifact, driver(), vec!["--steps", "5"]),
        ];
        for (program, role, expected) in cases {
            assert_eq!(arguments(&launch(program, role)), expected);
        }
    }

    #[test]
    fn a_host_sees_its_job_and_what_is_listed_and_no_more() {
        let welcome = Welcome {
            term: Term(1),
            node: NodeId(1),
            incarnation: Incarnation(1),
            lease_ms: 1,
            renew_ms: 1,
            storage: StorageLocation {
                url: "s3://b".into(),
                endpoint: None,
                region: None,
                allow_http: false,
                access_key_env: "MY_KEY".into(),
                secret_key_env: String::new(),
            },
            api_addresses: Vec::new(),
        };
        let own = |name: &str| match name {
            "PATH" | "HOME" | "MY_KEY" | "OTHER_SECRET" => Some(OsString::from("agent")),
            _ => None,
        };
        let launch = launch(Program::Builtin, HostRole::Actors);
        let env = environment(&launch, &welcome, Path::new("/run/b.json"), own);
        let expected = [
            ("A", "job"),
            ("CUDA_VISIBLE_DEVICES", "GPU-a"),
            ("HOME", "agent"),
            (BOOTSTRAP_ENV, "/run/b.json"),
            ("MY_KEY", "agent"),
            ("PATH", "/job"),
            ("TOKEN", "hunter2"),
        ];
        let expected: BTreeMap<OsString, OsString> = expected
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        assert_eq!(env, expected);
        let printed = format!("{launch:?}");
        assert!(!printed.contains("hunter2"), "{printed}");
    }
}
