"""`ivtp chat`: one image, one model, as many questions as you like."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ivtp.cli import arguments as given
from ivtp.cli.console import err, print_answer, terminal_streamer
from ivtp.cli.door import interruptible, printable
from ivtp.cli.models import Asked, read_images, silenced
from ivtp.cost.answer import Cost
from ivtp.errors import ConfigError, InputError


@given.spoken
def chat(
    context: typer.Context,
    image: Annotated[str, typer.Argument(help="A PNG, JPEG, WebP, GIF, BMP or TIFF file, or a data: URL.")],
    more: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="Another image of the same prompt; repeatable.")
    ] = None,
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
    """Ask about an image line by line; the model is loaded once. Ctrl-D ends.

    Every line is a question of its own: nothing of the earlier ones is read again. Without a terminal the lines of the
    standard input are the questions, and the answers come one a line.
    """
    options = given.parse_options(option, context, seed=seed, threshold=threshold)
    name = given.check_asked(method, keep, options)
    files = [image, *(more or [])]
    if "-" in files:
        raise ConfigError("chat reads questions from the standard input; name a file as the image")
    photos = read_images(files)
    asked = Asked(model, name, keep, options, max_new_tokens, device, dtype, clip)
    with silenced(silent):
        loaded, processor = asked.load()
        with interruptible(lambda: "the chat has ended"), asked.asking(loaded, processor) as answer:
            if sys.stdin.isatty():
                err.print("ask; Ctrl-D ends", style="dim")
            while (question := _next()) is not None:
                if question.strip():
                    _reply(loaded, processor, answer, photos, question)


def _next() -> str | None:
    """The next line; None at the end."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            return None
    return sys.stdin.readline() or None


def _reply(model: Any, processor: Any, answer: Any, photos: list[Any], question: str) -> None:
    streamer = terminal_streamer(processor)
    try:
        found = answer(photos, question.strip(), streamer=streamer)
    except InputError as error:  # of this question alone
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return
    print_answer(found, Cost.of(model, found), streamed=streamer is not None)
    sys.stdout.flush()
