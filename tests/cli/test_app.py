"""The command line as a user meets it: what is printed where, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file
from terminal import Result, Run, one_line
from tiny import NUM_PATCHES, QUESTIONS, VISION_WIDTH, Tiny

import ivtp
from ivtp.cli import app as cli
from ivtp.methods.dynamicvit import Predictors
from ivtp.registry import host_class

# ---- ask ------------------------------------------------------------------------------------------------------

ASK_KEYS = [
    "image",
    "question",
    "answer",
    "model",
    "method",
    "tokens",
    "flops",
    "seconds",
    "stages",
    "words",
    "fallback",
    "notes",
    "picture",
]


def ask(run: Run, photo: Path, checkpoint: Path, *more: object) -> Result:
    """`ivtp ask` with the tiny model at 8 tokens."""
    return run("ask", photo, QUESTIONS[0], "--model", checkpoint, "--keep", 8, "--max-new-tokens", 4, *more)


def test_ask_json_is_complete_and_alone(run: Run, photo: Path, checkpoint: Path, tiny: Tiny) -> None:
    result = ask(run, photo, checkpoint, "--json")
    assert result.code == 0
    document = json.loads(result.out)
    assert list(document) == ASK_KEYS
    assert (document["tokens"]["all"], document["tokens"]["kept"]) == (NUM_PATCHES, 8)
    assert 8 <= document["tokens"]["equivalent"][1] <= document["tokens"]["equivalent"][0] <= NUM_PATCHES
    assert 0 < document["flops"]["pruned"] < document["flops"]["full"]
    assert document["words"][0].keys() == {"text", "score", "used"}
    assert [w["text"] for w in document["words"]][:2] == ["What", "is"]
    kept = document["stages"][-1]["kept"]
    assert kept == sorted(set(kept))
    assert len(kept) == 8
    model, processor = ivtp.load(checkpoint)
    answer = ivtp.ask(model, processor, photo, QUESTIONS[0], keep=8, max_new_tokens=4)
    assert document["answer"] == answer.text
    assert answer.trace is not None
    assert kept == answer.trace.kept()[0].tolist()


def test_ask_puts_the_answer_on_stdout_and_the_rest_on_stderr(run: Run, photo: Path, checkpoint: Path) -> None:
    result = ask(run, photo, checkpoint)
    assert result.code == 0
    assert result.out.strip() == json.loads(ask(run, photo, checkpoint, "--json").out)["answer"]
    assert f"8 of {NUM_PATCHES} visual tokens" in result.err
    assert "%" in result.err
    assert "guided by" in result.err


def test_brackets_in_a_question_are_no_markup(run: Run, photo: Path, checkpoint: Path) -> None:
    result = run("ask", photo, "[/b] What is [red]?", "--model", checkpoint, "--keep", 8, "--max-new-tokens", 1)
    assert result.code == 0


def test_ask_without_pruning(run: Run, photo: Path, checkpoint: Path) -> None:
    document = json.loads(ask(run, photo, checkpoint, "--json", "--method", "none").out)
    assert document["tokens"] == {"all": NUM_PATCHES, "kept": NUM_PATCHES, "equivalent": [NUM_PATCHES] * 2}
    assert document["flops"]["full"] == document["flops"]["pruned"]
    assert document["stages"] == []
    assert document["words"] == []


def test_ask_json_marks_the_place_where_cls_stands(run: Run, photo: Path, checkpoint: Path) -> None:
    (stage,) = json.loads(ask(run, photo, checkpoint, "--json", "--method", "visionzip").out)["stages"]
    (place,) = stage["stand_ins"]
    assert place in stage["kept"]
    for stage in json.loads(ask(run, photo, checkpoint, "--json").out)["stages"]:
        assert stage["stand_ins"] == []


def test_ask_options_reach_the_method(run: Run, photo: Path, checkpoint: Path) -> None:
    def stages(*more: object) -> list[dict[str, object]]:
        found = json.loads(ask(run, photo, checkpoint, "--json", *more).out)["stages"]
        assert isinstance(found, list)
        return found

    random = "--method", "random"
    assert stages(*random, "--seed", 1) == stages(*random, "--seed", 1)
    assert stages(*random, "--seed", 1) != stages(*random, "--seed", 2)
    assert len(stages("--method", "topk", "--option", "where=layers")) > len(stages("--method", "topk")) == 1
    assert {s["where"] for s in stages("--option", "stages=llm")} == {"llm"}
    used = [
        [w["used"] for w in json.loads(ask(run, photo, checkpoint, "--json", "--threshold", t).out)["words"]]
        for t in (-1, 1)
    ]
    assert all(used[0])
    assert not any(used[1])


@pytest.mark.parametrize("method", ["ivtp", "topk", "none"])
def test_ask_draws_a_picture(run: Run, photo: Path, checkpoint: Path, tmp_path: Path, method: str) -> None:
    file = tmp_path / "out.png"
    result = ask(run, photo, checkpoint, "--json", "--method", method, "--picture", file)
    assert json.loads(result.out)["picture"] == str(file)
    with Image.open(file) as drawn:
        assert drawn.width > 300


def test_the_photo_is_not_overwritten_by_its_picture(run: Run, photo: Path, checkpoint: Path) -> None:
    before = photo.read_bytes()
    result = ask(run, photo, checkpoint, "--picture", photo)
    assert result.code == 2
    assert "would overwrite" in one_line(result.err)
    assert photo.read_bytes() == before


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_the_answer_outlives_a_picture_that_cannot_be_written(
    run: Run, photo: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, json_too: tuple[str, ...]
) -> None:
    """The disk fills up while the model answers."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    result = ask(run, photo, checkpoint, "--picture", tmp_path / "out.png", *json_too)
    assert result.code == 1
    assert result.out.strip()
    assert not json_too or json.loads(result.out)["answer"]
    last = result.err.strip().splitlines()[-1]
    assert last.startswith(f"error: --picture {tmp_path / 'out.png'}")
    assert "No space left" in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["samples"], ["demo", "--output"]])
def test_a_file_is_no_folder_to_write_to(run: Run, photo: Path, command: list[str]) -> None:
    result = run(*command, photo)
    assert result.code == 2
    assert "no folder" in one_line(result.err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "0"], "--keep 0 leaves"),
        (["--keep", str(NUM_PATCHES + 1)], f"1..{NUM_PATCHES}"),
        (["--keep", "300%"], "300%"),
        (["--keep", "nan"], "--keep nan"),
        (["--method", "ivpt"], "did you mean ivtp"),
        (["--threshold", "7"], "cosine"),
        (["--option", "guide"], "NAME=VALUE"),
        (["--option", "guide=nobody"], "instruction"),
        (["--option", "nothing=1"], "nothing"),
        (["--option", "keep=8"], "use --keep"),
        (["--option", "max_new_tokens=8"], "use --max-new-tokens"),
        (["--option", "seed=3"], "use --seed"),
        (["--option", "threshold=0.3"], "use --threshold"),
        (["--option", "clip=clip"], "clip"),
        (["--option", "config=1"], "config"),
        (["--option", "options=1"], "options"),
        (["--option", "cls=1"], "cls"),
        (["--method", "topk", "--option", "stages=llm"], "stages"),
        (["--picture", "out.docx"], "suffix"),
        (["--picture", "out.mpg"], "suffix"),
        (["--picture", "out.fits"], "suffix"),
        (["--picture", "out.hdf"], "suffix"),
        (["--picture", "--json"], "is followed by --json"),
        (["--picture", "nowhere/out.png"], "does not exist"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(
    run: Run, photo: Path, checkpoint: Path, arguments: list[str], words: str
) -> None:
    result = run("ask", photo, "Hello?", "--model", checkpoint, "--keep", 8, *arguments)
    assert result.code == 2
    assert result.out == ""
    assert words in one_line(result.err)


def test_bad_images_are_code_2_before_a_model_is_loaded(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    for bad in (tmp_path / "missing.png", tmp_path, text):
        result = run("ask", bad, "Hello?", "--model", tmp_path / "no-model")
        assert result.code == 2
        assert str(bad) in one_line(result.err)


def test_an_image_token_in_the_question_is_one_line(run: Run, photo: Path, checkpoint: Path) -> None:
    result = run("ask", photo, "what is left of the <image> sign?", "--model", checkpoint)
    assert result.code in (1, 2)
    assert result.out == ""
    assert "'<image>'" in one_line(result.err)


def test_a_missing_model_is_code_1(run: Run, photo: Path, tmp_path: Path) -> None:
    result = run("ask", photo, "Hello?", "--model", tmp_path)
    assert result.code == 1
    assert str(tmp_path) in one_line(result.err)


@pytest.mark.parametrize("arguments", [["ask"], ["flops", "--no-such-option"], ["dance"], ["samples"]])
def test_usage_errors_are_code_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert "Usage" in result.err


# ---- flops, methods, samples, demo ----------------------------------------------------------------------------


def test_flops_prints_the_published_saving(run: Run) -> None:
    result = run("flops", "--model", "llava-1.5-7b", "--keep", 64, "--text", 512)
    assert result.code == 0
    total = next(line for line in result.out.splitlines() if line.startswith("total")).split()
    assert total[1:] == ["15.4", "8.2"]
    assert "-46.8%" in result.out


def test_flops_json(run: Run) -> None:
    document = json.loads(run("flops", "--json", "--method", "topk", "--option", "where=layers").out)
    assert list(document) == [
        "model",
        "method",
        "keep",
        "equivalent",
        "text_tokens",
        "batch",
        "images",
        "image_size",
        "full",
        "pruned",
        "saving",
        "notes",
    ]
    assert list(document["full"]) == ["vision", "projector", "llm", "head", "pruning", "total"]
    assert round(document["pruned"]["total"] / 1e12, 1) == 8.0
    assert document["saving"] == pytest.approx(1 - document["pruned"]["total"] / document["full"]["total"])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("text_tokens=3", "--option text_tokens=3 sets what the command has a flag for; use --text 3"),
        ("method=top k", "--option 'method=top k' sets what the command has a flag for; use --method 'top k'"),
        ("instruction_tokens=4", "--option instruction_tokens=4: instruction_tokens is no option"),
    ],
)
def test_flops_refuses_its_own_flags_as_options(run: Run, option: str, words: str) -> None:
    result = run("flops", "--option", option)
    assert result.code == 2
    assert words in one_line(result.err)


def test_flops_takes_lists_and_shares(run: Run) -> None:
    two = json.loads(run("flops", "--json", "--option", "schedule=133,64").out)
    assert two["keep"] == 64
    assert json.loads(run("flops", "--json", "--keep", "11%").out)["keep"] == 63
    assert run("flops", "--model", "no-such-model").code == 1


def test_flops_takes_the_size_of_an_image(run: Run, tmp_path: Path) -> None:
    host_class("llava_next").tiny()[0].config.save_pretrained(tmp_path)
    asked = ("flops", "--model", tmp_path, "--method", "topk", "--keep", 4)
    wide = json.loads(run(*asked, "--json", "--image-size", "64x32").out)
    assert wide["image_size"] == [64, 32]
    assert wide["full"]["total"] > json.loads(run(*asked, "--json").out)["full"]["total"]
    assert "one tile" in run(*asked).out
    assert "every size as 576 patches" in run("flops", "--image-size", "640x480").out
    for text in ("640", "0x4", "64x", "axb", "(640, 480)"):
        refused = run(*asked, "--image-size", text)
        assert refused.code == 2
        assert "for example 640x480" in one_line(refused.err)


def test_images_of_a_prompt_may_share_a_budget(run: Run) -> None:
    asked = ("flops", "--images", 3, "--option", "budget=prompt")
    assert run(*asked).code == 0
    refused = run(*asked, "--method", "topk")
    assert refused.code == 2
    assert "does not read --option budget=prompt" in one_line(refused.err)


def test_methods_lists_every_method(run: Run) -> None:
    rows = json.loads(run("methods", "--json").out)
    assert [row["name"] for row in rows] == ivtp.list_methods()
    assert set(rows[0]) == {"name", "title", "year", "stage", "guided", "trainable", "merges", "paper", "note"}
    table = run("methods").out
    assert all(row["name"] in table and row["title"] in table for row in rows)


@pytest.fixture
def trained(tmp_path: Path, tiny: Tiny) -> Path:
    """A file of DynamicViT's predictors for the tiny model."""
    file = tmp_path / "predictors.safetensors"
    save_file(Predictors(VISION_WIDTH, 3, seed=1).state_dict(), file)
    return file


@pytest.mark.parametrize("method", ["dynamicvit", "dynamicvit+fastv"])
def test_an_answer_from_random_predictors_says_so(run: Run, photo: Path, checkpoint: Path, method: str) -> None:
    plain = ask(run, photo, checkpoint, "--method", method)
    assert plain.code == 0
    assert "untrained" in plain.err
    assert "untrained" not in plain.out
    (note,) = json.loads(ask(run, photo, checkpoint, "--method", method, "--json").out)["notes"]
    assert note.startswith("untrained")


def test_an_answer_from_trained_predictors_has_no_note(run: Run, photo: Path, checkpoint: Path, trained: Path) -> None:
    asked = ("--method", "dynamicvit", "--option", f"predictors={trained}")
    assert "untrained" not in ask(run, photo, checkpoint, *asked).err
    assert json.loads(ask(run, photo, checkpoint, *asked, "--json").out)["notes"] == []
    assert "untrained" not in run("flops", "--model", checkpoint, "--keep", 8, *asked).out


def test_methods_and_costs_say_what_is_untrained(run: Run) -> None:
    notes = {row["name"]: row["note"] for row in json.loads(run("methods", "--json").out)}
    assert [name for name, note in notes.items() if "untrained" in note] == ["dynamicvit"]
    assert notes["dynamicvit"] in " ".join(run("methods").out.split())
    assert "untrained" in run("flops", "--method", "dynamicvit").out
    assert "untrained" not in run("flops").out
    (note,) = json.loads(run("flops", "--method", "dynamicvit", "--json").out)["notes"]
    assert "untrained" in note


def test_papers_stay_whole_in_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    papers = {row["paper"] for row in json.loads(run("methods", "--json").out)}
    monkeypatch.setattr(cli.out, "width", 80)
    table = run("methods").out
    assert all(paper in table for paper in papers)
    assert all(len(line) <= 80 for line in table.splitlines())


def test_samples_are_written_with_questions(run: Run, tmp_path: Path) -> None:
    result = run("samples", tmp_path / "new", "--count", 2, "--seed", 5)
    assert result.code == 0
    files = result.out.split()
    assert [Path(f).suffix for f in files] == [".png", ".png", ".json"]
    assert all(Path(f).is_file() for f in files)
    entries = json.loads(Path(files[-1]).read_text())
    assert all(entry["questions"][0]["text"] and entry["questions"][0]["answer"] for entry in entries)


def test_demo_compares_two_questions(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivtp.generate.MICRO", checkpoint)
    result = run("demo", "--output", tmp_path / "shown", "--keep", 8)
    assert result.code == 0, result.err
    assert "chosen to show the difference" in result.out
    asked = [line for line in result.out.splitlines() if "right answer" in line]
    assert len(asked) == len(set(asked)) == 2
    for title in ("all tokens ", "TopK ", "IVTP ", "IVTP+ "):
        assert sum(line.startswith(title) for line in result.out.splitlines()) == 2
    assert f"8 of {NUM_PATCHES}" in result.out
    with Image.open(tmp_path / "shown" / "demo.png") as drawn:
        assert drawn.width > 1000
        assert drawn.height > 1000


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.strip() == f"ivtp {ivtp.__version__}"
    assert "ask" in run("--help").out


def test_help_does_not_wait_for_torch() -> None:
    began = time.perf_counter()
    code = "import sys; sys.argv = ['ivtp', '--help']\nfrom ivtp.cli.app import app\napp(standalone_mode=False)\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.perf_counter() - began < 20  # a second on a quiet machine; the imports above would be several
