"""The gallery: every question with every method, what each kept and answered, on a page that needs only itself."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest
from PIL import Image
from tiny import NUM_PATCHES, image
from typer.testing import CliRunner

from ivtp.cli.app import app
from ivtp.errors import ConfigError, ImageError, InputError, IvtpError
from ivtp.evaluation.reproduce import base, gallery
from ivtp.generate import asking
from ivtp.micro.world.crowds import CROWDS, crowd_name
from ivtp.registry import host_class

KEEP = 8
QUESTIONS = ('Is <i>it</i> red & "round"?', "What is | left of the dog?")
METHODS = ("all tokens", *gallery.METHODS)


class Page(HTMLParser):
    """What a reader of the page finds: elements with their attributes, and all text."""

    def __init__(self, source: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


class Bar:
    """Of how many answers a command spoke, and how many it was told of."""

    total = done = 0

    @contextmanager
    def __call__(self, total: int, title: str) -> Iterator[Callable[[int], None]]:
        def more(number: int) -> None:
            self.done += number

        self.total = total
        yield more


@pytest.fixture(scope="module", autouse=True)
def short_answers() -> Iterator[None]:
    """A tiny random model never comes to an end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "asking", functools.partial(asking, max_new_tokens=3))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two images, one of them wide."""
    folder = tmp_path_factory.mktemp("images")
    image(1).save(folder / "one.png")
    image(2).resize((90, 60)).save(folder / "wide.png")
    return str(folder / "one.png"), str(folder / "wide.png")


@pytest.fixture(scope="module")
def request_of_two(checkpoint: Path, files: tuple[str, str]) -> base.Request:
    return base.Request(base.Asked(str(checkpoint), ()), keeps=(KEEP,), images=files, questions=QUESTIONS)


@pytest.fixture(scope="module")
def made(request_of_two: base.Request) -> base.Result:
    """The gallery of two images and two questions."""
    bar = Bar()
    found = gallery.make(request_of_two, bar)
    assert bar.done == bar.total == 16
    return found


def test_every_question_has_a_panel_of_every_method(made: base.Result) -> None:
    page = Page(made.files[".html"])
    pictures = page.all("img")
    assert len(pictures) == len(page.all("figure")) == 2 * 2 * len(METHODS)
    alts = [str(picture["alt"]) for picture in pictures]
    assert sum("one.png, ivtp+" in alt for alt in alts) == 2
    assert sum(f"{KEEP} kept" in alt for alt in alts) == 2 * 2 * len(gallery.METHODS)
    shown = " ".join(page.text.split())
    for text in ("the model saw the middle 67% of the width", "one.png", "wide.png", *METHODS, *QUESTIONS):
        assert text in shown
    for row in made.rows:
        assert " ".join(row["answer"].split()) in shown
        for word in row["words"]:
            assert f"{word['text']} {word['score']:.2f}" in shown


def test_rows_hold_what_was_kept_and_what_it_cost(made: base.Result) -> None:
    assert Counter(row["method"] for row in made.rows) == dict.fromkeys(METHODS, 4)
    for row in json.loads(json.dumps(made.rows)):
        full = row["method"] == "all tokens"
        assert row["visual tokens"] == {"all": NUM_PATCHES, "kept": NUM_PATCHES if full else KEEP}
        assert sum(row["patches"].values()) == NUM_PATCHES
        assert (row["flops"]["pruned"] == row["flops"]["full"]) is full
        assert bool(row["words"]) is row["method"].startswith("ivtp")
        assert row["right"] is None


def test_the_page_leads_nowhere_and_runs_nothing(made: base.Result) -> None:
    source = made.files[".html"].decode()
    page = Page(made.files[".html"])
    assert all(str(picture["src"]).startswith("data:image/") for picture in page.all("img"))
    assert not {"a", "link", "script", "iframe"} & {name for name, _ in page.elements}
    assert "http" not in source
    assert source.count("url(") == source.count("url(data:")


def test_questions_are_text_and_no_markup(made: base.Result) -> None:
    assert not Page(made.files[".html"]).all("i")
    assert "<i>" not in made.markdown
    assert r"What is \| left" in made.markdown


def test_the_sheet_shows_every_panel(made: base.Result) -> None:
    with Image.open(io.BytesIO(made.files[".png"])) as sheet:
        assert sheet.width > 2 * len(METHODS) * gallery.SMALL
        assert sheet.height > 2 * gallery.SMALL


def test_every_run_makes_the_same(request_of_two: base.Request, made: base.Result) -> None:
    assert gallery.make(request_of_two, Bar()) == made


def test_methods_and_numbers_that_were_asked_for(checkpoint: Path, files: tuple[str, str]) -> None:
    asked = base.Request(base.Asked(str(checkpoint), ()), ("random",), (4, 8), 1, files[:1], QUESTIONS[:1])
    found = gallery.make(asked, Bar())
    assert [(row["method"], row["keep"], row["visual tokens"]["kept"]) for row in found.rows] == [
        ("all tokens", None, NUM_PATCHES),
        ("random", 4, 4),
        ("random", 8, 8),
    ]
    for name in ("random, 4", "random, 8"):  # in both tables, and on the page
        assert found.markdown.count(f"| {name} |") == 2
        assert Page(found.files[".html"]).text.count(name) >= 2


def test_tokens_of_images_in_tiles_are_their_mean(files: tuple[str, str]) -> None:
    """A wide one has more tiles than a square one."""
    model, processor = host_class("llava_onevision").tiny()
    asked = base.Request(base.Asked("tiny", ()), ("random",), (KEEP,))
    found = gallery.ask_all(asked, model, processor, gallery.own(files, QUESTIONS[:1]), Bar())
    counts = [one.shown[0].cost.patches for same in found for one in same]
    assert len(set(counts)) == 2
    assert [line["tokens"] for line in gallery.summary(found)] == [
        f"{round(fmean(counts))} of {round(fmean(counts))}",
        f"{KEEP} of {round(fmean(counts))}",
    ]


def test_the_embedded_model_is_told_whether_it_is_right() -> None:
    made = gallery.make(base.Request(base.Asked("micro", (), limit=1)), Bar())
    page = Page(made.files[".html"])
    assert len(made.rows) == len(page.all("img")) == 2 * len(METHODS)
    rights = [row["right"] for row in made.rows]
    assert page.text.count("✓ right") == sum(rights)
    assert page.text.count("✗ wrong") == len(rights) - sum(rights)
    for row in made.rows:
        assert row["right"] is (row["answer"] == row["right answer"])
        assert f"right answer: {row['right answer']}" in page.text
        assert row["method"] != "all tokens" or row["right"]  # it knows its world


def test_a_dozen_photos_by_the_rule() -> None:
    subjects = gallery.photos("micro")
    crowds = [subject.title.partition(", ")[2] for subject in subjects]
    assert Counter(crowds) == {crowd_name(crowd): gallery.EACH for crowd in range(len(CROWDS))}
    for subject in subjects:
        (first, one), (second, other) = subject.asked
        assert first != second
        assert one != other
        assert not {one, other} & {"yes", "no", None}


@pytest.mark.parametrize(
    ("images", "questions", "error"),
    [((), (), ConfigError), (("nowhere.png",), QUESTIONS, ImageError), (("one.png",), (" ",), InputError)],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    images: tuple[str, ...], questions: tuple[str, ...], error: type[IvtpError]
) -> None:
    with pytest.raises(error):
        gallery.make(base.Request(base.Asked("no-such/model", ()), images=images, questions=questions), Bar())


def test_the_command_needs_neither_lmms_eval_nor_matplotlib(tmp_path: Path) -> None:
    """As a user without any extra runs it."""
    without = "import sys; sys.modules |= dict.fromkeys(('lmms_eval', 'matplotlib')); "
    words = ["reproduce", "gallery", "--limit", "1", "--method", "topk", "--output", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{without}from ivtp.cli.app import main; main()", *words]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "right answers" in ran.stdout
    assert (tmp_path / "gallery.html").is_file()


def test_the_command_writes_page_sheet_and_rows(checkpoint: Path, files: tuple[str, str], tmp_path: Path) -> None:
    command = ["reproduce", "gallery", "--model", str(checkpoint), "--keep", str(KEEP), "--output", str(tmp_path)]
    own = ["--image", files[0], "--question", QUESTIONS[0]]
    result = CliRunner().invoke(app, [*command, *own], catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"gallery.{end}" for end in ("html", "json", "md", "png")
    ]
    assert len(Page((tmp_path / "gallery.html").read_bytes()).all("img")) == len(METHODS)
    document = json.loads((tmp_path / "gallery.json").read_text(encoding="utf-8"))
    assert document["about"]["model"] == str(checkpoint)
    assert len(document["rows"]) == len(METHODS)
    for wrong in (["gallery", "--image", files[0]], ["gallery", "--question", "Is it?"], ["table1", *own]):
        refused = CliRunner().invoke(app, ["reproduce", *wrong, "--output", str(tmp_path / "other")])
        assert isinstance(refused.exception, ConfigError)
        assert "--image" in str(refused.exception)
    for unread in (["--tasks", "pope"], ["--workers", "2"]):
        refused = CliRunner().invoke(app, ["reproduce", "gallery", *unread, "--output", str(tmp_path / "other")])
        assert f"{unread[0]} has no use in gallery" in str(refused.exception)
    assert not (tmp_path / "other").exists()
