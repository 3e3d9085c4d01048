# `make help` lists the targets. Everything runs in .venv, which `make setup` prepares and keeps current.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := OMP_NUM_THREADS=1 $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help setup build browser test test-full demo serve bench bench-check bench-compiler bench-parallel pairs sweep lint format test-sanitize sanitize-thread sanitize-address sanitize-operators wheel clean

help:  ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 28

setup:  ## prepare .venv: torch, torch_npu, vLLM, this project (editable); quick when nothing changed
	@$(PYTHON) tools/setup_environment.py --venv $(VENV)

build: setup  ## rebuild after a change in C++ code
	@cmake --build build/runtime

# Engines are tested in processes of their own: vLLM collects garbage several times for each, which would walk through
# everything that the tests before it left in memory. Both parts run, whatever the first one says.
WORKERS ?= 2
PYTEST := $(RUN) -m pytest -n $(WORKERS) --dist loadfile --durations 20 --durations-min 10
pytest = $(PYTEST) $(1) --ignore tests/serving; first=$$?; $(PYTEST) $(1) tests/serving && exit $$first

browser: setup  ## a Chromium for the browser tests, where there is none (Debian's; takes root)
	@$(BIN)/python tools/browser.py

test: setup  ## the default test run (under 25 minutes on 2 cores)
	@$(call pytest,-m "not full")

test-full: setup  ## the default tests and the long matrix
	@$(call pytest)

demo: setup  ## start vllm serve with the trained model, chat with it, print a report, stop it
	$(RUN) examples/demo.py

serve: setup  ## the same, left running
	$(RUN) examples/demo.py --serve

bench: setup  ## all peers in one interleaved run; rows and a plot go to benchmarks/results/
	@$(BIN)/python tools/setup_environment.py --venv $(VENV) --bench
	$(RUN) -m benchmarks instructions; counted=$$?; $(RUN) -m benchmarks && exit $$counted

bench-check: setup  ## fails where a row of the last `make bench` is below its floor (benchmarks/floors.toml)
	$(RUN) -m benchmarks check

bench-compiler: setup  ## nodes, kernels, compile seconds, MiB a size: every model and backend (long; --quick in the docs)
	$(RUN) -m benchmarks compiler

bench-parallel: setup  ## several ranks: bytes and step time of each pass, token drop, NZ, streams (--quick in the docs)
	$(RUN) -m benchmarks parallel

pairs: setup  ## every pair of features of several ranks, served; resumable, writes docs/parallel_pairs.md
	$(RUN) -m tests.serving.pairs

sweep: setup  ## every architecture of vLLM, shrunken: compiled against eager; resumable, writes docs/sweep.md
	$(RUN) -m benchmarks.sweep

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

format: setup  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' | xargs $(BIN)/clang-format -i

# Little optimisation and few debug symbols: compiling takes most of the time.
sanitized = ASAN_OPTIONS=detect_leaks=$(1) UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

sanitize = build=build/$(firstword $(subst $(comma), ,$(1))); \
  cmake -S . -B $$build -G Ninja -DHOST_RUNTIME_SANITIZE=$(1) \
    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
    -DTORCH_DIR=$$($(BIN)/python tools/setup_environment.py --where torch) \
    -DTORCH_NPU_DIR=$$($(BIN)/python tools/setup_environment.py --where torch_npu) && \
  cmake --build $$build --target runtime_tests && \
  $(call sanitized,1) ctest --test-dir $$build --output-on-failure
comma := ,

# About half an hour on two idle cores, most of it compiling; the three parts can be made one by one.
test-sanitize: sanitize-thread sanitize-operators  ## C interface and operators under the sanitizers: half an hour; its parts follow

sanitize-thread: setup  ## the C interface's tests under the thread sanitizer
	$(call sanitize,thread)

sanitize-address: setup  ## the C interface's tests under the address and undefined sanitizers
	$(call sanitize,address$(comma)undefined)

sanitize-operators: sanitize-address  ## the operators' tests under the address and undefined sanitizers, after those
	cmake --build build/address
	NPU_COMPILER_RUNTIME=host:$(CURDIR)/build/address/lib LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
	  $(call sanitized,0) $(RUN) -m pytest -q -n 2 -m "not full" \
	  tests/runtime/test_*operators*.py tests/runtime/test_prefill_attention.py tests/runtime/test_transpose_matmul.py

wheel: setup  ## a wheel in dist/
	$(BIN)/pip wheel --no-deps --no-build-isolation -w dist .

clean:  ## remove what was built (not .venv)
	rm -rf build dist runtime/lib npu_compiler/aclgraph/*.so *.egg-info
