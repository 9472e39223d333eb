# Everything a person or CI does with this project. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXAMPLE := examples/chatglm-6b-tiny
CHECKPOINT ?= $(EXAMPLE)
OUT    ?= out/pipeline
JOBS   ?= 2

.PHONY: help setup test lint types unit slow pipeline demo picture clean

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

pipeline: $(STAMP)  ## split and verify CHECKPOINT=… into OUT=… (default: the example), then the same in int4
	$(BIN)/glmexport inspect $(CHECKPOINT)
	$(BIN)/glmexport split $(CHECKPOINT) -o $(OUT) --force
	$(BIN)/glmexport verify $(OUT) $(CHECKPOINT) --json $(OUT).json
	$(BIN)/glmexport slim $(OUT) -o $(OUT)-slim --force
	$(BIN)/glmexport embed $(OUT)-slim -o $(OUT)-bf16 --force
	$(BIN)/glmexport quantize $(OUT)-bf16 -o $(OUT)-int4 --bits 4 --force
	$(BIN)/glmexport verify $(OUT)-int4 $(CHECKPOINT) --json $(OUT)-int4.json

demo: $(STAMP)  ## the main job on the example: split, quantize to int4, then the verification reports
	$(BIN)/glmexport split $(EXAMPLE) -o out/demo --force
	$(BIN)/glmexport split $(EXAMPLE) -o out/demo-int4 --slim --embedding bf16 --quantize int4 --force
	$(BIN)/glmexport inspect out/demo-int4
	$(BIN)/glmexport verify out/demo-int4 $(EXAMPLE)
	$(BIN)/glmexport verify out/demo $(EXAMPLE)

picture: $(STAMP)  ## draw the pictures in the README, docs/verify.svg and docs/quantize.png, from real runs
	$(BIN)/python docs/picture.py docs

clean:     ## remove what was built, but for .venv
	rm -rf out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
