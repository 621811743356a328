"""Fine-tuning of the CLIP so that its CLS token knows every object: ``python -m recipes.micro.train cls``.

What LLaVA's projector reads, the patches of layer -2, is held where it was: by the squared error against the
tower that the run began with. That tower stays frozen, as do the first `FROZEN` layers and the text side, so that
words keep their meaning. Only the CLS token has something to learn:

* which glyphs, sign words, disc and frame colours a photo shows, read by throw-away linear heads off the projected
  CLS token, off layer -2's, and off what its attention brings it in `GATHERING`'s layers (the heads of the latter
  learn from means over random patches, too, which train nothing but them);
* to tell a true caption from the same one with an object, a colour or a word exchanged;
* the relevance of a question's words (Eq. 5), as before.

A photo is thinned first, to whole objects and some background, of which patches then go at random. No loss reads
an attention weight.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from ivtp.micro.world import COLOURS, GRID, SIGN_TEXTS, Scene, SceneObject, canonical_caption
from ivtp.micro.world.photo import take_photo
from ivtp.micro.world.vocabulary import GLYPHS
from recipes.micro.loop import Budget, CsvLog, load_checkpoint, save_checkpoint
from recipes.micro.optim import Optimisers, autocast, split_parameters, trapezoid
from recipes.micro.vision import Stage, export
from recipes.micro.vision_data import IGNORE, Batch, keyword_table, make_batch
from recipes.micro.vision_eval import clip_scores
from recipes.micro.vision_model import encode_from, encode_texts, encode_to, encode_windows, mention, word_loss

SHOWN: tuple[tuple[str, str], ...] = (
    *(("object", name) for name in GLYPHS),
    *(("text", text) for text in SIGN_TEXTS),
    *((backing, colour) for backing in ("disc", "frame") for colour in COLOURS),
)
"""What a photo may show, and the CLS token is to know."""
FROZEN = 6
"""Layers that stay as they are, where patches hardly know yet what they show."""
GATHERING = (8, 10)
"""Layers whose attention must bring the CLS token everything by itself: the last ones of the two groups that IVTP
rolls out after `FROZEN`, up to the one that the projector reads."""
MIXTURES = 4
"""Means over random patches of each photo, for the heads."""
FIRST_PHOTO = 3_000_000_000  # behind all photos of the other stages
NEGATIVES = 2
"""False captions of each photo."""
DROPPED = 0.2
"""Share of a thinned photo's patches that go at random."""
CURRICULUM = (Stage(GRID, 0.0, 24, keep=160), Stage(GRID, 0.6, 12, keep=288), Stage(GRID, 0.8, 6))
WEIGHTS = {
    "anchor": 20.0,
    "projected": 6.0,
    "state": 6.0,
    "gathered": 20.0,
    "heads": 6.0,
    "contrast": 0.2,
    "words": 0.5,
}


@dataclass(frozen=True)
class ClsRecipe:
    """What a run is made of; exactly one of ``steps`` and ``minutes`` is given."""

    steps: int | None = None
    minutes: float | None = None
    muon_lr: float = 3e-3
    adam_lr: float = 1e-3
    cooldown: float = 0.6
    seed: int = 0
    save_minutes: float = 10.0
    log_every: int = 20
    validation: int = 16
    curriculum: tuple[Stage, ...] = CURRICULUM


class PresenceHeads(nn.Module):
    """Linear read-outs of CLS states, one for each place; thrown away after training."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.places = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(SHOWN))) for name, width in widths.items()}
        )

    def forward(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """States (B, C) by place to logits (B, SHOWN)."""
        return {name: self.places[name](state) for name, state in states.items()}


def shown(scene: Scene) -> Tensor:
    """(SHOWN,) which of them a scene shows."""
    seen = {(item.backing, item.colour) for item in scene.objects}
    seen |= {("object", item.name) for item in scene.objects} | {("text", item.text) for item in scene.objects}
    return torch.tensor([pair in seen for pair in SHOWN])


def caption_and_negatives(scene: Scene, rng: random.Random, count: int = NEGATIVES) -> list[str]:
    """A true caption of up to four objects of the scene, then ``count`` with one object, colour or word exchanged."""
    size = min(len(scene.objects), rng.randint(1, 4))
    part = replace(scene, objects=tuple(rng.sample(scene.objects, size)))
    return [canonical_caption(part), *(canonical_caption(_exchanged(part, scene, rng)) for _ in range(count))]


def _exchanged(part: Scene, scene: Scene, rng: random.Random) -> Scene:
    """The part with one thing that is not so in the scene."""
    index = rng.randrange(len(part.objects))
    item = part.objects[index]
    looks = {_look(other) for other in scene.objects}
    if item.text is not None:
        others = [replace(item, text=text) for text in SIGN_TEXTS]
    elif item.colour is not None and rng.random() < 0.5:
        others = [replace(item, colour=colour) for colour in COLOURS]
    else:
        others = [replace(item, name=name) for name in GLYPHS]
    new = rng.choice([other for other in others if _look(other) not in looks])
    return replace(part, objects=(*part.objects[:index], new, *part.objects[index + 1 :]))


def _look(item: SceneObject) -> tuple[str | None, ...]:
    return item.name, item.backing, item.colour, item.text


def drop_patches(batch: Batch, share: float, generator: torch.Generator) -> Batch:
    """The batch without a random share of each photo's patches; what a photo shows counts as before."""
    count, patches = batch.positions.shape
    keep = round((1 - share) * patches)
    kept = torch.rand(count, patches, generator=generator).argsort(1)[:, :keep].sort(1).values  # (B, k)
    pixels = batch.patches.gather(1, kept[..., None].expand(-1, -1, batch.patches.shape[-1]))
    labels = {key: values.gather(1, kept) for key, values in batch.labels.items()}
    return replace(batch, patches=pixels, positions=batch.positions.gather(1, kept), labels=labels)


def shown_by_patch(labels: dict[str, Tensor]) -> Tensor:
    """(B, P, SHOWN) what each patch's object shows; nothing for background and undecided patches."""
    names, texts, colours = len(GLYPHS), len(SIGN_TEXTS), len(COLOURS)
    known = labels["object"] > 0
    places = [
        (known & (labels["object"] <= names), labels["object"] - 1),
        (known & (labels["text"] > 0), names + labels["text"] - 1),
        (known & (labels["colour"] > 0), names + texts + (labels["backing"] - 1) * colours + labels["colour"] - 1),
    ]
    found = torch.zeros(*known.shape, len(SHOWN) + 1, dtype=torch.bool, device=known.device)
    for there, place in places:
        found.scatter_(2, torch.where(there, place, len(SHOWN))[..., None], True)
    return found[..., :-1]


@contextmanager
def cls_states(clip: CLIPModel) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Collects the CLS token's state of layer -2 and what `GATHERING`'s attentions bring it, by place: (B, C) each.

    Beside it what each patch would bring by itself: (B, P, C), without gradients.
    """
    layers, found, values = clip.vision_model.encoder.layers, dict[str, Tensor](), dict[str, Tensor]()

    def state(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found["state"] = (output if isinstance(output, Tensor) else output[0])[:, 0]

    def gathered(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: object, named: dict[str, Tensor], output: tuple[Tensor, ...]) -> None:
            found[name] = output[0][:, 0]
            with torch.no_grad():
                values[name] = module.out_proj(module.v_proj(named["hidden_states"][:, 1:]))

        return hook

    handles = [layers[-2].register_forward_hook(state)]
    for i in gathering(len(layers)):
        handles.append(layers[i].self_attn.register_forward_hook(gathered(f"gathered{i}"), with_kwargs=True))
    try:
        yield found, values
    finally:
        for handle in handles:
            handle.remove()


def gathering(layers: int) -> list[int]:
    """`GATHERING` in a tower of so many layers, none behind the one that is read."""
    return sorted({min(layer, layers - 2) for layer in GATHERING})


def relative_error(states: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared error of states (B, P, C) in units of each feature's variance over the anchor's patches."""
    spread = anchor.float().flatten(0, 1).var(0) + 1e-8
    return ((states.float() - anchor.float()).square() / spread).mean()


class ClsTrainer:
    """The state of a run and the steps that change it; ``start`` is the CLIP folder that it begins with."""

    def __init__(
        self, out: Path, start: Path, recipe: ClsRecipe, device: torch.device, *, resume: bool = False
    ) -> None:
        self.out, self.recipe, self.device = out, recipe, device
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(start)
        self.table = keyword_table(self.tokenizer)
        self.clip: CLIPModel = CLIPModel.from_pretrained(start, dtype=torch.float32).to(device)
        self.clip.requires_grad_(False)
        self.before = copy.deepcopy(self.clip).eval()
        sizes = self.clip.config.vision_config
        self.frozen = min(FROZEN, sizes.num_hidden_layers - 2)
        tower = self.clip.vision_model
        for module in (*tower.encoder.layers[self.frozen :], tower.post_layernorm, self.clip.visual_projection):
            module.requires_grad_(True)
        widths = {f"gathered{i}": sizes.hidden_size for i in gathering(sizes.num_hidden_layers)}
        torch.manual_seed(recipe.seed)
        self.heads = PresenceHeads({"projected": sizes.projection_dim, "state": sizes.hidden_size, **widths}).to(device)
        parts = [split_parameters(module) for module in (self.clip, self.heads)]
        matrices, others = ([p for part in parts for p in part[i]] for i in range(2))
        self.optimisers = Optimisers(matrices, others, muon_lr=recipe.muon_lr, adam_lr=recipe.adam_lr)
        self.generator = torch.Generator()
        self.step, self.photos, spent = 0, 0, 0.0
        if resume:
            state = load_checkpoint(out / "cls.pt")
            self.clip.load_state_dict(state["clip"])
            self.heads.load_state_dict(state["heads"])
            self.optimisers.load_state_dict(state["optimisers"])
            self.step, self.photos, spent = state["step"], state["photos"], state["minutes"]
        self.budget = Budget(recipe.steps, recipe.minutes, spent)
        self.log = CsvLog(out / "cls.csv", append=resume)

    def train_step(self, fraction: float) -> dict[str, float]:
        """One update at a fraction of the run; returns the number of patches, the rate factor and the loss terms."""
        stage = [s for s in self.recipe.curriculum if s.start <= fraction][-1]
        batch = self.batch(stage)
        scale = trapezoid(fraction, cooldown=self.recipe.cooldown)
        with autocast(self.device):
            terms = self.losses(batch)
        total = torch.stack([WEIGHTS[key] * value for key, value in terms.items()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimisers.step(scale)
        self.step += 1
        self.photos += stage.batch
        return {"patches": batch.positions.shape[1], "rate": scale, **{k: float(v.detach()) for k, v in terms.items()}}

    def batch(self, stage: Stage) -> Batch:
        """The batch of the present step; no photo is seen twice."""
        first = FIRST_PHOTO + 10_000_000 * self.recipe.seed + self.photos
        self.generator.manual_seed(first)
        photos = [take_photo("train", first + i) for i in range(stage.batch)]
        batch = make_batch(photos, stage.window, self.tokenizer, self.table, keep=stage.keep)
        if stage.keep is not None:
            batch = drop_patches(batch, DROPPED, self.generator)
        return batch.to(self.device)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the training loss, unweighted; see WEIGHTS."""
        count = len(batch.scenes)
        with torch.no_grad():
            entering = encode_to(self.clip, batch.patches, batch.positions, self.frozen)
            anchor, _ = encode_from(self.before, entering, self.frozen)
            tokens, _ = encode_texts(self.clip, batch.input_ids[count:], batch.attention_mask[count:])  # questions
        with cls_states(self.clip) as (found, values):
            states, image = encode_from(self.clip, entering, self.frozen)
        truth = torch.stack([shown(scene) for scene in batch.scenes]).to(self.device)
        presence = self.presence({"projected": image * image.shape[-1] ** 0.5, **found}, truth)
        weights, mixed = self.mixtures(batch)
        heads = self.presence({k: (weights @ v).flatten(0, 1) for k, v in values.items()}, mixed.flatten(0, 1))
        return {
            "anchor": relative_error(states, anchor),
            "projected": presence.pop("projected"),
            "state": presence.pop("state"),
            "gathered": torch.stack(list(presence.values())).mean(),
            "heads": torch.stack(list(heads.values())).mean(),
            "contrast": self.contrast(image, batch),
            "words": word_loss(image, tokens, replace(batch, keywords=batch.keywords[count:])),
        }

    def presence(self, states: dict[str, Tensor], truth: Tensor) -> dict[str, Tensor]:
        """Binary cross-entropy of what is shown (n, SHOWN), read off states (n, C) by place."""
        logits = self.heads(states)
        return {k: F.binary_cross_entropy_with_logits(v.float(), truth.float()) for k, v in logits.items()}

    def mixtures(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weights (B, MIXTURES, P) of means over a few random patches, and what these show (B, MIXTURES, SHOWN)."""
        known = (batch.labels["object"] != IGNORE).float()[:, None]  # (B, 1, P)
        size = torch.randint(4, 33, (len(known), MIXTURES, 1), generator=self.generator).to(self.device)
        noise = torch.rand(len(known), MIXTURES, known.shape[-1], generator=self.generator).to(self.device)
        chosen = ((noise + 1 - known).argsort(-1).argsort(-1) < size).float() * known
        visible = chosen @ shown_by_patch(batch.labels).float() > 0
        return chosen / chosen.sum(-1, keepdim=True).clamp(min=1), visible

    def contrast(self, image: Tensor, batch: Batch) -> Tensor:
        """Each image's own caption against its false ones and other images', unless those are true of it too."""
        rngs = [random.Random(f"negatives/{scene.seed}") for scene in batch.scenes]
        texts = [caption_and_negatives(scene, rng) for scene, rng in zip(batch.scenes, rngs, strict=True)]
        captions = [own[0] for own in texts] + [text for own in texts for text in own[1:]]
        encoded = self.tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt")
        encoded = encoded.to(self.device)
        with torch.no_grad():
            _, whole = encode_texts(self.clip, encoded["input_ids"], encoded["attention_mask"])  # (B + B N, 128)
        keywords = torch.where(encoded["attention_mask"].bool(), self.table.to(self.device)[encoded["input_ids"]], -2)
        mentioned = mention(keywords, batch.present.shape[1]).float()
        allowed = mentioned @ (~batch.present).float().T > 0  # (texts, images)
        count = len(image)
        own = torch.eye(count, dtype=torch.bool, device=self.device)
        allowed |= torch.cat([own, own.repeat_interleave(NEGATIVES, 0)])
        logits = self.before.logit_scale.exp().clamp(max=100) * whole @ image.T
        logits = logits.masked_fill(~allowed, -1e4).T  # (images, texts)
        target = torch.arange(count, device=self.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On whole validation photos: error of the features, presence (mean over the classes), retrieval, words."""
        photos = [take_photo("validation", i) for i in range(self.recipe.validation)]
        errors, images, present = [], [], []
        for start in range(0, len(photos), 8):
            batch = make_batch(photos[start : start + 8], GRID, self.tokenizer, self.table).to(self.device)
            with autocast(self.device):
                anchor, _ = encode_windows(self.before, batch.patches, batch.positions)
                states, image = encode_windows(self.clip, batch.patches, batch.positions)
            errors.append(relative_error(states, anchor))
            images.append(image)
            present.append(batch.present)
        scores = clip_scores(self.clip, self.tokenizer, self.table, torch.cat(images), torch.cat(present), photos)
        return {"feature_error": float(torch.stack(errors).mean()), **scores}

    def save(self) -> None:
        """Checkpoint (a kill at any moment leaves the old or the new), then the loadable folder made from it."""
        state = {"clip": self.clip.state_dict(), "heads": self.heads.state_dict()}
        state |= {"optimisers": self.optimisers.state_dict(), "step": self.step, "photos": self.photos}
        save_checkpoint(self.out / "cls.pt", state | {"minutes": self.budget.spent})
        export(self.clip, self.tokenizer, self.out / "vision" / "clip")

    def run(self, report: Callable[[float, str], None]) -> dict[str, float]:
        """Train to the end of the budget; returns the final validation numbers."""
        saved, scores = self.budget.spent, dict[str, float]()
        while (fraction := self.budget.fraction(self.step)) < 1:
            terms = self.train_step(fraction)
            report(fraction, f"anchor {terms['anchor']:.4f}, gathered {terms['gathered']:.4f}")
            due = self.budget.spent - saved >= self.recipe.save_minutes or self.budget.fraction(self.step) >= 1
            if due:
                self.save()
                saved, scores = self.budget.spent, self.evaluate()
            if due or self.step % self.recipe.log_every == 0:
                row = {"step": self.step, "photos": self.photos, "seconds": self.budget.spent * 60, **terms}
                self.log.write({**row, **{key: scores[key] if due else "" for key in SCORES}})
        return scores


SCORES = ("feature_error", "retrieval", "word_auc", "word_recall", "word_false_rate")
