"""What the command line's arguments mean, and which of them are refused before a model is loaded."""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Literal

import typer

from ivtp.cli.door import interruptible
from ivtp.config import PruneConfig, check_none
from ivtp.errors import ConfigError, IvtpError
from ivtp.registry import method_name, names_in


def flag(*names: str, **more: Any) -> Any:
    """An option without a value, and without the type that typer would show for one."""
    return typer.Option(*names, metavar="", **more)


Model = Annotated[str, typer.Option("--model", "-m", help="micro (the embedded model), a folder, or a hub id.")]
Method = Annotated[str, typer.Option(help="A method that `ivtp methods` lists; none keeps every token.")]
Keep = Annotated[
    str, typer.Option("--keep", "-k", help='Visual tokens kept of each image: a number, or a share as "11%".')
]
Threshold = Annotated[float | None, typer.Option(help="Relevance above which a word guides; default: the model's.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the methods that draw at random.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Another option of PruneConfig or of the method; repeatable."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="What to compute in; auto is float32 on a CPU, else the checkpoint's own."),
]
Clip = Annotated[str | None, typer.Option(help="Folder or hub id of the CLIP text side; default: the model's own.")]
Quiet = Annotated[bool, flag("--quiet", "-q", help="Print answers and errors, nothing else.")]
Json = Annotated[bool, flag("--json", help="Print one JSON document.")]

RESERVED = frozenset(
    {
        *("model", "processor", "image", "question", "method", "keep", "max_new_tokens", "clip", "config", "options"),
        *("text_tokens", "batch", "images", "image_size", "instruction_tokens", "compressor"),
    }
)
"""What `ask`, `attach` and `flops` take for themselves: no option may have such a name."""


def parse_keep(text: str) -> int | str:
    """A number of tokens, or a share such as "11%" as it is."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text, re.ASCII) else text


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Width and height in pixels, of a text such as "640x480"."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text, re.ASCII)
    if found is None:
        raise ConfigError(f"--image-size {text} is no size; write width and height in pixels, for example 640x480")
    return int(found[1]), int(found[2])


def parse_options(given: list[str] | None, context: typer.Context, **flagged: Any) -> dict[str, Any]:
    """`name=value` pairs: a value that is JSON is what it says, `1,2` is a tuple, anything else stays text.

    `flagged` are options that the command has flags for; None: not given. Refuses the command's own flags and
    `RESERVED` names among the pairs.
    """
    flags = _flags(context)
    options = {name: value for name, value in flagged.items() if value is not None}
    for pair in given or []:
        name, separator, text = pair.partition("=")
        asked = f"--option {shlex.quote(pair)}"
        if not separator or not name:
            raise ConfigError(f"{asked} is not NAME=VALUE; write for example --option guide=visual")
        if name in flags:
            raise ConfigError(f"{asked} sets what the command has a flag for; use {flags[name]} {shlex.quote(text)}")
        if name in RESERVED:
            raise ConfigError(f"{asked}: {name} is no option of PruneConfig or of a method; leave it out")
        options[name] = parse_value(text)
    return options


def parse_value(text: str) -> Any:
    """What a text says where it is JSON, `1,2` as a tuple, or the text itself."""
    listed = text if text.startswith("[") else f"[{text.removesuffix(',')}]" if "," in text else text
    try:
        value = json.loads(listed)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def check_asked(method: str, keep: str, options: dict[str, Any]) -> str:
    """Refuse what is wrong in itself before a model, or torch, is loaded; gives the method's registered name."""
    name = method_name(method)
    config = PruneConfig.of(method=name, keep=parse_keep(keep), **options)
    if name == "none":
        check_none(config)
    else:
        if config.options or name not in names_in("methods"):
            from ivtp.registry import method_class  # which knows pairs, what is near, and a method's own options

            method_class(name).options_of(config)
    return name


def spoken(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors name the flags that it has, and that says what Ctrl-C has left."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with interruptible(lambda: "nothing was written"):
            try:
                return command(*args, **kwargs)
            except IvtpError as error:
                context = kwargs.get("context")
                raise type(error)(in_flags(str(error), context) if context else str(error)) from error

    return wrapper


def in_flags(text: str, context: typer.Context) -> str:
    """An error of the library in the words of the command line: `keep=600` is `--keep 600` there."""
    flags = _flags(context)
    given = {pair.partition("=")[0] for pair in context.params.get("option") or []}
    known = {field.name for field in fields(PruneConfig)} | given
    if "ivtp.methods.ivtp" in sys.modules:  # where it is not, no torch is either, and the error is not of a method
        known |= {field.name for field in fields(sys.modules["ivtp.methods.ivtp"].Options)}
    if "clip" in flags:
        text = _CLIP.sub("--clip with", text).replace("clip=...", "--clip")

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[2].strip("'\"")
        if name in flags:
            return f"{flags[name]} {shlex.quote(value)}"
        return f"--option {name}={value}" if name in known else found[0]

    text = _TUPLE.sub(lambda found: re.sub(r"[ ()]", "", found[0]).removesuffix(","), text)
    return _ASSIGNED.sub(flag, text)


_CLIP = re.compile(r"clip=\(\w+, (?:its )?tokenizer\),")
_TUPLE = re.compile(r"\(\d+(?:, \d+)*,?\)")
_ASSIGNED = re.compile(r"(?<![\w-])(?<!--option )(?<!--option ')([a-z_]+)=('[^']*'|\"[^\"]*\"|[^\s;:()]*[^\s;:(),.])")


def _flags(context: typer.Context) -> dict[str, str]:
    """The command's options by their names in Python."""
    return {
        str(p.name): next((o for o in p.opts if o.startswith("--")), p.opts[0])
        for p in context.command.params
        if p.param_type_name == "option"
    }
