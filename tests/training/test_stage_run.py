"""A stage from nothing to a checkpoint: what it leaves, and that a killed run goes on as if nothing had been."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tiny import image
from torch import Tensor

import ivtp
from ivtp.errors import ConfigError
from ivtp.plug import find_host
from ivtp.registry import host_class
from ivtp.training.folder import last_checkpoint
from ivtp.training.plan import estimate
from ivtp.training.run import Asked, train
from ivtp.training.stages import FINETUNE, LORA, PRETRAIN, Stage, parts_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def weights(folder: Path | str) -> dict[str, Tensor]:
    """By the names of the model's parameters."""
    return dict(ivtp.load(folder)[0].named_parameters())


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def parts(folder: Path | str) -> dict[str, list[str]]:
    return parts_of(find_host(ivtp.load(folder)[0]))


def test_finetuning_leaves_a_stock_checkpoint_that_says_how_it_was_trained(asked: Asked, checkpoint: Path) -> None:
    done = train(dataclasses.replace(asked, method="ivtp", keep=6, options={"group_layers": 2}))
    assert done is not None
    assert (done.steps, done.records, done.left_out) == (2, 32, 0)
    learned = changed(weights(checkpoint), weights(asked.out))
    of = parts(checkpoint)
    assert not learned & set(of["tower"])
    assert learned >= {name for name in of["projector"] if name.endswith("weight")}
    assert learned & set(of["language"])
    assert not [file.name for file in asked.out.iterdir() if file.suffix in (".bin", ".pt", ".pth")]
    told = json.loads((asked.out / "ivtp.json").read_text())
    assert told["trained"]["method"] == "ivtp"
    assert (told["llm_layers"], told["clip"]) == (6, "clip")  # what the checkpoint said before
    model, processor = ivtp.load(asked.out)
    for named in ({}, {"method": "ivtp"}, {"method": "IVTP"}):
        with ivtp.attach(model, processor, **named) as pruner:  # as it was trained
            assert (pruner.config.method, pruner.config.keep) == ("ivtp", 6)
            assert pruner.method.options.group_layers == 2
    with ivtp.attach(model, processor, keep=9) as pruner:
        assert pruner.config.keep == 9
        assert pruner.method.options.group_layers == 2
    with ivtp.attach(model, processor, method="ivtp+", keep="50%") as pruner:
        assert pruner.method.options.group_layers == 3


@pytest.mark.parametrize("name", [name for name in ivtp.list_hosts() if host_class(name).of_columns])
def test_a_family_that_reads_more_than_batches_say_is_refused(asked: Asked, tmp_path: Path, name: str) -> None:
    model, processor = host_class(name).tiny()
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="trainer of your own") as caught:
        train(dataclasses.replace(asked, model=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_pretraining_moves_the_projector_alone(asked: Asked, captions: Path, checkpoint: Path) -> None:
    done = train(dataclasses.replace(asked, stage=PRETRAIN, data=captions))
    assert done is not None
    assert done.records == 24
    learned = changed(weights(checkpoint), weights(asked.out))
    assert learned
    assert learned <= set(parts(checkpoint)["projector"])
    assert json.loads((asked.out / "ivtp.json").read_text())["trained"]["method"] == "none"
    with ivtp.attach(*ivtp.load(asked.out), keep=8) as pruner:  # all tokens are no recommendation
        assert pruner.config.method == ivtp.PruneConfig.method


def test_adapters_are_merged_into_a_stock_checkpoint(asked: Asked, checkpoint: Path, mix: Any) -> None:
    pytest.importorskip("peft")
    run = dataclasses.replace(asked, stage=LORA, method="topk", keep=8, max_steps=3, bf16=True)
    assert train(run) is not None
    names = load_file(asked.out / "model.safetensors").keys()
    assert names == load_file(checkpoint / "model.safetensors").keys()
    learned, of = changed(weights(checkpoint), weights(asked.out)), parts(checkpoint)
    linear = {name for name in of["language"] if "_proj" in name}
    assert learned == linear | (learned & set(of["projector"]))
    assert learned & set(of["projector"])
    adapter = load_file(asked.out / "adapter" / "adapter_model.safetensors")
    counted = estimate(run, mix.records(), devices=1)
    assert sum(weight.numel() for weight in adapter.values()) == counted.learned


def test_adapters_follow_from_the_seed_alone(asked: Asked, tmp_path: Path) -> None:
    """Whatever was drawn in the process before."""
    pytest.importorskip("peft")

    def adapters(drawn: int, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(drawn)
        out = tmp_path / f"{drawn}-{seed}"
        train(dataclasses.replace(asked, stage=LORA, out=out, seed=seed, max_steps=1))
        return load_file(out / "adapter" / "adapter_model.safetensors")

    ours = adapters(1, seed=5)
    assert not changed(ours, adapters(2, seed=5))
    assert changed(ours, adapters(1, seed=6)) >= {name for name in ours if "lora_A" in name}


def compressor_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "compressor.safetensors")


@pytest.mark.parametrize("stage", [PRETRAIN, FINETUNE, LORA], ids=lambda stage: stage.name)
def test_a_compressor_learns_in_the_projectors_place(
    asked: Asked, captions: Path, compressed: Path, stage: Stage
) -> None:
    data = captions if stage.plain else asked.data
    assert train(dataclasses.replace(asked, stage=stage, data=data, model=str(compressed))) is not None
    model, processor = ivtp.load(asked.out)
    compression = ivtp.compression_of(model)
    assert compression is not None
    assert (compression.name, compression.tokens) == ("qformer", 9)
    assert changed(compressor_of(compressed), compressor_of(asked.out))
    assert ivtp.ask(model, processor, image(1), "Is it a cat?", max_new_tokens=2).tiles == ((9,),)
    compression.detach()  # what stands beside it is the stock model, whose projector has not learned
    stock, before = dict(model.named_parameters()), ivtp.load(compressed)[0]
    ivtp.compression_of(before).detach()
    learned = changed(dict(before.named_parameters()), stock)
    assert not [name for name in learned if "projector" in name]
    assert bool(learned) == ("language" in stage.learns)


def test_bad_records_are_left_out_where_that_is_asked(asked: Asked, mix: Any, tmp_path: Path) -> None:
    bad = dataclasses.replace(asked, data=mix.changed(tmp_path, 5, image="gone.png"))
    with pytest.raises(ConfigError, match=r"record 5 \(id '000000000005'\): .*gone.png does not exist"):
        train(bad)
    assert not asked.out.exists()
    done = train(dataclasses.replace(bad, skip_bad=True, max_steps=1))
    assert done is not None
    assert (done.records, done.left_out) == (31, 1)


def test_a_folder_holds_one_run(asked: Asked) -> None:
    train(dataclasses.replace(asked, max_steps=1))
    with pytest.raises(ConfigError, match="holds a run already"):
        train(asked)
    with pytest.raises(ConfigError, match="max_steps was 1 and is 2"):
        train(dataclasses.replace(asked, resume=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 5}, "no multiple of 2 records on each of 1 device"),
        ({"engine": "zero9"}, "--engine zero9 is unknown"),
        ({"arguments": {"learning_rat": 1}}, "learning_rat=... is no field"),
        ({"arguments": {"lr_scheduler_type": "wavy"}}, "transformers refuses"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(asked: Asked, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(dataclasses.replace(asked, **changes))
    assert not list(asked.out.glob("checkpoint-*"))
    assert not (asked.out / "training.json").exists()  # which would have the right command refused


def test_no_rank_finds_the_run_that_another_has_just_begun(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the folder holds a run is asked by all of them before the first says that it does."""
    told: list[bool] = []
    monkeypatch.setattr(
        PartialState, "wait_for_everyone", lambda _: told.append((asked.out / "training.json").exists())
    )
    train(dataclasses.replace(asked, max_steps=1))
    assert told[0] is False


def test_a_checkpoint_that_was_not_written_whole_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (4, '{"global_step": 4}'), (10, '{"glob'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert last_checkpoint(tmp_path / "none") is None


# ---- killed and resumed -----------------------------------------------------------------------------------------


def command(asked: Asked, out: Path, processes: int) -> list[str]:
    """`ivtp train finetune` as a user types it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    line = [*(launcher if processes > 1 else []), "-m", "ivtp", "train", "finetune", "--data", asked.data]
    line += ["--images", asked.images, "--model", asked.model, "--out", out, "--batch", 4]
    line += ["--per-device", 2 // processes, "--max-steps", 6, "--method", "ivtp", "--keep", 8, "--set", "save_steps=2"]
    return [sys.executable, *map(str, line), "--set", "learning_rate=0.001", "--set", "logging_steps=1"]


def run(line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def kill_after(process: subprocess.Popen[str], checkpoint: Path) -> None:
    """SIGKILL, to all processes of the run, once a checkpoint is whole."""
    began = time.monotonic()
    while not (checkpoint / "trainer_state.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < 300
        time.sleep(0.01)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.send_signal(signal.SIGKILL)
    process.communicate()


def finish(line: list[str]) -> str:
    process = run(line)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(asked: Asked, tmp_path: Path, processes: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = run(command(asked, killed, processes))
    kill_after(process, killed / "checkpoint-2")
    assert not (killed / "model.safetensors").exists()
    if processes == 1:  # the same in this process, which has imported everything
        same = {"max_steps": 6, "method": "ivtp", "keep": 8, "arguments": {**asked.arguments, "save_steps": 2}}
        train(dataclasses.replace(asked, out=whole, **same))
        before = json.loads((killed / "training.json").read_text())["arguments"]
        train(dataclasses.replace(asked, out=killed, resume=True, **{**same, "arguments": before}))
    else:
        finish(command(asked, whole, processes))
        assert "6 steps" in finish([*command(asked, killed, processes), "--resume"])
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert changed(weights(asked.model), weights(killed))


@pytest.mark.parametrize("stage", [FINETUNE, LORA], ids=lambda stage: stage.name)
def test_a_run_goes_on_from_any_checkpoint(asked: Asked, tmp_path: Path, stage: Stage) -> None:
    """With mixed precision, accumulated batches, dropout of adapters; from the last one, without a further step."""
    arguments = {**asked.arguments, "save_steps": 2, "save_total_limit": 2}
    same = {"stage": stage, "method": "fastv", "keep": 8, "max_steps": 4, "per_device": 1, "bf16": True}
    run = dataclasses.replace(asked, arguments=arguments, **same)
    whole = train(run)
    for step in (2, 4):
        killed = dataclasses.replace(run, out=tmp_path / f"killed-{step}", resume=True)
        shutil.copytree(run.out / f"checkpoint-{step}", killed.out / f"checkpoint-{step}")
        shutil.copy(run.out / "training.json", killed.out)
        assert train(killed) == dataclasses.replace(whole, folder=killed.out)
        assert not changed(*(load_file(folder / "model.safetensors") for folder in (run.out, killed.out)))


@pytest.mark.parametrize(
    ("stage", "compressor"),
    [(FINETUNE, "qformer"), (FINETUNE, "mlp"), (LORA, "qformer")],
    ids=lambda v: str(getattr(v, "name", v)),
)
def test_a_run_with_a_compressor_goes_on(
    asked: Asked, checkpoint: Path, compressed: Path, tmp_path: Path, stage: Stage, compressor: str
) -> None:
    """Also with one whose weights have the stock projector's shapes."""
    start = compressed
    if compressor == "mlp":
        start = tmp_path / "start"
        model, processor = ivtp.load(checkpoint)
        ivtp.compress(model, processor, "mlp", tokens=36)
        ivtp.save(model, processor, start)
    arguments = {**asked.arguments, "save_steps": 1, "save_total_limit": 2}
    run = dataclasses.replace(asked, stage=stage, model=str(start), arguments=arguments)
    train(run)
    halved = dataclasses.replace(run, out=tmp_path / "halved", resume=True)
    for part in ("training.json", "checkpoint-1"):
        copy = shutil.copytree if (run.out / part).is_dir() else shutil.copy
        halved.out.mkdir(exist_ok=True)
        copy(run.out / part, halved.out / part)
    train(halved)
    for file in ("model.safetensors", "compressor.safetensors"):
        ours, theirs, before = (load_file(folder / file) for folder in (run.out, halved.out, start))
        assert not changed(ours, theirs)
        assert changed(before, theirs)


def test_a_compressor_is_not_shared_out(asked: Asked, compressed: Path) -> None:
    with pytest.raises(ConfigError, match="a model with a compressor is trained by --engine ddp alone, not zero2"):
        train(dataclasses.replace(asked, model=str(compressed), engine="zero2"))
    assert not asked.out.exists()


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(asked: Asked, tmp_path: Path) -> None:
    """The same records in every step, whoever reads them."""
    finish(command(asked, tmp_path / "two", 2))
    finish(command(asked, tmp_path / "one", 1))
    logs = []
    for name in ("one", "two"):
        state = json.loads((tmp_path / name / "checkpoint-6" / "trainer_state.json").read_text())
        logs.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert logs[0] == pytest.approx(logs[1], abs=2e-3)
