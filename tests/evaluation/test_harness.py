"""lmms-eval's own tasks, on small files in the format of the hub's, with tiny models of every family."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("lmms_eval", reason="`make eval-env` installs it")

from family import is_stock
from hub_files import ROWS, write
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager

import ivtp
from ivtp.cli.app import app
from ivtp.config import PruneConfig
from ivtp.errors import ConfigError, InputError
from ivtp.evaluation import lmms
from ivtp.evaluation.asked import Asked
from ivtp.evaluation.benchmarks import PAPER12
from ivtp.evaluation.lmms import IvtpModel, IvtpSimpleModel, Prompt
from ivtp.generate import save
from ivtp.hosts.tiny import tiny_images
from ivtp.registry import host_class, method_class

pytestmark = [  # of lmms-eval's files, and of whatever else it leaves open
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

KEEP = 8
OPTIONS = {"keep": KEEP, "guide": "text", "llm_layers": 6}
ONE_TOKEN = {"max_new_tokens": 1, "do_sample": False}
PICK = """
task: pick
dataset_path: lmms-lab-encoder/SEED-Bench
test_split: test
output_type: multiple_choice
doc_to_visual: !function pick.visual
doc_to_text: "{{question}} Answer:"
doc_to_choice: !function pick.choices
doc_to_target: !function pick.target
metric_list:
  - metric: acc
"""
PICK_UTILS = """
def visual(doc):
    return [image.convert("RGB") for image in doc["image"]]

def choices(doc):
    return [doc[f"choice_{letter}"] for letter in "abcd"]

def target(doc):
    return "ABCD".index(doc["answer"])
"""


@pytest.fixture(scope="module", params=ivtp.list_hosts())
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of a family in a folder."""
    model, processor = host_class(str(request.param)).tiny()
    if not is_stock(processor):
        pytest.skip("its processor needs torchvision")
    folder = tmp_path_factory.mktemp(str(request.param))
    save(model, processor, folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run works in: with the twelve data sets, and a task that rates given answers."""
    folder = tmp_path_factory.mktemp("data")
    write(folder)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "pick.yaml").write_text(PICK, encoding="utf-8")
    (folder / "tasks" / "pick.py").write_text(PICK_UTILS, encoding="utf-8")
    return folder


@pytest.fixture
def at(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Works in `data`, with an empty cache; where a task names no limit, answers are short: tiny models never end."""
    monkeypatch.chdir(data)
    monkeypatch.setattr(lmms, "LONGEST_ANSWER", 8)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for key in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    return data


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A web service on this machine that gives every answer the same mark."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # http.server's name
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            said = "0.5" if "Correctness" in asked else "8 6" if "System]" in asked else "A"
            answer = {"model": "judge", "choices": [{"message": {"content": said}}], "usage": {}}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_API_URL", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def samples(checkpoint: str, tasks: list[str], batch_size: int, **options: Any) -> list[dict[str, Any]]:
    model = IvtpModel(checkpoint, batch_size=batch_size, device="cpu", **options)
    found = simple_evaluate(model, tasks=tasks, bootstrap_iters=0)
    return [sample for task in tasks for sample in sorted(found["samples"][task], key=lambda s: s["doc_id"])]


def test_lmms_eval_finds_the_model_by_its_name() -> None:
    assert MODEL_REGISTRY_V2.get_model_class("ivtp") is IvtpModel
    assert MODEL_REGISTRY_V2.get_model_class("ivtp", force_simple=True) is IvtpSimpleModel


@pytest.mark.parametrize("options", [{"method": "none"}, OPTIONS], ids=["none", "ivtp"])
def test_batches_answer_as_one_by_one(at: Path, checkpoint: str, options: dict[str, Any]) -> None:
    """Answers and costs; prompts have one picture, none, or several of several sizes."""
    tasks = ["gqa", "seedbench"]
    alone, together = (samples(checkpoint, tasks, size, **options) for size in (1, 3))
    for one, other in zip(alone, together, strict=True):
        assert one["resps"] == other["resps"]
        (mine,), (theirs,) = one["token_counts"], other["token_counts"]
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
        assert mine["seconds"] > 0


def test_the_log_says_what_each_sample_kept_and_cost(at: Path, checkpoint: str) -> None:
    full = samples(checkpoint, ["seedbench"], 2, method="none")
    pruned = samples(checkpoint, ["seedbench"], 2, method="random", keep=KEEP)  # tiny models pay dearly for choosing
    for whole, left in zip(full, pruned, strict=True):
        images = 1 + whole["doc_id"] % 2 * 2
        (before,), (after,) = whole["token_counts"], left["token_counts"]
        assert after["visual_tokens"] == images * KEEP < before["visual_tokens"]
        assert 0 < after["tflops"] < before["tflops"]
        assert before["input_tokens"] == after["input_tokens"] > before["visual_tokens"]


@pytest.mark.parametrize("name", ivtp.list_hosts())
def test_images_of_a_batch_are_those_of_their_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family may read one of several in another way than the only one."""
    monkeypatch.setattr(lmms, "load", lambda *_, **__: host_class(name).tiny())
    model = IvtpModel(device="cpu", method="none")
    asked = [("Is it a cat?", [(60, 30)] * 2), ("Say something.", []), ("What is left?", [(60, 30)])]
    prompts = [
        Prompt(ivtp.prompt_for(model.processor, text, images=len(sizes)), (*tiny_images(text, sizes),), ONE_TOKEN, ())
        for text, sizes in asked
    ]
    inputs = type(model.host).tiny_inputs(model.model, model.processor, asked)
    visuals = iter(model.host.visuals(inputs))
    columns = inputs["attention_mask"].sum(dim=1).tolist()
    for found, (_, sizes), tokens in zip(model.answer(prompts), asked, columns, strict=True):
        assert found.token_counts.input_tokens == tokens
        assert found.token_counts.visual_tokens == sum(next(visuals).patches for _ in sizes)


def test_an_error_ends_the_run(at: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = IvtpModel(checkpoint, device="cpu", **OPTIONS)
    monkeypatch.setattr(model.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        simple_evaluate(model, tasks=["pope"], bootstrap_iters=0)


def test_given_answers_are_rated(at: Path, checkpoint: str) -> None:
    """The lowest loss is the one that the model itself computes of the answer behind the prompt."""
    model = IvtpSimpleModel(checkpoint, device="cpu", **OPTIONS)
    inner, processor = model.model, model.processor
    tasks = TaskManager(include_path=str(at / "tasks"))
    if model.host.writes_prompts:
        with pytest.raises(ConfigError, match="nothing can be rated behind it"):
            simple_evaluate(model, tasks=["pick"], bootstrap_iters=0, task_manager=tasks)
        return
    found = simple_evaluate(model, tasks=["pick"], bootstrap_iters=0, task_manager=tasks)
    sample = found["samples"]["pick"][0]
    rated = [float(response[0][0]) for response in sample["resps"]]
    assert len(rated) == 4
    assert len(set(rated)) == 4
    with torch.no_grad(), ivtp.attach(inner, processor, **OPTIONS):
        for choice, loss in enumerate(rated):
            turn = [{"type": "image"}, {"type": "text", "text": f"{sample['doc']['question']} Answer:"}]
            head = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
            images = [picture.convert("RGB") for picture in _images(at, 0)]
            made, prompt = (processor(images=images, text=t, return_tensors="pt") for t in (f"{head} {choice}", head))
            labels = made["input_ids"].clone()
            labels[:, : prompt["input_ids"].shape[1]] = -100
            assert float(inner(**made, labels=labels).loss) == pytest.approx(loss, rel=1e-4)


def _images(folder: Path, row: int) -> Any:
    import datasets

    return datasets.load_dataset(str(folder / "lmms-lab-encoder" / "SEED-Bench"), split="test")[row]["image"]


class _Request:
    """Of a task of several rounds."""

    def __init__(self, rounds: list[str]) -> None:
        def messages_of(
            doc: str, round_idx: int = 0, previous_output: Any = (), previous_round_info: Any = None
        ) -> Any:
            said = " ".join([doc, *previous_output, rounds[round_idx] if round_idx < len(rounds) else ""])
            turn = [{"role": "user", "content": [{"type": "text", "text": said}]}]
            return turn if round_idx == 0 else (turn, round_idx == len(rounds), None, previous_round_info)

        self.args = ("", messages_of, {"max_new_tokens": 4}, 0, "rounds", "test")


def test_rounds_go_on_until_the_task_ends_them(checkpoint: str) -> None:
    model = IvtpModel(checkpoint, device="cpu", **OPTIONS)
    model.task_dict = {"rounds": {"test": ["Is it a cat"]}}
    one, three = model.generate_until_multi_round([_Request(["a"]), _Request(["a", "b", "c"])])
    assert (len(one), len(three)) == (1, 3)
    assert one[0] == three[0]


@pytest.mark.parametrize("part", ["video", "audio"])
def test_what_is_not_read_is_one_line(checkpoint: str, part: str) -> None:
    model = IvtpModel(checkpoint, device="cpu", **OPTIONS)
    with pytest.raises(InputError, match=f"hands over '{part}'"):
        model._prompt([{"role": "user", "content": [{"type": part, "url": "x"}]}], {})


def test_every_option_reaches_the_method(checkpoint: str, tmp_path: Path) -> None:
    """None of the model's own arguments is called as an option is."""
    common = {field.name for field in dataclasses.fields(PruneConfig)}
    own = {field.name for name in ivtp.list_methods() for field in dataclasses.fields(method_class(name).Options)}
    arguments = set(inspect.signature(IvtpModel.__init__).parameters)
    assert arguments & (common | own) == {"method", "keep", "options"}
    model = IvtpModel(checkpoint, device="cpu", **{**OPTIONS, "cache": "layered", "answers": tmp_path})
    assert model.pruner is not None
    assert model.pruner.config.cache == "layered"


def test_a_bad_batch_size_is_one_line(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match="batch_size='auto'"):
        IvtpModel(checkpoint, batch_size="auto", device="cpu")


def command(*words: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, words)], catch_exceptions=False)


def test_the_papers_row(at: Path, tmp_path: Path, judge: None) -> None:
    """All twelve tasks by their own files; the change against all tokens comes with the second run."""
    common = ("--model", "micro", "--output", tmp_path / "out", "--batch-size", 4)
    ran = command(*common, "--method", "none")
    assert ran.exit_code == 0, ran.output
    told = command(*common)
    assert told.exit_code == 0, told.output
    full, pruned = (
        json.loads(next((tmp_path / "out").glob(f"*-{name}-*.json")).read_text(encoding="utf-8"))
        for name in ("none", "ivtp")
    )
    for document in (full, pruned):
        row = document["row"]
        figures = [row[column.title] for column in PAPER12]
        assert all(0 <= figure <= 100 for figure in figures)
        assert row["mean"] == pytest.approx(sum(figures) / 12)
        assert row["MM-Vet"] == pytest.approx(50)  # what the judge says
        assert row["MME"] == pytest.approx(document["results"]["mme"]["mme_perception_score,none"] / 20)
    assert pruned["row"]["change"] == pytest.approx(pruned["row"]["mean"] - full["row"]["mean"])
    assert pruned["row"]["visual_tokens"] < full["row"]["visual_tokens"]
    lines = next((tmp_path / "out").glob("*-ivtp-*.samples.jsonl")).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12 * ROWS
    assert "change" in told.output


def test_without_a_judge_the_others_are_measured(at: Path, checkpoint: str, tmp_path: Path) -> None:
    tasks = "mmvet,scienceqa_img"
    ran = command("--tasks", tasks, "--model", checkpoint, "--method", "topk", "--keep", KEEP, "--output", tmp_path)
    if "needs a CLS" in ran.output:
        pytest.skip("the family has no CLS token")
    assert ran.exit_code == 0, ran.output
    row = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))["row"]
    assert row["MM-Vet"] is None
    assert row["mean"] == row["ScienceQA"]
    with pytest.raises(InputError, match="mmvet need a judge; set OPENAI_API_KEY"):
        command("--tasks", "mmvet", "--model", checkpoint, "--method", "none", "--output", tmp_path)


def test_an_unknown_task_is_one_line(at: Path, checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown task 'popes'"):
        command("--tasks", "popes", "--model", checkpoint, "--method", "none", "--output", tmp_path)


def test_two_processes_find_what_one_finds(at: Path, tmp_path: Path) -> None:
    """By torchrun, each with half of the questions."""
    checkpoint = tmp_path / "model"
    save(*host_class("llava").tiny(), checkpoint)
    rows = []
    for ranks in (1, 2):
        output = tmp_path / f"out-{ranks}"
        words = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "29517", "-m", "ivtp"]
        asked = ["eval", "--tasks", "mme,gqa", "--model", str(checkpoint), "--method", "ivtp", "--keep", str(KEEP)]
        asked += ["--option", "guide=text", "--output", str(output)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        ran = subprocess.run([sys.executable, *words, *asked], env=env, capture_output=True, text=True, timeout=500)
        assert ran.returncode == 0, ran.stderr[-3000:]
        (file,) = output.glob("*.json")
        rows.append(json.loads(file.read_text(encoding="utf-8"))["row"])
        lines = next(output.glob("*.samples.jsonl")).read_text(encoding="utf-8").splitlines()
        assert len(lines) == 2 * ROWS
    for row in rows:
        del row["seconds"]
    assert rows[0] == rows[1]


def test_runs_of_the_same_are_told_apart_by_what_changes_figures() -> None:
    asked = Asked("m", ("pope",), keep=8)
    assert Asked("m", ("pope",), keep=8, batch_size=9, device="cuda").name == asked.name
    others = [
        Asked("m", ("pope",), keep=9),
        Asked("m", ("pope",), keep=8, limit=3),
        Asked("m", ("mme",), keep=8),
        Asked("m", ("pope",), keep=8, options={"guide": "text"}),
    ]
    assert len({asked.name, *(other.name for other in others)}) == 5
