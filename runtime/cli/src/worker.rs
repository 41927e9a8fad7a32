//! `mobula worker`.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, bail};
use mobula_actors::serving::ingress::plan::{ADDRESS_LABEL, NODE_LABEL};
use mobula_core::config::ResourcesConfig;
use mobula_core::label::Labels;
use mobula_worker::notices::Cloud;
use mobula_worker::{ResourceOverride, WorkerOptions};

use crate::args::WorkerArguments;
use crate::head::{read_config, start_logging};

pub(crate) async fn run(arguments: WorkerArguments) -> anyhow::Result<()> {
    start_logging();
    let options = options(arguments)?;
    let name = options.name.clone();
    let exit = mobula_worker::run(options, std::future::pending()).await?;
    tracing::info!(worker = name, ?exit, "worker ended");
    Ok(())
}

fn options(arguments: WorkerArguments) -> anyhow::Result<WorkerOptions> {
    let config = read_config(arguments.config.as_deref())?.worker;
    let name = match arguments.name.or(config.name) {
        Some(name) => name,
        None => host_name().context("the machine has no usable name: give --name")?,
    };
    let data_dir = arguments
        .data_dir
        .unwrap_or_else(|| PathBuf::from(&config.data_dir));
    let head = arguments.head.unwrap_or(config.head_api);
    // Several may be named, so that a worker can also join while one of them is away.
    let heads = head.split(',').map(|head| head.trim().to_owned()).collect();
    let mut options = WorkerOptions::new(name, data_dir, heads);
    let token_file = arguments
        .join_token_file
        .or(config.token_file.map(PathBuf::from));
    options.token = token_file
        .map(|file| {
            std::fs::read_to_string(&file)
                .map(|text| text.trim().to_owned())
                .with_context(|| format!("the token file {} cannot be read", file.display()))
        })
        .transpose()?;
    options.listen_ip = listen_ip(&config.listen)?;
    options.labels = config.labels;
    options.labels.extend(parse_labels(&arguments.labels)?);
    if let Some(address) = arguments.ingress {
        // The serving controller reads them, and places an actor by the second.
        let told = [
            (ADDRESS_LABEL, address.to_string()),
            (NODE_LABEL, options.name.clone()),
        ];
        let told = told.map(|(label, value)| (label.to_owned(), value));
        options.labels.extend(told);
    }
    options.resources = resources(&config.resources)?;
    if let Some(cpus) = arguments.cpus {
        options.resources.cpu_milli = Some(milli("--cpus", cpus)?);
    }
    options.notice_file = arguments
        .notice_file
        .or(config.preemption.notice_file.map(PathBuf::from));
    let cloud = whose_machine(arguments.cloud, config.preemption.cloud.as_deref())?;
    options.cloud = cloud.map(|cloud| {
        let endpoint = arguments.cloud_endpoint;
        (
            cloud,
            endpoint.unwrap_or_else(|| cloud.endpoint().to_owned()),
        )
    });
    options.object_store_bytes = config.object_store_bytes;
    options.object_spill_bytes = config.object_spill_bytes;
    options.stopped_process_limit_ms = config.stopped_process_limit_ms;
    options.notice_poll_ms = config.preemption.poll_ms;
    options.default_grace_ms = config.preemption.default_grace_ms;
    Ok(options)
}

/// The cloud that was `named` on the command line, or else the one in the configuration.
fn whose_machine(named: Option<Cloud>, configured: Option<&str>) -> anyhow::Result<Option<Cloud>> {
    // Checked also where it does not count: a wrong key is wrong.
    let configured = configured.map(str::parse).transpose();
    let configured = configured.context("worker.preemption.cloud")?;
    Ok(named.or(configured))
}

fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_lowercase()).filter(|name| !name.is_empty())
}

fn listen_ip(text: &str) -> anyhow::Result<std::net::IpAddr> {
    let address: SocketAddr = text
        .parse()
        .with_context(|| format!("worker.listen is `{text}`: expected ip:0"))?;
    if address.port() != 0 {
        bail!("worker.listen is `{text}`: the port must be 0, for each host takes its own");
    }
    Ok(address.ip())
}

fn parse_labels(pairs: &[String]) -> anyhow::Result<Labels> {
    pairs
        .iter()
        .map(|pair| {
            pair.split_once('=')
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .with_context(|| format!("the label `{pair}` is not key=value"))
        })
        .collect()
}

/// Thousandths of a quantity that people give as a decimal number.
fn milli(what: &str, value: f64) -> anyhow::Result<u64> {
    if !value.is_finite() || !(0.0..=1e9).contains(&value) {
        bail!("{what} is {value}: expected a number from 0 to 1e9");
    }
    Ok((value * 1000.0).round() as u64)
}

fn resources(config: &ResourcesConfig) -> anyhow::Result<ResourceOverride> {
    let optional = |what, value: Option<f64>| value.map(|value| milli(what, value)).transpose();
    Ok(ResourceOverride {
        cpu_milli: optional("worker.resources.cpu", config.cpu)?,
        memory_bytes: config.memory_bytes,
        gpu_milli: optional("worker.resources.gpu", config.gpu)?,
        custom: config
            .custom
            .iter()
            .map(|(name, amount)| Ok((name.clone(), milli("worker.resources.custom", *amount)?)))
            .collect::<anyhow::Result<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_says_whose_machine_it_is_before_the_configuration_does() {
        assert_eq!(whose_machine(None, None).unwrap(), None);
        assert_eq!(whose_machine(None, Some("gcp")).unwrap(), Some(Cloud::Gcp));
        let named = whose_machine(Some(Cloud::Aws), Some("gcp")).unwrap();
        assert_eq!(named, Some(Cloud::Aws));
        let error = whose_machine(Some(Cloud::Aws), Some("ibm")).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("worker.preemption.cloud: `ibm` is no cloud")
                && text.contains("use aws, gcp or azure"),
            "{text}"
        );
    }

    #[test]
    fn quantities_are_checked() {
        assert_eq!(milli("x", 0.25).unwrap(), 250);
        assert!(milli("x", -1.0).is_err());
        assert!(milli("x", f64::NAN).is_err());
        assert!(listen_ip("127.0.0.1:80").is_err());
        assert!(parse_labels(&["zone".into()]).is_err());
    }
}
