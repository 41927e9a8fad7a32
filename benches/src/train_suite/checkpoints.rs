//! What checkpoints cost training: a snapshot of 100 MB of parameters and two moments, on one core; and steps of a whole
//! network on one core while its state is stored by the other, again and again.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use mobula_actors::checkpoint::sharing;
use mobula_actors::checkpoint::spread::Spread;
use mobula_actors::kernels::Execution;
use mobula_actors::kernels::update::AdamwUpdate;
use mobula_actors::training::data::Files;
use mobula_actors::training::flat_vector::FlatVector;
use mobula_actors::training::local::LocalTrainer;
use mobula_actors::training::models::ModelSpec;
use mobula_actors::training::snapshot::StateSnapshot;
use mobula_actors::training::spec::{TrainSpec, WorkerRange};
use mobula_actors::training::workload::Workload;
use mobula_benches::measure::{Samples, repeat};
use mobula_benches::results::Results;
use mobula_core::{Incarnation, JobId};
use mobula_storage::blob::{BlobStore, S3Options};
use mobula_storage::checkpoint::{CheckpointSource, CheckpointWriter, SaveRequest};
use serde_json::json;

use crate::{Options, Outcome};

/// Values of the parameters and of each moment: 100 MB of all three.
const VALUES: usize = 25_000_000 / 3;
/// How the rows of snapshots begin.
const SNAPSHOT: &str = "snapshot of 100 MB";
/// How the rows of saves begin.
const SAVES: &str = "checkpoints, mlp 64-2048-2048-10, batch 256, 1 thread";

fn update(vectors: &mut [FlatVector; 3], grads: &[f32]) {
    let [params, means, squares] = vectors.each_mut().map(FlatVector::target);
    let update = AdamwUpdate {
        scale: 1.0,
        beta1: 0.9,
        one_minus_beta1: 0.1,
        beta2: 0.999,
        one_minus_beta2: 0.001,
        epsilon: 1e-8,
        inverse_square_correction: 1.0,
        keep: 0.9999,
        rate: 0.001,
    };
    let one_core = Execution::current().with_threads(NonZeroUsize::MIN);
    update.apply(one_core, params, means, squares, grads);
}

pub(crate) fn measure(options: &Options, results: &mut Results) -> Outcome {
    if options.wants(SNAPSHOT) {
        snapshots(options, results);
    }
    if options.wants(SAVES) {
        saves(options, results);
    }
    Ok(())
}

/// A row of something that takes this long.
fn report(results: &mut Results, name: &str, samples: &Samples, more: &str) {
    let ms = |share| samples.quantile(share).as_secs_f64() * 1e3;
    let (p50, p99) = (ms(0.5), ms(0.99));
    results.row(
        &format!("{name:<64} {p50:>10.4} ms  p99 {p99:.4} ms{more}"),
        json!({ "name": name, "unit": "ms", "p50": p50, "p99": p99, "count": samples.count() }),
    );
}

/// A snapshot of many values, and an update with and without one.
fn snapshots(options: &Options, results: &mut Results) {
    let settings = options.settings();
    let values = |from: f32| -> FlatVector {
        let values: Vec<f32> = (0..VALUES).map(|at| from + at as f32 * 1e-9).collect();
        values.into()
    };
    let mut vectors = [values(0.5), values(0.25), values(0.125)];
    let grads = values(0.01);
    let snapshot = |vectors: &[FlatVector; 3]| vectors.each_ref().map(FlatVector::snapshot);
    let mut row = |name: &str, samples: &Samples| {
        report(
            results,
            &format!("{SNAPSHOT}, {name}, 1 thread"),
            samples,
            "",
        );
    };
    let samples = repeat(settings, || {
        black_box(snapshot(&vectors));
    });
    row("opening it", &samples);
    let samples = repeat(settings, || update(&mut vectors, &grads));
    row("update, none open", &samples);
    let samples = repeat(settings, || {
        let open = snapshot(&vectors);
        update(&mut vectors, &grads);
        drop(open);
    });
    row("update, one open each time", &samples);
    let samples = repeat(settings, || {
        black_box(vectors.each_ref().map(|vector| vector.to_vec()));
    });
    row("limit: a copy of all of it", &samples);
}

/// Rounds of each kind, in turn: a machine whose clock changes changes all.
const ROUNDS: u32 = 4;
/// Over so many steps a job spreads a save.
const SPREAD_STEPS: u32 = 8;

/// A state to store, and over what time.
type Offer = (StateSnapshot, Spread);

/// Steps, with a checkpoint always on its way to a directory (each file fsynced) and without.
fn saves(options: &Options, results: &mut Results) {
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
    let (offers, offered) = sync_channel::<Offer>(0);
    let uploader = std::thread::spawn(move || store_all(offered));
    let round = options.settings().round_of(ROUNDS);
    let mut without = Samples::new();
    let mut with = [Samples::new(), Samples::new()];
    for _ in 0..ROUNDS {
        let free = repeat(round, || step(&mut trainer));
        let over = Duration::from_secs_f64(f64::from(SPREAD_STEPS) / free.per_second());
        without.merge(&free);
        for (with, over) in with.iter_mut().zip([over, Duration::ZERO]) {
            with.merge(&repeat(round, || {
                step(&mut trainer);
                offer(&offers, &trainer, over);
            }));
            // The last one of this round is stored before the next begins.
            let last = StateSnapshot::of(trainer.state());
            offers
                .send((last, Spread::default()))
                .expect("it listens until this is dropped");
        }
    }
    drop(offers);
    let [spread, fast] = uploader.join().expect("it does not panic");
    let base = without.per_second();
    report(results, &format!("{SAVES}, none"), &without, "");
    let rows = [
        ("always one in flight over 8 steps", spread),
        ("always one in flight at full speed", fast),
    ];
    for ((name, stored), with) in rows.into_iter().zip(with) {
        let name = format!("{SAVES}, {name}");
        let share = with.per_second() / base * 100.0;
        report(results, &name, &with, &format!(", {stored}"));
        let name = format!("{name}: throughput");
        results.row(
            &format!("{name:<100} {share:>6.1} %"),
            json!({ "name": name, "unit": "%", "share": share }),
        );
    }
}

fn step(trainer: &mut LocalTrainer<'_>) {
    black_box(trainer.step(1).expect("the loss stays finite"));
}

/// Gives the state to the uploader if it waits for one.
fn offer(offers: &SyncSender<Offer>, trainer: &LocalTrainer<'_>, over: Duration) {
    // Most of the time it is still at the last one.
    let _ = offers.try_send((StateSnapshot::of(trainer.state()), Spread::over(over)));
}

/// Stores each state as a checkpoint of its own, in a new directory; says how many and how fast, of those that are
/// spread over a time and of the others.
fn store_all(offered: Receiver<Offer>) -> [String; 2] {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a thread has a runtime");
    let mut stored = [(0_u64, 0_u64, Duration::ZERO); 2];
    for (state, spread) in offered {
        let directory = tempfile::tempdir().expect("there is room for a directory");
        let url = format!("file://{}", directory.path().display());
        let blobs =
            BlobStore::open(&url, &S3Options::default()).expect("a directory can be opened");
        let request = SaveRequest {
            job: JobId(1),
            step: 1,
            incarnation: Incarnation(1),
            parent: None,
            sections: Vec::new(),
            metadata: BTreeMap::new(),
        };
        let state: Arc<dyn CheckpointSource> = Arc::new(state);
        let length = state.length_bytes();
        let begun = Instant::now();
        let writer = CheckpointWriter::new(blobs);
        let saving = async {
            let prepared = writer.prepare(request, Arc::clone(&state)).await?;
            sharing::upload(&writer, &state, 1, prepared.missing(), &[], &spread).await?;
            writer.finish(prepared).await
        };
        runtime.block_on(saving).expect("there is room for a state");
        let (count, bytes, spent) = &mut stored[usize::from(!spread.holds_back())];
        *count += 1;
        *bytes += length;
        *spent += begun.elapsed();
    }
    stored.map(|(count, bytes, spent)| {
        let rate = bytes as f64 / 1e6 / spent.as_secs_f64();
        format!("{count} stored at {rate:.0} MB/s")
    })
}
