//! The few calls of NVML that are needed, and what their answers mean.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

/// What the driver installs. The name without a number belongs to packages for development, which are often missing.
pub(crate) const LIBRARY: &str = "libnvidia-ml.so.1";

/// Far above any machine; a driver that says more is not believed.
const GPUS_MAX: u32 = 256;

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// What `CUDA_VISIBLE_DEVICES` takes: its UUID, which unlike an index means the same device in every process.
    pub id: String,
    /// Its product name.
    pub name: String,
    /// Its memory, in bytes; absent where the driver is older than 510, or where it has none of its own.
    pub memory_bytes: Option<u64>,
}

/// How a GPU is used, as far as it says so.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// The share of the driver's last sample period, a second at most, in which something was computed on it: from 0
    /// to 1. How much of it was busy meanwhile nobody says.
    pub utilization: Option<f64>,
    /// Its memory.
    pub memory: Option<Memory>,
}

/// Memory of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// What programs have taken, without what the driver keeps for itself.
    pub used_bytes: u64,
    /// All of it.
    pub total_bytes: u64,
}

/// All GPUs of this machine, in the order of NVML; none where there is no NVML.
#[must_use]
pub fn gpus() -> Vec<Gpu> {
    gpus_of(LIBRARY.as_ref())
}

fn gpus_of(library: &OsStr) -> Vec<Gpu> {
    let Some(nvml) = open(library) else {
        return Vec::new();
    };
    let count = match nvml.device_count() {
        Ok(count) => count.min(GPUS_MAX),
        Err(error) => {
            tracing::warn!(%error, "the driver does not say which GPUs there are");
            0
        }
    };
    let described = (0..count).map(|index| (index, describe(&nvml, index)));
    described
        .filter_map(|(index, gpu)| {
            gpu.inspect_err(|error| tracing::warn!(index, %error, "a GPU is not offered"))
                .ok()
        })
        .collect()
}

/// The library, ready to be asked; `None` where it is missing, or has no driver to ask.
pub(crate) fn open(library: &OsStr) -> Option<Nvml> {
    Nvml::builder()
        .lib_path(library)
        .init()
        .inspect_err(|error| tracing::debug!(%error, "no GPUs: NVML cannot be used"))
        .ok()
}

fn describe(nvml: &Nvml, index: u32) -> Result<Gpu, NvmlError> {
    let device = nvml.device_by_index(index)?;
    Ok(Gpu {
        id: device.uuid()?,
        name: device.name()?,
        memory_bytes: memory(&device)?.map(|memory| memory.total_bytes),
    })
}

/// Asks for the usage of some GPUs, time and again.
pub(crate) struct Reader<'n> {
    nvml: &'n Nvml,
    ids: BTreeSet<String>,
    /// Those that did not answer last time: it is said once.
    silent: BTreeSet<String>,
}

impl<'n> Reader<'n> {
    pub(crate) fn new(nvml: &'n Nvml, ids: BTreeSet<String>) -> Self {
        Reader {
            nvml,
            ids,
            silent: BTreeSet::new(),
        }
    }

    /// How they are used now, those that answer. A handle is asked for each time, because that of a GPU which was reset
    /// is worth nothing.
    pub(crate) fn read(&mut self) -> BTreeMap<String, Usage> {
        let mut answered = BTreeMap::new();
        for id in &self.ids {
            match usage(self.nvml, id) {
                Ok(usage) => {
                    self.silent.remove(id);
                    answered.insert(id.clone(), usage);
                }
                Err(error) => {
                    if self.silent.insert(id.clone()) {
                        tracing::warn!(gpu = %id, %error, "a GPU does not say how it is used");
                    }
                }
            }
        }
        answered
    }
}

fn usage(nvml: &Nvml, id: &str) -> Result<Usage, NvmlError> {
    let device = nvml.device_by_uuid(id)?;
    let rates = offered(device.utilization_rates())?;
    Ok(Usage {
        // Whole percents.
        utilization: rates.map(|rates| f64::from(rates.gpu.min(100)) / 100.0),
        memory: memory(&device)?,
    })
}

fn memory(device: &Device<'_>) -> Result<Option<Memory>, NvmlError> {
    let info = offered(device.memory_info())?;
    Ok(info.map(|info| Memory {
        used_bytes: info.used,
        total_bytes: info.total,
    }))
}

/// What this GPU cannot say (one that is divided into parts, or whose memory is the machine's), or this driver, is no
/// failure.
fn offered<T>(answer: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(
            NvmlError::NotSupported
            | NvmlError::FunctionNotFound
            | NvmlError::FailedToLoadSymbol(_),
        ) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stand_in::StandIn;

    fn read(stand_in: &StandIn, ids: &[&str]) -> BTreeMap<String, Usage> {
        let nvml = open(stand_in.library().as_os_str()).unwrap();
        let ids = ids.iter().map(|id| (*id).to_owned()).collect();
        Reader::new(&nvml, ids).read()
    }

    #[test]
    fn a_machine_without_the_library_or_without_its_driver_has_no_gpus() {
        let nowhere = OsStr::new("/nowhere/libnvidia-ml.so.1");
        assert!(open(nowhere).is_none());
        assert_eq!(gpus_of(nowhere), []);
        let stand_in = StandIn::without_driver();
        assert!(open(stand_in.library().as_os_str()).is_none());
        assert_eq!(gpus_of(stand_in.library().as_os_str()), []);
    }

    #[test]
    fn gpus_are_found_with_their_names_and_memory_but_for_those_that_are_lost() {
        let stand_in = StandIn::with(
            "GPU-aa 50 0 1000 4000 0\n\
             GPU-bb 50 15 1000 4000 15\n\
             GPU-cc 50 0 0 0 3\n",
        );
        let gpu = |id: &str, memory_bytes| Gpu {
            id: id.to_owned(),
            name: "Stand-in".to_owned(),
            memory_bytes,
        };
        let found = gpus_of(stand_in.library().as_os_str());
        // One without memory of its own computes as well.
        assert_eq!(found, [gpu("GPU-aa", Some(4000)), gpu("GPU-cc", None)]);
    }

    #[test]
    fn those_who_are_watched_say_how_they_are_used_whatever_the_others_do() {
        let stand_in = StandIn::with(
            "GPU-aa 37 0 1000 4000 0\n\
             GPU-bb 50 15 1000 4000 15\n\
             GPU-cc 101 0 0 0 3\n\
             GPU-dd 1 0 1 1 0\n\
             GPU-ee 60 3 5 10 0\n\
             GPU-ff 60 0 5 10 999\n",
        );
        let watched = ["GPU-aa", "GPU-bb", "GPU-cc", "GPU-ee", "GPU-ff", "0", "GPU"];
        let memory = |used_bytes, total_bytes| {
            Some(Memory {
                used_bytes,
                total_bytes,
            })
        };
        let usage = |utilization, memory| Usage {
            utilization,
            memory,
        };
        let expected = [
            ("GPU-aa", usage(Some(0.37), memory(1000, 4000))),
            ("GPU-cc", usage(Some(1.0), None)),
            ("GPU-ee", usage(None, memory(5, 10))),
        ];
        let expected = expected.map(|(id, usage)| (id.to_owned(), usage));
        assert_eq!(read(&stand_in, &watched), BTreeMap::from(expected));
    }

    #[test]
    fn a_gpu_that_comes_back_is_shown_again() {
        let stand_in = StandIn::with("GPU-aa 10 0 1 2 0\n");
        let nvml = open(stand_in.library().as_os_str()).unwrap();
        let mut reader = Reader::new(&nvml, BTreeSet::from(["GPU-aa".to_owned()]));
        let mut utilization = |gpus: &str| {
            stand_in.says(gpus);
            let usage = reader.read();
            usage.get("GPU-aa").and_then(|usage| usage.utilization)
        };
        assert_eq!(utilization("GPU-aa 10 0 1 2 0\n"), Some(0.1));
        assert_eq!(utilization("GPU-aa 10 15 1 2 15\n"), None);
        // Not there at all, as while it is reset.
        assert_eq!(utilization("GPU-bb 10 0 1 2 0\n"), None);
        assert_eq!(
            utilization("GPU-bb 10 0 1 2 0\nGPU-aa 20 0 1 2 0\n"),
            Some(0.2)
        );
    }
}
