"""The `ivtp` command: parse, call the library, print.

With `--json` the standard output holds one JSON document and nothing else; everything else goes to the standard
error. Exit code 0: done, 1: failed, 2: bad arguments or a bad input file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ivtp.cli import arguments as given
from ivtp.cli.ask import ask, save_picture
from ivtp.cli.batch import batch
from ivtp.cli.bench import bench
from ivtp.cli.chat import chat
from ivtp.cli.console import err, out, parts, print_flops, print_json
from ivtp.cli.door import FLAG, run
from ivtp.cli.eval import evaluate
from ivtp.cli.methods import methods
from ivtp.cli.models import Asked, square_of, threshold_of
from ivtp.cli.reproduce import reproduce
from ivtp.cli.side import panels, print_side_by_side, side_by_side
from ivtp.cli.train import app as train
from ivtp.config import PruneConfig
from ivtp.errors import ConfigError
from ivtp.files.outputs import check_folder, check_output
from ivtp.images import load_image
from ivtp.registry import method_name, names_in

app = typer.Typer(
    help="Instruction-guided visual token pruning for vision-language models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SAMPLES = Path(__file__).parents[1] / "micro" / "samples"
SIDE = 336
"""Pixels of a panel of the demo's picture, which shows four of them in a row."""


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
        bool, given.flag("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, given.flag(FLAG, help="Anywhere on the line: show where an error came from.")] = False,
) -> None:
    """Instruction-guided visual token pruning for vision-language models."""


app.command()(ask)
app.command()(batch)
app.command()(chat)


@app.command()
@given.spoken
def flops(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="llava-1.5-7b, llava-v1.6-mistral-7b, micro, a folder, or a downloaded hub id.")
    ] = "llava-1.5-7b",
    method: Annotated[str | None, typer.Option(help="A method that `ivtp methods` lists; default: ivtp.")] = None,
    compressor: Annotated[
        str | None, typer.Option(help="A trained projector, for example cabstractor, instead of a method.")
    ] = None,
    keep: given.Keep = "64",
    text_tokens: Annotated[
        int, typer.Option("--text", help="Tokens of the prompt, with one placeholder for each image.")
    ] = 512,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    images: Annotated[int, typer.Option(help="Images of each prompt.")] = 1,
    image_size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Pixels of an image, where a family reads it in tiles.")
    ] = None,
    option: given.Options = None,
    as_json: given.Json = False,
) -> None:
    """What a prefill costs with all tokens and with a method or a compressor, part by part.

    JSON keys: model, method (or the compressor), keep, equivalent (mean tokens entering and leaving the decoder's
    layers), text_tokens, batch, images, image_size (width, height; null: one tile), full and pruned (vision, projector,
    llm, head, pruning, total; in FLOPs, a multiply-accumulate counted as 2), saving (share of the full cost, negative
    where it costs more), notes (what must be known of the count).
    """
    from ivtp.cost.flops import flops as count

    options = given.parse_options(option, context)
    name = None if method is None else method_name(method)
    size = given.parse_size(image_size)
    asked: dict[str, Any] = {"text_tokens": text_tokens, "batch": batch, "images": images, "image_size": size}
    with err.status("counting"):
        pruned = count(model, method=name, compressor=compressor, keep=given.parse_keep(keep), **asked, **options)
        if pruned.method in names_in("compressors"):  # in the checkpoint, too
            full = count(model, compressor="mlp", keep="100%", **asked)
        else:
            full = count(model, method="none", **asked)
    if not as_json:
        print_flops(full, pruned, batch=batch, images=images)
        return
    saving = 1 - pruned.total / full.total
    result = {"model": full.model, "method": pruned.method, "keep": pruned.keep, "equivalent": pruned.equivalent}
    both = {**asked, "full": parts(full), "pruned": parts(pruned)}
    print_json({**result, **both, "saving": saving, "notes": list(pruned.notes)})


@app.command()
@given.spoken
def samples(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where to write; created if it does not exist.")],
    count: Annotated[int, typer.Option(min=1, help="Scenes.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Number of the first scene in the test split.")] = 0,
) -> None:
    """Write test scenes of the embedded model's world, with questions and answers in samples.json."""
    check_folder(folder, "FOLDER")
    if (folder / "samples.json").exists():
        raise ConfigError(f"FOLDER {folder} holds a samples.json, which would be overwritten; name another folder")
    from ivtp.micro.world import write_samples

    with err.status("drawing"):
        files = write_samples(folder, count, split="test", seed=seed)
    for file in [*files, folder / "samples.json"]:
        out.print(str(file), markup=False, soft_wrap=True)


@app.command()
@given.spoken
def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the picture; created if needed.")] = Path("demo"),
    keep: given.Keep = "64",
) -> None:
    """Ask the embedded model two questions about a shipped image: all tokens, TopK, IVTP and IVTP+ side by side.

    Image and questions were chosen: the first validation scene with two questions that all tokens, IVTP and IVTP+
    answer and TopK does not. How often each was right in the search is printed below.
    """
    given.check_asked("ivtp", keep, {})
    check_folder(output, "--output")
    entry, file = json.loads((SAMPLES / "demo.json").read_text(encoding="utf-8")), output / "demo.png"
    photo = load_image(SAMPLES / entry["image"])
    from ivtp.cost.sizes import sizes
    from ivtp.visualize import draw_comparison

    asked = Asked("micro", "ivtp", keep, {})
    model, processor = asked.load()
    PruneConfig(keep=given.parse_keep(keep)).tokens(sizes(model).geometry.num_patches)
    output.mkdir(parents=True, exist_ok=True)
    check_output(file, "--output")
    out.print(f"image: {SAMPLES / entry['image']}", markup=False, soft_wrap=True)
    columns = {"all tokens": "none", "TopK": "topk", "IVTP": "ivtp", "IVTP+": "ivtp+"}
    rows = []
    for question in entry["questions"]:
        sides = side_by_side(asked, model, processor, [photo], question["text"], columns)
        out.print(f"\n{question['text']}  (right answer: {question['answer']})", markup=False)
        print_side_by_side(question["text"], sides, titled=False)
        rows.append((question["text"], panels(sides, question["answer"])))
    drawn = draw_comparison(photo, rows, threshold=threshold_of(model, None), square=square_of(model), side=SIDE)
    save_picture(drawn, file, "--output")
    out.print(f"\nchosen to show the difference, from {entry['chosen']}", markup=False, soft_wrap=True)
    out.print(f"picture: {file}", markup=False, soft_wrap=True)


app.command()(methods)
app.command()(bench)
app.command("eval")(evaluate)
app.command("reproduce")(reproduce)
app.add_typer(train, name="train")
