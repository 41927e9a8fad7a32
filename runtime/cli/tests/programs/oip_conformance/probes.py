"""The probes: calls of the Open Inference Protocol, right ones and wrong ones, as raw requests.

Each is sent to a live tritonserver and to Mobula; where their answers differ, `differences.py` says why.
"""

import dataclasses
import gzip
import json
import struct
import zlib
from typing import Any

import numpy
from tritonclient.grpc import model_config_pb2, service_pb2

JSON_LENGTH = "Inference-Header-Content-Length"


@dataclasses.dataclass
class Http:
    """One HTTP request."""

    group: str
    name: str
    method: str
    path: str
    body: bytes = b""
    headers: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Grpc:
    """One gRPC call; a list of messages is a stream."""

    group: str
    name: str
    method: str
    message: Any


PROBES: list = []


def http(group, name, method, path, body=b"", headers=None):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    PROBES.append(Http(group, name, method, path, body, headers or {}))


def grpc(group, name, method, message):
    PROBES.append(Grpc(group, name, method, message))


def tensor(name, datatype, shape, data=None, **parameters):
    described = {"name": name, "shape": shape, "datatype": datatype}
    if parameters:
        described["parameters"] = parameters
    if data is not None:
        described["data"] = data
    return described


ROW = [index / 4 for index in range(16)]
ROWS = [ROW, [-value for value in ROW]]
ROW_BYTES = numpy.array(ROW, dtype="<f4").tobytes()


def row(**changes):
    return tensor("INPUT0", "FP32", [1, 16], ROW) | changes


def request(*inputs, **fields):
    return {"inputs": list(inputs)} | fields


def binary(described, tail, length=None, **headers):
    """The body and headers of a request with binary tensors."""
    text = json.dumps(described).encode()
    value = len(text) if length is None else length
    return {"body": text + tail, "headers": {JSON_LENGTH: str(value)} | headers}


def infer(name, body=b"", model="identity", group="infer: JSON", **rest):
    http(group, name, "POST", f"/v2/models/{model}/infer", body, **rest)


# Server, health, metadata.
for path in ["/v2", "/v2/health/live", "/v2/health/ready"]:
    http("server", f"GET {path}", "GET", path)
http("server", "a path that does not exist", "GET", "/v2/nothing")
http("server", "POST where GET is meant", "POST", "/v2/health/live")
http("server", "GET where POST is meant", "GET", "/v2/models/identity/infer")
for what in ["", "/ready", "/config", "/stats"]:
    for version in ["", "/versions/1", "/versions/7", "/versions/one"]:
        http("model", f"identity{version}{what}", "GET", f"/v2/models/identity{version}{what}")
    http("model", f"unknown model{what}", "GET", f"/v2/models/nobody{what}")
for model in ["pair", "labelled", "typed_bytes", "typed_bf16"]:
    http("model", f"metadata of {model}", "GET", f"/v2/models/{model}")
    http("model", f"config of {model}", "GET", f"/v2/models/{model}/config")

# Inference in JSON.
infer("one row, flat", request(row()))
infer("one row, nested", request(row(data=[ROW])))
infer("two rows, nested", request(tensor("INPUT0", "FP32", [2, 16], ROWS)))
infer("two rows, flat", request(tensor("INPUT0", "FP32", [2, 16], ROWS[0] + ROWS[1])))
infer("nesting that is not the shape's", request(tensor("INPUT0", "FP32", [2, 16], [ROWS[0] + ROWS[1]])))
infer("whole numbers as FP32", request(row(data=list(range(16)))))
infer("numbers with exponents", request(row(data=[1e-3, 2.5e10] + ROW[2:])))
infer("an id", request(row(), id="seventeen"))
infer("an empty id", request(row(), id=""))
infer("an output by name", request(row(), outputs=[{"name": "OUTPUT0"}]))
infer("an empty list of outputs", request(row(), outputs=[]))
infer("parameters of a request", request(row(), parameters={"colour": "red", "size": 3, "on": True}))
infer("a parameter that is an array", request(row(), parameters={"colour": ["red"]}))
infer("a parameter that is null", request(row(), parameters={"colour": None}))
infer("unknown fields", request(row(), more={"a": 1}))
infer("version 1", request(row()), model="identity/versions/1")
infer("version 7", request(row()), model="identity/versions/7")
infer("unknown model", request(row()), model="nobody")
infer("Content-Type application/json", request(row()), headers={"Content-Type": "application/json"})
infer("Content-Type text/plain", request(row()), headers={"Content-Type": "text/plain"})
infer("two inputs", request(
    tensor("INPUT0", "FP32", [1, 4], [1, 2, 3, 4]), tensor("INPUT1", "INT32", [1, 4], [5, 6, 7, 8])), model="pair")
infer("two inputs in the other order", request(
    tensor("INPUT1", "INT32", [1, 4], [5, 6, 7, 8]), tensor("INPUT0", "FP32", [1, 4], [1, 2, 3, 4])), model="pair")
infer("one of two outputs", request(
    tensor("INPUT0", "FP32", [1, 4], [1, 2, 3, 4]), tensor("INPUT1", "INT32", [1, 4], [5, 6, 7, 8]),
    outputs=[{"name": "OUTPUT1"}]), model="pair")
infer("two outputs in the other order", request(
    tensor("INPUT0", "FP32", [1, 4], [1, 2, 3, 4]), tensor("INPUT1", "INT32", [1, 4], [5, 6, 7, 8]),
    outputs=[{"name": "OUTPUT1"}, {"name": "OUTPUT0"}]), model="pair")

# What is refused.
REFUSED = "infer: refused"
infer("no body", b"", group=REFUSED)
infer("a body that is no JSON", b"hello", group=REFUSED)
infer("JSON that is cut off", json.dumps(request(row())).encode()[:-9], group=REFUSED)
infer("JSON that is a list", [1], group=REFUSED)
infer("no inputs", {}, group=REFUSED)
infer("an empty list of inputs", request(), group=REFUSED)
infer("inputs that are no list", {"inputs": 7}, group=REFUSED)
infer("an input without a name", request({"shape": [1, 16], "datatype": "FP32", "data": ROW}), group=REFUSED)
infer("an input without a shape", request({"name": "INPUT0", "datatype": "FP32", "data": ROW}), group=REFUSED)
infer("an input without a datatype", request({"name": "INPUT0", "shape": [1, 16], "data": ROW}), group=REFUSED)
infer("an input without data", request(tensor("INPUT0", "FP32", [1, 16])), group=REFUSED)
infer("an unknown input", request(row(name="INPUT9")), group=REFUSED)
infer("an input too many", request(row(), row(name="INPUT9")), group=REFUSED)
infer("an input twice", request(row(), row()), group=REFUSED)
infer("an input too few", request(tensor("INPUT0", "FP32", [1, 4], [1, 2, 3, 4])), model="pair", group=REFUSED)
infer("batches of unequal size", request(
    tensor("INPUT0", "FP32", [2, 4], [1] * 8), tensor("INPUT1", "INT32", [1, 4], [1] * 4)), model="pair", group=REFUSED)
infer("an unknown output", request(row(), outputs=[{"name": "OUTPUT9"}]), group=REFUSED)
infer("an output twice", request(row(), outputs=[{"name": "OUTPUT0"}] * 2), group=REFUSED)
infer("another datatype", request(row(datatype="FP64")), group=REFUSED)
infer("an unknown datatype", request(row(datatype="FLOAT")), group=REFUSED)
infer("a datatype in small letters", request(row(datatype="fp32")), group=REFUSED)
infer("a row too short", request(tensor("INPUT0", "FP32", [1, 15], ROW[:15])), group=REFUSED)
infer("a dimension too few", request(tensor("INPUT0", "FP32", [16], ROW)), group=REFUSED)
infer("a dimension too many", request(tensor("INPUT0", "FP32", [1, 1, 16], ROW)), group=REFUSED)
infer("a dimension below zero", request(tensor("INPUT0", "FP32", [-1, 16], ROW)), group=REFUSED)
infer("a shape that overflows", request(tensor("INPUT0", "FP32", [1 << 62, 16], ROW)), group=REFUSED)
infer("a shape of text", request(tensor("INPUT0", "FP32", ["1", 16], ROW)), group=REFUSED)
infer("fewer values than the shape", request(row(data=ROW[:15])), group=REFUSED)
infer("more values than the shape", request(row(data=ROW + [1.0])), group=REFUSED)
infer("text among numbers", request(row(data=ROW[:15] + ["1"])), group=REFUSED)
infer("null among numbers", request(row(data=ROW[:15] + [None])), group=REFUSED)
infer("truth among numbers", request(row(data=ROW[:15] + [True])), group=REFUSED)
infer("a number too large for FP32", request(row(data=ROW[:15] + [1e300])), group=REFUSED)
infer("data that is no list", request(row(data=1.5)), group=REFUSED)
infer("no rows", request(tensor("INPUT0", "FP32", [0, 16], [])), group=REFUSED)
infer("the largest batch", request(tensor("INPUT0", "FP32", [8, 16], ROW * 8)), group=REFUSED)
infer("a row more than the largest batch", request(tensor("INPUT0", "FP32", [9, 16], ROW * 9)), group=REFUSED)
infer("an id that is no text", request(row(), id=[1]), group=REFUSED)
infer("an unknown kind of shared memory", request(row(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 64})), group=REFUSED)

# Binary tensors.
BINARY = "infer: binary"
WANTED = {"outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}]}
raw = tensor("INPUT0", "FP32", [1, 16], binary_data_size=64)
infer("binary in, JSON out", group=BINARY, **binary(request(raw), ROW_BYTES))
infer("binary in, binary out", group=BINARY, **binary(request(raw, **WANTED), ROW_BYTES))
infer("JSON in, binary out", request(row(), **WANTED), group=BINARY)
infer("binary_data_output", request(row(), parameters={"binary_data_output": True}), group=BINARY)
infer("binary_data_output, an output's own wish wins", request(
    row(), parameters={"binary_data_output": True},
    outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": False}}]), group=BINARY)
infer("binary_data_output that is a number", request(row(), parameters={"binary_data_output": 1}), group=BINARY)
infer("binary_data that is text", request(row(), outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": "yes"}}]), group=BINARY)
infer("one of two outputs binary", request(
    tensor("INPUT0", "FP32", [1, 4], [1, 2, 3, 4]), tensor("INPUT1", "INT32", [1, 4], [5, 6, 7, 8]),
    outputs=[{"name": "OUTPUT0"}, {"name": "OUTPUT1", "parameters": {"binary_data": True}}]), model="pair", group=BINARY)
infer("one of two inputs binary", model="pair", group=BINARY, **binary(request(
    tensor("INPUT0", "FP32", [1, 4], [1, 2, 3, 4]), tensor("INPUT1", "INT32", [1, 4], binary_data_size=16)),
    struct.pack("<4i", 5, 6, 7, 8)))
infer("a body that is cut off", group=BINARY, **binary(request(raw), ROW_BYTES[:-1]))
infer("bytes that are left over", group=BINARY, **binary(request(raw), ROW_BYTES + b"\0"))
infer("binary_data_size too small", group=BINARY, **binary(request(tensor("INPUT0", "FP32", [1, 16], binary_data_size=60)), ROW_BYTES[:60]))
infer("binary_data_size too large", group=BINARY, **binary(request(tensor("INPUT0", "FP32", [1, 16], binary_data_size=68)), ROW_BYTES + bytes(4)))
infer("binary_data_size that is text", group=BINARY, **binary(request(tensor("INPUT0", "FP32", [1, 16], binary_data_size="64")), ROW_BYTES))
infer("binary_data_size below zero", group=BINARY, **binary(request(tensor("INPUT0", "FP32", [1, 16], binary_data_size=-64)), ROW_BYTES))
infer("data and binary_data_size", group=BINARY, **binary(request(tensor("INPUT0", "FP32", [1, 16], ROW, binary_data_size=64)), ROW_BYTES))
text_bytes = len(json.dumps(request(raw)).encode())
infer("a header length that is one short", group=BINARY, **binary(request(raw), ROW_BYTES, length=text_bytes - 1))
infer("a header length that is one long", group=BINARY, **binary(request(raw), ROW_BYTES, length=text_bytes + 1))
infer("a header length beyond the body", group=BINARY, **binary(request(raw), ROW_BYTES, length=text_bytes + 65))
infer("a header length that is no number", group=BINARY, **binary(request(raw), ROW_BYTES, length="many"))
infer("a header length below zero", group=BINARY, **binary(request(raw), ROW_BYTES, length=-1))
infer("the header length of a body without binary", group=BINARY, **binary(request(row()), b""))
infer("binary without a header length", json.dumps(request(raw)).encode() + ROW_BYTES, group=BINARY)
infer("raw bytes without JSON, one row", ROW_BYTES, group=BINARY, headers={JSON_LENGTH: "0"})
infer("raw bytes without JSON, two rows", ROW_BYTES * 2, group=BINARY, headers={JSON_LENGTH: "0"})
infer("raw bytes without JSON, no whole row", ROW_BYTES[:-4], group=BINARY, headers={JSON_LENGTH: "0"})
infer("raw bytes without JSON, two inputs", ROW_BYTES, model="pair", group=BINARY, headers={JSON_LENGTH: "0"})
infer("NaN and infinities, binary", group=BINARY, **binary(
    request(raw, **WANTED), numpy.array([numpy.nan, numpy.inf, -numpy.inf] + ROW[3:], dtype="<f4").tobytes()))
infer("NaN in, JSON out", group=BINARY, **binary(
    request(raw), numpy.array([numpy.nan] + ROW[1:], dtype="<f4").tobytes()))

# Compression.
COMPRESSION = "compression"
plain = json.dumps(request(row())).encode()
for encoding, packed in [("gzip", gzip.compress(plain)), ("deflate", zlib.compress(plain))]:
    infer(f"a {encoding} request", packed, group=COMPRESSION, headers={"Content-Encoding": encoding})
    infer(f"a {encoding} answer", plain, group=COMPRESSION, headers={"Accept-Encoding": encoding})
    with_tail = binary(request(raw, **WANTED), ROW_BYTES)
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    infer(f"{encoding} both ways, binary", pack(with_tail["body"]), group=COMPRESSION,
          headers=with_tail["headers"] | {"Content-Encoding": encoding, "Accept-Encoding": encoding})
    infer(f"a {encoding} request that is cut off", packed[:-9], group=COMPRESSION, headers={"Content-Encoding": encoding})
    infer(f"{encoding} that is none", plain, group=COMPRESSION, headers={"Content-Encoding": encoding})
infer("an unknown encoding", plain, group=COMPRESSION, headers={"Content-Encoding": "br"})
infer("the encoding identity", plain, group=COMPRESSION, headers={"Content-Encoding": "identity"})
infer("an answer in an unknown encoding", plain, group=COMPRESSION, headers={"Accept-Encoding": "br"})
infer("a small answer in any of two encodings", plain, group=COMPRESSION, headers={"Accept-Encoding": "deflate, gzip"})
full = request(tensor("INPUT0", "FP32", [8, 16], [value / 3 for value in range(128)]))
for encoding in ["gzip", "deflate", "deflate, gzip", "gzip;q=0, deflate"]:
    infer(f"a large answer in {encoding}", full, group=COMPRESSION, headers={"Accept-Encoding": encoding})

# Every datatype, each with its extremes.
VALUES = {
    "BOOL": [True, False, True],
    "UINT8": [0, 1, 255],
    "UINT16": [0, 1, 65535],
    "UINT32": [0, 1, 2**32 - 1],
    "UINT64": [0, 1, 2**64 - 1],
    "INT8": [-128, 0, 127],
    "INT16": [-(2**15), 0, 2**15 - 1],
    "INT32": [-(2**31), 0, 2**31 - 1],
    "INT64": [-(2**63), 0, 2**63 - 1],
    "FP16": [-0.5, 0.0, 1024.0],
    "FP64": [-0.1, 0.0, 1e300],
    "BYTES": ["", "a", "grüezi"],
}
NUMPY = {"BOOL": "?", "FP16": "<f2", "FP64": "<f8"} | {
    f"{sign}INT{bits}": f"<{'u' if sign else 'i'}{bits // 8}" for sign in ("", "U") for bits in (8, 16, 32, 64)}


def little_endian(datatype, values):
    if datatype == "BYTES":
        texts = [value.encode() for value in values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return numpy.array(values, dtype=NUMPY[datatype]).tobytes()


TYPES = "datatypes"
for datatype, values in VALUES.items():
    model, shape = f"typed_{datatype.lower()}", [len(values)]
    data = little_endian(datatype, values)
    infer(f"{datatype} as JSON", request(tensor("INPUT0", datatype, shape, values)), model=model, group=TYPES)
    infer(f"{datatype} as binary", model=model, group=TYPES, **binary(
        request(tensor("INPUT0", datatype, shape, binary_data_size=len(data)), **WANTED), data))
bf16 = bytes.fromhex("803f00c0")
infer("BF16 as JSON", request(tensor("INPUT0", "BF16", [2], [1.0, -2.0])), model="typed_bf16", group=TYPES)
infer("BF16 as binary", model="typed_bf16", group=TYPES, **binary(
    request(tensor("INPUT0", "BF16", [2], binary_data_size=4), **WANTED), bf16))
for datatype, value in [("UINT8", 256), ("UINT8", -1), ("INT8", 128), ("INT64", 2**63), ("INT32", 1.5), ("BOOL", 1), ("BYTES", 1)]:
    infer(f"{datatype} of {value}", request(tensor("INPUT0", datatype, [1], [value])), model=f"typed_{datatype.lower()}", group=TYPES)
infer("BYTES that are cut off", model="typed_bytes", group=TYPES, **binary(
    request(tensor("INPUT0", "BYTES", [1], binary_data_size=5), **WANTED), b"\5\0\0\0a"))
infer("BYTES of fewer elements than the shape", model="typed_bytes", group=TYPES, **binary(
    request(tensor("INPUT0", "BYTES", [2], binary_data_size=5), **WANTED), b"\1\0\0\0a"))
infer("BYTES that are no UTF-8, JSON out", model="typed_bytes", group=TYPES, **binary(
    request(tensor("INPUT0", "BYTES", [1], binary_data_size=5)), b"\1\0\0\0\xff"))
infer("BYTES without JSON", b"\1\0\0\0a", model="typed_bytes", group=TYPES, headers={JSON_LENGTH: "0"})
infer("no elements", request(tensor("INPUT0", "INT32", [0], [])), model="typed_int32", group=TYPES)

# Classification.
CLASSES = "classification"


def classes(count, **more):
    return [{"name": "OUTPUT0", "parameters": {"classification": count} | more}]


scores = tensor("INPUT0", "FP32", [2, 4], [0.1, 0.9, 0.5, 0.25, 3, 2, 1, 0])
infer("the best of four", request(scores, outputs=classes(1)), model="labelled", group=CLASSES)
infer("the best three", request(scores, outputs=classes(3)), model="labelled", group=CLASSES)
infer("more than there are", request(scores, outputs=classes(9)), model="labelled", group=CLASSES)
infer("none", request(scores, outputs=classes(0)), model="labelled", group=CLASSES)
infer("below zero", request(scores, outputs=classes(-1)), model="labelled", group=CLASSES)
infer("as text", request(scores, outputs=classes("1")), model="labelled", group=CLASSES)
infer("binary", request(scores, outputs=classes(2, binary_data=True)), model="labelled", group=CLASSES)
infer("with equal scores", request(tensor("INPUT0", "FP32", [1, 4], [1, 1, 1, 1]), outputs=classes(3)), model="labelled", group=CLASSES)
infer("without labels", request(row(), outputs=classes(2)), group=CLASSES)
infer("of a model that does not batch", request(tensor("INPUT0", "INT32", [3], [5, 9, 7]), outputs=classes(2)), model="typed_int32", group=CLASSES)
# Not of BYTES: a tritonserver 2.51.0 that is asked for the classes of texts ends.
infer("of BOOL", request(tensor("INPUT0", "BOOL", [2], [True, False]), outputs=classes(1)), model="typed_bool", group=CLASSES)

# The repository.
REPOSITORY = "repository"
http(REPOSITORY, "index", "POST", "/v2/repository/index", b"")
http(REPOSITORY, "index, an empty object", "POST", "/v2/repository/index", {})
http(REPOSITORY, "index of what is ready", "POST", "/v2/repository/index", {"ready": True})
http(REPOSITORY, "index, ready that is text", "POST", "/v2/repository/index", {"ready": "yes"})
http(REPOSITORY, "index, no JSON", "POST", "/v2/repository/index", b"hello")
http(REPOSITORY, "index by GET", "GET", "/v2/repository/index")
for change in ["load", "unload"]:
    http(REPOSITORY, f"{change} of a model", "POST", f"/v2/repository/models/identity/{change}", b"")
    http(REPOSITORY, f"{change} of an unknown model", "POST", f"/v2/repository/models/nobody/{change}", b"")
http(REPOSITORY, "load with another configuration", "POST", "/v2/repository/models/identity/load", {"parameters": {"config": "{}"}})

# gRPC.
for name in ["ServerLive", "ServerReady", "ServerMetadata"]:
    grpc("gRPC: server", name, name, getattr(service_pb2, f"{name}Request")())
for name in ["ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"]:
    ask = getattr(service_pb2, f"{name}Request")
    grpc("gRPC: model", f"{name}", name, ask(name="identity"))
    grpc("gRPC: model", f"{name}, version 1", name, ask(name="identity", version="1"))
    grpc("gRPC: model", f"{name}, version 7", name, ask(name="identity", version="7"))
    grpc("gRPC: model", f"{name}, version one", name, ask(name="identity", version="one"))
    grpc("gRPC: model", f"{name}, unknown model", name, ask(name="nobody"))
grpc("gRPC: repository", "index", "RepositoryIndex", service_pb2.RepositoryIndexRequest())
grpc("gRPC: repository", "index of what is ready", "RepositoryIndex", service_pb2.RepositoryIndexRequest(ready=True))
for change, ask in [("Load", service_pb2.RepositoryModelLoadRequest), ("Unload", service_pb2.RepositoryModelUnloadRequest)]:
    grpc("gRPC: repository", f"{change} of a model", f"RepositoryModel{change}", ask(model_name="identity"))
    grpc("gRPC: repository", f"{change} of an unknown model", f"RepositoryModel{change}", ask(model_name="nobody"))


def message(*inputs, model="identity", raw=(), outputs=(), **fields):
    asked = service_pb2.ModelInferRequest(model_name=model, **fields)
    for name, datatype, shape, contents in inputs:
        added = asked.inputs.add(name=name, datatype=datatype, shape=shape)
        if contents is not None:
            field, values = contents
            getattr(added.contents, field).extend(values)
    asked.raw_input_contents.extend(raw)
    for name, parameters in outputs:
        wanted = asked.outputs.add(name=name)
        for key, value in parameters.items():
            setattr(wanted.parameters[key], value[0], value[1])
    return asked


def call(name, asked, group="gRPC: infer"):
    grpc(group, name, "ModelInfer", asked)


ONE = ("INPUT0", "FP32", [1, 16], None)
TYPED = ("INPUT0", "FP32", [1, 16], ("fp32_contents", ROW))
call("raw", message(ONE, raw=[ROW_BYTES]))
call("typed contents", message(TYPED))
call("two rows", message(("INPUT0", "FP32", [2, 16], None), raw=[ROW_BYTES * 2]))
call("an id", message(ONE, raw=[ROW_BYTES], id="seventeen"))
call("version 1", message(ONE, raw=[ROW_BYTES], model_version="1"))
call("version 7", message(ONE, raw=[ROW_BYTES], model_version="7"))
call("unknown model", message(ONE, raw=[ROW_BYTES], model="nobody"))
call("an output by name", message(ONE, raw=[ROW_BYTES], outputs=[("OUTPUT0", {})]))
call("an unknown output", message(ONE, raw=[ROW_BYTES], outputs=[("OUTPUT9", {})]))
call("an output twice", message(ONE, raw=[ROW_BYTES], outputs=[("OUTPUT0", {})] * 2))
call("two outputs in the other order", message(
    ("INPUT0", "FP32", [1, 4], None), ("INPUT1", "INT32", [1, 4], None), model="pair",
    raw=[struct.pack("<4f", 1, 2, 3, 4), struct.pack("<4i", 5, 6, 7, 8)], outputs=[("OUTPUT1", {}), ("OUTPUT0", {})]))
call("raw and typed contents", message(TYPED, raw=[ROW_BYTES]))
call("neither kind of contents", message(ONE))
call("a raw tensor too many", message(ONE, raw=[ROW_BYTES] * 2))
call("a raw tensor cut off", message(ONE, raw=[ROW_BYTES[:-1]]))
call("typed contents too short", message(("INPUT0", "FP32", [1, 16], ("fp32_contents", ROW[:15]))))
call("typed contents of another type", message(("INPUT0", "FP32", [1, 16], ("int_contents", range(16)))))
call("no inputs", message())
call("an unknown input", message(("INPUT9", "FP32", [1, 16], None), raw=[ROW_BYTES]))
call("an input twice", message(ONE, ONE, raw=[ROW_BYTES] * 2))
call("another datatype", message(("INPUT0", "INT32", [1, 16], None), raw=[ROW_BYTES]))
call("an unknown datatype", message(("INPUT0", "FLOAT", [1, 16], None), raw=[ROW_BYTES]))
call("a dimension too few", message(("INPUT0", "FP32", [16], None), raw=[ROW_BYTES]))
call("a dimension below zero", message(("INPUT0", "FP32", [-1, 16], None), raw=[ROW_BYTES]))
call("a row too short", message(("INPUT0", "FP32", [1, 15], None), raw=[ROW_BYTES[:60]]))
call("a row more than the largest batch", message(("INPUT0", "FP32", [9, 16], None), raw=[ROW_BYTES * 9]))
FIELDS = {"BOOL": "bool_contents", "UINT64": "uint64_contents", "INT64": "int64_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents"}
for datatype, values in VALUES.items():
    model, shape = f"typed_{datatype.lower()}", [len(values)]
    call(f"{datatype}, raw", message(("INPUT0", datatype, shape, None), model=model, raw=[little_endian(datatype, values)]), "gRPC: datatypes")
    default = "uint_contents" if datatype.startswith("UINT") else "fp32_contents" if datatype == "FP16" else "int_contents"
    typed = [value.encode() for value in values] if datatype == "BYTES" else values
    call(f"{datatype}, typed", message(("INPUT0", datatype, shape, (FIELDS.get(datatype, default), typed)), model=model), "gRPC: datatypes")
call("UINT8 of 256", message(("INPUT0", "UINT8", [1], ("uint_contents", [256])), model="typed_uint8"), "gRPC: datatypes")
call("INT8 of 128", message(("INPUT0", "INT8", [1], ("int_contents", [128])), model="typed_int8"), "gRPC: datatypes")
call("BF16, raw", message(("INPUT0", "BF16", [2], None), model="typed_bf16", raw=[bf16]), "gRPC: datatypes")
CHOSEN = ("INPUT0", "FP32", [2, 4], ("fp32_contents", scores["data"]))
call("the best two", message(CHOSEN, model="labelled", outputs=[("OUTPUT0", {"classification": ("int64_param", 2)})]), "gRPC: classification")
call("none", message(CHOSEN, model="labelled", outputs=[("OUTPUT0", {"classification": ("int64_param", 0)})]), "gRPC: classification")
call("as text", message(CHOSEN, model="labelled", outputs=[("OUTPUT0", {"classification": ("string_param", "1")})]), "gRPC: classification")


def stream(name, *messages):
    grpc("gRPC: stream", name, "ModelStreamInfer", list(messages))


def asked_for_the_end(asked):
    asked.parameters["triton_enable_empty_final_response"].bool_param = True
    return asked


stream("one request", message(ONE, raw=[ROW_BYTES], id="a"))
stream("three requests", *[message(ONE, raw=[ROW_BYTES], id=name) for name in "abc"])
stream("a wrong one among right ones", message(ONE, raw=[ROW_BYTES], id="a"),
       message(("INPUT9", "FP32", [1, 16], None), raw=[ROW_BYTES], id="b"), message(ONE, raw=[ROW_BYTES], id="c"))
stream("an unknown model", message(ONE, raw=[ROW_BYTES], id="a", model="nobody"))
stream("the end of each is asked for", asked_for_the_end(message(ONE, raw=[ROW_BYTES], id="a")))
stream("no request")
