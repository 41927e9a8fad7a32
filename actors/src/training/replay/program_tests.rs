//! Programs of the tests are shell scripts: what they say over their standard input is what a real one would.

use mobula_core::JobId;
use mobula_storage::blob::{BlobStore, S3Options};

use super::*;
use crate::training::data::DataSpec;
use crate::training::data::csv::CsvSpec;
use crate::training::spec::TrainSpec;
use crate::training::state::TrainState;
use crate::training::trace::StepTrace;
use crate::training::workload::Workload;

const HERE: &str = r#"echo '{"here":{"protocol":1}}' >&0"#;

fn record() -> RunRecord {
    let spec = TrainSpec::digits_mlp("a");
    let workload = Workload::of(&spec);
    let state = TrainState::initial(&workload);
    let trace = StepTrace::new(spec.steps, &state, workload.layout());
    let digest = workload.split().train.digest();
    let weights = state.weights_blake3();
    RunRecord::new(
        JobId(3),
        &spec,
        &state.fingerprint,
        digest,
        &trace,
        300,
        &weights,
    )
}

struct Stored {
    blobs: BlobStore,
    program: ArtifactId,
    /// Of the record.
    digest: String,
}

impl Stored {
    /// The run of `record`, as if `program` had made it.
    async fn new(program: &[u8], mut record: RunRecord) -> Self {
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        let artifacts = ArtifactStore::new(blobs.clone(), 1 << 20);
        let program = artifacts.put_bytes(program.to_vec().into()).await.unwrap();
        record.program.blake3 = Some(program.blake3.to_string());
        let digest = record.store(&blobs).await.unwrap();
        Stored {
            blobs,
            program,
            digest,
        }
    }

    /// The same of a script with these lines.
    async fn script(lines: &[&str], record: RunRecord) -> Self {
        let text = format!("#!/bin/sh\n{}\n", lines.join("\n"));
        Stored::new(text.as_bytes(), record).await
    }

    async fn replay(
        &self,
        heard: impl FnMut(ReplayStage),
    ) -> Result<ReplayReport, ProgramReplayError> {
        let archive = Archive::over(self.blobs.clone());
        replay_in_program(&archive, &self.digest, Some(2), heard).await
    }

    async fn refused(&self) -> String {
        self.replay(|_| {}).await.unwrap_err().to_string()
    }
}

fn report(recorded_weights_blake3: &str) -> ReplayReport {
    ReplayReport {
        steps: 2,
        equal: true,
        weights_blake3: "ab".to_owned(),
        recorded_weights_blake3: recorded_weights_blake3.to_owned(),
        compared: 2,
        not_recorded: Vec::new(),
        difference: None,
    }
}

#[tokio::test]
async fn what_the_program_answers_is_heard_and_what_it_prints_is_not() {
    let record = record();
    let expected = report(&record.weights_blake3);
    let done = serde_json::to_string(&Told::Done(expected.clone())).unwrap();
    let stored = Stored::script(
        &[
            "echo '{\"failed\":\"printed\"}'",
            HERE,
            "grep -q '\"steps_max\":2' \"$MOBULA_ROLE_FOLDER/task.json\" || exit 9",
            "test -s \"$MOBULA_ROLE_FOLDER/record.json\" || exit 9",
            "echo '\"began\"' >&0",
            "echo '{\"step\":1}' >&0",
            &format!("echo '{done}' >&0"),
        ],
        record,
    )
    .await;
    let mut heard = Vec::new();
    let report = stored.replay(|stage| heard.push(stage)).await;
    assert_eq!(report.unwrap(), expected);
    assert_eq!(heard, [ReplayStage::Began, ReplayStage::Step(1)]);
}

#[tokio::test]
async fn the_folder_is_private_holds_the_data_and_does_not_stay() {
    let mut record = record();
    record.spec.dataset = DataSpec::Csv(CsvSpec {
        files: vec!["store:data/rows.csv".into(), "/data/local.csv".into()],
        header: false,
        shape: None,
        classes: None,
        targets: None,
        scale: None,
    });
    let stored = Stored::script(
        &[
            HERE,
            "cd \"$MOBULA_ROLE_FOLDER\"",
            "said=\"$(stat -c %a . program | tr '\\n' ' ')$(cat blob-0) $PWD\"",
            "echo \"{\\\"failed\\\":\\\"$said\\\"}\" >&0",
        ],
        record,
    )
    .await;
    let rows = "1,2,0".to_owned().into();
    stored
        .blobs
        .put_if_absent("data/rows.csv", rows)
        .await
        .unwrap();
    let said = stored.refused().await;
    let folder = said.strip_prefix("700 700 1,2,0 ");
    let folder = Path::new(folder.unwrap_or_else(|| panic!("{said}")));
    assert!(folder.is_absolute() && !folder.exists(), "{said}");
}

#[tokio::test]
async fn a_program_that_does_not_answer_is_told_from_one_that_cannot() {
    let other = serde_json::to_string(&Told::Done(report("other"))).unwrap();
    let other = format!("echo '{other}' >&0");
    let cases: [(&[&str], &str); 7] = [
        (&["exit 3"], "it can replay: it ended with exit status: 3"),
        (
            &["echo '{\"here\":{\"protocol\":7}}' >&0"],
            "replays by protocol 7",
        ),
        (
            &[HERE, "kill -9 $$"],
            "without a word: it ended with signal: 9",
        ),
        (&[HERE, "echo nonsense >&0"], "what is no answer"),
        (&[HERE, "echo '{\"failed\":\"no data\"}' >&0"], "no data"),
        (&[HERE, &other], "it is about another run"),
        (&[HERE, HERE], "it begins twice"),
    ];
    let record = record();
    for (lines, expected) in cases {
        let stored = Stored::script(lines, record.clone()).await;
        let error = stored.refused().await;
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn what_this_machine_cannot_run_is_said_with_where_it_ran() {
    let mut record = record();
    record.environment.isa = vec!["vax".to_owned()];
    let error = Stored::new(b"\x7fELF of another kind", record)
        .await
        .refused()
        .await;
    assert!(
        error.contains("does not start on this machine") && error.contains("ran on vax"),
        "{error}"
    );
}

#[tokio::test]
async fn only_the_program_that_the_record_names_is_run() {
    let record = record();
    let stored = Stored::script(&["exit 3"], record.clone()).await;
    let other = "#!/bin/sh\nexit 4\n".to_owned().into();
    stored
        .blobs
        .renew(&stored.program.path(), other)
        .await
        .unwrap();
    let error = stored.replay(|_| {}).await.unwrap_err();
    let is_damaged = matches!(
        error,
        ProgramReplayError::Artifact(ArtifactError::Damaged { .. })
    );
    assert!(is_damaged, "{error}");
    stored.blobs.delete(&stored.program.path()).await.unwrap();
    let error = stored.refused().await;
    assert!(error.contains("not in the cluster's object store any more"));
    assert!(
        error.contains(&stored.program.blake3.to_string()),
        "{error}"
    );

    let mut unnamed = record;
    unnamed.program.blake3 = None;
    let digest = unnamed.store(&stored.blobs).await.unwrap();
    let unnamed = Stored { digest, ..stored };
    let error = unnamed.refused().await;
    assert!(error.contains("does not say which program ran"), "{error}");
}

#[tokio::test]
async fn lines_are_bounded_and_one_without_an_end_is_none() {
    let mut text: &[u8] = b"\"began\"\n{\"step\":3}\n{\"st";
    assert_eq!(next(&mut text).await.unwrap(), Some(Told::Began));
    assert_eq!(next(&mut text).await.unwrap(), Some(Told::Step(3)));
    assert_eq!(next(&mut text).await.unwrap(), None);
    let long = vec![b' '; LINE_BYTES_MAX as usize + 1];
    let error = next(&mut long.as_slice()).await.unwrap_err();
    assert!(error.to_string().contains("a line of more than"), "{error}");
}
