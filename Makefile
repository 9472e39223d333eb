# Everything a person or CI does with this project. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXAMPLE := examples/chatglm-6b-tiny
TINY   := examples/tiny-chatglm
CHECKPOINT ?= $(EXAMPLE)
OUT    ?= out/pipeline
JOBS   ?= 2

.PHONY: help setup test lint types unit slow pipeline demo bench picture clean

help:      ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  \1\t/' | expand -t 14

setup: $(STAMP)  ## make .venv and install the project with every extra, versions pinned
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

test: lint types pipeline unit  ## every check: lint, types, the pipeline on the example, the tests

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

unit: $(STAMP)  ## the fast tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

slow: $(STAMP)  ## the tests that take longer
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow

pipeline: $(STAMP)  ## split and verify CHECKPOINT=… into OUT=… (default: the example), then the same in int4 and for MNN
	$(BIN)/glmexport inspect $(CHECKPOINT)
	$(BIN)/glmexport split $(CHECKPOINT) -o $(OUT) --force
	$(BIN)/glmexport verify $(OUT) $(CHECKPOINT) --json $(OUT).json
	$(BIN)/glmexport slim $(OUT) -o $(OUT)-slim --force
	$(BIN)/glmexport embed $(OUT)-slim -o $(OUT)-bf16 --force
	$(BIN)/glmexport quantize $(OUT)-bf16 -o $(OUT)-int4 --bits 4 --force
	$(BIN)/glmexport verify $(OUT)-int4 $(CHECKPOINT) --json $(OUT)-int4.json
	$(BIN)/glmexport convert mnn $(OUT)-int4 -o $(OUT)-mnn --force
	$(BIN)/glmexport verify $(OUT)-mnn $(CHECKPOINT) --json $(OUT)-mnn.json

demo: $(STAMP)  ## the example that answers: export, verify, float16, slim, bf16, int8, int4, a table of how each answers, and a chat
	$(BIN)/glmexport split $(TINY) -o out/demo/float32 --force
	$(BIN)/glmexport verify out/demo/float32 $(TINY)
	$(BIN)/glmexport split $(TINY) -o out/demo/float16 --dtype float16 --force
	$(BIN)/glmexport slim out/demo/float32 -o out/demo/slim --force
	$(BIN)/glmexport embed out/demo/slim -o out/demo/bf16 --force
	$(BIN)/glmexport quantize out/demo/bf16 -o out/demo/int8 --bits 8 --force
	$(BIN)/glmexport quantize out/demo/bf16 -o out/demo/int4 --bits 4 --force
	$(BIN)/glmexport verify out/demo/int4 $(TINY)
	$(BIN)/glmexport eval $(addprefix out/demo/,float32 float16 slim bf16 int8 int4) $(TINY)-heldout.jsonl
	printf '你好\n12+34=\nReverse: apple\n' | $(BIN)/glmexport chat out/demo/int4 --greedy

bench: $(STAMP)  ## times, memory and floors of the commands: BENCH="CHECKPOINT --work DIR [--only split-int4-rtn,load-int4]"
	$(BIN)/python benchmarks/run.py $(BENCH)

picture: $(STAMP)  ## draw the pictures in the README, docs/*.svg and docs/quantize.png, from real runs
	$(BIN)/python docs/picture.py docs

clean:     ## remove what was built, but for .venv
	rm -rf out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
