"""The contestants: the full model, the oracle, and every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from ivtp.benchmark.asked import Asked, taken
from ivtp.benchmark.models import Subject
from ivtp.config import PruneConfig
from ivtp.guide.pseudo_cls import GuideMaker
from ivtp.hosts.base import Host
from ivtp.methods.base import Cut, Method, MethodInfo, Plan, Window
from ivtp.plan import Geometry
from ivtp.plug import Pruner, attach
from ivtp.plug.calls import Equipment
from ivtp.registry import method_class

Runs = dict[str, Pruner | None]
"""By name, all detached; None is the untouched model."""


class Oracle(Method):
    """Cuts where another method cuts, to the same counts, without taps, guide or scores: the first patches stay."""

    info = MethodInfo("Oracle", 2024, "both", paper="(yardstick)")
    reads = frozenset(field.name for field in dataclasses.fields(PruneConfig))  # the followed method checks them

    def __init__(self, config: PruneConfig, geometry: Geometry) -> None:
        self._followed: Method = method_class(config.method)(config, geometry)
        super().__init__(dataclasses.replace(config, keep=self._followed.keep, options={}), geometry)

    def make_plan(self) -> Plan:
        """The followed method's cuts, with nothing to read."""
        return Plan(tuple(Cut(c.where, c.layer, c.keep, place=c.place) for c in self._followed.plan.cuts))

    def score(self, window: Window) -> Tensor:
        """The lower the patch, the better: fixed beforehand."""
        return -window.patch.float()


def make_runs(subject: Subject, asked: Asked, keep: int | str) -> Runs:
    """full, then each method behind an oracle of its own: that of the first is "oracle"."""
    runs: Runs = {"full": None}
    for method in asked.methods:
        config, host = config_for(subject, asked, method, keep), subject.host
        oracle = Pruner(host, partial(_equip_oracle, host), config)
        runs[f"oracle {method}" if "oracle" in runs else "oracle"] = oracle
        with attach(subject.model, subject.processor, config) as pruner:
            runs[method] = pruner
    return runs


def _equip_oracle(host: Host, config: PruneConfig) -> Equipment:
    return Equipment(Oracle(config, host.size), GuideMaker(None, host, None, None))


def oracle_of(run: str, runs: Iterable[str]) -> str:
    """The run that is handed the token counts of `run` for free; the full model is compared with the first one."""
    own = f"oracle {run}"
    return run if run.startswith("oracle") else own if own in runs else "oracle"


def config_for(subject: Subject, asked: Asked, method: str, keep: int | str) -> PruneConfig:
    """The options of one method: the model's recommendations that it reads, then what was asked."""
    kind, names = method_class(method), taken(method)
    demanded = {name: value for name, value in (subject.options or {}).items() if name in names}
    config = PruneConfig.of(**{**demanded, **asked.values_for(method), "method": method, "keep": keep})
    filled: PruneConfig = kind.filled(config, subject.host.size, subject.host.recommended())
    return filled


@contextmanager
def attached(pruner: Pruner | None) -> Iterator[None]:
    """The model with the pruner's hooks in; they are out again afterwards, whatever happens."""
    if pruner:
        pruner.install()
    try:
        yield
    finally:
        if pruner:
            pruner.detach()
