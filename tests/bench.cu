// bench.cu - how fast the pieces are on this GPU, and how far from what it can do.
//
// Everything is timed as replays of a CUDA graph between events, on random data, and the median is
// taken. Kernels rotate among several sets of arrays so that they read from memory, not from a
// cache that the run before filled. Where a row's bytes are known, its floor is the longer of two
// times: that in which the copy moves them (each input once, each output once), and that of its
// operations in the largest product.
//
//   build/bench [--tsv FILE] [PART...]
#define MVSPLIT_NO_MAIN
#include "../train.cu"

#ifdef __CUDACC__

namespace {

using Real = bf16;
using Acc = float;

FILE* tsv = nullptr;
double copy_ceiling = 0, gemm_ceiling = 0;

struct alignas(16) Wide {
  uint64_t x[2];
};

// Median seconds of one sequence(), of `count` in a graph.
template <class Sequence>
double seconds(Device& device, const Sequence& sequence, int count = 1, int replays = 21) {
  Graph graph;
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = -2; i < replays; ++i) {
    CUDA_CHECK(cudaEventRecord(begin, device.stream));
    graph.run(device, [&] {
      for (int k = 0; k < count; ++k) sequence(k);
    });
    CUDA_CHECK(cudaEventRecord(end, device.stream));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) times.push_back(1e-3 * double(ms) / count);
  }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + replays / 2, times.end());
  return times[size_t(replays / 2)];
}

void report(const std::string& name, double s, double bytes, double flops) {
  std::printf("%-30s %9.4f ms", name.c_str(), 1e3 * s);
  if (bytes > 0) std::printf("  %8.1f MB  %6.0f GB/s", 1e-6 * bytes, 1e-9 * bytes / s);
  if (flops > 0) {
    std::printf("  %8.1f TFLOP/s", 1e-12 * flops / s);
    if (gemm_ceiling > 0)
      std::printf("  %3.0f%% of the largest product", 100 * flops / s / gemm_ceiling);
  }
  if (bytes > 0 && copy_ceiling > 0 && gemm_ceiling > 0) {
    double floor = std::max(bytes / copy_ceiling, flops / gemm_ceiling);
    std::printf("  floor %9.4f ms, %5.2f times it", 1e3 * floor, s / floor);
  }
  std::printf("\n");
  std::fflush(stdout);
  if (tsv) std::fprintf(tsv, "%s\t%.6f\n", name.c_str(), 1e3 * s);
}

// Random numbers in an array of X: N(0, scale^2).
template <class X>
X* random_array(Slab& slab, size_t count, uint64_t seed, double scale = 1) {
  X* x = reinterpret_cast<X*>(slab.data);
  for_each(slab.device, count, [=] HD(size_t i) { x[i] = X(float(scale * gaussian(seed, 7, i))); });
  return x;
}

void ceilings(Device& device) {
  size_t bytes = size_t(1) << 30;
  Slab from(device, bytes), to(device, bytes);
  random_array<Real>(from, bytes / 2, 1);
  Wide *x16 = reinterpret_cast<Wide*>(from.data), *y16 = reinterpret_cast<Wide*>(to.data);
  double s = seconds(device, [&](int) { convert(device, y16, x16, bytes / 16); });
  copy_ceiling = 2 * double(bytes) / s;
  report("device copy", s, 2 * double(bytes), 0);
  size_t n = 8192;
  Real *x = random_array<Real>(from, n * n, 1), *w = x + n * n,
       *y = reinterpret_cast<Real*>(to.data);
  s = seconds(device, [&](int) { linear_forward(device, y, x, w, n, n, n); });
  gemm_ceiling = 2 * double(n) * double(n) * double(n) / s;
  report("product of 8192 x 8192", s, 0, 2 * double(n) * double(n) * double(n));
  // The card's clocks, power and temperature at this work, by nvidia-smi: over a second of it.
  for (int i = 0; i < int(1.5 / s); ++i) linear_forward(device, y, x, w, n, n, n);
  char card[32] = "";
  CUDA_CHECK(cudaDeviceGetPCIBusId(card, sizeof card, 0));
  std::printf("meanwhile, clocks (now, at most), power (now, limit), degrees C: ");
  std::fflush(stdout);
  std::string ask =
      "sleep 0.5; nvidia-smi --format=csv,noheader --query-gpu=clocks.sm,clocks.max.sm,"
      "power.draw,power.limit,temperature.gpu -i ";
  if (std::system((ask + card).c_str()) != 0) std::printf("not known\n");
}

Config model(size_t depth, size_t width, size_t heads, size_t ffn, size_t text,
             const std::string& residual = "mvsplit") {
  Config c;
  c.depth = depth, c.width = width, c.heads = heads, c.ffn = ffn, c.patch = 2;
  c.text_tokens = text, c.residual = residual, c.writer_std = 0.02, c.final_std = 0.02;
  c.gates["alpha"] = 0.1;
  return c;
}

// A network with random weights and inputs.
struct Subject {
  Network<Real> net;
  Subject(Device& device, const Config& c, size_t batch, size_t recompute)
      : net(device, c, batch, recompute, true) {
    Slab master(device, net.table.size * sizeof(Acc));
    initialise(device, net.table,
               Master<Real, Acc>{net.weights(), reinterpret_cast<Acc*>(master.data)}, nullptr, 1);
    Arrays<Real>& a = net.arrays;
    auto fill = [&](auto* x, size_t n, double scale) {
      using X = std::remove_pointer_t<decltype(x)>;
      std::vector<X> host;
      for (size_t i = 0; i < n; ++i) host.push_back(X(float(scale * gaussian(2, 7, i))));
      device.upload(x, host.data(), n * sizeof(X));
    };
    fill(a.z, batch * c.pixels(), 1), fill(a.dvelocity, batch * c.pixels(), 1e-3);
    fill(a.text, batch * c.text_size(), 1);
    net.forward(batch);
    net.backward(batch, false);
  }
};

// The kernels of a block, at the paper's width: each with the arrays of its own block, in turn.
void kernels(Device& device) {
  constexpr int sets = 6;
  size_t B = 32;
  Config c = model(sets, 1024, 8, 3072, 64);
  Subject subject(device, c, B, 0);
  Network<Real>& net = subject.net;
  BlockShape<Real> b = net.shape(B);
  Parameters<const Real> w = locate<const Real>(net.config, net.table, net.weights());
  Parameters<Acc> d = locate<Acc>(net.config, net.table, net.gradients());
  BlockScratch<Real>& scratch = net.arrays.scratch;
  auto saved = [&](int k) { return net.saved(size_t(k)); };
  double X = double(b.merge.tokens.rows() * b.merge.D) * sizeof(Real),
         U = double(b.merge.tokens.rows() * b.ffn) * sizeof(Real);
  // Gradients of their own for each turn: 8 arrays would not fit a cache either.
  std::vector<std::unique_ptr<Slab>> G, dF;
  for (int k = 0; k < sets; ++k) {
    G.push_back(std::make_unique<Slab>(device, size_t(X)));
    dF.push_back(std::make_unique<Slab>(device, size_t(X)));
    random_array<Real>(*G.back(), size_t(X) / sizeof(Real), uint64_t(k), 1e-3);
  }
  auto g = [&](int k) { return reinterpret_cast<Real*>(G[size_t(k)]->data); };
  auto df = [&](int k) { return reinterpret_cast<Real*>(dF[size_t(k)]->data); };
  auto time = [&](const char* name, double bytes, double flops, auto f) {
    report(name, seconds(device, f, sets), bytes, flops);
  };
  time("merge forward", 3 * X, 0, [&](int k) {
    BlockSaved<Real> s = saved(k);
    merge_forward(device, s.X1, s.merge[0], s.X, s.F1, w.block(size_t(k)).gates[0], b.merge);
  });
  time("merge replay", 3 * X, 0, [&](int k) {
    BlockSaved<Real> s = saved(k);
    merge_forward(device, s.X1, s.merge[0], s.X, s.F1, w.block(size_t(k)).gates[0], b.merge, true);
  });
  time("merge backward", 5 * X, 0, [&](int k) {
    BlockSaved<Real> s = saved(k);
    Beside beside(device);
    merge_backward(beside, df((k + 1) % sets), df(k), d.block(size_t(k)).gates[0], scratch.merge[0],
                   {g(k), s.X1, s.X, s.F1, w.block(size_t(k)).gates[0], s.merge[0]}, b.merge,
                   false);
  });
  double attention = 4 * double(B * b.heads.length * b.heads.length) * double(b.merge.D);
  time("rope + QK-norm forward", 4 * X, 0, [&](int k) {
    BlockSaved<Real> s = saved(k);
    rope_qk_norm_forward(device, s.qkv, s.r_qk, b.rope, b.heads);
  });
  time("attention forward", 4 * X, attention,
       [&](int k) { fused_attention_forward(device, saved(k), b.heads); });
  time("attention backward", 8 * X, 2.5 * attention, [&](int k) {
    Block<Real> block = net.block(size_t(k), w, B);
    block.scratch.dY = g(k);
    fused_attention_backward(device, block);
  });
  time("SwiGLU forward", 3 * U, 0, [&](int k) {
    swiglu_forward(device, saved(k).hidden, saved(k).u, b.merge.tokens.rows(), b.ffn);
  });
  time("SwiGLU backward", 5 * U, 0, [&](int k) {
    swiglu_backward(device, scratch.du, saved(k).hidden, saved(k).u, b.merge.tokens.rows(), b.ffn);
  });
}

// The products of a block: Y = X W^T, dX = G W, dW = G^T X.
void gemms(Device& device, size_t rows, size_t D, size_t F) {
  std::printf("products of %zu tokens, width %zu\n", rows, D);
  size_t largest = std::max(rows * 2 * F, 2 * F * D);
  Slab a(device, largest * sizeof(Real)), b(device, largest * sizeof(Real)),
      c(device, largest * sizeof(Acc));
  Real *x = random_array<Real>(a, largest, 1), *w = random_array<Real>(b, largest, 2, 0.02);
  struct Shape {
    const char* name;
    size_t out, in;
  };
  for (Shape s :
       {Shape{"qkv", 3 * D, D}, Shape{"proj", D, D}, Shape{"w13", 2 * F, D}, Shape{"w2", D, F}}) {
    double flops = 2 * double(rows) * double(s.out) * double(s.in);
    std::string name = s.name;
    Real* y = reinterpret_cast<Real*>(c.data);
    Acc* dw = reinterpret_cast<Acc*>(c.data);
    report(name + " forward",
           seconds(
               device, [&](int) { linear_forward(device, y, x, w, rows, s.out, s.in); }, 8),
           0, flops);
    report(name + " input gradient",
           seconds(
               device, [&](int) { linear_backward_input(device, y, x, w, rows, s.out, s.in); }, 8),
           0, flops);
    report(name + " weight gradient",
           seconds(
               device,
               [&](int) { linear_backward_weight(device, dw, x, w, rows, s.out, s.in, false); }, 8),
           0, flops);
  }
}

// The dense bf16 peak of this card, and what part of it and of the measured largest product `flops`
// in s seconds are. MFU counts what the mathematics asks for, HFU what was done, replays included.
void utilisation(const Device& device, double s, double model_flops, double done_flops) {
  auto line = [&](const char* name, double peak) {
    if (peak > 0)
      std::printf("%-30s MFU %.1f%%, HFU %.1f%% of %.0f TFLOP/s, %s\n", "",
                  100 * model_flops / s / peak, 100 * done_flops / s / peak, 1e-12 * peak, name);
  };
  line("the largest product measured", gemm_ceiling);
  line("the dense bf16 peak", peak_flops<bf16>(device.name));
}

// A block's forward, recomputation and backward: what eight more blocks cost.
void block(Device& device, size_t batch) {
  enum Part { forward = 1, backward = 2 };
  auto run = [&](size_t depth, size_t recompute, int part) {
    Subject subject(device, model(depth, 1024, 8, 3072, 64), batch, recompute);
    return seconds(
        device,
        [&](int) {
          if (part & forward) subject.net.forward(batch);
          if (part & backward) subject.net.backward(batch, false);
        },
        1, 11);
  };
  auto of_one = [&](size_t recompute, int part) {
    return (run(10, recompute, part) - run(2, recompute, part)) / 8;
  };
  Config c = model(1, 1024, 8, 3072, 64);
  double forward_flop = 2 * double(batch * c.tokens()) * double(4 * 1024 * 1024 + 3 * 1024 * 3072);
  std::string name = "block " + std::to_string(batch);
  double s = of_one(1, forward | backward), f = of_one(1, forward), b = of_one(0, backward);
  report(name + " forward", f, 0, forward_flop);
  report(name + " recomputation", of_one(1, backward) - b, 0, forward_flop);
  report(name + " backward", b, 0, 2 * forward_flop);
  report(name, s, 0, 4 * forward_flop);
  utilisation(device, s, 3 * forward_flop, 4 * forward_flop);
}

// Clipping's norm and AdamW over 2^28 parameters.
template <class G>
void optimizer(Device& device, const char* name) {
  Table table;
  table.parameters = {{"w", {size_t(1) << 28}, Init::uniform, 0.05, 0}};
  size_t n = table.size = size_t(1) << 28, count = count_chunks(table);
  std::vector<Chunk> chunks = chunks_of(table);
  TrainArrays<Real, G> a = {};
  Carver counter;
  a.lay_optimizer(counter, table, false);
  Slab slab(device, counter.used, 0), weights(device, n * sizeof(Real)), g(device, n * sizeof(G));
  Carver carver{slab.data};
  a.lay_optimizer(carver, table, false);
  a.master.weights = reinterpret_cast<Real*>(weights.data);
  device.upload(a.chunks, chunks.data(), count * sizeof(Chunk));
  initialise(device, table, a.master, nullptr, 1);
  a.gradients = random_array<G>(g, n, 3, 1e-3);
  a.dither = {1, streams::moment_rounding, &a.clock->pass};
  Optimizer o;
  double s = seconds(device, [&](int) {
    begin_step(device, a.clock, o, 0, 0);
    gradient_norm(device, a.clock, a.partial, a.gradients, a.chunks, count, o.clip);
    AdamW::update<decltype(a.master)>(device, a, o);
  });
  // Read: the gradient twice, m, v, the master (which lean holds the weight). Written: all but g.
  double own = sizeof(*a.master.own),
         bytes = 4 * sizeof(G) + 2 * own + 2 * sizeof(G) + sizeof(Real);
  if (Master<Real, G>::lean) bytes += sizeof(Real);
  report(name, s, bytes * double(n), 0);
}

// A whole training step: drawing, forward, backward, clipping, AdamW.
template <class G = Acc>
void step(Device& device, const Config& c, size_t accumulate = 1, int repeats = 9) {
  TrainOptions o;
  o.model = c, o.accumulate = accumulate, o.state = std::is_same_v<G, Real> ? "lean" : "fp32";
  Dataset data;
  data.channels = 1, data.height = data.width = 32, data.images = 512, data.captions = 10;
  data.text_tokens = 8, data.text_dim = 64;
  for (size_t i = 0; i < data.images * 1024; ++i) data.pixels.push_back(float(gaussian(3, 7, i)));
  for (size_t i = 0; i < 10 * 512; ++i) data.text.push_back(float(gaussian(4, 7, i)));
  data.empty_text.resize(512, 0.1f);
  for (size_t i = 0; i < data.images; ++i) data.caption.push_back(int32_t(i % 10));
  Table table = parameter_table(c);
  Job job{o, table, {data.images, o.val_images, data.captions}, true};
  Choice choice = choose<Real>(job, memory_limit(device), true);
  o.recompute = choice.recompute;
  Trainer<Real, G> trainer(device, o, data, data);
  trainer.train_step();
  trainer.train_step();
  device.synchronize();
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  double device_time = 0, host_time = 0;  // and what the host needs to enqueue it
  for (int i = 0; i < repeats; ++i) {
    auto start = std::chrono::steady_clock::now();
    CUDA_CHECK(cudaEventRecord(begin, device.stream));
    for (int k = 0; k < 3; ++k) trainer.train_step();
    CUDA_CHECK(cudaEventRecord(end, device.stream));
    host_time += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    device.synchronize();
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    device_time += 1e-3 * double(ms);
    times.push_back(1e-3 * double(ms) / 3);
  }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  double s = times[size_t(repeats / 2)];
  std::string name = "step " + std::to_string(c.depth) + " " + c.residual;
  if (c.width != 128) name += " D " + std::to_string(c.width) + " x " + std::to_string(accumulate);
  report(name, s, 0, step_flops(o));
  double forward = double(accumulate) * forward_flops(c, o.batch);
  utilisation(device, s, 3 * forward, step_flops(o));
  std::printf("%-30s %.3g tokens/s; the host takes %.1f%% of it; %s\n", "",
              double(o.batch * accumulate * c.tokens()) / s, 100 * host_time / device_time,
              choice.text().c_str());
}
Config narrow(size_t depth, const std::string& residual = "mvsplit") {
  return model(depth, 128, 2, 384, 8, residual);
}

void bench(const std::vector<std::string>& parts) {
  const std::vector<std::string> known = {"ceilings", "kernels",   "gemms",    "block",
                                          "step400",  "postnorm",  "step1000", "depth",
                                          "profile",  "optimizer", "paper400", "paper1000"};
  for (const std::string& part : parts)
    if (std::find(known.begin(), known.end(), part) == known.end())
      fail("bench has no part '%s'", part.c_str());
  auto wanted = [&](const char* name) {
    return parts.empty() || std::find(parts.begin(), parts.end(), name) != parts.end();
  };
  Device device(true);
  std::printf("%s\n", device.name.c_str());
  if (!parts.empty() && wanted("profile")) {  // for a profiler: one pass of three blocks, twice
    Subject thin(device, narrow(3), 32, 0);
    Subject wide(device, model(3, 1024, 8, 3072, 64), 32, 0);
    device.synchronize();
  }
  if (wanted("ceilings")) ceilings(device);
  // Steps first: they are slower after `kernels` (SPEED.md, "What falls short").
  if (wanted("step400")) step(device, narrow(400));
  if (wanted("postnorm")) step(device, narrow(400, "postnorm"));
  if (wanted("step1000")) step(device, narrow(1000));
  if (wanted("depth"))
    for (size_t depth : {100, 200, 700}) step(device, narrow(depth));
  if (wanted("kernels")) kernels(device);
  if (wanted("gemms")) gemms(device, 32 * 320, 1024, 3072), gemms(device, 32 * 264, 128, 384);
  for (size_t batch : {16, 32, 64})
    if (wanted("block")) block(device, batch);
  if (wanted("optimizer")) {
    optimizer<Acc>(device, "clip and AdamW, fp32 state");
    optimizer<Real>(device, "clip and AdamW, lean state");
  }
  // The paper's sizes take most of a 141 GB card and minutes: only when asked for.
  auto asked = [&](const char* name) { return !parts.empty() && wanted(name); };
  for (size_t accumulate : {1, 8}) {
    if (asked("paper400")) step(device, model(400, 1024, 8, 3072, 8), accumulate, 3);
    if (asked("paper1000")) step<Real>(device, model(1000, 1024, 8, 3072, 8), accumulate, 3);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    std::vector<std::string> parts;
    for (int i = 1; i < argc; ++i)
      if (std::string(argv[i]) != "--tsv")
        parts.push_back(argv[i]);
      else if (++i == argc || !(tsv = std::fopen(argv[i], "w")))
        fail("--tsv needs a file that can be written");
    if (Device::gpus() == 0) fail("it measures a GPU, and there is none");
    if (!Device::has_bf16())
      fail("it measures bf16 on tensor cores, for which this GPU or build is too old");
    bench(parts);
    if (tsv) std::fclose(tsv);
  } catch (const Error& error) {
    std::fprintf(stderr, "bench: %s\n", error.what());
    return 2;
  }
  return 0;
}

#else
int main() {
  std::fprintf(stderr, "bench: built without CUDA: it measures a GPU\n");
  return 2;
}
#endif
