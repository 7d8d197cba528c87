"""FSDP2: every process keeps a shard of the weights, their gradients and the state of the optimizer."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from vg.config import RunConfig
from vg.errors import ConfigError
from vg.models.base import GroundingModel


def _is_set(variable: str) -> bool:
    """Whether `accelerate launch` has switched an option on."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def check_launcher() -> None:
    """Raise ConfigError if the processes were started for a library that is not supported."""
    for name, variable in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if _is_set(variable):
            raise ConfigError(
                f"{name} is not supported: choose FSDP version 2 in `accelerate config`, or launch with "
                "--use_fsdp --fsdp_version 2"
            )


def check_launch(config: RunConfig) -> None:
    """Raise ConfigError if the options of `accelerate launch` or the configuration cannot be combined with FSDP2."""
    check_launcher()
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    problems = {
        f"FSDP version {version} is not supported: launch with --fsdp_version 2": version != "2",
        "parameters on the host are not supported: launch with --fsdp_offload_params false": _is_set(
            "FSDP_OFFLOAD_PARAMS"
        ),
        "activation checkpointing of Accelerate is not supported: launch with --fsdp_activation_checkpointing false "
        "(grounding_dino has model.gradient_checkpointing)": _is_set("FSDP_ACTIVATION_CHECKPOINTING"),
        "an evaluation divides the weights again: launch with --fsdp_reshard_after_forward true": os.environ.get(
            "FSDP_RESHARD_AFTER_FORWARD", "true"
        ).lower()
        in ("0", "false", "no"),
        "optim.algorithm=muon needs whole matrices, of which FSDP2 leaves each process a shard: set "
        "optim.algorithm=adamw": config.optim.algorithm == "muon",
        "train.compile=true with FSDP2 is not supported: set train.compile=false": config.train.compile,
        "train.precision=fp16 with FSDP2 is not supported: set train.precision=bf16": config.train.precision == "fp16",
    }
    for problem, is_given in problems.items():
        if is_given:
            raise ConfigError(problem)


def prepare_for_training(
    accelerator: Accelerator, model: GroundingModel, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Prepare model and optimizer for training: wrapped for DDP, or sharded in place if launched with FSDP2.

    FSDP2 shards `layers_to_shard` one by one, whatever Accelerate's wrap policy is. Weights, gradients and sums over
    processes remain in float32 (or what they are), and the network runs under autocast, as with DDP.
    """
    if _is_set("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1:
        if not accelerator.is_fsdp2:  # Accelerate ignores it on a CPU
            accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        plugin = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in model.layers_to_shard()})
        plugin.mixed_precision_policy = None
        plugin.cpu_ram_efficient_loading = False
        # The loss does not change the output of the network in place, which torch warns of.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        accelerator.prepare_model(model, evaluation_mode=True)  # autocast, which prepare() leaves out for FSDP2
        model.register_load_state_dict_pre_hook(_shard_weights)
    return accelerator.prepare(model, optimizer)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def describe(model: nn.Module, processes: int) -> str:
    """Return how a model is distributed, for the plan of a run; "" for one process."""
    if processes == 1:
        return ""
    if not is_sharded(model):
        return f"DDP: each of {processes} processes has all weights"
    units = Counter(type(x).__name__.removeprefix("FSDP") for x in model.modules() if is_sharded(x) and x is not model)
    layers = ", ".join(f"{count} {name}" for name, count in units.items())
    return f"FSDP2: {processes} processes share weights, gradients and optimizer state; gathered one by one: {layers}"


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the context, every process has all weights: the numbers of their batches and prompts may differ.

    Without FSDP2 it does nothing.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def gather_full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every process must call it. Returns any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, layout: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, distributed like another tensor of the same shape."""
    if not isinstance(layout, DTensor) or isinstance(tensor, DTensor) or tensor.shape != layout.shape:
        return tensor
    tensor = tensor.to(layout.device, layout.dtype)
    return distribute_tensor(tensor, layout.device_mesh, layout.placements, src_data_rank=None)


def _shard_weights(module: nn.Module, weights: dict[str, Tensor], *_: Any) -> None:
    """Make whole weights loadable by a sharded model."""
    for name, own in module.state_dict().items():
        if name in weights:
            weights[name] = like(weights[name], own)
