// math_test.cu - the machine and the scalar maths, on every device at hand.
//
// What it is: numbers against exhaustive or published answers, products and reductions against
// plain loops, memory against its own accounts. What it is not: a test of speed.
// How to read it: each section follows one of math.h's. Kernels are free functions, since nvcc
// takes no device lambda inside a test's body.
#include "../math.h"
#include "check.h"

#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <set>

#include <gtest/gtest.h>

namespace {

// test(device) on the CPU, and on the GPU if there is one.
void on_every_device(const std::function<void(Device&)>& test) {
  for (int gpu = 0; gpu <= (Device::gpus() > 0); ++gpu) {
    Device device(gpu);
    SCOPED_TRACE(device.name);
    test(device);
  }
}

// An array in a device's memory and its copies to and from the host.
template <class Real>
struct DeviceArray {
  Slab slab;
  size_t size;

  DeviceArray(Device& device, size_t n) : slab(device, n * sizeof(Real)), size(n) {}
  DeviceArray(Device& device, const std::vector<Real>& host) : DeviceArray(device, host.size()) {
    device.upload(slab.data, host.data(), size * sizeof(Real));
  }
  Real* data() const { return reinterpret_cast<Real*>(slab.data); }
  std::vector<Real> host() const {
    std::vector<Real> out(size);
    slab.device.download(out.data(), slab.data, size * sizeof(Real));
    return out;
  }
};

uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
bf16 bf16_of(uint32_t bits) {
  bf16 x;
  x.bits = uint16_t(bits);
  return x;
}

// ---------------------------------------------------------------------------------------------
// 1. Errors

TEST(Errors, FailThrowsTheFormattedSentence) {
  EXPECT_EQ(error_of([] { fail("width %zu, %d %s", size_t(10), 3, "heads"); }),
            "width 10, 3 heads");
  std::string half(500, 'x'), end(500, 'y');
  EXPECT_EQ(error_of([&] { fail("%s%s%s", half.c_str(), half.c_str(), end.c_str()); }),
            half + "..." + end);
}

TEST(ErrorsDeathTest, CheckSaysWhereAndExits) {
  const char* (*text)(int) = [](int) { return "no luck"; };
  check(0, text, "a.cu", 6, "cudaMalloc(x)");
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // OpenMP's threads do not survive a fork
  EXPECT_EXIT(check(2, text, "a.cu", 7, "cudaFree(x)"), testing::ExitedWithCode(1),
              "a.cu:7: cudaFree\\(x\\): no luck");
}

TEST(Errors, NoGpuIsTheUsersToMend) {
  if (Device::gpus() > 0) GTEST_SKIP() << "there is a GPU";
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "--device cpu", error_of([] { Device device(true); }));
}

// ---------------------------------------------------------------------------------------------
// 2. Numbers

// The nearest bf16 of a finite x, by distances in double, where all of them are exact. Infinity
// stands for the next number after the largest, 2^128, as rounding sees it.
uint16_t nearest_bf16(float x) {
  uint16_t toward_zero = uint16_t(bits_of(x) >> 16), away = uint16_t(toward_zero + 1);
  auto value = [](uint16_t b) {
    return (b & 0x7fff) == 0x7f80 ? std::copysign(0x1p128, float(bf16_of(b ^ 0x100)))
                                  : double(float(bf16_of(b)));
  };
  double below = std::abs(double(x) - value(toward_zero)), above = std::abs(value(away) - x);
  if (below != above) return below < above ? toward_zero : away;
  return toward_zero % 2 == 0 ? toward_zero : away;
}

TEST(Bf16, EveryPatternRoundTrips) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    float x = bf16_of(bits);
    ASSERT_EQ(bits_of(x), bits << 16);
    // A NaN becomes the one that the GPU's instruction gives.
    ASSERT_EQ(bf16(x).bits, std::isnan(x) ? 0x7fff : bits) << bits;
  }
}

TEST(Bf16, RoundsToTheNearestEven) {
  struct {
    uint32_t from, to;
  } table[] = {
      {0x3f808000, 0x3f80},  // 1 + half a step: a tie, and 1 is even
      {0x3f818000, 0x3f82},  // a tie the other way
      {0x3f808001, 0x3f81},  // just above a tie
      {0x3f817fff, 0x3f81},  // just below one
      {0x3fffffff, 0x4000},  // the carry makes the next exponent
      {0x7f7f7fff, 0x7f7f},  // the last that stays finite
      {0x7f7f8000, 0x7f80},  // the first that does not
      {0xff7fffff, 0xff80},  // minus the largest float
      {0x7f800000, 0x7f80},  // infinity
      {0x00008000, 0x0000},  // subnormal: a tie between 0 and the smallest
      {0x80008001, 0x8001},  // and above it, with a sign
      {0x007fffff, 0x0080},  // the largest subnormal rounds up to a normal number
      {0x80000000, 0x8000},  // minus zero
      {0x7f800001, 0x7fff},  // NaN whose payload is all below the cut
      {0xffffffff, 0x7fff},
  };
  for (auto [from, to] : table) EXPECT_EQ(bf16(float_of(from)).bits, to) << std::hex << from;
}

TEST(Bf16, AgreesWithASearchForTheNearest) {
  for (uint32_t b = 0; b < 65536; ++b)  // every tie and its neighbours
    for (uint32_t low : {0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      float x = float_of(b << 16 | low);
      if (std::isnan(x))
        ASSERT_TRUE(std::isnan(float(bf16(x)))) << std::hex << b;
      else
        ASSERT_EQ(bf16(x).bits, nearest_bf16(x)) << std::hex << b << " " << low;
    }
  std::mt19937 random(1);
  for (int i = 0; i < 1000000; ++i) {
    float x = float_of(uint32_t(random()));
    if (!std::isfinite(x)) continue;
    ASSERT_EQ(bf16(x).bits, nearest_bf16(x)) << std::hex << bits_of(x);
  }
}

TEST(Bf16, TheSameOnEveryDevice) {
  std::vector<float> in;
  for (uint32_t b = 0; b < 65536; ++b)
    for (uint32_t low : {0x0000u, 0x7fffu, 0x8000u, 0x8001u}) in.push_back(float_of(b << 16 | low));
  on_every_device([&](Device& device) {
    DeviceArray<float> x(device, in);
    DeviceArray<bf16> y(device, in.size());
    DeviceArray<double> z(device, in.size());
    convert(device, y.data(), x.data(), in.size());
    convert(device, z.data(), y.data(), in.size());
    auto rounded = y.host();
    auto wide = z.host();
    for (size_t i = 0; i < in.size(); ++i) {
      ASSERT_EQ(rounded[i].bits, bf16(in[i]).bits) << std::hex << bits_of(in[i]);
      ASSERT_TRUE(wide[i] == double(float(rounded[i])) || std::isnan(in[i])) << i;
    }
  });
}

// out = store(2 (a - b) + a * b), the inner product in dots.
template <class Real>
void quad_kernel(const Device& device, Real* out, AccOf<Real>* dots, const Real* a, const Real* b,
                 size_t n) {
  using Acc = AccOf<Real>;
  for_each(device, n / 4, [=] HD(size_t i) {
    Quad<Acc> x = load<Acc>(a + 4 * i), y = load<Acc>(b + 4 * i);
    store(out + 4 * i, Acc(2) * (x - y) + x * y);
    dots[i] = dot(x, y);
  });
}

template <class Real>
void check_quads(Device& device) {
  std::vector<Real> a, b;
  for (int i = 0; i < 64; ++i) a.push_back(Real(i - 30)), b.push_back(Real(i % 7));
  DeviceArray<Real> x(device, a), y(device, b), out(device, 64);
  DeviceArray<AccOf<Real>> dots(device, 16);
  quad_kernel(device, out.data(), dots.data(), x.data(), y.data(), 64);
  for (int i = 0; i < 64; ++i) {
    float u = float(a[i]), v = float(b[i]);
    EXPECT_EQ(float(out.host()[i]), float(Real(2 * (u - v) + u * v))) << i;
  }
  for (int i = 0; i < 16; ++i) {
    double sum = 0;
    for (int k = 4 * i; k < 4 * i + 4; ++k) sum += double(a[k]) * double(b[k]);
    EXPECT_EQ(dots.host()[i], sum) << i;
  }
}

TEST(Quads, ComputeFourAtATime) {
  on_every_device([](Device& device) {
    check_quads<double>(device), check_quads<float>(device), check_quads<bf16>(device);
  });
}

// ---------------------------------------------------------------------------------------------
// 3. Memory

size_t lay_three(Carver c, void* (&p)[3]) {
  p[0] = c.take<float>(7), p[1] = c.take<bf16>(1), p[2] = c.take<double>(33);
  return c.used;
}

TEST(Carver, CountsWhatItCarves) {
  Device device;
  void* p[3];
  size_t bytes = lay_three({}, p);
  for (void* nothing : p) EXPECT_EQ(nothing, nullptr);
  EXPECT_EQ(bytes, 512 + 33 * sizeof(double));
  Slab slab(device, bytes);
  EXPECT_EQ(lay_three({slab.data}, p), bytes);
  const size_t offsets[] = {0, 256, 512};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(static_cast<std::byte*>(p[i]) - slab.data, ptrdiff_t(offsets[i]));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(p[i]) % 256, 0u);
  }
}

TEST(Slab, IsAccountedForAndHoldsNaN) {
  on_every_device([](Device& device) {
    size_t held = device.allocated, taken = device.allocations;
    {
      DeviceArray<double> a(device, 1000);
      EXPECT_EQ(device.allocated, held + 8000);
      DeviceArray<float> b(device, 1);  // too small to be aligned: takes 256 bytes
      EXPECT_EQ(device.allocated, held + 8256);
      EXPECT_EQ(device.allocations, taken + 2);
      Slab zeros(device, 800, 0);
      device.copy(a.data(), zeros.data, 800);
      auto host = a.host();
      for (size_t i = 0; i < 1000; ++i) ASSERT_TRUE(i < 100 ? host[i] == 0 : std::isnan(host[i]));
      EXPECT_TRUE(std::isnan(b.host()[0]));
      EXPECT_TRUE(std::isnan(float(DeviceArray<bf16>(device, 1).host()[0])));
    }
    EXPECT_EQ(device.allocated, held);
    EXPECT_EQ(device.allocations, taken + 4);  // counts what was ever taken
    EXPECT_GT(device.available(), size_t(1) << 20);
  });
}

TEST(Slab, TooMuchIsAnError) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer stops the program instead";
#endif
  Device device;
  EXPECT_EQ(error_of([&] {
              Slab slab(device, size_t(1) << 55);
              std::byte* volatile kept = slab.data;  // clang leaves out memory that nothing has
              (void)kept;
            }),
            "36028797.02 GB of memory could not be taken on CPU");
  EXPECT_EQ(device.allocated, 0u);
}

TEST(Device, KnowsWhatItsControlGroupMayStillTake) {
  namespace fs = std::filesystem;
  std::string folder = testing::TempDir() + "/math_test.XXXXXX";
  ASSERT_TRUE(mkdtemp(folder.data()));
  auto put = [&](const char* name, const char* text) {
    std::ofstream(folder + "/" + name) << text;
  };
  EXPECT_EQ(control_group_room(folder), SIZE_MAX) << "none";
  put("memory.max", "max\n"), put("memory.current", "700\n");
  EXPECT_EQ(control_group_room(folder), SIZE_MAX) << "no limit";
  put("memory.max", "1000\n");
  EXPECT_EQ(control_group_room(folder), 300u);
  put("memory.stat", "anon 1\nactive_file 80\ninactive_file 50\nslab 7\n");
  EXPECT_EQ(control_group_room(folder), 350u);
  put("memory.current", "1200\n");
  EXPECT_EQ(control_group_room(folder), 0u);
  // A group is within those above it, and the process's own may be any.
  fs::create_directories(folder + "/a/b");
  put("memory.current", "700\n"), put("a/memory.current", "60\n"), put("a/b/memory.current", "5\n");
  put("a/memory.max", "max\n"), put("a/b/memory.max", "100\n");
  EXPECT_EQ(control_groups_room(folder, ""), 350u);
  EXPECT_EQ(control_groups_room(folder, "/"), 350u);
  EXPECT_EQ(control_groups_room(folder, "/a"), 350u);
  EXPECT_EQ(control_groups_room(folder, "/a/b"), 95u);
  put("a/memory.max", "80\n");
  EXPECT_EQ(control_groups_room(folder, "/a/b"), 20u);
  EXPECT_EQ(control_groups_room(folder, "/a/gone"), 20u);
  put("memory.max", "660\n");
  EXPECT_EQ(control_groups_room(folder, "/a/b"), 10u);
  put("cgroup", "4:memory:/c\n0::/a/b\n");
  EXPECT_EQ(control_group((folder + "/cgroup").c_str()), "/a/b");
  put("cgroup", "4:memory:/c\n");
  EXPECT_EQ(control_group((folder + "/cgroup").c_str()), "");
  EXPECT_EQ(control_group((folder + "/none").c_str()), "");
  EXPECT_EQ(Device().available(folder.c_str()), 10u);
  // Others take, too.
  EXPECT_LE(Device().available() / 2, control_groups_room("/sys/fs/cgroup", control_group()));
  fs::remove_all(folder);
}

// ---------------------------------------------------------------------------------------------
// 4. Teams

void count_kernel(const Device& device, int* out, size_t n) {
  for_each(device, n, [=] HD(size_t i) { out[i] += int(i % 1000) + 1; });
}

TEST(ForEach, VisitsEachIndexOnce) {
  on_every_device([](Device& device) {
    for (size_t n : {0, 1, 255, 256, 257, 4096, 4097, 100000}) {
      DeviceArray<int> out(device, std::vector<int>(n + 300, 0));
      count_kernel(device, out.data(), n);
      auto host = out.host();
      for (size_t i = 0; i < host.size(); ++i)
        ASSERT_EQ(host[i], i < n ? int(i % 1000) + 1 : 0) << n << " " << i;
    }
  });
}

TEST(Teams, ThreadsAreWholeWarpsAtMostEight) {
  const std::pair<size_t, int> table[] = {
      {0, 32},    {1, 32},    {32, 32},   {33, 64},   {96, 96},
      {255, 256}, {256, 256}, {257, 256}, {100, 128}, {size_t(1) << 40, 256}};
  for (auto [n, threads] : table) EXPECT_EQ(threads_for(n), threads) << n;
}

TEST(Teams, ARowIsFourQuadsAThreadUpToTheLargestTeam) {
  const std::pair<size_t, int> table[] = {{4, 1},      {16, 1},     {64, 4},
                                          {128, 8},    {384, 32},   {1024, 64},
                                          {1028, 128}, {3072, 256}, {4096, 256}};
  for (auto [D, threads] : table) {
    EXPECT_EQ(threads_for_row(D), threads) << D;
    EXPECT_GE(4 * size_t(threads_for_row(D, 1)), std::min<size_t>(D, 1024)) << D;
  }
  EXPECT_EQ(threads_for_row(1 << 20), Team::max_size);
}

// Each thread writes what it was told: sums (teams, 2, 256), the largest and its rank. Reductions
// follow each other without a pause, two of a kind first: a missing barrier between them shows.
template <class Acc>
void reduce_kernel(const Device& device, Acc* sums, Acc* largest, const Acc* x, size_t teams,
                   size_t n, int threads) {
  for_each_team(device, teams, threads, [=] HD(Team team) {
    const Acc* mine = x + team.index * n;
    Acc sum = 0, top = mine[0], squares = 0;
    for (size_t i = team.rank; i < n; i += team.size)
      sum += mine[i], top = max_(top, mine[i]), squares += mine[i] * mine[i];
    sum = team.sum(sum), squares = team.sum(squares), top = team.max(top);
    size_t at = team.index * 512 + team.rank;
    sums[at] = sum, sums[at + 256] = squares, largest[at] = top;
  });
}

template <class Acc>
void check_reductions(Device& device, int threads, size_t n) {
  constexpr size_t teams = 50;
  std::vector<Acc> in;
  for (size_t i = 0; i < teams * n; ++i)
    in.push_back(Acc(gaussian(1, 2, i) - 5));  // max is negative
  DeviceArray<Acc> x(device, in), sums(device, teams * 512), largest(device, teams * 512);
  reduce_kernel(device, sums.data(), largest.data(), x.data(), teams, n, threads);
  auto s = sums.host(), l = largest.host();
  for (size_t t = 0; t < teams; ++t) {
    double sum = 0, squares = 0, size = 0;
    Acc top = in[t * n];
    for (size_t i = t * n; i < (t + 1) * n; ++i) {
      sum += double(in[i]), squares += double(in[i]) * double(in[i]), size += std::abs(in[i]);
      top = std::max(top, in[i]);
    }
    double bound = double(n) * std::numeric_limits<Acc>::epsilon();
    for (int rank = 0; rank < (device.gpu ? threads : 1); ++rank) {
      size_t at = t * 512 + size_t(rank);
      ASSERT_NEAR(s[at], sum, bound * size) << "team " << t << " rank " << rank;
      ASSERT_NEAR(s[at + 256], squares, bound * squares) << "team " << t << " rank " << rank;
      ASSERT_EQ(l[at], top) << "team " << t << " rank " << rank;
      ASSERT_EQ(s[at], s[t * 512]) << "all ranks have the same bits";
    }
  }
}

TEST(Teams, SumAndMaxReachEveryThread) {
  on_every_device([](Device& device) {
    for (int threads : {1, 2, 8, 16, 32, 64, 128, 256})
      for (size_t n : {1, 31, 256, 1000}) {
        SCOPED_TRACE(testing::Message() << threads << " threads, " << n << " numbers");
        check_reductions<double>(device, threads, n), check_reductions<float>(device, threads, n);
      }
  });
}

// Column sums of (rows, width) matrices, as the merges use sum_rows; V is a number or a Quad.
// Every row of threads writes its answer: out (teams, most_rows, width).
constexpr size_t most_rows = 256;
template <class V, class Acc>
void column_kernel(const Device& device, Acc* out, const Acc* x, size_t teams, size_t rows,
                   size_t width, int threads, int columns) {
  constexpr size_t lanes = sizeof(V) / sizeof(Acc);
  for_each_team(device, teams, threads, [=] HD(Team team) {
    Team line = team.part(columns);
    for (size_t tile = 0; tile < width; tile += lanes * size_t(line.size)) {
      size_t c = tile + lanes * size_t(line.rank);
      V sum;
      Acc* parts = reinterpret_cast<Acc*>(&sum);
      for (size_t k = 0; k < lanes; ++k) parts[k] = 0;
      if (c < width)
        for (size_t r = line.index; r < rows; r += size_t(team.parts(columns)))
          for (size_t k = 0; k < lanes; ++k) parts[k] += x[(team.index * rows + r) * width + c + k];
      sum = team.sum_rows(sum, columns);
      if (c < width)
        for (size_t k = 0; k < lanes; ++k)
          out[(team.index * most_rows + line.index) * width + c + k] = parts[k];
    }
  });
}

template <class V, class Acc>
void check_columns(Device& device, int threads, int columns, size_t rows, size_t width) {
  constexpr size_t teams = 9;
  std::vector<Acc> in;  // small whole numbers: every order of adding gives the same
  for (size_t i = 0; i < teams * rows * width; ++i)
    in.push_back(Acc(int(uniform(1, 0, i) * 100) - 50));
  DeviceArray<Acc> x(device, in), out(device, teams * most_rows * width);
  column_kernel<V>(device, out.data(), x.data(), teams, rows, width, threads, columns);
  auto host = out.host();
  for (size_t t = 0; t < teams; ++t)
    for (size_t c = 0; c < width; ++c) {
      Acc sum = 0;
      for (size_t r = 0; r < rows; ++r) sum += in[(t * rows + r) * width + c];
      for (int row = 0; row < (device.gpu ? std::max(threads / columns, 1) : 1); ++row)
        ASSERT_EQ(host[(t * most_rows + size_t(row)) * width + c], sum)
            << t << " " << c << " row " << row;
    }
}

TEST(Teams, SumRowsReachesEveryRow) {
  on_every_device([](Device& device) {
    for (int threads : {8, 32, 64, 256})
      for (int columns : {1, 4, 8, 32})
        for (size_t rows : {1, 7, 37})
          for (size_t width : {4, 32, 200}) {
            check_columns<double, double>(device, threads, columns, rows, width);
            check_columns<float, float>(device, threads, columns, rows, width);
            check_columns<Quad<float>, float>(device, threads, columns, rows, width);
          }
  });
}

// x[i] = x[i] * clock + 1, then the clock moves on: what a replayed graph must see change.
void clock_kernels(const Device& device, double* x, size_t n, double* clock) {
  for_each(device, n, [=] HD(size_t i) { x[i] = x[i] * clock[0] + 1; });
  for_each(device, 1, [=] HD(size_t) { clock[0] += 1; });
}

TEST(Graph, EveryRunIsTheWholeSequence) {
  on_every_device([](Device& device) {
    DeviceArray<double> x(device, std::vector<double>(500, 1)),
        clock(device, std::vector<double>{1});
    Graph graph;
    auto sequence = [&] { clock_kernels(device, x.data(), x.size, clock.data()); };
    graph.run(device, sequence, false);
    EXPECT_EQ(x.host(), std::vector<double>(500, 1)) << "not run yet";
    double expected = 1;
    for (int run = 1; run <= 4; ++run) {
      graph.run(device, sequence);
      expected = expected * run + 1;
      EXPECT_EQ(x.host(), std::vector<double>(500, expected)) << "run " << run;
    }
  });
}

// ---------------------------------------------------------------------------------------------
// 5. The matrix product

// A host array and a matrix, or a batch of them, that lies somewhere inside it. What the matrix
// does not cover is NaN: a product that reads it shows, and so does one that writes it.
template <class Real>
struct Operand {
  std::vector<Real> host;
  size_t offset = 0;
  Matrix<Real> view{nullptr, 0};

  Real& at(size_t o, size_t n, size_t i, size_t j) {
    if (view.transposed) std::swap(i, j);
    return host[offset + o * view.outer_stride + n * view.inner_stride + i * view.stride + j];
  }
  Matrix<Real> on(const DeviceArray<Real>& array) const {
    Matrix<Real> m = view;
    m.data = array.data() + offset;
    return m;
  }
};

// (rows, columns) matrices apart from each other, or, as attention's heads, side by side within
// rows that belong to all of a batch's inner matrices.
template <class Real>
Operand<Real> operand(size_t rows, size_t columns, bool transposed, Sizes s, bool heads,
                      uint64_t seed) {
  Operand<Real> x;
  size_t r = transposed ? columns : rows, c = transposed ? rows : columns;
  size_t stride = heads ? s.inner * c + 5 : c + 3, inner = heads ? c : r * stride + 1;
  size_t outer = heads ? r * stride + 2 : s.inner * inner;
  x.offset = 4;
  x.host.assign(x.offset + s.outer * outer + stride, Real(NAN));
  x.view = Matrix<Real>(nullptr, stride).batch(outer, inner);
  x.view.transposed = transposed;
  for (size_t o = 0; o < s.outer; ++o)
    for (size_t n = 0; n < s.inner; ++n)
      for (size_t i = 0; i < rows; ++i)
        for (size_t j = 0; j < columns; ++j)
          x.at(o, n, i, j) = Real(gaussian(seed, o * s.inner + n, i * columns + j));
  return x;
}

template <class Real>
constexpr double unit_roundoff = std::is_same_v<Real, double>  ? 0x1p-53
                                 : std::is_same_v<Real, float> ? 0x1p-24
                                                               : 0x1p-8;

// gemm against a triple loop. The bound is the textbook one: k + 2 roundings in Acc of terms
// whose absolute values add up to `size`, and one rounding to TC.
template <class Real, class TC>
void check_gemm(Device& device, Sizes s, bool ta, bool tb, double alpha, double beta, bool heads) {
  SCOPED_TRACE(testing::Message() << s.m << "x" << s.n << "x" << s.k << " transposed " << ta << tb
                                  << " alpha " << alpha << " beta " << beta);
  Operand<Real> a = operand<Real>(s.m, s.k, ta, s, heads, 1),
                b = operand<Real>(s.k, s.n, tb, s, heads, 2);
  Operand<TC> c = operand<TC>(s.m, s.n, false, s, heads, 3), want = c;
  if (beta == 0) std::fill(c.host.begin(), c.host.end(), TC(NAN));  // must not be read
  DeviceArray<Real> da(device, a.host), db(device, b.host);
  DeviceArray<TC> dc(device, c.host);
  gemm(device, c.on(dc), a.on(da), b.on(db), s, AccOf<Real>(alpha), AccOf<Real>(beta));
  Operand<TC> got = c;
  got.host = dc.host();
  for (size_t o = 0; o < s.outer; ++o)
    for (size_t n = 0; n < s.inner; ++n)
      for (size_t i = 0; i < s.m; ++i)
        for (size_t j = 0; j < s.n; ++j) {
          long double sum = 0, size = 0;
          for (size_t p = 0; p < s.k; ++p) {
            long double term = (long double)(a.at(o, n, i, p)) * (long double)(b.at(o, n, p, j));
            sum += term, size += std::abs(term);
          }
          long double old = beta == 0 ? 0.0L : beta * (long double)(want.at(o, n, i, j));
          sum = alpha * sum + old, size = std::abs(alpha) * size + std::abs(old);
          double bound = double(s.k + 2) * unit_roundoff<AccOf<Real>> * double(size) +
                         unit_roundoff<TC> * double(std::abs(sum));
          TC& found = got.at(o, n, i, j);
          ASSERT_LE(std::abs(double(found) - double(sum)), bound) << i << ", " << j;
          found = TC(NAN);
        }
  for (TC x : got.host) ASSERT_TRUE(std::isnan(double(x))) << "written outside the matrices";
}

template <class Real, class TC>
void check_gemms(Device& device) {
  const Sizes sizes[] = {{5, 7, 0},    {1, 1, 1},     {5, 7, 97},   {7, 259, 1},  {97, 5, 259},
                         {130, 97, 7}, {259, 130, 5}, {1, 130, 97}, {97, 1, 600}, {130, 259, 513}};
  for (Sizes s : sizes)
    for (int t = 0; t < 4; ++t) check_gemm<Real, TC>(device, s, t & 1, t & 2, 1, 0, false);
  const std::pair<double, double> factors[] = {{-0.5, 0}, {1, 1}, {0.75, -1.5}};
  for (auto [alpha, beta] : factors)
    for (int t = 0; t < 4; ++t)
      check_gemm<Real, TC>(device, {97, 130, 300}, t & 1, t & 2, alpha, beta, false);
  for (bool heads : {false, true})
    for (int t = 0; t < 4; ++t) {
      check_gemm<Real, TC>(device, {72, 72, 16, 3, 4}, t & 1, t & 2, 0.25, 0, heads);
      check_gemm<Real, TC>(device, {33, 20, 65, 2, 3}, t & 1, t & 2, 1, 1, heads);
      check_gemm<Real, TC>(device, {33, 20, 0, 2, 3}, t & 1, t & 2, 1, 0.5, heads);
    }
}

TEST(Gemm, AgreesWithATripleLoopInDouble) { on_every_device(check_gemms<double, double>); }
TEST(Gemm, AgreesWithATripleLoopInFloat) { on_every_device(check_gemms<float, float>); }
TEST(Gemm, AgreesWithATripleLoopInBf16) { on_every_device(check_gemms<bf16, bf16>); }
TEST(Gemm, AgreesWithATripleLoopFromBf16IntoFloat) { on_every_device(check_gemms<bf16, float>); }

#ifdef _OPENMP
template <class Real>
std::vector<Real> product_on(int threads, Sizes s) {
  omp_set_num_threads(threads);
  Device device;
  Operand<Real> a = operand<Real>(s.m, s.k, false, s, false, 1);
  Operand<Real> b = operand<Real>(s.k, s.n, true, s, false, 2);
  Operand<Real> c = operand<Real>(s.m, s.n, false, s, false, 3);
  DeviceArray<Real> da(device, a.host), db(device, b.host), dc(device, c.host);
  gemm(device, c.on(dc), a.on(da), b.on(db), s, AccOf<Real>(0.3), AccOf<Real>(0.7));
  return dc.host();
}

TEST(Gemm, BitsDoNotDependOnTheNumberOfThreads) {
  int before = omp_get_max_threads();
  for (Sizes s : {Sizes{259, 300, 600}, Sizes{100, 1000, 70}, Sizes{40, 30, 50, 3, 4}}) {
    auto d = product_on<double>(1, s);
    auto f = product_on<float>(1, s);
    for (int threads : {2, 3, 4, 7, 16}) {
      auto other_d = product_on<double>(threads, s);
      auto other_f = product_on<float>(threads, s);
      EXPECT_EQ(std::memcmp(d.data(), other_d.data(), d.size() * 8), 0) << threads;
      EXPECT_EQ(std::memcmp(f.data(), other_f.data(), f.size() * 4), 0) << threads;
    }
  }
  omp_set_num_threads(before);
}
#endif

// ---------------------------------------------------------------------------------------------
// 6. Random numbers

TEST(Philox, GivesThePublishedAnswers) {  // Random123's kat_vectors, philox4x32 10
  const uint32_t ones = 0xffffffff;
  struct {
    Random4 counter;
    uint32_t key[2];
    Random4 answer;
  } table[] = {
      {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{ones, ones, ones, ones}},
       {ones, ones},
       {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       {0xa4093822, 0x299f31d0},
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const auto& row : table) {
    Random4 r = philox(row.counter, row.key[0], row.key[1]);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(r.v[i], row.answer.v[i]) << std::hex << row.key[0];
  }
  Random4 r = random_bits(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(r.v[i], table[2].answer.v[i]) << "seed, stream, index";
}

TEST(Random, TheUnitIntervalIsOpenAtOne) {
  EXPECT_EQ(unit_interval(0, 0), 0);
  EXPECT_EQ(unit_interval(0x80000000, 0), 0.5);
  EXPECT_EQ(unit_interval(0xffffffff, 0xffffffff), 1 - 0x1p-53);
  EXPECT_EQ(unit_interval(0, 1 << 11), 0x1p-53);
}

// The mean of n numbers whose variance is `variance` lies within 5 sigma, one time in 1.7 million
// excepted; and the numbers here are always the same.
void expect_mean(const std::function<double(size_t)>& x, double mean, double variance,
                 const char* what) {
  constexpr size_t n = 1 << 19;
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += x(i);
  EXPECT_NEAR(sum / n, mean, 5 * std::sqrt(variance / n)) << what;
}

TEST(Random, UniformMoments) {
  auto centered = [](size_t i) { return uniform(7, 3, i) - 0.5; };
  auto power = [&](int p) { return [=](size_t i) { return std::pow(centered(i), p); }; };
  expect_mean(power(1), 0, 1 / 12.0, "mean");
  expect_mean(power(2), 1 / 12.0, 1 / 180.0, "variance");  // E x^4 - (E x^2)^2
  expect_mean(power(3), 0, 1 / 448.0, "third moment");
  expect_mean(power(4), 1 / 80.0, 1 / 2304.0 - 1 / 6400.0, "fourth moment");
  for (int bin = 0; bin < 16; ++bin)
    expect_mean([=](size_t i) { return int(16 * uniform(7, 3, i)) == bin; }, 1 / 16.0, 15 / 256.0,
                "share of a sixteenth");
}

TEST(Random, GaussianMomentsAndTails) {
  auto power = [](int p) { return [=](size_t i) { return std::pow(gaussian(7, 3, i), p); }; };
  expect_mean(power(1), 0, 1, "mean");
  expect_mean(power(2), 1, 2, "variance");
  expect_mean(power(3), 0, 15, "third moment");
  expect_mean(power(4), 3, 96, "fourth moment");
  for (double x : {-4.0, -3.0, -1.0, 0.0, 0.5, 2.0, 3.5}) {
    double p = 0.5 * std::erfc(x / std::sqrt(2.0));
    expect_mean([=](size_t i) { return gaussian(7, 3, i) > x; }, p, p * (1 - p), "tail");
  }
}

TEST(Random, GaussianIsBoxAndMullers) {
  for (size_t i = 0; i < 1000; ++i) {
    Random4 r = random_bits(7, 3, i);
    long double u = 1 - unit_interval(r.v[0], r.v[1]), v = unit_interval(r.v[2], r.v[3]);
    long double x = std::sqrt(-2 * std::log(u)) * std::cos(2 * std::acos(-1.0L) * v);
    ASSERT_NEAR(gaussian(7, 3, i), double(x), 1e-14) << i;
  }
}

// What two purposes draw has nothing in common. Some add a count of up to 2^32 to their stream.
TEST(Random, NoTwoPurposesShareAStream) {
  namespace s = streams;
  const std::vector<uint64_t> all = {
      s::batch_index,      s::time,           s::noise,        s::dropout,
      s::validation_noise, s::sampling_noise, s::check,        s::probe_images,
      s::probe_time,       s::probe_noise,    s::probe_shuffle};
  const std::vector<uint64_t> counting = {s::parameters, s::gradient_rounding, s::moment_rounding,
                                          s::average_rounding};
  std::set<uint64_t> different(all.begin(), all.end()), high = {0};
  EXPECT_EQ(different.size(), all.size());
  for (uint64_t stream : all) EXPECT_EQ(stream >> 32, 0u);
  for (uint64_t stream : counting) {
    EXPECT_EQ(uint32_t(stream), 0u);
    high.insert(stream >> 32);
  }
  EXPECT_EQ(high.size(), counting.size() + 1);
}

TEST(Random, SeedsStreamsAndIndicesAreIndependent) {
  struct {
    const char* what;
    uint64_t seed, stream, shift;
  } table[] = {{"the next number", 7, 3, 1},
               {"another stream", 7, 4, 0},
               {"another stream, high word", 7, 3 + streams::parameters, 0},
               {"another seed", 8, 3, 0},
               {"another seed, high word", 7 + (uint64_t(1) << 32), 3, 0},
               {"far along", 7, 3, uint64_t(1) << 32}};
  for (const auto& other : table) {
    auto x = [](size_t i) { return gaussian(7, 3, i); };
    auto y = [&](size_t i) { return gaussian(other.seed, other.stream, i + other.shift); };
    expect_mean([&](size_t i) { return x(i) * y(i); }, 0, 1, other.what);
    expect_mean([&](size_t i) { return (x(i) * x(i) - 1) * (y(i) * y(i) - 1); }, 0, 4, other.what);
  }
}

void draw_kernel(const Device& device, double* u, double* g, size_t n) {
  for_each(device, n, [=] HD(size_t i) { u[i] = uniform(5, 1, i), g[i] = gaussian(5, 2, i); });
}

TEST(Random, TheSameOnEveryDevice) {
  on_every_device([](Device& device) {
    constexpr size_t n = 200000;
    DeviceArray<double> u(device, n), g(device, n);
    draw_kernel(device, u.data(), g.data(), n);
    auto us = u.host(), gs = g.host();
    for (size_t i = 0; i < n; ++i) {
      ASSERT_EQ(us[i], uniform(5, 1, i)) << i;
      double want = gaussian(5, 2, i);
      ASSERT_NEAR(gs[i], want, 16 * 0x1p-53 * std::abs(want)) << i;
      ASSERT_EQ(float(gs[i]), float(want)) << i;
    }
  });
}

// ---------------------------------------------------------------------------------------------
// F. Dual numbers

TEST(Dual, FunctionsCarryTheirDerivative) {
  double v = 0.7, w = -1.3;
  Dual x(v, 1), y(w, 0.25), sum = x, product = x;
  sum += y, product *= y;
  struct {
    Dual found;
    double value, derivative;
  } cases[] = {
      {Dual(v), v, 0},
      {-x, -v, -1},
      {x + y, v + w, 1.25},
      {x - y, v - w, 0.75},
      {x * y, v * w, w + 0.25 * v},
      {x / y, v / w, (w - 0.25 * v) / (w * w)},
      {sum, v + w, 1.25},
      {product, v * w, w + 0.25 * v},
      {exp_(y), std::exp(w), 0.25 * std::exp(w)},
      {rsqrt_(x), 1 / std::sqrt(v), -0.5 * std::pow(v, -1.5)},
      {max_(x, y), v, 1},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(c.found.v, c.value);
    EXPECT_DOUBLE_EQ(c.found.d, c.derivative);
  }
  EXPECT_TRUE(x == Dual(v, 2) && !(x == y) && double(x) == v);  // by value
}

// The product's values have the bits of the product of doubles, and (A B)' = A' B + A B'.
TEST(Dual, ProductsKeepTheBitsOfDoubles) {
  Device device;
  auto part = [](const Operand<Dual>& x, double Dual::*of) {
    Operand<double> y{{}, x.offset, {nullptr, 0}};
    for (Dual number : x.host) y.host.push_back(number.*of);
    y.view = Matrix<double>(nullptr, x.view.stride).batch(x.view.outer_stride, x.view.inner_stride);
    y.view.transposed = x.view.transposed;
    return y;
  };
  auto product = [&](const auto& a, const auto& b, auto c, Sizes s, double alpha, double beta) {
    DeviceArray da(device, a.host), db(device, b.host), dc(device, c.host);
    gemm(device, c.on(dc), a.on(da), b.on(db), s, alpha, beta);
    c.host = dc.host();
    return c;
  };
  for (Sizes s : {Sizes{97, 130, 300}, Sizes{33, 20, 65, 2, 3}, Sizes{5, 7, 0}})
    for (int t = 0; t < 4; ++t)
      for (double beta : {0.0, 0.5}) {
        Operand<Dual> a = operand<Dual>(s.m, s.k, t & 1, s, true, 1),
                      b = operand<Dual>(s.k, s.n, t & 2, s, true, 2),
                      c = operand<Dual>(s.m, s.n, false, s, true, 3);
        for (Operand<Dual>* x : {&a, &b, &c})
          for (size_t i = 0; i < x->host.size(); ++i) x->host[i].d = gaussian(4, i, x->host.size());
        Operand<Dual> found = product(a, b, c, s, 0.75, beta);
        auto value = &Dual::v, derivative = &Dual::d;
        Operand<double> v = product(part(a, value), part(b, value), part(c, value), s, 0.75, beta);
        Operand<double> d =
            product(part(a, derivative), part(b, value), part(c, derivative), s, 0.75, beta);
        d = product(part(a, value), part(b, derivative), d, s, 0.75, 1);
        for (size_t i = 0; i < v.host.size(); ++i) {
          ASSERT_TRUE(found.host[i].v == v.host[i] ||
                      (std::isnan(found.host[i].v) && std::isnan(v.host[i])));
          ASSERT_NEAR(found.host[i].d, d.host[i], 1e-12);
        }
      }
}

}  // namespace
