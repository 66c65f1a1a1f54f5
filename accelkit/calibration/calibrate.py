"""The way in: `calibrate` for language models and pipelines, and what it could gain at most."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from accelkit.errors import InvalidInputError, UnsupportedModelError
from accelkit.patches.adapters import adapter_for
from accelkit.patches.method import Method
from accelkit.patches.plan import Budget, Plan
from accelkit.patches.plan_file import as_path


def calibrate(
    model: Any,
    data: Any = None,
    *,
    tokenizer: Any = None,
    budget: float | Budget | None = None,
    lengths: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    methods: Sequence[str | Method | type[Method]] | None = None,
    preset: str = "balanced",
    batch: int = 1,
    every_row: bool = False,
    seed: int = 0,
    time_limit: float | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Plan:
    """The fastest plan for `model` whose budget error stays within `budget` on held-out prompts.

    Args:
        model: a transformers causal language model in evaluation mode, or a diffusers pipeline.
            It is left as it was.
        data: what to run on. For a language model a text or JSON-lines file, texts, chats (lists
            of messages), token ids (1-d, `[1, N]` or a dict with `input_ids`), or a function that
            returns one of these; None: built-in tasks and text. For a pipeline a file with a prompt
            in each line (or JSON lines of call arguments), prompts, or dicts of call arguments;
            None: built-in prompts.
        tokenizer: of a language model; needed unless `data` holds token ids.
        budget: of a language model, relative L1 error of the last hidden state at scored positions,
            worst prompt with a margin for further ones (0.02); of a pipeline, of the final
            latents, worst prompt (0.1).
        lengths: of a language model, prompt lengths in tokens; costs are those of the longest.
        height, width, num_frames, steps: of a pipeline, as in its call; None: its own defaults.
        methods: names, classes or instances to try; None: all.
        preset: "fast", "balanced" or "careful".
        batch: prompts that will be prefilled together; costs are those of such a batch.
        every_row: of a language model, whether it will be asked for the logits of every row.
            Otherwise its last layer is computed for the rows that are asked for, as `generate`
            asks for the last one; that is exact, and all methods are for the other layers. The last
            rows of a prompt stay dense there, and calls that ask for every row run dense.
        seed: of prompts and choices; the same seed and readings give the same plan.
        time_limit: seconds, after which the best plan that was checked is returned.
        journal: file of finished units; None keeps them in memory.
        resume: whether to take up an older journal.
        progress: whether to show a progress bar on a terminal, and the stages elsewhere, on stderr.

    Returns:
        The plan, dense where nothing was faster within the budget, with the evidence behind it.

    Raises:
        InvalidInputError: an argument that cannot be used.
        NothingPatchedError: a model without a site.
        UnsupportedModelError: no adapter knows the model, or it predicts no tokens.

    Example:
    >>> plan = accelkit.calibrate(model, tokenizer=tokenizer, budget=0.02, lengths=[8192])
    >>> plan = accelkit.calibrate(pipe, prompts, budget=0.1, height=480, width=832, num_frames=81)
    """
    adapter, bare = adapter_for(model)
    _named(methods)
    size: dict[str, Any] = {
        "height": height, "width": width, "num_frames": num_frames, "steps": steps,
    }  # fmt: skip
    _counted(batch=batch, **size)
    _counted(0, seed=seed)
    if journal is not None:
        journal = as_path(journal, "journal")
    shared: dict[str, Any] = {
        "budget": budget, "methods": methods, "preset": preset, "seed": seed,
        "time_limit": time_limit, "journal": journal, "resume": resume, "progress": progress,
    }  # fmt: skip
    if "denoise" in adapter.PHASES:
        from accelkit.calibration.denoise import calibrate as denoise

        others = {"batch": batch if batch != 1 else None, "every_row": every_row or None}
        _unused({"tokenizer": tokenizer, "lengths": lengths, **others}, "a pipeline")
        return denoise.calibrate(bare, data, **shared, **size)
    from accelkit.calibration.prefill import calibrate as prefill

    _unused(size, "a language model")
    if bare.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(bare).__name__} predicts no tokens; load it with AutoModelForCausalLM"
        )
    return prefill.calibrate(
        model, data, tokenizer=tokenizer, lengths=lengths, batch=batch, every_row=every_row,
        **shared,
    )  # fmt: skip


def dry_run(
    model: Any,
    *,
    lengths: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
) -> list[dict[str, Any]]:
    """Attention's share of prefill at each length on this device (of a step, for a pipeline), and
    how much faster it would be if attention cost nothing. Writes nothing.
    """
    adapter, bare = adapter_for(model)
    _counted(height=height, width=width, num_frames=num_frames, steps=steps)
    if "denoise" in adapter.PHASES:
        from accelkit.calibration.bench import video as speed
        from accelkit.calibration.denoise.shots import gather
        from accelkit.calibration.denoise.video import Settings

        _unused({"lengths": lengths}, "a pipeline")
        size = Settings(height, width, num_frames, steps)
        return speed.bound(bare, size, gather(None, 0, 1, 1).measure[0])
    from accelkit.calibration.bench import prefill

    size_of = {"height": height, "width": width, "num_frames": num_frames, "steps": steps}
    _unused(size_of, "a language model")
    return prefill.bound(bare, lengths)


def _named(methods: Any) -> None:
    """Refuse what is no list of methods."""
    listed = isinstance(methods, Sequence) and not isinstance(methods, str)
    if methods is not None and not (listed and all(map(_is_method, methods))):
        raise InvalidInputError(
            f"methods is {methods!r}; expected a list of names, classes or instances, such as "
            "['flex_prefill', 'window']"
        )


def _is_method(one: Any) -> bool:
    return isinstance(one, str | Method) or (isinstance(one, type) and issubclass(one, Method))


def _counted(least: int = 1, **numbers: Any) -> None:
    """Refuse what is no whole number from `least` on."""
    for name, value in numbers.items():
        optional = name not in ("batch", "seed") and value is None
        if not optional and (type(value) is not int or value < least):
            raise InvalidInputError(f"{name} is {value!r}; expected a whole number from {least} on")


def _unused(options: dict[str, Any], what: str) -> None:
    given = [k for k, v in options.items() if v is not None]
    if given:
        raise InvalidInputError(f"{what} has no use for {' and '.join(given)}; leave it out")
