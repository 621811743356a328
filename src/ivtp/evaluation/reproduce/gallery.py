"""The gallery: what each method keeps of a dozen images for two questions each, and what is answered, on one page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from PIL import Image

from ivtp.cost.answer import Cost
from ivtp.cost.sizes import sizes
from ivtp.errors import ConfigError
from ivtp.evaluation.reproduce import base
from ivtp.files.machine import processor_name
from ivtp.generate import Answer, asking, load
from ivtp.images import load_image
from ivtp.micro.formats.base import normalise
from ivtp.micro.world import OPEN_KINDS, questions, two_apart
from ivtp.micro.world.crowds import CROWDS, crowd_name, crowd_of
from ivtp.micro.world.photo import take_photo
from ivtp.prompt.question import check_question
from ivtp.visualize import Panel, count_fates, draw_comparison, draw_patches, said_of_crop, stack, swatches

TITLE = "Gallery: what methods keep for a question, and what is answered"
METHODS = ("topk", "ivtp", "ivtp+")
KEEPS = (64,)
EACH = 4
"""Photos of each of CROWDS."""
SIDE, SMALL = 336, 168
"""Pixels of a panel on the page and on the contact sheet."""
RULE = (
    f"the first {EACH} test photos of each of {', '.join(crowd_name(crowd) for crowd in range(len(CROWDS)))} that have "
    "two questions of different kinds about different objects, with different answers that are hard to guess (no yes "
    "or no, no count, no letter); no method's answer took part in the choice"
)


@dataclass(frozen=True)
class Subject:
    """An image, and its questions with the right answer of each; None where that is not known."""

    title: str
    picture: Image.Image
    asked: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Shown:
    """What one method kept for a question, what was answered, and whether that is right; None: not known."""

    name: str
    """Of its column: with `keep` where there are several."""
    method: str
    keep: int | None
    """None: all tokens."""
    answer: Answer
    cost: Cost
    right: bool | None


@dataclass(frozen=True)
class Asked:
    """One question about an image, with all tokens and with every method."""

    subject: Subject
    question: str
    right: str | None
    shown: tuple[Shown, ...]


def make(request: base.Request, report: base.Report) -> base.Result:
    """A row a question and method, the page and the contact sheet.

    Raises `ConfigError` where another model than the embedded one has no images, and what `load_image`, `load` and
    `asking` raise.
    """
    model_name, device = request.asked.model or "micro", request.asked.device
    subjects = own(request.images, request.questions) if request.images else photos(model_name)
    subjects = subjects[: request.asked.limit]
    model, processor = load(model_name, dtype=request.asked.dtype, device=device)
    found = ask_all(request, model, processor, subjects, report)
    images = "the user's own" if request.images else RULE
    about = {"model": model_name, "dtype": request.asked.dtype, "machine": f"{processor_name()}, {device}"}
    about["images"] = images
    square = sizes(model).geometry.square
    files = {".html": page(about, found, square).encode(), ".png": sheet(found, square)}
    rows = [row(asked, shown) for same in found for asked in same for shown in asked.shown]
    return base.Result(TITLE, rows, markdown(images, found), about, files=files)


def photos(model: str) -> list[Subject]:
    """The dozen of the micro world, by RULE."""
    if model != "micro":
        raise ConfigError(
            f"the gallery's photos are of the embedded model's world, which {model!r} does not know; name images of "
            "your own with --image and --question"
        )
    found: dict[int, list[Subject]] = {crowd: [] for crowd in range(len(CROWDS))}
    for index in count():
        photo = take_photo("test", index)
        same = found[crowd_of(photo)]
        pair = two_apart(one for one in questions(photo.scene, seed=0, count=12) if one.kind in OPEN_KINDS)
        if pair and len(same) < EACH:
            title = f"Test photo {index}, {crowd_name(crowd_of(photo))}"
            same.append(Subject(title, photo.picture(), tuple((one.text, one.answer) for one in pair)))
            if all(len(same) == EACH for same in found.values()):
                break
    return [subject for same in found.values() for subject in same]


def own(images: Sequence[str], asked: Sequence[str]) -> list[Subject]:
    """A user's images, with every question about each."""
    for question in asked:
        check_question(question)
    names = [f"Image {n}" if file[:5].lower() == "data:" else Path(file).name for n, file in enumerate(images, 1)]
    both = tuple((question, None) for question in asked)
    return [Subject(name, load_image(file), both) for name, file in zip(names, images, strict=True)]


def ask_all(
    request: base.Request, model: Any, processor: Any, subjects: Sequence[Subject], report: base.Report
) -> list[list[Asked]]:
    """Every question of each image, with all tokens and with each method, which is attached once."""
    methods = [method for method in request.methods or METHODS if method != "none"]
    runs = [("none", KEEPS[0]), *((method, keep) for keep in request.keeps or KEEPS for method in methods)]
    several = len(request.keeps or KEEPS) > 1
    prompts = [(subject, *asked) for subject in subjects for asked in subject.asked]
    columns: list[list[Shown]] = []
    with report(len(prompts) * len(runs), "answers") as on_answers:
        for method, keep in runs:
            with asking(model, processor, method=method, keep=keep, clip=request.asked.clip) as answer:
                columns.append([])
                for subject, question, right in prompts:
                    said = answer(subject.picture, question)
                    is_right = None if right is None else normalise(said.text) == normalise(right)
                    of = None if method == "none" else keep
                    name = "all tokens" if of is None else f"{method}, {keep}" if several else method
                    columns[-1].append(Shown(name, method, of, said, Cost.of(model, said), is_right))
                    on_answers(1)
    found = iter([Asked(*prompt, shown) for prompt, shown in zip(prompts, zip(*columns, strict=True), strict=True)])
    return [[next(found) for _ in subject.asked] for subject in subjects]


def row(asked: Asked, shown: Shown) -> dict[str, Any]:
    """One panel in figures and words."""
    answer, cost = shown.answer, shown.cost
    return {
        "image": asked.subject.title,
        "question": asked.question,
        "right answer": asked.right,
        "method": "all tokens" if shown.keep is None else shown.method,
        "keep": shown.keep,
        "answer": answer.text,
        "right": shown.right,
        "visual tokens": {"all": cost.patches, "kept": cost.kept},
        "flops": {"full": cost.full, "pruned": cost.pruned},
        "patches": count_fates(answer.record),
        **guided_by(answer),
        "notes": list(answer.notes),
    }


def guided_by(answer: Answer) -> dict[str, Any]:
    """The relevance of each word, and whether none was above the threshold."""
    words = answer.trace.words[0] if answer.trace and answer.trace.words else []
    fallback = bool(answer.trace and answer.trace.fallback and answer.trace.fallback[0])
    return {"words": [asdict(word) for word in words], "threshold": answer.threshold, "fallback": fallback}


def summary(found: Sequence[Sequence[Asked]]) -> list[dict[str, Any]]:
    """Of each method how many answers are right, of how many that are known, mean tokens and mean FLOPs."""
    lines = []
    for column in zip(*(asked.shown for same in found for asked in same), strict=True):
        costs = [shown.cost for shown in column]
        mean = Cost(*(round(fmean(numbers)) for numbers in zip(*map(astuple, costs), strict=True)))
        rights = [shown.right for shown in column if shown.right is not None]
        right = f"{sum(rights)} of {len(rights)}" if rights else "–"
        lines.append({"name": column[0].name, "right": right, "tokens": mean.tokens(), "flops": mean.flops()})
    return lines


def markdown(images: str, found: Sequence[Sequence[Asked]]) -> str:
    """The sheet, right answers and costs, then every answer."""
    lines = summary(found)
    answers = [
        (asked.subject.title, asked.question, asked.right or "–", *map(_said, asked.shown))
        for same in found
        for asked in same
    ]
    parts = (
        "![What each method kept, and the answers](gallery.png)",
        f"[The page](gallery.html) is larger and has the relevance of every word. Images: {images}.",
        base.grid(
            ("method", "right answers", "visual tokens, mean", "prefill, mean"), (line.values() for line in lines)
        ),
        base.grid(
            ("image", "question", "right answer", *(line["name"] for line in lines)),
            (map(_cell, texts) for texts in answers),
        ),
    )
    return "\n\n".join(parts)


def _said(shown: Shown) -> str:
    return shown.answer.text + {None: "", True: " ✓", False: " ✗"}[shown.right]


def _cell(text: str) -> str:
    """What a user or a model wrote, as plain text in a cell of a table."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


def sheet(found: Sequence[Sequence[Asked]], square: int) -> bytes:
    """The contact sheet: a row an image, its questions beside each other."""
    strips = []
    for same in found:
        rows = [(_heading(asked), [_panel(shown) for shown in asked.shown]) for asked in same]
        strips.append(draw_comparison(same[0].subject.picture, rows, square=square, side=SMALL, brief=True))
    return encoded(stack(strips).quantize(256), "PNG")


def _heading(asked: Asked) -> str:
    return asked.question if asked.right is None else f"{asked.question} ({asked.right})"


def _panel(shown: Shown) -> Panel:
    title = f"{shown.name}: {shown.cost.tokens()}"
    return Panel(title, shown.answer.trace, shown.answer.text, shown.cost.flops(), shown.right)


def page(about: dict[str, Any], found: Sequence[Sequence[Asked]], square: int) -> str:
    """The page, which needs nothing but itself."""
    fates = {name: uri(swatch, "PNG") for name, swatch in swatches().items()}
    images = [
        {
            "title": same[0].subject.title,
            "crop": said_of_crop(same[0].subject.picture, same[0].shown[0].answer.record),
            "asked": [(one, [figure(one, shown, square, list(fates)) for shown in one.shown]) for one in same],
        }
        for same in found
    ]
    source = Path(__file__).with_name("gallery.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    return template.render(title=TITLE, about=about, summary=summary(found), fates=fates, images=images)


def figure(asked: Asked, shown: Shown, square: int, fates: Sequence[str]) -> dict[str, Any]:
    """One panel as the page's template takes it."""
    answer = shown.answer
    picture = draw_patches(asked.subject.picture, answer.record, square=square, side=SIDE)
    counts = {} if answer.trace is None else count_fates(answer.trace)
    became = [f"{number} {name}" for name, number in counts.items()]
    return {
        "name": shown.name,
        "tokens": shown.cost.tokens(),
        "flops": shown.cost.flops(),
        "answer": answer.text,
        "right": shown.right,
        "uri": uri(picture, "WEBP"),
        "width": picture.width,
        "height": picture.height,
        "alt": f"{asked.subject.title}, {shown.name}: {', '.join(became) or 'all'} of {shown.cost.patches} patches",
        "became": [(fates.index(name), text) for name, text in zip(counts, became, strict=True)],
        **guided_by(answer),
        "notes": answer.notes,
    }


def uri(picture: Image.Image, kind: str) -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(picture, kind)).decode()}"


def encoded(picture: Image.Image, kind: str) -> bytes:
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    picture.save(file, kind, **{"quality": 80, "method": 6} if kind == "WEBP" else {"optimize": True})
    return file.getvalue()
