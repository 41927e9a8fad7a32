"""Calls an endpoint with Triton's own clients, by HTTP and gRPC, in every form that they have, and prints what came
back as JSON.

usage: triton_clients.py HOST:PORT TOKEN MODEL ROWS.f32 WIDTH
"""

import json
import queue
import sys

import numpy
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

url, token, model, path, width = sys.argv[1:]
rows = numpy.fromfile(path, dtype=numpy.float32).reshape(-1, int(width))
said = {}


def headers():
    """A dictionary of its own for each call: the HTTP client writes into the one that it is given."""
    return {"authorization": f"Bearer {token}"}


def inputs(client, **options):
    tensor = client.InferInput("image", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows, **options)
    return [tensor]


def outputs(client, **options):
    return [client.InferRequestedOutput(name, **options) for name in ("class", "probabilities")]


def classes(result):
    found = result.as_numpy("class").tolist()
    probable = result.as_numpy("probabilities").argmax(axis=1).tolist()
    assert found == probable, (found, probable)
    return found


def refusal(call):
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    raise SystemExit("it was not refused")


with http.InferenceServerClient(url, concurrency=4) as client:
    said["http"] = {
        "live": client.is_server_live(headers=headers()),
        "ready": client.is_server_ready(headers=headers()),
        "model_ready": client.is_model_ready(model, headers=headers()),
        "server": client.get_server_metadata(headers=headers()),
        "metadata": client.get_model_metadata(model, headers=headers()),
        "config": client.get_model_config(model, headers=headers()),
    }
    infer = lambda **options: classes(client.infer(model, headers=headers(), **options))
    binary, plain = dict(binary_data=True), dict(binary_data=False)
    said["http"]["classes"] = {
        "binary": infer(inputs=inputs(http, **binary), outputs=outputs(http, **binary)),
        "json": infer(inputs=inputs(http, **plain), outputs=outputs(http, **plain)),
        "all outputs": infer(inputs=inputs(http, **binary)),
        "version": infer(inputs=inputs(http, **binary), model_version="1"),
        "gzip": infer(
            inputs=inputs(http, **binary),
            request_compression_algorithm="gzip",
            response_compression_algorithm="gzip",
        ),
        "deflate": infer(
            inputs=inputs(http, **plain),
            outputs=outputs(http, **plain),
            request_compression_algorithm="deflate",
            response_compression_algorithm="deflate",
        ),
        "async": classes(
            client.async_infer(model, inputs(http, **binary), headers=headers()).get_result()
        ),
    }
    said["http"]["refusals"] = {
        "model": refusal(lambda: client.infer("none", inputs(http), headers=headers())),
        "token": refusal(lambda: client.infer(model, inputs(http))),
    }
    statistics = client.get_inference_statistics(model, headers=headers())
    said["http"]["answered"] = statistics["model_stats"][0]["inference_stats"]["success"]["count"]

with grpc.InferenceServerClient(url) as client:
    as_json = dict(headers=headers(), as_json=True)
    said["grpc"] = {
        "live": client.is_server_live(headers=headers()),
        "ready": client.is_server_ready(headers=headers()),
        "model_ready": client.is_model_ready(model, headers=headers()),
        "server": client.get_server_metadata(**as_json),
        "metadata": client.get_model_metadata(model, **as_json),
        "config": client.get_model_config(model, **as_json)["config"],
    }
    infer = lambda **options: classes(
        client.infer(model, inputs(grpc), headers=headers(), **options)
    )
    said["grpc"]["classes"] = {
        "all outputs": infer(),
        "named outputs": infer(outputs=outputs(grpc)),
        "version": infer(model_version="1"),
        "gzip": infer(compression_algorithm="gzip"),
    }
    answers = queue.Queue()
    take = lambda result, error: answers.put((result, error))
    client.async_infer(model, inputs(grpc), take, headers=headers())
    result, error = answers.get(timeout=30)
    assert error is None, error
    said["grpc"]["classes"]["async"] = classes(result)

    client.start_stream(callback=take, headers=headers())
    for name in (model, "none", model):
        client.async_stream_infer(name, inputs(grpc), request_id=name)
    streamed = [answers.get(timeout=30) for _ in range(3)]
    client.stop_stream()
    for position in (0, 2):
        result, error = streamed[position]
        assert error is None, error
        said["grpc"]["classes"][f"stream {position}"] = classes(result)
    said["grpc"]["refusals"] = {
        "stream": [None, streamed[1][1].message()],
        "model": refusal(lambda: client.infer("none", inputs(grpc), headers=headers())),
        "token": refusal(lambda: client.infer(model, inputs(grpc))),
    }
    statistics = client.get_inference_statistics(model, headers=headers(), as_json=True)
    success = statistics["model_stats"][0]["inference_stats"]["success"]["count"]
    said["grpc"]["answered"] = int(success)

print(json.dumps(said))
