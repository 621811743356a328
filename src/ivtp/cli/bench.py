"""`ivtp bench`: parse, call the benchmark, print its tables."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ivtp.cli.arguments import flag, parse_keep, parse_options, spoken
from ivtp.cli.console import err, out
from ivtp.cli.door import interruptible, quiet
from ivtp.errors import ConfigError
from ivtp.files.outputs import check_output

_SIZES = "llava-1.5-7b, llava-1.5-13b, micro, or a CONFIG.json"


@spoken
def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="micro (the default), a folder or a hub id.")] = None,
    geometry: Annotated[str | None, typer.Option(help=f"Random weights instead, of these sizes: {_SIZES}.")] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="VIT,LLM", help="A slice of a geometry, for small machines: 4,8.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method; repeatable. Default: ivtp.")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Visual tokens kept of each image; repeatable. Default: 64.")
    ] = None,
    text: Annotated[
        list[int] | None,
        typer.Option(min=3, help="Tokens of the prompt, one placeholder an image; repeatable. Default: 64."),
    ] = None,
    images: Annotated[
        list[int] | None, typer.Option(min=1, help="Images of each prompt; repeatable. Default: 1.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Prompts at once; repeatable. Default: 1.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="An option for the methods that take it; repeatable."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=0, help="Decoded tokens, 0: the prefill alone. Default: 16, with --growth 0.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 7,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: as torch decides.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, prompts and methods.")] = 0,
    compiled: Annotated[bool, flag("--compile", help="Also compile every run and count breaks.")] = False,
    growth: Annotated[
        bool, flag("--growth", help="Vary text, images and batch one by one: 32..4096, 1..20, 1..32.")
    ] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every number here, as JSON.")] = None,
    resume: Annotated[bool, flag("--resume", help="Skip what the --output file holds already.")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curves here.")] = None,
) -> None:
    """Time full model, oracle and methods, interleaved: prefill, first token, decoding, memory, FLOPs.

    The oracle is the same model that is handed the same token counts in every layer for free. Ratios are medians of
    the ratios of each round. The file of --output is rewritten after each configuration, so --resume can go on with it.
    """
    if model is not None and geometry is not None:
        raise ConfigError("--model has its own weights and --geometry random ones; give one of them")
    if resume and output is None:
        raise ConfigError("--resume goes on with a result file; name it with --output FILE")
    from ivtp.benchmark.asked import Asked

    asked = Asked(
        model=model or "micro",
        geometry=geometry,
        layers=_parse_layers(layers),
        methods=tuple(method or ["ivtp"]),
        keeps=tuple(map(parse_keep, keep or ["64"])),
        texts=tuple(text or ()),
        images=tuple(images or ()),
        batches=tuple(batch or ()),
        options=parse_options(option, context),
        tokens=tokens,
        repeats=repeats,
        dtype=dtype,
        device=device,
        threads=threads,
        seed=seed,
        compile=compiled,
        growth=growth,
    )
    _run(asked, output, resume, plot_file)


def _run(asked: Any, output: Path | None, resume: bool, plot_file: Path | None) -> None:
    from rich.progress import Progress

    from ivtp.benchmark.plot import check_plot, plot
    from ivtp.benchmark.sweep import rounds, sweep

    check_output(output, "--output", inputs=(asked.name,))
    check_plot(plot_file, inputs=(asked.name, output))
    quiet()
    with (
        interruptible(lambda: _left(output)),
        Progress(console=err, transient=True, disable=not err.is_terminal) as progress,
    ):
        task = progress.add_task("preparing", total=rounds(asked))
        command = shlex.join(["ivtp", *sys.argv[1:]])
        document = sweep(
            asked,
            file=output,
            resume=resume,
            command=command,
            report=lambda done: progress.update(task, advance=1, description=done),
        )
    if plot_file is not None:  # ahead of the tables: whoever reads only their first lines closes the pipe
        plot(document, plot_file)
    _print(document)
    for file in filter(None, (output, plot_file)):
        err.print(f"written: {file}", markup=False, soft_wrap=True)


def _left(output: Path | None) -> str:
    if output is None or not output.exists():
        return "nothing was written; with --output FILE every finished configuration is kept"
    return f"what was finished is in {output}; go on with the same command and --resume"


def _print(document: dict[str, Any]) -> None:
    from ivtp.benchmark.growth import growth_grids
    from ivtp.benchmark.table import grids, rich_table

    machine, dtype = document["machine"], document["weights"]["dtype"]
    place = f"{machine['device']}, {machine['threads']} CPU threads, {dtype}"
    out.print(f"{document['model']} on {place}", markup=False, soft_wrap=True)
    for note in document["notes"]:
        out.print(note, markup=False, soft_wrap=True)
    for grid in growth_grids(document) if document["growth"] else grids(document):
        out.print()
        out.print(rich_table(grid))


def _parse_layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        vision, decoder = map(int, text.split(","))
    except ValueError:
        raise ConfigError(f"--layers {text} is not VIT,LLM; write for example --layers 4,8") from None
    return vision, decoder
