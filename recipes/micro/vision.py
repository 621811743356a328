"""Training of the micro CLIP, the recipe's first stage: ``python -m recipes.micro.train vision --minutes 55``.

Curriculum: windows of 8x8 patches, then whole images thinned to 160 patches, then whole images while the
learning rate falls to zero. Patches keep the position embeddings of their true place, so what the cheap views
teach carries over. ``--further`` begins another round on a finished run: the rate rises again
and falls to zero over thinned, then whole images.
The folder receives ``clip/`` (a stock CLIPModel with tokenizer and image processor, replaced every few
minutes), ``checkpoint.pt`` and ``log.csv``.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase

from ivtp.micro.world import GRID
from ivtp.micro.world.photo import take_photo
from recipes.micro.loop import Budget, CsvLog, load_checkpoint, save_checkpoint
from recipes.micro.optim import Optimisers, autocast, trapezoid
from recipes.micro.vision_data import Batch, keyword_table, make_batch
from recipes.micro.vision_eval import evaluate
from recipes.micro.vision_model import WEIGHTS, Heads, build_clip, build_tokenizer, losses


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum, from a fraction ``start`` of the run on.

    ``batch`` windows of ``window`` x ``window`` patches a step, thinned to ``keep`` patches where given.
    """

    window: int
    start: float
    batch: int
    keep: int | None = None


CURRICULUM = (Stage(8, 0.0, 32), Stage(GRID, 0.2, 24, keep=160), Stage(GRID, 0.8, 8))
FURTHER = (Stage(GRID, 0.0, 24, keep=160), Stage(GRID, 0.87, 8))


@dataclass(frozen=True)
class Recipe:
    """What a run is made of; exactly one of ``steps`` and ``minutes`` is given.

    ``layers``, ``width`` and ``heads`` size the tower; ``save_minutes`` is the time between checkpoints.
    ``further`` is the curriculum of every round after the first.
    """

    steps: int | None = None
    minutes: float | None = None
    muon_lr: float = 1e-2
    adam_lr: float = 2e-3
    cooldown: float = 0.5
    layers: int = 12
    width: int = 192
    heads: int = 3
    seed: int = 0
    save_minutes: float = 5.0
    log_every: int = 20
    validation: int = 32
    curriculum: tuple[Stage, ...] = CURRICULUM
    further: tuple[Stage, ...] = FURTHER


class Trainer:
    """The state of a run and the steps that change it."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        device: torch.device,
        *,
        resume: bool = False,
        further: bool = False,
        start: Path | None = None,
    ) -> None:
        self.out, self.recipe, self.device = out, recipe, device
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer: PreTrainedTokenizerBase = build_tokenizer()
        self.table = keyword_table(self.tokenizer)
        self.clip: CLIPModel = build_clip(
            self.tokenizer, width=recipe.width, heads=recipe.heads, layers=recipe.layers, seed=recipe.seed
        ).to(device)
        if start is not None:
            self.clip.load_state_dict(CLIPModel.from_pretrained(start, dtype=torch.float32).state_dict())
        self.heads = Heads(recipe.width).to(device)
        matrices, others = _split(self.clip, self.heads)
        self.optimisers = Optimisers(matrices, others, muon_lr=recipe.muon_lr, adam_lr=recipe.adam_lr)
        self.step = self.images = 0
        self.rounds = int(start is not None)
        self.first_step, self.earlier, spent = 0, 0.0, 0.0
        if resume or further:
            state = load_checkpoint(out / "checkpoint.pt")
            self.clip.load_state_dict(state["clip"])
            self.heads.load_state_dict(state["heads"])
            self.optimisers.load_state_dict(state["optimisers"])
            self.step, self.images, spent = state["step"], state["images"], state["spent"]
            self.rounds, self.first_step, self.earlier = state["rounds"], state["first_step"], state["earlier"]
        if further:
            self.rounds, self.first_step = self.rounds + 1, self.step
            self.earlier, spent = self.earlier + spent, 0.0
        self.budget = Budget(recipe.steps, recipe.minutes, spent)
        self.log = CsvLog(out / "log.csv", append=resume or further)

    def train_step(self, fraction: float) -> dict[str, float]:
        """One update at a fraction of the run; returns the window, the rate factor and the loss terms."""
        curriculum = self.recipe.further if self.rounds else self.recipe.curriculum
        stage = [s for s in curriculum if s.start <= fraction][-1]
        batch = self.batch(stage)
        scale = trapezoid(fraction, cooldown=0.9 if self.rounds else self.recipe.cooldown)
        with autocast(self.device):
            terms = losses(self.clip, self.heads, batch)
        total = torch.stack([WEIGHTS[key] * value for key, value in terms.items()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimisers.step(scale)
        self.step += 1
        self.images += stage.batch
        values = {"loss": float(total.detach()), **{key: float(v.detach()) for key, v in terms.items()}}
        return {"window": stage.window, "rate": scale, **values}

    def batch(self, stage: Stage) -> Batch:
        """The batch of the present step; training scenes are never seen twice."""
        # behind the photos that the later stages store, and other ones for every seed and round
        first = 1_000_000 + 100_000_000 * self.recipe.seed + 10_000_000 * self.rounds + self.images
        photos = [take_photo("train", first + i) for i in range(stage.batch)]
        batch = make_batch(photos, stage.window, self.tokenizer, self.table, keep=stage.keep)
        return batch.to(self.device)

    def evaluate(self) -> dict[str, float]:
        """Numbers on whole validation images."""
        return evaluate(self.clip, self.heads, self.tokenizer, self.table, count=self.recipe.validation)

    def save(self) -> None:
        """Checkpoint (a kill at any moment leaves the old or the new), then the loadable folder made from it."""
        state = {"clip": self.clip.state_dict(), "heads": self.heads.state_dict()}
        state |= {"optimisers": self.optimisers.state_dict(), "step": self.step}
        state |= {"images": self.images, "spent": self.budget.spent, "earlier": self.earlier}
        state |= {"rounds": self.rounds, "first_step": self.first_step}
        save_checkpoint(self.out / "checkpoint.pt", state)
        export(self.clip, self.tokenizer, self.out / "clip")

    def run(self, console: Console) -> dict[str, float]:
        """Train to the end of the budget; returns the final validation numbers."""
        saved = self.budget.spent
        with Progress(console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("vision", total=1.0)
            while (fraction := self.budget.fraction(self.step - self.first_step)) < 1:
                terms = self.train_step(fraction)
                progress.update(bar, completed=fraction, description=f"vision, loss {terms['loss']:.3f}")
                due = self.budget.spent - saved >= self.recipe.save_minutes
                if due:
                    self.save()
                    saved = self.budget.spent
                if due or self.step % self.recipe.log_every == 0:
                    self.write(terms, self.evaluate() if due else {})
        self.save()
        final = self.evaluate()
        self.write(terms if "terms" in locals() else {}, final)
        return final

    def write(self, terms: dict[str, float], scores: dict[str, float]) -> None:
        """One row of the log; validation columns are empty between evaluations."""
        row: dict[str, Any] = {
            "step": self.step,
            "images": self.images,
            "seconds": (self.earlier + self.budget.spent) * 60,
        }
        for key in ("window", "rate", "loss", *WEIGHTS):
            row[key] = terms.get(key, "")
        for key in SCORES:
            row[key] = scores.get(key, "")
        self.log.write(row)


SCORES = (
    *("object_accuracy", "background_accuracy", "colour_accuracy", "backing_accuracy", "text_accuracy"),
    *("centre_row_accuracy", "centre_column_accuracy", "row_accuracy", "column_accuracy"),
    *("box_error_px", "retrieval", "word_auc", "word_recall", "word_false_rate"),
)


def _split(*modules: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of the encoder layers, which Muon updates, and everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            (matrices if ".layers." in name and parameter.ndim == 2 else others).append(parameter)
    return matrices, others


def export(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the CLIP, its tokenizer and its image processor as one stock folder, replacing an older one."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    clip.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    side = clip.config.vision_config.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessor(**size).save_pretrained(fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
