//! How the machine's GPUs are used: a series for each GPU that says so, and none where none does.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

use mobula_gpu::Usage;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::Count;

/// A GPU among those of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Device {
    gpu: String,
}

pub(super) fn register(r: &mut Registry, gpus: BTreeMap<String, Usage>) {
    let utilization = Family::<Device, Gauge<f64, AtomicU64>>::default();
    let used = Family::<Device, Count>::default();
    let total = Family::<Device, Count>::default();
    for (gpu, usage) in gpus {
        let labels = Device { gpu };
        if let Some(ratio) = usage.utilization {
            utilization.get_or_create(&labels).set(ratio);
        }
        if let Some(memory) = usage.memory {
            used.get_or_create(&labels).set(memory.used_bytes);
            total.get_or_create(&labels).set(memory.total_bytes);
        }
    }
    let help = "Share of the driver's last sample period in which a GPU computed";
    r.register("gpu_utilization_ratio", help, utilization);
    let help = "Memory of a GPU that programs have taken";
    r.register("gpu_memory_used_bytes", help, used);
    r.register("gpu_memory_bytes", "Memory of a GPU", total);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Now, WorkerMetrics};
    use mobula_gpu::Memory;

    fn text(gpus: BTreeMap<String, Usage>) -> String {
        let now = Now {
            gpus,
            ..Now::default()
        };
        WorkerMetrics::default().text(now).unwrap()
    }

    #[test]
    fn each_gpu_has_the_series_that_it_has_figures_for() {
        let memory = Memory {
            used_bytes: 1 << 30,
            total_bytes: 4 << 30,
        };
        let whole = Usage {
            utilization: Some(0.25),
            memory: Some(memory),
        };
        let part = Usage {
            utilization: None,
            memory: Some(memory),
        };
        let text = text(BTreeMap::from([
            ("GPU-aa".to_owned(), whole),
            ("GPU-bb".to_owned(), part),
        ]));
        for line in [
            "# TYPE mobula_worker_gpu_utilization_ratio gauge",
            "mobula_worker_gpu_utilization_ratio{gpu=\"GPU-aa\"} 0.25",
            "mobula_worker_gpu_memory_used_bytes{gpu=\"GPU-aa\"} 1073741824",
            "mobula_worker_gpu_memory_bytes{gpu=\"GPU-bb\"} 4294967296",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} in:\n{text}"
            );
        }
        assert!(
            !text.contains("mobula_worker_gpu_utilization_ratio{gpu=\"GPU-bb\"}"),
            "{text}"
        );
    }

    #[test]
    fn a_worker_without_gpus_does_not_name_them() {
        let text = text(BTreeMap::new());
        assert!(!text.contains("mobula_worker_gpu_"), "{text}");
    }
}
