"""`ivtp ask`: questions about images, answered by one model that is loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ivtp.cli import arguments as given
from ivtp.cli.batch import answer_all, is_list
from ivtp.cli.console import answer_json, err, print_answer, print_json, print_json_list, terminal_streamer
from ivtp.cli.door import printable
from ivtp.cli.models import Asked, read_images, silenced, square_of, threshold_of
from ivtp.cli.side import panels, print_side_by_side, side_by_side
from ivtp.cost.answer import Cost
from ivtp.errors import ConfigError
from ivtp.files.outputs import PICTURES, check_output, whole
from ivtp.prompt.question import check_question


@given.spoken
def ask(
    context: typer.Context,
    image: Annotated[
        str,
        typer.Argument(
            help="A PNG, JPEG, WebP, GIF, BMP or TIFF file, a data: URL, or - for standard input; "
            "a folder, or a .jsonl file, is answered as `ivtp batch` does."
        ),
    ],
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION...", help="What to ask about it; several are asked in turn.")
    ] = None,
    more: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="Another image of the same prompt; repeatable.")
    ] = None,
    model: given.Model = "micro",
    method: given.Method = "ivtp",
    keep: given.Keep = "64",
    compare: Annotated[
        str | None, typer.Option(metavar="METHOD,METHOD", help="Ask with each of these methods, side by side.")
    ] = None,
    threshold: given.Threshold = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", "-p", help="Draw kept patches and word relevances here.")
    ] = None,
    max_new_tokens: given.MaxNewTokens = 64,
    seed: given.Seed = 0,
    option: given.Options = None,
    device: given.Device = "cpu",
    dtype: given.Dtype = "auto",
    clip: given.Clip = None,
    silent: given.Quiet = False,
    as_json: given.Json = False,
) -> None:
    """Answer questions about an image with pruned visual tokens. Many images: `ivtp batch`; a dialogue: `ivtp chat`.

    JSON keys: image, question, answer, model, method, tokens (all, kept, equivalent: mean entering and leaving the
    decoder's layers), flops (full, pruned), seconds, stages (where, layer, kept, sources: who stands for each patch,
    stand_ins: kept places of tokens that are no patches), words (text, score, used), fallback, notes (what to know
    about the answer, such as that the method is untrained), picture. A list of these where there are several.
    """
    options = given.parse_options(option, context, seed=seed, threshold=threshold)
    methods = _methods(compare) if compare is not None else [method]
    names = [given.check_asked(name, keep, options if len(methods) == 1 else {}) for name in methods]
    questions = questions or []
    for question in questions:
        check_question(question)
    asked = Asked(model, names[0], keep, options, max_new_tokens, device, dtype, clip, silent)
    if is_list(image):
        if picture is not None or compare is not None or more:
            raise ConfigError("a folder or a list is answered line by line: leave out --picture, --compare and --image")
        answer_all(asked, image, questions)
        return
    if not questions:
        raise ConfigError("nothing is asked about the image; write the question behind it, in quotes")
    files = [image, *(more or [])]
    check_output(picture, "--picture", suffixes=PICTURES, inputs=files)
    photos = read_images(files)
    with silenced(silent):
        loaded, processor = asked.load()
        from ivtp.generate import prompt_for

        for question in questions:
            prompt_for(processor, question, images=len(photos))
        if compare is not None:
            _compare(asked, loaded, processor, photos, files, questions, names, picture, as_json)
        else:
            _answer(asked, loaded, processor, photos, files, questions, picture, as_json)


def _answer(
    asked: Asked,
    model: Any,
    processor: Any,
    photos: list[Any],
    files: list[str],
    questions: Sequence[str],
    picture: Path | None,
    as_json: bool,
) -> None:
    documents, answers = [], []
    with asked.asking(model, processor) as answer:
        for question in questions:
            if len(questions) > 1:
                err.print(printable(question), markup=False, soft_wrap=True)
            streamer = None if as_json else terminal_streamer(processor)
            with err.status("answering") as status:
                if streamer is not None:
                    streamer.before = status.stop
                answers.append(answer(photos, question, streamer=streamer))
            cost = Cost.of(model, answers[-1])
            if as_json:
                documents.append(answer_json(answers[-1], cost, asked.model, asked.method, _named(files), picture))
            else:
                print_answer(answers[-1], cost, streamed=streamer is not None)
    if as_json:
        print_json(documents[0]) if len(documents) == 1 else print_json_list(documents)
    if picture is not None:  # behind the answers, which must not be lost with it
        from ivtp.visualize import stack

        save_picture(stack([draw_answer(model, one, asked.method) for one in answers]), picture, "--picture")
        err.print(f"picture: {picture}", markup=False, soft_wrap=True)


def _compare(
    asked: Asked,
    model: Any,
    processor: Any,
    photos: list[Any],
    files: list[str],
    questions: Sequence[str],
    methods: list[str],
    picture: Path | None,
    as_json: bool,
) -> None:
    from ivtp.visualize import draw_comparison

    if picture is not None and len(photos) > 1:
        raise ConfigError("--compare draws one image; leave out --picture or --image")
    columns = {"all tokens" if name == "none" else name: name for name in methods}
    found = [side_by_side(asked, model, processor, photos, question, columns) for question in questions]
    if as_json:
        print_json_list(
            answer_json(answer, cost, asked.model, columns[title], _named(files), picture)
            for sides in found
            for title, answer, cost in sides
        )
    for question, sides in zip(questions, found, strict=True):
        if not as_json:
            print_side_by_side(question, sides, titled=len(questions) > 1)
    if picture is not None:
        rows = [(question, panels(sides)) for question, sides in zip(questions, found, strict=True)]
        drawn = draw_comparison(photos[0], rows, threshold=threshold_of(model, None), square=square_of(model))
        save_picture(drawn, picture, "--picture")
        err.print(f"picture: {picture}", markup=False, soft_wrap=True)


def draw_answer(model: Any, answer: Any, method: str) -> Any:
    """The picture of an answer, with what it cost; one of all tokens is drawn untouched."""
    from ivtp.visualize import draw

    cost = Cost.of(model, answer)
    return draw(
        list(answer.pictures),
        answer.record,
        question=answer.question,
        answer=answer.text,
        note=f"{method}: {cost.tokens()} visual tokens, {cost.flops()}, {1000 * answer.seconds:.0f} ms",
        threshold=threshold_of(model, answer.threshold),
        square=square_of(model),
    )


def save_picture(drawn: Any, file: Path, option: str) -> None:
    """Write a picture whole or not at all."""
    with whole(file, option) as partial:
        drawn.save(partial)


def _methods(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if len(names) < 2 or len(set(map(str.lower, names))) < len(names):
        raise ConfigError(
            f"--compare {text} is not two different methods or more; write for example --compare topk,ivtp"
        )
    return names


def _named(files: list[str]) -> str | list[str]:
    short = [file if len(file) <= 200 else f"{file[:40]}..." for file in files]  # a data URL is the image itself
    return short[0] if len(short) == 1 else short
