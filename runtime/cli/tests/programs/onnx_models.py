"""Small ONNX models, what onnxruntime answers for them, and whether an endpoint answers the same.

    onnx_models.py write FOLDER             writes the models and their cases, from fixed seeds
    onnx_models.py ask FILE URL TOKEN NAME  asks the endpoint NAME and onnxruntime the same; prints the differences

It needs PyPI's onnx 1.23.2 and onnxruntime 1.32.0.
"""

import json
import pathlib
import sys
import urllib.request

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
# The newest version of the file format that opset 17 came with.
IR = 8

TYPES = {
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.uint8): "UINT8",
    np.dtype(np.int32): "INT32",
    np.dtype(np.int64): "INT64",
    np.dtype(np.float16): "FP16",
    np.dtype(np.float32): "FP32",
    np.dtype(np.float64): "FP64",
}


def tensor(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def model(name, nodes, inputs, outputs, constants):
    initializers = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    made.producer_name = "onnx_models.py"
    onnx.checker.check_model(made, full_check=True)
    return made


def mlp(rng):
    constants = {
        "w1": rng.normal(size=(4, 6)).astype(np.float32),
        "b1": rng.normal(size=(6,)).astype(np.float32),
        "w2": rng.normal(size=(6, 3)).astype(np.float32),
        "b2": rng.normal(size=(3,)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["class"], axis=1, keepdims=0),
    ]
    inputs = [tensor("x", TensorProto.FLOAT, ["batch", 4])]
    outputs = [
        tensor("probabilities", TensorProto.FLOAT, ["batch", 3]),
        tensor("class", TensorProto.INT64, ["batch"]),
    ]
    return model("mlp", nodes, inputs, outputs, constants)


def cnn(rng):
    constants = {
        "w": rng.normal(size=(3, 1, 3, 3)).astype(np.float32),
        "b": rng.normal(size=(3,)).astype(np.float32),
        "scale": np.array([1.0, 0.5, 2.0], np.float32),
        "bias": np.array([0.1, 0.0, -0.1], np.float32),
        "mean": np.array([0.2, -0.1, 0.0], np.float32),
        "var": np.array([1.0, 2.0, 0.5], np.float32),
        "w2": rng.normal(size=(3, 2)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["p"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"], axis=1),
        helper.make_node("MatMul", ["f", "w2"], ["scores"]),
    ]
    inputs = [tensor("image", TensorProto.FLOAT, ["N", 1, 8, 8])]
    outputs = [tensor("scores", TensorProto.FLOAT, ["N", 2])]
    return model("cnn", nodes, inputs, outputs, constants)


def attention(rng):
    """Tokens of any number, a table, one head of attention, and the mean of what is not masked."""
    constants = {
        "table": rng.normal(size=(16, 4)).astype(np.float32),
        "wq": rng.normal(size=(4, 4)).astype(np.float32),
        "wk": rng.normal(size=(4, 4)).astype(np.float32),
        "wv": rng.normal(size=(4, 4)).astype(np.float32),
        "half": np.array(0.5, np.float32),
        "one": np.array(1.0, np.float32),
        "far": np.array(-10000.0, np.float32),
        "axis1": np.array([1], np.int64),
        "axis2": np.array([2], np.int64),
        "gamma": np.array([1.0, 0.9, 1.1, 1.0], np.float32),
        "beta": np.array([0.0, 0.1, 0.0, -0.1], np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["e"], axis=0),
        helper.make_node("MatMul", ["e", "wq"], ["q"]),
        helper.make_node("MatMul", ["e", "wk"], ["k"]),
        helper.make_node("MatMul", ["e", "wv"], ["v"]),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Mul", ["s", "half"], ["s2"]),
        helper.make_node("Sub", ["one", "mask"], ["gone"]),
        helper.make_node("Mul", ["gone", "far"], ["penalty"]),
        helper.make_node("Unsqueeze", ["penalty", "axis1"], ["penalty2"]),
        helper.make_node("Add", ["s2", "penalty2"], ["s3"]),
        helper.make_node("Softmax", ["s3"], ["a"], axis=-1),
        helper.make_node("MatMul", ["a", "v"], ["o"]),
        helper.make_node("Add", ["o", "e"], ["r"]),
        helper.make_node("LayerNormalization", ["r", "gamma", "beta"], ["n"], axis=-1),
        helper.make_node("Unsqueeze", ["mask", "axis2"], ["m"]),
        helper.make_node("Mul", ["n", "m"], ["nm"]),
        helper.make_node("ReduceSum", ["nm", "axis1"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "axis1"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["embedding"]),
    ]
    inputs = [
        tensor("tokens", TensorProto.INT64, ["batch", "length"]),
        tensor("mask", TensorProto.FLOAT, ["batch", "length"]),
    ]
    outputs = [tensor("embedding", TensorProto.FLOAT, ["batch", 4])]
    return model("attention", nodes, inputs, outputs, constants)


def centred(_):
    """The rows of a request depend on each other."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    inputs = [tensor("x", TensorProto.FLOAT, ["batch", 3])]
    outputs = [tensor("y", TensorProto.FLOAT, ["batch", 3])]
    return model("centred", nodes, inputs, outputs, {})


def fixed(_):
    """Two inputs of fixed shapes, without a batch."""
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"])]
    inputs = [tensor("a", TensorProto.FLOAT, [2, 3]), tensor("b", TensorProto.FLOAT, [3])]
    outputs = [tensor("sum", TensorProto.FLOAT, [2, 3])]
    return model("fixed", nodes, inputs, outputs, {})


def types(_):
    nodes = [
        helper.make_node("Cast", ["small"], ["wide"], to=TensorProto.INT32),
        helper.make_node("Add", ["number", "wide"], ["integer"]),
        helper.make_node("Cast", ["half"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["double"], ["single2"], to=TensorProto.FLOAT),
        helper.make_node("Where", ["flag", "single", "single2"], ["chosen"]),
        helper.make_node("Not", ["flag"], ["negated"]),
        helper.make_node("Cast", ["chosen"], ["chosen_half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["chosen"], ["chosen_double"], to=TensorProto.DOUBLE),
    ]
    of = lambda name, kind: tensor(name, kind, ["batch", 2])
    inputs = [
        of("flag", TensorProto.BOOL),
        of("small", TensorProto.UINT8),
        of("number", TensorProto.INT32),
        of("half", TensorProto.FLOAT16),
        of("double", TensorProto.DOUBLE),
    ]
    outputs = [
        of("negated", TensorProto.BOOL),
        of("integer", TensorProto.INT32),
        of("chosen_half", TensorProto.FLOAT16),
        of("chosen_double", TensorProto.DOUBLE),
    ]
    return model("types", nodes, inputs, outputs, {})


MODELS = [mlp, cnn, attention, centred, fixed, types]


def inputs_of(session, rng, rows, length):
    values = {}
    for described in session.get_inputs():
        sizes = [rows if axis == 0 else length for axis in range(len(described.shape))]
        shape = [
            size if isinstance(size, int) else sizes[axis]
            for axis, size in enumerate(described.shape)
        ]
        kind = described.type
        if kind == "tensor(bool)":
            value = rng.integers(0, 2, shape).astype(np.bool_)
        elif kind == "tensor(uint8)":
            value = rng.integers(0, 256, shape).astype(np.uint8)
        elif kind == "tensor(int32)":
            value = rng.integers(-99, 99, shape).astype(np.int32)
        elif kind == "tensor(int64)":
            value = rng.integers(0, 16, shape).astype(np.int64)
        else:
            dtype = {"float16": np.float16, "float": np.float32, "double": np.float64}[kind[7:-1]]
            value = rng.normal(size=shape).astype(dtype)
        if described.name == "mask":
            # The first token always counts.
            value = (rng.random(shape) < 0.7).astype(np.float32)
            value[:, 0] = 1.0
        values[described.name] = value
    return values


def spoken(name, value):
    """A tensor as the Open Inference Protocol has it; half precision as its bits."""
    data = value.view(np.uint16) if value.dtype == np.float16 else value
    return {
        "name": name,
        "datatype": TYPES[value.dtype],
        "shape": list(value.shape),
        "data": data.ravel().tolist(),
    }


def cases_of(session, seed, sizes):
    rng = np.random.default_rng(seed)
    names = [output.name for output in session.get_outputs()]
    for rows, length in sizes:
        values = inputs_of(session, rng, rows, length)
        outputs = session.run(names, values)
        yield values, dict(zip(names, outputs))


def write(folder):
    folder = pathlib.Path(folder)
    for number, make in enumerate(MODELS):
        made = make(np.random.default_rng(number))
        path = folder / f"{made.graph.name}.onnx"
        path.write_bytes(made.SerializeToString(deterministic=True))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        cases = [
            {
                "inputs": [spoken(name, value) for name, value in values.items()],
                "outputs": [spoken(name, value) for name, value in outputs.items()],
            }
            for values, outputs in cases_of(session, number, [(1, 5), (3, 2), (2, 7)])
        ]
        path.with_suffix(".json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")


def ask(file, url, token, name):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    worst, asked = 0.0, 0
    for values, outputs in cases_of(session, 99, [(1, 3), (2, 9), (5, 1), (8, 30)]):
        # JSON carries the shortest text that is the same number; half precision only as bytes, so not here.
        body = json.dumps({"inputs": [spoken(key, value) for key, value in values.items()]})
        request = urllib.request.Request(
            f"{url}/v2/models/{name}/infer",
            body.encode(),
            {"authorization": f"Bearer {token}"},
        )
        with urllib.request.urlopen(request) as answer:
            answered = json.load(answer)
        for output in answered["outputs"]:
            expected = outputs[output["name"]]
            found = np.array(output["data"], expected.dtype).reshape(output["shape"])
            assert found.shape == expected.shape, (output, expected.shape)
            worst = max(worst, float(np.max(np.abs(found - expected))))
            asked += found.size
    print(json.dumps({"worst": worst, "values": asked}))


if __name__ == "__main__":
    {"write": write, "ask": ask}[sys.argv[1]](*sys.argv[2:])
