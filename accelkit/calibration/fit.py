"""Measures attention on this device and fits the cost table that search and reports predict with.

Random data; medians on a GPU, the least of a few runs on a CPU, where other programs only add time.
Methods that cannot win here are refused on the way, with the reason, so that no time is spent on
them later: a prompt of a quarter of the length tells whether the whole one is worth it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accelkit import kernels
from accelkit.calibration.bench import times_ms
from accelkit.calibration.candidates import calibrated_settings, families, prime
from accelkit.calibration.capture import dense_attention
from accelkit.kernels import dispatch
from accelkit.kernels.cost import (
    CostTable,
    Kernel,
    MethodCost,
    interpolate,
    least_squares,
    name,
    visible_pairs,
)
from accelkit.kernels.index import BlockIndex, ceil_div, plain_inputs
from accelkit.patches.call import AttentionCall, Clock, Geometry, Site
from accelkit.patches.method import AttentionMethod
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import PLAIN, Answer, answer, compute

FITTED = (0.04, 0.12, 0.35, 1.0)
CHECKED = (0.08, 0.2)
"""Densities of random blocks that the fit sees, and those on which it is judged. On a GPU the
lengths on which it is judged are none of those that it sees either."""
SINGLE_KEYS = 0.15
"""Lists of single keys denser than this are not measured: nobody runs them."""
MOST_SINGLE_KEYS = 8192
"""Length up to which lists of single keys are measured."""
GOOD_FIT = 0.1
ROUNDS = 5
"""Measuring ends when the error on held-out points is below `GOOD_FIT`, when another round mended
little of it, or after so many rounds.
"""
MENDED = 0.8
MOST = 0.8
"""A method whose estimate alone takes this share of dense attention is refused."""
UNIT = (128, 128)
PATIENCE_MS = 1000.0
"""Time that the repeats of one measurement may take together on a CPU."""
AHEAD = 2_000_000
"""Clock cycles that a GPU waits before a measurement: the host is ahead of it, as in a model."""
UNKNOWN = Geometry()


@dataclass(frozen=True)
class Shape:
    """Heads of a layer, how many layers there are to share lists that follow from geometry, prompts
    in a batch, whether later tokens are hidden from earlier ones, and what the tokens of a
    denoiser's call are.
    """

    heads: int
    kv_heads: int
    head_dim: int
    layers: int = 1
    batch: int = 1
    causal: bool = True
    geometry: Geometry = UNKNOWN


def fit(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    methods: Sequence[AttentionMethod] = (),
    *,
    repeat: int = 3,
    limit_s: float = 60.0,
    step: Callable[[str], None] | None = None,
) -> CostTable:
    """The cost table for calls of up to `tokens` tokens. A denoiser's calls have one length, for
    their lists follow from a grid.

    `step` is told what is measured next. After `limit_s` seconds nothing is repeated any more.
    """
    until = time.monotonic() + limit_s
    least = max(512, tokens // 4)
    # Between two lengths costs are interpolated; on a GPU a third one tells how well.
    between = [max(least, tokens // 2)] if device.type == "cuda" else []
    lengths = sorted({least, tokens, *between}) if shape.causal else [tokens]
    calls = {n: random_call(shape, dtype, device, n) for n in lengths}

    def ms(run: Callable[[], Any], times: int = repeat) -> float:
        return clock(run, times if time.monotonic() < until else 1, device)

    tell = step or (lambda _: None)
    tell("dense attention")
    dense = tuple((n, dense_ms(calls[n], ms)) for n in lengths)
    ride = tuple((n, ms(partial(dense_attention, calls[n]))) for n in lengths)
    costs: dict[str, MethodCost] = {}
    refused: dict[str, str] = {}
    sizes = {UNIT: None}
    for method in methods:
        tell(method.kind)
        found = _method(method, calls, lengths, dense, ms, shape)
        if isinstance(found, str):
            refused[method.kind] = found
        else:
            costs[method.kind], used = found
            sizes |= dict.fromkeys(used)
            if shape.causal:
                sizes |= dict.fromkeys(_other_units(method, calls[tokens]))
    fitted = {}
    for size in sizes:
        tell(f"kernel {name(size)}")
        fitted[name(size)] = _kernel(calls, size, until)
    about = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return CostTable(
        about, str(dtype).removeprefix("torch."), shape.heads, shape.kv_heads, shape.head_dim,
        dense, ride, fitted, costs, refused, shape.causal,
    )  # fmt: skip


def clock(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Milliseconds of `run` after one run to warm up; slow ones are not repeated."""
    if device.type == "cuda":
        return statistics.median_low(device_ms(run, times, 1))  # of two, not their mean
    found = list(times_ms(run, 1, 0, device))
    while len(found) < 2 or (len(found) <= times and sum(found) + found[-1] < PATIENCE_MS):
        if sum(found) > 4 * PATIENCE_MS:
            break
        found += times_ms(run, 1, 0, device)
    return min(found)


def device_ms(run: Callable[[], Any], times: int, warmup: int = 0) -> list[float]:
    """Milliseconds of each run on the current GPU, without the time in which it waits for the
    host.
    """
    for _ in range(warmup):
        run()
    marks = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        begin.record()
        run()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def random_call(
    shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int
) -> AttentionCall:
    """A call on random data with some structure: a sink, and neighbours alike."""
    g = torch.Generator(device=device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        size = (shape.batch, heads, tokens, shape.head_dim)
        x = torch.randn(size, generator=g, device=device)
        coarse = torch.randn(
            shape.batch, heads, ceil_div(tokens, 64), shape.head_dim, generator=g, device=device
        )
        x += coarse.repeat_interleave(64, 2)[:, :, :tokens]
        x[:, :, :4] *= 2
        return x.to(dtype)

    q, k, v = draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)
    base = plain_inputs(q, k, v, causal=shape.causal)
    return AttentionCall(
        q, k, v, base.scale, shape.causal, 0, None, base.heads, base.kv_of_head,
        site=Site("fit", 0), clock=Clock("prefill" if shape.causal else "denoise"),
        geometry=shape.geometry,
    )  # fmt: skip


def shorter(call: AttentionCall, tokens: int) -> AttentionCall:
    """The beginning of a call."""
    q, k, v = (t[:, :, :tokens] for t in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, _shared={})


def fresh(call: AttentionCall) -> AttentionCall:
    """The same call without the estimates that methods left with it."""
    return replace(call, _shared={})


def dense_ms(call: AttentionCall, ms: Callable[..., float]) -> float:
    """The fastest dense path present."""
    group = call.q.shape[1] != call.k.shape[1]

    def run() -> Tensor:
        return scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=call.causal, enable_gqa=group
        )

    if call.q.device.type != "cuda":
        return ms(run)
    found = []
    for backend in (None, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel([backend]) if backend is not None else nullcontext():
                found.append(ms(run))
        except RuntimeError:
            continue
    return min(found)


def _method(
    method: AttentionMethod,
    calls: dict[int, AttentionCall],
    lengths: Sequence[int],
    dense: Sequence[tuple[int, float]],
    ms: Callable[..., float],
    shape: Shape,
) -> tuple[MethodCost, list[tuple[int, int]]] | str:
    """Cost of a method's estimate, order and merging, and its units; or why it is refused."""
    setting = _middle(method)
    points: list[tuple[int, float]] = []
    sizes: list[tuple[int, int]] = []
    longest = lengths[-1]
    for n in lengths:
        call, whole = calls[n], interpolate(dense, n)
        try:
            call, middle = _prepared(call, method, setting)
            answers = answer(fresh(call), Policy(methods=(middle,)))
            if answers is None:
                continue
            if middle.renewed(call.clock.total):
                prime(answers)
                answers = answer(fresh(call), Policy(methods=(middle,)))
                assert answers is not None
            one = answers[0]
            sizes = [p.size for p in one.pieces if isinstance(p, BlockIndex)]
            if not sizes:
                return "it computes its pieces by itself, which the cost table cannot predict"
            policy = Policy(methods=(middle,))
            spent = ms(partial(_ask, call, policy), 2)
            if method.static and not call.causal:
                spent = 0.0  # made once for all layers, steps and runs of a size
            once = spent / shape.layers if method.static else spent
            # On a GPU the time of short calls is that of launches, which does not grow.
            least = once * (longest / n if call.q.device.type == "cpu" else 1.0)
            if least > MOST * interpolate(dense, longest):
                return (
                    f"choosing takes {spent:.1f} ms at {n} tokens, dense attention {whole:.1f} ms"
                )
            if n < longest and call.q.device.type == "cpu" and one.execution != PLAIN:
                return "skipping tiles and 8-bit products save no time on a CPU"
            if n == longest and (reason := _no_faster(one, method, whole, ms)):
                return reason
            spent += _around(one, ms)
        except Exception as error:  # a method that fails must not end the calibration of the others
            return f"it does not run here: {type(error).__name__}: {error}"
        points.append((n, spent / shape.layers if method.static else spent))
    if not points:
        return f"it leaves prompts of {longest} tokens dense"
    share = _share(middle, call, points[-1][1], ms)
    return MethodCost(tuple(points), share, _between(points)), sizes


def _between(points: Sequence[tuple[int, float]]) -> float:
    """How far inner points lie from the line through their neighbours, at worst."""
    gaps = [
        abs(interpolate((points[i - 1], points[i + 1]), points[i][0]) / points[i][1] - 1)
        for i in range(1, len(points) - 1)
    ]
    return round(max(gaps, default=0.0), 4)


def _other_units(method: AttentionMethod, call: AttentionCall) -> list[tuple[int, int]]:
    """Units of the variants that a method's calibrator names without having seen a call."""
    found: list[tuple[int, int]] = []
    for family in families(method.calibrator(call.site).settings()):
        variant = family.settings[len(family.settings) // 2]
        dial = {family.field or ""}
        if variant.model_dump(exclude=dial) == method.model_dump(exclude=dial):
            continue
        answers = answer(fresh(call), Policy(methods=(variant,)))
        pieces = answers[0].pieces if answers else ()
        found += [p.size for p in pieces if isinstance(p, BlockIndex)]
    return found


def _ask(call: AttentionCall, policy: Policy) -> object:
    return answer(fresh(call), policy)


def _prepared(
    call: AttentionCall, method: AttentionMethod, middle: AttentionMethod
) -> tuple[AttentionCall, AttentionMethod]:
    """The call with the side tensors that the method's calibrator makes of it, and a setting that
    reads them; both as they are for a method without any.
    """
    if type(method).calibrator is AttentionMethod.calibrator or call.causal:
        return call, middle
    dense = dense_attention(call)
    families, tables = calibrated_settings([method], call.site, call, dense)
    if not tables:
        return call, middle
    settings = families[len(families) // 2].settings
    return replace(call, tables={**call.tables, **tables}), settings[len(settings) // 2]


def _no_faster(
    one: Answer, method: AttentionMethod, whole: float, ms: Callable[..., float]
) -> str | None:
    """Why 8-bit products are not offered for such a call: none of the method's precisions,
    quantising included, beats the same lists in the inputs' own and dense attention.
    """
    if one.execution.qk == "native":
        return None
    settings = chain(*(f.settings for f in families(method.calibrator(one.call.site).settings())))
    others = (e for s in settings if (e := s.execution(one.call)) is not None)
    named = [one.execution, *(e for e in others if e.qk != "native" and e != one.execution)]
    native = replace(one.execution, qk="native", pv="native", smooth_k=False)
    least = min(whole, ms(lambda: compute(replace(one, execution=native)), 2))
    spent = {(e.qk, e.pv): ms(lambda e=e: compute(replace(one, execution=e)), 2) for e in named}
    (qk, pv), best = min(spent.items(), key=lambda s: s[1])
    if best < least:
        return None
    return f"8-bit products take {best:.2f} ms ({qk} QK, {pv} PV), the inputs' own {least:.2f} ms"


def _around(one: Answer, ms: Callable[..., float]) -> float:
    """What order and merging add to the kernels of the pieces."""
    if one.order is None and len(one.pieces) == 1 and not one.finishers:
        return 0.0
    whole = ms(lambda: compute(one), 2)
    alone = sum(
        ms(lambda p=p: compute(Answer(one.call, (p,), one.execution)), 2)
        for p in one.pieces
        if isinstance(p, BlockIndex)
    )
    return max(0.0, whole - alone)


def _share(
    method: AttentionMethod, call: AttentionCall, whole: float, ms: Callable[..., float]
) -> float:
    """How much of the cost remains when one KV group takes part instead of all heads."""
    groups = call.k.shape[1]
    if groups == 1 or method.static:
        return 1.0
    few = call.heads[: len(call.heads) // groups]
    part = ms(lambda: answer(fresh(call).take(few), Policy(methods=(method,))), 2)
    # whole = a + b, part = a + b / groups
    fixed = (part * groups - whole) / (groups - 1)
    return min(1.0, max(0.0, fixed / whole)) if whole else 1.0


def _middle(method: AttentionMethod) -> AttentionMethod:
    dial = method.dial
    if dial is None:
        return method
    return method.model_copy(update={dial.field: dial.values[len(dial.values) // 2]})


def _kernel(calls: dict[int, AttentionCall], size: tuple[int, int], until: float) -> Kernel:
    """Coefficients of one unit from random lists, judged on lists that were left out."""
    if size[1] == 1 and max(calls) > MOST_SINGLE_KEYS:
        # A mask of single keys grows with the square of the length; shorter prompts tell as much.
        whole = calls[max(calls)]
        calls = {n: shorter(whole, n) for n in (MOST_SINGLE_KEYS // 4, MOST_SINGLE_KEYS)}
    longest = max(calls)
    device = calls[longest].q.device
    held = longest
    if device.type == "cuda":
        held = longest // 2
        calls = {**calls, held: shorter(calls[longest], held)}
    points: list[tuple[bool, list[float], Answer]] = []
    for n, call in calls.items():
        fitted = FITTED if n != held or held == longest else ()
        for density in (*fitted, *(CHECKED if n == held else ())):
            if (size[1] == 1 and density > SINGLE_KEYS) or (density == 1.0 and n == longest):
                continue
            index = random_index(call, size, density)
            share = float(kernels.select.density(index, call).sum())
            pairs = share * visible_pairs(n, call.causal) / 1e6
            features = [1.0, len(call.heads) * call.tiles(size)[0], pairs]
            points.append((density in CHECKED, features, Answer(call, (index,))))
    backend = _backend(points[-1][2])
    spent = [float("inf")] * len(points)
    kernel = Kernel(0.0, 0.0, 0.0, float("inf"))
    # Rounds over all points: a disturbance then spoils one run of several points, not one point.
    for turn in range(ROUNDS):
        runs = [_least(partial(_anew, a), device, warmup=not turn) for _, _, a in points]
        spent = [min(pair) for pair in zip(spent, runs, strict=True)]
        before = kernel.error
        kernel = _solve([(out, f, t) for (out, f, _), t in zip(points, spent, strict=True)])
        settled = kernel.error < GOOD_FIT or kernel.error > MENDED * before
        if turn and (settled or time.monotonic() > until):
            break
    return replace(kernel, backend=backend)


def _anew(one: Answer) -> None:
    """Compute an answer without what kernels kept with its lists: a layer has its own."""
    compute(replace(one, pieces=tuple(replace(p) for p in one.pieces)))


def _least(run: Callable[[], Any], device: torch.device, warmup: bool) -> float:
    """One run on a GPU, where every round adds one; elsewhere the lesser of two."""
    if device.type == "cuda":
        return device_ms(run, 1, int(warmup))[0]
    return min(times_ms(run, 2, 0, device))


def _backend(one: Answer) -> str:
    """Which backend runs an answer's first piece."""
    call, index = one.call, one.pieces[0]
    assert isinstance(index, BlockIndex)
    return dispatch.explain(call.q, call.k, call.v, index, causal=call.causal).backend


def _solve(points: Sequence[tuple[bool, list[float], float]]) -> Kernel:
    """Coefficients from the points that are not held out, and their error on those that are."""
    seen = [(f, t) for held, f, t in points if not held]
    found = least_squares([f for f, _ in seen], [t for _, t in seen])
    gaps = [
        abs(sum(a * b for a, b in zip(found, f, strict=True)) - t) / t
        for held, f, t in points
        if held
    ]
    launch, row, pair = found
    return Kernel(launch, row, pair, round(statistics.fmean(gaps), 4))


def random_index(call: AttentionCall, size: tuple[int, int], density: float) -> BlockIndex:
    """Random visible blocks, the first and the diagonal ones always among them."""
    (nq, nk), (bq, bk) = call.tiles(size), size
    device, heads = call.q.device, len(call.heads)
    g = torch.Generator(device=device).manual_seed(1)
    rows = torch.arange(nq, device=device)[:, None]
    keys = torch.arange(nk, device=device)[None]
    visible = (keys * bk < (rows + 1) * bq) | (not call.causal)
    # The tile's own keys, or a part of them where tiles are tall.
    edge = keys * bk < (rows + 1) * bq
    own = visible & edge & ((keys + 1) * bk > rows * bq + max(0, bq - 128))
    chosen = torch.rand(heads, nq, nk, generator=g, device=device) < density
    return BlockIndex.from_mask((chosen & visible | own | (visible & (keys == 0)))[None], size)
