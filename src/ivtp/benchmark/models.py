"""The model that is timed: with its weights, or a geometry with random ones, whole or a slice of its layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ivtp.benchmark.asked import Asked
from ivtp.cost.sizes import model_config, sizes
from ivtp.errors import ConfigError
from ivtp.files.checkpoint import LOADING
from ivtp.generate import check_device, load
from ivtp.hosts.base import Host
from ivtp.plug import find_host
from ivtp.registry import method_class


@dataclass(frozen=True)
class Subject:
    """A model under test, on its device and in evaluation mode."""

    model: Any
    host: Host
    processor: Any = None
    """None for random weights: prompts are then random ids."""
    options: dict[str, Any] | None = None
    """What this benchmark sets for the methods that have it, because weights or sizes demand it."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers has to know about the model."""

    @property
    def device(self) -> torch.device:
        """Where the prompts have to be."""
        return self.host.embedding.weight.device  # type: ignore[return-value]  # nn.Module attributes are untyped

    def weights(self) -> dict[str, Any]:
        """Their number, bytes and dtype, for the record."""
        parameters = list(self.model.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "bytes": sum(p.nbytes for p in parameters),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


def load_subject(asked: Asked) -> Subject:
    """The model that is asked for. Raises `LoadError` and `ConfigError`."""
    if asked.geometry is not None:
        return _random_subject(asked, asked.geometry)
    model, processor = load(asked.model, dtype=_dtype(asked.dtype) or "auto", device=asked.device)
    return Subject(model, find_host(model), processor)


def _random_subject(asked: Asked, name: str) -> Subject:
    on_cpu = check_device(asked.device) == "cpu"
    config = model_config(name)
    whole = sizes(config).geometry
    advice = method_class("ivtp").recommended_options(whole, sizes(name).recommended)
    options: dict[str, Any] = {"guide": "text", **advice}
    notes = ["random weights and ids: guide=text, the mean of the text behind the last image, leads the decoder's cuts"]
    if asked.layers is not None:
        config = slice_layers(config, *asked.layers)
        options["llm_layers"] = scale_layers(options["llm_layers"], asked.layers[1], whole.text_layers)
        notes.append(
            f"a slice: {asked.layers[0]} of {whole.vision_layers} encoder and {asked.layers[1]} of "
            f"{whole.text_layers} decoder layers, llm_layers={options['llm_layers']}"
        )
    dtype = _dtype(asked.dtype) or (torch.float32 if on_cpu else torch.bfloat16)
    model = random_model(config, dtype=dtype, device=asked.device, seed=asked.seed)
    return Subject(model, find_host(model), None, options, tuple(notes))


def slice_layers(config: Any, vision: int, text: int) -> Any:
    """The same sizes with `vision` encoder layers that reach the projector and `text` decoder layers.

    Encoder layers behind the feature layer stay. Raises `ConfigError` for more layers than there are.
    """
    whole = sizes(config).geometry
    if not 1 <= vision <= whole.vision_layers or not 1 <= text <= whole.text_layers:
        raise ConfigError(
            f"--layers {vision},{text} is no slice of {whole.vision_layers} encoder layers that reach the projector "
            f"and {whole.text_layers} decoder layers; use 1..{whole.vision_layers},1..{whole.text_layers}"
        )
    config = copy.deepcopy(config)
    config.vision_config.num_hidden_layers += vision - whole.vision_layers
    if config.vision_feature_layer >= 0:
        config.vision_feature_layer = vision
    config.text_config.num_hidden_layers = text
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:text]
    return config


def scale_layers(llm_layers: int, text: int, of: int, group: int = 3) -> int:
    """W for a slice of `text` of `of` decoder layers: in proportion, whole groups, at least one, at most `text`."""
    return min(max(group, round(llm_layers * text / of / group) * group), text)


def random_model(config: Any, *, dtype: torch.dtype, device: str, seed: int) -> nn.Module:
    """The stock model of a config, with seeded small weights and norms of one; its own initialisation never runs."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    with LOADING, init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    draw = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, empty in module._parameters.items():
            if empty is not None:
                weight = torch.empty(empty.shape, dtype=dtype, device=device)
                is_norm = weight.dim() == 1 and name == "weight"
                weight.fill_(1.0) if is_norm else weight.normal_(std=0.02, generator=draw)
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    any_model: Any = model
    any_model.tie_weights()
    return model.to(device).eval()


def _dtype(name: str) -> torch.dtype | None:
    return None if name == "auto" else getattr(torch, name)
