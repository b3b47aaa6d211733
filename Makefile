# Each target does all the set-up it needs. PYTHON is any Python 3.11-3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install base demo seeds digits ablation bench bench-gpu bench-check profile test test-slow test-gpu fuzz soak lint format clean

install: $(STAMP)

# torch first: with it in place, nothing below pulls in another build of it.
$(STAMP): setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

# A tiny model that answers plain questions about drawn scenes, an hour on two cores; BASE passes flags on.
base: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 trainer/base.py $(BASE)

demo: $(STAMP)
	$(BIN)/python trainer/demo.py

# Three runs of the demo, each beside continued SFT for the same seconds (docs/benchmarks.md).
seeds: $(STAMP)
	$(BIN)/python bench/studies/demo_seeds.py

# The same on scans of handwritten digits, from a base model of their own; DIGITS passes flags on.
digits: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 trainer/base.py --world digits --levels 0 \
		--max_steps 1200 --output_dir out/digits/base
	$(BIN)/python bench/studies/demo_seeds.py --world digits --base out/digits/base/model --output_dir out/digits $(DIGITS)

# The paper's methods on the drawn world, three seeds of each; ABLATION passes flags on.
ablation: $(STAMP)
	$(BIN)/python bench/studies/ablation.py $(ABLATION)

# Kernels, rewards and a whole step beside their peers, within a quarter of an hour; BENCH passes flags on (--full).
bench: $(STAMP)
	$(BIN)/python bench/bench.py $(BENCH)
	$(BIN)/python -P -m boxgrpo.bench.publish.report

# Build, test and measure on one GPU with what is installed, no network: nine minutes; GPU passes flags on.
bench-gpu:
	$(PYTHON) bench/bench.py --gpu $(GPU)

# What got slower: the last two days of results, or FILES="OLD.json NEW.json".
bench-check: $(STAMP)
	$(BIN)/python bench/publish/compare.py $(FILES)

# Where a step goes, range by range; PROFILE passes flags on (--read TRACE).
profile: $(STAMP)
	$(BIN)/python bench/profiles/profile_step.py $(PROFILE)

# Triton's interpreter and its compiler do not share a process.
test: $(STAMP)
	$(BIN)/pytest -q
	TRITON_INTERPRET=1 $(BIN)/pytest -q -m triton tests/kernel_tests tests/model/test_decoder.py

test-slow: $(STAMP)
	$(BIN)/pytest -q -m slow

test-gpu: $(STAMP)
	$(BIN)/pytest -q -m gpu

# The compiled box parser against Python's re, under the sanitizers and with libFuzzer, SECONDS each.
SECONDS ?= 60
fuzz: $(STAMP)
	$(BIN)/python tests/csrc/fuzz_rewards.py --seconds $(SECONDS)

# Runs that are killed, fed corrupt images and made NaN, then ZeRO-2 killed; SOAK passes flags on.
soak: $(STAMP)
	$(BIN)/python bench/soaks/soak.py $(SOAK)
	$(BIN)/python bench/soaks/soak.py --parts A --engine deepspeed --zero_stage 2 --output_dir out/soak_zero2 $(SOAK)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist *.egg-info kernels/_C*.so
