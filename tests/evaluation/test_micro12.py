"""The micro world's twelve tasks, scored by the real benchmarks' own code in lmms-eval."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="`make eval-env` installs it")

import datasets
from lmms_eval.tasks import TaskManager, get_task_dict

from ivtp.errors import ConfigError
from ivtp.evaluation import micro12
from ivtp.micro.formats import list_formats
from ivtp.micro.world.crowds import crowd_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FEW = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro12.prepare(tmp_path_factory.mktemp("cache") / "micro12", count=FEW)


@pytest.fixture(scope="module")
def tasks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Loaded as a run loads them."""
    manager = TaskManager(include_path=[str(folder)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        return dict(get_task_dict([column.task for column in micro12.MICRO12], manager, "chat"))


def test_every_format_is_a_task() -> None:
    assert set(micro12.TASKS) == set(list_formats()) == set(json.loads(micro12.CHECKSUMS.read_text()))
    assert len({column.title for column in micro12.MICRO12}) == 12


def test_rows_are_the_same_at_every_call_and_as_published() -> None:
    made = list(micro12.docs("gqa", FEW))
    published = json.loads(micro12.CHECKSUMS.read_text(encoding="utf-8"))["gqa"]
    assert list(micro12.digests(made)) == published[:FEW]
    made[3][0]["prompt"] += " "
    assert list(micro12.digests(made))[2:4] != published[2:4]
    assert list(micro12.digests(made))[:3] == published[:3]


@pytest.mark.slow
@pytest.mark.parametrize("name", list_formats())
def test_the_questions_are_those_that_figures_were_published_of(name: str) -> None:
    expected = json.loads(micro12.CHECKSUMS.read_text(encoding="utf-8"))
    assert list(micro12.digests(micro12.docs(name))) == expected[name]


@pytest.mark.parametrize("name", list_formats())
def test_simple_middling_and_crowded_photos_take_turns(name: str) -> None:
    """So that a limit has about as many of each; LLaVA-Bench's captions leave crowded photos out."""
    found = [crowd_of(unit[0].photo) for unit in micro12.units(name, 30)]
    assert found[:30] == found[:3] * 10 if name != "llava_bench" else set(found) == {0, 1}
    assert [unit[0] for unit in micro12.units(name, 7)] == [unit[0] for unit in micro12.units(name, 30)][:7]


def test_other_questions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro12, "with_options", lambda prompt, turned: prompt)
    with pytest.raises(ConfigError, match="not those that figures were published of"):
        micro12.prepare(tmp_path / "micro12", count=FEW)
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".lock"], "nothing half-made is left"


def test_processes_that_begin_at_once_draw_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(micro12.prepare, tmp_path / "micro12", 2) for _ in range(2)]
        assert [job.result() for job in made] == [tmp_path / "micro12"] * 2


def figure(task: Any, answers: list[str]) -> float:
    """What a run would find if the model gave these answers."""
    docs = task.test_docs()
    column = next(c for c in micro12.MICRO12 if c.task == task.config.task)
    found = [task.process_results(doc, [answer])[column.metric] for doc, answer in zip(docs, answers, strict=True)]
    value = column.value({column.task: {f"{column.metric},none": task.aggregation()[column.metric](found)}})
    assert value is not None
    return value


def right(doc: dict[str, Any]) -> str:
    """The answer that a perfect model gives."""
    if "choices" in doc:
        return "ABCD"[doc["answer"]]
    if "answers" in doc and "answer" not in doc:
        return str(max(doc["answers"], key=doc["answers"].count))
    return str(doc["answer"])


@pytest.mark.parametrize("title", [column.title for column in micro12.MICRO12])
def test_perfect_and_silent_models(tasks: dict[str, Any], title: str) -> None:
    """100 and 0 in every benchmark's own figure, MME's two questions and MMBench's turns included."""
    column = next(c for c in micro12.MICRO12 if c.title == title)
    task = tasks[column.task]
    docs = list(task.test_docs())
    assert [micro12.prompt(doc) for doc in docs] == [doc["prompt"] for doc in docs]
    assert all(picture.size == (336, 336) for doc in docs for picture in task.doc_to_visual(doc))
    best = figure(task, [right(doc) for doc in docs])
    scale = len({doc["category"] for doc in docs}) / 5 if title == "MME" else 1.0  # four pairs need not be of all tasks
    assert best == pytest.approx(100 * scale, abs=8)  # annotators of the VQA formats differ
    assert figure(task, ["silence"] * len(docs)) == 0


@pytest.mark.parametrize("name", ["MMBench", "MMBench-CN"])
def test_all_turns_of_a_question_have_to_be_right(tasks: dict[str, Any], name: str) -> None:
    task = tasks[next(c.task for c in micro12.MICRO12 if c.title == name)]
    docs = list(task.test_docs())
    options = {len([letter for letter in "ABCD" if doc[letter]]) for doc in docs}
    assert len(docs) == FEW * 4
    assert options == {4}
    for doc in docs:  # the same option is right in every turn
        first = next(d for d in docs if d["index"] == doc["index"] % 1_000_000)
        assert doc[doc["answer"]] == first[first["answer"]]
        assert f"{doc['answer']}. {doc[doc['answer']]}" in doc["prompt"].splitlines()
    answers = [right(doc) for doc in docs]
    answers[1] = next(letter for letter in "ABCD" if letter != answers[1])
    assert figure(task, answers) == pytest.approx(100 * (FEW - 1) / FEW)
    assert figure(task, [answer.lower() for answer in answers]) == pytest.approx(100 * (FEW - 1) / FEW)


def test_mmes_accuracy_and_accuracy_plus(tasks: dict[str, Any]) -> None:
    """Of one pair with one right answer: 50 of accuracy and none of accuracy+."""
    task = tasks["micro_mme"]
    docs = list(task.test_docs())
    answers = [right(doc) for doc in docs]
    full = figure(task, answers)
    answers[0] = {"yes": "no", "no": "yes"}[answers[0]]
    pairs = sum(doc["category"] == docs[0]["category"] for doc in docs) // 2
    assert full - figure(task, answers) == pytest.approx(150 / pairs / 10)
