"""Several questions, images and methods in one command; where an image comes from; what a terminal sees."""

from __future__ import annotations

import base64
import inspect
import io
import itertools
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from terminal import Run
from tiny import NUM_PATCHES, QUESTIONS

import ivtp
from ivtp.cli import arguments
from ivtp.cost.flops import flops
from ivtp.registry import host_class


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Put `data` on the standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# ---- starting -------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    """Half a second on a quiet machine, instead of the four that the imports take."""
    (tmp_path / "text.png").write_text("no image")
    for words in (
        ["missing.png", "what?"],
        [str(tmp_path / "text.png"), "what?"],
        [str(tmp_path), "what?"],
        ["missing.png", "what?", "--keep", "0"],
        ["missing.png", " "],
        ["missing.png"],
        ["missing.png", "what?", "--method", "IVTP", "--image", "gone.png"],
    ):
        code = (
            f"import sys; sys.argv = ['ivtp', 'ask', *{words!r}]\n"
            "from ivtp.cli.app import main\n"
            "try:\n    main()\n"
            "except SystemExit as end:\n    assert end.code == 2, end.code\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("error: ")


# ---- questions and images -------------------------------------------------------------------------------------


def test_several_questions_are_several_lines(run: Run, few: tuple[object, ...], photo: Path) -> None:
    result = run("ask", photo, *QUESTIONS[:2], *few)
    alone = [run("ask", photo, question, *few).out for question in QUESTIONS[:2]]
    assert result.code == 0
    assert result.out == "".join(alone)
    assert all(question in result.err for question in QUESTIONS[:2])
    documents = json.loads(run("ask", photo, *QUESTIONS[:2], *few, "--json").out)
    assert [document["question"] for document in documents] == list(QUESTIONS[:2])
    assert [document["answer"] + "\n" for document in documents] == alone


def test_several_images_are_one_prompt(run: Run, few: tuple[object, ...], photo: Path) -> None:
    result = run("ask", photo, "Cat?", "--image", photo, *few, "--json")
    document = json.loads(result.out)
    assert document["tokens"]["all"] == 2 * NUM_PATCHES
    assert document["tokens"]["kept"] == 16
    assert document["image"] == [str(photo)] * 2
    assert document["flops"]["pruned"] < document["flops"]["full"]


def test_json_has_a_line_for_each_stage(run: Run, few: tuple[object, ...], photo: Path) -> None:
    text = run("ask", photo, "Cat?", *few, "--json").out
    document = json.loads(text)
    assert len(text.splitlines()) < 25 + len(document["stages"]) + len(document["words"])


def test_an_image_from_the_standard_input_and_from_a_data_url(
    run: Run, few: tuple[object, ...], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run("ask", photo, "Cat?", *few).out
    feed(monkeypatch, photo.read_bytes())
    assert run("ask", "-", "Cat?", *few).out == expected
    address = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
    assert run("ask", address, "Cat?", *few).out == expected
    assert len(json.loads(run("ask", address, "Cat?", *few, "--json").out)["image"]) < 60
    result = run("ask", "-", "Cat?", "-i", "-", *few)
    assert result.code == 2
    assert "standard input" in result.err


def test_quiet_leaves_the_answer_alone(run: Run, few: tuple[object, ...], photo: Path) -> None:
    loud, quiet = run("ask", photo, "Cat?", *few), run("ask", photo, "Cat?", *few, "--quiet")
    assert quiet.out == loud.out
    assert loud.err
    assert not quiet.err


def test_dtype_device_and_clip_are_passed_on(run: Run, few: tuple[object, ...], photo: Path, checkpoint: Path) -> None:
    assert run("ask", photo, "Cat?", *few, "--dtype", "bfloat16", "--clip", checkpoint / "clip").code == 0
    wrong = run("ask", photo, "Cat?", *few, "--device", "warp")
    assert wrong.code == 1
    assert "--device warp" in wrong.err or "device 'warp'" in wrong.err
    missing = run("ask", photo, "Cat?", *few, "--clip", checkpoint / "nothing")
    assert missing.code == 1
    assert "CLIP text side" in missing.err


# ---- methods side by side -------------------------------------------------------------------------------------


def test_methods_side_by_side(run: Run, few: tuple[object, ...], photo: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    result = run("ask", photo, "Cat?", *few, "--compare", "none,TopK,ivtp", "--picture", file)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["all tokens", "topk", "ivtp"]
    assert f"8 of {NUM_PATCHES}" in lines[2]
    with Image.open(file) as drawn:
        assert drawn.width > 3 * 432
    documents = json.loads(run("ask", photo, "Cat?", *few, "--compare", "topk,ivtp", "--json").out)
    assert [document["method"] for document in documents] == ["topk", "ivtp"]


@pytest.mark.parametrize("text", ["topk", "topk,TopK", ","])
def test_what_is_no_comparison(run: Run, photo: Path, text: str) -> None:
    result = run("ask", photo, "Cat?", "--compare", text)
    assert result.code == 2
    assert "--compare" in result.err


# ---- words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--keep", "999"], f"--keep 999 exceeds the {NUM_PATCHES} visual tokens"),
        (["--keep", "64.5"], "--keep 64.5 is no number of tokens or a share"),
        (["--keep", "1_0"], "--keep 1_0 is no number"),
        (["--keep", "１２"], "is no number"),
        (["--threshold", "7"], "--threshold 7.0 is not a cosine"),
        (["--option", "guide=nobody"], "--option guide=nobody is unknown"),
        (["--option", "schedule=9,12"], "--option schedule=9,12 grows"),
        (["--option", "schedule=[300,64]"], "--option schedule=300,64"),
        (["--option", "schedule=[0]"], "--option schedule=0"),
        (["--option", "schedule=64"], "use one such as 133,64"),
        (["--method", "none", "--option", "foo=1"], "method 'none' has no option 'foo'"),
        (["--method", "IVPT"], "did you mean ivtp"),
    ],
)
def test_errors_name_flags(run: Run, few: tuple[object, ...], photo: Path, words: list[str], said: str) -> None:
    result = run("ask", photo, "Cat?", *few, *words)
    assert result.code == 2
    assert said in result.err
    assert len(result.err.splitlines()) == 1


def test_a_model_without_a_clip_side_names_the_flag() -> None:
    context: Any = SimpleNamespace(
        command=SimpleNamespace(params=[SimpleNamespace(name="clip", opts=["--clip"], param_type_name="option")]),
        params={},
    )
    said = 'no CLIP text side is known; pass clip=(CLIPModel, tokenizer), a folder or a hub id, or use guide="text"'
    assert arguments.in_flags(said, context).endswith(
        "pass --clip with a folder or a hub id, or use --option guide=text"
    )


def test_a_count_that_holds_no_images_names_the_flags(run: Run) -> None:
    assert "--text 0 " in run("flops", "--text", 0).err
    many = run("flops", "--images", 600).err
    assert "--text 512" in many
    assert "600" in many


def test_what_python_takes_for_itself_is_no_option() -> None:
    taken = {
        name
        for function in (ivtp.ask, ivtp.attach, flops)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    assert taken <= arguments.RESERVED


def test_a_method_describes_its_options(run: Run) -> None:
    text = " ".join(run("methods", "FastV").out.split())
    assert "the number of decoder layers that see all tokens" in text
    assert "--option layer=... (default 2)" in text
    assert "--option budget=..." in text
    assert "--option guide" not in text
    for name in [*ivtp.list_methods(), "divprune+fastv"]:
        document = json.loads(run("methods", name, "--json").out)
        assert document["name"] == name
        assert all(option["own"] or option["text"] for option in document["options"])
    result = run("methods", "fastw")
    assert result.code == 2
    assert "did you mean fastv" in result.err


def test_short_help(run: Run) -> None:
    assert "QUESTION" in run("ask", "-h").out
    assert "--install-completion" in run("-h").out


@pytest.mark.parametrize("command", ["ask", "flops"])
def test_help_fills_its_lines_and_gives_flags_no_type(run: Run, command: str) -> None:
    lines = [line.strip() for line in run(command, "-h").out.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("JSON keys"))
    paragraph = lines[first : lines.index("", first)]
    for line, following in itertools.pairwise(paragraph):
        assert len(f"{line} {following.split()[0]}") > 150
    (flag,) = [line for line in lines if "--json" in line]
    assert "bool" not in flag.lower()


@pytest.mark.parametrize("how", [("--method", "none"), ("--method", "topk"), ("--compare", "none,topk")], ids=str)
def test_a_picture_of_a_wide_image_that_is_read_in_tiles_shows_its_ends(
    run: Run, tmp_path: Path, how: tuple[str, ...]
) -> None:
    model, processor = host_class("llava_next").tiny()
    ivtp.save(model, processor, tmp_path / "model")
    drawn = []
    for colour in ("red", "blue"):
        wide = Image.new("RGB", (120, 60), "white")
        wide.paste(colour, (0, 0, 20, 60))
        wide.save(tmp_path / "wide.png")
        few = ("--model", tmp_path / "model", "--keep", 8, "--max-new-tokens", 1, *how)
        file = tmp_path / f"{colour}.png"
        result = run("ask", tmp_path / "wide.png", "Is it?", *few, "--picture", file)
        assert result.code == 0, result.err
        with Image.open(file) as page:
            drawn.append(page.convert("RGB").crop((24, 60, 24 + 60, 24 + 250)).tobytes())
    assert drawn[0] != drawn[1]


# ---- a dialogue, a terminal, an interruption ------------------------------------------------------------------


def test_a_chat_answers_line_by_line(
    run: Run, few: tuple[object, ...], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [run("ask", photo, question, *few).out for question in QUESTIONS[:2]]
    feed(monkeypatch, f"{QUESTIONS[0]}\n\n<image>?\n{QUESTIONS[1]}".encode())
    result = run("chat", photo, *few)
    assert result.code == 0, result.err
    assert result.out == "".join(alone)
    (error,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert "'<image>'" in error
    assert run("chat", "-", *few).code == 2


def test_a_terminal_sees_the_same_answer_as_a_file(
    run: Run, few: tuple[object, ...], photo: Path, tmp_path: Path
) -> None:
    expected = run("ask", photo, QUESTIONS[0], *few).out
    main, side = pty.openpty()
    command = [sys.executable, "-m", "ivtp", "ask", photo, QUESTIONS[0], *few]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen([*map(str, command)], stdout=side, stderr=err, env={**os.environ, "TERM": "dumb"})
        os.close(side)
        seen = b""
        while True:
            try:
                part = os.read(main, 1000)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            seen += part
        os.close(main)
    assert process.wait() == 0, (tmp_path / "err").read_text()
    assert seen.decode().replace("\r\n", "\n").strip() == expected.strip()


def test_ctrl_c_is_one_line(photo: Path) -> None:
    """While the chat waits for a question."""
    # a shell that runs the tests in the background hands an ignored signal down
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom ivtp.cli.app import main; main()"
    )
    command = [sys.executable, "-c", code, "chat", str(photo)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("what is it?\n")
    process.stdin.flush()
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in err
