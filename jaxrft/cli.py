"""The command line: jaxrft train, eval and prepare, each with a CONFIG and flags, and jaxrft
simulate.
"""

import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import Field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from jaxrft import __version__
from jaxrft.errors import InputError
from jaxrft.host import compile_cache, crash, terminal, xla_options

if TYPE_CHECKING:
    from jaxrft.config import Config
    from jaxrft.train import results


class _Options(Protocol):
    """The options of a command that takes a CONFIG: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, "Field"]]

    @property
    def config(self) -> "Config": ...


Held = TypeVar("Held", bound=_Options)

PREPARATIONS = """\
  dataset     make a TFDS data set from the files of a published one; without
              arguments, list the known ones
  pass-rates  roll a policy out on the config's tasks; its pass rates become
              a column of --out FILE.parquet
  embeddings  write the policy's embeddings of the config's prompts to
              --out FILE.safetensors, for tasks.embeddings
  predictor   train a predictor of pass rates by similar tasks (dots), on
              several policies' pass rates and embeddings, and score it; with
              --responses FILE.npz in place of CONFIG, on a response matrix"""
PREPARE_USAGE = f"""usage: jaxrft prepare WHAT [CONFIG] [flags]

WHAT is one of
{PREPARATIONS}

  jaxrft prepare dataset gsm8k --file train.jsonl
  jaxrft prepare pass-rates configs/quickstart.py --out rates.parquet
  jaxrft prepare embeddings configs/quickstart.py --out embeddings.safetensors
`jaxrft prepare WHAT --help` explains its flags.
"""
USAGE = f"""usage: jaxrft COMMAND [CONFIG] [flags]

commands:
  train       finetune a policy, or resume the run in the config's output_dir
  eval        evaluate a policy, or a checkpoint of a run, on the config's
              held-out tasks, or on files of benchmarks:
              jaxrft eval --suite math500=FILE --model MODEL
  export      write the policy of a run's checkpoint as a Hugging Face folder:
              jaxrft export RUN [--step N] [--out FOLDER]
  report      write a page about runs, an HTML file:
              jaxrft report RUN [RUN ...] [--out page.html]
  simulate    compare selectors without a language model, and without CONFIG
  prepare     make what selectors need: jaxrft prepare WHAT, one of
{textwrap.indent(PREPARATIONS, "  ")}

CONFIG is a .py file that defines `config = Config(...)`, a .yaml or .json file
of its fields, or the config.json of a run; every field is a flag, too:
  jaxrft train configs/quickstart.py --steps 20 --output-dir runs/a
  jaxrft train configs/quickstart.py --select.name adaptive --dry-run
  jaxrft train runs/a/config.json --steps 40
  jaxrft eval configs/quickstart.py --model runs/quickstart
  jaxrft eval configs/quickstart.py --checkpoint 80
  jaxrft export runs/quickstart --step 80
`jaxrft train --help` explains every field, `jaxrft COMMAND --help` the flags of
a command, `jaxrft --version` says which version this is.
"""
# 128 + SIGTERM, as schedulers expect of a job that saved and ended, after any signal
STOPPED = 143
GRACE = 3.0  # seconds for the other processes, when one of them ends by a mistake
_BENCH = (
    "jaxrft has no command 'bench' any more: in a checkout of its repository, run "
    "`python -m benchmarks.NAME --help`; benchmarks/README.md lists the names"
)
# commands whose results are files; those of the others are what they print
WRITING = ("train", "export", "prepare", "report")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    0: all is done; 1: a bug; 2: a mistake of the user's, a dry run of what could not start, or a
    result that could not be printed; 143: stopped by a signal, and saved. `jaxrft.__main__` answers
    the signals that come before there is anything to save.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with terminal.guarded_streams() as output:
        code = _run(arguments)
        output.flush()
        lost = None if {*arguments[:1]} & {*WRITING} else output.trouble
    # A reader that has closed the pipe wants no more of the result.
    return code if lost is None or isinstance(lost, BrokenPipeError) else code or 2


def _run(arguments: list[str]) -> int:
    """Runs a command with standard streams that never raise; returns its exit code."""
    _set_up()
    commands = {
        "train": _train,
        "eval": _eval,
        "export": _export,
        "prepare": _prepare,
        "report": _report,
        "simulate": _simulate,
    }
    try:
        with crash.reported():
            if not arguments or arguments[0] in ("-h", "--help"):
                terminal.print_page(USAGE)
                return 0 if arguments else 2
            if arguments[0] == "--version":
                terminal.print_page(f"jaxrft {__version__}")
                return 0
            if arguments[0] == "bench":
                raise InputError(_BENCH)
            if arguments[0] not in commands:
                raise InputError(f"no command {arguments[0]!r}: it is one of {', '.join(commands)}")
            compile_cache.enable()
            xla_options.apply(os.environ)
            return commands[arguments[0]](arguments[1:], f"jaxrft {arguments[0]} CONFIG")
    except (InputError, crash.Crash) as error:
        # a Crash may hold a stack trace
        code, keep = (2, "") if isinstance(error, InputError) else (1, "\n")
        print(f"jaxrft: error: {terminal.escaped(str(error), keep=keep)}", file=sys.stderr)
    jax = sys.modules.get("jax")  # not imported, as that may be what failed
    if jax is not None and jax.distributed.is_initialized():
        # At a normal exit JAX waits for the other processes, which wait for this one. When it is
        # gone, JAX ends them, so those that found the same mistake get the time to say so.
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(GRACE)
        os._exit(code)
    return code


def _set_up() -> None:
    """Sets what logging and transformers read when they begin."""
    handler = logging.StreamHandler()
    handler.setFormatter(terminal.SentenceFormatter("jaxrft: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("jaxrft").setLevel(logging.INFO)
    # "PyTorch was not found" is as it should be
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _config(arguments: list[str], prog: str, options: Callable[["Config"], Held]) -> Held:
    """Returns the `options` of the command line, which hold the Config of the file, changed by
    flags.
    """
    from jaxrft import config as configs
    from jaxrft import flags as parser

    path = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if path is not None:
        flags = arguments[1:]
        config = configs.load(path)
    elif {"-h", "--help"} & set(arguments):
        flags = ["--help"]
        config = configs.Config("model", configs.TasksConfig(), "run")
    else:
        raise InputError(
            f"no config given: {prog} [flags], CONFIG a .py, .yaml or .json file such as "
            "configs/quickstart.py"
        )
    configs.check_flags(flags)
    description = (
        f"Flags change the config file {path or 'CONFIG'}, whose values are the defaults below."
    )
    default = options(config)
    result = parser.parse(
        type(default),
        flags,
        prog,
        default=default,
        description=description,
        groups=configs.GROUPS,
    )
    if path is not None:  # flags may name other rewards than the file
        changed = configs.search_for_rewards(result.config, Path(path).parent)
        result = replace(result, config=changed)
    return result


def _train(arguments: list[str], prog: str) -> int:
    from jaxrft import dry_run
    from jaxrft.train import loop

    options = _config(arguments, prog, dry_run.Options)
    if options.dry_run or options.topology is not None:
        return 0 if dry_run.show(options.config, options.topology) else 2
    with crash.reported(Path(options.config.output_dir)):
        _, finished = loop.advance(options.config)
    return 0 if finished else STOPPED


def _eval(arguments: list[str], prog: str) -> int:
    from jaxrft.train import results

    arguments = with_newest(arguments)
    if arguments and arguments[0].startswith("-") and _has_flag(arguments, "suite"):
        options = _suites(arguments, prog.removesuffix(" CONFIG"))
    else:
        options = _config(arguments, prog, results.Options)
    for line in results.run(options):
        print(terminal.escaped(line))
    return 0


def _has_flag(arguments: list[str], name: str) -> bool:
    return any(each.partition("=")[0] == f"--{name}" for each in arguments)


def _suites(arguments: list[str], prog: str) -> "results.Options":
    """Returns the options of an evaluation on suites without a CONFIG."""
    from jaxrft import config as configs
    from jaxrft import flags
    from jaxrft.train import results

    if not ({"-h", "--help"} & set(arguments) or _has_flag(arguments, "model")):
        raise InputError(
            "no model given: add --model MODEL, a folder of a Hugging Face checkpoint, its id on "
            "the hub, or the folder of a run"
        )
    return flags.parse(
        results.Options,
        arguments,
        prog,
        default=results.Options(results.suite_defaults()),
        description="Without a CONFIG, the defaults below are those of evaluations on suites.",
        groups=configs.GROUPS,
    )


def with_newest(arguments: list[str]) -> list[str]:
    """Adds `newest` to a flag --checkpoint that has no value."""
    flagged = []
    for argument, after in zip(arguments, [*arguments[1:], "--"], strict=True):
        flagged.append(argument)
        if argument == "--checkpoint" and after.startswith("-"):
            flagged.append("newest")
    return flagged


def _export(arguments: list[str], prog: str) -> int:
    from jaxrft import flags
    from jaxrft.train import export

    options = flags.parse(export.Options, arguments, prog.removesuffix(" CONFIG"))
    print(terminal.escaped(export.main(options)))
    return 0


def _prepare(arguments: list[str], prog: str) -> int:
    kinds = {
        "dataset": _prepare_dataset,
        "pass-rates": _prepare_pass_rates,
        "embeddings": _prepare_embeddings,
        "predictor": _prepare_predictor,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        terminal.print_page(PREPARE_USAGE)
        return 0 if arguments else 2
    if arguments[0] not in kinds:
        raise InputError(f"jaxrft prepare makes {', '.join(kinds)}, not {arguments[0]!r}")
    return kinds[arguments[0]](arguments[1:], prog.replace("prepare", f"prepare {arguments[0]}"))


def _prepare_dataset(arguments: list[str], prog: str) -> int:
    from jaxrft.prepare import dataset

    return dataset.main(arguments, prog.removesuffix(" CONFIG"))


def _prepare_pass_rates(arguments: list[str], prog: str) -> int:
    import tyro

    from jaxrft.prepare import pass_rates

    options = _config(arguments, prog, lambda config: pass_rates.Options(config, out=tyro.MISSING))
    return 0 if pass_rates.run(options) else STOPPED


def _prepare_embeddings(arguments: list[str], prog: str) -> int:
    import tyro

    from jaxrft.prepare import embeddings

    options = _config(arguments, prog, lambda config: embeddings.Options(config, out=tyro.MISSING))
    return 0 if embeddings.run(options) else STOPPED


def _prepare_predictor(arguments: list[str], prog: str) -> int:
    import tyro

    from jaxrft import flags
    from jaxrft.prepare import predictor

    if arguments and arguments[0].startswith("--responses"):
        program = prog.removesuffix(" CONFIG")
        options = flags.parse(predictor.ResponsesOptions, arguments, program)
    else:
        options = _config(
            arguments, prog, lambda config: predictor.Options(config=config, out=tyro.MISSING)
        )
    predictor.main(options)
    return 0


def _report(arguments: list[str], prog: str) -> int:
    from jaxrft.report import page

    return page.main(arguments, prog.removesuffix(" CONFIG"))


def _simulate(arguments: list[str], prog: str) -> int:
    from jaxrft.simulate import command

    return command.main(arguments, prog.removesuffix(" CONFIG"))


if __name__ == "__main__":
    from jaxrft.__main__ import main as program

    sys.exit(program())
