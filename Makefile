# make run    train an ultra-deep model on this machine and draw pictures from it
# make test   build and run every test (SAN=1: under AddressSanitizer and UBSan)
# make DEBUG=1   build for a debugger: -O0 -g, one thread, a kernel is a loop (make DEBUG=1 build/debug/dit_test)
# make test-gpu    the same and, if compute-sanitizer is there, a search for races; an error without a GPU
# make bench       time every kernel, product, block and step on a GPU
# make bench-peer  and beside PyTorch, whose outputs and gradients are compared too
# make        build the program, build/mvsplit
# make page RUN=dir   put a run on one page, dir/page.html (of a diagnosed run: train makes it)
# make experiment NAME=scream   run an experiment, or all (QUICK=1: smaller; REDRAW=1: draw only);
#             data/experiments/RESULTS.md tells what they found
# make results     compute the numbers of RESULTS.md and README.md again (WRITE=1: write the tables)
# make compile_commands   write compile_commands.json, for clangd
# make help   print this
#
# With nvcc and a GPU everything is built for the GPU (the binaries still run on the CPU too). With
# nvcc alone, `make test` compiles the GPU build as well and runs the CPU one. ARCH=sm_80 chooses the
# GPU architecture; by default it is the one found, else Hopper's. (The a in sm_90a: with wgmma, for
# Hopper and no other. ARCH=sm_90, like any other, has mma in its place and runs on later GPUs too.)
# CXX=clang++ chooses the compiler, nvcc's for the host as well. NVCC= builds without CUDA, WERROR=1
# takes warnings for errors.

NVCC := $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n '1s/^\([0-9]*\)\.\([0-9]*\)$$/sm_\1\2/p')
ARCH ?= $(patsubst sm_90,sm_90a,$(or $(GPU_ARCH),sm_90))
MACHINE := $(if $(and $(NVCC),$(GPU_ARCH)),gpu,cpu)

# A toolkit takes some host compilers and GPUs only (CUDA 13.0: g++ up to 15, clang up to 20, GPUs from
# sm_75 on). Where no GPU needs it, the GPU build is then left out.
HOST := $(if $(filter-out default,$(origin CXX)),-ccbin $(lastword $(CXX)))
nvcc_fault := $(if $(and $(NVCC),$(shell command -v $(CXX))),$(shell \
    $(NVCC) $(HOST) -arch=$(ARCH) -x cu -E /dev/null 2>&1 >/dev/null | grep -m 1 -E 'error|fatal'))
no_gpu_build := $(if $(NVCC),$(nvcc_fault),no nvcc)
ifneq ($(SAN)$(DEBUG),)
no_gpu_build := SAN and DEBUG are for the CPU
MACHINE := cpu
endif

# Without OpenMP (a clang without libomp) the program is serial. Asked when it is built: setup may
# have installed it.
openmp = $(if $(if $(DEBUG),none,$(shell $(CXX) -fopenmp -include omp.h -x c++ -fsyntax-only /dev/null >/dev/null 2>&1 || echo none)),-Wno-unknown-pragmas,-fopenmp)
# A compiler that may fuse a product with a sum does so in one copy of a function and not in another:
# the blocks of a replay would differ from the forward's in their last bits. (g++ 12's vectorizer of
# neighbouring statements fuses x1 c - x2 s whether it may or not.)
HOSTFLAGS = -march=native -ffp-contract=off -fno-tree-slp-vectorize $(openmp) -Wall -Wextra -Wno-psabi
CXXFLAGS = -std=c++17 $(if $(SAN),-O1 -g -fsanitize=address$(comma)undefined -fno-sanitize-recover=all,$(if $(DEBUG),-O0 -g,-O3)) \
           $(HOSTFLAGS) $(if $(WERROR),-Werror)
comma := ,
space := $(subst ,, )
NVCCFLAGS = -std=c++17 -O3 -arch=$(patsubst build/gpu-%/,%,$(dir $@)) --extended-lambda $(HOST) \
            -Xcompiler $(subst $(space),$(comma),$(HOSTFLAGS)) $(if $(WERROR),-Werror all-warnings)

SOURCES := math.h mvsplit.cu dit.cu train.cu $(wildcard data/*.h) tests/check.h
TESTS := math mvsplit dit train data
cpu := build/$(if $(SAN),san,$(if $(DEBUG),debug,cpu))
gpu := build/gpu-$(ARCH)
BIN := $($(MACHINE))
# A Hopper runs both ways of attention: its own, and that of all other cards.
TESTED := $(BIN) $(if $(filter build/gpu-sm_90a,$(BIN)),build/gpu-sm_90)

# One translation unit a program: build as many at once as there are processors.
# Threads that spin while they wait slow a busy machine down many times.
export OMP_WAIT_POLICY ?= passive
MAKEFLAGS += --jobs=$(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
.PHONY: all help run page experiment results test test-gpu bench bench-peer setup data compile_commands format clean always
all: build/mvsplit
help:
	@sed '/^#/!q; s/^# \{0,1\}//' Makefile

# SAN and ARCH choose another binary, which may be the older one.
copy = @cmp -s $< $@ || cp $< $@
build/mvsplit: $(BIN)/mvsplit always
	$(copy)

build/%/mvsplit: train.cu $(SOURCES) build/%/compiler | setup
	$(compile)
build/%_test: $(SOURCES) | setup
	$(compile)
build/%/bench: tests/bench.cu $(SOURCES) build/%/compiler | setup
	$(compile)
$(foreach d,$(cpu) $(gpu) $(TESTED),$(foreach t,$(TESTS),$(eval $d/$t_test: tests/$t_test.cu $d/compiler)))

# The folder says which compiler.
on_gpu = $(findstring /gpu-,$@)
compiler = $(if $(on_gpu),$(NVCC) $(NVCCFLAGS),$(CXX) $(CXXFLAGS))
compile = $(if $(and $(on_gpu),$(nvcc_fault)),$(error nvcc cannot build for $(ARCH) with $(CXX) ($(nvcc_fault)): \
	name a compiler that it takes, as in make CXX=g++-13, or build without it by make NVCC=))@echo "building $@"; \
	$(compiler) $(if $(on_gpu),,-x c++) $(source) -o $@ $(if $(findstring _test,$@),$(gtest)) \
	-lz $(if $(on_gpu),-lcublas,-lpthread)
# A system's libgtest.a may be of a later g++ than the one at hand, and need the system's library.
gtest = -lgtest -lgtest_main $(addprefix -Xlinker ,$(filter /%,$(shell $(CXX) -print-file-name=libstdc++.so.6)))
source = $(if $(filter %/mvsplit,$@),train.cu,tests/$(notdir $@).cu)
# What another compiler, other flags or -march=native of another processor have built is built again.
build/%/compiler: always | setup
	@mkdir -p $(@D); \
	{ echo "$(compiler)"; $(CXX) --version; grep -sm 1 'model name' /proc/cpuinfo; } >$@.tmp; \
	if cmp -s $@.tmp $@; then rm $@.tmp; else mv $@.tmp $@; fi

setup:
	@CXX="$(CXX)" bash data/setup.sh
data: | setup
	@bash data/fetch.sh

# Where there is no GPU: 48 layers, 64 + 8 tokens, 3 min 22 s on two cores. Stopped with Ctrl-C,
# the same command goes on; when it is done, it draws the pictures again.
RUN_cpu := --depth 48 --width 64 --heads 4 --ffn 192 --patch 4 --batch 16 --steps 300 \
           --lr 2e-3 --warmup 50 --save-every 100 --columns 4 --diagnose-every 10
RUN_gpu := --depth 400 --width 128 --heads 2 --ffn 384 --patch 2 --batch 32 --steps 600 \
           --lr 1e-3 --warmup 100 --beta 0.05 --save-every 200 --diagnose-every 10
export RUN ?= run
run: build/mvsplit data
	$(if $(GPU_ARCH),$(if $(NVCC),,$(info there is a GPU, but no nvcc: this build is for the CPU)))
	build/mvsplit train $(RUN_$(MACHINE)) --residual mvsplit --resume --out "$$RUN"
	@bash data/curve.sh "$$RUN"
	@[ ! -s "$$RUN/page.html" ] || echo "the whole run on one page, for a browser: $$RUN/page.html"

page:
	@bash data/page.sh "$$RUN"

# The recipes are in data/experiments. A run that is done is not run again, an interrupted one goes on.
NAME ?= scream
experiment: build/mvsplit data
	@bash data/experiment.sh $(NAME)
results:
	@bash data/experiments/results.sh

# Where no GPU runs it, the GPU build is that of all kernels: the program's are in train_test and bench.
compiled := $(if $(no_gpu_build),,$(gpu)/bench $(patsubst %,$(gpu)/%_test,$(filter-out data,$(TESTS))))
test: data $(foreach d,$(TESTED),$(TESTS:%=$d/%_test) $d/mvsplit) $(compiled)
	$(info the GPU build was $(if $(no_gpu_build),not compiled: $(no_gpu_build),compiled for $(ARCH)))
	@bash tests/run.sh $(TESTED)
test-gpu: $(if $(filter gpu,$(MACHINE)),test)
	@$(if $<,bash tests/race_check.sh $(TESTED),echo "there is no nvcc, or no GPU" >&2; exit 1)

# How fast the pieces are on this GPU; then the same work by PyTorch in the same run, results compared,
# then times.
PYTHON ?= python3
bench: build/bench
	@build/bench
build/bench: $(if $(no_gpu_build),,$(gpu)/bench) always
	@$(if $(filter gpu,$(MACHINE)),true,echo "the benchmark is of a GPU: it needs nvcc"; exit 1)
	$(copy)
bench-peer: build/mvsplit build/bench
	@command -v $(PYTHON) >/dev/null || { echo "bench-peer needs Python 3 with PyTorch"; exit 1; }
	@$(PYTHON) tests/peer_torch.py check build/mvsplit --precision fp32
	@$(PYTHON) tests/peer_torch.py check build/mvsplit --precision bf16
	@build/bench --tsv build/bench.tsv
	@$(PYTHON) tests/peer_torch.py bench >build/peer.tsv
	@$(PYTHON) tests/peer_torch.py compare build/bench.tsv build/peer.tsv

# clangd reads every .cu file as the CPU build does.
compile_commands: | setup
	@folder=$$(pwd | sed 's/[\\"]/\\&/g'); separator='['; for file in *.cu tests/*.cu; do \
	  printf '%s\n{"directory": "%s", "file": "%s", "command": "%s"}' "$$separator" "$$folder" $$file \
	    "$(CXX) $(CXXFLAGS) -x c++ -c $$file"; separator=,; done >$@.json; echo ']' >>$@.json

format:
	clang-format -i *.cu *.h data/*.h tests/*.cu tests/*.h
clean:
	rm -rf build compile_commands.json
