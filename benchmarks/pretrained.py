"""Publish checkpoints of committed results, and train published ones again.

    python -m benchmarks.pretrained pack CHECKPOINT --name NAME --prepare "tron prepare ..."
    python -m benchmarks.pretrained check NAME

NAME is that of a result, benchmarks/results/accuracy/NAME.json, which has commands, commit, seed,
hardware and test figures. `pack` writes pretrained/NAME.pt, with weights in half precision if no
figure changes, and the model card pretrained/NAME.md. `check` trains by these commands and says
whether the weights are the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.runs import RESULTS
from benchmarks.commands import ROOT, hardware
from tron_cli.errors import InputError

PRETRAINED = ROOT / "pretrained"
STORAGES = ("float16", "float32")  # the first that changes no figure is published


@dataclass(frozen=True)
class Data:
    """Data set whose terms allow weights trained on it to be published; texts for the card."""

    title: str
    terms: str
    use: str


# By the first word of a prepared dataset's name.
DATA = {
    "ml1m": Data(
        "MovieLens-1M in the version of Kang and McAuley (`ml-1m.txt` of SASRec's repository): "
        "6,040 users, 3,416 items, 999,611 events",
        """\
MovieLens-1M was collected by GroupLens Research at the University of Minnesota. Its
[terms](https://files.grouplens.org/datasets/movielens/ml-1m-README.txt) allow research, require
that publications acknowledge the data, and require permission from GroupLens before the data are
redistributed or used commercially. Nobody may suggest that the University of Minnesota or
GroupLens endorse their work, and neither of them guarantees that the data are correct or suitable
for any purpose.

The checkpoint contains no ratings, users or histories. It is offered for research under the same
terms: do not use it commercially without permission from GroupLens, and acknowledge the data:

> F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM
> Transactions on Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872
""",
        """\
For research: to check published figures, and as a reference for other models on the same file. The
model knows these 3,416 films alone. It ranks them by what people rated next on MovieLens between
2000 and 2003, often many films in one sitting, which is not the order in which they watched them.
Figures on this file say little about other data, or about what people do with recommendations.
""",
    )
}


def pack(
    checkpoint: Path, name: str, data_dir: Path, prepare: Sequence[str], note: str = ""
) -> Path:
    """Write the published file and its card, and return the file.

    prepare: commands that prepared the dataset. note: a paragraph for the card. Raises InputError
    where the checkpoint must not be published, or is not that of the result.
    """
    from tron_cli.checkpoint import load_checkpoint
    from tron_cli.data.dataset import Dataset
    from tron_cli.files import written_aside

    result = read_result(name)
    loaded = load_checkpoint(checkpoint)
    data = _data_of(loaded.dataset["name"], loaded)
    dataset = Dataset.open(data_dir / result["dataset"])
    if loaded.dataset["train_fingerprint"] != dataset.split_info("train")["fingerprint"]:
        raise InputError(
            f"{loaded.path} was trained on other sessions than those of {dataset.path}, so that "
            "training from that dataset cannot give the same weights; name its own --data-dir"
        )
    before = reports(loaded.path, result, data_dir)
    changes = _changes({"test": result["test"]}, before)
    if changes:
        raise InputError(
            f"{loaded.path} does not have the figures of {RESULTS / name}.json ({changes[0]}): it "
            "is another checkpoint or another dataset; name those of the result"
        )
    with tempfile.TemporaryDirectory() as folder:
        candidate = Path(folder) / f"{name}.pt"
        for storage in STORAGES:
            _save(loaded.path, candidate, storage)
            after = _reports_if_finite(candidate, result, data_dir)
            changes = _changes(before, after)
            if not changes:
                break
            print(f"{storage} changes {', '.join(changes)}", file=sys.stderr)
        else:
            raise InputError(f"{loaded.path} has other figures when it is evaluated again")
        content = candidate.read_bytes()
    path = PRETRAINED / f"{name}.pt"
    with written_aside(path, "wb") as file:
        file.write(content)
    with written_aside(path.with_suffix(".md")) as file:
        file.write(card(path, result, after, data, prepare, note))
    return path


def read_result(name: str) -> dict[str, Any]:
    """Return the committed result; raise InputError unless it has test figures."""
    path = RESULTS / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "test" not in result:
        raise InputError(
            f"{path} {'has no test figures' if result else 'does not exist'}; evaluate the model "
            "with python -m benchmarks.accuracy run ... --test first"
        )
    return result


def _data_of(dataset: str, checkpoint: Any) -> Data:
    """Return the data set of a checkpoint; raise InputError where it must not be published."""
    data = DATA.get(dataset.partition("_")[0])
    if data is None:
        raise InputError(
            f"no terms that allow weights trained on {dataset} to be published are known; commit "
            f"the result alone, which is its recipe, or add the terms to {Path(__file__).name}"
        )
    if checkpoint.config.is_baseline or checkpoint.knn is not None:
        raise InputError(
            f"{checkpoint.path} holds training sessions or their counts, which are the data "
            "themselves; publish a network, and commit the result alone for this one"
        )
    if checkpoint.training:
        raise InputError(
            f"{checkpoint.path} holds the state of a run; name its best checkpoint or its folder"
        )
    return data


def reports(checkpoint: Path, result: Mapping[str, Any], data_dir: Path) -> dict[str, Any]:
    """Return the reports of `tron evaluate` by split: test and, unless trained on it, val."""
    from tron_cli import evaluate
    from tron_cli.checkpoint import load_checkpoint

    is_final = "val_fingerprint" in load_checkpoint(checkpoint).dataset
    options = {
        "dataset": result["dataset"],
        "data_dir": data_dir,
        "full_sessions": covers_whole_sessions(result),
        "device": "cpu",
    }
    splits = ("test",) if is_final else ("val", "test")
    return {split: evaluate(checkpoint, split=split, **options).report for split in splits}


def shown(reports: Mapping[str, Any]) -> dict[tuple[str, str, str], str]:
    """Return the figures as they are printed, by split, measure and kind."""
    return {
        (split, measure, kind): "–" if value is None else f"{value:.4f}"
        for split, report in reports.items()
        for measure, figure in report["metrics"].items()
        for kind, value in figure.items()
    }


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the printed figures that differ, such as `R@10 value on test: 0.3089 to 0.3091`."""
    old, new = shown(before), shown(after)
    return [
        f"{measure} {kind} on {split}: {figure} to {new.get((split, measure, kind), 'none')}"
        for (split, measure, kind), figure in old.items()
        if new.get((split, measure, kind)) != figure
    ]


def _read(path: Path) -> dict[str, Any]:
    import torch

    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def _save(checkpoint: Path, path: Path, storage: str) -> None:
    """Write what is published of a checkpoint: no training counts, and no paths of a machine."""
    import torch

    content = _read(checkpoint)
    content.pop("popularity", None)
    if "origin" in content:
        content["origin"] = _without_folders(content["origin"])
    content["weights"] = stored(content["weights"], storage)
    torch.save(content, path)


def stored(weights: Mapping[str, Any], storage: str) -> dict[str, Any]:
    """Return the weights with float32 tensors as `storage`; those that share memory still do."""
    import torch

    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for values in weights.values():
        if values.dtype == torch.float32 and storage == "float16":
            copies.setdefault((values.data_ptr(), values.shape), values.half())
    return {
        name: copies.get((values.data_ptr(), values.shape), values)
        for name, values in weights.items()
    }


def _reports_if_finite(path: Path, result: Mapping[str, Any], data_dir: Path) -> dict[str, Any]:
    """Return the reports, or none where a weight is too large for its type."""
    weights = _read(path)["weights"].values()
    is_finite = all(bool(values.isfinite().all()) for values in weights)
    return reports(path, result, data_dir) if is_finite else {}


def _without_folders(record: Any) -> Any:
    if isinstance(record, Mapping):
        return {
            key: Path(value).name if key == "file" else _without_folders(value)
            for key, value in record.items()
        }
    return [_without_folders(each) for each in record] if isinstance(record, list) else record


def card(
    path: Path,
    result: Mapping[str, Any],
    reports: Mapping[str, Any],
    data: Data,
    prepare: Sequence[str],
    note: str,
) -> str:
    """Return the model card of a published file."""
    from tron_cli.data.integrity import sha256_of_file

    name, test, seconds = path.stem, reports["test"], result["training_seconds"]
    content = _read(path)
    weights = content["weights"].values()
    count = sum({each.data_ptr(): each.numel() for each in weights}.values())
    head = f"""\
{result["title"]}, trained on {data.title}. {count:,} weights, stored as {storage_of(content)}, \
{path.stat().st_size / 1e6:.2f} MB."""
    figures = f"""\
Standard errors are in parentheses. Protocol: {test["protocol"]}; {test["events"]:,} events of \
{test["sessions"]:,} users, each ranked among all {test["items"]:,} items; \
{"items of the history" if test["filter_rated"] else "nothing is"} filtered; {test["tie_rule"]}. \
The test figures are those under `test` in \
[benchmarks/results/accuracy/{name}.json](../benchmarks/results/accuracy/{name}.json). The \
configuration and the checkpoint were chosen on validation."""
    if "val" not in reports:
        figures += """ This model is also trained on the validation events: those figures are of \
the run that chose its settings and its number of steps."""
    training = f"""\
Seed {result["seed"]}, commit `{result["commit"]}`, {result["hardware"]}, {result["steps"]:,} steps\
{f", {seconds / 3600:.2f} hours" if seconds else ""}. These commands give the same bits on the \
same hardware with the same number of threads, and the same figures within noise elsewhere. To \
train again and compare: `python -m benchmarks.pretrained check {name}`."""
    whole = " --full-sessions" * covers_whole_sessions(result)
    contents = """\
Weights, settings, validation figures, fingerprints of the dataset, and the original numbers of \
the items. Without the training counts of the items, which are left out, nothing can be \
recommended after a history without known items."""
    parts = [
        f"# {name}", head, note,
        "## Figures", _figure_table(result, reports), figures,
        "## Data and licence", data.terms.strip(),
        "## Training", _block(*prepare, *map(shlex.join, trainings(result))), training,
        "## How to check", _block(*prepare, f"tron evaluate pretrained/{name}.pt{whole}"),
        f"SHA-256 of `{path.name}`: `{sha256_of_file(path)}`",
        "## Contents", contents,
        "## Use and limits", data.use.strip(),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(*commands: str) -> str:
    return "\n".join(["```", *commands, "```"])


def _figure_table(result: Mapping[str, Any], reports: Mapping[str, Any]) -> str:
    lines = ["| | validation | test |", "|---|---:|---:|"]
    for measure, figure in reports["test"]["metrics"].items():
        validation = f"{result['validation'][measure]:.4f}"
        if "val" in reports:
            validation = _with_error(reports["val"]["metrics"][measure])
        lines.append(f"| {measure} | {validation} | {_with_error(figure)} |")
    return "\n".join(lines)


def _with_error(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.4f} ({figure['stderr']:.4f})"


def storage_of(content: Mapping[str, Any]) -> str:
    """Return the type in which the weights of a published file are stored."""
    kinds = {str(values.dtype).removeprefix("torch.") for values in content["weights"].values()}
    return "float16" if "float16" in kinds else "float32"


def covers_whole_sessions(result: Mapping[str, Any]) -> bool:
    """Return True if the result was evaluated with --full-sessions."""
    return "--full-sessions" in result["commands"][-1]


def trainings(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the commands that made the checkpoint, as words."""
    commands = [shlex.split(command) for command in result["commands"]]
    return [words for words in commands if words[:2] in (["tron", "train"], ["tron", "mix"])]


def train_again(name: str, result: Mapping[str, Any], data_dir: Path, work_dir: Path) -> Path:
    """Run the commands of a result in a folder, and return the last checkpoint.

    Runs that are there already are resumed.
    """
    from tron_cli.files import LAST, best_checkpoint

    work_dir.mkdir(parents=True, exist_ok=True)
    for number, (_, command, *words) in enumerate(trainings(result), start=1):
        if "--name" not in words:
            words += ["--name", f"{name}-{number}"]
        run = Path("runs", words[words.index("--name") + 1])
        if (work_dir / run / LAST).exists():
            words = ["--resume", str(run)]
        elif (work_dir / run).exists():  # of a baseline, or a mixed model
            best_checkpoint(work_dir / run)
            continue
        _tron([command, *words, "--data-dir", str(data_dir)], work_dir)
    return best_checkpoint(work_dir / run)


def _tron(words: list[str], folder: Path) -> None:
    """Run a command of this version of tron in a folder; its log goes to our stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tron_cli", *words]
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)


def largest_difference(
    published: Mapping[str, Any], again: Mapping[str, Any]
) -> tuple[str, float] | None:
    """Return the tensor that differs most and by how much; None where all bits are the same.

    The difference is infinite where the tensors are not of the same names, shapes and types.
    """
    if published.keys() != again.keys():
        return min(published.keys() ^ again.keys()), float("inf")
    found = []
    for name, values in published.items():
        other = again[name]
        if values.shape != other.shape or values.dtype != other.dtype:
            return name, float("inf")
        if values.numpy().tobytes() != other.numpy().tobytes():
            found.append((name, float((values.double() - other.double()).abs().max())))
    return max(found, key=lambda each: each[1]) if found else None


def check(name: str, data_dir: Path, work_dir: Path) -> bool:
    """Train a published checkpoint again, print how it compares, and return True for equal bits."""
    result, path = read_result(name), PRETRAINED / f"{name}.pt"
    if not path.exists():
        raise InputError(f"{path} does not exist; name a published checkpoint")
    published = _read(path)
    print(f"published: {result['hardware']}\nhere:      {hardware()}")
    again = train_again(name, result, data_dir, work_dir)
    weights = stored(_read(again)["weights"], storage_of(published))
    difference = largest_difference(published["weights"], weights)
    if difference is None:
        print("the same bits: yes")
        return True
    print(f"the same bits: no; largest difference {difference[1]:.6g}, in {difference[0]}")
    figures = reports(again, result, data_dir)["test"]["metrics"]
    for measure, figure in result["test"]["metrics"].items():
        print(f"test {measure}: {_with_error(figure)}, here {_with_error(figures[measure])}")
    return False


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write a published file and its card")
    packing.add_argument("checkpoint", type=Path, help="best checkpoint of a run, or its folder")
    packing.add_argument("--name", required=True, help="name of the committed result")
    packing.add_argument(
        "--prepare", action="append", required=True, help="command that prepared the dataset"
    )
    packing.add_argument("--note", default="", help="a paragraph for the card")
    packing.add_argument("--best", action="store_true", help="it claims the record of its data")
    checking = commands.add_parser("check", help="train a published checkpoint again")
    checking.add_argument("name")
    checking.add_argument("--work-dir", type=Path, help="default: runs/check-NAME")
    for each in (packing, checking):
        each.add_argument("--data-dir", type=Path, default=ROOT / "datasets")
    given = parser.parse_args(words)
    data_dir = given.data_dir.resolve()
    try:
        if given.command == "check":
            work_dir = (given.work_dir or ROOT / "runs" / f"check-{given.name}").resolve()
            sys.exit(0 if check(given.name, data_dir, work_dir) else 1)
        path = pack(given.checkpoint, given.name, data_dir, given.prepare, given.note)
        if given.best:
            best = PRETRAINED / f"BEST-{_read(path)['dataset']['name'].partition('_')[0]}"
            best.write_text(f"{path.name}\n")
        print(path)
    except InputError as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # tron has said why


if __name__ == "__main__":
    main()
