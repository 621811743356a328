"""What a model family has to tell: its sizes, where its towers are, and what the images of a call are to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ivtp.errors import InputError
from ivtp.files.sidecar import local_folder, recommended, sidecar
from ivtp.hosts.tiny import PROMPTS, tiny_images
from ivtp.methods.base import Method
from ivtp.plan import NEEDS, PLACES, Geometry, Place
from ivtp.towers.base import TextTower, VisionTower

OPENAI_CLIP = {
    # (hidden size, layers, patch size, patches) of a vision tower: the CLIP model that it was taken from
    (1024, 24, 14, 576): "openai/clip-vit-large-patch14-336",
    (1024, 24, 14, 256): "openai/clip-vit-large-patch14",
}


def process(processor: Any, texts: Sequence[str], pictures: Sequence[Sequence[Any]]) -> Any:
    """What the processor makes of prompts, as one padded batch: `texts`, each with its own `pictures`, none or several.

    A family may read the only image of a prompt otherwise than one of several: they are handed over prompt by prompt.
    """
    own = [list(some) for some in pictures if some]  # for a prompt without images processors take no empty list
    several = len(texts) > 1  # one alone needs no padding token, which a tokenizer may lack
    return processor(images=own or None, text=list(texts), padding=several, return_tensors="pt")


@dataclass(frozen=True)
class Visual:
    """One image of a call: which of its patches its slots in the prompt hold, and what the encoder reads of it."""

    grids: tuple[tuple[int, ...], ...]
    """(rows, columns) of its patches, one grid behind the other: of most families one; of tiles the whole's and then
    theirs together, or, where a call does not say how they lie, one for each tile and the whole's at the end."""
    token: Tensor
    """(slots,) the patch that each slot of the prompt holds, -1: a separator, which is never cut."""
    tiles: Tensor
    """(tiles, N) the patch that each token of each tile becomes, -1: padding, which no slot holds."""
    scaled: Tensor | None = None
    """(rows, columns) the tokens of all tiles, counted through, that a grid larger than the last of `grids` is made of
    and scaled down from, bilinearly, behind the projector; None where no grid is scaled."""
    whole: int = 0
    """The tile that shows all of the image: the summary of its encoder stands for the image."""

    marks: int | None = None
    """Tokens that the processor writes around its slots and between them; None: as many as `Geometry` says."""
    windowed: int | None = None
    """Pairs of patches that see each other where the encoder's layers see windows; None: all of a tile do."""

    @cached_property
    def patches(self) -> int:
        """Tokens that may be cut."""
        return int(self.token.max()) + 1

    @property
    def counted(self) -> tuple[int, tuple[int, ...], int | None]:
        """All that its cost depends on: `patches`, `visible` and `windowed`."""
        return self.patches, self.visible, self.windowed

    @property
    def visible(self) -> tuple[int, ...]:
        """Tokens of each tile that reach the prompt."""
        return tuple((self.tiles >= 0).sum(dim=1).tolist())


def openai_clip(geometry: Geometry, layers: int) -> str | None:
    """The hub id of OpenAI's CLIP whose vision side, of `layers` layers in all, has these sizes; None without one."""
    patches = geometry.num_patches * geometry.unit
    return OPENAI_CLIP.get((geometry.vision_hidden, layers, geometry.patch_size, patches))


class Host:
    """One model family. A subclass locates the parts in `__init__`; nothing here changes the model."""

    name: ClassVar[str]
    """Also the file's name."""
    model_class: ClassVar[str]
    """Name of the stock transformers class."""

    media: ClassVar[tuple[str, ...]] = ("pixel_values",)
    """Arguments of a call that describe its images; they leave the call, and are not repeated for beams."""
    stock: ClassVar[tuple[str, ...]] = ()
    """Names of well-known sizes, for `stock_config`."""
    hub: ClassVar[str] = "llava-hf/{}-hf"
    """The hub id of the checkpoint of such a size, with its name left out."""
    of_columns: ClassVar[tuple[str, ...]] = ()
    """Arguments of a call that describe its columns one by one, as `columns` makes them; they leave the call, and
    what they say is in `blocks`."""
    both_ways: ClassVar[bool] = False
    """Whether a prompt's text is read in both directions as well: no image can come behind a cache then."""
    writes_prompts: ClassVar[str | None] = None
    """Stock class of a processor that takes no chat template and itself writes what stands around the question."""
    writes: ClassVar[tuple[str, ...]] = ()
    """What its processor writes in front of images that it makes of one: no part of the question."""
    unread: ClassVar[tuple[str, ...]] = ()
    """Arguments of a call that would pass unpruned, such as videos: a call with one of them is refused."""
    generate_reads: ClassVar[bool] = False
    """Whether the stock `generate` reads what describes the images before it calls the model; it is checked first."""
    pads: ClassVar[bool] = False
    """Whether tiles hold padding that never reaches the prompt. What merges in the encoder has to heed it."""

    compressible: ClassVar[bool] = False
    """Whether a compressor may stand in for its projector: any number of tokens of an image may take its slots."""
    cuts: ClassVar[frozenset[Place]] = frozenset({"inside", "behind", "projected"})
    """Where tokens may leave its encoder: in a layer or behind one, and behind the projector."""
    gives: ClassVar[frozenset[str]] = frozenset({"cls", "grid", "text_side"})
    """What methods may need and this family has, of `ivtp.plan.NEEDS`."""

    model: nn.Module
    """The stock model, as the user calls it."""
    multimodal: nn.Module
    """The sub-module that merges image features and text and calls the decoder."""
    vision: VisionTower
    text: TextTower
    embedding: nn.Module
    """Of token ids, as the decoder reads them."""
    image_token: int
    """The id that marks an image's slots in a prompt."""
    size: Geometry
    """Sizes of `model`."""

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Whether `config` is of this family."""
        raise NotImplementedError

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes of the model that `config` describes."""
        raise NotImplementedError

    @classmethod
    def visual(cls, config: Any, size: tuple[int, int], images: int = 1) -> Visual | None:
        """An image of `size` (width, height), one of so many `images` of a prompt, to a model of `config`.

        None where images of all sizes are alike.
        """
        return None

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """The transformers configuration of one of the `stock` names."""
        raise NotImplementedError

    @classmethod
    def process(cls, processor: Any, texts: Sequence[str], pictures: Sequence[Sequence[Any]]) -> Any:
        """What the family's processor makes of prompts, as one padded batch: `texts`, each with its own `pictures`."""
        return process(processor, texts, pictures)

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """A random stock model of this family that runs in milliseconds, and a processor made for it, offline."""
        raise NotImplementedError

    @classmethod
    def tiny_inputs(
        cls,
        model: nn.Module,
        processor: Any,
        prompts: Sequence[tuple[str, Sequence[tuple[int, int]]]] = PROMPTS,
        seed: int = 0,
    ) -> dict[str, Any]:
        """The keyword arguments of one call of `model`: ids and mask padded on the left, float32 pixels where there
        are images, and what else the family's processor gives.

        `prompts` are questions, each with the (width, height) of its images; their pictures depend on `seed`.
        """
        texts, pictures = [], []
        for question, sizes in prompts:
            content = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": question}]
            turn = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
            pictures.append(tiny_images(question, sizes, seed))
        any_model: Any = model
        return dict(cls.process(processor, texts, pictures).to(any_model.device))

    def __init__(self, model: nn.Module) -> None:
        """Raises `UnsupportedModelError` where the model is of the family but built in a way that cannot be pruned."""
        raise NotImplementedError

    @property
    def summary(self) -> Literal["cls", "mean"]:
        """What stands for an image as a whole: its CLS token or, of a tower without one, the mean of its patches.

        Its attention rates patches in the encoder, and it is the pseudo CLS token where no word is.
        """
        return "cls" if "cls" in self.gives else "mean"

    @property
    def most_patches(self) -> int:
        """Patches of the largest image that this model reads."""
        return self.size.num_patches

    def refusal(self, method: Method) -> str | None:
        """Why `method` would silently be another one in this family, and what to do, in one line; None: it is taken."""
        name, other = f"method {method.config.method!r}", "another method (see `ivtp methods --hosts`)"
        places = {cut.place for cut in method.plan.cuts if cut.where == "vision"}
        if uncut := sorted(places - self.cuts):
            where = " and ".join(PLACES[place] for place in uncut)
            stages = 'stages="llm" or ' if hasattr(method.options, "stages") else ""
            return f"{name} cuts {where}, where {self.name} cannot be cut; use {stages}{other}"
        if self.size.unit > 1 and places & {"inside", "behind"} and method.info.merges:
            return (
                f"{name} merges tokens in the encoder, and the projector of {self.name} reads {self.size.unit} of them "
                f"each; use {other}"
            )
        missing = sorted(method.needed - self.gives)
        if missing:
            lacks = " and ".join(NEEDS[need] for need in missing)
            guides = 'guide="text", guide="visual" or ' if missing == ["text_side"] and not method.reads_clip else ""
            return f"{name} needs {lacks}, which {self.name} lacks; use {guides}{other}"
        if uncut := sorted(places - self.cuts):
            where = " and ".join(PLACES[place] for place in uncut)
            return f"{name} cuts {where}, where {self.name} cannot be cut; use {other}"
        if self.pads and places and method.info.merges and not method.heeds_padding:
            return (
                f"{name} merges tokens in the encoder, and could not tell the padding in the tiles of {self.name}; "
                f"use {other}"
            )
        return None

    def visuals(self, inputs: dict[str, Any]) -> list[Visual]:
        """The images of a call, in order, on the host. Raises `InputError` for what is no image of this family."""
        raise NotImplementedError

    def tiles(self, inputs: dict[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """What the encoder reads of each image: (tiles, 3, H, W)."""
        raise NotImplementedError

    def blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        """(B, T) blocks of a call's columns, -1: none; in the decoder all of one see each other, whatever their order.

        None where every column sees what stands before it. Raises `InputError` for a call that does not say it.
        """
        return None

    def columns(self, ids: Tensor) -> dict[str, Tensor]:
        """The `of_columns` of prompts `ids` (B, T): 0 for those of a question."""
        return {name: torch.zeros_like(ids) for name in self.of_columns}

    def positions(self, inputs: dict[str, Any], ids: Tensor, mask: Tensor | None, past: int = 0) -> Tensor | None:
        """Position ids (B, T), or (axes, B, T), of a call on a cache of `past` tokens; None: as the model counts them.

        `ids` (B, T) and its `mask` (B, past + T) may lie elsewhere than in `inputs`. Called once for each call.
        """
        position: Tensor | None = inputs.get("position_ids")
        return position

    def framing(self, ids: Tensor) -> Tensor | None:
        """(B, T) bool, on the host: columns of `ids` that the processor wrote around slots, and that nobody asks.

        None: special tokens next to slots alone are.
        """
        return None

    def separator(self) -> Tensor | None:
        """The embedding (D_text,) in the slots that hold no patch; None where there are none."""
        return None

    def project(self, features: Tensor) -> Tensor:
        """Vision features (R, N * `Geometry.unit`, D), units whole, to decoder embeddings (R, N, D_text)."""
        raise NotImplementedError

    def project_deep(self, layer: int, features: Tensor) -> Tensor:
        """As `project`, of the output of a layer of `Geometry.deepstack`, which is added in the decoder; here alike."""
        return self.project(features)

    def project_summary(self, summary: Tensor) -> Tensor:
        """What stands for images as a whole (m, D) to decoder embeddings (m, D_text), as units of nothing else."""
        return self.project(summary.unsqueeze(1).expand(-1, self.size.unit, -1)).squeeze(1)

    def check_media(self, inputs: dict[str, Any]) -> None:
        """Raise `InputError` for what would pass unpruned."""
        for name in self.unread:
            if inputs.get(name) is not None:
                raise InputError(
                    f"{name}: of {self.name} images alone can be pruned; leave it out, or detach the pruner first"
                )

    def check_call(self, inputs: dict[str, Any]) -> None:
        """Raise `InputError` for arguments of a forward with images that would be ignored."""

    def default_clip(self) -> str | None:
        """Folder or hub id of the CLIP model whose vision side is this model's tower, where that is known."""
        raise NotImplementedError

    def recommended(self) -> dict[str, Any]:
        """Options for this checkpoint; methods take those that they read. Raises `LoadError` for a broken sidecar."""
        return recommended(self._sidecar())

    def _folder(self) -> Path | None:
        return local_folder(getattr(self.model, "name_or_path", None))

    def _sidecar(self) -> dict[str, Any]:
        return sidecar(self._folder())
