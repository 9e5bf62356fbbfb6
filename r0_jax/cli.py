"""Starts and ends the commands `python -m r0_jax.X`: flags, config file, one-line errors."""

import difflib
import functools
import logging as python_logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from r0_jax import machine, paths, signals, streams
from r0_jax.config import make_paths_absolute
from r0_jax.errors import BUG, ConfigError, InputError, disk_problem, explain, printable
from r0_jax.files import check_regular, naming

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help then lists --config under the program that defines it

# absl describes other types itself (`syntactic_help`).
_EXPECTED = {"bool": "true or false", "config_literal": "a Python literal"}
_PACKAGE = Path(__file__).parent
# Options of JAX that decide what a seed draws, and dtypes: the program relies on these values.
_JAX_OPTIONS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run `main([program])` under absl and exit.

    Errors of users give one line on stderr and exit status 2: invalid flags or configs,
    `InputError`, a full, read-only or forbidden disk, too little memory, and a backend that does
    not start. Ctrl-C gives 130, SIGTERM 143. Any other exception is a bug and keeps its traceback.
    absl logs warnings and errors to stderr (`--verbosity=0` for more). What a terminal cannot
    print is escaped; a terminal that is gone is no error. Options of JAX that change what a seed
    draws are set back, with a warning.
    """
    try:
        signals.guard()
        streams.guard()
        logging.get_absl_logger().addFilter(_is_news)
        logging.get_absl_handler().setFormatter(_Printable())
        warnings.showwarning = _show_warning
        try:
            _set_jax_options()
            app.run(main, flags_parser=_parse_flags)
        except SystemExit as end:
            if sys.stdout:
                sys.stdout.flush()  # a full disk is an error, told below
            if raised := signals.lost():
                raise raised from None
            signals.end_at_once()
            raise end from None
    except SystemExit:
        raise
    except BaseException as error:
        signals.end_at_once()
        status, line = explain(error)
        if line is not None:
            print(f"error: {_config_file(error)}{line}", file=sys.stderr)
        elif status == BUG:
            raise
        sys.exit(status)


class _Printable(logging.PythonFormatter):
    """absl's formatter, with control characters of files escaped."""

    def format(self, record: python_logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def _set_jax_options() -> None:
    """Set back the options of JAX that a user's shell has changed; warn of them in one line."""
    if not any(name.upper() in os.environ for name in _JAX_OPTIONS):
        return
    import jax  # slow to import, and it reads the shell's options then

    changed = []
    for name, value in _JAX_OPTIONS.items():
        given = os.environ.pop(name.upper(), None)  # nor do programs that this one starts see it
        if getattr(jax.config, name) != value:
            changed.append(f"{name.upper()}={given}")
            jax.config.update(name, value)
    if changed:
        warnings.warn(
            f"ignored, since a seed draws the same images everywhere: {', '.join(changed)}",
            stacklevel=2,
        )


def _show_warning(message: Warning | str, *where: object) -> None:
    """Print a warning as one line, without its line of code."""
    del where
    print(f"warning: {printable(str(message))}", file=sys.stderr)


def define_config(required: bool = True) -> flags.FlagHolder[ConfigDict]:
    """Define the flag `--config=FILE.py[:argument]` and overrides `--config.field=value`.

    Its value is the result of the file's `get_config([argument])`, with overrides, with absolute
    paths, and locked. If configs/NAME.py does not exist, it is the package's own recipe.
    """
    holder = config_flags.DEFINE_config_file(
        "config", help_string="config file: FILE.py", sys_argv=[""]
    )
    # It would read the files of --flagfile here, where no error is told in a line.
    FLAGS["config"]._sys_argv = None
    FLAGS["config"].parser = _ConfigFile()
    if required:
        flags.mark_flag_as_required("config")
    return holder


def define_path(
    name: str, default: str | None, help: str, required: bool = False
) -> flags.FlagHolder[str]:
    """Define a flag that holds a path, in which a leading `~` is expanded."""
    return flags.DEFINE(_Path(), name, default, help, required=required)


def define_paths(name: str, help: str) -> flags.FlagHolder[list[str]]:
    """Define a flag that may be given several times, each a path; `~` is expanded in each."""
    return flags.DEFINE_multi(_Path(), flags.ArgumentSerializer(), name, None, help)


def define_named_paths(name: str, help: str) -> flags.FlagHolder[list[str]]:
    """Define a flag that holds NAME=PATH,NAME=PATH,... as a list; `~` is expanded in each path."""
    return flags.DEFINE(_NamedPaths(), name, None, help, serializer=flags.CsvListSerializer(","))


def config_name() -> str:
    """Return the name of --config: "sdxl_r0_r0plus" for configs/sdxl_r0.py:r0plus."""
    path, *argument = config_flags.get_config_filename(FLAGS["config"]).split(":", 1)
    return re.sub(r"[^\w.-]+", "_", "_".join([Path(path).stem, *argument]))


def _config_file(error: BaseException) -> str:
    """Return the file of --config for an error of it, with a colon; for other errors ""."""
    if not (isinstance(error, ConfigError) and "config" in FLAGS and FLAGS["config"].present):
        return ""
    path, *_ = config_flags.get_config_filename(FLAGS["config"]).split(":", 1)
    return f"{printable(path)}: "


def _parse_flags(argv: list[str]) -> list[str]:
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if found := re.match(r"--?flagfile(?:=(.*))?$", argument, re.DOTALL):
            check_regular(found[1] or following)  # absl would read a device without end
    try:
        arguments = FLAGS(argv)
    except SystemExit:  # --help and similar flags: absl would report failure
        sys.exit(0)
    except flags.UnrecognizedFlagError as error:
        raise InputError(_unknown_flag(error.flagname)) from None
    except flags.IllegalFlagValueError as error:
        raise InputError(_illegal_value(error)) from None
    except flags.Error as error:
        raise InputError(str(error)) from None
    except UnicodeDecodeError:
        raise InputError("--flagfile: the file is not UTF-8 text") from None
    except ValueError as error:  # absl of --noflag=value, numpy of a NUL in a path
        raise InputError(f"{error}; flags are --name=value") from None
    if arguments[1:]:
        # `--flag false` is an error too: absl would read it as --flag=true.
        raise InputError(f"unexpected argument {arguments[1]!r}; flags are --name=value")
    for name in FLAGS:
        flag = FLAGS[name]
        if flag.present and flag.default is None and flag.value == "":
            raise InputError(f"--{name} is empty")  # often an unset shell variable
        infinite = isinstance(flag.value, float) and math.isinf(flag.value)
        if isinstance(flag.value, float) and math.isnan(flag.value):
            raise InputError(f"--{name}=nan is not a number")
        if infinite and not name.startswith("config."):  # there it may mean "no limit"
            raise InputError(f"--{name}={flag.value} is not a finite number")
        if isinstance(flag.value, ConfigDict):
            make_paths_absolute(flag.value)
    if FLAGS["verbosity"].using_default_value:
        FLAGS.verbosity = logging.WARNING  # orbax logs dozens of INFO lines per checkpoint
    return arguments


def _unknown_flag(name: str) -> str:
    if name.startswith("config."):
        return f"--{name} overrides a config file: give --config=FILE.py too"
    fields = []
    if "config" in FLAGS and isinstance(FLAGS["config"].value, ConfigDict):
        fields = [f"config.{field}" for field in _fields(FLAGS["config"].value)]
    return f"unknown flag --{name}" + _did_you_mean(name, [*FLAGS, *fields], prefix="--")


def _illegal_value(error: flags.IllegalFlagValueError) -> str:
    text = str(error)
    if missing := re.findall(r"Flag --(\S+) must have a value other than None", text):
        return "missing " + " and ".join(f"--{name}=..." for name in missing) + " (see --help)"
    text = text.removeprefix("flag ")
    if match := re.match(r"--([^=]+)=", text):
        parser = FLAGS[match[1]].parser
        if expected := parser.syntactic_help or _EXPECTED.get(parser.flag_type()):
            # Drop the reason, such as "invalid literal for int() with base 10".
            return text.removesuffix(f": {error.__context__}") + f": expected {expected}"
    return text


class _ConfigFile(flags.ArgumentParser):
    """Parser of a config file and its overrides, with readable errors.

    ml_collections' own parser reports a missing file only when the config is first read, and
    other mistakes by tracebacks.
    """

    def parse(self, argument: str) -> ConfigDict:
        config = read_config(argument)
        for flag in FLAGS.read_flags_from_files(sys.argv, force_gnu=False):
            if override := re.match(r"--?(?:no)?config\.([^=]*)", flag):
                _check_override(override[1], config)
        return config.lock()

    def flag_type(self) -> str:
        return "config file"


def read_config(argument: str) -> ConfigDict:
    """Return what get_config([argument]) of "FILE.py[:argument]" returns.

    Without configs/X.py it is the package's own recipe. Raises InputError for a file that is
    missing or fails, and where it returns something else than a ConfigDict.
    """
    name, *arguments = argument.split(":", 1)
    path = _find_config(name)
    check_regular(path)
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        known = ", ".join(f"configs/{recipe}" for recipe in sorted(_recipes()))
        raise InputError(
            f"config file {path}: {error.strerror.lower()}; r0_jax comes with {known}"
        ) from None
    if (folder := os.path.dirname(os.path.abspath(path))) not in sys.path:
        sys.path.append(folder)  # a recipe may import a module that lies beside it
    module = {"__name__": "config", "__file__": path}
    try:
        exec(compile(source, path, "exec"), module)
        if "get_config" not in module:
            raise InputError(f"config file {path} does not define get_config()")
        with naming(path):
            config = module["get_config"](*arguments)
    except InputError:
        raise
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise InputError(f"{error.filename or path}{where}: {error.msg}") from None
    except Exception as error:
        if machine.problem(error):
            raise
        raise InputError(_config_problem(path, error)) from None
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise InputError(f"{path}: get_config() returned {kind}, not a ConfigDict")
    _check_tree(config, path, ())
    return config


def _check_tree(section: ConfigDict, path: str, above: tuple[int, ...]) -> None:
    """Raise InputError where a section of a config holds itself, which has no end."""
    above = (*above, id(section))
    for name, value in section.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            if id(value) in above:
                raise InputError(
                    f"{path}: the section {name!r} of the config holds itself: give each section "
                    "its own ConfigDict"
                )
            _check_tree(value, path, above)


class _Path(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return paths.expand(argument)

    def flag_type(self) -> str:
        return "path"


class _NamedPaths(flags.ListParser):
    def parse(self, argument: str | list[str]) -> list[str]:
        pairs = [item.partition("=") for item in super().parse(argument)]
        return [f"{name}{equals}{paths.expand(path)}" for name, equals, path in pairs]


def _find_config(name: str) -> str:
    """Return the config file of a name; without configs/X.py, that of the package."""
    path = paths.expand(name)
    folder, _, file = os.path.normpath(path).partition(os.sep)
    return path if folder != "configs" or os.path.exists(path) else _recipes().get(file, path)


def _recipes() -> dict[str, str]:
    """Return the files of the package's recipes by their names.

    A wheel has them in the package; in a checkout they lie beside it.
    """
    inside = _PACKAGE / "recipes"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "configs"
    found = folder.rglob("[!_]*.py")
    return {str(path.relative_to(folder)): str(path) for path in found}


def _config_problem(path: str, error: Exception) -> str:
    # The last frame in the file itself or in a file beside it, such as an imported base.
    folder = Path(path).resolve().parent
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if Path(frame.filename).resolve().parent == folder]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else path
    # ml_collections wraps one error in another and prints all fields of the config.
    if error.args and isinstance(error.args[0], KeyError):
        error = error.args[0]
    reason = str(error.args[0] if error.args else "")
    reason = re.sub(r' Other fields present: ".*"(\n|$)', " ", reason, flags=re.DOTALL)
    return f"{where}: {type(error).__name__}: {reason}"


def _check_override(field: str, config: ConfigDict) -> None:
    try:
        kind = config_path.get_type(field, config)
    except (LookupError, AttributeError, TypeError, ValueError):
        hint = _did_you_mean(field, list(_fields(config)), quote='"')
        hint = hint or "; it has " + ", ".join(sorted(config))
        raise InputError(f'the config has no field "{field}"{hint}') from None
    if issubclass(kind, ConfigDict):
        inside = list(
            _fields(functools.reduce(lambda part, name: part[name], field.split("."), config))
        )
        raise InputError(
            f"--config.{field} is a section of the config: set one of its fields"
            + (f", such as --config.{field}.{inside[-1]}" if inside else "")
        )
    if kind in (list, type(None)):
        raise InputError(
            f"--config.{field} is {'a list' if kind is list else 'None'} and cannot be set on the "
            "command line; set it in the config file"
        )


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items(preserve_field_references=True):
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")


def _did_you_mean(name: str, names: list[str], prefix: str = "", quote: str = "") -> str:
    last = name.split(".")[-1]
    found = [other for other in names if other.split(".")[-1] == last][:3]
    found = found or difflib.get_close_matches(name, names, n=2, cutoff=0.75)
    said = " or ".join(f"{quote}{prefix}{other}{quote}" for other in found)
    return f"; did you mean {said}?" if said else ""


def _is_news(record) -> bool:
    """Return False for orbax's log of a traceback that `run` will print as one line."""
    error = record.exc_info[1] if record.exc_info else None
    return not (disk_problem(error) or machine.problem(error))
