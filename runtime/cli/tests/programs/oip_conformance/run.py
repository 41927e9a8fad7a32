"""Sends the probes to a tritonserver and to Mobula, compares what comes back, and prints the page of the results.

usage: run.py TRITON_HTTP TRITON_GRPC MOBULA TOKEN

Exits with 1 when an answer differs and no reason is given, or a reason is given and nothing differs.
"""

import gzip
import http.client
import json
import struct
import sys
import zlib

import grpc
from google.protobuf import json_format
from tritonclient.grpc import service_pb2_grpc

from differences import DIFFERENCES
from probes import JSON_LENGTH, PROBES, Http

TIMEOUT_S = 20


def only(value, *keys):
    return {key: value[key] for key in keys if key in value}


def tensors_of(config):
    return [only(tensor, "name", "data_type", "dataType", "dims") for tensor in config]


def shape_of(value):
    """The same keys, with numbers instead of counts: statistics are never equal."""
    if isinstance(value, dict):
        return {key: shape_of(each) for key, each in sorted(value.items())}
    return type(value).__name__


def comparable(call, answer):
    """What of an answer belongs to the protocol: not names of products, counts, or the settings of another server."""
    if call in ("/v2", "ServerMetadata"):
        return shape_of(answer)
    if call in ("/config", "ModelConfig"):
        config = answer.get("config", answer)
        size = only(config, "name", "max_batch_size", "maxBatchSize")
        return size | {side: tensors_of(config.get(side, [])) for side in ("input", "output")}
    if call in ("/stats", "ModelStatistics"):
        (stats,) = answer.get("model_stats") or answer["modelStats"]
        times = stats.get("inference_stats") or stats.get("inferenceStats")
        return only(stats, "name", "version") | {"inference_stats": shape_of({key: {} for key in times})}
    if call in ("/index", "RepositoryIndex"):
        models = answer["models"] if isinstance(answer, dict) else answer
        return sorted(models, key=lambda model: model["name"])
    return {key: value for key, value in answer.items() if key != "platform"} | outputs_of(answer)


def outputs_of(answer):
    """FP32 as such: of the texts that mean the same number each server has its own."""
    if "outputs" not in answer or "model_name" not in answer:
        return {}
    narrow = lambda value: struct.unpack("<f", struct.pack("<f", value))[0]
    read = lambda output: output | {"data": [narrow(value) for value in output["data"]]}
    is_fp32 = lambda output: output["datatype"] == "FP32" and "data" in output
    return {"outputs": [read(output) if is_fp32(output) else output for output in answer["outputs"]]}


def send_http(address, probe, token):
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    try:
        headers = {"Authorization": f"Bearer {token}"} | probe.headers
        connection.request(probe.method, probe.path, probe.body, headers)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    encoding = response.getheader("Content-Encoding")
    if encoding == "gzip":
        body = gzip.decompress(body)
    elif encoding == "deflate":
        body = zlib.decompress(body)
    answer = {"status": response.status}
    if response.status >= 400:
        return answer, body.decode(errors="replace")
    if encoding:
        answer["encoding"] = encoding
    if body:
        answer["type"] = (response.getheader("Content-Type") or "").split(";")[0]
        length = response.getheader(JSON_LENGTH)
        text = body[: int(length)] if length else body
        call = probe.path if probe.path == "/v2" else probe.path[probe.path.rindex("/") :]
        try:
            answer["json"] = comparable(call, json.loads(text))
        except ValueError:
            answer["malformed"] = text.hex()
        answer["tail"] = body[len(text) :].hex()
    return answer, ""


def send_grpc(address, probe, token):
    metadata = [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(address) as channel:
        method = getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), probe.method)
        try:
            if isinstance(probe.message, list):
                answers = method(iter(probe.message), timeout=TIMEOUT_S, metadata=metadata)
                stream = [streamed(answer) for answer in answers]
                # Which of several requests is answered first is free; each names itself.
                order = lambda each: each["infer_response"].get("id", "")
                return {"status": "OK", "stream": sorted(stream, key=order)}, ""
            answer = method(probe.message, timeout=TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return {"status": error.code().name}, error.details()
    return {"status": "OK", "json": comparable(probe.method, json_format.MessageToDict(answer))}, ""


def streamed(answer):
    said = json_format.MessageToDict(answer, preserving_proto_field_name=True)
    return {"refused": bool(said.pop("error_message", "")), "infer_response": {}} | said


def words_of(answer):
    """An answer in a few words."""
    if "stream" in answer:
        refused = sum(each["refused"] for each in answer["stream"])
        return f"{len(answer['stream'])} answers" + (f", {refused} refused" if refused else "")
    return str(answer["status"])


HEAD = """# Conformance with the Open Inference Protocol

Each line is a call that was sent to a live tritonserver 2.51.0 (of PyPI's `nvidia-pytriton`, with its Python backend) and
to Mobula's implementation of the protocol, both with the same models: `identity` (FP32 of 16, batches of up to 8),
`pair` (two inputs, two outputs), `labelled` (names of classes), and `typed_*`, one for each datatype. Compared are the
status, the content's type and encoding, and the whole answer. Not compared are what belongs to a server and not to the
protocol: its name, version and `platform`, counts and times of statistics (their keys are), settings of a model's
configuration beyond names, types, dimensions and the largest batch, the digits of an FP32 (its value is), and the words of an
error (that there are some is).

`runtime/cli/tests/it/serving/conformance.rs` sends them and compares this page with what came back:

```sh
cargo nextest run -p mobula-cli --test it -E 'test(conformance)'                    # compares
MOBULA_WRITE_PAGES=1 cargo nextest run -p mobula-cli --test it -E 'test(conformance)'  # writes this page
```
"""


def label_of(probe):
    return f"{probe.group}: {probe.name}"


def cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def faults_of(label, reasons, first, second):
    """What is wrong with two answers to one call, each with the name of who gave it: in short, and whole."""
    (name, (expected, words)), (our_name, (got, our_words)) = first, second
    if (expected == got) == (label in reasons):
        what = "the answers are alike, and a reason why they differ is given" if expected == got else "no reason is given"
        yield f"{label}: {what}\n  {name}: {json.dumps(expected)} {words}\n  {our_name}: {json.dumps(got)} {our_words}"
    if got["status"] not in (200, "OK") and not our_words:
        yield f"{label}: an error without words"


def main():
    triton_http, triton_grpc, mobula, token = sys.argv[1:]
    rows, wrong = {}, []
    for probe in PROBES:
        send, theirs = (send_http, triton_http) if isinstance(probe, Http) else (send_grpc, triton_grpc)
        theirs_said, ours_said = send(theirs, probe, token), send(mobula, probe, token)
        (expected, _), (got, _) = theirs_said, ours_said
        label = label_of(probe)
        wrong.extend(faults_of(label, DIFFERENCES, ("triton", theirs_said), ("mobula", ours_said)))
        rows.setdefault(probe.group, []).append((probe, expected, got))
    count = sum(map(len, rows.values()))
    labels = {label_of(probe) for probe in PROBES}
    wrong.extend(f"two calls are named {label}" for label in labels if sum(label_of(probe) == label for probe in PROBES) > 1)
    wrong.extend(f"there is no call {label}" for label in DIFFERENCES if label not in labels)
    differing = len(DIFFERENCES)
    print(HEAD)
    print(f"{count} calls; {count - differing} are answered alike, {differing} are not, each for a reason.")
    print("\n## Differences\n\n| call | tritonserver | Mobula | why |\n|---|---|---|---|")
    for group in rows.values():
        for probe, expected, got in group:
            if reason := DIFFERENCES.get(label_of(probe)):
                print(f"| {cell(label_of(probe))} | {words_of(expected)} | {words_of(got)} | {cell(reason)} |")
    for name, group in rows.items():
        print(f"\n## {name[0].upper()}{name[1:]}\n\n| call | tritonserver | Mobula |\n|---|---|---|")
        for probe, expected, got in group:
            mark = " (differs)" if label_of(probe) in DIFFERENCES else ""
            print(f"| {cell(probe.name)} | {words_of(expected)} | {words_of(got)}{mark} |")
    for each in wrong:
        print(each, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
