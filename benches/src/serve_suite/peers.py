"""Triton's own `perf_analyzer` against a tritonserver and against Mobula, in turns; prints a table.

usage: peers.py FOLDER TRITON_HTTP TRITON_GRPC IDENTITY_SERVER MOBULA [--quick]

All serve `identity`, FP32 of 16: the tritonserver with its Python backend, which is one process beside its own; Mobula by an endpoint
of two replicas of an ONNX graph, each in a process beside the router's, and by the example `identity_server`, which is the
protocol without a cluster. The program comes from the last wheel of `tritonclient` that has it; the libraries that it wants
are those of `nvidia-pytriton`, under their plain names.
"""

import contextlib
import csv
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import pytriton

MODEL = pathlib.Path(__file__).parent / "identity.onnx"

WHEEL = "tritonclient==2.49.0"
CALLERS = [1, 8, 64]

# Rounds of a measurement may differ by half before it counts as unstable: two of them share a machine with the server.
STABILITY_PERCENT = "50"

# What is measured at a time. perf_analyzer keeps a record of each request and goes through all of them again and again: where
# they come too fast for that it takes gigabytes and comes to no end, and shorter windows are asked of both.
WINDOW_MS, WINDOW_SHORT_MS = 5000, 1000
LIMIT_S = 120


def perf_analyzer(folder):
    """The program and the folder of its libraries."""
    program = folder / "perf_analyzer"
    libraries = folder / "libraries"
    if not program.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--platform", "manylinux1_x86_64", "--dest", folder, WHEEL], check=True)
        (wheel,) = folder.glob("tritonclient-*.whl")
        with zipfile.ZipFile(wheel) as files:
            (name,) = [name for name in files.namelist() if name.endswith("/bin/perf_analyzer")]
            program.write_bytes(files.read(name))
        program.chmod(0o755)
    libraries.mkdir(exist_ok=True)
    bundled = pathlib.Path(pytriton.__file__).parent.parent / "nvidia_pytriton.libs"
    for plain, pattern in [("libb64.so.0d", "libb64-*"), ("libcudart.so.12", "libcudart-*")]:
        (found,) = bundled.glob(pattern)
        link = libraries / plain
        link.unlink(missing_ok=True)
        link.symlink_to(found)
    return program, f"{libraries}:{bundled}"


def measured(program, libraries, folder, protocol, address, token, callers, window_ms):
    """Answers a second, and the median and 99th percentile of their latencies in microseconds; None if it takes too long."""
    figures = folder / "figures.csv"
    figures.unlink(missing_ok=True)
    # By gRPC the name must be in small letters, and a space after the colon is taken for a part of the value.
    authorization = f"authorization:Bearer {token}"
    command = [
        program, "-m", "identity", "-u", address, "-i", protocol, "-b", "1",
        "--concurrency-range", str(callers), "--measurement-interval", str(window_ms),
        "--stability-percentage", STABILITY_PERCENT, "-H", authorization, "-f", figures,
    ]
    environment = os.environ | {"LD_LIBRARY_PATH": libraries}
    try:
        ran = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return None
    rows = list(csv.DictReader(figures.open())) if figures.exists() else []
    if not rows:
        raise SystemExit(f"perf_analyzer measured nothing at {address}:\n{ran.stdout}")
    (row,) = rows
    return tuple(float(row[name]) for name in ("Inferences/Second", "p50 latency", "p99 latency"))


def cells_of(measured):
    """Three cells of the table."""
    if measured is None:
        return f"not within {LIMIT_S} s | – | –"
    rate, p50, p99 = measured
    return f"{rate:.0f} | {p50:.0f} µs | {p99:.0f} µs"


@contextlib.contextmanager
def endpoint(mobula):
    """Where an endpoint of a cluster answers, and its token."""
    with tempfile.TemporaryDirectory() as folder:
        def asked(*arguments):
            ran = subprocess.run([mobula, *arguments, "--json"], env=environment, stdout=subprocess.PIPE, check=True)
            return json.loads(ran.stdout)

        environment = os.environ | {"MOBULA_CLUSTER": folder}
        subprocess.run([mobula, "local", "up", "--data-dir", folder], stdout=subprocess.DEVNULL, check=True)
        try:
            asked("models", "register", "identity", "--onnx", str(MODEL))
            deployed = asked("serve", "deploy", "identity", "--replicas", "2")
            yield deployed["url"].removeprefix("http://"), deployed["token"]
        finally:
            subprocess.run([mobula, "local", "down", "--data-dir", folder], stdout=subprocess.DEVNULL, check=True)


@contextlib.contextmanager
def protocol_alone(server):
    """Where the example answers, and its token."""
    child = subprocess.Popen([server], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        yield child.stdout.readline().split()
    finally:
        child.kill()
        child.wait()


def main():
    folder, triton_http, triton_grpc, server, mobula, *quick = sys.argv[1:]
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    windows_ms = [WINDOW_SHORT_MS] if quick else [WINDOW_MS, WINDOW_SHORT_MS]
    program, libraries = perf_analyzer(folder)
    with endpoint(mobula) as deployed, protocol_alone(server) as alone:
        names = ["tritonserver", "an endpoint", "the protocol alone"]
        heads = [f"{name}, a second | p50 | p99" for name in names]
        print(f"| identity, FP32 of 16 | {' | '.join(heads)} | endpoint beside tritonserver |")
        print(f"|---{'|---' * 3 * len(names)}|---|", flush=True)
        for protocol, triton in [("http", triton_http), ("grpc", triton_grpc)]:
            contenders = [(triton, ""), deployed, alone]
            for callers in CALLERS:
                for window_ms in windows_ms:
                    rows = [
                        measured(program, libraries, folder, protocol, address, token, callers, window_ms)
                        for address, token in contenders
                    ]
                    if all(rows):
                        break
                theirs, ours, _ = rows
                ratio = f"{ours[0] / theirs[0]:.2f}×" if theirs and ours else "–"
                note = "" if window_ms == windows_ms[0] else f", windows of {window_ms} ms"
                cells = " | ".join(map(cells_of, rows))
                print(f"| {protocol}, {callers} callers{note} | {cells} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
