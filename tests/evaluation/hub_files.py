"""The twelve benchmarks in the format of the hub's data sets, with a few rows each: what lmms-eval's tasks load.

`datasets.load_dataset("lmms-lab-encoder/POPE")` reads a folder of that name below the working directory before it asks
the hub, so that a task's own yaml runs on them as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

OWNER = "lmms-lab-encoder"
ROWS = 4
LETTERS = "ABCD"
Make = Callable[[int], dict[str, Any]]


def picture(number: int) -> Image.Image:
    """Noise; sizes differ."""
    size = (40 + 8 * (number % 3), 56)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8))


def vqa(number: int) -> dict[str, Any]:
    """TextVQA's and VizWiz's ten answers of different people."""
    answers = ["cat"] * (10 - number) + ["dog"] * number
    return {"question_id": str(number), "question": f"what is seen {number}?", "answers": answers}


def vqav2(number: int) -> dict[str, Any]:
    answers = [
        {"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(vqa(number)["answers"])
    ]
    return {"question_id": number, "question": f"What is it {number}?", "answers": answers, "answer": "cat"}


def mmbench(number: int) -> dict[str, Any]:
    """Each question once more with its options turned: the circular protocol counts both or neither."""
    index, turn = number // 2, number % 2
    options = ["red", "green", "blue", "none"]
    turned = options[turn:] + options[:turn]
    return {
        "index": index + turn * 1_000_000,
        "question": f"Which colour is it {index}?",
        "hint": "nan",
        "answer": LETTERS[turned.index("green")],
        **dict(zip(LETTERS, turned, strict=True)),
        "category": "colour",
        "source": "made",
        "L2-category": "perception",
        "comment": "",
        "split": "dev",
    }


def mme(number: int) -> dict[str, Any]:
    """Two questions about one picture, one of them to be denied."""
    answer = ("Yes", "No")[number % 2]
    return {
        "question_id": f"existence/{number // 2}.png",
        "question": f"Is there a dog {number}? Please answer yes or no.",
        "answer": answer,
        "category": ("existence", "OCR")[number // 2],
    }


TASKS: dict[str, list[tuple[str | None, str, Make, str | None]]] = {
    "VQAv2": [(None, "validation", vqav2, "image")],
    "GQA": [
        (
            "testdev_balanced_instructions",
            "testdev",
            lambda n: {"id": str(n), "imageId": str(n), "question": f"Is it red {n}?", "answer": "yes"},
            None,
        ),
        ("testdev_balanced_images", "testdev", lambda n: {"id": str(n)}, "image"),
    ],
    "VizWiz-VQA": [(None, "val", vqa, "image")],
    "ScienceQA": [
        (
            "ScienceQA-IMG",
            "test",
            lambda n: {"question": f"Which one {n}?", "hint": "", "choices": ["north", "south"], "answer": n % 2},
            "image",
        )
    ],
    "textvqa": [(None, "validation", lambda n: {**vqa(n), "ocr_tokens": ["stop"]}, "image")],
    "POPE": [
        (
            None,
            "test",
            lambda n: {
                "id": str(n),
                "question_id": str(n),
                "question": f"Is there a dog {n} in the image?",
                "answer": ("yes", "no")[n % 2],
                "category": "random",
            },
            "image",
        )
    ],
    "MME": [(None, "test", mme, "image")],
    "MMBench": [("en", "dev", mmbench, "image"), ("cn", "dev", mmbench, "image")],
    "SEED-Bench": [
        (
            None,
            "test",
            lambda n: {
                "question_id": str(n),
                "question": f"How many {n}?",
                **{f"choice_{letter}": str(i) for i, letter in enumerate("abcd")},
                "answer": LETTERS[n % 4],
                "data_type": ("image", "video")[n % 2],
            },
            "images",
        )
    ],
    "llava-bench-in-the-wild": [
        (
            None,
            "train",
            lambda n: {
                "question_id": n,
                "question": f"Describe it {n}.",
                "gpt_answer": "A dog.",
                "caption": "a dog",
                "category": "conv",
            },
            "image",
        )
    ],
    "MMVet": [
        (
            None,
            "test",
            lambda n: {"question_id": f"v1_{n}", "question": f"What is x {n}?", "answer": "1", "capability": "ocr"},
            "image",
        )
    ],
}


def write(folder: Path, rows: int = ROWS) -> None:
    """All data sets below `folder`, in the hub's layout: a card that names its parts, and Parquet files."""
    for name, parts in TASKS.items():
        home = folder / OWNER / name
        (home / "data").mkdir(parents=True)
        card: list[str] = ["---", "configs:"]
        for config, split, make, pictures in parts:
            table = [make(number) for number in range(rows)]
            for number, row in enumerate(table):
                if pictures == "image":
                    row["image"] = picture(number // 2 if name == "MME" else number)
                elif pictures == "images":  # of a video several
                    row["image"] = [picture(number + i) for i in range(1 + number % 2 * 2)]
            made = datasets.Dataset.from_list(table)
            if pictures == "image":
                made = made.cast_column("image", datasets.Image())
            elif pictures == "images":
                made = made.cast_column("image", datasets.List(datasets.Image()))
            file = f"data/{config or 'default'}-{split}.parquet"
            made.to_parquet(home / file)
            card += [
                f"- config_name: {config or 'default'}",
                "  data_files:",
                f"  - split: {split}",
                f"    path: {file}",
            ]
        (home / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")
