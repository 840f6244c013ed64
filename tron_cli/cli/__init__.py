"""The `tron` command: thin, and torch is imported only by the commands that compute."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
import time
import traceback
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tron_cli import __version__
from tron_cli.cli.prepare import app as prepare_app
from tron_cli.errors import InputError, RunError, explained, shortened
from tron_cli.files import written_aside

if TYPE_CHECKING:
    import torch

    from tron_cli.config import ExperimentConfig
    from tron_cli.data.dataset import Dataset
    from tron_cli.evaluation.evaluate import EvaluationOptions
    from tron_cli.training.profile import StepProfiler

app = typer.Typer(
    name="tron",
    help="Train, evaluate and compare session-based recommenders on catalogues of millions of "
    "items.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(
    help="Look at configurations.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(prepare_app, name="prepare")
app.add_typer(config_app, name="config")

log = logging.getLogger("tron")

CONFIG_HELP = "A Python config, one of otto-de/TRON's JSON files, or the name of a packaged config."

DataDir = Annotated[Path, typer.Option("--data-dir", help="Folder of the prepared datasets.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Settings that override the config."),
]


def _add_plugins(references: list[str] | None) -> list[str] | None:
    from tron_cli.plugins import add_plugin

    for reference in references or []:
        add_plugin(reference)
    return references


Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        callback=_add_plugins,
        metavar="FILE.py:NAME",
        help="Run this code from outside tron (or package.module:NAME), which a checkpoint needs.",
    ),
]


class Split(str, Enum):
    """Splits that `tron evaluate` reads."""

    test = "test"
    val = "val"


class Protocol(str, Enum):
    """Which events of a session are predicted."""

    every_step = "every-step"
    last_item = "last-item"


class SliceKind(str, Enum):
    """Kinds of slices of `tron evaluate --by`."""

    length = "length"
    position = "position"
    popularity = "popularity"
    repeat = "repeat"


LimitSessions = Annotated[
    int | None, typer.Option(min=1, help="Only the first N sessions of the split.")
]
SampleSessions = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Only N sessions of the split, drawn at random."),
]
DropUnknown = Annotated[
    bool,
    typer.Option(
        "--drop-unknown",
        help="Leave out events on items that the checkpoint does not know, and count them as lost.",
    ),
]
SampleSeed = Annotated[
    int | None, typer.Option(min=0, help="Seed of --sample-sessions; default: 42.")
]


def main() -> None:
    """Run the command line; wrong usage and bad input exit with 2, failed runs with 1."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    sys.exit(_run([word for word in arguments if word != "--debug"], debug))


def _run(arguments: list[str], debug: bool) -> int:
    try:
        with explained():
            app(arguments)
        return 0
    except SystemExit as end:  # Typer's own: 0 for --help, 2 for wrong usage
        return end.code if isinstance(end.code, int) else 1
    except InputError as error:
        return _fail(str(error), 2, debug)
    except RunError as error:
        return _fail(str(error), 1, debug)


def _fail(sentence: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"tron: {shortened(sentence)}", file=sys.stderr)
    return code


def _version(shown: bool) -> None:
    if shown:
        print(f"tron {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    _log_to_stderr()


@app.command()
def train(
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option(help=CONFIG_HELP)] = None,
    data_dir: DataDir = Path("datasets"),
    output_dir: Annotated[
        Path | None, typer.Option(help="Where the run's folder is made; default: runs.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a run to go on with.")] = None,
    profile: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Profile N steps after a short warm-up, print where the time goes, and stop: "
            "trace.json in the run's folder is a Chrome trace, --resume goes on with the run.",
        ),
    ] = None,
    plugin: Plugins = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a model, keeping the best checkpoint by validation, or fit a baseline."""
    from tron_cli.checkpoint import load_checkpoint
    from tron_cli.training.profile import StepProfiler

    profiler = None if profile is None else StepProfiler(profile)
    saved = run_training(
        config, overrides or [], data_dir, output_dir, name, resume, device, profiler
    )
    if profiler is not None:
        if profiler.result is None:
            raise RunError("the run stopped early, before all steps were profiled; profile fewer")
        found = profiler.result
        shown = {"checkpoint": str(saved), "profile": found.as_json()}
        print(json.dumps(shown) if as_json else found.as_text())
    elif as_json:
        metrics = load_checkpoint(saved).metrics
        print(json.dumps({"checkpoint": str(saved), "validation": metrics}))
    else:
        print(saved)


def run_training(
    config_name: str | None,
    overrides: list[str],
    data_dir: Path,
    output_dir: Path | None,
    name: str | None,
    resume: Path | None,
    device_name: str,
    profiler: StepProfiler | None = None,
) -> Path:
    """Train as `tron train` does; return the best checkpoint, after profiling the last."""
    from tron_cli.config import load_config
    from tron_cli.data.dataset import Dataset
    from tron_cli.training.fit import fit
    from tron_cli.training.loop import train as train_model
    from tron_cli.training.run import LOG, claimed

    if (config_name is None) == (resume is None):
        raise InputError(
            "give either --config NAME for a new run or --resume RUN_DIR for an old one"
        )
    if resume is not None and (name is not None or output_dir is not None):
        raise InputError("a resumed run stays in its folder; leave out --name and --output-dir")
    if resume is not None:
        place = claimed(resume, resume=True)
    else:
        assert config_name is not None
        experiment, _ = load_config(config_name, overrides)
        dataset = Dataset.open(data_dir / experiment.dataset_name)
        run_dir = _run_dir(output_dir or Path("runs"), name, experiment)
        place = claimed(run_dir, numbered=name is None)
    device = training_device(device_name, config_name)
    with place as run_dir, explained(run_dir / LOG):
        if resume is not None:
            experiment, dataset = _resumed(resume, overrides, data_dir)
        if not experiment.is_baseline:
            return train_model(
                experiment, dataset, run_dir, device=device, resume=resume is not None,
                profiler=profiler,
            )  # fmt: skip
        if profiler is not None:
            raise InputError(
                f"model={experiment.model} is fitted at once and has no steps to profile; leave "
                "out --profile"
            )
        return fit(experiment, dataset, run_dir)


def _resumed(
    run_dir: Path, overrides: list[str], data_dir: Path
) -> tuple[ExperimentConfig, Dataset]:
    """Configuration and dataset of a run to go on with."""
    from tron_cli.checkpoint import LAST, dataset_identity, load_checkpoint
    from tron_cli.config import parse_overrides
    from tron_cli.data.dataset import Dataset

    checkpoint = load_checkpoint(run_dir / LAST)
    changes = parse_overrides(overrides)
    fixed = sorted(set(changes) - {"max_epochs", "early_stopping_patience"})
    if fixed:
        raise InputError(
            f"a resumed run keeps its settings; only max_epochs and early_stopping_patience "
            f"can change, not {', '.join(fixed)}"
        )
    dataset = Dataset.open(data_dir / checkpoint.config.dataset_name)
    if checkpoint.dataset != dataset_identity(dataset):
        raise InputError(
            f"the run in {run_dir} was trained on another version of {dataset.path}; prepare the "
            "dataset as it was, or start a new run"
        )
    return dataclasses.replace(checkpoint.config, **changes), dataset


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt file, or the folder of a run.")],
    dataset: Annotated[
        str | None, typer.Option(help="Prepared dataset; default: the checkpoint's.")
    ] = None,
    split: Annotated[Split, typer.Option(help="Split to evaluate on.")] = Split.test,
    protocol: Annotated[Protocol | None, typer.Option(help="Default: the dataset's own.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help='Such as "R@20 RR@20 nDCG@10"; default: the config\'s.')
    ] = None,
    filter_rated: Annotated[
        bool | None,
        typer.Option(
            "--filter-rated/--no-filter-rated",
            help="Never recommend items of the history; default: the config's.",
        ),
    ] = None,
    full_sessions: Annotated[
        bool, typer.Option(help="Also predict what lies before the last sequence_length events.")
    ] = False,
    one_pass: Annotated[
        bool, typer.Option(help="TRON's way: one pass over a whole session, not serving's.")
    ] = False,
    limit_sessions: LimitSessions = None,
    sample_sessions: SampleSessions = None,
    seed: SampleSeed = None,
    drop_unknown: DropUnknown = False,
    run: Annotated[Path | None, typer.Option(help="Write the predictions as a TREC run.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="Write the targets as TREC qrels.")] = None,
    per_event: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write session, event, target and rank as .parquet or .csv."
        ),
    ] = None,
    by: Annotated[
        list[SliceKind] | None,
        typer.Option(help="Also give the figures of each slice of the events; may be repeated."),
    ] = None,
    cutoff: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="Also make lists of K items, and give coverage, popularity, novelty and "
            "serendipity of these; 0: no lists, which saves time.",
        ),
    ] = 0,
    data_dir: DataDir = Path("datasets"),
    plugin: Plugins = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Rank the whole catalogue exactly and report figures with standard errors."""
    from tron_cli.evaluation.evaluate import EvaluationOptions

    options = EvaluationOptions(
        split=split.value,
        protocol=protocol.value if protocol else None,
        metrics=metrics,
        filter_rated=filter_rated,
        full_sessions=full_sessions,
        one_pass=one_pass,
        limit_sessions=limit_sessions,
        sample_sessions=sample_sessions,
        seed=seed,
        drop_unknown=drop_unknown,
        run=run,
        qrels=qrels,
        per_event=per_event,
        by=tuple(dict.fromkeys(kind.value for kind in by or ())),
        cutoff=cutoff,
    )
    report = run_evaluation(checkpoint, dataset, options, data_dir, device)
    _print_report(report, as_json)


def run_evaluation(
    path: Path,
    dataset_name: str | None,
    options: EvaluationOptions,
    data_dir: Path,
    device_name: str,
) -> dict[str, Any]:
    """Evaluate as `tron evaluate` does; return the report."""
    from tron_cli.checkpoint import load_checkpoint
    from tron_cli.data.dataset import Dataset
    from tron_cli.evaluation.evaluate import assess

    checkpoint = load_checkpoint(path)
    dataset = Dataset.open(data_dir / (dataset_name or checkpoint.dataset["name"]))
    return assess(checkpoint, dataset, options, _device(device_name))


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    from tron_cli.report import evaluation_text

    print(json.dumps(report) if as_json else evaluation_text(report))


@app.command()
def compare(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT CKPT ...", help=".pt files, or folders of runs.")
    ],
    dataset: Annotated[
        str | None, typer.Option(help="Prepared dataset; default: the reference's.")
    ] = None,
    split: Annotated[Split, typer.Option(help="Split to compare on.")] = Split.test,
    protocol: Annotated[Protocol | None, typer.Option(help="Default: the dataset's own.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help='Such as "R@20 RR@20"; default: the reference\'s.')
    ] = None,
    filter_rated: Annotated[
        bool | None,
        typer.Option(
            "--filter-rated/--no-filter-rated",
            help="Never recommend items of the history; default: the configs', if they agree.",
        ),
    ] = None,
    full_sessions: Annotated[
        bool, typer.Option(help="Also predict what lies before the last sequence_length events.")
    ] = False,
    limit_sessions: LimitSessions = None,
    sample_sessions: SampleSessions = None,
    seed: SampleSeed = None,
    drop_unknown: DropUnknown = False,
    reference: Annotated[
        int,
        typer.Option(metavar="N", help="Compare the others with the N-th checkpoint."),
    ] = 1,
    cutoff: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Items a list for coverage, popularity, novelty, serendipity and intersection; "
            "default: the reference's recommendation_limit; 0: leave these figures out.",
        ),
    ] = None,
    data_dir: DataDir = Path("datasets"),
    plugin: Plugins = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare models on the same events: paired differences with confidence intervals."""
    from tron_cli.checkpoint import load_checkpoint
    from tron_cli.data.dataset import Dataset
    from tron_cli.evaluation.compare import check_choice
    from tron_cli.evaluation.compare import compare as compare_models
    from tron_cli.evaluation.evaluate import EvaluationOptions
    from tron_cli.report import comparison_text

    check_choice(len(checkpoints), reference)
    loaded = [load_checkpoint(path) for path in checkpoints]
    options = EvaluationOptions(
        split=split.value,
        protocol=protocol.value if protocol else None,
        metrics=metrics,
        filter_rated=filter_rated,
        full_sessions=full_sessions,
        limit_sessions=limit_sessions,
        sample_sessions=sample_sessions,
        seed=seed,
        drop_unknown=drop_unknown,
    )
    report = compare_models(
        loaded,
        Dataset.open(data_dir / (dataset or loaded[reference - 1].dataset["name"])),
        options,
        _device(device),
        reference=reference - 1,
        cutoff=cutoff,
    )
    print(json.dumps(report) if as_json else comparison_text(report))


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|CKPT", help="Name or folder of a dataset, a .pt file, or a run folder."
        ),
    ],
    data_dir: DataDir = Path("datasets"),
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Read all of a dataset or checkpoint and compare it with its fingerprints or checksums."""
    from tron_cli.cli.check import check as check_parts
    from tron_cli.report import format_table

    parts = check_parts(target, data_dir)
    faults = [part.fault for part in parts if part.fault is not None]
    if as_json:
        print(json.dumps({"parts": [dataclasses.asdict(part) for part in parts], "faults": faults}))
    else:
        rows = [[part.name, part.holds, "damaged" if part.fault else "sound"] for part in parts]
        print(format_table(["part", "holds", "state"], rows))
    for fault in faults:
        print(f"tron: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(2)


@app.command()
def demo(
    overrides: Overrides = None,
    data_dir: DataDir = Path("datasets"),
    output_dir: Annotated[Path, typer.Option(help="Where runs and demo.json go.")] = Path("runs"),
) -> None:
    """Prepare a generated shop, train TRON on it, and evaluate: everything in two minutes.

    Fails where the model stays below 90 % of the best possible R@20: something is wrong then.
    """
    from tron_cli.data.folder import made_with
    from tron_cli.evaluation.evaluate import EvaluationOptions
    from tron_cli.prepare import summary
    from tron_cli.prepare.sources.synthetic import prepare_synthetic

    def say(command: str) -> None:
        print(f"\n$ {command}", flush=True)

    settings = ["dataset_name=demo", *(overrides or [])]
    say("tron prepare synthetic --name demo --force")
    options = {"seed": 42, "sessions": 80_000}
    path = data_dir / "demo"
    if path.exists() and not made_with(path, source="synthetic", options=options):
        raise InputError(
            f"{path} is a dataset of your own, which the demo would replace; rename its folder, or "
            "pass another --data-dir"
        )
    summary.print_summary(prepare_synthetic(data_dir, "demo", force=True, **options))
    say(f"tron train --config config_synthetic.py {' '.join(settings)}")
    best = run_training("config_synthetic.py", settings, data_dir, output_dir, None, None, "auto")
    print(best)
    say(f"tron evaluate {best}")
    report = run_evaluation(best, None, EvaluationOptions(), data_dir, "auto")
    _print_report(report, as_json=False)
    references = {
        name: {measure: {"value": value} for measure, value in figures.items()}
        for name, figures in report["references"].items()
    }
    with written_aside(output_dir / "demo.json") as file:
        json.dump({"model": report["metrics"], **references}, file, indent=2)
    print(f"\nresults: {output_dir / 'demo.json'}")
    reached = report["metrics"]["R@20"]["value"] / report["references"]["best"]["R@20"]
    if reached < 0.9:
        raise RunError(
            f"the model reached {reached:.0%} of the best possible R@20 instead of 90 %: this "
            "installation does not train as it should"
        )


@config_app.command("show")
def config_show(
    config: Annotated[str, typer.Argument(help=CONFIG_HELP)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the resolved values of a configuration and where each came from."""
    from tron_cli.config import FIELDS, load_config
    from tron_cli.report import format_table

    experiment, origins = load_config(config, overrides or [])
    values = dataclasses.asdict(experiment)
    if as_json:
        print(json.dumps(values))
        return
    rows = [[key, _shown(values[key]), origins[key]] for key in FIELDS]
    print(format_table(["setting", "value", "from"], rows))


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


@config_app.command("list")
def config_list() -> None:
    """Print the names of the packaged configurations."""
    from tron_cli.config import packaged_configs

    print("\n".join(packaged_configs()))


def training_device(name: str, config_name: str | None) -> torch.device:
    """--device; auto is what the config's accelerator says, where it has one."""
    from tron_cli.config import requested_accelerator

    accelerator = "auto"
    if name == "auto" and config_name is not None:
        accelerator = requested_accelerator(config_name)
    device = _device("cpu" if accelerator == "cpu" else name)
    if accelerator == "gpu" and device.type == "cpu":
        log.info("accelerator is gpu, but there is none here: training on the CPU")
    return device


def _device(name: str) -> torch.device:
    import torch

    match = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,9}))?", name)
    if not match:
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    chosen = name
    if name == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(chosen)
        if match[1] is not None and torch.cuda.is_available():
            count = torch.cuda.device_count()
            if int(match[1]) >= count:  # torch keeps eight bits of it: 256 would be 0
                there = ", ".join(f"cuda:{index}" for index in range(count))
                raise InputError(f"--device {name} does not exist here; there is {there}")
            # Graphs, streams and Triton's kernels are those of the current device.
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}); try cpu") from error
    return device


def _run_dir(output_dir: Path, name: str | None, config: ExperimentConfig) -> Path:
    """The folder of a new run, by its name or by its start."""
    if name is not None and not re.fullmatch(r"\w[\w.+=-]*", name):
        raise InputError(
            f"--name must be a folder name of letters, digits and _ . + = -, got {name!r}"
        )
    stamp = f"{config.method}-{config.dataset_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return output_dir / (name or stamp)


class _BarSafeHandler(logging.Handler):
    """Writes to stderr above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    if not log.handlers:
        handler = _BarSafeHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
