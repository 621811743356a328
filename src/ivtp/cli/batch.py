"""`ivtp batch`: many images and questions, one model, one line of JSON for each answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.progress import track

from ivtp.cli import arguments as given
from ivtp.cli.console import err, json_line, print_json_line
from ivtp.cli.door import interruptible
from ivtp.cli.models import Asked, silenced
from ivtp.cost.answer import Cost
from ivtp.errors import ConfigError, ImageError, InputError, OutputError, short_reason
from ivtp.files.outputs import check_output, write_text
from ivtp.images import load_image
from ivtp.prompt.question import check_question

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Files of a folder that are taken for images."""


@given.spoken
def batch(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="A folder of images, a file of JSON lines, or - for JSON lines on standard input.")
    ],
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="[QUESTION...]", help="Asked about each image that brings none.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the lines here.")] = None,
    resume: Annotated[bool, given.flag("--resume", help="Leave out what the --output file answers already.")] = False,
    model: given.Model = "micro",
    method: given.Method = "ivtp",
    keep: given.Keep = "64",
    threshold: given.Threshold = None,
    max_new_tokens: given.MaxNewTokens = 64,
    seed: given.Seed = 0,
    option: given.Options = None,
    device: given.Device = "cpu",
    dtype: given.Dtype = "auto",
    clip: given.Clip = None,
    silent: given.Quiet = False,
) -> None:
    """Answer every question about every image of a folder or a list; the model is loaded and pruned once.

    A line in is {"image": FILE or data: URL, or a list of them, "question": TEXT}, with whatever else you like, which
    is handed on; files are looked for beside the list. A line out adds answer, model, method, tokens (all, kept),
    flops (full, pruned), seconds and notes, or error where an image or a question cannot be used.
    """
    options = given.parse_options(option, context, seed=seed, threshold=threshold)
    name = given.check_asked(method, keep, options)
    if resume and output is None:
        raise ConfigError("--resume goes on with a file of answers; name it with --output FILE")
    for question in questions or []:
        check_question(question)
    asked = Asked(model, name, keep, options, max_new_tokens, device, dtype, clip, silent)
    answer_all(asked, source, questions or [], output, resume=resume)


def is_list(source: str) -> bool:
    """Whether an image's name is that of a folder or of a list of questions."""
    return source != "-" and (
        source.lower().endswith((".jsonl", ".ndjson")) or (bool(source) and Path(source).is_dir())
    )


def answer_all(
    asked: Asked, source: str, questions: Sequence[str], output: Path | None = None, *, resume: bool = False
) -> None:
    """Answer what `source` lists, in JSON lines. Raises `typer.Exit` where something could not be answered."""
    entries, folder = read_entries(source, questions)
    check_output(output, "--output", inputs=(source,))
    done = _answered(output, resume)
    left = [entry for entry in entries if _key(entry) not in done]
    if left and not any(_can_be_read(entry, folder) for entry in left[:100]):
        for file in _images(left[0]):
            load_image(_place(file, folder))  # says what is wrong with the first one
    with silenced(asked.silent):
        _run(asked, left, folder, output, len(entries))


def _run(asked: Asked, entries: list[dict[str, Any]], folder: Path, output: Path | None, total: int) -> None:
    before, written, failed = total - len(entries), 0, 0

    def left() -> str:
        if output is None:
            return f"{written} of {total} answers were printed; name a file with --output to be able to --resume"
        return f"{before + written} of {total} answers are in {output}; go on with the same command and --resume"

    with _lines(output) as write, interruptible(left):
        if entries:
            model, processor = asked.load()
            with asked.asking(model, processor) as answer:
                for entry in track(entries, "answering", console=err, transient=True, disable=not err.is_terminal):
                    document = _answer(asked, model, answer, entry, folder)
                    write(document)
                    written += 1
                    failed += "error" in document
    if output is not None:
        err.print(f"written: {output}", markup=False, soft_wrap=True)
    if failed:
        print(f"error: {failed} of {total} could not be answered; their lines say why", file=sys.stderr)
        raise typer.Exit(1)


def _answer(asked: Asked, model: Any, answer: Any, entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        photos = [load_image(_place(file, folder)) for file in _images(entry)]
        found = answer(photos, entry["question"])
    except (ImageError, InputError) as error:
        return {**entry, "error": str(error)}
    cost = Cost.of(model, found)
    return {
        **entry,
        "answer": found.text,
        "model": asked.model,
        "method": asked.method,
        "tokens": {"all": cost.patches, "kept": cost.kept},
        "flops": {"full": cost.full, "pruned": cost.pruned},
        "seconds": found.seconds,
        "notes": list(found.notes),
    }


def read_entries(source: str, questions: Sequence[str]) -> tuple[list[dict[str, Any]], Path]:
    """What is asked, and the folder that its images are named from.

    Raises `ConfigError` for a folder without images or questions, and `InputError` for a line that is no question.
    """
    path = Path(source)
    if source != "-" and path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ImageError(f"the folder '{path}' holds no image ({', '.join(SUFFIXES)}); name another one")
        if not questions:
            raise ConfigError(f"nothing is asked about the images of '{path}'; write the question behind the folder")
        return [{"image": file.name, "question": question} for file in files for question in questions], path
    try:
        text = sys.stdin.read() if source == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or short_reason(error)
        raise InputError(
            f"'{source}' cannot be read ({reason}); name a folder of images or a file of JSON lines"
        ) from None
    name = "the standard input" if source == "-" else f"'{source}'"
    entries = [
        entry
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
        for entry in _parse(line, f"line {number} of {name}", questions)
    ]
    if not entries:
        raise InputError(f"{name} holds no line; write lines such as {_EXAMPLE}")
    return entries, Path() if source == "-" else path.parent


_EXAMPLE = '{"image": "photo.png", "question": "What is it?"}'


def _parse(line: str, place: str, questions: Sequence[str]) -> list[dict[str, Any]]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is no JSON ({short_reason(error)}); write lines such as {_EXAMPLE}") from None
    image = entry.get("image") if isinstance(entry, dict) else None
    images = image if isinstance(image, list) else [image]
    if not images or not all(isinstance(one, str) and one for one in images):
        raise InputError(f"{place} names no image; write lines such as {_EXAMPLE}")
    asked = [entry["question"]] if "question" in entry else list(questions)
    if not asked or not all(isinstance(question, str) for question in asked):
        raise InputError(f"{place} asks nothing; write lines such as {_EXAMPLE}, or the question behind the file")
    return [{**entry, "question": question} for question in asked]


def _images(entry: dict[str, Any]) -> list[str]:
    return entry["image"] if isinstance(entry["image"], list) else [entry["image"]]


def _place(file: str, folder: Path) -> str | Path:
    return file if file[:5].lower() == "data:" else folder / file


def _can_be_read(entry: dict[str, Any], folder: Path) -> bool:
    try:
        for file in _images(entry):
            load_image(_place(file, folder))
    except ImageError:
        return False
    return True


def _key(entry: dict[str, Any]) -> str:
    return json.dumps([entry["image"], entry["question"]])


def _answered(output: Path | None, resume: bool) -> set[str]:
    """What an earlier run has written. Raises `ConfigError` for a file that is not one's, or not to be gone on with."""
    if output is None or not output.exists() or not output.stat().st_size:
        return set()
    if not resume:
        raise ConfigError(f"--output {output} exists; add --resume to go on with it, or name another file")
    *lines, _ = output.read_text(encoding="utf-8", errors="replace").split("\n")  # what has no end was cut off
    try:
        documents = [document for line in lines if "answer" in (document := json.loads(line))]
        done = {_key(document) for document in documents}
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"--output {output} holds no lines of ivtp batch; name another file") from None
    kept = "".join(json_line(document) + "\n" for document in documents)
    write_text(output, kept, "--output")  # without what could not be answered, which is tried again
    return done


@contextmanager
def _lines(output: Path | None) -> Iterator[Any]:
    """A function that writes one document in a line, at once, to the file or the standard output."""
    if output is None:
        yield print_json_line
        return
    try:
        file: TextIO
        with output.open("a", encoding="utf-8") as file:

            def write(document: Any) -> None:
                file.write(json_line(document) + "\n")
                file.flush()

            yield write
    except OSError as error:
        raise OutputError(f"--output {output} could not be written ({short_reason(error)})") from None
