# moe.h - make, make demo, make test, make check; `make help` lists all. GNU make.
CC ?= cc
CXX ?= c++
PYTHON ?= python3
JOBS ?= 2
B = build
WARN = -Wall -Wextra -Wno-sign-compare
# Most tests take longer to compile than to run.
OPT = -O0
TEST_FLAGS = $(OPT) -g1 $(WARN)
EXTRA =
EXE =
RUN =
export CC CXX CI

EXAMPLES = hello route checkpoint_layer own_loader hooks prewarm moe_layer
TESTS = $(patsubst tests/%.c,%,$(wildcard tests/test_*.c))
GPU_TESTS = $(patsubst tests/%.c,%,$(wildcard tests/gpu_*.c))
BENCHES = $(patsubst bench/%.c,%,$(wildcard bench/bench_*.c))

all: $(EXAMPLES:%=$(B)/%)

help:
	@echo "make              the examples, in build/"
	@echo "make demo         one layer of the checkpoint in tests/golden/qwen3_moe, and build/demo.html"
	@echo "make test         everything that needs only a C compiler; ends in N passed, N failed"
	@echo "make check        make test, other compilers, sanitizers, valgrind, fuzzing, other processors"
	@echo "make test-bare    the README's two commands in a new Debian that has nothing but git (root)"
	@echo "make lib          build/libmoe.so"
	@echo "make bench        speed of the CPU back end, and of the GPU where there is one; results and a page of plots in"
	@echo "                  build/results/"
	@echo "make test-gpu     the tests of GPU code on this machine's own GPU, large sizes too"
	@echo "make soak         200,000 small layers on this machine's own GPU, outputs compared; N=1000000: as many"
	@echo "make test-sanitizer  the same small under compute-sanitizer: memcheck, racecheck, initcheck, synccheck"
	@echo "make test-transformers  layers on this machine's GPU beside transformers' modules in bf16 (Python); MOE_BACKEND=cpu"
	@echo "make mutants      breaks one thing at a time and checks that a test reports it"
	@echo "make golden       regenerates tests/golden and tests/data (Python)"
	@echo "make embed        copies moe_kernels.cu.inc and PTX of it into moe.h; make check-embed: whether that was done"
	@echo "make kernels      every kernel through NVRTC into tests/data/resources.tsv; make check-kernels compares"
	@echo "make picture      regenerates examples/demo.svg"

demo: $(B)/moe_layer
	$(B)/moe_layer tests/golden/qwen3_moe --layer 1 --html $(B)/demo.html

test check:
	@sh tests/suite.sh $@

test-bare:
	@sh tests/bare.sh

N = 200000
soak: $(B)/tests/gpu_soak
	MOE_TEST_GPU=1 MOE_SOAK=$(N) $<

test-transformers: lib
	$(PYTHON) tests/compare_transformers.py

test-gpu test-sanitizer:
	@sh tests/gpu.sh $@

mutants: emu $(B)/run_mutants
	@$(B)/run_mutants

lib: $(B)/libmoe.so

golden:
	$(PYTHON) tests/golden/make_golden.py
	$(PYTHON) tests/quantized/make_quantized.py
	$(PYTHON) tests/data/make_data.py

bench: $(BENCHES:%=$(B)/%)
	@mkdir -p $(B)/results && rm -f $(B)/results/*
	@for b in $^; do $$b $(B)/results/$$(basename $$b).json || exit 1; done
	@if $(PYTHON) -c 'import matplotlib' 2>/dev/null; then $(PYTHON) bench/report.py $(B)/results; \
	    else echo "no page of plots: $(PYTHON) has no matplotlib"; fi

picture: $(B)/moe_layer
	$(B)/moe_layer tests/golden/qwen3_moe --layer 1 --svg examples/demo.svg

embed check-embed: $(B)/embed
	@sh tests/embed.sh $(B) $@

kernels: $(B)/kernels
	$(B)/kernels tests/data/resources.tsv

check-kernels: $(B)/kernels
	$(B)/kernels --check tests/data/resources.tsv

clean:
	rm -rf build

# ---- files ----------------------------------------------------------------------------------------------------------

$(EXAMPLES:%=$(B)/%): $(B)/%: examples/%.c moe.h $(wildcard examples/*.h)
	@mkdir -p $(@D)
	$(CC) -std=c99 -O2 $(WARN) $(EXTRA) -o $@ $< -lpthread

$(B)/embed: tests/embed.c
	@mkdir -p $(@D)
	$(CC) -std=c99 -O1 $(WARN) $(EXTRA) -o $@ $<

$(B)/kernels: tests/kernels.c moe.h
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) $(EXTRA) -o $@ $< -lpthread

$(B)/make_ptx: tests/ptx.c moe.h
	@mkdir -p $(@D)
	$(CC) -std=gnu99 -O0 $(WARN) $(EXTRA) -o $@ $< -ldl -lpthread -lm

$(B)/libmoe.so: moe.h
	@mkdir -p $(@D)
	$(CC) -std=c99 -O2 $(WARN) -DMOE_DLL -DMOE_IMPLEMENTATION -fvisibility=hidden -fPIC -shared -x c $(EXTRA) -o $@ $< -lpthread

$(BENCHES:%=$(B)/%): $(B)/%: bench/%.c bench/bench.h tests/own_text.h moe.h
	@mkdir -p $(@D)
	$(CC) -std=c99 -O2 $(WARN) $(EXTRA) -o $@ $< -lpthread -lm

# These do not.
$(patsubst %,$(B)/tests/test_%$(EXE),cpu formats layer math weights): OPT = -O1

$(B)/tests/test_%$(EXE): tests/test_%.c $(wildcard tests/*.h) moe.h
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) $(EXTRA) -o $@ $< -lpthread -lm

$(B)/tests/gpu_%: tests/gpu_%.c $(wildcard tests/*.h) moe.h
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) $(EXTRA) -o $@ $< -lpthread -ldl -lm

# ---- the emulated device: libcuda and NVRTC of the tests, tests/emu -------------------------------------------------
# Always with g++ and optimised: the kernels run in it. EMU_B has one copy for all variants of the tests.

EMU_B = build/emu
EMU_CXX = g++
EMU_FLAGS = -std=c++17 -O2 -g -fPIC -fno-omit-frame-pointer
EMU_LIBS = $(EMU_B)/libcuda.so.1 $(EMU_B)/libnvrtc.so.13
EMU_ENGINE = engine check sync async matrix
EMU_DRIVER = driver stream graph host

emu: $(EMU_LIBS)

$(EMU_B)/%.o: tests/emu/%.cc $(wildcard tests/emu/*.h)
	@mkdir -p $(@D)
	$(EMU_CXX) $(EMU_FLAGS) -c -o $@ $<

$(EMU_B)/libcuda.so.1: $(EMU_ENGINE:%=$(EMU_B)/%.o) $(EMU_DRIVER:%=$(EMU_B)/%.o)
	$(EMU_CXX) -shared -o $@ $^ -ldl -lpthread

$(EMU_B)/libnvrtc.so.13: $(EMU_B)/nvrtc.o $(EMU_B)/host.o
	$(EMU_CXX) -shared -o $@ $^ -ldl -lpthread

$(EMU_B)/test_kernels.o: tests/emu/test_kernels.cc $(wildcard tests/emu/*.h)
	@mkdir -p $(@D)
	$(EMU_CXX) -std=c++17 -O1 -ffp-contract=off -fno-strict-aliasing -fsanitize=thread,alignment \
	    --param=tsan-instrument-func-entry-exit=0 -include tests/emu/device.h -c -o $@ $<

$(EMU_B)/test_engine: tests/emu/test_engine.cc $(EMU_B)/test_kernels.o $(EMU_ENGINE:%=$(EMU_B)/%.o)
	$(EMU_CXX) $(EMU_FLAGS) -o $@ $^

$(EMU_B)/test_driver: tests/emu/test_driver.c $(wildcard tests/emu/*.h tests/*.h) $(EMU_LIBS)
	$(CC) -std=gnu99 -O1 -g1 $(WARN) -o $@ $< -ldl -lpthread

$(B)/run_mutants: tests/mutants/mutants.c
	@mkdir -p $(@D)
	$(CC) -std=gnu99 -O1 $(WARN) -o $@ $<

# A log is a run: the suite removes it first. RUN is what runs the program: nothing, valgrind, qemu, wine.
$(B)/log/test_%.log: $(B)/tests/test_%$(EXE)
	@sh tests/run_one.sh $(B) test_$* $(RUN) $<

$(B)/log/gpu_%.log: $(B)/tests/gpu_% $(EMU_LIBS)
	@sh tests/gpu.sh run $(B) gpu_$* $<

$(B)/log/emu_test_%.log: $(EMU_B)/test_%
	@sh tests/gpu.sh run $(B) emu_test_$* $<

$(B)/log/group_%.log: tests/group_%.sh tests/group.sh FORCE
	@sh tests/run_one.sh $(B) group_$* sh $<

gpu-logs: $(GPU_TESTS:%=$(B)/log/%.log)
emu-logs: gpu-logs $(B)/log/emu_test_engine.log $(B)/log/emu_test_driver.log

FORCE:
.PRECIOUS: $(B)/tests/test_%$(EXE) $(B)/tests/gpu_%
.PHONY: all help demo test check test-gpu test-transformers soak test-sanitizer emu mutants gpu-logs emu-logs test-bare lib golden bench embed check-embed kernels check-kernels picture clean FORCE
