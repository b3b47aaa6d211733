"""DeepSpeed's ZeRO as an `Engine`. Schedule, packs and checkpoints stay ours."""

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from boxgrpo.trainer.runtime.ranks import Ranks

from .base import PeerOutOfMemory
from .optimizer import (
    STATE,
    make_optimizer,
    make_schedule,
    optimizer_state,
    schedule_state,
    set_optimizer_state,
    set_schedule_state,
)
from .room import NoRoom, room_checker


class DeepSpeedEngine:
    """Trains the parameters of `model` that require a gradient, their state shared out among the ranks.

    Attributes:
        lockstep: from stage 2 on ranks meet in each backward pass, at stage 3 in each layer: they must run the same
            number of packs, empty ones if need be. At stage 2 they ask each other before each backward pass whether
            memory has lasted, so that all start over where it has not.
        least_packs: DeepSpeed's step fails where there was no backward pass.
        shards_weights: at stage 3 no rank holds them all but within `gathered_weights`.

    Raises:
        ValueError: DeepSpeed cannot be imported.
    """

    least_packs = 1

    def __init__(self, model: nn.Module, options, ranks: Ranks, total_steps: int):
        deepspeed = import_deepspeed()
        self.deepspeed, self.stage, self.ranks, self.module = deepspeed, options.zero_stage, ranks, model
        self.lockstep, self.shards_weights = self.stage > 1, self.stage == 3
        if not dist.is_initialized():  # DeepSpeed wants a group, of one rank too
            os.environ.setdefault("LOCAL_RANK", "0")
            backend = "nccl" if ranks.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.check_room = room_checker(model, options, self.stage, ranks) if self.lockstep else None
        if self.stage == 3:
            # The root runs the fused head: the weight must be there after the module that owns it has let it go.
            deepspeed.zero.register_external_parameter(model, model.head_weight)
        self.config = deepspeed_config(options, model, self.stage)
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(trained, options), config=self.config
        )
        self.schedule = make_schedule(self.inner, options, total_steps)

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer of this rank's partitions."""
        return self.optimizer.optimizer

    def backward(self, loss: Tensor) -> None:
        if self.stage == 2 and self.ranks.sum(0)[0]:
            raise PeerOutOfMemory("on another rank")
        try:
            # The gradients of a loss that is not finite become NaN, which every rank then sees.
            self.model.backward(loss * (1 + 0 * loss.detach()), scale_wrt_gas=False)
        except torch.OutOfMemoryError as error:
            if self.stage == 1:
                raise
            raise ValueError(
                f"memory ran out in a backward pass ({error}), where other ranks wait for this one. Lower "
                "--tokens_per_pass, or set --gradient_checkpointing true."
            ) from error

    def start_over(self, error: torch.OutOfMemoryError) -> None:
        """Forget the gradients accumulated so far, after memory ran out; at stage 2 on every rank.

        Raises:
            ValueError: at stage 3, where the others wait for this rank in the middle of a layer.
        """
        if isinstance(error, NoRoom):
            return
        if self.stage == 3:
            raise ValueError(
                f"memory ran out ({error}), and at --zero_stage 3 no rank can start over alone. Lower "
                "--tokens_per_pass, or set --gradient_checkpointing true."
            ) from error
        if self.stage == 2 and not isinstance(error, PeerOutOfMemory):
            self.ranks.sum(1)  # what the others ask before their backward pass
        self._forget()

    def _forget(self) -> None:
        """Drop all that stages 1 and 2 have summed up since the last update; zero_grad alone leaves the sums."""
        zero = self.optimizer
        zero.zero_grad()
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        for sums in (zero.averaged_gradients, zero.all_grad_tensors):
            sums.update(dict.fromkeys(sums))
        zero.micro_step_id = -1

    def step(self) -> tuple[Tensor, bool]:
        self.model.step()
        updated = not self.optimizer.overflow
        if not updated and self.stage < 3:
            self._forget()  # with offload in bf16 DeepSpeed keeps the sum that is not finite, for every later step
        self.schedule.step()
        norm = torch.as_tensor(self.model.get_global_grad_norm() if updated else float("nan"))
        return norm, updated

    def frozen(self, model: nn.Module) -> Callable:
        """A model to call that is never trained: at stage 3 its weights are shared out, too."""
        if self.stage < 3:
            return model
        self.deepspeed.zero.register_external_parameter(model, model.head_weight)
        return self.deepspeed.initialize(model=model, config=self.config)[0]

    @contextmanager
    def gathered_weights(self):
        """Within the block every rank has all weights, and no layer waits for another rank.

        For sampling, whose steps differ from rank to rank, and for saving. Every rank must enter and leave together.
        """
        if self.stage < 3:
            yield
            return
        parts = self.optimizer.parameter_offload
        with self.deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            for hook in (*parts.forward_hooks, *parts.backward_hooks):
                hook.remove()
            parts.forward_hooks, parts.backward_hooks = [], []
            try:
                yield
            finally:
                parts._register_deepspeed_module(parts.module)

    def save(self, folder: Path) -> None:
        """This rank's partitions: fp32 weights and moments, and the schedule's place."""
        tensors = {"schedule": schedule_state(self.schedule)}
        for i, partition in enumerate(self._partitions()):
            tensors[f"{i}/weight"] = partition.detach()
            tensors |= {f"{i}/{key}": value for key, value in optimizer_state(self.inner, partition).items()}
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, folder / self._file())

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """What `save` wrote, on the same number of ranks."""
        tensors = load_file(folder / self._file())
        for i, partition in enumerate(self._partitions()):
            partition.data.copy_(tensors[f"{i}/weight"])
            set_optimizer_state(self.inner, partition, {k: tensors.get(f"{i}/{k}") for k in STATE})
        self._to_the_model()
        set_schedule_state(self.schedule, tensors["schedule"])

    def _file(self) -> str:
        return f"rank{self.ranks.rank}.safetensors"

    def _partitions(self) -> list[Tensor]:
        """Flat fp32 tensors that the optimizer updates on this rank."""
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def _to_the_model(self) -> None:
        """The model's weights from the partitions, as after a step."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
            return
        for low, high in zip(self.optimizer.fp16_partitioned_groups_flat, self._partitions(), strict=True):
            low.data.copy_(high.data)
        kept = self.optimizer.persistent_parameters  # small ones, which every rank keeps whole
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)


def import_deepspeed():
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"engine is 'deepspeed' and importing it fails: {error}. Install it (pip install deepspeed), "
            "or use --engine ddp."
        ) from error
    # Its shared-memory collectives for CPUs are compiled at first use, under a lock that a killed run leaves behind for
    # all later ones to wait for. gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls torch's collectives by their older names, and each call would be told.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    return deepspeed


def deepspeed_config(options, model: nn.Module, stage: int) -> dict:
    """DeepSpeed's configuration. Packs are accumulated by hand: the step ends when we say so."""
    bf16 = next(model.parameters()).dtype == torch.bfloat16
    zero: dict = {"stage": stage, "overlap_comm": False}
    if options.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    found = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": options.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if bf16:
        found["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if stage > 1:
            found["data_types"] = {"grad_accum_dtype": "fp32"}
    return found
