.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format digits-model benchmark

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

install:  ## Install the package for development, with the tested versions
	pip install -c constraints.txt -e ".[dev]"

demo:  ## Run the whole pipeline on the embedded world
	trl-diffusion-rank run --recipe recipes/digits_rank4.yaml

test:  ## Run the default tests
	pytest

test-slow:  ## Run the tests that take minutes
	pytest -m slow

lint:  ## Check style without changing anything
	ruff check . && ruff format --check .

format:  ## Mend what can be mended
	ruff check --fix . && ruff format .

digits-model:  ## Train the shipped model of the embedded world anew
	python -m trl_diffusion_rank.digits.pretrain --output_dir trl_diffusion_rank/digits/model

benchmark:  ## Compare list losses with pair losses on the embedded world
	python benchmarks/listwise_vs_pairwise.py
