"""The twelve formats of the micro world as lmms-eval tasks: the real benchmarks' columns and metrics, its own photos.

Each task includes the real one's yaml, so that answers are scored by the benchmark's own code. Prompts are those that
the embedded model was trained with. Where a language model is the judge, a rule of `evaluation.metrics` takes its
place: MMBench's circular protocol with its own reading of answers, MM-Vet's parts, LLaVA-Bench's phrases.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lmms_eval.tasks
from filelock import FileLock
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

from ivtp.errors import ConfigError
from ivtp.evaluation import metrics
from ivtp.evaluation.answers import cache_folder
from ivtp.evaluation.benchmarks import Column
from ivtp.micro.formats import format_class, list_formats
from ivtp.micro.formats.base import LETTERS, Example
from ivtp.micro.world.crowds import CROWDS, crowd_of

ITEMS = 250
"""Of each task, MME's in pairs, MMBench's each in every turn of its options."""
PATIENCE = 100
"""Photos that are looked at for one of a certain number of objects."""
CHECKSUMS = Path(__file__).with_name("micro12.json")
Doc = dict[str, Any]
Report = Callable[[Sequence[str]], Iterator[str]]


@dataclass(frozen=True)
class Task:
    """One of the twelve."""

    column: Column
    real: str
    """The real task's file in lmms-eval."""
    rows: Callable[[int, Sequence[Example]], list[Doc]]
    """The rows of a unit of examples that belong together, and its number, in the real data set's columns."""
    own: str = ""
    """Further lines of the task's file: what is not the real task's."""


def _vqa(number: int, unit: Sequence[Example]) -> list[Doc]:
    return [{"question_id": str(number), "question": e.prompt, "answers": list(e.references)} for e in unit]


def _vqav2(number: int, unit: Sequence[Example]) -> list[Doc]:
    answers = [
        {"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(unit[0].references)
    ]
    return [{"question_id": number, "question": e.prompt, "answers": answers, "answer": e.answer} for e in unit]


def _plain(number: int, unit: Sequence[Example]) -> list[Doc]:
    return [{"question_id": str(number), "question": e.prompt, "answer": e.answer, "category": e.group} for e in unit]


def _scienceqa(number: int, unit: Sequence[Example]) -> list[Doc]:
    return [
        {"question": e.prompt, "hint": "", "choices": options(e.prompt), "answer": LETTERS.index(e.answer)}
        for e in unit
    ]


def _seed(number: int, unit: Sequence[Example]) -> list[Doc]:
    found = []
    for e in unit:
        choices = [*options(e.prompt), "", "", "", ""]
        named = {f"choice_{letter.lower()}": choices[i] for i, letter in enumerate(LETTERS)}
        found.append(
            {"question_id": str(number), "question": e.prompt, **named, "answer": e.answer, "data_type": "image"}
        )
    return found


def _mmbench(number: int, unit: Sequence[Example]) -> list[Doc]:
    """The question with its options in every turn."""
    (example,) = unit
    given, right = options(example.prompt), LETTERS.index(example.answer)
    found = []
    for turn in range(len(given)):
        turned = given[turn:] + given[:turn]
        found.append(
            {
                "index": number + turn * 1_000_000,
                "prompt": with_options(example.prompt, turned),
                "answer": LETTERS[(right - turn) % len(given)],
                **dict(zip(LETTERS, turned, strict=False)),
            }
        )
    return found


def options(prompt: str) -> list[str]:
    """The lettered options of a prompt, in order."""
    return [line[3:] for line in prompt.splitlines() if _is_option(line)]


def with_options(prompt: str, turned: Sequence[str]) -> str:
    """The prompt with other texts behind its letters."""
    texts = iter(turned)
    lines = prompt.splitlines()
    return "\n".join(f"{line[0]}. {next(texts)}" if _is_option(line) else line for line in lines)


def _is_option(line: str) -> bool:
    return line[1:3] == ". " and line[0] in LETTERS


_CIRCULAR = """process_results: !function micro12.choose
metric_list:
- metric: circular
  aggregation: !function micro12.circular
  higher_is_better: true
"""
_RULE = """process_results: !function micro12.{0}
metric_list:
- metric: {0}
  aggregation: mean
  higher_is_better: true
"""
_NO_SUBMISSION = """metric_list:
- metric: exact_match
  aggregation: mean
  higher_is_better: true
"""
"""The real TextVQA also writes a file for its server."""


def _column(title: str, metric: str, to_percent: float = 100.0) -> Column:
    name = title.lower().replace("-", "_")
    return Column(title, f"micro_{name}", metric, to_percent)


TASKS = {
    "vqav2": Task(_column("VQAv2", "exact_match"), "vqav2/vqav2_val.yaml", _vqav2),
    "gqa": Task(_column("GQA", "exact_match"), "gqa/gqa.yaml", _plain, "process_docs: !function micro12.as_they_are\n"),
    "vizwiz": Task(_column("VizWiz", "exact_match"), "vizwiz_vqa/vizwiz_vqa_val.yaml", _vqa),
    "scienceqa": Task(_column("ScienceQA", "exact_match"), "scienceqa/scienceqa_img.yaml", _scienceqa),
    "textvqa": Task(_column("TextVQA", "exact_match"), "textvqa/textvqa_val.yaml", _vqa, _NO_SUBMISSION),
    "pope": Task(_column("POPE", "pope_f1_score"), "pope/pope.yaml", _plain),
    # five of its tasks, 200 points each
    "mme": Task(_column("MME", "mme_perception_score", 1 / 10), "mme/mme.yaml", _plain),
    "mmbench": Task(_column("MMBench", "circular"), "mmbench/mmbench_en_dev.yaml", _mmbench, _CIRCULAR),
    "mmbench_cn": Task(_column("MMBench-CN", "circular"), "mmbench/mmbench_cn_dev.yaml", _mmbench, _CIRCULAR),
    "seed": Task(_column("SEED", "seed_all"), "seedbench/seedbench.yaml", _seed),
    "llava_bench": Task(
        _column("LLaVA-Bench", "description_f1"),
        "llava-in-the-wild/llava-in-the-wild.yaml",
        _plain,
        _RULE.format("description_f1"),
    ),
    "mmvet": Task(_column("MM-Vet", "partial_credit"), "mmvet/mmvet.yaml", _plain, _RULE.format("partial_credit")),
}
"""By the names of the formats, in the paper's order."""
MICRO12 = tuple(task.column for task in TASKS.values())


# ---- what the tasks' files name ---------------------------------------------------------------------------------


def prompt(doc: Doc, lmms_eval_specific_kwargs: Any = None) -> str:
    """The prompt as the embedded model knows it."""
    return str(doc["prompt"])


def as_they_are(dataset: Any) -> Any:
    """GQA's pictures lie in a data set of their own; here each row has its own."""
    return dataset


def choose(doc: Doc, results: Sequence[str]) -> Doc:
    """Whether one turn of an MMBench question was answered right, by the benchmark's own reading of answers."""
    choices = {letter: doc[letter] for letter in LETTERS if doc.get(letter)}
    answer = results[0].strip()
    if answer.upper() in choices:  # the embedded model writes in lower case
        answer = answer.upper()
    chosen = MMBench_Evaluator().can_infer(answer, choices)
    return {"circular": (doc["index"] % 1_000_000, chosen == doc["answer"])}


def circular(results: Sequence[tuple[int, bool]]) -> float:
    """MMBench's figure."""
    return metrics.circular(results)


def partial_credit(doc: Doc, results: Sequence[str]) -> Doc:
    """MM-Vet's, by a rule."""
    return {"partial_credit": metrics.partial_credit(results[0], doc["answer"])}


def description_f1(doc: Doc, results: Sequence[str]) -> Doc:
    """LLaVA-Bench's, by a rule."""
    return {"description_f1": metrics.description_f1(results[0], doc["answer"])}


# ---- data sets --------------------------------------------------------------------------------------------------


def units(name: str, count: int = ITEMS) -> Iterator[list[Example]]:
    """The first `count` units of a format about test photos; the same at every call.

    Simple, middling and crowded photos (CROWDS) take turns, except where a format hardly asks about such ones
    (LLaVA-Bench's captions of many objects): where none of PATIENCE photos helps, another one takes the turn.
    """
    form = format_class(name)()
    waiting: list[deque[list[Example]]] = [deque() for _ in CROWDS]
    index, first = 0, list_formats().index(name)  # formats begin with different crowds: a limit leaves no one behind
    for number in range(count):
        turn, began = waiting[(number + first) % len(CROWDS)], index
        while not turn and (index < began + PATIENCE or not any(waiting)):
            if index >= began + 50 * PATIENCE:
                raise ConfigError(f"the test split offers too few clear questions for {name}")
            photo = form.photo("test", index)
            examples = form.examples(photo, random.Random(f"micro12/{name}/{index}"))
            index += 1
            if examples:
                waiting[crowd_of(photo)].append(examples)
        yield (turn or max(waiting, key=len)).popleft()


def docs(name: str, count: int = ITEMS) -> Iterator[list[Doc]]:
    """A task's rows, those of each unit together, each with its picture, its photo's objects, and its prompt."""
    for number, unit in enumerate(units(name, count)):
        made = TASKS[name].rows(number, unit)
        examples = [unit[min(place, len(unit) - 1)] for place in range(len(made))]
        pictures = [example.photo.picture() for example in examples]
        yield [
            {
                "prompt": example.prompt,
                **row,
                "objects": len(example.photo.scene.objects),
                "image": [picture] if name == "seed" else picture,
            }
            for row, example, picture in zip(made, examples, pictures, strict=True)
        ]


def digests(made: Iterable[Sequence[Doc]]) -> Iterator[str]:
    """Of the rows of all units up to each, by their texts and their pictures' pixels."""
    found = hashlib.sha256()
    for unit in made:
        for row in unit:
            texts = {key: value for key, value in row.items() if key != "image"}
            found.update(json.dumps(texts, sort_keys=True, ensure_ascii=False).encode())
            for picture in row["image"] if isinstance(row["image"], list) else [row["image"]]:
                found.update(picture.tobytes())
        yield found.hexdigest()[:8]


def prepare(folder: Path | None = None, count: int = ITEMS, report: Report = iter) -> Path:
    """The folder with all data sets and tasks, made where it is not there; by default in the user's cache.

    `count` units of each; fewer are the first ones of more. Raises `ConfigError` where the pictures or texts are not
    those of the committed checksums.
    """
    expected = json.loads(CHECKSUMS.read_text(encoding="utf-8"))
    if folder is None:
        known = hashlib.sha256(CHECKSUMS.read_bytes()).hexdigest()[:8]
        folder = cache_folder() / f"micro12-{known}-{count}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):  # several processes begin at once
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
            partial.mkdir()
            try:
                for name in report(list_formats()):
                    made = list(docs(name, count))
                    *_, digest = digests(made)
                    if digest != expected[name][count - 1]:
                        raise ConfigError(
                            f"the questions of {name} are not those that figures were published of (another Pillow "
                            "or NumPy?); install with -c constraints.txt"
                        )
                    _write(partial, name, [row for unit in made for row in unit])
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        _write_tasks(folder)
    return folder


def _write(folder: Path, name: str, made: list[Doc]) -> None:
    table = datasets.Dataset.from_list(made)
    image = datasets.List(datasets.Image()) if name == "seed" else datasets.Image()
    table.cast_column("image", image).to_parquet(folder / f"{name}.parquet")


def _write_tasks(folder: Path) -> None:
    """Files that lmms-eval reads; they name the place of its own, which differs between environments."""
    real = Path(lmms_eval.tasks.__file__).parent
    (folder / "micro12.py").write_text("from ivtp.evaluation.micro12 import *\n", encoding="utf-8")
    for name, task in TASKS.items():
        text = (
            f"include: {real / task.real}\ntask: {task.column.task}\ndataset_path: parquet\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n    test: {folder / name}.parquet\ntest_split: test\n"
            "doc_to_text: !function micro12.prompt\n"
            "generation_kwargs:\n  max_new_tokens: 64\n  do_sample: false\n" + task.own
        )
        (folder / f"{task.column.task}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":  # after a change of the world or its formats that is meant
    checksums = {name: list(digests(docs(name))) for name in list_formats()}
    CHECKSUMS.write_text(json.dumps(checksums) + "\n", encoding="utf-8")
