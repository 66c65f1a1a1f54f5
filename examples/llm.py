"""Calibrate a language model, run it patched, and put it back.

    python examples/llm.py [MODEL] [--lengths 4k]

MODEL is a hub id or a folder; by default the small Llama beside this file.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import accelkit
from accelkit.console import names, share, sizes

HERE = Path(__file__).parent


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(HERE / "models" / "tiny-llama"))
    parser.add_argument("--lengths", type=sizes, default="4k", help="in tokens, such as 8k,32k")
    parser.add_argument("--budget", type=share, default="2%", help="error that may be spent")
    parser.add_argument("--methods", type=names, help="such as window,flex_prefill; default: all")
    parser.add_argument("--preset", default="balanced", help="fast, balanced or careful")
    parser.add_argument("--out", default="runs/example", help="folder of the plan")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto" if cuda else "float32")
    model = model.to("cuda" if cuda else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.arange(args.lengths[-1], device=model.device)[None] % 200
    before = model(ids).logits

    chosen = {"budget": args.budget, "methods": args.methods, "preset": args.preset}
    plan = accelkit.calibrate(model, tokenizer=tokenizer, lengths=args.lengths, **chosen)
    plan.save_pretrained(args.out)
    with accelkit.patch(model, plan) as handle, handle.measuring():
        model(ids)
        report = handle.report()

    assert torch.equal(model(ids).logits, before), "unpatching is exact"
    print(f"{report.sparse_calls} of {report.calls} calls ran sparse, density {report.density}")
    print(f"plan: {args.out}")


if __name__ == "__main__":
    main()
