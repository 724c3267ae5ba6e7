PYTHON ?= python3
PORT ?= 5000
RATE ?= 100000/min
SECONDS ?= 60
BIN := .venv/bin
UV_VERSION := 0.13.9
REQUIREMENTS := requirements.txt requirements-serve.txt requirements-transfer.txt requirements-operations.txt requirements-docs.txt benchmarks/requirements.txt
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --require-hashes --constraint requirements.lock
# Files of tests, two at a time, in their order: the one that takes the longest is not the last.
TWO_FILES := --numprocesses 2 --dist loadfile --no-loadscope-reorder
EXECUTE := $(BIN)/jupyter nbconvert --to notebook --execute --ExecutePreprocessor.record_timing=False
SHELL := bash
.DELETE_ON_ERROR:
.NOTPARALLEL:

define EXAMPLES
from score import load_card, load_model, score
model, card = load_model(), load_card()
for text in "WINNER! Your number was drawn. Call 09061701461 now to claim", "Running late, see you at eight":
    is_spam, propensity = score(text, model, card["threshold"])
    print(f"{'spam' if is_spam else 'ham ':5} propensity {propensity:.3f}  {text}")
endef
export EXAMPLES

# nbconvert would take the cells' execution counts away too.
define STRIP
import sys
import nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
for cell in notebook.cells:
    if "private-output" in cell.metadata.get("tags", []):
        cell.outputs = []
nbformat.write(notebook, sys.argv[1])
endef
export STRIP

.PHONY: help run impact monitoring style check test coverage serve ui notebooks transfer bench profile attack evaluate \
	operate stream batch story backup restore forget docs image up down hooks \
	lock clean clean-experiments

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' Makefile

run: build/train.ipynb  ## prepare the data, train, select and save the model, show what it does
	@echo; cat build/benchmarks.md; echo; cat build/repeated.txt; echo
	@$(BIN)/python -c "$$EXAMPLES"
	@echo; echo "Serve it with 'make serve' and open http://127.0.0.1:$(PORT)"

impact: build/impact.ipynb  ## what the filter does to users and money, and the experiment that decides

monitoring: build/monitoring.ipynb  ## what goes wrong with a filter in service, and who would notice how soon

style: .venv/requirements.txt  ## check the style and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache

check: style | build  ## style, and the tests that take no notebook run, torch, Docker, browser, proxy, fault, store or docs
	$(BIN)/python -m pytest --no-header -m "not (notebook or torch or docker or browser or proxy or fault or operations or docs)"

test: style .venv/requirements-transfer.txt .venv/requirements-operations.txt .venv/requirements-docs.txt | build  ## style and all tests
	set -o pipefail; $(BIN)/python -m pytest --no-header $(TWO_FILES) --cov --cov-report=term-missing | tee build/coverage.txt

coverage: test  ## all tests, and their report in coverage.txt
	sed -E 's/ in [0-9.]+s( \([0-9:]+\))?//' build/coverage.txt > build/coverage.tmp
	mv build/coverage.tmp coverage.txt

serve: .venv/requirements-serve.txt  ## serve the model on PORT
	PORT=$(PORT) $(BIN)/python app.py

ui: build/train.ipynb  ## look at the experiments in MLflow, on port 5001
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --port 5001

notebooks: .venv/requirements-transfer.txt .venv/requirements-operations.txt | build  ## execute the committed notebooks in place
	$(EXECUTE) --inplace prepare.ipynb
	WITH_TRANSFORMER=yes $(EXECUTE) --inplace train.ipynb
	$(EXECUTE) --inplace impact.ipynb
	$(EXECUTE) --inplace monitoring.ipynb
	$(EXECUTE) --output-dir build transfer_learning.ipynb
	@$(BIN)/python -c "$$STRIP" build/transfer_learning.ipynb
	mv build/transfer_learning.ipynb .

transfer: .venv/requirements-transfer.txt | build  ## fine-tune on photos and tweets (assignment 5)
	$(BIN)/papermill transfer_learning.ipynb build/transfer_learning.ipynb

bench: build/bench/requirements.txt .venv/requirements-operations.txt  ## measure the service against others under load
	build/bench/bin/python -m benchmarks.bench
	build/bench/bin/python -m benchmarks.starting
	build/bench/bin/python -m benchmarks.storing
	build/bench/bin/python -m benchmarks.streaming
	$(BIN)/python -m benchmarks.nightly
	build/bench/bin/python -m benchmarks.batches

profile: .venv/requirements-operations.txt  ## where the time and the memory of prepare, train, score and evaluate go
	$(BIN)/python -m benchmarks.profiles

attack: .venv/requirements.txt  ## attack the service with bad input, faults and heavy clients
	$(BIN)/python -m benchmarks.attack

evaluate: .venv/requirements.txt  ## measure the saved model on FILE, a labelled file of your own
	@test -n "$(FILE)" || { echo "Name the file to evaluate on: make evaluate FILE=messages.csv" >&2; exit 1; }
	@$(BIN)/python -m operations.evaluate "$(FILE)"

operate: .venv/requirements-operations.txt  ## run the service with its store, jobs and actions, and the operator's page
	PORT=$(PORT) $(BIN)/python -m operations

stream: .venv/requirements-operations.txt  ## replay messages of FILE or of today through queue, scorers and store, at RATE for SECONDS
	@$(BIN)/python -m operations.replay --rate $(RATE) --seconds $(SECONDS) "$(or $(FILE),data/today.tsv)"

batch: .venv/requirements-operations.txt  ## score the messages in IN, files here or on S3, to the folder OUT
	@test -n "$(IN)" -a -n "$(OUT)" || { echo "Name input and output: make batch IN=folder-or-url OUT=folder" >&2; exit 1; }
	@$(BIN)/python -m operations.batch "$(IN)" "$(OUT)"

story: .venv/requirements-operations.txt build/prepare.ipynb  ## send messages to it, complain, train on that, promote
	@$(BIN)/python -m operations.story

backup: .venv/requirements-operations.txt  ## save store, models, registry and data of the operator to backups/
	@$(BIN)/python -m operations.backup

restore: .venv/requirements-operations.txt  ## bring back the backup FROM, a folder that make backup wrote
	@test -n "$(FROM)" || { echo "Name the folder of the backup: make restore FROM=backups/..." >&2; exit 1; }
	@$(BIN)/python -m operations.backup restore "$(FROM)"

forget: .venv/requirements-operations.txt  ## delete the texts that have been kept as long as params.yaml allows
	@$(BIN)/python -m operations.store

docs: .venv/requirements-docs.txt .venv/requirements-operations.txt  ## build the documentation: build/docs/index.html
	$(BIN)/sphinx-build --quiet --fail-on-warning --nitpicky --jobs auto --conf-dir docs --doctree-dir build/doctrees . build/docs
	@echo "Open build/docs/index.html"

image:  ## build the container image
	docker build --build-arg BASE -t sms-spam .

up: image  ## run the container on PORT
	docker run --rm --detach --name sms-spam --read-only --cap-drop ALL -p 127.0.0.1:$(PORT):5000 sms-spam

down:  ## stop the container
	docker stop sms-spam

hooks:  ## run test.py before every commit to main
	git config core.hooksPath hooks

lock:  ## pin all that the requirements need, for every platform, in requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--output-file requirements.lock $(REQUIREMENTS)
	sed -i "1i # Made by make lock from requirements with the sha256 $$(cat $(REQUIREMENTS) | sha256sum | cut -c 1-64)" requirements.lock

clean:  ## remove what the targets made, but for the environment, the experiments and the data
	rm -rf build .coverage .pytest_cache .ruff_cache .hypothesis

clean-experiments: clean  ## remove the experiments too: mlflow.db and mlruns
	rm -rf mlflow.db mlruns

build:
	mkdir -p $@

build/prepare.ipynb: prepare.ipynb params.yaml dvc.yaml data/profile_messages.py engine/files.py .venv/requirements.txt | build
	$(BIN)/papermill $< $@

build/train.ipynb: train.ipynb params.yaml score.py $(wildcard engine/*.py data/*.dvc) build/prepare.ipynb
	$(BIN)/papermill $< $@

build/impact.ipynb: impact.ipynb params.yaml score.py $(wildcard engine/*.py models/*) build/prepare.ipynb
	$(BIN)/papermill $< $@

build/monitoring.ipynb: monitoring.ipynb params.yaml score.py $(wildcard engine/*.py models/*) build/prepare.ipynb .venv/requirements-operations.txt
	$(BIN)/papermill $< $@

.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)

.venv/requirements-serve.txt .venv/requirements.txt: .venv/%: % requirements-serve.txt requirements.lock | .venv/bin/uv
	$(INSTALL) --requirement $<
	cp $< $@

.venv/requirements-transfer.txt .venv/requirements-operations.txt .venv/requirements-docs.txt: .venv/%: % .venv/requirements.txt
	$(INSTALL) --requirement $<
	cp $< $@

build/bench/requirements.txt: benchmarks/requirements.txt requirements.lock | build .venv/bin/uv
	$(BIN)/uv venv --quiet --clear build/bench
	$(INSTALL) --python build/bench/bin/python --requirement $<
	cp $< $@
