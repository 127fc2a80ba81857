# moe.h - make, make demo, make test, make check; `make help` lists all. GNU make.
CC ?= cc
CXX ?= c++
PYTHON ?= python3
JOBS ?= 2
B = build
WARN = -Wall -Wextra -Wno-sign-compare
TEST_FLAGS = -O1 -g $(WARN)
EXTRA =
EXE =
RUN =
export CC CXX CI

EXAMPLES = hello route checkpoint_layer own_loader hooks moe_layer
TESTS = $(patsubst tests/%.c,%,$(wildcard tests/test_*.c))
BENCHES = $(patsubst bench/%.c,%,$(wildcard bench/bench_*.c))

all: $(EXAMPLES:%=$(B)/%)

help:
	@echo "make              the examples, in build/"
	@echo "make demo         one layer of the checkpoint in tests/golden/qwen3_moe, and build/demo.html"
	@echo "make test         everything that needs only a C compiler; ends in N passed, N failed"
	@echo "make check        make test, other compilers, sanitizers, valgrind, fuzzing, other processors"
	@echo "make test-bare    the README's two commands in a new Debian that has nothing but git (root)"
	@echo "make lib          build/libmoe.so"
	@echo "make bench        speed of the CPU back end"
	@echo "make golden       regenerates tests/golden and tests/data (Python)"
	@echo "make embed        copies moe_kernels.cu.inc into moe.h; make check-embed says whether that was done"
	@echo "make picture      regenerates examples/demo.svg"

demo: $(B)/moe_layer
	$(B)/moe_layer tests/golden/qwen3_moe --layer 1 --html $(B)/demo.html

test check:
	@sh tests/suite.sh $@

test-bare:
	@sh tests/bare.sh

lib: $(B)/libmoe.so

golden:
	$(PYTHON) tests/golden/make_golden.py
	$(PYTHON) tests/data/make_data.py

bench: $(BENCHES:%=$(B)/%)
	@for b in $^; do $$b || exit 1; done

picture: $(B)/moe_layer
	$(B)/moe_layer tests/golden/qwen3_moe --layer 1 --svg examples/demo.svg

embed: $(B)/embed
	@$(B)/embed moe.h moe_kernels.cu.inc

check-embed: $(B)/embed
	@$(B)/embed --check moe.h moe_kernels.cu.inc

clean:
	rm -rf build

# ---- files ----------------------------------------------------------------------------------------------------------

$(EXAMPLES:%=$(B)/%): $(B)/%: examples/%.c moe.h $(wildcard examples/*.h)
	@mkdir -p $(@D)
	$(CC) -std=c99 -O2 $(WARN) $(EXTRA) -o $@ $< -lpthread

$(B)/embed: tests/embed.c
	@mkdir -p $(@D)
	$(CC) -std=c99 -O1 $(WARN) $(EXTRA) -o $@ $<

$(B)/libmoe.so: moe.h
	@mkdir -p $(@D)
	$(CC) -std=c99 -O2 $(WARN) -DMOE_DLL -DMOE_IMPLEMENTATION -fvisibility=hidden -fPIC -shared -x c $(EXTRA) -o $@ $< -lpthread

$(BENCHES:%=$(B)/%): $(B)/%: bench/%.c moe.h
	@mkdir -p $(@D)
	$(CC) -std=c99 -O2 $(WARN) $(EXTRA) -o $@ $< -lpthread -lm

$(B)/tests/test_%$(EXE): tests/test_%.c $(wildcard tests/*.h) moe.h
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) $(EXTRA) -o $@ $< -lpthread -lm

# A log is a run: the suite removes it first. RUN is what runs the program: nothing, valgrind, qemu, wine.
$(B)/log/test_%.log: $(B)/tests/test_%$(EXE)
	@sh tests/run_one.sh $(B) test_$* $(RUN) $<

$(B)/log/group_%.log: tests/group_%.sh tests/group.sh FORCE
	@sh tests/run_one.sh $(B) group_$* sh $<

test-logs: $(TESTS:%=$(B)/log/%.log)

FORCE:
.PRECIOUS: $(B)/tests/test_%$(EXE)
.PHONY: all help demo test check test-bare lib golden bench embed check-embed picture clean test-logs FORCE
