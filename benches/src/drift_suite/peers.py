"""river's detectors on the streams of the drift suite, in its rows."""

import sys
import time

import river
from river import drift

CHUNK = 100_000


def uniform(count):
    state = 12_345
    for _ in range(count):
        state = (1_103_515_245 * state + 12_345) % (1 << 31)
        yield state / (1 << 31)


def measure(name, detector, stream, length):
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < length:
        for value in stream:
            detector.update(value)
        count += len(stream)
    rate = count / (time.perf_counter() - began)
    print(f"{name:<60} {rate:>12.2f} /s", flush=True)


def main():
    length = 0.3 if "--quick" in sys.argv[1:] else 3
    print(f"river {river.__version__}", flush=True)
    values = list(uniform(CHUNK))
    errors = [int(value < 0.1) for value in values]
    measure("ADWIN, uniform numbers", drift.ADWIN(), values, length)
    measure("Page-Hinkley, uniform numbers", drift.PageHinkley(), values, length)
    measure("HDDM_A, errors at 10 %", drift.binary.HDDMA(), errors, length)
    measure("HDDM_W, errors at 10 %", drift.binary.HDDMW(), errors, length)


main()
