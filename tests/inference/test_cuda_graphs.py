"""CUDA graphs for inference: sizes, static inputs and outputs, eviction and fallback, with a recorder that reruns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vg
from tests.models.grounding_dino.tiny import batch_of, sample, tiny_model
from tests.training.synchronizations import synchronizations
from vg.errors import ConfigError
from vg.inference import cuda_graphs, torch_backend
from vg.inference.cuda_graphs import CudaGraphs, Recorder
from vg.models.grounding_dino import backbone, model
from vg.models.grounding_dino.model import GroundingDino, Output
from vg.types import Batch


class Rerun:
    """Stands for a CUDA graph: a replay runs the function again, and overwrites the memory of its first output."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        output = function()

        def replay() -> None:
            self.replayed += 1
            for static, new in zip(output, function(), strict=True):
                if isinstance(static, Tensor):
                    static.copy_(new)

        return replay, output


@pytest.fixture
def network() -> GroundingDino:
    return tiny_model()


def batch(network: GroundingDino, seed: int, size: tuple[int, int] = (64, 96), phrase: str = "cat") -> Batch:
    return batch_of(network, sample([phrase], size, seed))


def assert_same(found: Output, expected: Output) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x is y is None or torch.equal(x, y)


@torch.no_grad()
def test_a_size_is_recorded_after_two_calls_and_replayed(network: GroundingDino) -> None:
    recorder = Rerun()
    graphs = CudaGraphs(network, recorder)
    batches = [batch(network, seed, phrase=phrase) for seed, phrase in enumerate(("cat", "dog", "cat", "dog", "cat"))]
    outputs = [graphs(x) for x in batches]
    assert (recorder.recorded, recorder.replayed) == (1, 3)
    for x, output in zip(batches, outputs, strict=True):  # of earlier calls: a replay overwrites none of them
        assert_same(output, network(x))


@torch.no_grad()
def test_sizes_have_graphs_of_their_own_and_few_are_kept(network: GroundingDino, monkeypatch: Any) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    recorder = Rerun()
    graphs = CudaGraphs(network, recorder)
    wide, high, square = (batch(network, 0, size) for size in ((64, 96), (96, 64), (64, 64)))
    padded = batch_of(network, sample(["cat"], (64, 96)), sample(["cat"], (64, 64)))
    turned = batch_of(network, sample(["cat"], (64, 64)), sample(["cat"], (64, 96)))
    for x in (padded, turned):  # tensors of the same sizes, but other padding
        for _ in range(3):
            assert_same(graphs(x), network(x))
    assert recorder.recorded == 2
    for x in (wide, high, square):
        for _ in range(3):
            assert_same(graphs(x), network(x))
    assert recorder.recorded == 5
    assert len(graphs.graphs) == 2
    graphs(high)
    assert recorder.recorded == 5
    for _ in range(3):
        graphs(wide)  # was dropped, and is counted again
    assert recorder.recorded == 6
    assert [key[0] for key in graphs.graphs] == [high.sizes, wide.sizes], "the least recently used one was dropped"


@torch.no_grad()
def test_few_sizes_are_counted(network: GroundingDino, monkeypatch: Any) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_KEYS", 2)
    graphs = CudaGraphs(lambda batch: None, Rerun())
    for width in range(64, 96, 8):
        graphs(batch(network, 0, (64, width)))
    assert len(graphs.calls) <= 2


@torch.no_grad()
def test_a_network_that_cannot_be_recorded_runs_without(network: GroundingDino) -> None:
    def record(function: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, x = CudaGraphs(network, record), batch(network, 0)
    with pytest.warns(UserWarning, match=r"cuda_graphs: .* runs without: operation not permitted") as warned:
        outputs = [graphs(x) for _ in range(3)]
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs += [graphs(batch(network, 0, (64, 64))) for _ in range(4)]
    for output in outputs[:3]:
        assert_same(output, network(x))


def test_the_setting_of_a_grounder(network: GroundingDino, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r'cuda_graphs: cpu has none; use device="cuda", or cuda_graphs=False'):
        vg.Grounder(network, device="cpu", cuda_graphs=True)
    image = sample(["cat"]).image
    expected = vg.Grounder(network, device="cpu").predict_batch([image] * 4, ["cat"] * 4)
    recorder, made = Rerun(), []
    monkeypatch.setattr(torch_backend, "Recorder", lambda device: made.append(device) or recorder)
    monkeypatch.setattr(torch_backend, "checked_device", lambda device: device)
    monkeypatch.setattr(network, "to", lambda device: network)
    grounder = vg.Grounder(network, device="cuda", cuda_graphs=True)
    assert len(made) == 1
    found = list(grounder.stream([image] * 4, "cat", 0.0, batch_size=1))
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(own.boxes), torch.from_numpy(other.boxes), atol=1e-3, rtol=1e-4)
    grounder.to("cuda")
    assert list(grounder.stream([image] * 4, "cat", 0.0, batch_size=1))
    assert recorder.recorded == 2, "it is recorded again on another device"
    rough = vg.Grounder(network, device="cuda", dtype="bf16", cuda_graphs=True)
    assert list(rough.stream([image] * 4, "cat", 0.0, batch_size=1))
    assert recorder.recorded == 3
    with pytest.raises(ConfigError, match=r"use compile\(\) or cuda_graphs, not both"):
        grounder.compile()


@pytest.mark.parametrize("phrases", [["cat"], ["cat", "dog", "red circle", "blue square"]])
@torch.no_grad()
def test_a_recorded_pass_reads_no_memory_of_the_host(phrases: list[str], monkeypatch: Any) -> None:
    """Neither for sizes, which are made by kernels, nor for prompts, of which an image may have several."""
    network = tiny_model(max_tokens=8)
    x = batch_of(network, sample(phrases, (64, 96)), sample(phrases, (64, 64)))
    assert (len(x.text.token_ids) > 2) == (len(phrases) > 1)
    expected = network(x)
    for module in (backbone, model):
        monkeypatch.setattr(module, "is_capturing_cuda_graph", lambda device: True)
    monkeypatch.setattr(network.text, "cached", None)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", None)
        assert_same(network(x), expected)
    network.to("meta")
    x = x.pack().to("meta", non_blocking=True)
    with synchronizations() as found:
        network(x)
    assert found == []


class Cuda:
    """Stands for the part of torch.cuda that records: which device and stream are current, and graphs."""

    def __init__(self) -> None:
        self.current = ["cuda:0", "default"]
        self.calls: list[tuple[str, ...]] = []

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current[0] = self.current[0], str(device)
        try:
            yield
        finally:
            self.current[0] = before

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.current[1] = self.current[1], stream
        try:
            yield
        finally:
            self.current[1] = before

    @contextmanager
    def graph(self, graph: Any, pool: str, stream: str, capture_error_mode: str) -> Iterator[None]:
        self.current[1] = stream
        yield  # like torch, it does not return to the stream before if this fails
        self.current[1] = "default"

    def Stream(self, device: torch.device) -> str:  # noqa: N802
        return f"stream of {device}"

    def graph_pool_handle(self) -> str:
        return "pool"

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.calls.append(("replay", *self.current)))


@pytest.mark.parametrize("fail", [False, True])
def test_a_graph_belongs_to_the_device_of_the_network(fail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)

    def network() -> str:
        cuda.calls.append(("run", *cuda.current))
        if fail:
            raise RuntimeError("operation not permitted when stream is capturing")
        return "output"

    recorder = Recorder(torch.device("cuda:1"))
    if fail:
        with pytest.raises(RuntimeError, match="not permitted"):
            recorder(network)
    else:
        replay, output = recorder(network)
        replay()
        assert output == "output"
    expected = [("run", "cuda:1", "stream of cuda:1"), ("replay", "cuda:1", "default")]
    assert cuda.calls == expected[: 2 - fail]
    assert cuda.current == ["cuda:0", "default"]
