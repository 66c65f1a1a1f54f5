"""A method of your own: say which key blocks each query tile reads, and patch it in.

In the package this class would be a file of its own, `accelkit/patches/methods/every_other.py`, and
every tool would know it; `patch` takes it from anywhere. Run: python examples/add_a_method.py
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import accelkit
from accelkit.kernels import BlockIndex
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod

MODEL = Path(__file__).parent / "models" / "tiny-llama"


class EveryOther(AttentionMethod):
    """A tile reads itself, its neighbour, the first block and every `stride_blocks`-th one."""

    static = True  # the index follows from the shapes alone
    stride_blocks: int = 2
    """Of so many blocks one is read."""
    block: int = 64
    """Side of a block in tokens."""

    def index(self, call: AttentionCall) -> BlockIndex:
        size = (self.block, self.block)
        rows, columns = call.tiles(size)
        row = torch.arange(rows, device=call.q.device)[:, None] + call.q_start // self.block
        column = torch.arange(columns, device=call.q.device)[None]
        near = row - column <= 1
        keep = (column <= row) & (near | (column == 0) | ((row - column) % self.stride_blocks == 0))
        return BlockIndex.from_mask(keep.expand(1, len(call.heads), -1, -1), size)


@torch.inference_mode()
def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (1, 2048), generator=torch.Generator().manual_seed(0))
    for stride in (1, 2, 4, 8):
        with accelkit.patch(model, EveryOther(stride_blocks=stride)) as handle:
            with handle.measuring():
                model(ids)
            print(f"one block in {stride}: density {handle.report().density:.2f}")


if __name__ == "__main__":
    main()
