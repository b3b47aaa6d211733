"""Image embeddings, and completions sampled by the policy itself or replayed from the file of an earlier run."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from boxgrpo.model.batch import Group, Pixels
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.model.generate import prefill
from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.presence import check_stored
from boxgrpo.trainer.runtime.ranks import Ranks, RunFailed
from boxgrpo.trainer.runtime.reporter import OPTIONS, truncate
from boxgrpo.trainer.runtime.spans import span

from .base import Vocabulary, prompt_digest

log = logging.getLogger(__name__)


class LocalRollout:
    """Samples with the policy itself. With `rollout_file` it also stores the completions, for a later replay.

    Args:
        stored: by file name, the bytes that a resumed run keeps of its rollout file.
        sharded: the weights are sharded, so ranks synchronise in every layer and end a round together.
    """

    def __init__(
        self,
        options,
        vocabulary: Vocabulary,
        ranks: Ranks,
        stored: dict[str, int] | None = None,
        *,
        sharded: bool = False,
    ):
        self.options, self.vocabulary, self.ranks, self.sharded = options, vocabulary, ranks, sharded
        self.rounds = options.gradient_accumulation_steps
        self.file = _open_store(options, ranks, stored or {}) if options.rollout_file else None
        # Before the next step's images, whose stream has the default priority, the lowest.
        self.stream = torch.cuda.Stream(priority=-1) if ranks.device.type == "cuda" and not sharded else None

    @property
    def written(self) -> dict[str, int]:
        return {Path(self.file.name).name: self.file.tell()} if self.file else {}

    def __call__(
        self, policy: Qwen2VL, groups: Sequence[Group], after_prefill: Callable[[], Any] = lambda: None
    ) -> list[Group]:
        sampled: list[Group] = []
        start = 0
        while start < len(groups):
            at_once = -(-len(groups) // self.rounds)  # rounded up
            part = groups[start : start + at_once]
            last = start + at_once >= len(groups)
            sample = functools.partial(self._sample, policy, part, after_prefill if last else lambda: None)
            found = None
            try:
                found = policy(work=sample) if self.sharded else sample()
            except torch.OutOfMemoryError as error:
                if self.sharded:
                    raise RunFailed(
                        f"memory ran out while {len(part)} prompts were sampled ({error}). Raise "
                        "--gradient_accumulation_steps, or lower --max_completion_length."
                    ) from error
            # After the except block, because its traceback holds references to what filled the memory.
            if found is None:
                torch.cuda.empty_cache()
                if at_once > 1:
                    self.rounds *= 2
                    log.warning("memory ran out while sampling; from now on in %d rounds per step", self.rounds)
                    continue
                log.warning("left out %s: sampling it alone runs out of memory", part[0].source)
            sampled += found or []
            start += at_once
        if self.file:
            for group in sampled:
                line = {"serial": group.serial, "ids": [c.tolist() for c in group.completions]}
                self.file.write(json.dumps(line | {"prompt": prompt_digest(group.prompt)}).encode() + b"\n")
            self.file.flush()
        return sampled

    @torch.no_grad()
    def _sample(self, policy: Qwen2VL, groups: Sequence[Group], after_prefill: Callable[[], Any]) -> list[Group]:
        """The groups with G completions each, all decoded at once."""
        o = self.options
        with span("prefill", len(groups), sum(len(g.prompt.input_ids) for g in groups)):
            decoding = prefill(
                policy,
                groups,
                eos_token_ids=self.vocabulary.eos_token_ids,
                num_generations=o.num_generations,
                max_completion_length=o.max_completion_length,
                static=not self.sharded,
            )
        after_prefill()
        preferred = self._preferred() if self.stream else contextlib.nullcontext()
        with span("decode", len(groups) * o.num_generations, o.max_completion_length), preferred:
            flat = decoding.run(
                after_step=after_prefill,
                temperature=o.temperature,
                top_k=o.top_k,
                top_p=o.top_p,
                seed=o.seed,
                forbidden=self.vocabulary.forbidden,
                anywhere=(lambda going: self.ranks.sum(going)[0] > 0) if self.sharded else bool,
            )
        n = o.num_generations
        return [replace(group, completions=flat[n * i : n * (i + 1)]) for i, group in enumerate(groups)]

    @contextlib.contextmanager
    def _preferred(self) -> Iterator[None]:
        """The block's work comes before that of other streams on the GPU, after what the current one has queued.

        It may free the current stream's memory, which its kernels still read, if it allocates none there.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:  # after an error too: the current stream may reuse memory that the block's work reads
            current.wait_stream(self.stream)


def _open_store(options, ranks: Ranks, stored: dict[str, int]):
    """Open this rank's file of completions, truncated to its size at the checkpoint of a resumed run."""
    path = Path(options.rollout_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.glob(f"{path.name}.rank*") if ranks.is_main else ():
        if int(other.name.rpartition(".rank")[2]) >= ranks.world_size:
            raise ValueError(f"{other} belongs to a run with more ranks, and a replay would read it. Remove it.")
    path = path if ranks.is_main else path.with_name(f"{path.name}.rank{ranks.rank}")
    if path.exists() and path.name in stored:
        truncate(path, stored[path.name])
    elif path.exists() and path.stat().st_size and not _begun_by_this_run(options):
        raise ValueError(
            f"rollout_file {path} is already there. Read it with --rollout replay, or name another to store in."
        )
    else:
        path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    return path.open("ab")


def _begun_by_this_run(options) -> bool:
    """Whether this run, killed before its first checkpoint and started again, began the file."""
    earlier = Path(options.output_dir) / OPTIONS
    if options.resume != "auto" or not earlier.exists():
        return False
    return yaml.safe_load(earlier.read_text()).get("rollout_file") == options.rollout_file


class ReplayRollout:
    """Completions stored by an earlier run, found by the prompt's serial number: for exact comparisons.

    Raises:
        ValueError: there is no such file, it is cut off, or completions are not as many or as short as the options say.
    """

    def __init__(self, options):
        self.path, self.num_generations, self.written = options.rollout_file, options.num_generations, {}
        self.longest = options.max_completion_length
        self.stored, self.prompts = {}, {}
        check_stored(self.path)
        path = Path(self.path)
        for file in (path, *path.parent.glob(f"{path.name}.rank*")):
            self._read(file)
        if not all(self.prompts.values()):
            log.warning("%s names no prompts: it is not checked that its completions belong to this data", path)

    def _read(self, file: Path) -> None:
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
            try:
                record = json.loads(line) if line.endswith(b"\n") else {}
                serial, ids = record["serial"], [torch.tensor(ids, dtype=torch.int64) for ids in record["ids"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"rollout_file {file}: line {number} is cut off, or holds no completions. Remove it, or store the "
                    "completions again with --rollout local."
                ) from error
            if len(ids) != self.num_generations:
                raise ValueError(
                    f"rollout_file {file}: line {number} holds {len(ids)} completions; num_generations is "
                    f"{self.num_generations}. Set --num_generations to what was stored."
                )
            if (most := max(map(len, ids))) > self.longest:
                raise ValueError(
                    f"rollout_file {file}: line {number} holds a completion of {most} tokens; max_completion_length is "
                    f"{self.longest}. Set --max_completion_length to what was stored."
                )
            self.stored[serial], self.prompts[serial] = ids, record.get("prompt")

    def check(self, loader: Loader, ranks: Ranks, steps: int) -> None:
        """Raise ValueError, on every rank, if completions of `steps` steps are missing or the first prompts differ."""
        if not steps:  # a finished run, resumed
            return
        per_step = loader.batch_size * ranks.world_size
        serials = range(loader.position, loader.position + steps * per_step)
        if missing := [serial for serial in serials if serial not in self.stored]:
            raise ValueError(
                f"rollout_file {self.path} holds no completions for sample {missing[0]}, of the run's step "
                f"{(missing[0] - loader.position) // per_step + 1} of {steps}. Lower --max_steps, or store more with "
                "--rollout local."
            )
        if faults := [*filter(None, ranks.gather(self._foreign(loader.peek_step())))]:
            raise ValueError(faults[0])

    def _foreign(self, groups: Sequence[Group]) -> str:
        """What is wrong where a group has no completions, or its prompt is not the one that they belong to."""
        for group in groups:
            if group.serial not in self.stored:
                return (
                    f"rollout_file {self.path} holds no completions for sample {group.serial}, which dynamic "
                    "sampling takes. Lower --max_steps or --max_refills, or store more with --rollout local."
                )
            if self.prompts[group.serial] not in (None, prompt_digest(group.prompt)):
                return (
                    f"rollout_file {self.path}: the completions of sample {group.serial} belong to another prompt than "
                    f"{group.source}. Give the --data, --seed and pixel limits that stored them, or store them again."
                )
        return ""

    def __call__(self, policy, groups: Sequence[Group], after_prefill: Callable[[], Any] = lambda: None) -> list[Group]:
        after_prefill()
        if fault := self._foreign(groups):
            raise ValueError(fault)
        return [replace(group, completions=self.stored[group.serial]) for group in groups]


@torch.no_grad()
def embed_images(model: Qwen2VL, groups: Sequence[Group], *, sharded: bool = False) -> list[Group]:
    """Add the frozen tower's output to the groups; all images run in one pass, or in more if memory runs out.

    A group whose images do not fit into memory even alone is skipped with a warning. With `sharded` weights all ranks
    synchronise in the tower: then it runs without images too, and raises if memory runs out.
    """
    prompts = [g.prompt for g in groups]
    pixels = [p.pixels for p in prompts if p.pixels is not None]
    if not pixels and not sharded:
        return list(groups)
    embeds = None
    try:
        grids = torch.cat([p.image_grid_thw for p in prompts])
        embeds = model.visual(Pixels.concat(pixels, model.head_weight.device), grids)
    except torch.OutOfMemoryError:
        if sharded:
            raise
    if embeds is None:
        torch.cuda.empty_cache()
        if len(groups) == 1:
            log.warning("left out %s: its images alone run out of memory", groups[0].source)
            return []
        half = len(groups) // 2
        return embed_images(model, groups[:half]) + embed_images(model, groups[half:])
    merge = model.config.vision_config.spatial_merge_size**2
    parts: tuple[Tensor, ...] = embeds.split(
        [0 if p.pixels is None else len(p.pixels.patches) // merge for p in prompts]
    )
    return [
        g if g.prompt.pixels is None else replace(g, image_embeds=part) for g, part in zip(groups, parts, strict=True)
    ]


class PrefetchedBatches:
    """The loader's groups and the embeddings of their images by a frozen tower.

    With `early`, the GPU embeds the next step's images on a separate stream while this step decodes, because decoding
    leaves the matrix units nearly idle; prefill needs them.

    Args:
        embed: adds embeddings to groups; None: the tower is trained and runs in every pack.
        early: whether to embed the next step's images ahead.

    Attributes:
        position: the first slot, over all ranks, that was not taken; from it a resumed run continues.
    """

    def __init__(self, loader: Loader, embed: Callable[[list[Group]], list[Group]] | None, *, early: bool):
        self.loader, self.embed_images, self.early = loader, embed, early and embed is not None
        self.position = loader.position
        if self.early:  # a resumed run embeds images in the same batches as an undisturbed one: the same bits
            loader.position -= loader.position % (loader.batch_size * loader.world_size)
        self.stream = torch.cuda.Stream() if self.early and torch.cuda.is_available() else None
        self._batches = iter(loader)
        self._waiting: list[Group] = []  # of the slots from `position` up to the loader's

    def take(self, slots: int) -> list[Group]:
        """This rank's groups of the next `slots` slots of all ranks; with embeddings where those are computed ahead."""
        start, self.position = self.position, self.position + slots
        while self.loader.position < self.position:
            groups = next(self._batches)
            self._waiting += self.embed_images(groups) if self.early else groups
        taken = [g for g in self._waiting if start <= g.serial < self.position]
        self._waiting = [g for g in self._waiting if g.serial >= self.position]
        return taken

    def embed(self, groups: list[Group]) -> list[Group]:
        """The groups with their embeddings."""
        if not self.early:
            return self.embed_images(groups) if self.embed_images else groups
        if self.stream:
            current = torch.cuda.current_stream()
            current.wait_stream(self.stream)
            for group in groups:
                if group.image_embeds is not None:
                    group.image_embeds.record_stream(current)
        return groups

    def embed_ahead(self) -> None:
        """If images are loaded, queue their embedding behind all that is queued so far, until a whole step has its."""
        step = self.loader.batch_size * self.loader.world_size
        if not self.early or self.loader.position >= self.position + step or not self.loader.ready():
            return
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        groups = next(self._batches)
        with (
            torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext(),
            span("vision", sum(len(g.prompt.image_grid_thw) for g in groups)),
        ):
            self._waiting += self.embed_images(groups)
