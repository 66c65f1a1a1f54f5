"""The cost table: coefficients are found again, lengths interpolated, data survives JSON."""

from __future__ import annotations

import json
import math
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from accelkit.calibration import session
from accelkit.calibration.fit import ahead as fit_ahead
from accelkit.calibration.fit import clock as fit_clock
from accelkit.calibration.fit import fit
from accelkit.calibration.fit import inputs as fit_inputs
from accelkit.calibration.fit import kernels as fit_kernels
from accelkit.calibration.fit import methods as fit_methods
from accelkit.kernels.cost import (
    Check,
    CostTable,
    Kernel,
    MethodCost,
    interpolate,
    least_squares,
    visible_pairs,
)
from accelkit.kernels.index import BlockIndex
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod, load

TABLE = CostTable(
    "cpu", "float32", 4, 2, 64, ((1024, 1.0), (4096, 16.0)), ((1024, 1.2), (4096, 17.0)),
    {"128x128": Kernel(0.5, 0.01, 2.0), "64x1": Kernel(0.1, 0.02, 5.0)},
    {"m": MethodCost(((1024, 0.5), (4096, 2.0)), 0.25)}, {"n": "too slow"},
)  # fmt: skip

SMALL = fit.Shape(2, 1, 16)
CPU = torch.device("cpu")


def test_json_round_trip() -> None:
    assert CostTable.from_dict(json.loads(json.dumps(TABLE.to_dict()))) == TABLE


def test_interpolation_follows_powers() -> None:
    points = ((1000, 1.0), (4000, 16.0))
    assert interpolate(points, 2000) == pytest.approx(4.0)
    assert interpolate(points, 8000) == pytest.approx(64.0)
    assert interpolate(points, 500) == pytest.approx(0.25)
    assert interpolate(((1000, 3.0),), 2000) == pytest.approx(6.0)


def test_a_head_costs_rows_and_pairs() -> None:
    ms = TABLE.head_ms((128, 128), 4096, 0.5)
    assert ms == pytest.approx(0.01 * 32 + 2.0 * 0.5 * visible_pairs(4096) / 1e6)
    assert TABLE.ride_ms(4096) == pytest.approx(17.0 / 4)
    assert TABLE.method_ms("m", 4096) == pytest.approx((0.5, 1.5 / 4))


def test_kept_lists_save_choosing_and_no_moves() -> None:
    parts = {
        "estimator": ((1000, 3.0),),
        "selection": ((1000, 1.0),),
        "permutation": ((1000, 2.0),),
    }
    costs = replace(TABLE, methods={"m": MethodCost(((1000, 6.0),), 0.5, terms=parts)})
    assert costs.method_ms("m", 1000) == pytest.approx((3.0, 3.0 / 4))
    assert costs.method_ms("m", 1000, 0.25) == pytest.approx((1.5, 1.5 / 4))
    assert TABLE.method_ms("m", 4096, 0.5) == pytest.approx((0.25, 0.75 / 4))
    assert CostTable.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs


def test_a_call_without_causality_has_all_pairs() -> None:
    ms = replace(TABLE, causal=False).head_ms((128, 128), 4096, 0.5)
    assert ms == pytest.approx(0.01 * 32 + 2.0 * 0.5 * 4096**2 / 1e6)


def test_an_unknown_unit_takes_the_nearest_of_its_kind() -> None:
    assert TABLE.head_ms((64, 64), 4096, 0.1) != TABLE.head_ms((128, 1), 4096, 0.1)
    assert TABLE.launch_ms((2048, 1)) == 0.1
    assert TABLE.launch_ms((64, 64)) == 0.5


def test_coefficients_are_found_again() -> None:
    true = (0.3, 0.02, 1.7)
    rows = [[1.0, r, p] for r in (8, 32, 64) for p in (0.1, 1.0, 7.0)]
    ms = [sum(a * b for a, b in zip(true, r, strict=True)) for r in rows]
    assert least_squares(rows, ms) == pytest.approx(true)
    # A launch that costs nothing does not go negative.
    assert min(least_squares(rows, [r[2] * 2 - 0.05 for r in rows])) >= 0


@pytest.mark.parametrize("causal", [True, False])
def test_fit_on_this_device(causal: bool) -> None:
    shape = fit.Shape(heads=2, kv_heads=1, head_dim=16, causal=causal)
    table = fit.fit(shape, torch.float32, torch.device("cpu"), 2048, repeat=3, limit_s=4.0)
    assert table.causal is causal
    assert table.dense_ms(2048) > table.dense_ms(512) > 0
    assert table.head_ms((128, 128), 2048, 1.0) >= table.head_ms((128, 128), 2048, 0.1)
    assert set(table.kernels) == {"128x128"}
    assert table.kernels["128x128"].backend == "torch"
    assert {(c.term, c.what) for c in table.checks} == {("kernel", "128x128")}


def test_random_lists_are_visible_and_hold_the_diagonal() -> None:
    call = fit.random_call(SMALL, torch.float32, torch.device("cpu"), 512)
    index = fit_inputs.random_index(call, (128, 128), 0.1)
    mask = index.to_mask(4)
    assert not mask.triu(1).any()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    # A CPU computes a square without gaps at once; its random lists have none, as methods' lists.
    own = fit_inputs.random_index(call, (256, 64), 0.0).to_mask(8)
    assert own[..., 0, :4].all() and own[..., 1, 4:].all()
    both = fit.random_call(replace(SMALL, causal=False), torch.float32, torch.device("cpu"), 512)
    assert not fit_inputs.random_index(both, (256, 64), 0.0).to_mask(8)[..., 1, 4].any()
    assert fit_inputs.random_index(both, (128, 128), 1.0).to_mask(4).all()


def test_gpus_measure_more_lengths_and_denoisers_one() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert fit.lengths(SMALL, 65536, gpu) == [4096, 8192, 16384, 40960, 65536]
    assert fit.lengths(SMALL, 65536, cpu) == [16384, 65536]
    assert fit.lengths(SMALL, 65536, gpu, brief=True) == [16384, 65536]
    assert fit.lengths(SMALL, 16384, gpu) == [2048, 4096, 10240, 16384]
    assert fit.lengths(SMALL, 1024, gpu) == [1024]
    assert fit.lengths(replace(SMALL, causal=False), 4680, gpu) == [4680]


def test_terms_add_up_to_the_points() -> None:
    calls = {n: fit_inputs.random_call(SMALL, torch.float32, CPU, n) for n in (512, 1024)}
    slow = tuple((n, 1e9) for n in calls)
    found = fit_methods.cost(load("pbs_attn")(), calls, slow, lambda run, times=1: 2.0, SMALL)
    assert not isinstance(found, str)
    cost, lists = found.cost, found.lists
    assert lists[1024][0][0][0][0] == (128, 128)
    # Rows are laid out and put back, which choosing includes once.
    assert dict(cost.terms["permutation"]) == {1024: 4.0}
    assert cost.points == ((1024, sum(p[-1][1] for p in cost.terms.values())),)


class Broken(AttentionMethod):
    """A method that fails."""

    def index(self, call: AttentionCall) -> BlockIndex | None:
        raise RuntimeError("no")


@pytest.mark.parametrize("cold", [True, False])
def test_a_rehearsal_runs_what_must_be_compiled(monkeypatch, cold: bool) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    clock = nullcontext(lambda: float(cold))
    monkeypatch.setattr(fit_ahead, "compile_clock", lambda cached: clock)
    ran: list[tuple[int, tuple[int, int], int]] = []
    precisions: set[tuple[str, str]] = set()
    anew = fit_kernels.anew

    def see(one):
        ran.append((one.call.n_q, one.index.size, len(one.call.heads)))
        precisions.add((one.execution.qk, one.execution.pv))
        anew(one)

    monkeypatch.setattr(fit_kernels, "anew", see)
    calls = {n: fit_inputs.random_call(SMALL, torch.float32, CPU, n) for n in (512, 1024)}
    methods = [Broken(), *(load(m)() for m in ("vertical_slash", "window", "sage_attention"))]
    found = fit_ahead.rehearse(calls, methods, SMALL)
    # Without anything to compile the shortest length is enough, where vertical_slash stays dense.
    assert found >= ({(128, 128), (64, 64), (64, 1)} if cold else {(128, 128)})
    lengths = calls if cold else [512]
    assert {(n, s) for n, s, _ in ran} >= {(n, s) for n in lengths for s in found if s[1] > 1}
    assert cold or {n for n, *_ in ran} == {512}
    assert len(precisions) == 5  # the inputs' own and all that sage_attention names


@pytest.mark.parametrize("cold", [True, False])
def test_a_brief_rehearsal_asks_the_first_unit_alone_where_all_ran_before(
    monkeypatch, cold
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    clock = nullcontext(lambda: float(cold))
    monkeypatch.setattr(fit_ahead, "compile_clock", lambda cached: clock)
    monkeypatch.setattr(session, "_known", set())
    costed: list[int] = []
    cost = fit_ahead.cost
    monkeypatch.setattr(fit_ahead, "cost", lambda *a: costed.append(len(a)) or cost(*a))
    calls = {n: fit_inputs.random_call(SMALL, torch.float32, CPU, n) for n in (512, 1024)}
    methods = [load("vertical_slash")()]
    for again in (False, True):
        costed.clear()
        found = fit_ahead.rehearse(calls, methods, SMALL, brief=True)
        whole = cold or not again
        assert found == ({(128, 128), (64, 64), (64, 1)} if whole else {(128, 128)})
        assert bool(costed) == whole


def test_a_brief_cost_reads_shorter_calls_once_and_without_their_kernels() -> None:
    calls = {n: fit_inputs.random_call(SMALL, torch.float32, CPU, n) for n in (1024, 2048)}
    slow = tuple((n, 1e9) for n in calls)
    asked: list[int] = []

    def clocked(run, times=3) -> float:
        asked.append(times)
        return 2.0

    found = fit_methods.cost(load("xattention")(), calls, slow, clocked, SMALL, brief=True)
    assert not isinstance(found, str)
    assert dict(found.cost.points) == {1024: 2.0, 2048: 2.0}
    assert list(found.lists) == [2048]
    assert asked == [1, 1, 3]  # choosing; choosing and the kernels


def test_a_rehearsal_stays_within_its_room() -> None:
    call = fit_inputs.random_call(SMALL, torch.float32, CPU, 1024)
    assert fit_ahead._at_once(call, None, 8) == 8
    assert fit_ahead._at_once(call, 0, 8) == 0
    assert fit_ahead._at_once(call, 2 * fit_ahead.WORKSPACE, 8) == 0  # and the rows
    room = 7 * fit_ahead.WORKSPACE
    few = fit_ahead._at_once(call, room, 8)
    assert 1 < few < 8
    assert fit_ahead._at_once(call, 2 * room, 8) in (2 * few, 2 * few + 1)
    assert fit_ahead._at_once(call, 1 << 40, 8) == 8


@pytest.mark.parametrize("room", [0, None])
def test_without_room_for_a_thread_a_rehearsal_runs_where_it_is_asked(monkeypatch, room) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    clock = nullcontext(lambda: 1.0)
    monkeypatch.setattr(fit_ahead, "compile_clock", lambda cached: clock)
    threads: set[int] = set()
    cost = fit_ahead.cost
    seen = threading.get_ident
    monkeypatch.setattr(fit_ahead, "cost", lambda *a: threads.add(seen()) or cost(*a))
    calls = {n: fit_inputs.random_call(SMALL, torch.float32, CPU, n) for n in (512, 1024)}
    methods = [Broken(), *(load(m)() for m in ("vertical_slash", "window"))]
    found = fit_ahead.rehearse(calls, methods, SMALL, room)
    assert found >= {(128, 128), (64, 64), (64, 1)}
    assert (threads == {seen()}) == (room == 0)


def test_random_lists_are_drawn_by_parts(monkeypatch) -> None:
    call = fit_inputs.random_call(SMALL, torch.float32, CPU, 1024)
    heads = len(call.heads)
    for drawn in (1, 1 << 21):
        monkeypatch.setattr(fit_inputs, "DRAWN", drawn)
        index = fit_inputs.random_index(call, (64, 1), 0.25)
        mask = index.to_mask(1024)[0]
        assert mask.shape == (heads, 16, 1024)
        own = torch.arange(1024) // 64 == torch.arange(16)[:, None]
        assert (mask & own == own).all()
        assert not (mask & (torch.arange(1024) // 64 > torch.arange(16)[:, None])).any()
        assert 0.2 < float(mask[:, 8:, 1:512].float().mean()) < 0.3
        assert not torch.equal(mask[0], mask[1])


def test_own_lists_count_beside_random_ones() -> None:
    own = (((128, 128), [0.5, 0.25]),)
    heads = sum(TABLE.head_ms((128, 128), 4096, d) for d in (0.5, 0.25))
    launch = TABLE.launch_ms((128, 128))
    rows, found = fit_methods.beside_random(TABLE, 4096, [(own, launch + 0.8 * heads)])
    assert (rows, found) == pytest.approx((0.8, 0.8))
    cost = replace(TABLE.methods["m"], lists=((1024, 1.2), (4096, found)))
    table = replace(TABLE, methods={"m": cost})
    for n, factor in ((1024, 1.2), (4096, 0.8), (8192, 0.8), (2048, 0.96**0.5)):
        (ms,) = table.lists_ms("m", (128, 128), n, [0.5])
        assert ms == pytest.approx(factor * TABLE.head_ms((128, 128), n, 0.5))
    assert CostTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    once, each = table.method_ms("m", 4096)
    whole = table.call_ms("m", 4096, own)
    assert whole == pytest.approx(once + 4 * each + launch + 0.8 * heads)


def test_thin_lists_tell_rows_and_pairs_apart() -> None:
    """A few long rows among short ones take their time however thin the others are."""
    size, launch = (128, 128), TABLE.launch_ms((128, 128))
    rows = 4 * TABLE.rows_ms(size, 4096)

    def took(density: float) -> tuple[fit_methods.Lists, float]:
        pairs = 4 * TABLE.head_ms(size, 4096, density) - rows
        return ((size, [density] * 4),), launch + 3 * rows + 0.9 * pairs

    middle, thin, thinner = (took(d) for d in (0.5, 0.1, 0.02))
    gpu = replace(TABLE, device="toy")
    of_rows, of_pairs = fit_methods.beside_random(gpu, 4096, [middle, thin])
    assert (of_rows, of_pairs) == pytest.approx((3, 0.9), rel=0.15)
    cost = MethodCost(((4096, 0.0),), lists=((4096, of_pairs),), rows=((4096, of_rows),))
    table = replace(TABLE, methods={"m": cost})
    assert table.call_ms("m", 4096, thinner[0]) == pytest.approx(thinner[1], rel=0.1)
    assert CostTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    # On a CPU the difference may be a disturbed reading.
    row, pair = fit_methods.beside_random(TABLE, 4096, [middle, thin])
    assert of_pairs < pair < row < of_rows
    # Lists of the same density tell nothing.
    one, other = fit_methods.beside_random(TABLE, 4096, [middle, middle])
    assert one == pytest.approx(other)


def test_a_launch_of_few_heads_has_the_whole_tail() -> None:
    table = replace(TABLE, kernels={"128x128": Kernel(0.5, 0.01, 2.0, tail=3.0)})
    tail = 3.0 * 0.25 * 4.096
    bare = TABLE.random_ms((128, 128), 4096, [0.25] * 2)
    assert table.random_ms((128, 128), 4096, [0.25] * 2) == pytest.approx(bare + tail)
    all_heads = table.random_ms((128, 128), 4096, [0.25] * 4)
    assert all_heads == pytest.approx(0.5 + 4 * table.head_ms((128, 128), 4096, 0.25))


def test_a_gpu_is_waited_for(monkeypatch) -> None:
    """Until its clock is back, or for good where it does not come back."""
    gpu, slept = torch.device("cuda", 0), list[float]()
    speeds = iter([103.0, 100.0, 80.0, 90.0, 98.0])
    monkeypatch.setattr(fit_clock, "_best", {})
    monkeypatch.setattr(fit_clock, "_cycles_per_ms", lambda: next(speeds, 70.0))
    monkeypatch.setattr(fit_clock.time, "sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    fit_clock.settle(gpu)
    assert not slept
    fit_clock.settle(gpu)
    assert len(slept) == 2
    assert fit_clock._best == {gpu: 100.0}
    monkeypatch.setattr(fit_clock, "PATIENCE_S", 0.0)
    fit_clock.settle(gpu)
    assert fit_clock._best == {gpu: 70.0}
    fit_clock.settle(gpu)
    assert len(slept) == 2


def test_a_last_turn_that_is_not_full_counts() -> None:
    size = (2048, 1)
    kernels = {"2048x1": Kernel(0.5, 0.01, 2.0), "128x128": Kernel(0.5, 0.01, 2.0)}
    full = replace(TABLE, kernels=kernels)
    kernels = {"2048x1": replace(kernels["2048x1"], lanes=132), "128x128": kernels["128x128"]}
    table = replace(TABLE, kernels=kernels)
    # 20 heads of 3 rows of 16 programs on 132 multiprocessors: 7.3 turns take as long as 8.
    expected = 0.5 + (full.random_ms(size, 5120, [0.1] * 20) - 0.5) * 8 / (20 * 3 * 16 / 132)
    assert table.random_ms(size, 5120, [0.1] * 20) == pytest.approx(expected)
    one = table.head_ms(size, 5120, 0.1) / full.head_ms(size, 5120, 0.1)
    assert one == pytest.approx(2 / (TABLE.heads * 3 * 16 / 132))
    assert table.head_ms((128, 128), 5120, 0.1) == full.head_ms((128, 128), 5120, 0.1)


def test_kept_lists_start_sooner() -> None:
    kernel = Kernel(0.5, 0.01, 2.0, sort=0.1, kept=0.2)
    table = replace(TABLE, kernels={"128x128": kernel})
    size, own = (128, 128), (((128, 128), [0.25] * 4),)
    assert table.launch_ms(size) == pytest.approx(0.6)
    assert table.launch_ms(size, kept=True) == pytest.approx(0.4)
    heads = 4 * table.head_ms(size, 4096, 0.25)
    assert table.call_ms("m", 4096, own, anew=0.0) == pytest.approx(0.4 + heads)
    found = fit_methods.beside_random(table, 4096, [(own, 0.4 + heads)], kept=True)
    assert found == pytest.approx((1, 1))


def test_lengths_between_lie_on_a_curve_through_the_points() -> None:
    """A constant, a linear and a quadratic part, as launches, rows and pairs cost."""
    curve = {n: 0.05 + 2e-5 * n + 3e-10 * n * n for n in (4096, 8192, 16384, 32768, 65536)}
    points = tuple(curve.items())
    for n in (6000, 12288, 49152):
        assert interpolate(points, n) == pytest.approx(0.05 + 2e-5 * n + 3e-10 * n * n, rel=1e-3)
    bent = (*points[:2], (16384, 1.5 * curve[16384]), *points[3:])
    assert interpolate(bent, 16384) == pytest.approx(1.5 * curve[16384])


def test_rows_that_are_filled_up_grow_in_steps() -> None:
    def ms(n: int) -> float:
        return 0.01 + 1e-10 * n * 2 ** math.ceil(math.log2(n))

    points = tuple((n, ms(n)) for n in (4096, 8192, 16384, 40960, 65536))
    for n in (12288, 24576, 49152):
        assert interpolate(points, n) == pytest.approx(ms(n), rel=1e-3)


def test_older_tables_hold_one_factor_for_all_lengths() -> None:
    data = json.loads(json.dumps(TABLE.to_dict()))
    kind = next(iter(data["methods"]))
    data["methods"][kind]["lists"] = 1.2
    assert CostTable.from_dict(data).methods[kind].lists == ((1, 1.2),)


def test_checks_survive_json() -> None:
    table = replace(TABLE, checks=(Check("kernel", "128x128", 1280, 2, 0.1, 1.1, 1.0),))
    again = CostTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table
    assert again.checks[0].error == pytest.approx(0.1)
