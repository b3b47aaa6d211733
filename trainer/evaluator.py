"""Scores a checkpoint, or answers from a file, on a benchmark; boxes are read by the rewards' parser.

torchrun trainer/evaluator.py --bench mig --model CHECKPOINT --data MIG_data.json --image_root FOLDER
python -P -m boxgrpo.trainer.evaluator --bench mig --data MIG_data.json --predictions ANSWERS.json --json -

A killed evaluation is resumed by the same command. Its files are listed in trainer/evaluation/evaluate.py.
"""

import json
from pathlib import Path

from boxgrpo.trainer.arguments import parse
from boxgrpo.trainer.evaluation.benches import BENCHES
from boxgrpo.trainer.evaluation.evaluate import evaluate, output_folder, report
from boxgrpo.trainer.evaluation.report import scores_table
from boxgrpo.trainer.options import EvalOptions, validate_evaluator
from boxgrpo.trainer.runtime.files import replace_file
from boxgrpo.trainer.runtime.ranks import join_ranks, run_as_script


def main(args: list[str] | None = None) -> None:
    options = parse(EvalOptions, args, prog="evaluator.py")
    validate_evaluator(options)
    with join_ranks() as r:
        summary = evaluate(options, r)
        if not r.is_main:
            return
        scores = json.dumps(report(options, summary), indent=1)
        if options.json == "-":
            print(scores)
            return
        if options.json:
            Path(options.json).parent.mkdir(parents=True, exist_ok=True)
            replace_file(Path(options.json), scores)
        bench = BENCHES[options.bench]
        print(scores_table(summary, bench))
        print(f"skipped {summary['skipped']}")
        if folder := output_folder(options):
            print(f"see {folder}/{'' if bench.module else 'report.html, '}table.md and results.json")


if __name__ == "__main__":
    run_as_script(main, "evaluator.py")
