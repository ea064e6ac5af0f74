// math.h - the machine and the scalar maths.
//
// What it is: everything below the network. A Device (a CPU or one NVIDIA GPU, chosen at run time),
// memory that is planned before it is taken, kernels written once for both machines, one matrix
// product, the bf16 number, and random numbers that depend on nothing but their index.
// What it is not: a tensor library. There are pointers with a shape in a comment, and loops.
//
// How to read it: straight through to the appendix. Section 4 (teams) is the one idea that the
// other files need. A kernel is a lambda over a Team. On a GPU a team is a thread block, or 1, 2,
// 4, ... 32 threads of one; on a CPU it is a single thread, rank 0 of size 1:
//
//   for_each_team(device, rows, threads_for(D), [=] HD(Team team) {
//     const float* x = X + team.index * D;                                // this team's row
//     float s = 0;
//     for (size_t d = team.rank; d < D; d += team.size) s += x[d] * x[d]; // shared among threads
//     s = team.sum(s);                                                    // all get the same
//   });
//
// so that the same source is a CUDA kernel and a plain loop that a debugger can step through.
#pragma once

#if !defined(__GNUC__) || __cplusplus < 201703L
#error "MV-Split is C++17 for g++ 9, clang++ 9 or later, or for nvcc with one of them"
#endif

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#else  // one thread does all
inline int omp_get_max_threads() { return 1; }
#endif

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cublas_v2.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#define HD __host__ __device__  // for both machines
#else
#define HD
#endif

#ifdef __CUDA_ARCH__  // the compiler of the host would warn
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

// ---------------------------------------------------------------------------------------------
// 1. Errors
//
// Two kinds. Bad input (a flag, a file) is the user's to mend: fail() throws one clear sentence,
// and main() prints it and exits with status 2. A CUDA status that is not success is ours: check()
// says where and exits with status 1.

// A text that may come from a file, fit for a terminal.
inline std::string visible(const std::string& text);  // appendix A

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws an Error. What a file made too long is cut in the middle: the end says what to do.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  constexpr size_t most = 1000;
  va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  std::string text(size_t(std::vsnprintf(nullptr, 0, format, arguments)), ' ');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  va_end(arguments);
  if (text.size() > most) text.replace(most / 2, text.size() - most, "...");
  throw Error(visible(text));
}

// Exits, if what a call of a CUDA library returned is not zero, and says where and what.
template <class Status>
void check(Status status, const char* (*text)(Status), const char* file, int line,
           const char* call) {
  if (status == Status(0)) return;
  std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, call, text(status));
  std::exit(1);
}
#ifdef __CUDACC__
#define CUDA_CHECK(call) check(call, cudaGetErrorString, __FILE__, __LINE__, #call)
#define CUBLAS_CHECK(call) check(call, cublasGetStatusString, __FILE__, __LINE__, #call)
#endif

// ---------------------------------------------------------------------------------------------
// 2. Numbers
//
// Real is what is stored: double for gradient checks (and a Dual, appendix F), else as --precision
// says, by default bf16 on a GPU with tensor cores for it, else float. Acc is what sums are made
// in: float for bf16, else Real itself.

struct Dual;  // a number and its derivative: appendix F

// bfloat16: the upper half of a float. Eight bits of exponent, seven of mantissa.
struct bf16 {
  uint16_t bits;

  bf16() = default;
  HD bf16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));  // the same in one instruction
#else
    uint32_t u;
    memcpy(&u, &x, 4);
    // Round to nearest, ties to even: add just under half of the last kept bit, and the rest of
    // that half if the last kept bit is odd. A carry out of the mantissa is the right next
    // exponent. A NaN must not be rounded into infinity: it becomes the NaN of the instruction.
    bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? uint16_t(0x7fff) : uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
#endif
  }
  HD operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};

template <class Real>
using AccOf = std::conditional_t<std::is_same_v<Real, bf16>, float, Real>;

// Four neighbouring channels: what one thread loads and stores at once (8 bytes of bf16, 16 of
// float). Widths are multiples of four, so rows are read by quads and never have a tail.
template <class Acc>
struct alignas(4 * sizeof(Acc)) Quad {
  Acc v[4];
  HD Acc& operator[](int i) { return v[i]; }
  HD Acc operator[](int i) const { return v[i]; }
};

template <class Acc>
HD Quad<Acc> quad(Acc x) {
  return {{x, x, x, x}};
}
#define QUAD_OPERATOR(op)                                              \
  template <class Acc>                                                 \
  HD Quad<Acc> operator op(Quad<Acc> a, Quad<Acc> b) {                 \
    return {{a[0] op b[0], a[1] op b[1], a[2] op b[2], a[3] op b[3]}}; \
  }                                                                    \
  template <class Acc>                                                 \
  HD Quad<Acc> operator op(Acc a, Quad<Acc> b) {                       \
    return quad(a) op b;                                               \
  }
QUAD_OPERATOR(+)
QUAD_OPERATOR(-)
QUAD_OPERATOR(*)
#undef QUAD_OPERATOR

// a * b + c, on a GPU always rounded once: left to the compiler, two kernels with the same formula
// may round differently.
template <class Acc>
HD Quad<Acc> multiply_add(Quad<Acc> a, Quad<Acc> b, Quad<Acc> c) {
#ifdef __CUDA_ARCH__
  return {
      {fma(a[0], b[0], c[0]), fma(a[1], b[1], c[1]), fma(a[2], b[2], c[2]), fma(a[3], b[3], c[3])}};
#else
  return a * b + c;
#endif
}
template <class Acc>
HD Acc dot(Quad<Acc> a, Quad<Acc> b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
}

// One wide load or store, converting between storage and sums.
template <class Acc, class Real>
HD Quad<Acc> widen(Quad<Real> q) {
  return {{Acc(q[0]), Acc(q[1]), Acc(q[2]), Acc(q[3])}};
}
template <class Acc, class Real>
HD Quad<Acc> load(const Real* p) {
  return widen<Acc>(*reinterpret_cast<const Quad<Real>*>(p));
}
template <class Real, class Acc>
HD void store(Real* p, Quad<Acc> q) {
  *reinterpret_cast<Quad<Real>*>(p) = {{Real(q[0]), Real(q[1]), Real(q[2]), Real(q[3])}};
}

// The elementary functions by type, so that double stays double and float stays float everywhere.
HD inline float exp_(float x) { return expf(x); }
HD inline double exp_(double x) { return exp(x); }
template <class Acc>
HD Acc rsqrt_(Acc x) {
  return Acc(1) / std::sqrt(x);
}
template <class Acc>
HD constexpr Acc max_(Acc a, Acc b) {
  return a > b ? a : b;
}

template <class Acc>
HD Acc min_(Acc a, Acc b) {
  return a < b ? a : b;
}

HD inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
HD inline size_t round_up(size_t a, size_t b) { return ceil_div(a, b) * b; }

// ---------------------------------------------------------------------------------------------
// 3. The device and its memory

// One CPU or one GPU. GPU work goes into one stream, in order, so a kernel sees what the one before
// it wrote (but see Beside); the host waits only in synchronize(), upload() and download().
struct Device {
  bool gpu = false;
  std::string name = "CPU";
  size_t allocated = 0;    // bytes held by slabs now
  size_t allocations = 0;  // slabs ever taken: constant once training runs
#ifdef __CUDACC__
  cudaStream_t stream = nullptr, side_stream = nullptr;
  cublasHandle_t blas = nullptr, side_blas = nullptr;
  void* workspace = nullptr;  // one half for each stream's cuBLAS
  cudaEvent_t event = nullptr;
  size_t cluster_bytes = 0;  // a thread block's shared memory, where blocks can reach each other's
#endif

  explicit Device(bool on_gpu = false);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  static int gpus();       // at hand
  static bool has_bf16();  // on tensor cores: the GPU at hand, if there is one, and this binary
  // cuBLAS gets its workspace from us: its own would be allocated out of the plan's sight, and a
  // fixed one keeps its choice of algorithm, and so the bits, the same within a captured graph.
  static constexpr size_t blas_bytes = size_t(64) << 20;
  static size_t workspace_bytes(bool on_gpu) { return on_gpu ? blas_bytes : 0; }

  // Bytes that could be taken now, and bytes in use now: on a GPU by everybody, on a CPU by us.
  size_t available(const char* control_groups = "/sys/fs/cgroup") const;
  size_t in_use() const;

  void synchronize() const;
  void* allocate(size_t bytes);
  void release(void* data, size_t bytes);
  void fill(void* data, int byte, size_t bytes) const;
  void copy(void* to, const void* from, size_t bytes) const;      // device to device
  void upload(void* to, const void* from, size_t bytes) const;    // host to device; waits
  void download(void* to, const void* from, size_t bytes) const;  // device to host; waits
};

// What f enqueues by beside(f) starts after all that was enqueued before, and may overlap what is
// enqueued later, until `beside` goes out of scope. Weight gradients are for this:
// nothing in a backward waits for them, and they fill the multiprocessors that a narrow network's
// kernels leave idle. (An object, so that nobody can forget to wait.)
class Beside {
 public:
  Device& device;

  explicit Beside(Device& on) : device(on) {}
  Beside(const Beside&) = delete;
#ifndef __CUDACC__
  template <class F>
  void operator()(const F& f) {
    f();
  }
#else
  ~Beside() {
    if (forked_) wait(device.stream, device.side_stream);
  }
  template <class F>
  void operator()(const F& f) {
    if (!device.gpu) return f();
    wait(device.side_stream, device.stream);
    forked_ = true;
    struct Exchange {  // and back again, should f throw
      Device& d;
      explicit Exchange(Device& of) : d(of) { turn(); }
      ~Exchange() { turn(); }
      void turn() { std::swap(d.stream, d.side_stream), std::swap(d.blas, d.side_blas); }
    } exchange(device);
    f();
  }

 private:
  bool forked_ = false;  // something may still run beside

  // `later` goes on when `earlier` has done what is in it now.
  void wait(cudaStream_t later, cudaStream_t earlier) {
    CUDA_CHECK(cudaEventRecord(device.event, earlier));
    CUDA_CHECK(cudaStreamWaitEvent(later, device.event, 0));
  }
#endif
};

// Memory is planned before it is taken. A layout function takes its arrays from a Carver: first
// from one without a base, which only counts, then, once the sum is known to fit, from a slab.
struct Carver {
  std::byte* base = nullptr;
  size_t used = 0;

  template <class Real>
  Real* take(size_t count) {
    used = round_up(used, 256);
    Real* data = base ? reinterpret_cast<Real*>(base + used) : nullptr;
    used += count * sizeof(Real);
    return data;
  }
};

// One allocation, freed with its owner. New slabs hold NaN in every float type (0xff bytes): an
// array that is read before it is written shows.
struct Slab {
  Device& device;
  std::byte* data;
  size_t bytes;

  Slab(Device& on, size_t size, int fill_byte = 0xff)
      : device(on),
        data(static_cast<std::byte*>(on.allocate(std::max<size_t>(size, 256)))),
        bytes(std::max<size_t>(size, 256)) {
    device.fill(data, fill_byte, bytes);
  }
  ~Slab() { device.release(data, bytes); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
};

// ---------------------------------------------------------------------------------------------
// 4. Teams: kernels written once

// log2 of a power of two, to shift by: an unknown divisor costs twenty instructions.
HD inline int log2_of(int power) {
#ifdef __CUDA_ARCH__
  return 31 - __clz(power);
#else
  return __builtin_ctz(unsigned(power));
#endif
}

// The threads that work on one piece: `size` of them, this one is `rank`, the piece is `index`.
// Reductions add in a fixed order (no atomics), so the same sizes give the same bits. A team is a
// power of two up to 32, several of which share a thread block, or a thread block of whole warps.
struct Team {
  size_t index;
  int rank, size;

  static constexpr int max_size = 256;

  // The team cut into parts of `threads` threads, a power of two up to 32 (on a CPU of one): the
  // part that this thread is in.
  HD Team part(int threads) const {
    if (size < threads) threads = size;
    return {size_t(rank >> log2_of(threads)), rank & (threads - 1), threads};
  }
  HD int parts(int threads) const { return size < threads ? 1 : size >> log2_of(threads); }

  HD void sync() const {
#ifdef __CUDA_ARCH__
    if (size > 32)
      __syncthreads();
    else
      __syncwarp(lanes());
#endif
  }

  // Combine x over the team with a commutative `op`; every thread gets the result.
  template <class Acc, class Op>
  HD Acc reduce(Acc x, Op op) const {
#ifdef __CUDA_ARCH__
    // Exchange with the lane whose number differs in one bit, up to five times. Both partners add
    // the same two numbers, so all lanes agree to the last bit.
    for (int bit = (size < 32 ? size : 32) / 2; bit > 0; bit /= 2) x = op(x, shuffle(x, bit));
    if (size > 32) {
      __shared__ Acc partial[max_size / 32];
      if (rank % 32 == 0) partial[rank / 32] = x;
      __syncthreads();
      x = partial[0];
      for (int warp = 1; warp < size / 32; ++warp) x = op(x, partial[warp]);
      __syncthreads();  // before anyone may write `partial` again
    }
#else
    (void)op;
#endif
    return x;
  }
  template <class Acc>
  HD Acc sum(Acc x) const {
    return reduce(x, [](Acc a, Acc b) { return a + b; });
  }
  template <class Acc>
  HD Acc max(Acc x) const {
    return reduce(x, [](Acc a, Acc b) { return max_(a, b); });
  }

  // The team as a grid, rank = row * columns + column, for columns a power of two up to 32: sum x
  // over the rows. Every thread of a column gets its column's sum.
  template <class V>
  HD V sum_rows(V x, int columns) const {
#ifdef __CUDA_ARCH__
    for (int bit = (size < 32 ? size : 32) / 2; bit >= columns; bit /= 2) x = x + shuffle(x, bit);
    if (size <= 32) return x;
    __shared__ V slot[max_size];
    if (rank % 32 < columns) slot[rank / 32 * columns + rank % columns] = x;
    __syncthreads();
    x = slot[rank % columns];
    for (int warp = 1; warp < size / 32; ++warp) x = x + slot[warp * columns + rank % columns];
    __syncthreads();
#else
    (void)columns;
#endif
    return x;
  }

#ifdef __CUDA_ARCH__
 private:
  // The lanes of the warp that are in this team.
  __device__ unsigned lanes() const {
    return size >= 32 ? 0xffffffffu : ((1u << size) - 1) << (threadIdx.x % 32 / size * size);
  }
  // V of the lane whose number differs in `bit`, word by word.
  template <class V>
  __device__ V shuffle(V x, int bit) const {
    uint32_t words[sizeof(V) / 4];
    memcpy(words, &x, sizeof(V));
    for (uint32_t& word : words) word = __shfl_xor_sync(lanes(), word, bit);
    memcpy(&x, words, sizeof(V));
    return x;
  }
#endif
};

// Threads for a team whose loop has n independent items: whole warps, at most eight.
inline int threads_for(size_t n) { return int(std::clamp<size_t>(round_up(n, 32), 32, 256)); }

// A power of two, from `least` to `most`: as few threads as cover n items if each takes `each`.
inline int threads_to_cover(size_t n, size_t each, int most = Team::max_size, int least = 1) {
  int threads = least;
  while (threads < most && each * size_t(threads) < n) threads *= 2;
  return threads;
}
// Threads for a row of D channels, at `quads` quads each.
inline int threads_for_row(size_t D, size_t quads = 4) { return threads_to_cover(D, 4 * quads); }

#ifdef __CUDACC__
template <class Body>
__global__ void __launch_bounds__(Team::max_size) team_kernel(Body body, unsigned teams, int size) {
  int shift = size > 32 ? 31 : log2_of(size);  // 31: the block is one team
  unsigned together = size > 32 ? 1 : blockDim.x >> shift;
  unsigned index = blockIdx.x * together + (threadIdx.x >> shift);
  if (index < teams) body(Team{index, int(threadIdx.x & ((1u << shift) - 1)), size});
}
template <class Body>
__global__ void __launch_bounds__(256) element_kernel(size_t n, Body body) {
  size_t i = blockIdx.x * size_t(256) + threadIdx.x;
  if (i < n) body(i);
}
#endif

// Run body(team) for `teams` teams of `threads` threads each (on a CPU: of one thread each).
template <class Body>
void for_each_team(const Device& device, size_t teams, int threads, const Body& body) {
  if (teams == 0) return;
#ifdef __CUDACC__
  if (device.gpu) {
    if (teams > 0x7fffffff) fail("a kernel over %zu teams is too large for one launch", teams);
    unsigned together = threads > 32 ? 1 : unsigned(Team::max_size / threads);
    unsigned blocks = unsigned(ceil_div(teams, together));
    team_kernel<<<blocks, unsigned(threads) * together, 0, device.stream>>>(body, unsigned(teams),
                                                                            threads);
    CUDA_CHECK(cudaGetLastError());
    return;
  }
#endif
  (void)device, (void)threads;
#pragma omp parallel for schedule(static) if (teams * size_t(threads) >= 1024)  // else not worth it
  for (size_t i = 0; i < teams; ++i) body(Team{i, 0, 1});
}

// Run body(i) for each i < n, independently.
template <class Body>
void for_each(const Device& device, size_t n, const Body& body) {
  if (n == 0) return;
#ifdef __CUDACC__
  if (device.gpu) {
    if (ceil_div(n, 256) > 0x7fffffff) fail("a kernel over %zu elements is too large", n);
    element_kernel<<<unsigned(ceil_div(n, 256)), 256, 0, device.stream>>>(n, body);
    CUDA_CHECK(cudaGetLastError());
    return;
  }
#endif
  (void)device;
#pragma omp parallel for schedule(static) if (n > 4096)
  for (size_t i = 0; i < n; ++i) body(i);
}

// out[i] = in[i], from one type of number to another.
template <class Out, class In>
void convert(const Device& device, Out* out, const In* in, size_t n) {
  for_each(device, n, [=] HD(size_t i) { out[i] = Out(in[i]); });
}

// Formulas whose speed hangs on how rows are walked go through a schedule, which knows how many
// rows and channels a thread takes at once and when it loads them (appendix B). Each is a loop over
// rows or groups of them, such as a sequence's image tokens, and over channels d, by fours:
//
//     for_each_quad         each row, d:    f(row, d)
//     map_rows              each row, d:    put(row, d, make(group, row, d))
//     map_rows_by_sum       each row:       v_d = make(group, row, d) for all d,
//                                           c = find(row, sum of weigh(v_d), mine),
//                                           put(row, d, v_d, c) for all d
//     sum_over_rows         each group, d:  finish(group, d, sum over rows of term(group, row, d))
//     sum_over_rows_by_sum  each row:       find(row, sum of weigh(row, d)); then as sum_over_rows
//     sum_over_groups       each d, singly: finish(d, sum over groups of term(group, d))
//
// `mine`: of the threads that call find, this one may store. A Pair {a, b} is two sums at once.

// ---------------------------------------------------------------------------------------------
// 5. The matrix product

// A row-major matrix, or a batch of them: element (i, j) of matrix (o, h) is
// data[o * outer_stride + h * inner_stride + i * stride + j], with i and j exchanged if
// `transposed`. A batch has two indices, outer and inner, since attention reads the heads' slices
// of a (B, T, 3, H, hd) array in place: from one sequence to the next is another stride than from
// one head to the next.
template <class Real>
struct Matrix {
  Real* data;
  size_t stride;
  bool transposed = false;
  size_t outer_stride = 0, inner_stride = 0;

  Matrix(Real* d, size_t s) : data(d), stride(s) {}
  Matrix transpose() const {
    Matrix m = *this;
    m.transposed = !transposed;
    return m;
  }
  Matrix batch(size_t outer, size_t inner) const {
    Matrix m = *this;
    m.outer_stride = outer;
    m.inner_stride = inner;
    return m;
  }
  HD Real* at(size_t o, size_t h) const { return data + o * outer_stride + h * inner_stride; }
};

struct Sizes {
  size_t m, n, k;               // C is (m, n), the sum runs over k
  size_t outer = 1, inner = 1;  // outer * inner products: o < outer, h < inner
};

template <class Acc>
struct HostGemm;  // appendix D

// C = alpha op(A) op(B) + beta C for each matrix of the batch; C (m,n), op(A) (m,k), op(B) (k,n).
// Sums in Acc; C may be stored as Real or as Acc. With k = 0 the product is zero.
template <class TC, class TA, class TB>
void gemm(Device& device, Matrix<TC> C, Matrix<TA> A, Matrix<TB> B, Sizes s,
          AccOf<std::remove_const_t<TA>> alpha = 1, AccOf<std::remove_const_t<TA>> beta = 0) {
  using Real = std::remove_const_t<TA>;
  static_assert(std::is_same_v<Real, std::remove_const_t<TB>>, "both factors are stored alike");
  auto view = [](auto m) {
    Matrix<const Real> v(m.data, m.stride);
    v.transposed = m.transposed;
    v.outer_stride = m.outer_stride, v.inner_stride = m.inner_stride;
    return v;
  };
  // A sum of nothing: HostGemm would leave what its thread added up last, and cuBLAS says nothing.
  if (s.k == 0)
    return for_each(device, s.outer * s.inner * s.m * s.n, [=] HD(size_t i) {
      size_t row = i / s.n % s.m, product = i / s.n / s.m;
      TC& c = C.at(product / s.inner, product % s.inner)[row * C.stride + i % s.n];
      c = beta == 0 ? TC(0) : TC(beta * AccOf<Real>(c));
    });
#ifdef __CUDACC__
  if (device.gpu) return device_gemm(device, C, view(A), view(B), s, alpha, beta);
#endif
  HostGemm<AccOf<Real>>::template run<Real, TC>(C, view(A), view(B), s, alpha, beta);
}

// ---------------------------------------------------------------------------------------------
// 6. Random numbers
//
// Counter-based: a number is a function of (seed, stream, index) and of nothing else. The CPU and
// the GPU draw the same noise, a resumed run draws what an unbroken one would, and no state is
// saved. (Who draws from which stream: `streams`, appendix A.)

struct Random4 {
  uint32_t v[4];
};

// Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
HD inline Random4 philox(Random4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53u) * counter.v[0], p1 = uint64_t(0xCD9E8D57u) * counter.v[2];
    counter = {{uint32_t(p1 >> 32) ^ counter.v[1] ^ key0, uint32_t(p1),
                uint32_t(p0 >> 32) ^ counter.v[3] ^ key1, uint32_t(p0)}};
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return counter;
}
HD inline Random4 random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
  return philox(
      {{uint32_t(index), uint32_t(index >> 32), uint32_t(stream), uint32_t(stream >> 32)}},
      uint32_t(seed), uint32_t(seed >> 32));
}
// 53 random bits as a double in [0, 1).
HD inline double unit_interval(uint32_t high, uint32_t low) {
  return double((uint64_t(high) << 32 | low) >> 11) * 0x1p-53;
}
HD inline double uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  Random4 r = random_bits(seed, stream, index);
  return unit_interval(r.v[0], r.v[1]);
}
// N(0, 1) by Box and Muller. In double, so that the two machines agree to the last bit of a float
// except where double itself lies within a rounding of a tie.
HD inline double gaussian(uint64_t seed, uint64_t stream, uint64_t index) {
  Random4 r = random_bits(seed, stream, index);
  double u = 1 - unit_interval(r.v[0], r.v[1]);  // (0, 1]: log is finite
  return sqrt(-2 * log(u)) * cos(6.283185307179586 * unit_interval(r.v[2], r.v[3]));
}

// Appendix. The straight way ends here. Below: random streams and the device (A), how formulas over
// rows are scheduled (B), kernels of the GPU's own and captured sequences (C), the two matrix
// products (D), stochastic rounding (E), dual numbers (F).

// ---------------------------------------------------------------------------------------------
// A. Random streams, and the device

// Who draws from which stream. A tensor's initial values have one stream a tensor.
namespace streams {
constexpr uint64_t batch_index = 0, time = 1, noise = 2, dropout = 3;
constexpr uint64_t validation_noise = 5, sampling_noise = 6, check = 7;
constexpr uint64_t probe_images = 8, probe_time = 9, probe_noise = 10, probe_shuffle = 11;
constexpr uint64_t parameters = uint64_t(1) << 32;
constexpr uint64_t gradient_rounding = uint64_t(2) << 32, moment_rounding = uint64_t(3) << 32;
constexpr uint64_t average_rounding = uint64_t(4) << 32;
}  // namespace streams

// One line, and nothing in it is obeyed. Letters of all languages stay. Control characters (DEL and
// C1 too), what breaks lines or turns their direction, and bytes that are not UTF-8 become \xNN.
inline std::string visible(const std::string& text) {
  constexpr uint32_t least[] = {0, 0x80, 0x800, 0x10000};  // what needs so many further bytes
  std::string out;
  for (size_t i = 0, n; i < text.size(); i += n) {
    auto byte = [&](size_t k) { return i + k < text.size() ? text[i + k] & 0xffu : 0; };
    size_t more = byte(0) < 0xc0 ? 0 : byte(0) < 0xe0 ? 1 : byte(0) < 0xf0 ? 2 : 3;
    uint32_t letter = more ? byte(0) & (0x3f >> more) : byte(0);
    for (n = 1; n <= more && (byte(n) & 0xc0) == 0x80; ++n) letter = letter << 6 | (byte(n) & 0x3f);
    auto from = [&](uint32_t first, uint32_t last) { return letter >= first && letter <= last; };
    bool good = n == more + 1 && letter >= least[more] && letter <= 0x10ffff && byte(0) < 0xf8 &&
                (more || letter < 0x80) && !from(0xd800, 0xdfff);
    bool shown = !from(0, 0x1f) && !from(0x7f, 0x9f) && !from(0x200e, 0x200f) &&
                 !from(0x2028, 0x202e) && !from(0x2066, 0x2069);
    if (good && shown) {
      out.append(text, i, n);
      continue;
    }
    char escaped[8];
    for (size_t k = 0; k < n; ++k) {
      std::snprintf(escaped, sizeof escaped, "\\x%02x", byte(k));
      out += escaped;
    }
  }
  return out;
}

// The oldest architecture that this binary has kernels for: 900 is 9.0. (A build without CUDA can
// only plan for a GPU, which it takes for an 8.0.)
constexpr int built_for() {
#ifdef __CUDACC__
  constexpr int architectures[] = {__CUDA_ARCH_LIST__};
  return architectures[0];
#else
  return 800;
#endif
}

inline int Device::gpus() {
  int count = 0;
#ifdef __CUDACC__
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
#endif
  return count;
}

inline bool Device::has_bf16() {
  int major = 8;
#ifdef __CUDACC__
  if (gpus() > 0) CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
#endif
  return major >= 8 && built_for() >= 800;
}

inline void Device::synchronize() const {
#ifdef __CUDACC__
  if (gpu)
    for (cudaStream_t s : {stream, side_stream}) CUDA_CHECK(cudaStreamSynchronize(s));
#endif
}

#ifdef __CUDACC__
static __global__ void empty_kernel() {}  // are there any kernels for the GPU at hand?
#endif

inline Device::Device(bool on_gpu) : gpu(on_gpu) {
  if (!gpu) return;
#ifdef __CUDACC__
  if (gpus() == 0) fail("no CUDA device was found: use --device cpu");
  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  name = properties.name;
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, empty_kernel) != cudaSuccess)
    fail("this binary has no kernels for the %s: build it with make ARCH=sm_%d%d", properties.name,
         properties.major, properties.minor);
  if (properties.clusterLaunch && attributes.ptxVersion >= 90)  // both from Hopper on
    cluster_bytes = properties.sharedMemPerBlockOptin;
  CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  workspace = allocate(workspace_bytes(true));
  constexpr size_t half = blas_bytes / 2;
  auto start = [&](cudaStream_t& own_stream, cublasHandle_t& own_blas, void* own_workspace) {
    CUDA_CHECK(cudaStreamCreateWithFlags(&own_stream, cudaStreamNonBlocking));
    CUBLAS_CHECK(cublasCreate(&own_blas));
    CUBLAS_CHECK(cublasSetStream(own_blas, own_stream));
    CUBLAS_CHECK(cublasSetWorkspace(own_blas, own_workspace, half));
    // Partial sums of a bf16 product stay in fp32 even where cuBLAS splits the inner dimension.
    CUBLAS_CHECK(cublasSetMathMode(
        own_blas, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH |
                                            CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
  };
  start(stream, blas, workspace);
  start(side_stream, side_blas, static_cast<std::byte*>(workspace) + half);
#else
  fail("this binary was built without CUDA: build with nvcc, or use --device cpu");
#endif
}

inline Device::~Device() {
#ifdef __CUDACC__
  if (!gpu) return;
  for (cublasHandle_t handle : {blas, side_blas}) cublasDestroy(handle);
  release(workspace, workspace_bytes(true));
  for (cudaStream_t s : {stream, side_stream}) cudaStreamDestroy(s);
  cudaEventDestroy(event);
#endif
}

// The number that the first line of a file which is like `format` has; SIZE_MAX if there is none.
inline size_t number_from(const std::string& path, const char* format) {
  std::ifstream file(path);
  size_t value = SIZE_MAX;
  for (std::string line; value == SIZE_MAX && std::getline(file, line);)
    std::sscanf(line.c_str(), format, &value);
  return value;
}

// Bytes that the control group of `folder` (cgroup v2) may still take: its limit less what it has,
// which does not count files that the kernel would drop. SIZE_MAX without a limit.
inline size_t control_group_room(const std::string& folder) {
  size_t limit = number_from(folder + "/memory.max", "%zu");
  size_t used = number_from(folder + "/memory.current", "%zu");
  size_t files = number_from(folder + "/memory.stat", "inactive_file %zu");
  if (limit == SIZE_MAX || used == SIZE_MAX) return SIZE_MAX;
  if (files != SIZE_MAX) used -= std::min(used, files);
  return limit - std::min(limit, used);
}

// The same for a group below `root`, "/a/b", and those that it is in: the least of them counts.
inline size_t control_groups_room(const std::string& root, std::string group) {
  size_t room = control_group_room(root);
  for (; group.find('/') != std::string::npos; group.resize(group.rfind('/')))
    room = std::min(room, control_group_room(root + group));
  return room;
}

// This process's group, as a line "0::/a/b" of /proc/self/cgroup says; "" if there is none.
inline std::string control_group(const char* list = "/proc/self/cgroup") {
  std::ifstream file(list);
  for (std::string line; std::getline(file, line);)
    if (line.rfind("0::", 0) == 0) return line.substr(3);
  return "";
}

inline size_t Device::available(const char* control_groups) const {
#ifdef __CUDACC__
  if (gpu) {
    size_t free = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return free;
  }
#endif
  size_t kib = number_from("/proc/meminfo", "MemAvailable: %zu kB");
#ifdef _SC_AVPHYS_PAGES
  const auto pages = _SC_AVPHYS_PAGES;
#else  // macOS
  const auto pages = _SC_PHYS_PAGES;
#endif
  size_t all = kib < SIZE_MAX ? kib * 1024 : size_t(sysconf(pages)) * size_t(sysconf(_SC_PAGESIZE));
  return std::min(all, control_groups_room(control_groups, control_group()));
}

inline size_t Device::in_use() const {
#ifdef __CUDACC__
  if (gpu) {
    size_t free = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return total - free;
  }
#endif
  size_t pages = number_from("/proc/self/statm", "%*u %zu");
  return pages < SIZE_MAX ? pages * size_t(sysconf(_SC_PAGESIZE)) : 0;
}

inline void* Device::allocate(size_t bytes) {
  void* data = nullptr;
#ifdef __CUDACC__
  if (gpu && cudaMalloc(&data, bytes) != cudaSuccess) {
    data = nullptr;
    cudaGetLastError();  // it is reported below: the next launch must not find it again
  }
#endif
  if (!gpu) data = std::aligned_alloc(256, round_up(bytes, 256));
  if (!data) fail("%.2f GB of memory could not be taken on %s", 1e-9 * double(bytes), name.c_str());
  allocated += bytes;
  ++allocations;
  return data;
}

inline void Device::release(void* data, size_t bytes) {
  allocated -= bytes;
#ifdef __CUDACC__
  if (gpu) {
    cudaFree(data);
    return;
  }
#endif
  std::free(data);
}

inline void Device::fill(void* data, int byte, size_t bytes) const {
#ifdef __CUDACC__
  if (gpu) {
    CUDA_CHECK(cudaMemsetAsync(data, byte, bytes, stream));
    return;
  }
#endif
  // By all threads: a page of memory is made when it is first written to.
  constexpr size_t piece = size_t(1) << 24;
#pragma omp parallel for schedule(static) if (bytes > piece)
  for (size_t i = 0; i < ceil_div(bytes, piece); ++i)
    std::memset(static_cast<char*>(data) + i * piece, byte, std::min(piece, bytes - i * piece));
}

// The three copies differ in direction, which CUDA reads off the pointers.
inline void Device::copy(void* to, const void* from, size_t bytes) const {
#ifdef __CUDACC__
  if (gpu) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}
inline void Device::upload(void* to, const void* from, size_t bytes) const {
  copy(to, from, bytes);
  synchronize();  // the caller may free its host buffer
}
inline void Device::download(void* to, const void* from, size_t bytes) const {
  copy(to, from, bytes);
  synchronize();
}

// ---------------------------------------------------------------------------------------------
// B. Rows: how the formulas of other files are scheduled
//
// An array of rows of D channels, in groups. `Groups` knows them: groups(), begin(group),
// end(group); and pieces(n) of up to n neighbouring rows of one group, numbered as rows of groups,
// of which piece(n, i) is one.
// Each function below takes the formula for four channels d to d + 3, a Quad, of one row.

// Neighbours in memory that are moved as one.
template <class Real, int n>
struct alignas(n * sizeof(Real)) Several {
  Real v[n];
};

template <class Real, int n>
HD Several<Real, n> operator+(Several<Real, n> a, Several<Real, n> b) {
  for (int i = 0; i < n; ++i) a.v[i] += b.v[i];
  return a;
}

// f(row, d) for each quad of `rows` rows.
template <class F>
void for_each_quad(const Device& device, size_t rows, size_t D, const F& f) {
  for_each_team(device, rows, threads_for_row(D), [=] HD(Team team) {
    for (size_t d = 4 * size_t(team.rank); d < D; d += 4 * size_t(team.size)) f(team.index, d);
  });
}

// The team's sum of term(d) over the quads of a row of D channels. The first four come without a
// branch, so that a thread has all its loads on the way at once: past the end of the row d is the
// last quad once more, which does not count.
template <class Acc, class Term>
HD Acc sum_of_row(Team team, size_t D, const Term& term) {
  size_t d = 4 * size_t(team.rank), step = 4 * size_t(team.size);
  Acc sum = 0;
  UNROLL
  for (int i = 0; i < 4; ++i, d += step) {
    Acc one = term(d < D ? d : D - 4);
    sum += d < D ? one : Acc(0);
  }
  for (; d < D; d += step) sum += term(d);
  return team.sum(sum);
}

// Neighbouring rows of one group. A thread takes several at a time, so that it reads what belongs
// to the group and the channel once for all of them: row(k), past the last row the last one again.
struct Piece {
  size_t group, first, last;

  HD bool has(int k) const { return first + size_t(k) <= last; }
  HD size_t row(int k) const { return min_(first + size_t(k), last); }
};

// finish(group, d, sum) with the sum of term(group, row, d) over each group's rows, once a group
// and quad of channels; with `zero` for an empty group.
//
// A team takes one group and 16 to 128 channels, fewer while there are few teams. Its threads are a
// grid, a quad of channels a column, and each of its lines takes every lines-th row, four at a
// time, all their loads before the first sum. (On a CPU the grid is 1 x 1.)
template <class Sum, class Groups, class Term, class Finish>
void sum_over_rows(const Device& device, Groups groups, size_t D, Sum zero, const Term& term,
                   const Finish& finish) {
  int columns = 32;
  while (columns > 4 && groups.groups() * ceil_div(D, 4 * size_t(columns)) < 256) columns /= 2;
  int lines = threads_to_cover(groups.longest(), 4, Team::max_size / columns, 32 / columns);
  size_t width = 4 * size_t(columns), tiles = ceil_div(D, width);
  for_each_team(device, groups.groups() * tiles, columns * lines, [=] HD(Team team) {
    Team line = team.part(columns);
    size_t group = team.index / tiles, channel = team.index % tiles * width;
    size_t begin = groups.begin(group), end = groups.end(group);
    for (size_t tile = 0; tile < width; tile += 4 * size_t(line.size)) {
      size_t d = channel + tile + 4 * size_t(line.rank), lines = size_t(team.parts(columns));
      Sum sum = zero;
      if (d < D)
        for (size_t row = begin + line.index; row < end; row += 4 * lines) {
          Sum terms[4];
          UNROLL
          for (size_t k = 0; k < 4; ++k) terms[k] = term(group, min_(row + k * lines, end - 1), d);
          UNROLL
          for (size_t k = 0; k < 4; ++k)
            if (row + k * lines < end) sum = sum + terms[k];
        }
      sum = team.sum_rows(sum, columns);
      if (d < D && line.index == 0) finish(group, d, sum);
    }
  });
}

// Two sums that one pass makes.
template <class Acc>
struct Pair {
  Acc a, b;
};
template <class Acc>
HD Pair<Acc> operator+(Pair<Acc> x, Pair<Acc> y) {
  return {x.a + y.a, x.b + y.b};
}

// finish(d, sum) with the sum of term(group, d) over all groups, for each channel d; or with
// `one_number` that over all channels too, finish(0, sum).
template <class Sum, class Term, class Finish>
void sum_over_groups(const Device& device, size_t groups, size_t D, bool one_number, Sum zero,
                     const Term& term, const Finish& finish) {
  constexpr int columns = 8;  // channels that a team's threads have at once
  size_t teams = one_number ? 1 : ceil_div(D, columns);
  for_each_team(device, teams, Team::max_size, [=] HD(Team team) {
    Team line = team.part(columns);
    size_t first = team.index * columns, last = one_number ? D : min_(first + columns, D);
    Sum total = zero;
    for (size_t tile = first; tile < last; tile += size_t(line.size)) {
      size_t d = tile + size_t(line.rank);
      Sum sum = zero;
      if (d < last)
        for (size_t group = line.index; group < groups; group += size_t(team.parts(columns)))
          sum = sum + term(group, d);
      if (one_number) {
        total = total + sum;
        continue;
      }
      sum = team.sum_rows(sum, columns);
      if (d < last && line.index == 0) finish(d, sum);
    }
    if (!one_number) return;
    total = team.sum_rows(total, 1);
    if (team.rank == 0) finish(0, total);
  });
}

// put(row, d, make(group, row, d)) for each row. Four rows are made before one is put: what is put
// may take the place of what others are made from. The last rows come first: in a backward the
// walk before has left them in the cache.
template <class Groups, class Make, class Put>
void map_rows(const Device& device, Groups groups, size_t D, const Make& make, const Put& put) {
  size_t pieces = groups.pieces(4).rows();
  for_each_team(device, pieces, threads_for_row(D, 1), [=] HD(Team team) {
    Piece rows = groups.piece(4, pieces - 1 - team.index);
    for (size_t d = 4 * team.rank; d < D; d += 4 * team.size) {
      decltype(make(0, 0, 0)) out[4];
      UNROLL
      for (int k = 0; k < 4; ++k) out[k] = make(rows.group, rows.row(k), d);
      UNROLL
      for (int k = 0; k < 4; ++k)
        if (rows.has(k)) put(rows.row(k), d, out[k]);
    }
  });
}

// map_rows_by_sum() for teams with n rows at a time. Of each a thread has and keeps `quads` quads,
// on a GPU all of the row up to D = 1024 `quads`; further quads are made again.
template <int quads, class Acc, class Groups, class Make, class Weigh, class Find, class Put>
void map_tiles_by_sum(const Device& device, Groups groups, size_t D, const Make& make,
                      const Weigh& weigh, const Find& find, const Put& put) {
  constexpr int n = 2;
  using V = decltype(make(0, 0, 0));
  for_each_team(device, groups.pieces(n).rows(), threads_for_row(D, quads), [=] HD(Team team) {
    Piece rows = groups.piece(n, team.index);
    size_t first = 4 * size_t(team.rank), apart = 4 * size_t(team.size);
    V kept[quads][n], other[n];
    Several<Acc, n> sums = {}, found;
    auto make_at = [&](V* v, size_t d) {
      UNROLL
      for (int k = 0; k < n; ++k) v[k] = make(rows.group, rows.row(k), d);
    };
    auto weigh_all = [&](const V* v, bool inside) {
      UNROLL
      for (int k = 0; k < n; ++k) {
        Acc weight = weigh(v[k]);
        sums.v[k] += inside ? weight : Acc(0);
      }
    };
    auto put_all = [&](const V* v, size_t d) {
      UNROLL
      for (int k = 0; k < n; ++k)
        if (rows.has(k)) put(rows.row(k), d, v[k], found.v[k]);
    };
    UNROLL
    for (int i = 0; i < quads; ++i) make_at(kept[i], min_(first + size_t(i) * apart, D - 4));
    UNROLL
    for (int i = 0; i < quads; ++i) weigh_all(kept[i], first + size_t(i) * apart < D);
    for (size_t d = first + quads * apart; d < D; d += apart)
      make_at(other, d), weigh_all(other, true);
    sums = team.sum_rows(sums, 1);
    UNROLL
    for (int k = 0; k < n; ++k)
      found.v[k] = find(rows.row(k), sums.v[k], team.rank == 0 && rows.has(k));
    UNROLL
    for (int i = 0; i < quads; ++i)
      if (first + size_t(i) * apart < D) put_all(kept[i], first + size_t(i) * apart);
    for (size_t d = first + quads * apart; d < D; d += apart) make_at(other, d), put_all(other, d);
  });
}

// put(row, d, v, found) for each row, with v = make(group, row, d) and found = find(row, sum of
// weigh(v) over the row's channels, mine); of the threads that call find, one is `mine`.
template <class Acc, class Groups, class Make, class Weigh, class Find, class Put>
void map_rows_by_sum(const Device& device, Groups groups, size_t D, const Make& make,
                     const Weigh& weigh, const Find& find, const Put& put) {
  if (D < 512)
    map_tiles_by_sum<1, Acc>(device, groups, D, make, weigh, find, put);
  else
    map_tiles_by_sum<4, Acc>(device, groups, D, make, weigh, find, put);
}

// Rows that a team of sum_over_rows_by_sum() adds up, and how many sums all leave in `partial`.
inline size_t rows_of_a_piece(size_t D) { return std::clamp<size_t>(D / 128 * 4, 4, 16); }
template <class Groups>
size_t partial_sums(Groups groups, size_t D) {
  return groups.pieces(rows_of_a_piece(D)).rows() * D / 4;
}

// find(row, sum of weigh(row, d) over channels) for each row, then finish(group, d, sum of
// term(group, row, d)) over each group's rows. A team does both for a piece of a group, where what
// was read for the first is still near; sum_over_rows() adds up the pieces.
template <class Acc, class Sum, class Groups, class Weigh, class Find, class Term, class Finish>
void sum_over_rows_by_sum(const Device& device, Groups groups, size_t D, Sum zero, Sum* partial,
                          const Weigh& weigh, const Find& find, const Term& term,
                          const Finish& finish) {
  size_t most = rows_of_a_piece(D), quads = D / 4;
  int row_threads = std::min(threads_for_row(D), 32);
  Groups pieces = groups.pieces(most);
  for_each_team(device, pieces.rows(), threads_for_row(D, 1), [=] HD(Team team) {
    Piece piece = groups.piece(most, team.index);
    Team line = team.part(row_threads);
    for (size_t row = piece.first + line.index; row <= piece.last;
         row += size_t(team.parts(row_threads))) {
      Acc sum = sum_of_row<Acc>(line, D, [&](size_t d) { return weigh(row, d); });
      if (line.rank == 0) find(row, sum);
    }
    team.sync();
    for (size_t d = 4 * size_t(team.rank); d < D; d += 4 * size_t(team.size)) {
      Sum sum = zero;
      for (Piece rows = piece; rows.first <= rows.last; rows.first += 4) {
        Sum terms[4];
        UNROLL
        for (int k = 0; k < 4; ++k) terms[k] = term(rows.group, rows.row(k), d);
        UNROLL
        for (int k = 0; k < 4; ++k)
          if (rows.has(k)) sum = sum + terms[k];
      }
      partial[team.index * quads + d / 4] = sum;
    }
  });
  sum_over_rows(
      device, pieces, D, zero,
      [=] HD(size_t, size_t piece, size_t d) { return partial[piece * quads + d / 4]; }, finish);
}

// ---------------------------------------------------------------------------------------------
// C. Kernels of the GPU's own, and captured sequences

#ifdef __CUDACC__
// A kernel of the GPU's own, written where one source for both machines would be too slow: `blocks`
// of `threads` threads that share `shared` bytes. `together` neighbours are a cluster: they run at
// the same time and reach each other's shared memory.
template <class... Parameters, class... Arguments>
void launch(const Device& device, void (*kernel)(Parameters...), dim3 blocks, unsigned together,
            unsigned threads, size_t shared, Arguments... arguments) {
  CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension, cluster.val.clusterDim = {together, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = shared;
  config.stream = device.stream, config.attrs = &cluster, config.numAttrs = together > 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}
#endif

// A sequence of kernels that is always the same: on a GPU it is recorded once as a CUDA graph and
// replayed by one launch, on a CPU it simply runs. What changes from step to step (the step number,
// the learning rate) therefore lives in device memory, never in a kernel's arguments.
class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Not `now`: only takes the memory that it will need.
  template <class Sequence>
  void run(Device& device, const Sequence& sequence, bool now = true) {
#ifdef __CUDACC__
    if (device.gpu) {
      if (!executable_) record(device, sequence);
      if (now) CUDA_CHECK(cudaGraphLaunch(executable_, device.stream));
      return;
    }
#endif
    (void)device;
    if (now) sequence();
  }

#ifdef __CUDACC__
  ~Graph() {
    if (executable_) cudaGraphExecDestroy(executable_);
  }

 private:
  template <class Sequence>
  void record(Device& device, const Sequence& sequence) {
    cudaGraph_t graph;
    CUDA_CHECK(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal));
    sequence();
    CUDA_CHECK(cudaStreamEndCapture(device.stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&executable_, graph, 0));
    CUDA_CHECK(cudaGraphUpload(executable_, device.stream));
    CUDA_CHECK(cudaGraphDestroy(graph));
  }
  cudaGraphExec_t executable_ = nullptr;
#endif
};

// ---------------------------------------------------------------------------------------------
// D. The two matrix products

// The CPU product. Each task makes one tile of C: it packs a panel of A and one of B into the order
// in which the innermost loop reads them (and into Acc), and multiplies panels by register
// blocks of rows x columns. Tiles are independent and each sums k in the same order, whatever the
// number of threads, so the bits do not depend on it.
template <class Acc>
struct HostGemm {
#ifdef __AVX512F__
  static constexpr int vector_bytes = 64;
#else
  static constexpr int vector_bytes = 32;
#endif
  static constexpr int lanes = vector_bytes / sizeof(Acc);
  static constexpr int rows = 6, columns = 2 * lanes;  // 12 accumulators hide the latency of a FMA
  static constexpr size_t tile_m = 96, tile_n = 256, tile_k = 256;
  typedef Acc Vector __attribute__((vector_size(vector_bytes)));

  // acc (rows, columns) = a (k, rows)^T b (k, columns), added to what is there unless `first`. Here
  // and in column_sums() alone a compiler may fuse products and sums (see the Makefile): there is
  // one way to do it.
#ifndef __clang__
  [[gnu::optimize("fp-contract=fast")]]
#endif
  static void
  block(Acc* acc, size_t acc_stride, const Acc* a, const Acc* b, size_t k, bool first) {
#ifdef __clang__
#pragma clang fp contract(fast)
#endif
    Vector c[rows][2];
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < 2; ++j)
        if (first)
          c[i][j] = Vector{};
        else
          std::memcpy(&c[i][j], acc + i * acc_stride + j * lanes, vector_bytes);
    for (size_t p = 0; p < k; ++p, a += rows, b += columns) {
      Vector b0, b1;
      std::memcpy(&b0, b, vector_bytes);
      std::memcpy(&b1, b + lanes, vector_bytes);
      for (int i = 0; i < rows; ++i) {
        c[i][0] += a[i] * b0;
        c[i][1] += a[i] * b1;
      }
    }
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < 2; ++j)
        std::memcpy(acc + i * acc_stride + j * lanes, &c[i][j], vector_bytes);
  }

  // Strips of `width` lines of op(M) (rows of A, columns of B), k-major within a strip, zero
  // padded.
  template <class Real>
  static void pack(Acc* out, const Real* data, size_t line_step, size_t k_step, size_t lines,
                   size_t k, size_t width) {
    for (size_t start = 0; start < lines; start += width, out += width * k) {
      size_t w = std::min(width, lines - start);
      const Real* from = data + start * line_step;
      if (w < width) std::fill(out, out + width * k, Acc(0));
      if (line_step == 1)
        for (size_t p = 0; p < k; ++p)
          for (size_t i = 0; i < w; ++i) out[p * width + i] = Acc(from[i + p * k_step]);
      else
        for (size_t i = 0; i < w; ++i)
          for (size_t p = 0; p < k; ++p) out[p * width + i] = Acc(from[i * line_step + p * k_step]);
    }
  }

  // What one thread packs and adds up in: made at its first product, as a thread's static storage
  // is zeroed, hence taken, by every thread for every type.
  struct Workspace {
    alignas(64) Acc a[tile_m * tile_k], b[tile_n * tile_k], acc[tile_m * tile_n];
  };
  static Workspace& workspace() {
    static thread_local std::unique_ptr<Workspace> own(new Workspace);
    return *own;
  }
  static size_t workspace_bytes() { return size_t(omp_get_max_threads()) * sizeof(Workspace); }

  // C[m0.., n0..] = alpha op(A) op(B) + beta C for one tile.
  template <class Real, class TC>
  static void tile(TC* C, size_t ldc, const Real* Am, size_t a_row, size_t a_k, const Real* Bm,
                   size_t b_col, size_t b_k, size_t m, size_t n, size_t k, Acc alpha, Acc beta) {
    static_assert(tile_m % rows == 0 && tile_n % columns == 0, "panels are whole strips");
    Workspace& own = workspace();
    Acc *pa = own.a, *pb = own.b, *acc = own.acc;
    for (size_t k0 = 0; k0 < k; k0 += tile_k) {
      size_t kk = std::min(tile_k, k - k0);
      pack(pa, Am + k0 * a_k, a_row, a_k, m, kk, rows);
      pack(pb, Bm + k0 * b_k, b_col, b_k, n, kk, columns);
      for (size_t j = 0; j < n; j += columns)
        for (size_t i = 0; i < m; i += rows)
          block(acc + i * tile_n + j, tile_n, pa + i * kk, pb + j * kk, kk, k0 == 0);
    }
    for (size_t i = 0; i < m; ++i)
      for (size_t j = 0; j < n; ++j) {
        Acc c = alpha * acc[i * tile_n + j];
        // With beta = 0, C may hold anything, NaN included: it is not read.
        C[i * ldc + j] = TC(beta == 0 ? c : c + beta * Acc(C[i * ldc + j]));
      }
  }

  template <class Real, class TC>
  static void run(Matrix<TC> C, Matrix<const Real> Am, Matrix<const Real> Bm, Sizes s, Acc alpha,
                  Acc beta) {
    size_t a_row = Am.transposed ? 1 : Am.stride, a_k = Am.transposed ? Am.stride : 1;
    size_t b_col = Bm.transposed ? Bm.stride : 1, b_k = Bm.transposed ? 1 : Bm.stride;
    // Shorter tiles when there would be too few to share among the threads.
    size_t products = s.outer * s.inner, tn = ceil_div(s.n, tile_n), tm = tile_m;
    while (tm > 2 * rows && products * tn * ceil_div(s.m, tm) < size_t(2 * omp_get_max_threads()))
      tm = round_up(tm / 2, rows);
    size_t tasks = products * tn * ceil_div(s.m, tm);
    // Waking a thread costs microseconds, so small products stay on this one.
#pragma omp parallel for schedule(dynamic) if (tasks > 1 && products * s.m * s.n * s.k > 30000)
    for (size_t task = 0; task < tasks; ++task) {
      size_t j = task % tn * tile_n, rest = task / tn;
      size_t i = rest % ceil_div(s.m, tm) * tm, product = rest / ceil_div(s.m, tm);
      size_t o = product / s.inner, h = product % s.inner;
      tile(C.at(o, h) + i * C.stride + j, C.stride, Am.at(o, h) + i * a_row, a_row, a_k,
           Bm.at(o, h) + j * b_col, b_col, b_k, std::min(tm, s.m - i), std::min(tile_n, s.n - j),
           s.k, alpha, beta);
    }
  }
};

#ifdef __CUDACC__
template <class Real>
constexpr cudaDataType_t cuda_type = std::is_same_v<Real, double>  ? CUDA_R_64F
                                     : std::is_same_v<Real, float> ? CUDA_R_32F
                                                                   : CUDA_R_16BF;

// cuBLAS is column-major: it sees each row-major matrix as its transpose, so C = A B is asked for
// as C^T = B^T A^T. It has one batch stride, so the inner index is a loop.
template <class Real, class TC>
void device_gemm(Device& device, Matrix<TC> C, Matrix<const Real> A, Matrix<const Real> B, Sizes s,
                 AccOf<Real> alpha, AccOf<Real> beta) {
  if (std::is_same_v<Real, Dual>) fail("dual numbers have no matrix product on a GPU");
  for (size_t size : {s.m, s.n, s.k, s.outer, A.stride, B.stride, C.stride})
    if (size > 0x7fffffff)
      fail("a matrix product with a size of %zu is too large for cuBLAS", size);
  auto op = [](bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  auto compute = std::is_same_v<Real, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
  for (size_t h = 0; h < s.inner; ++h)
    CUBLAS_CHECK(cublasGemmStridedBatchedEx(
        device.blas, op(B.transposed), op(A.transposed), int(s.n), int(s.m), int(s.k), &alpha,
        B.at(0, h), cuda_type<Real>, int(B.stride), int64_t(B.outer_stride), A.at(0, h),
        cuda_type<Real>, int(A.stride), int64_t(A.outer_stride), &beta, C.at(0, h), cuda_type<TC>,
        int(C.stride), int64_t(C.outer_stride), int(s.outer), compute, CUBLAS_GEMM_DEFAULT));
}
#endif

// ---------------------------------------------------------------------------------------------
// E. Stochastic rounding
//
// A sum kept in bf16 has 8 bits. What is added to it is lost, under rounding to nearest, if it is
// below half a gap, a 512th to a 256th of the sum. So v = 0.999 v + 0.001 g^2 never falls, and
// rises only where g^2 is above 3 to 5 v: it freezes. Rounding up with a probability that is the
// distance from the lower neighbour (in units of the gap) is right on average: E[rounded] = x. The
// errors of different steps are uncorrelated, so over n steps they add up like sqrt(n), not like n.

// x to bf16, up or down by 16 random bits: they carry into the bits that stay with the probability
// that is wanted. (On magnitudes: the sign is a bit of its own.)
HD inline bf16 round_stochastically(float x, uint32_t random) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7f800000u) == 0x7f800000u) return bf16(x);  // infinity and NaN stay what they are
  bf16 y;
  y.bits = uint16_t((u + (random & 0xffffu)) >> 16);
  return y;
}

// x to float, by 29 random bits.
HD inline float round_stochastically(double x, uint32_t random) {
  uint64_t u;
  memcpy(&u, &x, 8);
  if ((u >> 52 & 0x7ff) == 0x7ff) return float(x);
  constexpr uint64_t dropped = (uint64_t(1) << 29) - 1;
  u = (u + (random & dropped)) & ~dropped;
  memcpy(&x, &u, 8);
  return float(x);
}

// Where the bits come from: draw i is for eight numbers, or for four that become floats. `*pass`
// tells one round of an array from the next, and lives in device memory so that a captured step can
// be replayed.
struct Dither {
  uint64_t seed, stream;
  const uint64_t* pass;

  HD Random4 operator()(size_t i) const { return random_bits(seed, stream + *pass, i); }
};

// Store four sums: as they are where p holds sums, else rounded by half of a draw's bits.
template <class Acc>
HD void store_stochastically(Acc* p, Quad<Acc> q, const Random4&, int) {
  store(p, q);
}
HD inline void store_stochastically(bf16* p, Quad<float> q, const Random4& bits, int half) {
  Quad<bf16> rounded;
  for (int k = 0; k < 4; ++k)
    rounded[k] = round_stochastically(q[k], bits.v[2 * half + k / 2] >> (k % 2 * 16));
  *reinterpret_cast<Quad<bf16>*>(p) = rounded;
}
HD inline void store_stochastically(float* p, Quad<double> q, const Random4& bits, int) {
  Quad<float> rounded;
  for (int k = 0; k < 4; ++k) rounded[k] = round_stochastically(q[k], bits.v[k]);
  store(p, rounded);
}

// ---------------------------------------------------------------------------------------------
// F. Dual numbers: exact derivatives, by the same kernels
//
// v + d e with e^2 = 0. Taylor's series ends after its first term, f(v + d e) = f(v) + f'(v) d e:
// what runs in duals has beside each value its derivative along one direction, that of the d of its
// inputs. There is no step, so neither truncation nor the difference of two nearly equal numbers.
// The backward asks the other way round, for one output's derivatives along all inputs; the two
// share the kernels of the forward, and no derivation. On the CPU alone.
struct Dual {
  double v, d;

  Dual() = default;
  HD Dual(double value, double derivative = 0) : v(value), d(derivative) {}
  explicit HD operator double() const { return v; }
  HD Dual& operator+=(Dual x) { return *this = {v + x.v, d + x.d}; }
  HD Dual& operator*=(Dual x) { return *this = {v * x.v, d * x.v + v * x.d}; }
};

HD inline Dual operator-(Dual x) { return {-x.v, -x.d}; }
HD inline Dual operator+(Dual x, Dual y) { return {x.v + y.v, x.d + y.d}; }
HD inline Dual operator-(Dual x, Dual y) { return {x.v - y.v, x.d - y.d}; }
HD inline Dual operator*(Dual x, Dual y) { return {x.v * y.v, x.d * y.v + x.v * y.d}; }
HD inline Dual operator/(Dual x, Dual y) {
  double quotient = x.v / y.v;
  return {quotient, (x.d - quotient * y.d) / y.v};
}
HD inline Dual fma(Dual x, Dual y, Dual z) { return x * y + z; }
HD inline bool operator>(Dual x, Dual y) { return x.v > y.v; }
HD inline bool operator==(Dual x, Dual y) { return x.v == y.v; }
HD inline Dual exp_(Dual x) {
  double y = exp_(x.v);
  return {y, y * x.d};
}
HD inline Dual rsqrt_(Dual x) {
  double y = rsqrt_(x.v);
  return {y, -0.5 * y / x.v * x.d};
}

// A product of duals, (a, a') (b, b') = (a b, a b' + a' b). Its sums go in the order of
// HostGemm<double>, so the values are those of a network in double to the last bit, and a chaotic
// one has the same path. A, of few rows (tokens), is packed; B is not, as that would take longer
// than the product: four of its columns at a time stay in the cache for all rows.
template <>
struct HostGemm<Dual> {
  static constexpr int lanes = HostGemm<double>::lanes, columns = 4, both = 2 * lanes;
  typedef HostGemm<double>::Vector Vector;

  // out (columns, 2, lanes), values and derivatives, = a (k, 2, lanes) times k numbers, `step`
  // apart, of each column; fused as in block().
#ifndef __clang__
  [[gnu::optimize("fp-contract=fast")]]
#endif
  static void
  column_sums(double* out, const double* a, const Dual* const* b, size_t step, size_t k) {
#ifdef __clang__
#pragma clang fp contract(fast)
#endif
    Vector v[columns] = {}, d[columns] = {};
    for (size_t p = 0; p < k; ++p, a += both) {
      Vector a_v, a_d;
      std::memcpy(&a_v, a, sizeof a_v);
      std::memcpy(&a_d, a + lanes, sizeof a_d);
      for (int j = 0; j < columns; ++j) {
        Dual x = b[j][p * step];
        v[j] += a_v * x.v;
        d[j] += a_v * x.d;
        d[j] += a_d * x.v;
      }
    }
    for (int j = 0; j < columns; ++j) {
      std::memcpy(out + j * both, &v[j], sizeof v[j]);
      std::memcpy(out + j * both + lanes, &d[j], sizeof d[j]);
    }
  }

  template <class, class>
  static void run(Matrix<Dual> C, Matrix<const Dual> A, Matrix<const Dual> B, Sizes s, Dual alpha,
                  Dual beta) {
    size_t a_row = A.transposed ? 1 : A.stride, a_k = A.transposed ? A.stride : 1;
    size_t b_col = B.transposed ? B.stride : 1, b_k = B.transposed ? 1 : B.stride;
    std::vector<double> packed(ceil_div(s.m, lanes) * s.k * both);
    for (size_t product = 0; product < s.outer * s.inner; ++product) {
      size_t o = product / s.inner, h = product % s.inner;
      const Dual *a = A.at(o, h), *b = B.at(o, h);
      Dual* c = C.at(o, h);
      for (size_t i = 0; i < s.m; ++i)
        for (size_t p = 0; p < s.k; ++p) {
          double* to = &packed[(i / lanes * s.k + p) * both + i % lanes];
          to[0] = a[i * a_row + p * a_k].v, to[lanes] = a[i * a_row + p * a_k].d;
        }
#pragma omp parallel for schedule(static) if (s.m * s.n * s.k > 30000)
      for (size_t first = 0; first < s.n; first += columns) {
        const Dual* of[columns];
        for (size_t j = 0; j < columns; ++j) of[j] = b + std::min(first + j, s.n - 1) * b_col;
        for (size_t i = 0; i < s.m; i += lanes) {
          double sum[columns * both];
          column_sums(sum, packed.data() + i * s.k * 2, of, b_k, s.k);
          for (size_t n = first; n < std::min(first + columns, s.n); ++n)
            for (size_t m = i; m < std::min(i + lanes, s.m); ++m) {
              const double* x = sum + (n - first) * both + (m - i);
              Dual y{alpha.v * x[0], alpha.v * x[lanes]}, &to = c[m * C.stride + n];
              to = beta.v == 0 ? y : Dual{y.v + beta.v * to.v, y.d + beta.v * to.d};
            }
        }
      }
    }
  }
};
