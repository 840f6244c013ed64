"""Several networks as one: ranks and lists against the mean of their scores in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import random_sessions, tiny_settings, write_dataset
from helpers.servers import running_server, wait_for
from safetensors import safe_open

import tron_cli
from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import ExperimentConfig, config_from_dict
from tron_cli.data.dataset import Dataset, Sessions
from tron_cli.data.histories import latest_histories
from tron_cli.errors import InputError
from tron_cli.evaluation.predict import hidden_states
from tron_cli.models.base import Model
from tron_cli.serving.export import export
from tron_cli.serving.program import Program
from tron_cli.serving.recommender import Recommender

NUM_ITEMS, FIRST_ID = 30, 1001
ITEM_IDS = np.arange(FIRST_ID, FIRST_ID + NUM_ITEMS)

MIXES: dict[str, list[dict[str, Any]]] = {
    "one kind": [{}, {}],
    "other widths and kinds": [
        {"positions": "start"},
        {"model": "gru4rec", "embedding_dim": 12},
        {"model": "gsasrec", "output_bias": True},
    ],
    "cosine and dot": [{"score": "cosine", "score_scale": 7.0, "output_bias": True}, {}],
    "filters and relative positions": [
        {"block": "bsarec", "training_windows": "prefixes", "low_frequencies": 3},
        {"relative_positions": True},
    ],
    "masks": [{"model": "bert4rec"}, {"model": "bert4rec", "embedding_dim": 12}],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rng = np.random.default_rng(5)
    return write_dataset(
        tmp_path_factory.mktemp("data"),
        train=random_sessions(rng, 30, NUM_ITEMS),
        val=random_sessions(rng, 10, NUM_ITEMS),
        test=random_sessions(rng, 10, NUM_ITEMS, longest=12),
        item_ids=ITEM_IDS,
    )


def networks(data: Dataset, folder: Path, kinds: list[dict[str, Any]], **common: Any) -> list[Path]:
    """Save a network of each kind; many items tie in all of them."""
    paths = [folder / f"part{number}.pt" for number in range(len(kinds))]
    for seed, (path, changes) in enumerate(zip(paths, kinds, strict=True)):
        random_checkpoint(data, path, torch_seed=seed, with_ties=True, **{**common, **changes})
    return paths


def mix(data: Dataset, folder: Path, *parts: Path, **options: Any) -> tron_cli.MixResult:
    return tron_cli.mix(
        *parts, data_dir=data.path.parent, output_dir=folder, name="mixed", device="cpu", **options
    )


def built(paths: list[Path]) -> list[Model]:
    return [load_checkpoint(path).build_model(torch.device("cpu")) for path in paths]


@torch.inference_mode()
def mean_scores(models: list[Model], history: list[int]) -> np.ndarray:
    """Return the mean of the scores of items 1.. by each network alone, float64 [I]."""
    scores = []
    for model in models:
        items = np.array(history, dtype=np.int32)
        block = latest_histories(Sessions(items, np.array([0, len(items)])), model.sequence_length)
        ((_, hidden_1D),) = hidden_states(model, block, 1)
        scores.append((model.scored_table()[1:].double() * hidden_1D.double()).sum(dim=1).numpy())
    # Scores that are equal in each network stay equal.
    return np.round(np.mean(scores, axis=0), 6)


@pytest.mark.parametrize("filter_rated", [False, True])
@pytest.mark.parametrize("kind", MIXES)
def test_ranks_and_lists_are_those_of_the_mean_of_the_scores(
    kind: str, filter_rated: bool, data: Dataset, tmp_path: Path
) -> None:
    paths = networks(data, tmp_path, MIXES[kind], filter_rated=filter_rated)
    result = mix(data, tmp_path, *paths)
    table = tmp_path / "events.csv"
    report = tron_cli.evaluate(result.checkpoint, dataset=data, device="cpu", per_event=table)
    ranks = np.genfromtxt(table, delimiter=",", names=True)["rank"]
    test = data.split("test")
    served = Recommender.load(result.checkpoint)
    alone = built(paths)
    expected = []
    for session in test:
        for event in range(max(1, len(session) - 6), len(session)):
            history, target = session[:event].tolist(), int(session[event])
            score = mean_scores(alone, history)
            barred = set(history) if filter_rated else set()
            order = sorted(
                {*range(1, NUM_ITEMS + 1)} - barred, key=lambda item: (-score[item - 1], item)
            )
            ahead = sum(score[item - 1] >= score[target - 1] for item in order)
            expected.append(np.nan if target in barred else ahead)
            (here,) = served.recommend([ITEM_IDS[session[:event] - 1].tolist()], k=NUM_ITEMS)
            assert here.items == ITEM_IDS[np.array(order) - 1].tolist()
            np.testing.assert_allclose(here.scores, score[np.array(order) - 1], atol=2e-6)
    np.testing.assert_array_equal(ranks, expected)
    assert report.events == len(expected) >= 40


def test_validation_figures_are_those_of_evaluate(data: Dataset, tmp_path: Path) -> None:
    paths = networks(data, tmp_path, [{}, {"embedding_dim": 12}])
    result = mix(data, tmp_path, *paths)
    assert (result.weight, result.metrics_by_weight) == (None, {})
    report = tron_cli.evaluate(result.run_dir, dataset=data, split="val", device="cpu")
    values = {name: figure.value for name, figure in report.metrics.items()}
    assert values == pytest.approx(result.metrics, abs=1e-12)
    assert result.checkpoint.name == f"2xtron-tiny-R@5={result.metrics['R@5']:.4f}.pt"
    found = load_checkpoint(result.checkpoint)
    assert found.parts == [str(path) for path in paths]
    compared = tron_cli.compare([result.run_dir, *paths], dataset=data, device="cpu")
    assert compared.models["mixed"].metrics.keys() == report.metrics.keys()


def test_a_network_mixed_with_its_equal_is_itself(data: Dataset, tmp_path: Path) -> None:
    (path,) = networks(data, tmp_path, [{}])
    twin = tmp_path / "twin.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "step": 6}, twin)
    histories = [[1003, 1009], [1011]]
    both = Recommender.load(mix(data, tmp_path, path, twin).checkpoint)
    alone = Recommender.load(path)
    assert both.recommend(histories) == alone.recommend(histories)
    assert both.similar(1003).items == alone.similar(1003).items


def test_the_command_mixes(
    data: Dataset, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    paths = networks(data, tmp_path, [{}, {"model": "gru4rec"}])
    random_checkpoint(data, tmp_path / "knn.pt", model="session_knn")
    places = ["--data-dir", data.path.parent, "--output-dir", tmp_path, "--device", "cpu"]
    words = [tmp_path / "knn.pt", *paths, "--weight", 2, "--name", "all", "--json", *places]
    code, out, _ = command("mix", *words)
    assert code == 0
    printed = json.loads(out)
    assert Path(printed["checkpoint"]).parent == tmp_path / "all"
    assert printed["weight"] == 2
    assert printed["validation_by_weight"] == {"2": printed["validation"]}
    code, out, error = command("mix", paths[0], *places)
    assert (code, out) == (2, "")
    assert "expected two or more checkpoints to mix, got 1" in error


def test_similar_items_are_those_of_the_mean_cosine(data: Dataset, tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [{}, {"embedding_dim": 12, "output_bias": True}]
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    cosines = []
    for path, changes in zip(paths, kinds, strict=True):
        weights = random_checkpoint(data, path, **changes).weights["item_embedding.weight"]
        rows = weights[1:, : changes.get("embedding_dim", 8)].double().numpy()
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines.append(unit @ unit[2])
    mean = np.mean(cosines, axis=0)
    found = Recommender.load(mix(data, tmp_path, *paths).checkpoint).similar(1003, k=9)
    order = [item for item in np.argsort(-mean).tolist() if item != 2][:9]
    assert found.items == ITEM_IDS[order].tolist()
    assert found.scores == pytest.approx(mean[order], abs=1e-6)


def test_what_does_not_fit_is_refused_in_a_sentence(data: Dataset, tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {}, {"embedding_dim": 12}, {"sequence_length": 5}, {"filter_rated": True},
        {"model": "bert4rec"}, {"model": "session_knn"},
        {"model": "session_knn", "knn_neighbors": 3},
    ]  # fmt: skip
    paths = [tmp_path / f"part{number}.pt" for number in range(len(kinds))]
    for path, changes in zip(paths, kinds, strict=True):
        random_checkpoint(data, path, **changes)
    first, second, short, filtered, masked, knn, other_knn = paths
    copy = tmp_path / "copy.pt"
    copy.write_bytes(first.read_bytes())
    mixed = mix(data, tmp_path, first, second).run_dir
    refused = {
        (): "expected two or more checkpoints to mix, got 0",
        (first,): "expected two or more checkpoints to mix, got 1",
        (first, second, first): f"{first} is named twice",
        (first, second, copy): f"{copy} has the same content as {first}",
        (knn, first, other_knn): "are both session_knn; name at most one",
        (knn, other_knn): "name the checkpoint of at least one network",
        (first, short): f"{first} has sequence_length=6 and {short} sequence_length=5",
        (first, filtered): f"{first} has filter_rated=False and {filtered} filter_rated=True",
        (first, masked): "model=bert4rec, which predicts from a mask after each history",
        (masked, second): "model=bert4rec, which predicts from a mask after each history",
        (first, mixed): f"is a mixed model already; name what it was made of: {first} {second}",
    }
    for parts, sentence in refused.items():
        with pytest.raises(InputError) as caught:
            tron_cli.mix(*parts, data_dir=data.path.parent, output_dir=tmp_path, name="new")
        assert sentence in str(caught.value)
        assert len(str(caught.value)) < 500
        assert not (tmp_path / "new").exists()


def test_a_given_weight_is_not_chosen(data: Dataset, tmp_path: Path) -> None:
    network, second = networks(data, tmp_path, [{}, {}])
    knn = tmp_path / "knn.pt"
    random_checkpoint(data, knn, model="session_knn")
    chosen = mix(data, tmp_path / "chosen", knn, second, network)
    given = mix(data, tmp_path / "given", network, knn, second, weight=3)
    assert given.weight == 3
    assert given.metrics_by_weight == {3.0: given.metrics}
    assert given.metrics == chosen.metrics_by_weight[3.0]
    name = f"2xtron+session_knn-tiny-knn_weight=3-R@5={given.metrics['R@5']:.4f}.pt"
    assert given.checkpoint.name == name
    for weight in (-1, 257, float("nan")):
        with pytest.raises(InputError, match="weight must be from 0 to 256, got"):
            mix(data, tmp_path / "no", network, knn, weight=weight)
    with pytest.raises(InputError, match="weight is that of session-kNN, and no part is one"):
        mix(data, tmp_path / "no", network, second, weight=3)


def test_without_validation_networks_and_given_weights_are_mixed(tmp_path: Path) -> None:
    rows = random_sessions(np.random.default_rng(8), 30, NUM_ITEMS)
    data = write_dataset(tmp_path, train=rows, test=rows[:5], item_ids=ITEM_IDS)
    paths = networks(data, tmp_path, [{}, {}])
    random_checkpoint(data, tmp_path / "knn.pt", model="session_knn")
    alone = mix(data, tmp_path / "a", *paths)
    assert (alone.metrics, alone.checkpoint.name) == ({}, "2xtron-tiny.pt")
    both = mix(data, tmp_path / "b", *paths, tmp_path / "knn.pt", weight=2)
    assert both.metrics == {}
    assert both.checkpoint.name == "2xtron+session_knn-tiny-knn_weight=2.pt"
    assert tron_cli.evaluate(both.run_dir, dataset=data, device="cpu").events > 5


def final_parts(data: Dataset, folder: Path) -> tuple[list[Path], list[Path]]:
    """Train two networks and session-kNN, and a final model of each; return runs and finals."""
    settings = tiny_settings(max_epochs=1)
    kinds = [{}, {"embedding_dim": 4, "seed": 7}, {"model": "session_knn"}]
    places: dict[str, Any] = {"data_dir": data.path.parent, "output_dir": folder, "device": "cpu"}
    runs, finals = [], []
    for number, changes in enumerate(kinds):
        config = ExperimentConfig(**{**settings, **changes})
        runs.append(tron_cli.train(config, name=f"run{number}", **places).run_dir)
        finals.append(tron_cli.train(final=runs[-1], name=f"final{number}", **places).run_dir)
    return runs, finals


def test_final_models_are_mixed_without_validation(data: Dataset, tmp_path: Path) -> None:
    runs, finals = final_parts(data, tmp_path)
    result = mix(data, tmp_path / "a", *finals[:2])
    assert (result.metrics, result.checkpoint.name) == ({}, "2xtron-tiny-final.pt")
    with_knn = mix(data, tmp_path / "b", *finals, weight=2.5)
    assert with_knn.checkpoint.name == "2xtron+session_knn-tiny-knn_weight=2.5-final.pt"
    found = load_checkpoint(with_knn.checkpoint)
    sources = [record["origin"]["final"]["file"] for record in found.origin["mixed"]["networks"]]
    assert [Path(source).parent for source in sources] == runs[:2]
    assert found.dataset == load_checkpoint(finals[0]).dataset
    # A final session-kNN counts the validation sessions too.
    assert found.popularity is not None
    events = sum(len(data.split(split).items) for split in ("train", "val"))
    assert int(found.popularity.sum()) == events
    assert tron_cli.evaluate(with_knn.checkpoint, dataset=data, device="cpu").events == 40
    refused: list[tuple[list[Path], str]] = [
        (finals, "give it with --weight, as `tron mix` chose it for the runs that they came from"),
        ([finals[0], runs[1]], "is a final model, trained on the validation sessions too, and"),
        ([runs[0], finals[2]], "mix final models with each other"),
    ]
    for parts, sentence in refused:
        with pytest.raises(InputError, match=sentence) as caught:
            mix(data, tmp_path / "c", *parts)
        assert len(str(caught.value)) < 500
    with pytest.raises(InputError, match="trained on the val split of"):
        tron_cli.evaluate(with_knn.checkpoint, dataset=data, split="val", device="cpu")
    with pytest.raises(InputError, match="is a mixed model already"):
        mix(data, tmp_path / "c", with_knn.checkpoint, finals[0])


def in_onnxruntime(checkpoint: Path, histories: np.ndarray, filter_rated: bool) -> Any:
    folder = checkpoint.parent / "onnx"
    if not folder.exists():
        found = load_checkpoint(checkpoint)
        manifest = export(checkpoint, format="onnx", output=folder)
        assert manifest["method"] == found.method
        widths = [each["embedding_dim"] for each in manifest["networks"]]
        assert widths == [config.embedding_dim for config in found.networks]
    given = {"histories": histories, "k": np.array(9), "filter_rated": np.array(filter_rated)}
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return session.run(["items", "scores"], given)


@torch.inference_mode()
def in_program(
    checkpoint: Path, histories: np.ndarray, filter_rated: bool, table: str = "float32"
) -> Any:
    """Run what is exported, before it is."""
    model = load_checkpoint(checkpoint).build_model(torch.device("cpu"))
    program = Program(list(model.networks), table, None)
    return program(torch.from_numpy(histories), torch.tensor(9), torch.tensor(filter_rated))


@pytest.mark.parametrize(
    ("run", "kinds"),
    [
        pytest.param(
            in_onnxruntime,
            [
                {"embedding_dim": 12, "output_bias": True},
                {"score": "cosine", "score_scale": 7.0, "output_bias": True},
            ],
            marks=pytest.mark.slow,
        ),
        *((in_program, kinds) for kinds in MIXES.values()),
    ],
)
def test_exported_programs_list_the_best_by_the_mean_of_the_scores(
    run: Callable[..., Any], kinds: list[dict[str, Any]], data: Dataset, tmp_path: Path
) -> None:
    paths = networks(data, tmp_path, kinds)
    mixed = mix(data, tmp_path, *paths).checkpoint
    histories = random_sessions(np.random.default_rng(3), 30, NUM_ITEMS, longest=10, shortest=1)
    rows = np.array([history + [0] * (10 - len(history)) for history in histories])
    alone = built(paths)
    scores = np.array([mean_scores(alone, history) for history in histories])
    for filter_rated in (False, True):
        items, found = run(mixed, rows, filter_rated)
        for row, history in enumerate(histories):
            score = scores[row].copy()
            if filter_rated:
                score[np.array(history) - 1] = -np.inf
            order = np.argsort(-score, kind="stable")[:9]
            assert items[row].tolist() == (order + 1).tolist()
            np.testing.assert_allclose(found[row], score[order], atol=3e-6)


def test_exported_tables_are_rounded_by_network(data: Dataset, tmp_path: Path) -> None:
    """In one row, cosine's small numbers would be rounded to the steps of the large ones."""
    cosine, dot = networks(data, tmp_path, [{"score": "cosine", "score_scale": 50.0}, {}])
    content = torch.load(dot, weights_only=True)
    for name in ("item_embedding.weight", "output_embedding.weight"):
        content["weights"][name] *= 100
    for name in ("norm.weight", "norm.bias"):
        content["weights"][name] /= 100
    torch.save(content, dot)
    mixed = mix(data, tmp_path, cosine, dot).checkpoint
    histories = [[item] for item in range(1, NUM_ITEMS + 1)]
    items, found = in_program(mixed, np.array(histories), False, "int8")
    alone = built([cosine, dot])
    scores = np.array([mean_scores(alone, history) for history in histories])
    errors = found.numpy() - np.take_along_axis(scores, items.numpy() - 1, axis=1)
    assert np.abs(errors).max() < 0.02 * np.abs(scores).max()


def test_safetensors_hold_the_weights_of_all_networks(data: Dataset, tmp_path: Path) -> None:
    mixed = mix(data, tmp_path, *networks(data, tmp_path, MIXES["other widths and kinds"]))
    found = load_checkpoint(mixed.checkpoint)
    scaled = set()
    for table in ("float32", "int8"):
        export(mixed.run_dir, format="safetensors", output=tmp_path / table, table=table)
        with safe_open(tmp_path / table / "model.safetensors", "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = [config_from_dict(each) for each in json.loads(metadata["networks"])]
        assert tuple(described) == found.networks
        shared = json.loads(metadata["shared"])
        for name, values in found.weights.items():
            stored = tensors[shared.get(name, name)]
            scale = tensors.get(f"{name}.scale")
            if scale is not None:
                scaled.add(name)
                rows, kept = stored * scale[:, None], values[:, : stored.shape[1]]
                assert ((rows - kept).abs().amax(1) <= kept.abs().amax(1) / 250).all()
                assert (f"{name}.bias" in tensors) == (values.shape[1] > stored.shape[1])
            elif stored.dtype != torch.int8:
                assert torch.equal(stored, values)
    kinds = ("0.item", "1.item", "2.item", "2.output")
    assert scaled == {f"networks.{kind}_embedding.weight" for kind in kinds}


def test_export_refuses_session_knn(data: Dataset, tmp_path: Path) -> None:
    paths = networks(data, tmp_path, [{}, {}])
    random_checkpoint(data, tmp_path / "knn.pt", model="session_knn")
    mixed = mix(data, tmp_path, *paths, tmp_path / "knn.pt")
    with pytest.raises(InputError, match="holds session-kNN, and only networks can be exported"):
        export(mixed.run_dir, format="torch", output=tmp_path / "exported")


def test_a_mix_is_served_and_replaced(data: Dataset, tmp_path: Path) -> None:
    paths = networks(data, tmp_path, [{}, {"model": "gru4rec"}])
    random_checkpoint(data, tmp_path / "knn.pt", model="session_knn")
    mixes = [
        mix(data, tmp_path / "a", *paths).checkpoint,
        mix(data, tmp_path / "b", *paths, tmp_path / "knn.pt", weight=4).checkpoint,
    ]
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(mixes[0], folder)
    histories = [[1003, 1009], [1011]]
    with running_server(Recommender.load, folder) as server:
        for path in mixes:
            if server.get("/ready")[1]["checkpoint"] != path.name:
                (folder / mixes[0].name).unlink()
                shutil.copy(path, folder)
                server.reload()
                wait_for(lambda: server.get("/ready")[1]["checkpoint"] == mixes[1].name)
            right = Recommender.load(path).recommend(histories, k=7)
            for history, here in zip(histories, right, strict=True):
                answer = server.post("/recommend", {"items": history, "k": 7})[1]
                assert answer["items"] == here.items


def test_a_mix_is_not_trained(data: Dataset, tmp_path: Path) -> None:
    paths = networks(data, tmp_path, [{}, {"embedding_dim": 12}])
    mixed = mix(data, tmp_path, *paths).run_dir
    places: dict[str, Any] = {"data_dir": data.path.parent, "device": "cpu"}
    with pytest.raises(InputError, match="is a mixed model, which `tron mix` makes of trained"):
        tron_cli.train(final=mixed, output_dir=tmp_path, **places)
    config = load_checkpoint(paths[0]).config
    with pytest.raises(InputError, match=f"name one that it was made of: {paths[0]} {paths[1]}"):
        tron_cli.train(config, init_from=mixed, output_dir=tmp_path, **places)
    with pytest.raises(InputError, match=r"nothing to resume.*mixed models"):
        tron_cli.train(resume=mixed, **places)
    (file,) = mixed.glob("*.pt")
    file.rename(mixed / "last.pt")
    with pytest.raises(InputError, match="holds only weights"):
        tron_cli.train(resume=mixed, **places)


@pytest.mark.parametrize(
    ("networks_", "sentence"),
    [
        ("both", "its networks are not a list of configurations"),
        ([{"model": "sasrec"}, 3], "its networks are not a list of configurations"),
        ([{"model": "sasrec", "dataset_name": "tiny"}], "do not fit its configuration"),
        ([{"modell": "sasrec"}], "written by another version of tron"),
    ],
)
def test_damaged_networks_are_refused(
    networks_: Any, sentence: str, data: Dataset, tmp_path: Path
) -> None:
    path = mix(data, tmp_path, *networks(data, tmp_path, [{}, {}])).checkpoint
    content = torch.load(path, weights_only=True)
    torch.save({**content, "networks": networks_}, path)
    with pytest.raises(InputError, match=sentence):
        load_checkpoint(path).build_model(torch.device("cpu"))
