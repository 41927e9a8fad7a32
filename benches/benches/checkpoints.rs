//! What checkpoints cost training: a snapshot of 100 MB of parameters and two moments, on one core; and steps of a whole
//! network on one core while its state is stored by the other, again and again.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use mobula_actors::training::data::Files;
use mobula_actors::training::flat_vector::{FlatVector, update_blocks};
use mobula_actors::training::local::LocalTrainer;
use mobula_actors::training::models::ModelSpec;
use mobula_actors::training::snapshot::StateSnapshot;
use mobula_actors::training::spec::{TrainSpec, WorkerRange};
use mobula_actors::training::workload::Workload;
use mobula_benches::measure::{Samples, Settings, repeat};
use mobula_benches::report::Report;
use mobula_core::{Incarnation, JobId};
use mobula_storage::blob::{BlobStore, S3Options};
use mobula_storage::checkpoint::{CheckpointSource, CheckpointWriter, SaveRequest};

/// Values of the parameters and of each moment: 100 MB of all three.
const VALUES: usize = 25_000_000 / 3;

/// An update like AdamW's: reads and writes all three, and divides by a root.
fn update(vectors: &mut [FlatVector; 3], grads: &[f32]) {
    let [params, means, squares] = vectors;
    update_blocks(&mut [params, means, squares], |range, blocks| {
        let [params, means, squares] = blocks else {
            unreachable!("three vectors are updated")
        };
        let values = params
            .iter_mut()
            .zip(means.iter_mut())
            .zip(squares.iter_mut())
            .zip(&grads[range]);
        for (((param, mean), square), grad) in values {
            *mean = 0.9 * *mean + 0.1 * grad;
            *square = 0.999 * *square + 0.001 * (grad * grad);
            *param = 0.9999 * *param - 0.001 * (*mean / (square.sqrt() + 1e-8));
        }
    });
}

fn main() {
    let Some(settings) = Settings::from_args() else {
        return;
    };
    snapshots(settings);
    saves(settings);
}

/// A snapshot of many values, and an update with and without one.
fn snapshots(settings: Settings) {
    let values = |from: f32| -> FlatVector {
        let values: Vec<f32> = (0..VALUES).map(|at| from + at as f32 * 1e-9).collect();
        values.into()
    };
    let mut vectors = [values(0.5), values(0.25), values(0.125)];
    let grads = values(0.01);
    let snapshot = |vectors: &[FlatVector; 3]| vectors.each_ref().map(FlatVector::snapshot);
    let mut report = Report::new("a snapshot of 100 MB, one core");
    let samples = repeat(settings, || {
        black_box(snapshot(&vectors));
    });
    report.add("snapshot", samples);
    let samples = repeat(settings, || update(&mut vectors, &grads));
    report.add("update, no snapshot open", samples);
    let samples = repeat(settings, || {
        let open = snapshot(&vectors);
        update(&mut vectors, &grads);
        drop(open);
    });
    report.add("update, a snapshot open each time", samples);
    let samples = repeat(settings, || {
        black_box(vectors.each_ref().map(|vector| vector.to_vec()));
    });
    report.add("limit: a copy of all of it", samples);
    report.print();
}

/// Rounds with and without checkpoints, in turn: a machine whose clock changes changes both.
const ROUNDS: u32 = 4;

/// Steps, with a checkpoint always on its way to a directory (each file fsynced) and without.
fn saves(settings: Settings) {
    let spec = TrainSpec {
        steps: 1_000_000,
        workers: WorkerRange { min: 1, max: 1 },
        virtual_shards: 1,
        global_batch: 256,
        model: ModelSpec::Mlp {
            hidden: vec![2048, 2048],
        },
        ..TrainSpec::digits_mlp("bench")
    };
    let workload = Workload::load(&spec, &Files::local()).expect("the digits are in the program");
    let mut trainer = LocalTrainer::new(&workload).expect("the initial state fits");
    let (offers, offered) = sync_channel::<StateSnapshot>(0);
    let uploader = std::thread::spawn(move || store_all(offered));
    let round = settings.round_of(ROUNDS);
    let (mut without, mut with) = (Samples::new(), Samples::new());
    for _ in 0..ROUNDS {
        without.merge(&repeat(round, || step(&mut trainer)));
        with.merge(&repeat(round, || {
            step(&mut trainer);
            offer(&offers, &trainer);
        }));
        // The last one of this round is stored before the next begins.
        let last = StateSnapshot::of(trainer.state());
        offers.send(last).expect("it listens until this is dropped");
    }
    drop(offers);
    let stored = uploader.join().expect("it does not panic");
    let share = with.per_second() / without.per_second();
    let mut report = Report::new("steps of an MLP 64-2048-2048-10, batch 256, one core");
    report.add("no checkpoint", without);
    report.add_with(
        "a checkpoint always in flight",
        with,
        format!("{:.1} % of the throughput; {stored}", share * 100.0),
    );
    report.print();
}

fn step(trainer: &mut LocalTrainer<'_>) {
    black_box(trainer.step(1).expect("the loss stays finite"));
}

/// Gives the state to the uploader if it waits for one.
fn offer(offers: &SyncSender<StateSnapshot>, trainer: &LocalTrainer<'_>) {
    // Most of the time it is still at the last one.
    let _ = offers.try_send(StateSnapshot::of(trainer.state()));
}

/// Stores each state as a checkpoint of its own, in a new directory; says how many and how fast.
fn store_all(offered: Receiver<StateSnapshot>) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a thread has a runtime");
    let (mut count, mut bytes, mut spent) = (0_u64, 0_u64, Duration::ZERO);
    for state in offered {
        let directory = tempfile::tempdir().expect("there is room for a directory");
        let url = format!("file://{}", directory.path().display());
        let blobs =
            BlobStore::open(&url, &S3Options::default()).expect("a directory can be opened");
        let request = SaveRequest {
            job: JobId(1),
            step: count,
            incarnation: Incarnation(1),
            parent: None,
            sections: Vec::new(),
            metadata: BTreeMap::new(),
        };
        let state: Arc<dyn CheckpointSource> = Arc::new(state);
        let length = state.length_bytes();
        let begun = Instant::now();
        let writer = CheckpointWriter::new(blobs);
        let saving = writer.save_from(request, state);
        runtime.block_on(saving).expect("there is room for a state");
        (count, bytes, spent) = (count + 1, bytes + length, spent + begun.elapsed());
    }
    let rate = bytes as f64 / 1e6 / spent.as_secs_f64();
    format!("{count} stored at {rate:.0} MB/s")
}
