"""The command line. Each command parses, then calls one function; heavy imports wait until then."""

import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from hinge.cli import (
    checking,
    configuration,
    evaluation,
    experiments,
    histology,
    sampling,
    sharing,
    slides,
    training,
    viewing,
)
from hinge.utils.errors import HingeError, Interrupted
from hinge.utils.threads import prepare_cpu


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which then tidies up as Ctrl-C does."""

    received = False  # Ray raises a KeyboardInterrupt of its own in place of one that interrupts it


def _terminate(number: int, frame: object) -> None:
    _Terminated.received = True
    raise _Terminated


class _Commands(typer.core.TyperGroup):
    """Commands whose interruption is an error of hinge; typer would print "Aborted"."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise _interrupted() from None


def _interrupted() -> Interrupted:
    number = signal.SIGTERM if _Terminated.received else signal.SIGINT
    return Interrupted("stopped; what is finished is kept", number)


# click's, which recent versions of typer include under another name
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="hinge",
    cls=_Commands,
    help="Spatial gene expression from histology: draws of every spot's expression from an H&E slide.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # as markup, the "[default: …]" of a help text would be lost
    context_settings={"help_option_names": ["-h", "--help"]},
)


# an argument that is no address belongs to the command
_ADDRESS = re.compile(r"auto|local|[\w.\[\]-]+:\d+")


def _show_version(given: bool) -> None:
    if given:
        from hinge import __version__

        print(f"hinge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _group(name: str, help: str) -> typer.Typer:
    group = typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name=name)
    return group


def _register() -> None:
    """Name the commands, in the order in which the help lists them."""
    download = _group("download", "Download slides and runs.")
    convert = _group("convert", "Convert published weights to hinge's format, and a trained model to the authors'.")
    probe = _group("probe", "Test what an encoder's features predict, on held-out slides.")
    commands: dict[str, Callable[..., None]] = {
        "demo": experiments.demo,
        "check": checking.check,
        "run": training.run,
        "train": training.train,
        "sample": sampling.sample,
        "adapt": sampling.adapt,
        "evaluate": evaluation.evaluate,
        "report": evaluation.report,
        "view": viewing.view,
        "export": viewing.export,
        "map": sampling.map_expression,
        "panel": slides.panel,
        "features": slides.features,
        "pretrain-expression": training.pretrain_expression,
        "pretrain-histology": training.pretrain_histology,
        "finetune-encoder": histology.finetune_encoder,
        "cluster": histology.cluster,
        "ablate": experiments.ablate,
        "push": sharing.push,
        "config": configuration.config,
        "doctor": configuration.doctor,
    }
    for name, command in commands.items():
        app.command(name)(command)
    download.command("hest")(slides.download_hest)
    download.command("run")(sharing.download_run)
    probe.command("tumour")(histology.probe_tumour)
    convert.command("cellfm")(sharing.convert_cellfm)
    convert.command("scgpt")(sharing.convert_scgpt)
    convert.command("tahoe")(sharing.convert_tahoe)
    convert.command("hinge")(sharing.convert_hinge)
    convert.command("to-authors")(sharing.convert_to_authors)


_register()


def main() -> None:
    """Entry point: errors a user can cause become one sentence and exit code 2; a signal, its number and 128."""
    try:
        _prepare()
        sys.exit(app(_with_address(sys.argv[1:]), standalone_mode=False, prog_name="hinge"))
    except (KeyboardInterrupt, typer.Abort):  # outside a command
        _exit_interrupted(_interrupted())
    except Interrupted as error:
        _exit_interrupted(error)
    except _UsageError as error:
        _exit_usage(error)
    except BrokenPipeError:
        sys.exit(1)
    # HingeError, or OSError: a full disk, a folder in place of a file, no permission
    except (HingeError, OSError) as error:
        # messages of libraries may have several lines
        print("hinge:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


def _with_address(arguments: list[str]) -> list[str]:
    """Return arguments in which `--ray` without an address has that of a cluster on this machine."""
    given = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        alone = argument == "--ray" and not _ADDRESS.fullmatch(following)
        given += ["--ray", "local"] if alone else [argument]
    return given


def _prepare() -> None:
    """Set signals, log lines and warnings."""
    prepare_cpu()
    _Terminated.received = False
    signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hinge").setLevel(logging.INFO)
    # libraries log on every start; errors come as exceptions
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
        os.environ.setdefault(name, value)
    # hinge has its own message, which names the first of them
    warnings.filterwarnings("ignore", "(Observation|Variable) names are not unique")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without a line of source code
    warnings.filterwarnings("default", ".* has settings of version 0.1", DeprecationWarning)
    warnings.filterwarnings("ignore", "User provided device_type of 'cuda'")  # older diffusers, on import


def _exit_interrupted(error: Interrupted) -> NoReturn:
    if int(os.environ.get("RANK", 0)) == 0:
        launcher = "accelerate launch … -m hinge.cli" if "WORLD_SIZE" in os.environ else "hinge"
        print("hinge:", error, file=sys.stderr)
        print("hinge: continue with:", launcher, shlex.join(sys.argv[1:]), file=sys.stderr)
    sys.exit(128 + error.signal_number)


def _exit_usage(error: Any) -> NoReturn:
    """Print a mistake in the arguments as one sentence; a command without arguments prints its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        message = " ".join(error.format_message().split()).rstrip(".")
        command = "hinge" if error.ctx is None else error.ctx.command_path
        print(f"hinge: {message[:1].lower()}{message[1:]}; see {command} --help", file=sys.stderr)
    sys.exit(2)
