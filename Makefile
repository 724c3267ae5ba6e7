PYTHON ?= python3
BIN := .venv/bin
PORT ?= 5000
export MLFLOW_TRACKING_URI ?= sqlite:///mlflow.db

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help run notebooks transfer ui serve test bench image up down hooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
