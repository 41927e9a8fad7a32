"""The training suite's peer: the same networks, weights, data and threads with PyTorch.

usage: peers.py FOLDER [--quick]

FOLDER holds what `mobula-bench-train --exchange FOLDER` left there. Prints rows under the suite's names, and for each
network how far its losses are from ours; ends with status 1 where they are further than rounding explains.
"""

import json
import pathlib
import statistics
import sys
import time

import numpy
import torch
from torch import nn

# Sums in f32 depend on their order, and updates carry the difference on: two correct programs part by what rounding makes
# of a run. How much that is, PyTorch says itself, by how far its own f32 is from its f64. Ours may be so many times as far
# from there: our products add up in one chain, so that every machine gets the same bits, and PyTorch's in sixteen and more,
# which rounds less. Where all that is next to nothing, a part in ten thousand is well below what a wrong formula would make.
ROUNDINGS_MAX = 8.0
LOSS_TOLERANCE = 1e-4
# Losses below it are compared with it: a run that has learnt its data by heart divides by nothing.
LOSS_FLOOR = 1e-3


def shown(name, value, unit, note=""):
    print(f"{name:<64} {value:>10.3f} {unit}  {note}".rstrip(), flush=True)


def median_seconds(operation, seconds):
    """The median of how long `operation` takes, repeated for so many seconds after a fifth of them."""
    end = time.perf_counter() + seconds / 5
    while time.perf_counter() < end:
        operation()
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        operation()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Images(nn.Module):
    """Rows of values as images, channels last in memory as ours are."""

    def __init__(self, side, channels):
        super().__init__()
        self.shape = (-1, side, side, channels)

    def forward(self, rows):
        return rows.reshape(self.shape).permute(0, 3, 1, 2)


def network(description, values):
    """A fresh model with the first weights."""
    modules, at = [], 0

    def take(*shape):
        nonlocal at
        count = int(numpy.prod(shape))
        taken = values[at : at + count].reshape(shape)
        at += count
        return torch.from_numpy(taken.copy())

    image = None
    for index, layer in enumerate(description["layers"]):
        outputs = layer["outputs"]
        if layer["kind"] == "convolution":
            side, channels, stride = layer["side"], layer["channels"], layer["stride"]
            if image is None:
                modules.append(Images(side, channels))
            module = nn.Conv2d(channels, outputs, 3, stride=stride, padding=1)
            weight = take(3, 3, channels, outputs).permute(3, 2, 0, 1)
            image = (-(-side // stride), outputs)
        else:
            inputs = layer["inputs"]
            module = nn.Linear(inputs, outputs)
            weight = take(inputs, outputs)
            if image is not None:
                # What is flattened here has its channels first, there last.
                side, channels = image
                weight = weight.reshape(side, side, channels, outputs).permute(2, 0, 1, 3)
                weight = weight.reshape(inputs, outputs)
                modules.append(nn.Flatten())
                image = None
            weight = weight.t()
        with torch.no_grad():
            module.weight.copy_(weight)
            module.bias.copy_(take(outputs))
        modules.append(module)
        if index + 1 < len(description["layers"]):
            modules.append(nn.ReLU())
    return nn.Sequential(*modules)


class Transformer(nn.Module):
    """The decoder transformer of `actors/src/training/models/transformer.rs`, by the same names."""

    def __init__(self, description, values):
        super().__init__()
        self.layers, self.heads = (description["transformer"][key] for key in ("layers", "heads"))
        self.named = {}
        for slot in description["slots"]:
            count = int(numpy.prod(slot["shape"]))
            first = values[slot["offset"] : slot["offset"] + count].reshape(slot["shape"])
            self.named[slot["name"]] = nn.Parameter(torch.from_numpy(first.copy()))
        # A name with dots cannot be registered.
        self.all = nn.ParameterList(self.named.values())

    def norm(self, x, layer):
        return nn.functional.layer_norm(x, x.shape[-1:], self.named[f"{layer}.scale"], self.named[f"{layer}.shift"])

    def dense(self, x, layer):
        return x @ self.named[f"{layer}.weight"] + self.named[f"{layer}.bias"]

    def attention(self, x, layer):
        windows, context, width = x.shape
        parts = self.dense(x, f"{layer}.in").reshape(windows, context, 3, self.heads, width // self.heads)
        seen = nn.functional.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4), is_causal=True)
        return self.dense(seen.transpose(1, 2).reshape(windows, context, width), f"{layer}.out")

    def forward(self, tokens):
        table = self.named["token.weight"]
        x = nn.functional.embedding(tokens, table) + self.named["position.weight"]
        for block in range(self.layers):
            name = f"block.{block:02}"
            x = x + self.attention(self.norm(x, f"{name}.norm.0"), f"{name}.attention")
            hidden = self.dense(self.norm(x, f"{name}.norm.1"), f"{name}.mlp.in")
            x = x + self.dense(nn.functional.gelu(hidden, approximate="tanh"), f"{name}.mlp.out")
        return (self.norm(x, "norm") @ table.t()).flatten(0, 1)


def data(description, path):
    """The batches: what a network is given, and the classes or tokens that it shall find."""
    shape = (description["batches"], description["batch"])
    if "transformer" in description:
        windows = numpy.fromfile(path.with_suffix(".samples"), dtype="<u4").astype("int64").reshape(*shape, -1)
        return [(torch.from_numpy(x[:, :-1].copy()), torch.from_numpy(x[:, 1:].copy()).flatten()) for x in windows]
    samples = numpy.fromfile(path.with_suffix(".samples"), dtype="<f4").reshape(*shape, description["features"])
    labels = numpy.fromfile(path.with_suffix(".labels"), dtype="<u4").astype("int64").reshape(shape)
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(samples, labels)]


def stepper(description, values, batches, fused, dtype=torch.float32):
    build = Transformer if "transformer" in description else network
    model = build(description, values)
    # In place: the transformer finds its parameters by names of its own.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if "transformer" not in description:
        batches = [(samples.to(dtype), labels) for samples, labels in batches]
    adamw = description["adamw"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=adamw["lr"],
        betas=tuple(adamw["betas"]),
        eps=adamw["eps"],
        weight_decay=adamw["weight_decay"],
        fused=fused,
    )
    turn = 0

    def step():
        nonlocal turn
        samples, labels = batches[turn % len(batches)]
        turn += 1
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(samples), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def compare(path, seconds):
    """Step times of one network, and its losses beside ours; whether these agree."""
    description = json.loads(path.read_text())
    values = numpy.fromfile(path.with_suffix(".params"), dtype="<f4")
    batches = data(description, path)
    for threads in description["threads"]:
        torch.set_num_threads(threads)
        times = {}
        for how, fused in (("its default AdamW", False), ("its fused AdamW", True)):
            times[how] = median_seconds(stepper(description, values, batches, fused), seconds)
        best = min(times, key=times.get)
        others = ", ".join(f"{how} {taken * 1e3:.3f}" for how, taken in times.items())
        shown(f"step, {description['name']}, {threads} thread(s)", times[best] * 1e3, "ms", others)
    return losses_agree(description, values, batches)


def losses_agree(description, values, batches):
    """Whether our losses are as near to PyTorch's in f64 as PyTorch's own in f32 are, within ROUNDINGS_MAX."""

    def losses(dtype):
        step = stepper(description, values, batches, False, dtype)
        return [step().item() for _ in range(description["compared_steps"])]

    def distance(those):
        return max(abs(a - b) / max(abs(b), LOSS_FLOOR) for a, b in zip(those, exact))

    ours, theirs, exact = description["losses"], losses(torch.float32), losses(torch.float64)
    our_distance, their_distance = distance(ours), distance(theirs)
    print(
        f"losses of {description['name']}: first {ours[0]:.6f} and {theirs[0]:.6f}, last {ours[-1]:.6f} and "
        f"{theirs[-1]:.6f}; from those in f64 at most {our_distance:.1e} and {their_distance:.1e} of their value in "
        f"{len(ours)} steps",
        flush=True,
    )
    return our_distance <= max(LOSS_TOLERANCE, ROUNDINGS_MAX * their_distance)


def kernels(threads, seconds):
    torch.set_num_threads(threads)
    suffix = f"{threads} thread(s)"
    for m, k, n in ((512, 512, 512), (256, 1024, 2048), (128, 784, 512), (8, 784, 512), (1, 4096, 4096), (128, 512, 10)):
        for way, a, b in (
            ("NN", torch.randn(m, k), torch.randn(k, n)),
            ("NT", torch.randn(m, k), torch.randn(n, k).t()),
            ("TN", torch.randn(k, m).t(), torch.randn(k, n)),
        ):
            c = torch.empty(m, n)
            taken = median_seconds(lambda: torch.mm(a, b, out=c), seconds)
            shown(f"product {m}x{k}x{n} {way}, {suffix}", 2e-9 * m * k * n / taken, "GFLOP/s")
    rows, columns = 4096, 256
    x = torch.randn(rows, columns, requires_grad=True)
    scale, shift = (torch.randn(columns, requires_grad=True) for _ in range(2))
    seed = torch.randn(rows, columns)
    for name, forward in (
        ("softmax", lambda: torch.softmax(x, -1)),
        ("layer-norm", lambda: nn.functional.layer_norm(x, (columns,), scale, shift)),
        ("gelu", lambda: nn.functional.gelu(x, approximate="tanh")),
    ):

        def both(forward=forward):
            x.grad = scale.grad = shift.grad = None
            forward().backward(seed)

        taken = median_seconds(both, seconds)
        shown(f"{name} {rows}x{columns}, forward and backward, {suffix}", 1e-6 * rows * columns / taken, "Mvalues/s")
    for windows, context, heads, size in ((8, 256, 8, 64), (16, 64, 4, 16)):
        tokens, width = windows * context, heads * size
        projected = torch.randn(tokens, 3 * width, requires_grad=True)
        seed = torch.randn(tokens, width)

        def attention():
            projected.grad = None
            parts = projected.reshape(windows, context, 3, heads, size).permute(2, 0, 3, 1, 4)
            seen = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
            seen.transpose(1, 2).reshape(tokens, width).backward(seed)

        taken = median_seconds(attention, seconds)
        name = f"causal attention {windows}x{context}, {heads} heads of {size}, forward and backward, {suffix}"
        shown(name, 12e-9 * tokens * (context + 1) / 2 * width / taken, "GFLOP/s")
    parameter = nn.Parameter(torch.randn(1 << 23))
    parameter.grad = torch.randn(1 << 23)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    taken = median_seconds(optimizer.step, seconds)
    shown(f"adamw, 8 Mi parameters, {suffix}", 7 * 4e-9 * (1 << 23) / taken, "GB/s")


def main():
    folder = pathlib.Path(sys.argv[1])
    quick = "--quick" in sys.argv[2:]
    print(f"torch {torch.__version__}", flush=True)
    seconds = 0.6 if quick else 3.0
    paths = sorted(folder.glob("*.json"))
    agree = [compare(path, seconds) for path in paths]
    threads = sorted({count for path in paths for count in json.loads(path.read_text())["threads"]})
    for count in threads:
        kernels(count, seconds / 3)
    if not all(agree):
        sys.exit(f"losses differ from PyTorch's by more than {ROUNDINGS_MAX} times what rounding makes of them")


main()
