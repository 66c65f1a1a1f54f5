"""Released code of other projects, run where a checkout of it lies: an adapter each, nothing more.

An adapter imports what it needs from the checkout's folder, turns an attention call into the
release's own layout beforehand (keys and values repeated for each query head where the release
takes no groups, which its models do in every call), and reads back which keys it chose. Parts that
a checkout has to compile (`minference.cuda`, `spas_sage_attn._qattn`) must have been built in
place.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor

from accelkit import kernels
from accelkit.patches.call import AttentionCall

Keys = Callable[[int, Tensor], Tensor]
"""Of a head and some rows, `[R]`: which keys they read, bool `[R, n_k]`, later ones among them or
not.
"""


@dataclass(frozen=True)
class Side:
    """One way to compute a call: the whole, only the choice, and what was chosen."""

    run: Callable[[], Tensor]
    choose: Callable[[], Any] | None
    reads: Callable[[], Keys]


class _StandIn(ModuleType):
    """A module that has every name, all of them None, and none for `import *`."""

    __all__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def imported(folder: Path, name: str, stand_ins: tuple[str, ...] = ()) -> ModuleType:
    """Module `name` of a checkout, without what its packages import on the way, and with empty
    modules instead of `stand_ins`, which this call does not need.
    """
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = ModuleType(".".join(parts[:i]))
        package.__path__ = [str(folder.joinpath(*parts[:i]))]
        sys.modules.setdefault(package.__name__, package)
    for absent in stand_ins:
        sys.modules.setdefault(absent, _StandIn(absent))
    return import_module(name)


def commit(folder: Path) -> str | None:
    """The checkout's commit: git's, or what its file COMMIT says."""
    if (written := folder / "COMMIT").exists():
        return written.read_text("utf-8").strip()
    asked = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None


def of_blocks(mask: Tensor, size: tuple[int, int], tokens: int) -> Keys:
    """Keys of a block mask, bool `[H, nq, nk]`."""
    return lambda head, rows: mask[head, rows // size[0]].repeat_interleave(size[1], -1)[:, :tokens]


def _repeated(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    groups = len(call.heads) // call.k.shape[1]
    return call.q, *(x.repeat_interleave(groups, 1).contiguous() for x in (call.k, call.v))


class FlexPrefill:
    """github.com/bytedance/FlexPrefill."""

    mended = "imported without its packages' own imports; takes the H100's settings on any Hopper"

    def __init__(self, folder: Path) -> None:
        self.code = imported(folder, "flex_prefill.ops.flex_prefill_attention")
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
            self.code.GPU_NAME = "h100"

    def side(self, call: AttentionCall, gamma: float) -> Side:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (call.q, call.k, call.v))
        block, tau, least = 128, 0.1, 1024
        chosen = partial(
            self.code.get_active_blocks, q, k, v, block, gamma, least // block, 1 << 24, tau
        )

        def reads() -> Keys:
            n = -(-call.n_q // block)
            mask = torch.zeros(len(call.heads), n * n + 1, dtype=torch.bool, device=q.device)
            for row, ids in zip(mask, chosen()[0], strict=True):
                row[ids.clamp(max=n * n)] = True
            return of_blocks(mask[:, :-1].view(-1, n, n), (block, block), call.n_k)

        def run() -> Tensor:
            out = self.code.flex_prefill_attention(q, k, v, gamma, tau, min_budget=least)
            return out.transpose(1, 2)

        return Side(run, chosen, reads)


class MInference:
    """github.com/microsoft/MInference, its vertical-slash pattern in every head."""

    mended = (
        "imported without its packages' own imports, kvcompression and quest, and without vllm, "
        "which it takes for installed with transformers 5: its own Triton kernel runs, not SGLang's"
    )

    def __init__(self, folder: Path) -> None:
        beside = ("flexprefill", "kvcompression", "quest")
        stand_ins = tuple(f"minference.modules.{name}" for name in beside)
        import_module("transformers.models.llama.modeling_llama")
        with patch("transformers.utils.import_utils._is_package_available", lambda *a, **k: False):
            self.code = imported(folder, "minference.modules.minference_forward", stand_ins)
        self.ops = import_module("minference.ops.pit_sparse_flash_attention_v2")

    def side(self, call: AttentionCall, vertical: int, slash: int) -> Side:
        q, k, v = _repeated(call)
        pattern = {str(h): ("vertical_and_slash", vertical, slash, 1) for h in call.heads}
        about = {"layer_idx": 0, "num_hidden_layers": 1}
        about["attn_forward_config"] = {"best_pattern": [pattern]}
        run = partial(self.code.minference_prefill_forward, q, k, v, about)
        tile, name = 64, "convert_vertical_slash_indexes"

        def reads() -> Keys:
            lists, convert = [], getattr(self.ops, name)
            with patch.object(self.ops, name, lambda *a: lists.append(convert(*a)) or lists[-1]):
                run()

            def keys(head: int, rows: Tensor) -> Tensor:
                n_blocks, blocks, n_columns, columns = (x[0, 0] for x in lists[head])
                at, inside = rows // tile, torch.arange(tile, device=rows.device)
                # One more place takes what lies behind the ends of lists and keys.
                read = torch.zeros(len(rows), call.n_k + 1, dtype=torch.bool, device=rows.device)
                for count, starts, width in ((n_blocks, blocks, inside), (n_columns, columns, 0)):
                    some = starts[at, : int(count[at].max())].long()
                    listed = torch.arange(some.shape[1], device=rows.device) < count[at, None]
                    ids = torch.where(listed, some, call.n_k)[..., None] + width
                    read.scatter_(1, ids.flatten(1).clamp(max=call.n_k), True)
                return read[:, :-1]

            return keys

        return Side(run, None, reads)


class XAttention:
    """github.com/mit-han-lab/x-attention: its estimate and selection, over accelkit's kernel."""

    mended = (
        "its block-sparse kernel, which needs a build of another project, is accelkit's; its "
        "Triton estimate, which asks for a device named …100, runs on any Hopper"
    )

    def __init__(self, folder: Path) -> None:
        self.code = imported(folder, "xattn.src.Xattention", ("block_sparse_attn",))

    def side(self, call: AttentionCall, stride: int, threshold: float) -> Side:
        q, k, v = _repeated(call)
        size = (128, 128)

        def attend(query: Tensor, *others: Any, **more: Any) -> Tensor:
            index = kernels.select.compact(others[6], size)
            out = kernels.attend(call.q, call.k, call.v, index, causal=call.causal).out
            return out.transpose(1, 2)

        device = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
        about = {name: getattr(device, name) for name in dir(device) if not name.startswith("_")}
        hopper = SimpleNamespace(**{**about, "name": "H100"})

        def prefill(ending: Callable[..., Tensor]) -> Tensor:
            with (
                patch.object(self.code, "block_sparse_attn_func", ending),
                patch.object(torch.cuda, "get_device_properties", lambda _: hopper),
            ):
                return self.code.Xattention_prefill(q, k, v, stride, threshold=threshold)

        def reads() -> Keys:
            masks: list[Tensor] = []
            prefill(lambda query, *others, **more: masks.append(others[6]) or query)
            return of_blocks(masks[0][0], size, call.n_k)

        choose = partial(prefill, lambda query, *others, **more: query)
        return Side(partial(prefill, attend), choose, reads)


class SpargeAttn:
    """github.com/thu-ml/SpargeAttn, on the kernels of SageAttention2."""

    mended = "imported without its packages' own imports"

    def __init__(self, folder: Path) -> None:
        self.code = imported(folder, "spas_sage_attn.core")
        self.utils = import_module("spas_sage_attn.utils")

    def side(self, call: AttentionCall, **setting: float) -> Side:
        q, k, v = (x.contiguous() for x in (call.q, call.k, call.v))
        size, scores = (64, 128), {"simthreshd1": -0.1, "cdfthreshd": None, **setting}
        topk = "topk" in setting
        kind = "spas_sage2_attn_meansim_topk_cuda" if topk else "spas_sage2_attn_meansim_cuda"
        run = partial(getattr(self.code, kind), q, k, v, is_causal=call.causal, **setting)

        def choose(return_lut: bool = True) -> tuple[Tensor, ...]:
            return self.utils.get_block_map_meansim_fuse_quant(
                q, k, k.mean(-2, keepdim=True), is_causal=call.causal, BLKQ=size[0], BLKK=size[1],
                return_lut=return_lut, **scores,
            )  # fmt: skip

        return Side(run, choose, lambda: of_blocks(choose(False)[0][0], size, call.n_k))


RELEASES: dict[str, Any] = {
    "flexprefill": FlexPrefill,
    "minference": MInference,
    "xattention": XAttention,
    "spargeattn": SpargeAttn,
}
