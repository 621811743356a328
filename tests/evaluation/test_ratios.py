"""Benchmarks' figures as sums of ratios: the official code's own figures, and what a bootstrap makes of them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lmms_eval", reason="`make eval-env` installs it")

import datasets
from lmms_eval.tasks import TaskManager, get_task_dict

from ivtp.evaluation import micro12
from ivtp.evaluation.ratios import Ratios, ratios

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = micro12.prepare(tmp_path_factory.mktemp("cache") / "micro12", count=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        named = [column.task for column in micro12.MICRO12]
        return dict(get_task_dict(named, TaskManager(include_path=[str(folder)]), "chat"))


def right(doc: dict[str, Any]) -> str:
    if "answer" not in doc:
        return str(doc["answers"][0])
    return "ABCD"[doc["answer"]] if isinstance(doc["answer"], int) else str(doc["answer"])


@pytest.mark.parametrize("column", micro12.MICRO12, ids=lambda column: column.title)
@pytest.mark.parametrize("seed", range(3))
def test_the_official_figure(tasks: dict[str, Any], column: Any, seed: int) -> None:
    """Of answers of which some are right: as the benchmark's own aggregation has it."""
    task, rng = tasks[column.task], random.Random(seed)
    docs = list(task.test_docs())
    rights = [right(doc) for doc in docs]
    wrong = {"yes": "no", "no": "yes"}
    answers = [text if rng.random() < 0.6 else wrong.get(text, "A") for text in rights]
    found = [task.process_results(doc, [answer])[column.metric] for doc, answer in zip(docs, answers, strict=True)]
    official = column.value({column.task: {f"{column.metric},none": task.aggregation()[column.metric](found)}})
    samples = [{"doc_id": number, column.metric: value} for number, value in enumerate(found)]
    own = ratios(column.metric, samples, column.to_percent)
    assert own is not None
    assert float(own.value()) == pytest.approx(official)
    assert 0 < float(own.value()) < 100


def test_what_a_judge_alone_knows_is_no_sum() -> None:
    """MMBench's figure, and a metric that the samples do not have."""
    assert ratios("gpt_eval_score", [{"doc_id": 0, "gpt_eval_score": {"index": 0}}], 1.0) is None
    assert ratios("exact_match", [{"doc_id": 0}], 100.0) is None


def test_llava_benchs_marks() -> None:
    """The model's over the reference's; what could not be judged does not count."""
    marks = [[8, 6], [10, 9], [-999, -999]]
    samples = [{"doc_id": n, "gpt_eval_llava_all": {"scores": scores}} for n, scores in enumerate(marks)]
    found = ratios("gpt_eval_llava_all", samples, 1.0)
    assert found is not None
    assert float(found.value()) == pytest.approx(100 * 15 / 18)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 2), st.integers(0, 3)), min_size=1, max_size=8))
def test_weights_are_repeated_items(items: list[tuple[float, float, int]]) -> None:
    over, under, times = (np.array(column) for column in zip(*items, strict=True))
    times[0] = max(times[0], 1)
    once = Ratios(over[:, None], under[:, None], tuple(range(len(items))))
    often = np.repeat(np.arange(len(items)), times)
    repeated = Ratios(once.over[often], once.under[often], tuple(often.tolist()))
    assert float(once.value(times.astype(float))) == pytest.approx(float(repeated.value()))


def test_a_task_of_mme_that_a_draw_lacks_is_as_the_others() -> None:
    over, under = np.array([[200.0, 0.0], [0.0, 100.0]]), np.eye(2)
    both = Ratios(over, under, (0, 2))
    assert float(both.value()) == 300
    assert both.value(np.array([[2.0, 0.0], [0.0, 2.0]])).tolist() == [400.0, 200.0]


def test_draws_are_the_same_items_for_all_methods() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((40, 1))
    first = Ratios(scores, np.ones((40, 1)), tuple(range(40)))
    shifted = Ratios(scores + 0.25, np.ones((40, 1)), tuple(range(40)))
    assert np.allclose(shifted.draws("GQA") - first.draws("GQA"), 0.25)
    assert first.draws("GQA").std() == pytest.approx(scores.std() / 40**0.5, rel=0.15)
