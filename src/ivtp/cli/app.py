"""The `ivtp` command: parse, call the library, print.

With `--json` the standard output holds one JSON document and nothing else; everything else goes to the standard
error. Exit code 0: done, 1: failed, 2: bad arguments or a bad input file.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ivtp.cli.arguments import check_asked, parse_keep, parse_options
from ivtp.cli.bench import bench
from ivtp.cli.compare import compare
from ivtp.cli.console import Cost, answer_json, err, out, parts, print_answer, print_flops, print_json
from ivtp.cli.door import FLAG, quiet, run
from ivtp.files.outputs import PICTURES, check_folder, check_output, whole

app = typer.Typer(
    help="Instruction-guided visual token pruning for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_SAMPLES = Path(__file__).parents[1] / "micro" / "samples"

Model = Annotated[str, typer.Option(help="micro (the embedded model), a folder, or a hub id.")]
Method = Annotated[str, typer.Option(help="A method that `ivtp methods` lists; none keeps every token.")]
Keep = Annotated[str, typer.Option(help='Visual tokens kept of each image: a number, or a share as "11%".')]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Another option of PruneConfig or of the method; repeatable."),
]


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    run(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ivtp import __version__

        out.print(f"ivtp {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option(FLAG, help="Anywhere on the line: show where an error came from.")] = False,
) -> None:
    """Instruction-guided visual token pruning for vision-language models."""


@app.command()
def ask(
    context: typer.Context,
    image: Annotated[str, typer.Argument(help="A PNG, JPEG, WebP, GIF, BMP or TIFF file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Model = "micro",
    method: Method = "ivtp",
    keep: Keep = "64",
    threshold: Annotated[
        float | None, typer.Option(help="Relevance above which a word guides; default: the model's.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw kept patches and word relevances here.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the methods that draw at random.")] = 0,
    option: Options = None,
    as_json: Json = False,
) -> None:
    """Answer a question about an image with pruned visual tokens.

    JSON keys: answer, model, method, tokens (all, kept, equivalent: mean entering and leaving the decoder's layers),
    flops (full, pruned), seconds, stages (where, layer, kept, sources: who stands for each patch, stand_ins: kept
    places of tokens that are no patches), words (text, score, used), fallback, notes (what to know about the answer,
    such as that the method is untrained), picture.
    """
    from ivtp.generate import ask as answer_question
    from ivtp.images import load_image
    from ivtp.prompt.question import check_question

    options = {**parse_options(option, context, answer_question), "seed": seed}
    if threshold is not None:
        options["threshold"] = threshold
    check_asked(method, keep, options)
    check_question(question)
    check_output(picture, "--picture", suffixes=PICTURES, inputs=(image,))
    photo = load_image(image)
    loaded, processor = _load(model)
    with err.status("answering"):
        answer = answer_question(
            loaded,
            processor,
            photo,
            question,
            method=method,
            keep=parse_keep(keep),
            max_new_tokens=max_new_tokens,
            **options,
        )
    cost = Cost.of(loaded, processor, photo, question, answer.trace)
    if as_json:
        print_json(answer_json(answer, cost, model=model, method=method, picture=picture))
    else:
        print_answer(answer, cost)
    if picture is not None:  # behind the answer, which must not be lost with it
        _save(_draw(photo, answer, loaded, question, threshold), picture, "--picture")
        err.print(f"picture: {picture}", markup=False, soft_wrap=True)


@app.command()
def flops(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="llava-1.5-7b, llava-1.5-13b, micro, a folder, or a downloaded hub id.")
    ] = "llava-1.5-7b",
    method: Method = "ivtp",
    keep: Keep = "64",
    text_tokens: Annotated[
        int, typer.Option("--text", help="Tokens of the prompt, with one placeholder for each image.")
    ] = 512,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    images: Annotated[int, typer.Option(help="Images of each prompt.")] = 1,
    option: Options = None,
    as_json: Json = False,
) -> None:
    """What a prefill costs with all tokens and with a method, part by part.

    JSON keys: model, method, keep, equivalent (mean tokens entering and leaving the decoder's layers), text_tokens,
    batch, images, full and pruned (vision, projector, llm, head, pruning, total; in FLOPs, a multiply-accumulate
    counted as 2), saving (share of the full cost), notes (what must be known of the method).
    """
    from ivtp.cost.flops import flops as count

    options = parse_options(option, context, count)
    asked: dict[str, Any] = {"text_tokens": text_tokens, "batch": batch, "images": images}
    with err.status("counting"):
        full = count(model, method="none", **asked)
        pruned = count(model, method=method, keep=parse_keep(keep), **asked, **options)
    if not as_json:
        print_flops(full, pruned)
        return
    saving = 1 - pruned.total / full.total
    result = {"model": full.model, "method": method, "keep": pruned.keep, "equivalent": pruned.equivalent, **asked}
    both = {"full": parts(full), "pruned": parts(pruned)}
    print_json({**result, **both, "saving": saving, "notes": list(pruned.notes)})


@app.command()
def methods(as_json: Json = False) -> None:
    """List the pruning methods.

    JSON: a list with name, title, year, stage, guided, trainable, merges, paper and note (what must be known of it) of
    each.
    """
    from ivtp.registry import list_methods, method_class

    with err.status("reading"):
        rows = [{"name": name, **asdict(method_class(name).info)} for name in list_methods()]
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0]:
        if column not in ("paper", "note"):
            table.add_column(column, overflow="fold")
    for row in rows:
        cells = (value for column, value in row.items() if column not in ("paper", "note"))
        table.add_row(*(("yes" if v else "-") if isinstance(v, bool) else str(v) for v in cells))
    out.print(table)
    out.print("\npapers", style="bold")  # below the table: in a column they would be broken
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        out.print(f"{row['name']:<{width}}  {row['paper']}", markup=False, soft_wrap=True)
    out.print("\nnotes", style="bold")
    for row in rows:
        if row["note"]:
            out.print(f"{row['name']:<{width}}  {row['note']}", markup=False)


@app.command()
def samples(
    folder: Annotated[Path, typer.Argument(help="Where to write; created if it does not exist.")],
    count: Annotated[int, typer.Option(min=1, help="Scenes.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Number of the first scene in the test split.")] = 0,
) -> None:
    """Write test scenes of the embedded model's world, with questions and answers in samples.json."""
    from ivtp.micro.world import write_samples

    check_folder(folder, "FOLDER")
    with err.status("drawing"):
        files = write_samples(folder, count, split="test", seed=seed)
    for file in [*files, folder / "samples.json"]:
        out.print(str(file), markup=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the picture; created if needed.")] = Path("demo"),
    keep: Keep = "64",
) -> None:
    """Ask the embedded model two questions about a shipped image: all tokens, TopK and IVTP side by side."""
    from ivtp.images import load_image
    from ivtp.visualize import draw_comparison

    entry = json.loads((_SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]
    photo, file = load_image(_SAMPLES / entry["image"]), output / "demo.png"
    check_folder(output, "--output")
    output.mkdir(parents=True, exist_ok=True)
    check_output(file, "--output")
    model, processor = _load("micro")
    out.print(f"image: {_SAMPLES / entry['image']}", markup=False, soft_wrap=True)
    rows = []
    for question in _two_questions(entry):
        table, panels = _compare(model, processor, photo, question["text"], parse_keep(keep))
        out.print(f"\n{question['text']}  (right answer: {question['answer']})", markup=False)
        out.print(table)
        rows.append((question["text"], panels))
    drawn = draw_comparison(photo, rows, threshold=_threshold(model, None), square=_square(model))
    _save(drawn, file, "--output")
    out.print(f"\npicture: {file}", markup=False, soft_wrap=True)


app.command()(bench)
app.command()(compare)


def _compare(model: Any, processor: Any, photo: Any, question: str, keep: int | str) -> tuple[Table, list[Any]]:
    """A table and the panels of a picture: the same question with all tokens, TopK and IVTP."""
    from ivtp.generate import ask as answer_question
    from ivtp.visualize import Panel

    table = Table("", "answer", "visual tokens", "prefill", "time", box=None, pad_edge=False)
    panels = []
    for title, method in (("all tokens", "none"), ("TopK", "topk"), ("IVTP", "ivtp")):
        with err.status(escape(f"{title}: {question}")):
            for _ in range(2):  # the first call of each kind pays for set-up; the second is the one that is timed
                answer = answer_question(model, processor, photo, question, method=method, keep=keep)
        cost = Cost.of(model, processor, photo, question, answer.trace)
        table.add_row(title, escape(answer.text), cost.tokens(), cost.flops(), f"{1000 * answer.seconds:.0f} ms")
        panels.append(Panel(f"{title}: {cost.tokens()}", answer.trace, answer.text, cost.flops()))
    return table, panels


def _two_questions(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The first question of a sample and the first other one about different objects."""
    first, *others = entry["questions"]
    different = (q for q in others if not set(q["objects"]) & set(first["objects"]))
    return [first, next(different, others[0])]


def _load(model: str) -> tuple[Any, Any]:
    with err.status(escape(f"loading {model}")):
        from ivtp.generate import load

        quiet()
        return load(model)


def _save(drawn: Any, file: Path, option: str) -> None:
    with whole(file, option) as partial:
        drawn.save(partial)


def _threshold(model: Any, given: float | None) -> float:
    from ivtp.config import PAPER
    from ivtp.plug import find_host

    return float(find_host(model).recommended().get("threshold", PAPER["threshold"]) if given is None else given)


def _square(model: Any) -> int:
    """Side in pixels of what the vision tower sees."""
    from ivtp.cost.sizes import sizes

    geometry = sizes(model).geometry
    return math.isqrt(geometry.num_patches) * geometry.patch_size


def _draw(photo: Any, answer: Any, model: Any, question: str, threshold: float | None) -> Any:
    from ivtp.cost.sizes import sizes
    from ivtp.trace import PruneTrace
    from ivtp.visualize import draw

    return draw(
        photo,
        answer.trace or PruneTrace(sizes(model).geometry.num_patches, images=(1,)),
        question=question,
        answer=answer.text,
        threshold=_threshold(model, threshold),
        square=_square(model),
    )
