"""Weights that a run starts from, meta-parameters that it leaves alone, and torchvision's networks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import experiment as experiments
from pipeline import initial, launch, runs
from pipeline.algorithms.maml import MAML, MAMLConfig
from pipeline.errors import ConfigError, DataError
from pipeline.experiment import Experiment
from pipeline.learner import Learner, card_of, write_model
from pipeline.models.module import ModuleModel
from pipeline.models.torchvision_model import DEVIATION, MEAN, TorchvisionConfig
from pipeline.runs import RunFolder
from pipeline.tasks.objectives import Classification
from pipeline.types import MetaState, Params, TaskBatch
from tests.faults import assert_same_end, final_params

MLP = {"name": "mlp", "hidden": [6], "normalization": "batch"}
pytestmark = pytest.mark.usefixtures("one_thread")


def experiment(runs_folder: Path, data: Path, **sections: dict[str, Any]) -> Experiment:
    content: dict[str, Any] = {
        "name": "start",
        "task": {"family": "images", "data": str(data), "split": "random", "n_query": 2, "eval_n_query": 2},
        "model": MLP,
        "algorithm": {"name": "maml", "inner_lr": 0.1},
        "training": {"steps": 2, "meta_batch_size": 4, "backend": "local", "dtype": "float64", "validate_every": 1},
        "evaluation": {"validation_episodes": 4},
        "tracking": {"runs": str(runs_folder)},
    }
    for name, section in sections.items():
        # a section of another kind replaces the one above
        base = {} if {"name", "family"} & section.keys() else content[name]
        content[name] = {**base, **section}
    return experiments.from_dict(content, source="test")


def start(exp: Experiment) -> RunFolder:
    digest = experiments.check_fits(exp)
    run, _ = runs.open_run(exp, data_digest=digest, initial=lambda: initial.resolve(exp))
    return run


def fresh(exp: Experiment) -> MetaState:
    return experiments.build(exp, device=torch.device("cpu")).algorithm.init(exp.seed)


def other_weights(exp: Experiment) -> Params:
    return {k: v + 1 for k, v in fresh(exp).params.items()}


def assert_same(ours: Params, theirs: Params) -> None:
    assert ours.keys() == theirs.keys()
    assert [k for k, v in theirs.items() if not torch.equal(ours[k], v)] == []


# --- sources


def written(kind: str, exp: Experiment, weights: Params, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The weights as a source of each kind."""
    if kind == "safetensors":
        save_file(weights, folder / "weights.safetensors")
        return str(folder / "weights.safetensors")
    if kind == "pt":
        torch.save({"state_dict": weights, "epoch": 3}, folder / "weights.pt")
        return str(folder / "weights.pt")
    if kind == "run":
        torch.save(weights, folder / "weights.pt")
        training = exp.training.model_copy(update={"steps": 0, "init_from": str(folder / "weights.pt")})
        earlier = exp.model_copy(update={"training": training, "name": "earlier"})
        run = start(earlier)
        launch.run_workers(earlier, run)
        return str(run.path.parent)
    card = card_of(
        exp,
        objective="classification",
        input_shape=(1, 12, 12),
        num_outputs=5,
        preprocessing=None,
        data_digest="x",
        checkpoint={},
    )
    write_model(folder / "model", card, MetaState(weights, {}))
    if kind == "registered":
        monkeypatch.setattr("pipeline.tracking.Tracker.__init__", lambda self: None)
        monkeypatch.setattr("pipeline.tracking.Tracker.fetch_model", lambda self, uri: folder / "model")
        return "models:/start@champion"
    return str(folder / "model")


@pytest.mark.parametrize("kind", ["safetensors", "pt", "model", "registered", "run"])
def test_every_source_gives_its_weights(
    kind: str, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = experiment(tmp_path / "runs", tiny_data)
    weights = other_weights(exp)
    source = written(kind, exp, weights, tmp_path, monkeypatch)
    given = initial.resolve(experiment(tmp_path / "runs", tiny_data, training={"init_from": source}))
    assert given is not None
    assert given.source == f"training.init_from: {source}"
    assert_same(given.state.params, weights)
    assert given.state.buffers == {}


def test_a_run_starts_from_them_and_needs_their_file_no_more(tmp_path: Path, tiny_data: Path) -> None:
    """The bytes are the run's: the same start after the file has changed, and no file is asked for when it goes on."""
    file = tmp_path / "weights.pt"
    torch.save(other_weights(experiment(tmp_path, tiny_data)), file)

    def run_of(name: str, steps: int = 2) -> tuple[Experiment, RunFolder]:
        exp = experiment(tmp_path / name, tiny_data, training={"init_from": str(file), "steps": steps})
        return exp, start(exp)

    exp, undisturbed = run_of("undisturbed")
    launch.run_workers(exp, undisturbed)
    random = experiment(tmp_path / "random", tiny_data)
    of_random = start(random)
    launch.run_workers(random, of_random)
    assert not torch.allclose(final_params(undisturbed)["layer1.bias"], final_params(of_random)["layer1.bias"])
    exp, late = run_of("late")
    file.unlink()
    launch.run_workers(exp, start(exp))
    assert_same_end(late, undisturbed)
    with pytest.raises(ConfigError, match=r"weights\.pt: cannot be read"):
        run_of("anew")
    assert not (tmp_path / "anew" / "start" / "001").exists(), "a run that cannot start is none"


def test_damaged_or_missing_weights_in_a_run_are_told(tmp_path: Path, tiny_data: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(other_weights(experiment(tmp_path, tiny_data)), file)
    exp = experiment(tmp_path / "runs", tiny_data, training={"init_from": str(file)})
    run = start(exp)
    (run.path / runs.INITIAL_FILE).write_bytes(b"something else")
    with pytest.raises(DataError, match="damaged"):
        launch.run_workers(exp, run)
    exp = experiment(tmp_path / "others", tiny_data, training={"init_from": str(file)})
    run, _ = runs.open_run(exp, data_digest=experiments.check_fits(exp))
    with pytest.raises(DataError, match="has no weights to start from"):
        launch.run_workers(exp, run)


def test_no_steps_evaluate_the_given_weights_as_they_are(tmp_path: Path, tiny_data: Path) -> None:
    file = tmp_path / "weights.pt"
    weights = other_weights(experiment(tmp_path, tiny_data))
    torch.save(weights, file)
    exp = experiment(tmp_path / "runs", tiny_data, training={"init_from": str(file), "steps": 0})
    run = start(exp)
    launch.run_workers(exp, run)
    launch.run_workers(exp, run)  # once more: nothing is left to do
    assert run.checkpoints.steps() == [0]
    assert run.checkpoints.best() == 0
    assert_same(final_params(run), weights)


# --- what fits


def test_a_head_of_another_shape_stays_fresh(tmp_path: Path, tiny_data: Path) -> None:
    exp = experiment(tmp_path, tiny_data)
    weights = other_weights(exp) | {"head.weight": torch.zeros(7, 6), "transfer/classifier.weight": torch.zeros(9, 6)}
    torch.save(weights, tmp_path / "weights.pt")
    given = initial.resolve(experiment(tmp_path, tiny_data, training={"init_from": str(tmp_path / "weights.pt")}))
    assert given is not None
    assert given.state.params.keys() == {k for k in weights if not k.startswith(("head", "transfer"))}
    told = "(fresh: head.weight, head.bias; not taken: head.weight, head.bias, transfer/classifier.weight)"
    assert given.source.endswith(told)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer1.weight": None}, "it has no layer1.weight"),
        ({"layer1.bias": torch.zeros(3)}, r"other shapes: layer1.bias \[3\] instead of \[6\]"),
        ({"layer9.weight": torch.zeros(3)}, "the network has no layer9.weight"),
        ({"layer1.bias": torch.full((6,), torch.nan)}, "NaN or infinite values in layer1.bias"),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, Tensor | None], said: str, tmp_path: Path, tiny_data: Path
) -> None:
    weights = {**other_weights(experiment(tmp_path, tiny_data)), **change}
    torch.save({k: v for k, v in weights.items() if v is not None}, tmp_path / "weights.pt")
    exp = experiment(tmp_path, tiny_data, training={"init_from": str(tmp_path / "weights.pt")})
    with pytest.raises((ConfigError, DataError), match=said):
        initial.resolve(exp)


def test_what_is_no_source_is_told(tmp_path: Path, tiny_data: Path) -> None:
    def refuse(source: str, said: str) -> None:
        with pytest.raises((ConfigError, DataError), match=said):
            initial.resolve(experiment(tmp_path / "r", tiny_data, training={"init_from": source}))

    refuse(str(tmp_path / "nowhere"), "no state file")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    refuse(str(tmp_path / "broken.safetensors"), "not a state file")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")  # a pickled module: never loaded
    refuse(str(tmp_path / "module.pt"), "something else than tensors")
    torch.save([1, 2], tmp_path / "list.pt")
    refuse(str(tmp_path / "list.pt"), "no state dict")


# --- frozen in the outer loop


def test_frozen_meta_parameters_do_not_change_and_a_resumed_run_is_the_same(tmp_path: Path, tiny_data: Path) -> None:
    keys = {"freeze": ["layer1.*"], "outer": {"optimizer": "adamw", "weight_decay": 0.1}, "steps": 4}
    exp = experiment(tmp_path / "whole", tiny_data, training=keys)
    whole = start(exp)
    launch.run_workers(exp, whole)
    before = fresh(exp).params
    changed = {k for k, v in final_params(whole).items() if not torch.equal(v, before[k])}
    assert changed == {"norm1.weight", "norm1.bias", "head.weight", "head.bias"}
    parted = experiment(tmp_path / "parted", tiny_data, training=keys)
    run = start(parted)
    launch.run_workers(parted, run)
    shutil.rmtree(run.checkpoints.path(4))
    half = start(parted)
    if half.checkpoints.latest() is None:  # the best one was the last: nothing earlier is kept
        pytest.skip("no earlier checkpoint was kept")
    launch.run_workers(parted, half)
    assert_same(final_params(half), final_params(whole))


def test_patterns_of_nothing_or_of_everything_are_refused(tmp_path: Path, tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.freeze: 'block1\.\*' matches no parameter"):
        experiments.check_fits(experiment(tmp_path, tiny_data, training={"freeze": ["block1.*"]}))
    with pytest.raises(ConfigError, match=r"training\.freeze: nothing is left"):
        experiments.check_fits(experiment(tmp_path, tiny_data, training={"freeze": ["*"]}))


# --- torchvision


def resnet18(**keys: Any) -> dict[str, Any]:
    return {"name": "torchvision", "architecture": "resnet18", **keys}


def build(input_shape: tuple[int, ...] = (3, 32, 32), **keys: Any) -> ModuleModel:
    config = TorchvisionConfig(**resnet18(**keys))
    return config.build(input_shape=input_shape, num_outputs=5, dtype=torch.float64)


def pretrained(architecture: str = "resnet18") -> nn.Module:
    """As from a file: other weights, running statistics that are not 0 and 1, 1000 classes."""
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.get_model(architecture, weights=None)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return network


def test_resnet18_by_the_statistics_of_the_episode() -> None:
    model = build()
    params = model.init(0)
    assert params["fc.weight"].shape == (5, 512)
    assert model.constant_names == []
    x = torch.rand(1, 4, 3, 32, 32, dtype=torch.float64)
    outputs, _ = model.apply({k: v.unsqueeze(0) for k, v in params.items()}, x)
    network = torchvision.models.resnet18(weights=None, num_classes=5).double().train()
    network.load_state_dict(params, strict=False)
    mean, deviation = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, DEVIATION))
    torch.testing.assert_close(outputs[0], network((x[0] - mean) / deviation), rtol=1e-8, atol=1e-8)


def test_pretrained_statistics_are_those_of_evaluation_mode(tmp_path: Path, tiny_data_set: Any) -> None:
    """From a file of torchvision's, through a run, its training and a registered model that never sees the file."""
    network = pretrained("shufflenet_v2_x0_5")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    data = tiny_data_set(size=32, channels=3)
    exp = experiment(
        tmp_path / "runs",
        data,
        model={
            "name": "torchvision",
            "architecture": "shufflenet_v2_x0_5",  # the smallest
            "weights": str(tmp_path / "weights.pt"),
            "batch_norm": "pretrained",
            "batching": "loop",
        },
        algorithm={"name": "transfer", "inner_lr": 0.1, "adaptation_steps": 1},
        training={"steps": 1, "meta_batch_size": 1, "outer": {"optimizer": "adamw", "weight_decay": 0.1}},
        evaluation={"validation_episodes": 2},
    )
    run = start(exp)
    given = run.initial()
    assert given is not None
    (tmp_path / "weights.pt").unlink()
    launch.run_workers(exp, run)
    trained = final_params(run)
    assert torch.equal(trained["conv1.1.running_mean"], network.get_buffer("conv1.1.running_mean").double())
    assert not torch.equal(trained["conv1.0.weight"], network.get_parameter("conv1.0.weight").double())

    parts = experiments.build(exp, device=torch.device("cpu"))
    network.fc = nn.Linear(1024, 5)
    network = network.double().eval()
    state = parts.algorithm.init(0).params | given.params
    network.load_state_dict({k: v for k, v in state.items() if "/" not in k}, strict=False)
    x = torch.rand(1, 3, 3, 32, 32, dtype=torch.float64)
    of_model = {k: v.unsqueeze(0) for k, v in state.items() if "/" not in k}
    mean, deviation = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, DEVIATION))
    expected = network((x[0] - mean) / deviation)
    for batching in ("loop", "vmap"):
        parts.model.batching = batching  # type: ignore[attr-defined]
        outputs, observed = parts.model.apply(of_model, x, observe=True)
        assert observed == {}
        torch.testing.assert_close(outputs[0], expected, rtol=1e-8, atol=1e-8)

    card = card_of(
        exp,
        objective="classification",
        input_shape=(3, 32, 32),
        num_outputs=5,
        preprocessing=None,
        data_digest="x",
        checkpoint={},
    )
    write_model(tmp_path / "model", card, MetaState(trained, {}))
    learner = Learner.from_folder(tmp_path / "model")
    assert torch.equal(learner.state.params["conv1.1.running_mean"], trained["conv1.1.running_mean"])
    answers = learner.adapt(x[0].numpy(), ["a", "b", "b"]).predict(x[0].numpy())
    assert answers.shape == (3, 2)


def test_pretrained_statistics_take_no_gradient_and_no_inner_step() -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 36, 5)]
        return nn.Sequential(*layers)

    model = ModuleModel(make, dtype=torch.float64, batch_norm="pretrained")
    assert model.constant_names == ["1.running_mean", "1.running_var"]
    assert not set(model.constant_names) & set(model.parameter_names)
    config = MAMLConfig(name="maml", inner_lr=0.1, inner_weight_decay=0.1, adaptation_steps=2)
    maml = MAML(config, model=model, objective=Classification())
    state = maml.init(0)
    x, y = torch.rand(2, 5, 1, 8, 8, dtype=torch.float64), torch.arange(5).expand(2, -1)
    for batching in ("loop", "vmap"):
        model.batching = batching  # type: ignore[assignment]
        gradient = maml.meta_grad(state, TaskBatch(x, y, x.flip(0), y), step=0)
        for name in model.constant_names:
            assert not gradient.grads[name].any()
        assert gradient.grads["1.weight"].any()
        *_, adapted = maml.adaptation_path(state, x, y, steps=2, inductive=True)
        assert torch.equal(adapted.params["1.running_var"], torch.ones(2, 3, dtype=torch.float64))


def test_one_channel_is_repeated_to_three() -> None:
    grey, coloured = build((1, 32, 32)), build((3, 32, 32))
    params = {k: v.unsqueeze(0) for k, v in grey.init(0).items()}
    x = torch.rand(1, 2, 1, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(grey.apply(params, x)[0], coloured.apply(params, x.expand(-1, -1, 3, -1, -1))[0])
    with pytest.raises(ConfigError, match="1 or 3 channels"):
        build((2, 32, 32))


def test_names_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = TorchvisionConfig(**resnet18(weights="ResNet18_Weights.IMAGENET1K_V1"))
    name = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    cached = tmp_path / "hub" / "checkpoints" / name
    cached.parent.mkdir(parents=True)
    network = pretrained()
    torch.save(network.state_dict(), cached)
    assert torch.equal(config.download()["conv1.weight"], network.conv1.weight)

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    cached.unlink()
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(ConfigError, match=r"not in torch's cache .* cannot be downloaded \(no route to host\)"):
        config.download()
    with pytest.raises(ConfigError, match=r"none of resnet18's: ResNet18_Weights\.IMAGENET1K_V1"):
        TorchvisionConfig(**resnet18(weights="ResNet50_Weights.IMAGENET1K_V1")).download()


def test_configurations_that_cannot_be(tmp_path: Path, tiny_data: Path) -> None:
    assert TorchvisionConfig(**resnet18(weights=None)).weights == "none"
    with pytest.raises(ConfigError, match="neither none, nor a file"):
        experiment(tmp_path, tiny_data, model=resnet18(weights="imagenet"))
    with pytest.raises(ConfigError, match="takes statistics that come with weights"):
        experiment(tmp_path, tiny_data, model=resnet18(batch_norm="pretrained"))
    with pytest.raises(ConfigError, match="leave one out"):
        experiment(tmp_path, tiny_data, model=resnet18(weights="a.pt"), training={"init_from": "b.pt"})
    with pytest.raises(ConfigError, match=r"model\.architecture: 'resnet17'"):
        TorchvisionConfig(name="torchvision", architecture="resnet17").build(
            input_shape=(3, 32, 32), num_outputs=5, dtype=torch.float32
        )


def test_an_inner_optimizers_state_is_not_taken(tmp_path: Path, tiny_data: Path) -> None:
    """Of a run whose Reptile carries Adam on: half of it would be worse than none."""
    algorithm = {"name": "reptile", "inner_lr": 0.1, "inner_optimizer": "adam", "inner_state": "carried"}
    exp = experiment(tmp_path, tiny_data, algorithm={**algorithm, "inductive_statistics": "running"})
    given = MetaState({}, {"norm1.mean": torch.ones(3), "reptile/adam.t/": torch.tensor(5.0)})
    assert initial._running(given, exp, {"head.bias": torch.zeros(2)}).keys() == {"norm1.mean"}
