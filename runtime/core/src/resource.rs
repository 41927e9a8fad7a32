//! Quantities that placement adds and subtracts: integers only, so that sums are exact and equal
//! on every replica. CPU, GPU and custom resources count in thousandths; memory in bytes.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What a node offers, or an actor asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resources {
    /// CPU cores, in thousandths.
    pub cpu_milli: u64,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// GPUs, in thousandths; a share below one whole GPU is packed onto one device.
    pub gpu_milli: u64,
    /// Named resources of the operator's own, in thousandths.
    pub custom: BTreeMap<String, u64>,
}

/// One resource of which there is too little.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortfall {
    /// `cpu`, `memory`, `gpu`, or the name of a custom resource.
    pub resource: String,
    /// How much is asked for, in the resource's own unit.
    pub asked: u64,
    /// How much there is.
    pub available: u64,
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shortfall {
            resource,
            asked,
            available,
        } = self;
        match resource.as_str() {
            "memory" => write!(f, "memory: asks {asked} bytes, {available} bytes free"),
            _ => write!(
                f,
                "{resource}: asks {}, {} free",
                Milli(*asked),
                Milli(*available)
            ),
        }
    }
}

/// Thousandths, printed as a decimal number without trailing zeros.
#[derive(Debug, Clone, Copy)]
pub struct Milli(pub u64);

impl fmt::Display for Milli {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, part) = (self.0 / 1000, self.0 % 1000);
        if part == 0 {
            return write!(f, "{whole}");
        }
        write!(f, "{whole}.{}", format!("{part:03}").trim_end_matches('0'))
    }
}

impl Resources {
    /// Only CPU, in thousandths of a core.
    #[must_use]
    pub fn cpu_milli(cpu_milli: u64) -> Self {
        Resources {
            cpu_milli,
            ..Resources::default()
        }
    }

    /// Every resource that `request` asks of `self` in vain, in a fixed order; empty when it fits.
    #[must_use]
    pub fn shortfalls(&self, request: &Resources) -> Vec<Shortfall> {
        let fixed = [
            ("cpu", request.cpu_milli, self.cpu_milli),
            ("memory", request.memory_bytes, self.memory_bytes),
            ("gpu", request.gpu_milli, self.gpu_milli),
        ];
        let custom = request.custom.iter().map(|(name, asked)| {
            (
                name.as_str(),
                *asked,
                self.custom.get(name).copied().unwrap_or(0),
            )
        });
        fixed
            .into_iter()
            .chain(custom)
            .filter(|(_, asked, available)| asked > available)
            .map(|(resource, asked, available)| Shortfall {
                resource: resource.to_owned(),
                asked,
                available,
            })
            .collect()
    }

    /// Whether all of `request` is available in `self`.
    #[must_use]
    pub fn fits(&self, request: &Resources) -> bool {
        self.shortfalls(request).is_empty()
    }

    /// `self + other`, saturating.
    #[must_use]
    pub fn plus(&self, other: &Resources) -> Resources {
        let mut custom = self.custom.clone();
        for (name, amount) in &other.custom {
            let entry = custom.entry(name.clone()).or_default();
            *entry = entry.saturating_add(*amount);
        }
        Resources {
            cpu_milli: self.cpu_milli.saturating_add(other.cpu_milli),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            gpu_milli: self.gpu_milli.saturating_add(other.gpu_milli),
            custom,
        }
    }

    /// `self - other`, or `None` where that would go below zero.
    #[must_use]
    pub fn minus(&self, other: &Resources) -> Option<Resources> {
        let mut custom = self.custom.clone();
        for (name, amount) in &other.custom {
            let entry = custom.get_mut(name)?;
            *entry = entry.checked_sub(*amount)?;
        }
        Some(Resources {
            cpu_milli: self.cpu_milli.checked_sub(other.cpu_milli)?,
            memory_bytes: self.memory_bytes.checked_sub(other.memory_bytes)?,
            gpu_milli: self.gpu_milli.checked_sub(other.gpu_milli)?,
            custom,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_resources() -> impl Strategy<Value = Resources> {
        (
            0..10_000u64,
            0..1u64 << 40,
            0..8_000u64,
            proptest::collection::btree_map("[a-c]", 0..9_000u64, 0..3),
        )
            .prop_map(|(cpu_milli, memory_bytes, gpu_milli, custom)| Resources {
                cpu_milli,
                memory_bytes,
                gpu_milli,
                custom,
            })
    }

    proptest! {
        #[test]
        fn what_fits_can_be_taken_and_given_back(a in any_resources(), b in any_resources()) {
            let total = a.plus(&b);
            prop_assert!(total.fits(&b));
            let rest = total.minus(&b).unwrap();
            prop_assert_eq!(rest.plus(&b), total);
        }

        #[test]
        fn minus_agrees_with_fits(a in any_resources(), b in any_resources()) {
            let nonzero_missing = b.custom.iter().any(|(name, amount)| *amount == 0 && !a.custom.contains_key(name));
            prop_assume!(!nonzero_missing);
            prop_assert_eq!(a.minus(&b).is_some(), a.fits(&b));
        }
    }

    #[test]
    fn a_shortfall_names_the_resource_and_both_numbers() {
        let node = Resources {
            cpu_milli: 1500,
            ..Resources::default()
        };
        let request = Resources {
            cpu_milli: 2000,
            gpu_milli: 250,
            ..Resources::default()
        };
        let text: Vec<String> = node
            .shortfalls(&request)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(text, ["cpu: asks 2, 1.5 free", "gpu: asks 0.25, 0 free"]);
    }
}
