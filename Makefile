# What people and CI run; `make` alone lists it.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
# passed on to the command behind `demo`, `up`, `test` and `bench`, for example: make up ARGS="--model DIR"
ARGS ?=

BIN := .venv/bin
READY := .venv/ready
VLLM_BIN := .venv-vllm/bin
VLLM_READY := .venv-vllm/ready
NODE := tests/node/node_modules/.package-lock.json examples/node/node_modules/.package-lock.json

.DEFAULT_GOAL := help
.PHONY: help demo up test test-all test-vllm fuzz evaluate soak browser screenshots smoke check protos tables k8s bench bench-vllm

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## ask about sample pictures with and without pruning, and draw what was kept
	@$(BIN)/hiprune demo $(ARGS)

up: $(READY) ## keep the three services running and print their address
	@$(BIN)/hiprune up $(ARGS)

test: $(READY) ## every test that needs Python alone
	@$(BIN)/pytest -m "not extra" $(ARGS)

test-all: check $(NODE) browser $(VLLM_READY) ## the linters, and all that `make test` leaves out: Node.js, Chromium, vLLM, faults, fuzzing
	@$(BIN)/pytest -m "extra and not vllm"
	@$(VLLM_BIN)/python -m pytest -m vllm tests/vllm

test-vllm: $(VLLM_READY) ## the tests of the engine vllm, in an environment of its own
	@$(VLLM_BIN)/python -m pytest -m vllm tests/vllm $(ARGS)

# how many times as many inputs as test-all tries, drawn anew each time: TIMES=20 takes about half an hour
TIMES ?= 20
fuzz: $(READY) ## more hostile inputs than test-all tries, other ones each time: make fuzz TIMES=20
	@HIPRUNE_FUZZ=$(TIMES) $(BIN)/pytest -m extra tests/fuzz $(ARGS)

evaluate: $(READY) ## accuracy against retention on the included model, in about a quarter of an hour
	@$(BIN)/hiprune evaluate $(ARGS)
	@$(BIN)/python tools/evaluation_tables.py

soak: $(READY) ## half an hour at 80 % of capacity: is memory flat, is every answer right?
	@$(BIN)/python -m benchmarks.soak $(ARGS)

browser: ## the Chromium that the playground is tested in, installed where that can be done
	@$(PYTHON) tools/browser.py

screenshots: $(READY) browser ## draw the playground's pictures in docs/images again
	@$(BIN)/python -m tools.screenshots $(ARGS)

smoke: $(READY) ## build the images, run them with docker-compose, kill them one by one, and measure
	@deploy/smoke.sh $(ARGS)

check: $(READY) ## ruff and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

.PHONY: docs
docs: $(READY) ## the documents as a site, in out/site; make docs ARGS=serve shows it while one writes
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build --strict)

protos: $(READY) ## regenerate src/hiprune/v1 and docs/reference from protos/
	@$(BIN)/python tools/generate_stubs.py
	@$(BIN)/python tools/api_reference.py

tables: $(READY) ## refill the generated tables in services/*/README.md and docs/
	@$(BIN)/python tools/settings_tables.py
	@$(BIN)/python tools/telemetry_tables.py
	@$(BIN)/python tools/http_reference.py
	@$(BIN)/python tools/evaluation_tables.py

k8s: $(READY) ## render deploy/k8s/rendered again, with kubectl 1.27 or newer
	@$(BIN)/python tools/render_k8s.py

bench: $(READY) ## measure every claim in benchmarks/ in about 50 minutes; full_size apart, which wants 24 GB
	@$(BIN)/python -m benchmarks $(ARGS)

bench-vllm: $(READY) $(VLLM_READY) ## vLLM against transformers, in about 8 minutes
	@$(VLLM_BIN)/python -m benchmarks.engines $(ARGS)
	@$(BIN)/python -m benchmarks.engines --draw

$(READY): pyproject.toml constraints.txt tools/set_up.py
	@command -v $(PYTHON) >/dev/null || { echo "hiprune needs Python 3.11 or newer; no $(PYTHON) is on PATH" >&2; exit 1; }
	@$(PYTHON) tools/set_up.py

$(VLLM_READY): pyproject.toml constraints.txt constraints-vllm.txt tools/set_up.py
	@$(PYTHON) tools/set_up.py vllm

# an environment holds absolute paths, so one that came along with a copied checkout is made anew
ifneq ($(shell head -n 1 $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif
ifneq ($(shell head -n 1 $(VLLM_READY) 2>/dev/null),$(CURDIR))
.PHONY: $(VLLM_READY)
endif

$(NODE): %/node_modules/.package-lock.json: %/package.json %/package-lock.json
	@command -v npm >/dev/null || { echo "make test-all needs Node.js 18 or newer, with npm; none is on PATH" >&2; exit 1; }
	@npm --prefix $* ci --ignore-scripts --no-audit --no-fund --loglevel=error
