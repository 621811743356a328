"""Attach a pruning method to a stock transformers model, and take it off again without a trace."""

from ivtp.plug.changes import exclusive
from ivtp.plug.entry import attach, find_host
from ivtp.plug.pruner import Pruner, check_unpruned, detach, pruner_of

__all__ = ["Pruner", "attach", "check_unpruned", "detach", "exclusive", "find_host", "pruner_of"]
