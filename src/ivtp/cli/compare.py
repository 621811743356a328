"""`ivtp compare`: parse, measure all methods on the same questions, print the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ivtp.cli.arguments import flag, spoken
from ivtp.cli.console import err, out
from ivtp.cli.door import interruptible, quiet
from ivtp.files.outputs import check_output, write_text


@spoken
def compare(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="micro, or a folder with an exported model.")] = "micro",
    method: Annotated[list[str] | None, typer.Option(help="A method; repeatable. Default: all.")] = None,
    keep: Annotated[
        list[int] | None, typer.Option(min=1, help="Visual tokens that stay; repeatable. Default: 16, 64, 128.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Test questions; a multiple of 12 is taken.")] = 1000,
    positions: Annotated[str, typer.Option(help="original or compact.")] = "original",
    batch: Annotated[int, typer.Option(min=1, help="Questions a batch.")] = 16,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="What to compute in; auto is float32.")
    ] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the methods, one CPU thread each.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads while milliseconds are measured.")] = 2,
    resume: Annotated[bool, flag("--resume", help="Go on behind what the --output file holds.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of all numbers, rewritten after every method.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="File for the tables.")] = None,
) -> None:
    """Accuracy, GFLOPs and milliseconds of every method on the same test questions of the twelve formats.

    Accuracy is the mean of the formats' own figures, over all photos and over simple, middling and crowded ones.
    Methods are shared out among processes; finished ones are saved as they come, and --resume goes on behind them.
    """
    from rich.markdown import Markdown
    from rich.progress import track

    from ivtp.evaluation.compare import compare as measure
    from ivtp.registry import list_methods

    def report(items: Any, total: int, name: str) -> Any:
        return track(items, name, total=total, console=err)

    check_output(output, "--output", inputs=(model,))
    check_output(markdown, "--markdown", inputs=(model, output))
    quiet()
    with interruptible(lambda: _left(output)):
        _, text = measure(
            model=model,
            methods=method or list_methods(),
            keeps=keep or [16, 64, 128],
            questions=questions,
            positions=positions,
            batch=batch,
            dtype=dtype,
            workers=workers,
            threads=threads,
            resume=resume,
            output=output,
            report=report,
        )
    out.print(Markdown(text))
    if markdown is not None:
        write_text(markdown, text, "--markdown")


def _left(output: Path | None) -> str:
    if output is None or not output.exists():
        return "nothing was written; with --output FILE every finished method is kept"
    return f"finished methods are in {output}; go on with the same command and --resume"
