"""The benchmarks' plain references compute what tron computes, and every benchmark runs."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_checkpoint
from helpers.datasets import cyclic_sessions, pack_sessions, write_dataset
from helpers.networks import PaddedReference, build_pair, make_config

from benchmarks import __main__ as bench
from benchmarks import machine, pairs, same_accuracy, startup
from benchmarks.generated import LENGTHS, Lengths, draw_items, fill, generate_sessions
from benchmarks.measure import Work, figure, in_turns, table
from benchmarks.reference import CUTOFFS, PaddedBatch, PlainGSASRec, PlainTron
from benchmarks.work import step_work
from tron_cli.config import ExperimentConfig
from tron_cli.data.batches import training_batch
from tron_cli.evaluation.predict import predict
from tron_cli.losses.sampled import ssm
from tron_cli.sampling.logits import sampled_logits
from tron_cli.sampling.negatives import Distribution, sample_negatives

ITEMS = 40


def tiny_config(**changes) -> ExperimentConfig:
    values = {
        "num_uniform_negatives": 20,
        "num_batch_negatives": 5,
        "topk_sampling": True,
        "topk_sampling_k": 8,
        "mask_collisions": False,
        "train_batch_size": 6,
    }
    return make_config(**{**values, **changes})


def plain_tron(model, config: ExperimentConfig) -> PlainTron:
    """The reference with the weights of one of our models, in float64 and without dropout."""
    reference = PlainTron(
        ITEMS,
        dim=config.embedding_dim,
        length=config.sequence_length,
        dropout=0.0,
        uniform=config.num_uniform_negatives,
        in_batch=config.num_batch_negatives,
        topk=config.topk_sampling_k,
    ).double()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(weights[PaddedReference.name_in_model(name)])
    return reference


def some_sessions(count: int = 6):
    rng = np.random.default_rng(3)
    return pack_sessions(
        rng.integers(1, ITEMS + 1, length).tolist() for length in rng.integers(2, 11, count)
    )


def test_the_plain_step_has_our_loss_and_gradients_on_the_same_negatives() -> None:
    config = tiny_config()
    model, _ = build_pair(config, ITEMS)
    reference = plain_tron(model, config)
    sessions = some_sessions()
    ours = training_batch(sessions, np.arange(6), config.sequence_length)
    negatives = sample_negatives(
        ours, Distribution(ITEMS), num_uniform=20, num_batch=5, sampling_style="batchwise",
        reject_uniform_session_items=False, reject_in_batch_items=True,
    )  # fmt: skip
    order = np.argsort(np.minimum(sessions.lengths - 1, config.sequence_length), kind="stable")
    theirs = reference.collate(sessions, order)
    theirs = dataclasses.replace(
        theirs,
        mask_BL=theirs.mask_BL.double(),
        uniform_K=negatives.uniform,
        in_batch_BM=ours.inputs_N[negatives.in_batch_BM],
    )
    loss = reference.loss(theirs)
    loss.backward()
    positive_N, negative_NK, keep_NK = sampled_logits(
        model(ours), model.item_table, ours, negatives, topk=8, mask_collisions=False
    )
    expected = ssm(positive_N, negative_NK, keep_NK).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradient = model.item_embedding.weight.grad[1:]
    torch.testing.assert_close(reference.items.weight.grad[1:], gradient, rtol=1e-8, atol=1e-10)


def test_collate_pads_in_front_and_draws_by_the_rules() -> None:
    sessions = some_sessions()
    reference = PlainTron(ITEMS, dim=8, length=6, uniform=30, in_batch=5, topk=8)
    batch = reference.collate(sessions, np.arange(6))
    inputs = [sessions[row][-7:][:-1].tolist() for row in range(6)]
    for row in range(6):
        padding = [0] * (6 - len(inputs[row]))
        assert batch.inputs_BL[row].tolist() == padding + inputs[row]
        assert batch.targets_BL[row].tolist() == padding + sessions[row][-7:][1:].tolist()
        others = [item for other in range(6) if other != row for item in inputs[other]]
        drawn = batch.in_batch_BM[row].tolist()
        assert all(drawn.count(item) <= others.count(item) for item in drawn)
    assert not set(batch.uniform_K.tolist()) & {item for row in inputs for item in row}
    torch.testing.assert_close(batch.mask_BL, (batch.inputs_BL > 0).float())


def test_evaluation_by_time_step_finds_our_ranks() -> None:
    config = tiny_config()
    model, _ = build_pair(config, ITEMS)
    model = model.float()
    reference = plain_tron(model, config).float()
    sessions = some_sessions()
    recall, mrr, loss = reference.validate(reference.collate(sessions, np.arange(6)))
    rank_E = predict(model, sessions, protocol="every-step", one_pass=True).rank_E
    assert recall.tolist() == [(rank_E <= cutoff).sum() for cutoff in CUTOFFS]
    expected = [(1 / rank_E[rank_E <= cutoff]).sum() for cutoff in CUTOFFS]
    assert mrr.tolist() == pytest.approx(expected, rel=1e-5)
    assert loss.isfinite()


def test_gsasrec_reference_is_gbce_of_the_masked_places() -> None:
    """softplus forms in plain Python, on logits by hand from the reference's hidden states."""
    torch.manual_seed(0)
    reference = PlainGSASRec(ITEMS, dim=8, length=6, negatives=5, gbce_t=0.75, dropout=0.0)
    sequences, negatives = reference.collate(some_sessions(), np.arange(6))
    loss = reference.loss(sequences, negatives).item()
    hidden = reference(sequences[:, :-1]).detach()
    table_VD = reference.outputs.weight.detach()
    alpha = 5 / (ITEMS - 1)
    beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    losses = []
    for row in range(6):
        for place in range(6):
            if sequences[row, place] == ITEMS + 1:
                continue
            ids = [sequences[row, place + 1], *negatives[row, place + 1]]
            logits = [float(hidden[row, place] @ table_VD[item]) for item in ids]
            total = beta * softplus(-logits[0]) + sum(softplus(logit) for logit in logits[1:])
            losses.append(total / 6)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_gsasrec_reference_never_looks_ahead_nor_at_padding() -> None:
    reference = PlainGSASRec(ITEMS, dim=8, length=6, negatives=2, dropout=0.0)
    inputs = torch.tensor([[41, 41, 3, 9, 27, 5]])
    hidden = reference(inputs)
    changed = reference(torch.tensor([[41, 41, 3, 9, 4, 8]]))
    torch.testing.assert_close(hidden[:, :4], changed[:, :4])
    with torch.no_grad():
        reference.items.weight[41] += 1  # what padding embeds must not matter
    torch.testing.assert_close(reference(inputs)[:, 2:], hidden[:, 2:])


def test_both_references_learn() -> None:
    torch.manual_seed(0)
    sessions = pack_sessions(
        [[1 + (start + step) % 10 for step in range(8)] for start in range(20)]
    )
    chosen = np.arange(20)
    # Two items beyond those of the batch are left to draw uniformly.
    tron = PlainTron(12, dim=16, length=7, uniform=5, in_batch=3, topk=4, dropout=0.0, lr=1e-2)
    gsasrec = PlainGSASRec(12, dim=16, length=7, negatives=4, dropout=0.0)

    def loss(reference) -> float:
        batch = reference.collate(sessions, chosen)
        batch = (batch,) if isinstance(batch, PaddedBatch) else batch
        return reference.loss(*batch).item()

    for reference in (tron, gsasrec):
        before = loss(reference)
        for _ in range(40):
            reference.step(sessions, chosen)
        assert loss(reference) < 0.7 * before


def test_generated_sessions_have_the_published_lengths() -> None:
    """17 to 19 % of OTTO's padded batches are filled; means are those of the data sets."""
    random = np.random.default_rng(0)
    expected = {"Yoochoose": 4.0, "Diginetica": 4.9}
    for name, mean in expected.items():
        assert LENGTHS[name].draw(100_000, random).mean() == pytest.approx(mean, rel=0.02)
    assert 0.17 < fill(generate_sessions(LENGTHS["OTTO"], 1000, 100_000), 50) < 0.19
    # MovieLens-1M's training histories fill 53.6 % of [B, 200] (counted in the file).
    movies = generate_sessions(LENGTHS["MovieLens-1M"], 3416, 20_000)
    assert fill(movies, 200) == pytest.approx(0.536, abs=0.01)


def test_generated_items_follow_a_zipf_like_law() -> None:
    items = draw_items(1000, 400_000, np.random.default_rng(0))
    counts = np.bincount(items, minlength=1001)
    assert counts[0] == 0
    assert len(counts) == 1001
    # By a law of exponent 0.8 the hundredth item has 10 ** -0.8 of the tenth's share.
    assert counts[95:106].mean() / counts[10] == pytest.approx(10**-0.8, rel=0.15)
    assert Lengths(4.5, 1.4).draw(1000, np.random.default_rng(0)).min() >= 2


def test_work_of_a_step_counted_by_hand() -> None:
    config = tiny_config(topk_sampling_k=3, num_blocks=1, embedding_dim=4)
    sessions = pack_sessions([[1, 2, 3], [4, 5]])
    work = step_work(config, sessions, np.array([0, 1]), num_items=1000)
    events, dim = 3, 4
    linear = 6 * dim * dim * events  # multiply-adds forward
    attention = 2 * dim * (1 + 2 + 1)  # scores and sums over 1, 2 and 1 places
    scored = events * (20 + 5 + 1) * dim
    kept = 2 * events * (3 + 1) * dim
    assert work.gflop == pytest.approx(2 * (3 * (linear + attention) + scored + kept) / 1e9)
    # 5 items of the sessions and about 20 others.
    assert work.gb == pytest.approx((5 + 20) * 7 * dim * 4 / 1e9, rel=0.03)


def test_turns_and_figures() -> None:
    done: list[tuple[str, int]] = []
    sides = {name: lambda work, name=name: done.append((name, work)) for name in "ab"}
    seconds = in_turns(sides, [(1,), (2,), (3,)], times={"a": 2})
    expected = [(name, work) for work in (1, 2, 3) for name in "aab"]
    assert done == expected
    assert (len(seconds["a"]), len(seconds["b"])) == (4, 2)  # the first turn warms up
    line = figure("x", [1.0, 2.0, 9.0], [6.0], work=Work(gflop=4.0, events=10), ceiling="fp32")
    assert (line["tron_s"], line["ratio"], line["gflop_per_s"]) == (2.0, 3.0, 2.0)
    assert "5 events/s" in table([line], {"fp32": 8.0})
    assert "(25%)" in table([line], {"fp32": 8.0})


SMALL = {
    "training_step": ["--items", "300", "500", "--lengths", "Yoochoose", "--steps", "1"],
    "evaluation": ["--items", "300", "--sessions", "128", "--repeats", "1"],
    "gsasrec_step": ["--items", "300", "--steps", "1"],
    "checkpoint": ["--items", "300", "--repeats", "1"],
    "startup": ["--items", "300", "--sessions", "400", "--repeats", "1",
                "num_uniform_negatives=64", "topk_sampling_k=8"],
    "ceilings": [],
}  # fmt: skip


@pytest.fixture
def small_benchmarks(monkeypatch):
    """The shapes of the settings, shrunk; ceilings of small matrices."""
    from benchmarks import ceilings, gsasrec_step, measure, startup, training_step

    def tron(**changes) -> ExperimentConfig:
        return tiny_config(num_batch_negatives=4, train_batch_size=16, **changes)

    def gsasrec(**changes) -> ExperimentConfig:
        return make_config(
            reuse_item_embeddings=False, loss="bce", num_uniform_negatives=4,
            num_batch_negatives=0, sampling_style="eventwise", train_batch_size=8, **changes,
        )  # fmt: skip

    small = ceilings.measure_ceilings(side=32, copied=1 << 12, repeats=1)
    for module in (ceilings, measure):
        monkeypatch.setattr(module, "measure_ceilings", lambda: small)
    monkeypatch.setattr(training_step, "settings", tron)
    monkeypatch.setattr(importlib.import_module("benchmarks.evaluation"), "settings", tron)
    monkeypatch.setattr(importlib.import_module("benchmarks.checkpoint"), "settings", tron)
    monkeypatch.setattr(gsasrec_step, "settings", gsasrec)
    monkeypatch.setattr(startup, "VALIDATION_SESSIONS", 5)
    monkeypatch.setattr(startup, "_LINES", 200)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "startup"])
def test_every_benchmark_runs(name, small_benchmarks, tmp_path, monkeypatch, capsys) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    if name == "training_step":  # in a process of its own it would take seconds
        monkeypatch.setattr(module, "peak_memory", module._measure_peak_memory)
    output = tmp_path / "result.json"
    module.main([*SMALL[name], "--output", str(output)])
    content = json.loads(output.read_text())
    assert len(content["commit"]) >= 40 or content["commit"] == "unknown"
    assert content["threads"] >= 1
    assert content["ceilings"]["fp32_gflop_per_s"] > 0
    if name != "ceilings":
        assert all(line["tron_s"] > 0 and line["ratio"] > 0 for line in content["figures"])
        assert content["figures"][0]["what"] in capsys.readouterr().out
    if name == "training_step":
        assert [line["items"] for line in content["figures"]] == [300, 300, 500, 500]
        assert set(content["growth_with_the_catalogue"]) == {"float32", "bf16"}
        assert content["peak_memory"]["500"]["above_mb"] > 0


@pytest.mark.slow
def test_pairs_run(tmp_path, monkeypatch) -> None:
    """It starts `tron train` once, and then two at once."""
    monkeypatch.setattr(pairs, "SESSIONS", 3_000)
    output = tmp_path / "result.json"
    words = ["--items=300", "--seconds=0", "--policies=GOMP_SPINCOUNT=10", f"--output={output}"]
    pairs.main([*words, "num_uniform_negatives=64", "topk_sampling_k=8", "train_batch_size=16"])
    (figure,) = json.loads(output.read_text())["figures"]
    assert figure["policy"] == "GOMP_SPINCOUNT=10"
    assert figure["alone_events_per_s"] > 0
    assert figure["pair_events_per_s"] == sum(figure["pairs"][0])


@pytest.mark.slow
def test_startup_runs(small_benchmarks, tmp_path) -> None:
    """It starts `tron train` three times over."""
    output = tmp_path / "result.json"
    startup.main([*SMALL["startup"], "--output", str(output)])
    train, help_text = json.loads(output.read_text())["figures"]
    assert train["tron_s"] > help_text["tron_s"] > 0


def test_exported_tables_run(tmp_path, capsys) -> None:
    from benchmarks import export

    dataset = write_dataset(tmp_path, train=[[1, 40]], test=cyclic_sessions(30, 1))
    checkpoint = random_checkpoint(dataset, tmp_path / "a.pt")
    output = tmp_path / "result.json"
    words = [checkpoint.path, "--data-dir", tmp_path, "--histories", 3, "--output", output]
    export.main(list(map(str, words)))
    ours, *theirs = json.loads(output.read_text())["figures"]
    assert ours["median ms"] > 0
    assert theirs[0]["same lists"] == 1
    sessions = dataset.split("test")
    found = predict(checkpoint.build_model(torch.device("cpu")), sessions, protocol="every-step")
    for each in theirs[:2]:
        assert each["R@20"] == pytest.approx(np.mean(found.rank_E <= 20), abs=0.02)
    assert "onnxruntime, int8" in capsys.readouterr().out


def test_summary_puts_all_results_in_one_table(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    line = figure("a step", [0.5], [1.0])
    content = {"ceilings": {"copy_gb_per_s": 10.0}, "figures": [line]}
    (tmp_path / "training_step.json").write_text(json.dumps(content))
    prepared = {"mb": 400, "mb_per_s": 200, "peak_memory_mb": 900,
                "times_as_tron_does": {"mb_per_s": 8.0}}  # fmt: skip
    (tmp_path / "prepare_otto.json").write_text(json.dumps({"prepare": [prepared]}))
    shown = bench.summary()
    assert "a step" in shown
    assert "2.0x" in shown
    assert "16.000 s" in shown


def test_an_unknown_benchmark_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["trainig_step"])
    assert "no benchmark named trainig_step" in capsys.readouterr().err


def test_means_over_seeds_are_compared_with_the_standard_error_of_their_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side, values in (("before", [0.2, 0.4]), ("after", [0.1, 0.3, 0.5])):
        for seed, value in enumerate(values):
            report = {"metrics": {"R@20": {"value": value}}}
            (tmp_path / f"{side}-shop-{seed}.eval.json").write_text(json.dumps(report))
    output = tmp_path / "result.json"
    words = [str(tmp_path), "--before=a", "--after=b", "--hardware=c", f"--output={output}"]
    same_accuracy.main(words)
    (figure,) = json.loads(output.read_text())["figures"]
    # Variances 0.02 of two and 0.04 of three.
    assert figure["standard_error"] == pytest.approx((0.02 / 2 + 0.04 / 3) ** 0.5)
    assert [figure["mean_before"], figure["mean_after"]] == pytest.approx([0.3, 0.3])
    assert "0.1528" in capsys.readouterr().out


def test_a_machine_without_git_measures_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.circumstances()["commit"] == "unknown"
