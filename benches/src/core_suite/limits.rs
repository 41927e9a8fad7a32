//! What the machine itself can do, in the same run.

use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use mobula_benches::measure::{Settings, repeat};

use crate::Options;
use crate::outcome::Outcome;

/// As large as what Ray's `put gigabytes` copies at a time, within bounds.
const COPIED_BYTES: usize = 256 << 20;

pub(crate) fn measure(options: &Options, outcome: &mut Outcome) -> std::io::Result<()> {
    let settings = Settings {
        warm_up: options.warm_up,
        length: options.round,
    };
    outcome.figure("limit: memcpy", memcpy_gigabytes(options), "GB/s");

    let (mut near, mut far) = UnixStream::pair()?;
    let echo = std::thread::spawn(move || {
        let mut byte = [0; 16];
        while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
    });
    let mut buffer = [0; 16];
    let samples = repeat(settings, || {
        near.write_all(&buffer).expect("the echo reads");
        near.read_exact(&mut buffer).expect("the echo answers");
    });
    drop(near);
    echo.join().expect("the echo does not panic");
    let p50 = samples.quantile(0.5).as_secs_f64() * 1e6;
    outcome.figure("limit: Unix socket round trip, p50", p50, "µs");

    let bind = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
    let (near, far) = (bind()?, bind()?);
    near.connect(far.local_addr()?)?;
    far.connect(near.local_addr()?)?;
    let echo = std::thread::spawn(move || {
        let mut buffer = [0; 16];
        // An empty datagram is the end.
        while matches!(far.recv(&mut buffer), Ok(count) if count > 0) {
            if far.send(&buffer).is_err() {
                return;
            }
        }
    });
    let samples = repeat(settings, || {
        near.send(&buffer).expect("loopback takes datagrams");
        near.recv(&mut buffer).expect("one at a time, none is lost");
    });
    near.send(&[])?;
    echo.join().expect("the echo does not panic");
    let p50 = samples.quantile(0.5).as_secs_f64() * 1e6;
    outcome.figure("limit: UDP loopback round trip, p50", p50, "µs");

    let mut file = tempfile::tempfile()?;
    let samples = repeat(settings, || {
        file.seek(SeekFrom::Start(0)).expect("a file can be sought");
        file.write_all(&[7; 128]).expect("the disk takes a record");
        file.sync_data().expect("the disk syncs");
    });
    let p50 = samples.quantile(0.5).as_secs_f64() * 1e6;
    outcome.figure("limit: fsync in the temporary folder, p50", p50, "µs");
    Ok(())
}

/// Between two buffers that are mapped already.
fn memcpy_gigabytes(options: &Options) -> f64 {
    let source = vec![1_u8; COPIED_BYTES];
    let mut target = vec![2_u8; COPIED_BYTES];
    let start = Instant::now();
    let mut count = 0_u32;
    loop {
        target.copy_from_slice(std::hint::black_box(&source));
        std::hint::black_box(&mut target);
        count += 1;
        let elapsed = start.elapsed();
        if elapsed >= options.round {
            let bytes = f64::from(count) * COPIED_BYTES as f64;
            return bytes / elapsed.as_secs_f64() / 1e9;
        }
    }
}
