//! What each replica of an endpoint is given.

use clap::{Args, ValueEnum};
use mobula_actors::device::ComputeDevice;
use mobula_actors::serving::replica_settings::{Batching, QUEUED_REQUESTS, ReplicaSettings};

/// What replicas compute on.
#[derive(Clone, Copy, Default, ValueEnum)]
enum DeviceArgument {
    /// CPUs.
    #[default]
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
}

impl From<DeviceArgument> for ComputeDevice {
    fn from(argument: DeviceArgument) -> Self {
        match argument {
            DeviceArgument::Cpu => ComputeDevice::Cpu,
            DeviceArgument::Cuda => ComputeDevice::Cuda,
        }
    }
}

#[derive(Args)]
pub(crate) struct ReplicaArguments {
    /// What each replica computes on: the CPU, or a GPU of its own, which needs workers that are built with the feature `cuda`.
    /// The answers have the same bits.
    #[arg(long, value_enum, default_value_t)]
    device: DeviceArgument,
    /// Memory that each replica may use, in MiB, in a process of its own: one that takes more is ended and started again
    /// [default: not limited].
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// How long a request waits for others to be computed with, such as `2ms`, `500us`, or `0ms` for not at all [default: as long
    /// as it is worth it].
    #[arg(long, value_name = "DURATION", value_parser = parse_micros)]
    batch_delay: Option<u64>,
    /// Sizes in rows, such as `16,32`, at which a batch leaves before that.
    #[arg(long, value_name = "ROWS", value_delimiter = ',')]
    batch_sizes: Vec<u32>,
    /// Requests that wait while a replica computes; one more is refused.
    #[arg(long, value_name = "REQUESTS", default_value_t = QUEUED_REQUESTS)]
    queue: u32,
}

impl ReplicaArguments {
    pub(crate) fn settings(self) -> ReplicaSettings {
        ReplicaSettings {
            device: self.device.into(),
            memory_bytes: self.memory.map(|mib| mib.saturating_mul(1 << 20)),
            batching: Batching {
                delay_us: self.batch_delay,
                preferred_rows: self.batch_sizes,
                queued_requests_max: self.queue,
            },
        }
    }
}

/// Microseconds of a duration such as `500us`, `2ms`.
fn parse_micros(text: &str) -> Result<u64, String> {
    let (number, factor) = match (text.strip_suffix("us"), text.strip_suffix("ms")) {
        (Some(number), _) => (number, 1),
        (_, Some(number)) => (number, 1_000),
        _ => ("", 0),
    };
    let micros = number
        .parse()
        .ok()
        .and_then(|number: u64| number.checked_mul(factor));
    micros.ok_or_else(|| format!("`{text}` is not a short duration: write 500us or 2ms"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        replicas: ReplicaArguments,
    }

    #[test]
    fn what_is_out_of_bounds_is_refused_in_the_units_of_its_option() {
        for (argument, expected) in [
            ("--memory=1", "1 MiB of memory (`--memory`)"),
            ("--memory=1", "at least 128 MiB"),
            (
                "--batch-delay=2000ms",
                "(`--batch-delay`) of 2000ms is above 50ms",
            ),
            (
                "--batch-delay=50001us",
                "(`--batch-delay`) of 50001us is above 50ms",
            ),
            ("--batch-sizes=16,129", "(`--batch-sizes`) of [16, 129]"),
            ("--queue=0", "(`--queue`) of 0 requests"),
        ] {
            let line = Line::try_parse_from(["deploy", argument]).unwrap();
            let refused = line.replicas.settings().check().unwrap_err();
            assert!(refused.message.contains(expected), "{argument}: {refused}");
        }
    }

    #[test]
    fn short_durations_are_read_to_the_microsecond() {
        assert_eq!(parse_micros("500us"), Ok(500));
        assert_eq!(parse_micros("2ms"), Ok(2_000));
        for wrong in ["2", "2s", "ms", "-1ms", "1.5ms"] {
            assert!(parse_micros(wrong).is_err(), "{wrong}");
        }
    }
}
