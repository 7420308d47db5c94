#!/usr/bin/env python3
"""The layer that `ferromoe bench` measures, as PyTorch does it on the same machine.

One GPU: tokens sorted by expert, `torch._grouped_mm` for linear 1, SiLU x up x routing weight, `torch._grouped_mm` for
linear 2, and a sum of each token's results in f32; the shared expert as dense products. Several GPUs: the same between two
NCCL all-to-alls, one process a GPU. Shapes, routing and the fields of the JSON lines are those of `ferromoe bench --json`.

In FP8 the products are those of `torch._scaled_grouped_mm` and `torch._scaled_mm`: e4m3 with a scale for each row of weights and
for each token, tokens and intermediate quantised on the way; ferromoe's scales are finer. The error is against the quantised weights and unquantised tokens.

    torch_baseline.py --shape flash                       one GPU
    torch_baseline.py --shape flash --experts fp8         in FP8
    torch_baseline.py --shape v3 --ranks 8 --json         eight GPUs
    torch_baseline.py --table results.jsonl               one table of what both printed
"""

import argparse
import functools
import json
import os
import sys

SHAPES = {
    # name: hidden, intermediate, experts, top-k, shared, cut (see host/src/bench/shape.rs)
    "flash": (4096, 2048, 256, 6, 1, True),
    "pro": (7168, 3072, 384, 6, 1, True),
    "v3": (7168, 2048, 256, 8, 1, True),
    "glm-5": (6144, 2048, 256, 8, 1, True),
    "glm-flash": (4096, 2048, 288, 8, 1, True),
    "qwen3-30b": (2048, 768, 128, 8, 0, False),
    "gpt-oss-120b": (2880, 2880, 128, 4, 0, False),
    "mixtral-8x7b": (4096, 14336, 8, 2, 0, False),
}
TOKENS = [1, 8, 64, 512, 2048, 8192]
INPUT_SETS = 4
WARM_UP_SECONDS = 0.2
MEASURED_SECONDS = 0.5
LAUNCHES = (20, 1000)
# Quantised tokens and intermediate cost FP8 4.4e-2 to 4.8e-2.
ERROR_LIMITS = {"bf16": 1e-2, "fp8": 6e-2}
ROUTINGS = ["balanced", "skewed", "one-expert"]
E4M3_MAX = 448.0
# Columns that share a scale in ferromoe.
GROUP = 128
COPY_BYTES = 2 << 30
PRODUCT_SIZE = 8192


# Routing: the arithmetic of host/src/bench/draw.rs, so that both run the same work.


def splitmix(state):
    import numpy as np

    with np.errstate(over="ignore"):
        z = state + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def draw_routing(tokens, experts, top_k, routing, seed):
    """Expert ids [T, K] i64 and weights [T, K] f32."""
    import numpy as np

    weights = np.ones(experts)
    if routing == "one-expert":
        weights[0] = np.inf
    if routing == "skewed":
        order = np.argsort(splitmix(np.arange(experts, dtype=np.uint64)), kind="stable")
        weights[order] = 1.0 / (np.arange(experts) + 1)
    token = np.arange(tokens, dtype=np.uint64)[:, None] << np.uint64(16)
    bits = splitmix(np.uint64(seed) ^ splitmix(token | np.arange(experts + top_k, dtype=np.uint64)[None, :]))
    unit = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    keys = -np.log(unit[:, :experts]) / weights
    ids = np.argsort(keys, axis=1, kind="stable")[:, :top_k]
    factors = 0.1 + unit[:, experts:]
    return ids.astype(np.int64), (factors / factors.sum(axis=1, keepdims=True)).astype(np.float32)


def count_work(layer, routings):
    """Each rank's operations, bytes of device memory, bytes from other ranks and hit experts; as host/src/bench/work.rs."""
    import numpy as np

    matrices, row = 3 * layer.hidden * layer.intermediate, 2 * layer.hidden
    # Bytes of a weight, and of a token as it crosses NVLink: in FP8 with its scales, in whole lines of 128 bytes.
    element, record = 2, row
    if layer.format == "fp8":
        element, record = 1, -(-(layer.hidden + -(-layer.hidden // GROUP) * 4) // 128) * 128
    pairs, crossing = np.zeros(layer.ranks), np.zeros(layer.ranks)  # crossing: bytes
    loads = np.zeros(layer.experts)
    for source, ids in enumerate(routings):
        owner = ids // layer.local_experts
        owners = np.bincount(owner.ravel(), minlength=layer.ranks)
        reached = np.zeros((len(ids), layer.ranks))
        np.put_along_axis(reached, owner, 1, axis=1)
        loads += np.bincount(ids.ravel(), minlength=layer.experts)
        pairs += owners
        reached[:, source] = 0
        crossing += reached.sum(axis=0) * record
        crossing[source] += (owners.sum() - owners[source]) * row
    works = []
    for rank in range(layer.ranks):
        tokens = len(routings[rank])
        shared = layer.shared if tokens else 0
        hit = int((loads[rank * layer.local_experts : (rank + 1) * layer.local_experts] > 0).sum()) + shared
        operations = 2 * matrices * (pairs[rank] + shared * tokens)
        works.append((operations, hit * matrices * element + 2 * tokens * row, crossing[rank], hit))
    return np.array(works, dtype=np.float64), loads.max() * layer.experts / loads.sum()


class Weights:
    """Matrices [E, K, N], each in torch's K-major storage as grouped products like their second operand; in FP8 with a scale for each column, [E, N]."""

    def __init__(self, layer, experts, rows, cols, generator):
        import torch

        kind = torch.float8_e4m3fn if layer.format == "fp8" else torch.bfloat16
        values = torch.empty(experts, rows, cols, dtype=kind, device="cuda")
        self.scales = torch.empty(experts, rows, device="cuda") if layer.format == "fp8" else None
        bound = (3.0 / cols) ** 0.5
        for index in range(experts):
            expert = torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda").uniform_(-bound, bound, generator=generator)
            if self.scales is None:
                values[index] = expert
            else:
                values[index], self.scales[index] = plain_quantise(expert)
        self.values = values.transpose(1, 2)

    def double(self, index):
        """One matrix in f64."""
        matrix = self.values[index].double()
        return matrix if self.scales is None else matrix * self.scales[index]

    def grouped(self, rows, scales, ends):
        """The products of rows [n, K] with the matrix of the group that each is in."""
        import torch

        ends = ends.to(torch.int32)
        if scales is None:
            return torch._grouped_mm(rows, self.values, offs=ends)
        return torch._scaled_grouped_mm(
            rows, self.values, scales, self.scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def dense(self, index, rows, scales):
        """The product of all rows with one matrix."""
        import torch

        if scales is None:
            return torch.mm(rows, self.values[index])
        return torch._scaled_mm(
            rows, self.values[index], scales[:, None], self.scales[index][None], out_dtype=torch.bfloat16, use_fast_accum=True
        )


class Layer:
    """Sizes, and one rank's weights."""

    def __init__(self, name, rank, ranks, experts_per_rank=None, format="bf16"):
        self.name, self.rank, self.ranks, self.format = name, rank, ranks, format
        self.hidden, self.intermediate, experts, self.top_k, self.shared, cut = SHAPES[name]
        if cut and ranks < 8:
            experts = experts // 8 * ranks
        self.experts = experts_per_rank * ranks if experts_per_rank else experts
        self.local_experts = self.experts // ranks

    def upload_weights(self):
        import torch

        generator = torch.Generator(device="cuda").manual_seed(1 + self.rank)

        def random(experts, rows, cols):
            return Weights(self, experts, rows, cols, generator)

        # Both halves of linear 1 in one product: gate columns, then up columns.
        self.linear1 = random(self.local_experts, 2 * self.intermediate, self.hidden)
        self.linear2 = random(self.local_experts, self.hidden, self.intermediate)
        self.shared1 = random(self.shared, 2 * self.intermediate, self.hidden)
        self.shared2 = random(self.shared, self.hidden, self.intermediate)

    def operand(self, states):
        """Hidden states as the products take them, and their scales."""
        return (states, None) if self.format == "bf16" else compiled(plain_quantise)(states)

    def activate(self, inner, weight):
        """The operand of linear 2."""
        gate, up = inner.split(self.intermediate, dim=-1)
        return compiled(ACTIVATIONS[self.format])(gate, up, weight)

    def expert_products(self, rows, scales, ends, weight_of_row):
        """Results of rows that are sorted by expert; those of expert e end before row ends[e]."""
        inner = self.activate(self.linear1.grouped(rows, scales, ends), weight_of_row)
        return self.linear2.grouped(*inner, ends)

    def experts_forward(self, rows, scales, expert_of_row, weight_of_row):
        """Results [n, H] of rows [n, H], one local expert each, in the order of the rows."""
        import torch

        order = torch.argsort(expert_of_row, stable=True)
        ends = torch.searchsorted(expert_of_row[order], torch.arange(self.local_experts, device="cuda"), right=True)
        scales = None if scales is None else scales[order]
        results = self.expert_products(picked(rows, order), scales, ends, weight_of_row[order])
        back = torch.empty_like(results)
        back[order] = results
        return back

    def shared_forward(self, operand, scales):
        import torch

        total = None
        one = torch.ones(operand.shape[0], device="cuda") if self.format == "fp8" else None
        for index in range(self.shared):
            inner = self.shared1.dense(index, operand, scales)
            if one is None:
                gate, up = inner.split(self.intermediate, dim=-1)
                inner = (torch.nn.functional.silu(gate) * up, None)
            else:
                inner = self.activate(inner, one)
            result = self.shared2.dense(index, *inner)
            total = result if total is None else total + result
        return total

    def local_forward(self, states, ids, weights):
        """One GPU: no copy to the host and no shape that depends on the routing, so that a graph can capture it."""
        import torch

        tokens = states.shape[0]
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.searchsorted(flat[order], torch.arange(self.local_experts, device="cuda"), right=True)
        operand, scales = self.operand(states)
        source = order // self.top_k
        row_scales = None if scales is None else scales[source]
        results = self.expert_products(picked(operand, source), row_scales, ends, weights.reshape(-1)[order])
        # Each token's K results, found through the inverse of the order, summed in f32.
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device="cuda")
        output = results.index_select(0, place).view(tokens, self.top_k, -1).sum(dim=1, dtype=torch.float32)
        if self.shared:
            output = output + self.shared_forward(operand, scales)
        return output.to(torch.bfloat16)

    def distributed_forward(self, states, ids, weights):
        """Several GPUs: rows to the ranks of their experts and back by NCCL; the counts go through the host, as they must."""
        import torch
        import torch.distributed as dist

        tokens = states.shape[0]
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        sent = torch.bincount(flat // self.local_experts, minlength=self.ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        counts = torch.stack([sent, received]).tolist()
        here = sum(counts[1])

        def exchange(values, forward=True):
            to, of = (counts[0], counts[1]) if forward else (counts[1], counts[0])
            out = values.new_empty((sum(of), *values.shape[1:]))
            dist.all_to_all_single(out, values, output_split_sizes=of, input_split_sizes=to)
            return out

        operand, scales = self.operand(states)
        source = order // self.top_k
        rows = exchange(picked(operand, source).view(torch.uint8)).view(operand.dtype)
        # Id, weight and scale of every row in one message.
        what = [flat[order].to(torch.float32), weights.reshape(-1)[order]]
        what = exchange(torch.stack(what if scales is None else [*what, scales[source]], dim=1))
        shared = self.shared_forward(operand, scales) if self.shared else None
        if here:
            local = what[:, 0].to(torch.int64) - self.rank * self.local_experts
            row_scales = None if scales is None else what[:, 2].contiguous()
            rows = self.experts_forward(rows, row_scales, local, what[:, 1])
        else:
            rows = states[:0]
        results = exchange(rows, forward=False)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device="cuda")
        output = results.index_select(0, place).view(tokens, self.top_k, -1).sum(dim=1, dtype=torch.float32)
        if shared is not None:
            output = output + shared
        return output.to(torch.bfloat16)

    def reference(self, states, ids, weights, with_shared=True):
        """[T, H] in f64 from the definition, for a few tokens and local experts."""
        import torch

        output = torch.zeros(states.shape, dtype=torch.float64, device="cuda")

        def expert(state, linear1, linear2):
            gate, up = (state.double() @ linear1).split(self.intermediate, dim=-1)
            return (torch.nn.functional.silu(gate) * up) @ linear2

        for token in range(states.shape[0]):
            for e, w in zip(ids[token].tolist(), weights[token].tolist()):
                output[token] += w * expert(states[token], self.linear1.double(e), self.linear2.double(e))
            for e in range(self.shared if with_shared else 0):
                output[token] += expert(states[token], self.shared1.double(e), self.shared2.double(e))
        return output


def picked(rows, index):
    """Rows by number; as bytes, which everything is indexed by."""
    import torch

    return rows.view(torch.uint8).index_select(0, index).view(rows.dtype)


def plain_quantise(rows):
    """e4m3 [n, K] and the scales [n] that make it the rows again."""
    import torch

    rows = rows.float()
    scales = rows.abs().amax(dim=-1).clamp(min=1e-30) / E4M3_MAX
    return (rows / scales[:, None]).to(torch.float8_e4m3fn), scales


def plain_silu_up(gate, up, weight):
    import torch

    return (torch.nn.functional.silu(gate.float()) * up.float() * weight[:, None]).to(torch.bfloat16), None


def plain_silu_up_quantise(gate, up, weight):
    return plain_quantise(plain_silu_up(gate, up, weight)[0])


ACTIVATIONS = {"bf16": plain_silu_up, "fp8": plain_silu_up_quantise}


@functools.cache
def compiled(function):
    """One fused kernel through torch.compile, as serving engines have it; the plain operations where it does not work."""
    import torch

    try:
        found = torch.compile(function, dynamic=True)
        probe = torch.ones(4, 256, dtype=torch.bfloat16, device="cuda")
        if function is plain_quantise:
            found(probe)
        else:
            found(*probe.split(128, dim=-1), torch.ones(4, device="cuda"))
        return found
    except Exception as error:  # noqa: BLE001: whatever the compiler lacks
        print(f"torch.compile does not work here, {function.__name__} runs unfused: {error}".splitlines()[0], file=sys.stderr)
        return function


def missing_fp8():
    """Why there are no grouped FP8 products here, or None."""
    import torch

    if not hasattr(torch, "_scaled_grouped_mm"):
        return f"PyTorch {torch.__version__} has no torch._scaled_grouped_mm"
    try:
        rows = torch.ones(16, 64, device="cuda").to(torch.float8_e4m3fn)
        ends, scales = torch.tensor([16], dtype=torch.int32, device="cuda"), torch.ones(16, device="cuda")
        torch._scaled_grouped_mm(
            rows, rows[None].transpose(1, 2), scales, scales[None], offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"torch._scaled_grouped_mm does not work here: {error}".splitlines()[0]
    return None


def event_times(work, count):
    """Microseconds between the ends of `count` calls, queued without a wait in between; the first call is not counted."""
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 2)]
    events[0].record()
    for index, event in enumerate(events[1:]):
        work(index)
        event.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(stop) for start, stop in zip(events[1:], events[2:])]


def median(values):
    return sorted(values)[len(values) // 2]


def agree(value, ranks):
    """The largest of all ranks' values."""
    if ranks == 1:
        return value
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(value, device="cuda")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def measure(work, ranks):
    """Sorted times in microseconds, each of the slowest rank."""
    probe = agree(median(event_times(work, 4)), ranks)
    warm = event_times(work, min(max(int(WARM_UP_SECONDS * 1e6 / probe), 4), LAUNCHES[1]))
    one = agree(median(warm), ranks)
    count = min(max(int(MEASURED_SECONDS * 1e6 / one), LAUNCHES[0]), LAUNCHES[1])
    return sorted(agree(event_times(work, count), ranks))


def measure_limits():
    """A large copy and dense products, as `ferromoe bench` measures them; 1e9 bytes and 1e12 operations a second."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median(event_times(lambda _: target.copy_(source), 500)[150:])
    del source, target
    a, b = (torch.empty(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device="cuda").uniform_(-1.7, 1.7) for _ in "ab")
    c = torch.empty_like(a)
    operations = 2 * PRODUCT_SIZE**3 / 1e6
    product = median(event_times(lambda _: torch.mm(a, b.T, out=c), 500)[150:])
    fp8_tflops = None
    try:
        factor = E4M3_MAX / 1.7
        e, f, scale = (a * factor).to(torch.float8_e4m3fn), (b * factor).to(torch.float8_e4m3fn), torch.tensor(1 / factor, device="cuda")
        fast = lambda _: torch._scaled_mm(e, f.T, scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
        fp8_tflops = operations / median(event_times(fast, 1000)[300:])
    except (AttributeError, RuntimeError) as error:
        print(f"no dense FP8 product: {error}".splitlines()[0], file=sys.stderr)
    return {
        "copy_gbs": 2 * COPY_BYTES / copy / 1e3,
        "peer_copy_gbs": None,
        "bf16_tflops": operations / product,
        "fp8_tflops": fp8_tflops,
    }


def capture(forward, sets):
    """A CUDA graph for every set, or None where the layer cannot be captured."""
    import torch

    try:
        graphs = []
        for arguments in sets:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                forward(*arguments)
            graphs.append(graph)
        return graphs
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"not captured: {error}".splitlines()[0], file=sys.stderr)
        return None


def check(layer, states, ids, weights, output):
    """The relative L2 error of the first, a middle and the last token; fails where it is too large."""
    import torch

    last = states.shape[0] - 1
    some = sorted({0, last // 2, last})
    expected = layer.reference(states[some], ids[some], weights[some])
    error = ((output[some].double() - expected).norm() / expected.norm()).item()
    limit = ERROR_LIMITS[layer.format]
    if not torch.isfinite(output).all() or not error <= limit:
        sys.exit(f"wrong result: the relative L2 error of some tokens is {error:.2e}, the limit {limit:.0e}")
    return error


def run_shape(arguments, name, rank, limits, emit):
    import numpy as np
    import torch

    layer = Layer(name, rank, arguments.ranks, arguments.experts_per_rank, arguments.experts)
    layer.upload_weights()
    forward = layer.local_forward if layer.ranks == 1 else layer.distributed_forward
    for tokens in arguments.tokens:
        seeds = [[s * layer.ranks + r for r in range(layer.ranks)] for s in range(INPUT_SETS)]
        routings = [[draw_routing(tokens, layer.experts, layer.top_k, arguments.routing, seed) for seed in row] for row in seeds]
        generator = torch.Generator(device="cuda").manual_seed(17 + rank)
        sets = []
        for row in routings:
            ids, weights = (torch.from_numpy(part).cuda() for part in row[rank])
            states = torch.empty(tokens, layer.hidden, dtype=torch.bfloat16, device="cuda")
            states.uniform_(-(3.0**0.5), 3.0**0.5, generator=generator)
            sets.append((states, ids, weights))
        counted = [count_work(layer, [ids for ids, _ in row]) for row in routings]
        works, imbalance = np.mean([c[0] for c in counted], axis=0), float(np.mean([c[1] for c in counted]))
        output = forward(*sets[0])
        error = check(layer, *sets[0], output) if layer.ranks == 1 else check_distributed(layer, sets[0], output)
        del output
        variants = [("torch", lambda i: forward(*sets[i % INPUT_SETS]))]
        if layer.ranks == 1 and (graphs := capture(forward, sets)):
            variants.append(("torch-graph", lambda i: graphs[i % INPUT_SETS].replay()))
        for implementation, work in variants:
            times = measure(work, layer.ranks)
            if rank == 0:
                emit(record(implementation, layer, arguments.routing, tokens, works, imbalance, error, times, limits))
        graphs = None


def check_distributed(layer, arguments, output):
    """As `check`; every rank brings its experts' part of rank 0's tokens."""
    import torch
    import torch.distributed as dist

    states, ids, weights = (part.clone() for part in arguments)
    last = states.shape[0] - 1
    some = sorted({0, last // 2, last})
    picked = [part[some].contiguous() for part in (states, ids, weights)]
    for part in picked:
        dist.broadcast(part, 0)
    states, ids, weights = picked
    local = ids - layer.rank * layer.local_experts
    mine = (local >= 0) & (local < layer.local_experts)
    expected = layer.reference(states, local.clamp(0, layer.local_experts - 1), weights * mine, with_shared=False)
    if layer.rank == 0 and layer.shared:
        expected += layer.reference(states, ids[:, :0], weights[:, :0])
    dist.all_reduce(expected)
    error = ((output[some].double() - expected).norm() / expected.norm()).item()
    limit = ERROR_LIMITS[layer.format]
    if layer.rank == 0 and not error <= limit:
        sys.exit(f"wrong result: the relative L2 error of some tokens is {error:.2e}, the limit {limit:.0e}")
    return error


def record(implementation, layer, routing, tokens, works, imbalance, error, times, limits):
    """The fields of `ferromoe bench --json`."""
    import torch

    def percentile(part):
        return times[round((len(times) - 1) * part)]

    us = percentile(0.5)
    operations, memory, nvlink, hit = works.mean(axis=0).tolist()
    tflops = limits[f"{layer.format}_tflops"]
    limit = tflops and max(max(w[1] / limits["copy_gbs"] / 1e3, w[0] / tflops / 1e6) for w in works.tolist())
    return {
        "implementation": implementation,
        "device": torch.cuda.get_device_name(),
        "shape": layer.name,
        "format": layer.format,
        "hidden": layer.hidden,
        "intermediate": layer.intermediate,
        "experts": layer.experts,
        "top_k": layer.top_k,
        "shared_experts": layer.shared,
        "ranks": layer.ranks,
        "routing": routing,
        "tokens": tokens,
        "hit_experts": hit,
        "imbalance": imbalance,
        "relative_error": error,
        "launches": len(times),
        "us": us,
        "us_p10": percentile(0.1),
        "us_p90": percentile(0.9),
        "tflops": operations / us / 1e6,
        "memory_gbs": memory / us / 1e3,
        "nvlink_gbs": nvlink / us / 1e3,
        "limit_us": limit,
        "fraction_of_limit": limit and limit / us,
        **limits,
    }


# Field, width (negative: to the left), format.
COLUMNS = [
    ("implementation", -14, ""),
    ("shape", -12, ""),
    ("format", -6, ""),
    ("ranks", 5, ""),
    ("routing", -10, ""),
    ("tokens", 6, ""),
    ("us", 9, ".1f"),
    ("us_p10", 9, ".1f"),
    ("us_p90", 9, ".1f"),
    ("tflops", 7, ".1f"),
    ("memory_gbs", 10, ".0f"),
    ("nvlink_gbs", 10, ".0f"),
    ("limit_us", 9, ".1f"),
    ("fraction_of_limit", 17, ".1%"),
    ("relative_error", 14, ".1e"),
]


def aligned(text, width):
    return text.ljust(-width) if width < 0 else text.rjust(width)


def table_header():
    return " ".join(aligned(field, width) for field, width, _ in COLUMNS)


def table_line(found):
    def text(field, form):
        return "-" if found.get(field) is None else format(found[field], form)

    return " ".join(aligned(text(field, form), width) for field, width, form in COLUMNS)


def print_table(path):
    """Everything that was measured for the same work side by side, and how many times as long the others take."""
    with open(path) as lines:
        found = [json.loads(line) for line in lines if line.startswith("{")]
    key = lambda one: (one["shape"], one["format"], one["ranks"], one["routing"], one["tokens"])  # noqa: E731
    ours = {key(one): one["us"] for one in found if one["implementation"] == "ferromoe"}
    order = {shape: index for index, shape in enumerate(SHAPES)}
    found.sort(key=lambda one: (one["ranks"], one["routing"], order[one["shape"]], one["format"], one["tokens"]))
    print(table_header() + " us/ferromoe")
    for one in found:
        ratio = f"{one['us'] / ours[key(one)]:>11.2f}x" if key(one) in ours else ""
        print(table_line(one), ratio)
    for one in {(one["implementation"], one["shape"]): one for one in found}.values():
        rates = [("copy", "copy_gbs", "GB/s"), ("between GPUs", "peer_copy_gbs", "GB/s")]
        rates += [(f"product in {format}", f"{format}_tflops", "TFLOP/s") for format in ERROR_LIMITS]
        measured = [f"{what} {one[field]:.0f} {unit}" for what, field, unit in rates if one.get(field) is not None]
        print(f"limits, {one['implementation']}, {one['shape']}: {', '.join(measured)}")


def run_rank(rank, arguments):
    import torch

    torch.cuda.set_device(rank)
    torch.set_grad_enabled(False)
    if arguments.ranks > 1:
        import torch.distributed as dist

        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29517")
        dist.init_process_group("nccl", rank=rank, world_size=arguments.ranks, device_id=torch.device("cuda", rank))
    if arguments.experts == "fp8" and (missing := missing_fp8()):
        return print(f"no FP8 baseline: {missing}", file=sys.stderr)
    limits = measure_limits()
    if rank == 0 and not arguments.json:
        products = [f"{format} {rate:.0f} TFLOP/s" for format in ERROR_LIMITS if (rate := limits[f"{format}_tflops"])]
        print(f"torch {torch.__version__}; limits: copy {limits['copy_gbs']:.0f} GB/s, {', '.join(products)}")
        print(table_header())

    def emit(found):
        print(json.dumps(found) if arguments.json else table_line(found), flush=True)

    for name in arguments.shape:
        run_shape(arguments, name, rank, limits, emit)
        torch.cuda.empty_cache()
    if arguments.ranks > 1:
        dist.destroy_process_group()


def main():
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=lambda text: text.split(","), help=",".join(SHAPES))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", type=numbers, default=TOKENS)
    parser.add_argument("--experts-per-rank", type=int)
    parser.add_argument("--routing", choices=ROUTINGS, default=ROUTINGS[0])
    parser.add_argument("--experts", choices=list(ERROR_LIMITS), default="bf16", help="number format that the experts run in")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--table", metavar="FILE", help="print the JSON lines of FILE as one table, and measure nothing")
    parser.add_argument("--show-routing", metavar="SEED", type=int, help="print the expert ids that a seed gives, and measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        return print_table(arguments.table)
    unknown = [name for name in arguments.shape or [None] if name not in SHAPES]
    if unknown:
        parser.error(f"--shape must be of {', '.join(SHAPES)}, not {unknown[0]}")
    if arguments.show_routing is not None:
        layer = Layer(arguments.shape[0], 0, arguments.ranks, arguments.experts_per_rank)
        return print(draw_routing(arguments.tokens[0], layer.experts, layer.top_k, arguments.routing, arguments.show_routing)[0].tolist())
    if arguments.ranks == 1:
        return run_rank(0, arguments)
    import torch.multiprocessing as processes

    processes.spawn(run_rank, args=(arguments,), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
