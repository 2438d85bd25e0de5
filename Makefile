# make install | demo | test | check | audit; the README says what each does.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Another index for torch, such as one with CPU-only wheels: make install TORCH_INDEX=<address>
TORCH_INDEX ?=
TORCH ?= torch==2.14.1 torchvision==0.29.1
LABEL_STUDIO ?= label-studio==1.23.2

VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check

# make demo DATA=<folder> ORACLE=1 CYCLES=2 EXIT=1 BATCH=20 IMAGE_SIZE=256 EPOCHS=10 STEPS=300 LABELS=a,b PORT=8080 BACKEND_PORT=9090
DEMO_OPTIONS := $(if $(DATA),--data "$(DATA)") $(if $(LABELS),--labels "$(LABELS)") $(if $(ORACLE),--oracle) \
	$(if $(CYCLES),--cycles $(CYCLES)) $(if $(EXIT),--exit-when-done) $(if $(BATCH),--batch-size $(BATCH)) \
	$(if $(IMAGE_SIZE),--image-size $(IMAGE_SIZE)) $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(STEPS),--min-steps $(STEPS)) \
	$(if $(PORT),--port $(PORT)) $(if $(BACKEND_PORT),--backend-port $(BACKEND_PORT))

.PHONY: install demo test check audit
.NOTPARALLEL:

install: $(VENV)/installed .venv-label-studio/installed

demo: install
	@$(VENV)/bin/python -m scripts.demo $(DEMO_OPTIONS)

# Much of the time of the tests is waiting. Each process has a Label Studio of its own; the longest files come first.
PROCESSES ?= 2

test: install
	$(VENV)/bin/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder $(TESTS)

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Asks PyPI for known vulnerabilities of every release we pin. --strict: a package it cannot ask for is a failure, too.
audit: .venv-audit/installed
	{ cat constraints.txt; printf '%s\n' $(TORCH) label-studio-ml==1.0.9; } > .venv-audit/pinned.txt
	.venv-audit/bin/pip-audit --strict --progress-spinner off --disable-pip --no-deps --requirement .venv-audit/pinned.txt

# Ours. label-studio-ml comes without its dependencies: it pins releases of 2021 (docs/decisions/002).
$(VENV)/installed: pyproject.toml Makefile constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	$(PIP) install --no-deps label-studio-ml==1.0.9
	touch $@

# Label Studio's own: its pins and ours cannot share an environment.
.venv-label-studio/installed: Makefile
	$(PYTHON) -m venv .venv-label-studio
	.venv-label-studio/bin/pip --disable-pip-version-check install $(LABEL_STUDIO)
	touch $@

.venv-audit/installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip --disable-pip-version-check install "pip-audit>=2.10,<3"
	touch $@
