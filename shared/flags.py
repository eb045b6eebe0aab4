"""Reads flags, a YAML file and environment variables into a `ServeConfig`. All names are those of
its fields. LightLLM's other flags are in `compat_flags.py`."""

import argparse
import dataclasses
import difflib
import logging
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .compat_flags import FAMILIES, FLAGS, REFUSED_FAMILIES, VARIABLES, CompatFlag
from .config import FIELD_GROUPS, ServeConfig, environment, flag_fields
from .errors import ConfigError, UsageError
from .secrets import key_digest

logger = logging.getLogger(__name__)

_TRUTH = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(
    ("false", "0", "no", "off", ""), False
)


def parse_serve_args(
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    refused: list[str] | None = None,
) -> ServeConfig:
    """Flags win over the `--config` YAML file, this over environment variables (None: those of this
    process), these over defaults. Warns about each accepted flag that has no effect. Raises
    UsageError for flags that do not parse, and ConfigError for refused flags, bad files and bad
    variables. With a list for the `refused` flags, they are described there instead."""
    environ = environment() if environ is None else environ
    values = _from_environment(environ)
    parser = serve_parser()
    flags = _parse(parser, _canonical(argv))
    config_file = flags.pop("config", None)
    if config_file is not None:
        try:
            flags = _parse(parser, _yaml_flags(parser, Path(config_file))) | flags
        except UsageError as error:
            raise ConfigError(f"--config {config_file}: {error}") from error
    for name in flag_fields().keys() & flags.keys():
        value = flags.pop(name)
        values[name] = tuple(value) if isinstance(value, list) else value
    refusals = _check_compat_flags(flags)
    if refused is not None:
        refused += refusals
    elif refusals:
        raise ConfigError("\n  ".join(refusals))
    return ServeConfig(**values | _digests(values))


def serve_parser(
    command: str = "glimmer serve", description: str = "Serve a GLM-4.7-Flash checkpoint over HTTP."
) -> argparse.ArgumentParser:
    """Parser for all flags. Flags that are not given are absent from its namespace. `command` and
    `description` appear in its help."""
    parser = _Parser(
        prog=command,
        usage=f"{command} DIR [options], or {command} --model_dir DIR [options]",
        description=description,
        epilog="Flags may be written with dashes or underscores. LightLLM's other flags are "
        "accepted if the server is the same without them: see docs/configuration.md.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of flags; flags on the command line win"
    )
    group: argparse._ActionsContainer = parser
    for field in flag_fields().values():
        if field.name in FIELD_GROUPS:
            group = parser.add_argument_group(FIELD_GROUPS[field.name])
        _add_field(group, field)
    for flag in FLAGS:
        _add_compat_flag(parser, flag)
    return parser


def _digests(values: Mapping[str, Any]) -> dict[str, Any]:
    """The secret fields among `values`, each key replaced by its digest. An empty key would let
    everybody in: raises ConfigError."""
    result = {}
    for name, field in flag_fields().items():
        if field.metadata.get("secret") and name in values:
            keys = values[name]
            if not all(key.isprintable() and key.strip() == key != "" for key in keys):
                raise ConfigError(f"--{name}: a key is empty, or has a blank at an end")
            result[name] = tuple(key_digest(key) for key in keys)
    return result


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def field_type(name: str) -> tuple[type, bool]:
    """Type of one value of a ServeConfig field, and whether the field holds several values."""
    hint = typing.get_type_hints(ServeConfig)[name]
    options = [t for t in typing.get_args(hint) if t is not type(None)]
    if typing.get_origin(hint) is tuple:
        return options[0], True
    inner = options[0] if options else hint
    if typing.get_origin(inner) is tuple:
        return typing.get_args(inner)[0], True
    return inner, False


def _add_field(group: argparse._ActionsContainer, field: "dataclasses.Field[Any]") -> None:
    names = [f"--{n}" for n in (field.name, field.metadata.get("alias")) if n]
    kind, has_many = field_type(field.name)
    text = field.metadata["help"]
    if kind is bool:
        group.add_argument(*names, dest=field.name, action="store_true", help=text)
        return
    if field.default not in (None, "", (), ("auto",)) and "default:" not in text:
        text += f" (default {field.default})"
    choices = field.metadata.get("choices")
    action = "extend" if field.metadata.get("repeatable") else "store"
    if field.metadata.get("secret"):  # one value each, so that no other argument becomes a key
        action, has_many = "append", False
    group.add_argument(
        *names,
        dest=field.name,
        action=action,
        type=str.lower if field.name == "log_level" else kind,
        choices=choices,
        nargs="+" if has_many else None,
        metavar=None if choices else kind.__name__.upper(),
        help=text.replace("%", "%%"),
    )


def _add_compat_flag(parser: argparse.ArgumentParser, flag: CompatFlag) -> None:
    options: dict[str, Any] = {"dest": flag.name, "help": argparse.SUPPRESS}
    if flag.kind == "flag":
        options["action"] = "store_true"
    elif flag.kind == "append":
        options["action"] = "append"
    else:
        options["type"] = {"int": int, "float": float}.get(flag.kind, str)
        options["choices"] = flag.choices or None
    parser.add_argument(*(f"--{name}" for name in (flag.name, *flag.aliases)), **options)


def _canonical(argv: Sequence[str]) -> list[str]:
    """Replace dashes in flag names by underscores."""
    result = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            word = f"--{name[2:].replace('-', '_')}{equals}{value}"
        result.append(word)
    return result


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> dict[str, Any]:
    known = parser._option_string_actions
    _admit_families(parser, argv)
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        name = next((w for w in rest if w.startswith("-")), rest[0]).partition("=")[0]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; glimmer serve --help lists them"
        kind = "unknown flag" if name.startswith("-") else "unexpected argument"
        raise UsageError(f"{kind} {name}{hint}")
    return vars(namespace)


def _admit_families(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the flags in `argv` that belong to FAMILIES to the parser."""
    for word in argv:
        name = word.partition("=")[0]
        known = name in parser._option_string_actions
        if not known and name.startswith(tuple(f"--{prefix}" for prefix in FAMILIES)):
            parser.add_argument(name, nargs="*", help=argparse.SUPPRESS)


def _check_compat_flags(values: dict[str, Any]) -> list[str]:
    """Warn about ignored flags. Returns the texts about refused ones."""
    table = {flag.name: flag for flag in FLAGS}
    refused = []
    for name, value in values.items():
        flag = table.get(name)
        family = next((prefix for prefix in FAMILIES if name.startswith(prefix)), "")
        reason = flag.reason if flag else FAMILIES[family]
        if not (flag.refused if flag else family in REFUSED_FAMILIES):
            logger.warning("--%s has no effect: %s", name, reason)
        elif flag is None or value != flag.default:
            shown = " ".join(value) if isinstance(value, list) else str(value)
            text = f"--{name}" if value is True else f"--{name} {shown}"
            refused.append(f"{text} is not supported: {reason}")
    return refused


def _yaml_flags(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """Convert a YAML mapping to flags. Raises ConfigError."""
    import yaml  # slow to import, and most starts have no file

    try:
        mapping = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"--config {path}: needs 'flag: value' lines")
    _admit_families(parser, [f"--{key}" for key in mapping])
    flags: list[str] = []
    for key, value in mapping.items():
        name = f"--{str(key).replace('-', '_')}"
        action = parser._option_string_actions.get(name)
        if action is None or name in ("--config", "--help"):
            near = difflib.get_close_matches(name, parser._option_string_actions, n=1)
            hint = f"; did you mean {near[0][2:]}?" if near else ""
            raise ConfigError(f"--config {path}: unknown key {key!r}{hint}")
        takes_value = action.nargs != 0
        if takes_value == isinstance(value, bool) or isinstance(value, dict):
            expected = "a value" if takes_value else "true or false"
            shown = "a mapping" if isinstance(value, dict) else repr(value)
            raise ConfigError(f"--config {path}: {key} is {shown}, needs {expected}")
        if isinstance(value, list):
            one_each = action.nargs is None
            flags += [f"{name}={v}" for v in value] if one_each else [name, *map(str, value)]
        elif value is True:
            flags.append(name)
        elif value is not None and value is not False:
            flags.append(f"{name}={value}")
    return flags


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Fields set by environment variables. Raises ConfigError naming one that does not parse."""
    values: dict[str, Any] = {}
    for name, field in flag_fields().items():
        variable = field.metadata.get("env")
        text = environ.get(variable, "") if variable else ""
        if field.metadata.get("secret") and variable in environ:
            values[name] = (text,)
            continue
        if not text:
            continue
        kind, _ = field_type(name)
        try:
            value: Any = _TRUTH[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            message = f"environment variable {variable}={text!r}: not a {kind.__name__}"
            raise ConfigError(message) from None
        value = text.lower() if name == "log_level" else value
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            known = ", ".join(map(str, choices))
            raise ConfigError(f"environment variable {variable}={text!r}: needs one of {known}")
        values[name] = value
    for variable, reason in VARIABLES.items():
        if variable in environ:
            logger.warning("environment variable %s has no effect: %s", variable, reason)
    return values
