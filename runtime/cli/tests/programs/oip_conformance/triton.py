"""Writes what a tritonserver needs to serve the models of the probes, and starts it in this process's place.

usage: triton.py FOLDER HTTP_PORT GRPC_PORT

The server is the one in PyPI's `nvidia-pytriton`, with its Python backend.
"""

import os
import pathlib
import shutil
import sys
import sysconfig

import pytriton

COPY = "pb.Tensor({name}, tensor.as_numpy())"
# NumPy has no BF16.
COPY_BF16 = "pb.Tensor.from_dlpack({name}, tensor.to_dlpack())"

MODEL = """
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            wanted = request.requested_output_names()
            outputs = []
            for tensor in sorted(request.inputs(), key=lambda tensor: tensor.name()):
                name = "OUTPUT" + tensor.name()[len("INPUT"):]
                if name in wanted:
                    outputs.append(COPIED)
            answers.append(pb.InferenceResponse(outputs))
        return answers
"""


def tensors(side, types, labels):
    file = ' label_filename: "labels.txt"' if labels and side == "OUTPUT" else ""
    return ", ".join(
        f'{{ name: "{side}{number}" data_type: TYPE_{datatype} dims: [{size}]{file} }}'
        for number, (datatype, size) in enumerate(types)
    )


def model(repository, name, max_batch_size, types, labels=()):
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    copied = COPY_BF16 if types[0][0] == "BF16" else COPY
    (folder / "1" / "model.py").write_text(MODEL.replace("COPIED", copied.format(name="name")))
    (folder / "config.pbtxt").write_text(
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: {max_batch_size}\n'
        f"input [ {tensors('INPUT', types, labels)} ]\noutput [ {tensors('OUTPUT', types, labels)} ]\n"
        "instance_group [{ kind: KIND_CPU count: 1 }]\n"
    )
    if labels:
        (folder / "labels.txt").write_text("\n".join(labels) + "\n")


def main():
    folder, http_port, grpc_port = sys.argv[1:]
    folder = pathlib.Path(folder).absolute()
    repository = folder / "models"
    model(repository, "identity", 8, [("FP32", 16)])
    model(repository, "pair", 4, [("FP32", 4), ("INT32", 4)])
    model(repository, "labelled", 4, [("FP32", 4)], ["zero", "one", "two", "three"])
    for datatype in "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 BF16 FP64 STRING".split():
        name = "bytes" if datatype == "STRING" else datatype.lower()
        model(repository, f"typed_{name}", 0, [(datatype, -1)])

    # The backend looks for its stub beside itself, and the package keeps one for each Python elsewhere.
    installed = pathlib.Path(pytriton.__file__).parent
    server = installed / "tritonserver"
    backend = folder / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    libraries = [installed.parent / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    program = str(server / "bin" / "tritonserver")
    os.execv(program, [
        program,
        f"--model-repository={repository}",
        f"--backend-directory={backend.parent}",
        "--http-address=127.0.0.1",
        f"--http-port={http_port}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc_port}",
        "--allow-metrics=false",
    ])


if __name__ == "__main__":
    main()
