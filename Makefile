# make run    train an ultra-deep model on this machine and draw pictures from it
# make test   build and run every test (SAN=1: under AddressSanitizer and UBSan)
# make bench       time every kernel, product, block and step on a GPU
# make bench-peer  and beside PyTorch, whose outputs and gradients are compared too
# make        build the program, build/mvsplit
# make figures RUN=dir   draw a run's diagnostics (train --diagnose-every N) into dir/figures
# make experiment NAME=scream   run an experiment, or all (QUICK=1: smaller; REDRAW=1: draw only);
#             data/experiments/RESULTS.md tells what they found
#
# With nvcc and a GPU everything is built for the GPU (the binaries still run on the CPU too). With
# nvcc alone, `make test` compiles the GPU build as well and runs the CPU one. ARCH=sm_80 chooses the
# GPU architecture; by default it is the one found, else Hopper's. (The a in sm_90a: with wgmma, for
# Hopper and no other. ARCH=sm_90, like any other, has mma in its place and runs on later GPUs too.)

NVCC := $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n '1s/^\([0-9]*\)\.\([0-9]*\)$$/sm_\1\2/p')
ARCH ?= $(patsubst sm_90,sm_90a,$(or $(GPU_ARCH),sm_90))
MACHINE := $(if $(and $(NVCC),$(GPU_ARCH)),gpu,cpu)

WARNINGS := -Wall -Wextra -Werror
CXXFLAGS := -std=c++17 -O3 -march=native -fopenmp $(WARNINGS)
comma := ,
space := $(subst ,, )
NVCCFLAGS := -std=c++17 -O3 -arch=$(ARCH) --extended-lambda -Werror all-warnings \
             -Xcompiler $(subst $(space),$(comma),-march=native -fopenmp -Wall -Wextra)
ifdef SAN
CXXFLAGS := -std=c++17 -O1 -g -march=native -fopenmp $(WARNINGS) \
            -fsanitize=address,undefined -fno-sanitize-recover=all
MACHINE := cpu
NVCC :=
endif

SOURCES := math.h mvsplit.cu dit.cu train.cu $(wildcard data/*.h) tests/check.h
TESTS := math mvsplit dit train data
cpu := build/$(if $(SAN),san,cpu)
gpu := build/gpu-$(ARCH)
BIN := $($(MACHINE))

# One translation unit a program: build as many at once as there are processors.
# Threads that spin while they wait slow a busy machine down many times.
export OMP_WAIT_POLICY ?= passive
MAKEFLAGS += --jobs=$(shell nproc)
.PHONY: all run figures experiment test bench bench-peer setup data clean format always
all: build/mvsplit

# SAN and ARCH choose another binary, which may be the older one.
copy = @cmp -s $< $@ || cp $< $@
build/mvsplit: $(BIN)/mvsplit always
	$(copy)

build/%/mvsplit: train.cu $(SOURCES) | setup
	$(compile)
build/%_test: $(SOURCES) | setup
	$(compile)
build/%/bench: tests/bench.cu $(SOURCES) | setup
	$(compile)
$(foreach t,$(TESTS),$(eval $(cpu)/$t_test $(gpu)/$t_test: tests/$t_test.cu))

# The folder says which compiler.
compile = @mkdir -p $(@D); echo "building $@$(if $(findstring gpu,$@), for $(ARCH))"; \
	$(if $(findstring gpu,$@),$(NVCC) $(NVCCFLAGS) $(source) -o $@ -lcublas,\
	                          g++ $(CXXFLAGS) -x c++ $(source) -o $@) \
	$(if $(findstring _test,$@),-lgtest -lgtest_main) -lz -lpthread
source = $(if $(filter %/mvsplit,$@),train.cu,tests/$(notdir $@).cu)

setup:
	@bash data/setup.sh
data: | setup
	@bash data/fetch.sh

# Where there is no GPU: 48 layers, 64 + 8 tokens, 3 min 34 s on two cores. Stopped with Ctrl-C,
# the same command goes on; when it is done, it draws the pictures again.
RUN_cpu := --depth 48 --width 64 --heads 4 --ffn 192 --patch 4 --batch 16 --steps 300 \
           --lr 2e-3 --warmup 50 --save-every 100 --columns 4
RUN_gpu := --depth 400 --width 128 --heads 2 --ffn 384 --patch 2 --batch 32 --steps 600 \
           --lr 1e-3 --warmup 100 --save-every 200
RUN ?= run
run: build/mvsplit data
	build/mvsplit train $(RUN_$(MACHINE)) --residual mvsplit --resume --out $(RUN)
	@bash data/curve.sh $(RUN)

figures: | setup
	@bash data/figures.sh $(RUN)

# The recipes are in data/experiments. A run that is done is not run again, an interrupted one goes on.
NAME ?= scream
experiment: build/mvsplit data
	@bash data/experiment.sh $(NAME)

test: data $(TESTS:%=$(BIN)/%_test) $(BIN)/mvsplit $(if $(NVCC),$(TESTS:%=$(gpu)/%_test) $(gpu)/mvsplit $(gpu)/bench)
	@$(if $(NVCC),echo "the GPU build was compiled for $(ARCH)",echo "no nvcc: the GPU build was not compiled")
	@bash tests/run.sh $(BIN)

# How fast the pieces are on this GPU; then the same work by PyTorch in the same run, results compared,
# then times.
PYTHON ?= python3
bench: build/bench
	@build/bench
build/bench: $(if $(NVCC),$(gpu)/bench) always
	@$(if $(NVCC),true,echo "the benchmark is of a GPU: it needs nvcc"; exit 1)
	$(copy)
bench-peer: build/mvsplit build/bench
	@command -v $(PYTHON) >/dev/null || { echo "bench-peer needs Python 3 with PyTorch"; exit 1; }
	@$(PYTHON) tests/peer_torch.py check build/mvsplit --precision fp32
	@$(PYTHON) tests/peer_torch.py check build/mvsplit --precision bf16
	@build/bench --tsv build/bench.tsv
	@$(PYTHON) tests/peer_torch.py bench >build/peer.tsv
	@$(PYTHON) tests/peer_torch.py compare build/bench.tsv build/peer.tsv

format:
	clang-format -i *.cu *.h data/*.h tests/*.cu tests/*.h
clean:
	rm -rf build
