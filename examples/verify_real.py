"""Does it help on your model? Calibrate, patch, score against dense, time both, write a report.

    python examples/verify_real.py MODEL [--lengths 8k,32k] [--budget 2%] [--out runs/verify]

MODEL is a hub id or a folder. OUT receives the plan, a page to read and every figure as JSON."""

import argparse
import json
from pathlib import Path

import accelkit
from accelkit.calibration import results
from accelkit.calibration.bench.prefill import bench
from accelkit.calibration.evaluation.evaluate import evaluate
from accelkit.calibration.opening.models import open_model
from accelkit.calibration.show import report
from accelkit.console import names, share, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--lengths", type=sizes, default="8k,32k", help="in tokens")
    parser.add_argument("--methods", type=names, help="some of `accelkit methods`; default: all")
    parser.add_argument("--tasks", type=names, default="needle,multi_key,text")
    parser.add_argument("--budget", type=share, default="2%", help="error that may be spent")
    parser.add_argument("--preset", default="balanced", help="fast, balanced or careful")
    parser.add_argument("--samples", type=int, default=4, help="prompts for each task and length")
    parser.add_argument("--out", type=Path, default=Path("runs/verify"))
    args = parser.parse_args()

    model, tokenizer = open_model(args.model)
    chosen = {"budget": args.budget, "methods": args.methods, "preset": args.preset}
    plan = accelkit.calibrate(model, tokenizer=tokenizer, lengths=args.lengths, **chosen)
    plan.save_pretrained(args.out)
    report.write_html(plan, args.out / "report.html", title=args.model)

    if all(policy.dense for policy in plan.policies):
        return print("dense everywhere: nothing was faster within this budget at these lengths")
    size = {"lengths": args.lengths, "samples": args.samples}
    scores = evaluate(model, tokenizer, plan, names=args.tasks, **size)
    speeds = bench(model, plan, tokenizer, lengths=args.lengths, repeat=3)
    found = results.about(model, args.model, str(args.out))
    found |= {"scores": [s.as_dict() for s in scores], "results": [m.as_dict() for m in speeds]}
    (args.out / "verify.json").write_text(json.dumps(found, indent=1))
    for s in scores:
        lost = f"points lost: {s.drop}" if s.drop is not None else "no single answer"
        print(f"{s.task} at {s.length}: {s.agreement:.1%} of the tokens as dense, {lost}")
    for m in speeds:
        own, best = m.ratio("own"), m.ratio(m.best_dense)
        print(f"{m.length} tokens: {own:.2f}× your path, {best:.2f}× {m.best_dense}")
    print(f"{type(model).__name__} on {model.device}, {model.dtype}: written to {args.out}")


if __name__ == "__main__":
    main()
