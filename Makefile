PYTHON ?= python3
PORT ?= 5000
BIN := .venv/bin
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

.PHONY: help run test serve ui notebooks transfer bench image up down hooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

run: build/train.ipynb  ## prepare the data, train, select and save the model, show what it does
	@echo; cat build/benchmarks.md; echo; cat build/repeated.txt; echo
	@$(BIN)/python -c "$$EXAMPLES"
	@echo; echo "Serve it with 'make serve' and open http://127.0.0.1:$(PORT)"

test: build/prepare.ipynb .venv/requirements-transfer.txt  ## check the style and run all tests, write coverage.txt
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	set -o pipefail; $(BIN)/python -m pytest --no-header --cov --cov-report=term-missing | tee build/coverage.txt
	@sed -E 's/ in [0-9.]+s( \([0-9:]+\))?//' build/coverage.txt > build/coverage.tmp
	@mv build/coverage.tmp coverage.txt

serve: .venv/requirements.txt  ## serve the model on PORT
	PORT=$(PORT) $(BIN)/python app.py

ui: build/train.ipynb  ## look at the experiments in MLflow, on port 5001
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --port 5001

notebooks: .venv/requirements-transfer.txt | build  ## execute the committed notebooks in place
	$(EXECUTE) --inplace prepare.ipynb
	$(EXECUTE) --inplace train.ipynb
	$(EXECUTE) --output-dir build transfer_learning.ipynb
	@$(BIN)/python -c "$$STRIP" build/transfer_learning.ipynb
	mv build/transfer_learning.ipynb .

transfer: .venv/requirements-transfer.txt | build  ## fine-tune on photos and tweets (assignment 5)
	$(BIN)/papermill transfer_learning.ipynb build/transfer_learning.ipynb

bench: build/bench-venv/requirements.txt  ## measure the service against others under load
	build/bench-venv/bin/python -m benchmarks.bench

image:  ## build the container image
	docker build -t sms-spam .

up: image  ## run the container on PORT
	docker run --rm --detach --name sms-spam --read-only --cap-drop ALL -p 127.0.0.1:$(PORT):5000 sms-spam

down:  ## stop the container
	docker stop sms-spam

hooks:  ## run test.py before every commit to main
	git config core.hooksPath hooks

clean:  ## remove what the targets made, but not the committed model
	rm -rf build mlflow.db mlruns .coverage .pytest_cache .ruff_cache .hypothesis

build:
	mkdir -p $@

build/prepare.ipynb: prepare.ipynb params.yaml dvc.yaml data/profile.py .venv/requirements.txt | build
	$(BIN)/papermill $< $@

build/train.ipynb: train.ipynb params.yaml score.py $(wildcard data/*.dvc) build/prepare.ipynb
	$(BIN)/papermill $< $@

.venv/requirements.txt: requirements.txt requirements-serve.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	cp requirements.txt $@

.venv/requirements-transfer.txt: requirements-transfer.txt .venv/requirements.txt
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --requirement requirements-transfer.txt
	cp requirements-transfer.txt $@

build/bench-venv/requirements.txt: benchmarks/requirements.txt requirements-serve.txt | build
	$(PYTHON) -m venv build/bench-venv
	build/bench-venv/bin/python -m pip install --quiet --requirement benchmarks/requirements.txt
	cp benchmarks/requirements.txt $@
