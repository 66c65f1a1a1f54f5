"""Runs the dense model and shows every attention call to an observer; keeps no tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.kernels.index import Partial
from accelkit.patches.adapters import adapter_for, watch
from accelkit.patches.call import AttentionCall
from accelkit.patches.sites import dense
from accelkit.patches.sites.attention import run

See = Callable[[AttentionCall, Partial], None]


@torch.inference_mode()
def capture(
    model: Any,
    ids: np.ndarray,
    see: See,
    only: Callable[[str], bool] | None = None,
    dense_rows: int = 0,
) -> Tensor:
    """One dense forward over the token ids `[N]` or `[B, N]`; returns the last hidden states.

    `see(call, dense)` gets each site's call with its dense output `[B, H, N, Dv]` and LSE
    `[B, H, N]`; both are gone afterwards, and what it writes into the output the model goes on
    with. `only(site path)` says which sites to show; the others run what the model always runs.
    `dense_rows` last rows of every call stay dense, and are not shown.
    """

    def visit(call: AttentionCall) -> Tensor | None:
        if only is not None and not only(call.site.path):
            return None
        found = dense_attention(call)
        if dense_rows:
            body = call.n_q - dense_rows
            see(call.first_rows(body), Partial(found.out[:, :, :body], found.lse[:, :, :body]))
        else:
            see(call, found)
        return found.out

    with watch(model, visit):
        return forward(model, ids)


@torch.inference_mode()
def forward(model: Any, ids: np.ndarray, first: int = 0) -> Tensor:
    """Last hidden states `[B, N, C]` of token ids `[N]` or `[B, N]`: a prefill without logits.

    With `first`, rows before that one are not needed: a patch that trims the last layer leaves them
    out, and they mean nothing.
    """
    _, bare = adapter_for(model)
    prompt = torch.from_numpy(np.atleast_2d(ids).astype(np.int64)).to(bare.device)
    if not first:
        return bare.base_model(input_ids=prompt, use_cache=False).last_hidden_state
    found: list[Tensor] = []
    hook = bare.base_model.register_forward_hook(lambda part, args, out: found.append(out[0]))
    try:
        keep = torch.tensor([first], device=bare.device)
        bare(input_ids=prompt, use_cache=False, logits_to_keep=keep)
    finally:
        hook.remove()
    return found[0]


@torch.inference_mode()
def prefill(model: Any, ids: Tensor) -> Tensor:
    """Logits `[B, 1, vocabulary]` of the next token, filling a cache as `generate` does."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


def dense_attention(call: AttentionCall) -> Partial:
    """All heads of a call over every visible key."""
    return run(call, dense.lists(call))
