"""DeepSpeed's ZeRO as an `Engine`. Schedule, packs and checkpoints are not DeepSpeed's."""

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from boxgrpo.trainer.arguments import optional_import
from boxgrpo.trainer.runtime.ranks import Ranks, RunFailed

from .base import PeerOutOfMemory
from .memory_check import PacksDoNotFit, make_memory_check
from .optimizer import load_state, make_optimizer, make_schedule, save_state


class DeepSpeedEngine:
    """Trains the parameters of `model` that require a gradient; their optimizer state is sharded across the ranks.

    Ranks synchronise in each backward pass at stage 2, in each layer at stage 3. Before each backward pass of stage 2
    they exchange whether memory ran out on one of them; if so, all start over.

    Raises:
        ValueError: DeepSpeed cannot be imported.
    """

    min_packs = 1  # DeepSpeed's step fails if there was no backward pass

    def __init__(self, model: nn.Module, options, ranks: Ranks, total_steps: int):
        deepspeed = import_deepspeed()
        self.deepspeed, self.stage, self.ranks, self.module = deepspeed, options.zero_stage, ranks, model
        self.lockstep, self.shards_weights = self.stage > 1, self.stage == 3
        self.file = f"rank{ranks.rank}.safetensors"
        if not dist.is_initialized():  # DeepSpeed needs a process group of one rank too
            os.environ.setdefault("LOCAL_RANK", "0")
            backend = "nccl" if ranks.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.check_memory = make_memory_check(model, options, self.stage, ranks) if self.lockstep else None
        if self.stage == 3:
            # The root runs the fused head: it needs the weight after the module that owns it has partitioned it again.
            deepspeed.zero.register_external_parameter(model, model.head_weight)
        self.config = deepspeed_config(options, model, self.stage)
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], options)
        self.model, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.config)
        self.inner = self.optimizer.optimizer  # the optimizer of this rank's partitions
        self.schedule = make_schedule(self.inner, options, total_steps)

    def backward(self, loss: Tensor) -> None:
        if self.stage == 2 and self.ranks.sum(0)[0]:
            raise PeerOutOfMemory("on another rank")
        try:
            # If the loss is not finite, all gradients become NaN, after their reduction on every rank.
            self.model.backward(loss * (1 + 0 * loss.detach()), scale_wrt_gas=False)
        except torch.OutOfMemoryError as error:
            if self.stage == 1:
                raise
            raise RunFailed(
                f"memory ran out in a backward pass ({error}), where other ranks wait for this one. Lower "
                "--tokens_per_pass, or set --gradient_checkpointing true."
            ) from error

    def restart_step(self, error: torch.OutOfMemoryError) -> None:
        """Discard the gradients, at stage 2 on every rank.

        Raises:
            ValueError: at stage 3, where the others wait for this rank in the middle of a layer.
        """
        if isinstance(error, PacksDoNotFit):
            return
        if self.stage == 3:
            raise RunFailed(
                f"memory ran out ({error}), and at --zero_stage 3 no rank can start over alone. Lower "
                "--tokens_per_pass, or set --gradient_checkpointing true."
            ) from error
        if self.stage == 2 and not isinstance(error, PeerOutOfMemory):
            self.ranks.sum(1)  # matches the sum in the other ranks' `backward`
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        """Drop the gradients that stages 1 and 2 have summed since the last update: zero_grad alone keeps the sums."""
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
            self._drop_gradients()  # with offload in bf16 DeepSpeed would add a non-finite sum to all later steps
        self.schedule.step()
        norm = torch.as_tensor(self.model.get_global_grad_norm() if updated else float("nan"))
        return norm, updated

    def prepare_frozen(self, model: nn.Module) -> Callable:
        """At stage 3 the frozen weights are sharded across the ranks, too."""
        if self.stage < 3:
            return model
        self.deepspeed.zero.register_external_parameter(model, model.head_weight)
        return self.deepspeed.initialize(model=model, config=self.config)[0]

    @contextmanager
    def gathered_weights(self):
        """Within the block no layer waits for another rank: ranks may sample different numbers of tokens."""
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
        """Each rank writes its partitions."""
        save_state(folder / self.file, self._partitions(), self.inner, self.schedule)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, on the same number of ranks."""
        zero, partitions = self.optimizer, self._partitions()
        load_state(folder / self.file, partitions, self.inner, self.schedule)
        if self.stage < 3:
            zero.update_lp_params()
            return
        for low, high in zip(zero.fp16_partitioned_groups_flat, partitions.values(), strict=True):
            low.data.copy_(high.data)
        if whole := zero.persistent_parameters:  # small parameters, which every rank keeps unsharded
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def _partitions(self) -> dict[str, Tensor]:
        """The flat fp32 tensors that the optimizer updates on this rank, by number."""
        zero = self.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        return {str(number): partition for number, partition in enumerate(flat)}


def import_deepspeed():
    with optional_import("engine is 'deepspeed'", "Install it (pip install deepspeed), or use --engine ddp."):
        import deepspeed
    # Its shared-memory collectives for CPUs are compiled under a lock file, which a killed run leaves behind: all later
    # runs would wait for it. gloo is used in their place.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls torch's collectives by deprecated names, each of which warns.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    return deepspeed


def deepspeed_config(options, model: nn.Module, stage: int) -> dict:
    """DeepSpeed's configuration, without its gradient accumulation: a step ends when `step` is called."""
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
    if next(model.parameters()).dtype == torch.bfloat16:
        found["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if stage > 1:
            found["data_types"] = {"grad_accum_dtype": "fp32"}
    return found
