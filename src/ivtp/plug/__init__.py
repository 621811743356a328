"""Attach a pruning method to a stock transformers model, and take it off again without a trace."""

from ivtp.plug.changes import exclusive
from ivtp.plug.compressing import Compression, compress, compression_of
from ivtp.plug.entry import attach, find_host
from ivtp.plug.pruner import Pruner, check_unpruned, detach, pruner_of

__all__ = [
    "Compression",
    "Pruner",
    "attach",
    "check_unpruned",
    "compress",
    "compression_of",
    "detach",
    "exclusive",
    "find_host",
    "pruner_of",
]
