"""From a model to a pruner: which family it is of, and what its method reads the instruction with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from ivtp import registry
from ivtp.config import PruneConfig
from ivtp.errors import ConfigError, UnsupportedModelError
from ivtp.files.sidecar import TRAINED
from ivtp.guide.clip import ClipText
from ivtp.guide.pseudo_cls import GuideMaker, reads_question
from ivtp.hosts.base import Host
from ivtp.methods.base import Method
from ivtp.plug.calls import Equipment
from ivtp.plug.pruner import Pruner, check_uncompressed, check_unpruned
from ivtp.prompt.instruction import InstructionReader
from ivtp.stock import execution_device, floating_dtype


def attach(
    model: nn.Module,
    processor: Any = None,
    config: PruneConfig | None = None,
    *,
    clip: Any = None,
    **options: Any,
) -> Pruner:
    """Prune the visual tokens of every prompt that `model` reads from now on.

    `processor` lets instruction guides read the prompt's text; without one the guides "text" and "visual" work.
    Either `config`, or its fields and the method's own options as keywords: `method` is a registered name or a
    `Method` class of your own, `keep` the visual tokens of each image that remain. What is not said follows the
    checkpoint's recommendation. `clip` is the CLIP text side: `(CLIPModel, tokenizer)`, a folder or a
    hub id; None asks the host.

    Raises `UnsupportedModelError`, `ConfigError`, `LoadError`, or `AttachError` where a pruner is attached already;
    the model is unchanged then.
    """
    host = find_host(model)
    check_unpruned(host)
    check_uncompressed(host)
    if config is None:
        config = PruneConfig.of(**{**_trained(host, options), **options})
    elif not isinstance(config, PruneConfig):
        raise ConfigError(f"config={config!r} is no PruneConfig; name options, as in attach(model, method='topk')")
    elif options:
        raise ConfigError(f"got a PruneConfig and {', '.join(options)} beside it; put everything into one of them")
    pruner = Pruner(host, functools.partial(equip, host, processor, clip), config)
    pruner.install()
    return pruner


def _trained(host: Host, options: Mapping[str, Any]) -> dict[str, Any]:
    """The method and `keep` that the checkpoint was trained with, unless `options` name another method."""
    told = host.recommended().get(TRAINED, {})
    method = told.get("method", "none")
    if method == "none" or _registered(options.get("method", method)) != method:
        return {}
    return {name: told[name] for name in ("method", "keep") if name in told}


def _registered(method: str | type[Any]) -> str | type[Any]:
    return registry.method_name(method) if isinstance(method, str) else method


def equip(host: Host, processor: Any, clip: Any, config: PruneConfig) -> Equipment:
    """The method that `config` asks for on `host`, and what it reads the instruction with."""
    config = dataclasses.replace(config, method=_registered(config.method))  # as checkpoints name what they recommend
    method: Method = registry.method_on(host, config)
    return Equipment(method, _guide_maker(host, method, processor, clip))


def find_host(model: nn.Module) -> Host:
    """The host of `model`, also when it is wrapped (by PEFT, say). Raises `UnsupportedModelError` with the list."""
    hosts = registry.host_classes().values()
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for host in hosts:
            if type(module).__name__ == host.model_class and host.matches(module.config):
                found: Host = host(module)
                return found
    names = ", ".join(host.name for host in hosts)
    hint = "; pass the model itself, ivtp.load(...)[0]" if not isinstance(model, nn.Module) else ""
    raise UnsupportedModelError(
        f"{type(model).__name__} is no model that can be pruned; stock ones of these families can: {names}{hint}"
    )


def _guide_maker(host: Host, method: Method, processor: Any, clip: Any) -> GuideMaker:
    options = method.guide_options
    reader = InstructionReader(processor, host.writes) if processor is not None and reads_question(method) else None
    if not method.reads_text_side:
        return GuideMaker(options, host, reader, None)
    if reader is None:
        asker, ways = f"method {method.config.method!r}", ""
        if options is not None and not method.reads_clip:
            asker, ways = f'guide="{options.guide}"', ', or guide="text" or guide="visual"'
        raise ConfigError(f"{asker} reads the instruction; pass the processor{ways}")
    source = clip if clip is not None else host.default_clip()
    if source is None:
        raise ConfigError(
            "no CLIP text side is known for this model's vision tower; pass clip=(CLIPModel, tokenizer), a folder or "
            "a hub id" + ("" if method.reads_clip else ', or use guide="text" or guide="visual"')
        )
    tower = host.vision.layers[0]
    text_side = ClipText.load(
        source, vision_hidden=host.size.vision_hidden, device=execution_device(tower), dtype=floating_dtype(tower)
    )
    return GuideMaker(options, host, reader, text_side)
