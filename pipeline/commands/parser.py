"""Argument parsing for all commands: errors are one line and exit code 2."""

from argparse import Action, ArgumentError, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import is_dataclass
from textwrap import fill
from typing import NoReturn

from jsonargparse import ArgumentParser as ConfigParser
from jsonargparse import Namespace
from yaml import YAMLError

from pipeline.config import PretrainConfig
from tiling.errors import UsageError

HELP_WIDTH = 100


class OneLineParser(ArgumentParser):
    """argparse whose errors are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        raise UsageError(message, do=f"see `{self.prog} --help`")


class _Help(RawDescriptionHelpFormatter):
    """Says the default where there is one; keeps the examples' lines."""

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        shown = action.default is not None and action.default is not False and action.option_strings
        return f"{text} (default: %(default)s)" if shown and action.dest != "help" else text


def command_parser(name: str, description: str, *examples: str) -> OneLineParser:
    """Parser of one subcommand, with examples below its options."""
    lines = "\n".join(f"  {example}" for example in examples)
    return OneLineParser(
        prog=f"bony {name}",
        description=fill(description, HELP_WIDTH),
        epilog=f"examples:\n{lines}" if examples else None,
        formatter_class=_Help,
        allow_abbrev=False,
    )


def part_of(text: str) -> tuple[int, int]:
    """``I/N``, such as of a Slurm array: which of how many shares, counted from 1."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ArgumentTypeError(f"is {text!r}, must be I/N with I from 1 to N")
    return int(number), int(count)


def pretrain_config(words: Sequence[str]) -> PretrainConfig:
    """A PretrainConfig from ``--config FILE`` and dotted overrides that follow it.

    Raises:
        UsageError: An unknown key, a value of the wrong type or out of range, or an override before ``--config``,
            which the file would silently win over.
    """
    parser = ConfigParser(
        prog="bony pretrain",
        description="Pretrain an encoder on a TileStore. Under torchrun: torchrun -m pipeline.pretrain, same options.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; keys as below, nested")
    parser.add_class_arguments(PretrainConfig)
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    if "--config" in flags[1:]:
        raise UsageError(f"{flags[0]} stands before --config, which would win over it", do="put --config first")
    try:
        values = parser.parse_args(list(words))
        for name, section in PretrainConfig.__dataclass_fields__.items():
            if is_dataclass(section.type) and not isinstance(values[name], Namespace):
                raise UsageError(f"{name} is {values[name]!r}, must be a section of keys")
        built = parser.instantiate(values)
    except (ArgumentError, YAMLError, OSError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UsageError(text, do="see `bony pretrain --help`") from error
    fields = {name: built[name] for name in PretrainConfig.__dataclass_fields__}
    return PretrainConfig(**fields)
