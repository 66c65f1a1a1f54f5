"""Bytes of live tensors, counted exactly: what a caching allocator on a GPU would count, short of
what operators use inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts the storages that operators return while it is open, beside those of `models`.

    peak: most bytes that were alive at once since `restart`.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = self.peak = 0
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                self._add(tensor)

    def restart(self) -> None:
        """Begin to watch anew."""
        self._drop_dead()
        self.peak = self._total

    def of(self, work: Callable[[], Any]) -> int:
        """The peak of a piece of work."""
        self.restart()
        work()
        return self.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = OPDEFS.get(f"{func.namespace}::{func._opname}")
        if ours is None:
            out = func(*args, **(kwargs or {}))
        else:  # written in Python: what it makes inside counts as well
            with self:
                out = ours._init_fn(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None and not known[0].expired():
            return
        self._total += size - (known[1] if known else 0)
        self._live[key] = (StorageWeakRef(storage), size)
        if self._total > self.peak:  # whoever died unseen matters only for a record
            self._drop_dead()
            self.peak = max(self.peak, self._total)

    def _drop_dead(self) -> None:
        for key in [k for k, (ref, _) in self._live.items() if ref.expired()]:
            self._total -= self._live.pop(key)[1]
