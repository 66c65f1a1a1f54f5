"""Attention over single keys (`bk == 1`): the lists hold key positions and every query of a tile
shares one list.

Stripes `(2048, 1)`, small tiles `(32, 1)` and tokens `(1, 1)` are this form. Its specification is
that of `block_sparse`; only the cost differs, because rows of k and v are gathered one by one.
"""

from __future__ import annotations

from accelkit.kernels.block_sparse import reference

__all__ = ["reference"]
