# make quickstart   install what running needs, then SFT and DPO on the built-in data, what the
#                   policy says and which tokens it rewards, and a page that shows it all
# make test         the same environment plus the test extra, then the suite
# make lint         ruff, as the pre-commit hook runs it
# make benchmark    what a DPO step takes in time and memory against PyTorch, how it grows, and
#                   whether its input keeps up; OPTIONS=--quick tries that all of it runs
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint benchmark

# Large buffers stay in huge pages of the heap instead of being mapped anew at every step:
# 1.17 times as fast on a CPU (glibc only; ignored elsewhere).
KEEP := 17179869184
TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=$(KEEP):glibc.malloc.trim_threshold=$(KEEP)

RUN := runs/quickstart
DECODE := launch/decode.py --model $(RUN):dpo --reference $(RUN):sft --beta 0.1 \
	--data $(RUN)/data/pairs_test.jsonl --limit 6 --max_new_tokens 32

quickstart: .venv/installed
	GLIBC_TUNABLES=$(TUNABLES) $(BIN)/python launch/train.py --config configs/quickstart.py --workdir $(RUN)
	$(BIN)/python $(DECODE) --method greedy --out $(RUN)/decoded/greedy.jsonl
	$(BIN)/python $(DECODE) --method beam --beam_size 5 --length_penalty 0 --early_stopping never --out $(RUN)/decoded/beam_5.jsonl
	$(BIN)/python launch/analyze.py credit --run $(RUN)
	$(BIN)/python launch/analyze.py credit-benchmark --run $(RUN)
	$(BIN)/python launch/analyze.py report --run $(RUN)

test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: .venv/installed-test
	GLIBC_TUNABLES=$(TUNABLES) $(BIN)/python benchmarks/dpo_step.py $(OPTIONS)
	$(BIN)/python benchmarks/memory.py $(OPTIONS)
	$(BIN)/python benchmarks/scaling.py $(OPTIONS)
	GLIBC_TUNABLES=$(TUNABLES) $(BIN)/python benchmarks/input.py $(OPTIONS)

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else f"Python 3.11 to 3.13 is needed, not {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@
