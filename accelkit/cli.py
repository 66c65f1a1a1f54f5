"""The command line: commands read their options, call the floors below and print. Results go to
stdout, the rest to stderr; heavy libraries load inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from accelkit import console
from accelkit.console import (
    AsJson,
    Device,
    Dtype,
    Frames,
    Height,
    Lengths,
    Model,
    PlanAt,
    Seed,
    Steps,
    Talk,
    Width,
    Yes,
)
from accelkit.errors import InvalidInputError

app = typer.Typer(
    name="accelkit",
    cls=console.Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Speeds up pretrained language models and diffusion pipelines by calibrated sparse "
    "attention.",
)


@app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for plan, journal and report.")] = Path(
        "accelkit-plan"
    ),
    budget: Annotated[
        str | None,
        typer.Option(help="Error that may be spent: 0.02 or 2%. Default: 2%, for pipelines 10%."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths such as 8k,32k. Default: by the device.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Text or JSON-lines file. Default: built-in tasks."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="For pipelines: a prompt a line, or JSON lines."
        ),
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    preset: Annotated[str, typer.Option(help="careful, balanced or fast.")] = "balanced",
    methods: Annotated[
        str | None, typer.Option(help="Methods to try, such as flex_prefill,window. Default: all.")
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Prompts that will be prefilled together; costs are theirs.")
    ] = 1,
    seed: Seed = 0,
    time_limit: Annotated[
        str | None, typer.Option(help="Stop measuring after 90s, 15m or 1h.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the journal in --out.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show attention's share and the most that can be gained; write nothing.",
        ),
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    yes: Yes = False,
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """Measure MODEL and write the fastest [bold]plan[/bold] that keeps within the error budget."""
    console.verbosity(talk)
    allowed = None if budget is None else console.ratio(budget, "--budget")
    stop = console.seconds(time_limit)
    size = console.given(height=height, width=width, num_frames=frames, steps=steps)
    limits = console.sizes(lengths) if lengths else None
    chosen = console.names(methods) or None
    journal = out / "journal.jsonl"
    from accelkit.patches.plan import Budget
    from accelkit.patches.plan_file import FILE

    if not dry_run and not resume and (out / FILE).exists():
        console.replaces(out / FILE, yes)
    from accelkit.calibration.calibrate import calibrate as measure
    from accelkit.calibration.calibrate import dry_run as bound_of
    from accelkit.calibration.pipelines import open_any

    loaded, tokenizer = open_any(model, dtype=dtype, device=device)
    if dry_run:
        bound = bound_of(loaded, lengths=limits, tokenizer=tokenizer, **size)
        console.emit(
            bound,
            as_json,
            console.table("Attention's share, and what a free attention would gain", bound),
        )
        return
    plan = measure(
        loaded,
        data or prompts,
        tokenizer=tokenizer,
        budget=None if allowed is None else Budget(max_rel_error=allowed),
        lengths=limits,
        **size,
        methods=chosen,
        preset=preset,
        batch=batch,
        seed=seed,
        time_limit=stop,
        journal=journal,
        resume=resume,
        progress=talk is not False,
    )
    path = plan.save_pretrained(out)
    from accelkit.calibration import report

    page = report.write_html(plan, out / "report.html")
    files = {"plan": str(path), "journal": str(journal), "report": str(page)}
    where = "\n".join(f"{name:8}{place}" for name, place in files.items())
    console.emit(
        report.summary(plan) | {"files": files},
        as_json,
        report.tables(plan, heads=False),
        "",
        where,
    )


@app.command()
def patch(
    model: Model,
    plan: PlanAt = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue, to answer or to show.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text.")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="A long text with a question about one line of it.")
    ] = False,
    length: Annotated[
        str | None, typer.Option(help="Length of the demo in tokens, such as 16k.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Run the dense model as well.")
    ] = True,
    repeat: Annotated[
        int | None, typer.Option(help="Runs behind each median. Default: 3, for pipelines 1.")
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    output: Annotated[
        Path | None, typer.Option(help="Write a pipeline's video (.mp4) or picture (.png).")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames a second of that video.")] = 16.0,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the model with its plan; accelkit.from_pretrained opens it patched."
        ),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    yes: Yes = False,
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """Run MODEL with a plan: its answer or video, its speed, and how far it agrees with dense."""
    console.verbosity(talk)
    from accelkit.calibration import pipelines

    if pipelines.is_pipeline(model):
        from accelkit.calibration import opening, video_bench

        text = prompt if prompt_file is None else console.read_text(prompt_file).strip()
        size = console.given(height=height, width=width, num_frames=frames, steps=steps)
        pipe, read, setting, shot = pipelines.opened(
            model, plan, text, size, seed, dtype=dtype, device=device
        )
        for path in (output, save and save / pipelines.INDEX):
            if path and path.exists():
                console.replaces(path, yes)
        made = video_bench.compare(
            pipe, read, setting, shot, dense=compare, repeat=repeat or 1, output=output, fps=fps
        )
        made_files = made.files()
        if save is not None:
            made_files["saved"] = str(opening.save_model(pipe, None, read, save).parent)
        lines = [f"{k:9}{v}" for k, v in made_files.items()]
        result_ = made.as_dict() | {"files": made_files}
        console.emit(result_, as_json, video_bench.table(made), *lines)
        return
    sources = [prompt is not None, prompt_file is not None, demo]
    if sum(sources) > 1 or (not any(sources) and save is None):
        raise InvalidInputError(
            "give one of --prompt, --prompt-file and --demo (or only --save DIR)"
        )
    long = console.size(length, "--length") if length else None
    text = prompt if prompt_file is None else console.read_text(prompt_file)
    if save is not None and (save / "config.json").exists():
        console.replaces(save, yes)
    from accelkit.calibration import compare as sides
    from accelkit.calibration import opening

    read, where = opening.open_plan(plan, model)
    loaded, tokenizer = opening.open_model(model, dtype=dtype, device=device)
    document: dict[str, Any] = {"plan": where, "report": opening.report_beside(where)}
    shown: list[Any] = []
    if any(sources):
        opening.need_tokenizer(tokenizer, model)
        ids, expected = sides.prompt(tokenizer, read, text, long, seed)
        result = sides.compare(
            *(loaded, tokenizer, read, ids),
            expected=expected,
            max_new_tokens=max_new_tokens,
            dense=compare,
            repeat=3 if repeat is None else repeat,
        )
        document |= result.as_dict()
        shown += [sides.table(result), *([f"note: {result.note}"] if result.note else [])]
    if save is not None:
        document["saved"] = str(opening.save_model(loaded, tokenizer, read, save).parent)
    files = [f"{k:9}{document[k]}" for k in ("plan", "report", "saved") if document.get(k)]
    console.emit(document, as_json, *shown, *files)


@app.command()
def show(
    plan_or_model: Annotated[
        str, typer.Argument(metavar="PLAN|MODEL", help="A plan, or a model whose sites are listed.")
    ],
    phase: Annotated[
        str | None, typer.Option(help="prefill, decode or denoise. Default: the plan's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the heads × layers picture (.png, .svg or .pdf).")
    ] = None,
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """Show a plan: policy, density and error of each head; or the attention sites of a model."""
    console.verbosity(talk)
    from accelkit.patches.plan import Plan
    from accelkit.patches.plan_file import FILE

    folder = Path(plan_or_model)
    is_model = any((folder / name).exists() for name in ("config.json", "model_index.json"))
    if is_model and not (folder / FILE).exists():
        if out or plot:
            raise InvalidInputError(
                f"{plan_or_model} has no plan to draw; make one with `accelkit calibrate`"
            )
        from accelkit.calibration.pipelines import describe_any

        found = describe_any(plan_or_model)
        console.emit(
            found, as_json, console.table(f"{found['class_name']}: attention sites", found["sites"])
        )
        return
    from accelkit.calibration import pictures, report

    plan = Plan.from_pretrained(plan_or_model)
    document = report.summary(plan, phase) | {"heads_by_site": pictures.head_rows(plan, phase)}
    if out:
        document["report"] = str(report.write_html(plan, out))
    if plot:
        pictures.save_figure(plan, plot, phase)
        document["picture"] = str(plot)
    written = [f"{k:9}{document[k]}" for k in ("report", "picture") if k in document]
    console.emit(document, as_json, report.tables(plan, phase), *written)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this method.")] = None,
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """List the methods, or explain one: its idea, its numbers and what they mean."""
    console.verbosity(talk)
    from accelkit.doctor import explain, listing

    if name:
        one = explain(name)
        text = f"{one['name']}\n\n{one['about']}\n"
        console.emit(one, as_json, text, console.table("Numbers", one["fields"]))
    else:
        found = listing()
        console.emit(found, as_json, console.table("Methods", found))


@app.command()
def bench(
    model: Model,
    plan: PlanAt = None,
    lengths: Lengths = "8k",
    prompt: Annotated[str | None, typer.Option(help="For pipelines: what to show.")] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    repeat: Annotated[
        int | None, typer.Option(help="Timed runs of each path. Default: 5, for pipelines 1.")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Runs before the timed ones.")] = 1,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    fit: Annotated[
        bool, typer.Option("--fit", help="Measure this device's kernels and fit their cost table.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run; time nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Append the results to this JSON-lines file.")
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Fail (exit 3) below this ratio to the best dense path.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """Time prefill or denoising against the model's own path and the best dense one present."""
    console.verbosity(talk)
    limits = console.sizes(lengths)
    from accelkit.calibration import bench as speed
    from accelkit.calibration import pipelines, results
    from accelkit.calibration.opening import open_model, open_plan

    if pipelines.is_pipeline(model):
        from accelkit.calibration import video_bench

        size = console.given(height=height, width=width, num_frames=frames, steps=steps)
        pipe, read, setting, shot = pipelines.opened(
            model, plan, prompt, size, seed, dtype=dtype, device=device
        )
        timed = video_bench.bench(
            *(pipe, read, setting, shot), repeat=repeat or 1, warmup=warmup, progress=console.say
        )
        if out:
            about = results.about(pipe, model, str(plan or model))
            results.append_jsonl(out, [about | vars(setting) | row for row in timed])
        console.emit(timed, as_json, console.table("Denoising", timed))
        if min_speedup is not None:
            video_bench.gate(timed, min_speedup)
        return

    if fit:
        costs = speed.fit_costs(
            open_model(model, dtype=dtype, device=device)[0], limits, console.say
        )
        console.emit(
            costs, as_json, *(console.table(k, v) for k, v in speed.cost_rows(costs).items())
        )
        return
    read, where = open_plan(plan, model)
    loaded, tokenizer = open_model(model, dtype=dtype, device=device)
    if dry_run:
        expected = speed.preview(loaded, read, limits)
        console.emit(expected, as_json, console.table("What would run", expected))
        return
    found = speed.bench(
        loaded,
        read,
        tokenizer,
        lengths=limits,
        batch=batch,
        repeat=5 if repeat is None else repeat,
        warmup=warmup,
        seed=seed,
        progress=console.say,
    )
    about = results.about(loaded, model, where)
    rows = [about | m.as_dict() for m in found]
    if out:
        results.append_jsonl(out, rows)
    console.emit(rows, as_json, speed.table(found), "own = " + speed.dense_paths(loaded)["own"])
    if min_speedup is not None:
        speed.gate(found, min_speedup)


@app.command("eval")
def evaluate(
    model: Model,
    plan: PlanAt = None,
    tasks: Annotated[str, typer.Option(help="Names between commas, or all.")] = "all",
    lengths: Lengths = "8k",
    samples: Annotated[int, typer.Option(help="Prompts for each task and length, at least.")] = 4,
    answers: Annotated[int, typer.Option(help="Answers for each task and length, at least.")] = 0,
    against: Annotated[str, typer.Option(help="dense, or none to score one side only.")] = "dense",
    max_drop: Annotated[
        float | None, typer.Option(help="Fail (exit 3) if a task loses more points out of 100.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """Score MODEL on long-context tasks and text, with a plan and dense."""
    console.verbosity(talk)
    limits = console.sizes(lengths)
    if against not in ("dense", "none"):
        raise InvalidInputError(f"--against: {against!r} is unknown; expected dense or none")
    from accelkit.calibration import evaluate as quality
    from accelkit.calibration.opening import has_plan, need_tokenizer, open_model, open_plan
    from accelkit.calibration.tasks import TASKS

    read = open_plan(plan, model)[0] if plan or has_plan(model) else None
    loaded, tokenizer = open_model(model, dtype=dtype, device=device)
    scores = quality.evaluate(
        loaded,
        need_tokenizer(tokenizer, model),
        read,
        names=TASKS if tasks == "all" else console.names(tasks),
        lengths=limits,
        samples=samples,
        answers=answers,
        dense=against == "dense",
        seed=seed,
        progress=console.say,
    )
    console.emit([s.as_dict() for s in scores], as_json, quality.table(scores))
    if max_drop is not None:
        quality.worst_drop(scores, max_drop)


@app.command()
def doctor(as_json: AsJson = False, talk: Talk = None) -> None:
    """Show versions, GPUs, which kernels would serve and why, and environment variables."""
    console.verbosity(talk)
    from accelkit.doctor import examine, render

    found = examine()
    console.emit(found, as_json, *([] if as_json else [render(found)]))


def main() -> None:
    """Entry point of the `accelkit` command."""
    app()


# -- what several commands share ----------------------------------------------------------------


def _version(value: bool) -> None:
    if value:
        from accelkit import __version__

        typer.echo(f"accelkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
