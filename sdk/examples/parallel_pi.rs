//! Pi by throwing darts, on several actors at once. The darts are a function of seed and worker,
//! so that the same arguments give the same digits on any cluster.
//!
//! `cargo run --example parallel_pi -- 4 1000000`, or
//! `mobula submit --follow target/debug/examples/parallel_pi -- 4 1000000`.

use mobula::prelude::*;

/// Draws darts from its own part of the random sequence.
struct Thrower {
    state: u64,
}

#[mobula::actor]
impl Thrower {
    fn new(seed: u64, worker: u64) -> Self {
        Thrower {
            state: seed ^ worker.wrapping_mul(0xA076_1D64_78BD_642F),
        }
    }

    /// How many of `darts` land within the quarter circle.
    async fn throw(&mut self, darts: u64) -> u64 {
        // Pure arithmetic for a while: let the rest of the process go on beside it.
        tokio::task::block_in_place(|| {
            (0..darts)
                .filter(|_| {
                    let (x, y) = (self.coordinate(), self.coordinate());
                    x * x + y * y <= 1.0
                })
                .count() as u64
        })
    }

    /// SplitMix64 (Steele, Lea, Flood 2014), scaled to [0, 1).
    #[mobula(local)]
    fn coordinate(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<()> {
    let workers: u64 = args.first().map_or(Ok(4), |text| text.parse())?;
    let darts: u64 = args.get(1).map_or(Ok(1_000_000), |text| text.parse())?;

    let members = (0..workers).map(|worker| {
        cluster
            .actor(Thrower::new(42, worker))
            .cpus(0.1)
            .spread("thrower")
    });
    let throwers = cluster.group(members).spawn().await?;

    let calls = throwers
        .iter()
        .map(|thrower| thrower.throw(darts).into_future());
    let mut inside = 0;
    for hits in futures::future::join_all(calls).await {
        inside += hits?;
    }
    let pi = 4.0 * inside as f64 / (workers * darts) as f64;
    println!("pi is about {pi:.6} ({workers} workers, {darts} darts each)");
    cluster
        .set_result(&serde_json::json!({ "pi": pi, "workers": workers, "darts": darts }))
        .await
}
