"""A benchmark of calibrations, one for each size: arguments, rows and the file they go to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelkit.calibration.opening.models import open_model
from accelkit.calibration.results import environment

Read = Callable[[Any, Any, int, int, argparse.Namespace], dict[str, Any]]
"""`read(model, tokenizer, tokens, batch, arguments)` gives the row of one size."""


def run(parser: argparse.ArgumentParser, title: str, read: Read, **more: Any) -> None:
    """Read every size and write what is there after each; `more` stands beside the rows."""
    parser.add_argument("--model", default="examples/models/tiny-llama")
    parser.add_argument("--sizes", nargs="+", default=["8192x1"], help="tokens x prompts at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = open_model(args.model, device=args.device, dtype=args.dtype)
    result: dict[str, Any] = {
        "title": title.format(Path(args.model).name),
        "environment": environment(model.device),
        "dtype": str(model.dtype),
        "rows": [],
        **more,
    }
    for size in args.sizes:
        tokens, batch = map(int, size.split("x"))
        row = read(model, tokenizer, tokens, batch, args)
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
