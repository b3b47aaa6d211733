"""Evaluation during training: the policy in memory is scored every `eval_every` steps, and the best one is saved.

`best/` in the output folder holds weights, config, tokenizer ... as `from_pretrained` reads them, the scores in
scores.json, and checksums in manifest.json.
"""

import dataclasses
import json
import logging
import os
import time
from pathlib import Path

from boxgrpo.trainer.data.loader import check_preparable
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_usable
from boxgrpo.trainer.engine.lora import save_pretrained
from boxgrpo.trainer.options import DataOptions
from boxgrpo.trainer.runtime.checkpoints import Progress
from boxgrpo.trainer.runtime.files import replace_folder, restore_folder, write_manifest
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.reporter import BEST, SCORES, Reporter

from .answer import ReadOrReason, answer_examples
from .decode import GreedyDecoder
from .grade import grade_texts, summarize

log = logging.getLogger(__name__)


class Validation:
    """Scores a policy on `eval_data`, as the evaluator does, and saves the policy with the best mean Acc@0.5.

    Args:
        options: of the run. Without `eval_every` no file is read and `after_step` does nothing.

    Raises:
        ValueError: the file is missing, has no record with a gold box, or none of its records can be prepared.
    """

    def __init__(self, options: DataOptions, processor: Processor, r: Ranks):
        self.options, self.processor, self.r = options, processor, r
        self.logged: set[int] = set()  # records whose faults are in the log
        if options.eval_every:
            held_out = {
                "data": options.eval_data,
                "schema": options.eval_schema,
                "box_unit": options.eval_box_unit,
                "image_root": options.eval_image_root,
            }
            self.examples, self.faults = read_usable(dataclasses.replace(options, **held_out), needs="gold")
            self._check_records()
            if r.is_main:
                restore_folder(Path(options.output_dir) / BEST)

    def _check_records(self) -> None:
        """Prepare records in turn until one can be prepared; log how many have an image that is not found."""
        remedy = f"Correct --eval_data {self.options.eval_data} or --eval_image_root."
        check_preparable(self.examples, self.processor.prompt, remedy)
        examples = ReadOrReason(self.examples)
        gone = [e.source for e in examples if any(isinstance(i, str) and not os.path.exists(i) for i in e.images)]
        if gone:
            log.warning("%d of %d records of eval_data lack an image, first %s", len(gone), len(examples), gone[0])

    def after_step(self, progress: Progress, steps: int, policy, engine, report: Reporter) -> None:
        """Evaluate if an evaluation is due after this step and is not done yet; every rank calls it.

        The best score so far is stored in `progress`, for a checkpoint: a resumed run compares with it. An evaluation
        that fails on any rank is logged, and the run continues.

        Args:
            steps: number of the run's last step, which is always evaluated.
        """
        o, step = self.options, progress.step
        due = o.eval_every and (step % o.eval_every == 0 or step == steps)
        if not due or progress.evaluated >= step:
            return
        started = time.perf_counter()
        progress.evaluated = step
        with engine.gathered_weights():
            summary, error = None, ""
            try:
                summary = self.scores(policy)
            except Exception as failed:  # whatever it is, the weights must not be lost
                log.debug("an evaluation failed", exc_info=True)
                error = f"rank {self.r.rank}: {type(failed).__name__}: {failed}"
            if errors := [*filter(None, self.r.gather(error))]:
                log.warning("the evaluation after step %d failed (%s). The run goes on.", step, errors[0])
                return
            accuracy = summary["accuracy_at_0.5"]
            if accuracy > progress.best_accuracy and self._save_best(policy, {"step": step, **summary}):
                progress.best_accuracy, progress.best_step = accuracy, step
        metrics = {f"eval/{name}": value for name, value in summary.items() if name != "tasks"}
        metrics |= {f"eval/tasks/{task}": t["accuracy_at_0.5"] for task, t in summary["tasks"].items()}
        metrics |= {"eval/best_accuracy_at_0.5": progress.best_accuracy, "eval/best_step": progress.best_step}
        report.log(step, metrics | {"timing_s/eval": time.perf_counter() - started})

    def scores(self, policy) -> dict:
        """`summarize`'s scores of the policy's greedy answers, and `skipped`; the same on every rank."""
        o, examples = self.options, self.examples
        decoder = GreedyDecoder(policy, self.processor, o.eval_max_completion_length)
        texts, reasons = answer_examples(decoder, examples, range(len(examples)), self.r, o)
        for n in reasons.keys() - self.logged if self.r.is_main else ():
            log.warning("skipped %s", reasons[n])
        self.logged |= reasons.keys()
        if not texts:
            raise ValueError(f"none of {len(examples)} records can be prepared. The last: {[*reasons.values()][-1]}")
        summary = summarize(grade_texts([examples[n] for n in texts], list(texts.values())))
        return summary | {"skipped": len(reasons) + len(self.faults)}

    def _save_best(self, policy, scores: dict) -> bool:
        """Replace `best/`; every rank returns whether it was written. If not, a warning is logged, and the old kept."""
        error, best = None, Path(self.options.output_dir) / BEST
        if self.r.is_main:
            try:
                with replace_folder(best) as folder:
                    save_pretrained(policy, self.processor, folder)
                    (folder / SCORES).write_text(json.dumps(scores, indent=1))
                    write_manifest(folder)
            except Exception as failed:  # of a full disk: an OSError, a SafetensorError, the tokenizer's bare Exception
                error = str(failed) or type(failed).__name__
        if error := self.r.gather(error)[0]:
            log.warning("%s cannot be written (%s); an earlier one is unchanged. Free disk space.", best, error)
        return not error
