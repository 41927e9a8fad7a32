//! Measures another version on the samples that this job held out, beside its own: two versions are compared
//! fairly only on the same samples. A retraining asks for it by the environment of its job.
//!
//! Invariant: it decides nothing of the job. What cannot be measured is said in the job's log and left out.

use mobula_storage::blob::BlobStore;

use super::workload::Workload;
use crate::registry::VersionFile;

/// The variable that names the version: BLAKE3 of its file in hex, `:`, the file's size in bytes.
pub const BASELINE_VARIABLE: &str = "MOBULA_BASELINE";

/// What a metric of the other version is called among those of the new one.
pub const BASELINE_PREFIX: &str = "baseline_";

/// A version to compare with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Baseline {
    /// BLAKE3 of its file, in hex.
    pub digest: String,
    /// Size of that file, in bytes.
    pub size_bytes: u64,
}

impl Baseline {
    /// As the variable says it.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("{}:{}", self.digest, self.size_bytes)
    }

    /// What the variable says.
    pub fn from_text(text: &str) -> Result<Self, String> {
        let wrong = || format!("{BASELINE_VARIABLE} is `{text}`, not <BLAKE3>:<bytes>");
        let (digest, size) = text.split_once(':').ok_or_else(wrong)?;
        Ok(Baseline {
            digest: digest.to_owned(),
            size_bytes: size.parse().map_err(|_| wrong())?,
        })
    }

    /// What it is worth on the samples that `workload` held out, by name with [`BASELINE_PREFIX`]; or why
    /// that cannot be said.
    pub async fn measure(
        &self,
        blobs: &BlobStore,
        workload: &Workload,
    ) -> Result<Vec<(String, f64)>, String> {
        let file = VersionFile::load(blobs, &self.digest, self.size_bytes)
            .await
            .map_err(|error| error.to_string())?;
        let (spec, samples) = (workload.spec(), workload.split().train.shape());
        if file.model != spec.model || file.samples != *samples {
            return Err("it has another network, or is for other samples".to_owned());
        }
        let measured = tokio::task::block_in_place(|| {
            let parameters = workload.parameters(&file.parameters)?;
            workload.evaluate(&parameters)
        });
        let evaluation = measured.map_err(|error| error.to_string())?;
        let metrics = evaluation.metrics.into_iter();
        Ok(metrics
            .chain([("loss".to_owned(), evaluation.loss)])
            .map(|(name, value)| (format!("{BASELINE_PREFIX}{name}"), value))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use mobula_storage::blob::S3Options;

    use super::*;
    use crate::registry::version_file::tests::digits;
    use crate::training::data::Files;
    use crate::training::replica::load;
    use crate::training::spec::TrainSpec;

    #[tokio::test(flavor = "multi_thread")]
    async fn another_version_is_measured_on_the_same_samples() {
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        let spec = TrainSpec::digits_mlp("a");
        let workload = load(&spec, &Files::local()).unwrap();
        let mut file = digits(50);
        file.samples = workload.split().train.shape().clone();
        let stored = file.store(&blobs).await.unwrap();
        let baseline = Baseline {
            digest: stored.digest,
            size_bytes: stored.size_bytes,
        };
        assert_eq!(
            Baseline::from_text(&baseline.to_text()),
            Ok(baseline.clone())
        );
        let measured = baseline.measure(&blobs, &workload).await.unwrap();
        let own = workload
            .evaluate(&workload.parameters(&file.parameters).unwrap())
            .unwrap();
        assert!(measured.contains(&("baseline_loss".to_owned(), own.loss)));
        let accuracy = own.metrics["accuracy"];
        assert!(measured.contains(&("baseline_accuracy".to_owned(), accuracy)));

        let mut wide = spec;
        wide.model = crate::training::models::ModelSpec::Mlp { hidden: vec![7] };
        let wide = load(&wide, &Files::local()).unwrap();
        let error = baseline.measure(&blobs, &wide).await.unwrap_err();
        assert!(error.contains("another network"), "{error}");
        for wrong in ["", "abc", "abc:many"] {
            assert!(Baseline::from_text(wrong).is_err(), "{wrong}");
        }
    }
}
