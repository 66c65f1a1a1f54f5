"""The Python that the pages show is run, on the small models that lie here.

Calibrations are replaced by a window everywhere once their arguments were accepted.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import accelkit
from accelkit.calibration.calibrate import calibrate
from accelkit.patches.patch import handle_of, plan_of

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "models"
HERE = {
    '"my-model"': f'"{MODELS / "tiny-llama"}"',
    '"my-pipeline"': f'"{MODELS / "tiny-wan"}"',
    "bfloat16": "float32",
    '"cuda"': '"cpu"',
}


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/plan.md"])
def test_snippets_run(page, tmp_path, monkeypatch):
    """One after the other, as a reader would; `inputs` is theirs."""
    window = accelkit.method("window")(window_tokens=256)

    def planned(*given: Any, **options: Any) -> Any:
        arguments = inspect.signature(calibrate).bind(*given, **options).arguments
        budget = arguments["budget"]
        assert 0 < getattr(budget, "max_rel_error", budget) < 1
        return plan_of(given[0], window)

    monkeypatch.setattr("accelkit.calibration.calibrate.calibrate", planned)
    monkeypatch.chdir(tmp_path)
    room: dict[str, Any] = {"accelkit": accelkit, "torch": torch}
    if page == "docs/plan.md":
        from transformers import AutoModelForCausalLM

        room["model"] = AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llama")
        plan_of(room["model"], window).save_pretrained("my-plan")
    text = (ROOT / page).read_text("utf-8")
    room["inputs"] = {"input_ids": torch.arange(512)[None] % 200, "max_new_tokens": 2}
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert snippets
    for snippet in snippets:
        for shown, ours in HERE.items():
            snippet = snippet.replace(shown, ours)
        exec(compile(snippet, page, "exec"), room)
        if "accelkit.patch(" in snippet and "with " not in snippet:
            for name in {"model", "pipe"} & room.keys():
                accelkit.unpatch(room[name])
    assert not any(handle_of(room[name]) for name in ("model", "pipe") if name in room)
    if page == "docs/plan.md":
        assert room["dense_first"].limits.min_length == 16384
        assert '"schema_version"' in room["schema"]
