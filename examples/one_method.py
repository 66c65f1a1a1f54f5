"""One published method with fixed numbers in every head, without calibration.

python examples/one_method.py [METHOD] [--tokens 4096]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import accelkit

MODEL = Path(__file__).parent / "models" / "tiny-llama"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", nargs="?", default="window", help="see `accelkit methods`")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    dense = model(ids).logits

    Method = accelkit.method(args.method)
    with accelkit.patch(model, Method()) as handle, handle.measuring():
        sparse = model(ids).logits
        report = handle.report()

    error = (sparse - dense).abs().sum() / dense.abs().sum()
    print(f"{args.method}: density {report.density}, relative error of the logits {error:.4f}")
    print(f"calls that ran dense: {report.dense or 'none'}")


if __name__ == "__main__":
    main()
