"""Evaluation while a loop trains: the policy in memory is scored every so many steps, and the best one is kept.

`best/` in the output folder holds weights, config, tokenizer ... as `from_pretrained` reads them, the scores in
scores.json, and checksums in manifest.json.
"""

import dataclasses
import json
import logging
import os
import shutil
import time
from pathlib import Path

from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.options import DataOptions
from boxgrpo.trainer.run import read_usable, save_pretrained
from boxgrpo.trainer.runtime.checkpoints import Progress, seal, to_disk
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.reporter import BEST, SCORES, Reporter
from boxgrpo.trainer.runtime.spans import unclocked

from .answer import answer
from .grade import grade_texts, summarize

log = logging.getLogger(__name__)


class Validation:
    """Scores a policy on `eval_data`, as the evaluator does, and keeps the checkpoint with the best mean Acc@0.5.

    Args:
        options: of the run. Without `eval_every` nothing is read, and nothing ever happens.

    Raises:
        ValueError: no file, or no record with a gold box.
    """

    def __init__(self, options: DataOptions, processor: Processor, r: Ranks):
        self.options, self.processor, self.r = options, processor, r
        self.told: set[int] = set()  # records whose faults the log has named
        if options.eval_every:
            held_out = {"data": options.eval_data, "schema": "auto", "image_root": options.eval_image_root}
            self.examples, self.faults = read_usable(dataclasses.replace(options, **held_out), needs="gold")
            if r.is_main:
                _mend(Path(options.output_dir))

    def after_step(
        self, progress: Progress, steps: int, policy, engine, report: Reporter, *, stop: bool = False
    ) -> None:
        """Evaluate where it is due and has not been done; every rank calls it.

        What `progress` then knows a checkpoint must keep: a run that goes on compares with the best so far.

        Args:
            stop: the run is about to end, and has no time: it is done when the run goes on.
        """
        o, step = self.options, progress.step
        due = o.eval_every and (step % o.eval_every == 0 or step == steps)
        if not due or stop or progress.evaluated >= step:
            return
        started = time.perf_counter()
        with unclocked(), engine.gathered_weights():
            summary = self.scores(policy)
            if summary["accuracy_at_0.5"] > progress.best_accuracy:
                self._keep(policy, {"step": step, **summary})
                progress.best_accuracy, progress.best_step = summary["accuracy_at_0.5"], step
        progress.evaluated = step
        metrics = {f"eval/{name}": value for name, value in summary.items() if name != "tasks"}
        metrics |= {f"eval/tasks/{task}": t["accuracy_at_0.5"] for task, t in summary["tasks"].items()}
        metrics |= {"eval/best_accuracy_at_0.5": progress.best_accuracy, "eval/best_step": progress.best_step}
        report.log(step, metrics | {"timing_s/eval": time.perf_counter() - started})

    def scores(self, policy) -> dict:
        """`summarize`'s of the policy's greedy answers, and `skipped`; the same on every rank."""
        o, examples = self.options, self.examples
        texts, reasons = answer(
            policy,
            self.processor,
            examples,
            range(len(examples)),
            self.r,
            batch_size=o.eval_batch_size,
            max_completion_length=o.eval_max_completion_length,
            workers=o.dataloader_num_workers,
        )
        for n, reason in reasons.items():
            if self.r.is_main and n not in self.told:
                log.warning("skipped %s: %s", examples[n].source, reason)
        self.told |= reasons.keys()
        if not texts:
            raise ValueError(
                f"none of the {len(examples)} records of {o.eval_data} can be prepared. The first: "
                f"{next(iter(reasons.values()))} Correct --eval_data or --eval_image_root."
            )
        summary = summarize(grade_texts([examples[n] for n in texts], list(texts.values())))
        return summary | {"skipped": len(reasons) + len(self.faults)}

    def _keep(self, policy, scores: dict) -> None:
        """Write `best/` aside, then put it in the earlier one's place. All ranks stop where it cannot be written."""
        error = None
        if self.r.is_main:
            try:
                self._write(Path(self.options.output_dir), policy, scores)
            except Exception as failed:  # of a full disk: an OSError, a SafetensorError, the tokenizer's bare Exception
                error = failed
        error = self.r.gather(error and str(error))[0]
        if error:
            raise ValueError(
                f"{self.options.output_dir}/{BEST} cannot be written ({error}); an earlier one is as it was. Make "
                "room, or give another --output_dir."
            )

    def _write(self, root: Path, policy, scores: dict) -> None:
        target, aside, earlier = root / BEST, root / f".{BEST}.part", root / f".{BEST}.earlier"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_pretrained(policy, self.processor, aside)
        (aside / SCORES).write_text(json.dumps(scores, indent=1))
        seal(aside)
        if target.exists():
            shutil.rmtree(earlier, ignore_errors=True)
            os.rename(target, earlier)
        os.rename(aside, target)
        to_disk(root)
        shutil.rmtree(earlier, ignore_errors=True)


def _mend(root: Path) -> None:
    """After a kill between `_write`'s renames the earlier best has another name: give it its own back."""
    target, earlier = root / BEST, root / f".{BEST}.earlier"
    if earlier.exists() and not target.exists():
        os.rename(earlier, target)
