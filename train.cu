// train.cu - the program: training by rectified flow, sampling, and the command line.
//
// What it is: everything around the network. Where batches come from, the loss, AdamW, the step,
// Euler sampling with guidance, and one function a subcommand. What it is not: a framework. There
// is one data set in memory, one device, one optimiser.
//
// How to read it: straight through to the appendix. The objective (1), the optimiser (2), a
// training step (3), sampling (4). The options, among them the optimiser's, are in data/options.h.

#include "dit.cu"

#include "data/log.h"
#include "data/options.h"
#include "data/ridge.h"
#include "data/state.h"

#include <chrono>
#include <csignal>
#include <numeric>

// ---------------------------------------------------------------------------------------------
// 1. Rectified flow
//
// Data x0 and noise x1 ~ N(0, I) are joined by a straight line, z_t = (1 - t) x0 + t x1, and the
// network learns the velocity along it from noise to data, v = x0 - x1  (2). t = 1 is noise. (Much
// other code has the opposite sign.) The loss is the mean square of the error, over all numbers of
// a batch. On Fashion-MNIST v = 0, where training starts (the final projection is 0), costs 1.76; a
// network that knows nothing but the average pixel gets 1.44, which is where a collapsed one stays.

// Sampling and training must agree on the spacing of t. A shift a > 1 spends more of it near noise.
HD inline double shift_time(double t, double a) { return a * t / (1 + (a - 1) * t); }

// The data set in device memory. Row `captions` of text is the empty caption.
struct DeviceData {
  const float *pixels, *text;  // (N, C, H, W), (M + 1, L, d_text)
  const int32_t* caption;      // (N)
  size_t images, captions, pixels_per_image, text_per_caption;
};

// What one place of a batch holds: an image, a caption, the time, and which numbers are its noise.
struct Draw {
  size_t image, caption;
  double t;
  uint64_t noise;
};

// Fill arrays.z, `target` (b, C, H, W) and arrays.text (b, L, d_text) from draw(i), i < b.
template <class Net, class Acc, class Pick>
void noisy_batch(const Net& net, Acc* target, DeviceData data, size_t b, uint64_t seed,
                 uint64_t noise_stream, const Pick& draw) {
  size_t n = data.pixels_per_image, l = data.text_per_caption;
  Acc* z = net.arrays.z;
  auto* text = net.arrays.text;
  using Real = std::remove_pointer_t<decltype(text)>;
  for_each(net.device, b * n, [=] HD(size_t i) {
    Draw d = draw(i / n);
    double x0 = data.pixels[d.image * n + i % n];
    double x1 = gaussian(seed, noise_stream, d.noise * n + i % n);
    z[i] = Acc((1 - d.t) * x0 + d.t * x1);
    target[i] = Acc(x0 - x1);
  });
  for_each(net.device, b * l,
           [=] HD(size_t i) { text[i] = Real(data.text[draw(i / l).caption * l + i % l]); });
}

// Each sample's mean squared error, losses (b), and dvelocity (b, C, H, W) = 2 scale (v - target),
// where scale is what one number weighs in the total: 1 / (all numbers of the step).
template <class Acc>
void flow_loss(const Device& device, Acc* losses, Acc* dvelocity, const Acc* velocity,
               const Acc* target, size_t b, size_t n, double scale) {
  for_each_team(device, b, Team::max_size, [=] HD(Team team) {
    Acc sum = 0;
    for (size_t i = team.index * n + team.rank; i < (team.index + 1) * n; i += team.size) {
      Acc error = velocity[i] - target[i];
      sum += error * error;
      if (dvelocity) dvelocity[i] = Acc(2 * scale) * error;
    }
    sum = team.sum(sum);
    if (team.rank == 0) losses[team.index] = sum / Acc(n);
  });
}

// A pass's batch: net.arrays.z and text, and a.target, from images and captions drawn at random,
// with replacement; a share `dropout` of the captions is left out, so that guidance has something
// to hold against. `a` are the arrays of a run (appendix C).
template <class Network, class TrainArrays>
void draw_training_batch(Network& net, TrainArrays a, DeviceData data, const TrainOptions& o) {
  uint64_t seed = o.seed, batch = o.batch;
  double dropout = o.dropout, shift = o.time_shift;
  auto draw = [=] HD(size_t i) {
    uint64_t n = a.clock->pass * batch + i;  // this sample's number in the whole run
    size_t image = size_t(uniform(seed, streams::batch_index, n) * double(data.images));
    bool drop = uniform(seed, streams::dropout, n) < dropout;
    return Draw{image, drop ? data.captions : size_t(data.caption[image]),
                shift_time(uniform(seed, streams::time, n), shift), n};
  };
  noisy_batch(net, a.target, data, o.batch, seed, streams::noise, draw);
}

// ---------------------------------------------------------------------------------------------
// 2. AdamW
//
//     m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
//     w = w - lr ( (m / (1 - b1^s)) / (sqrt(v / (1 - b2^s)) + eps) + decay w ),   s = 1, 2, ...
//
// with g = g0 min(1, clip / (|g0| + 1e-6)), g0 the gradient, |g0| over all parameters (clip = 0: g
// = g0), and decay on matrices only. A weight is kept in Acc ("master") and rounded to Real for the
// network. The moments are in Acc too, or all this is lean, 10 bytes a parameter for 18 (appendix
// A): then they are bf16, where v's largest fall in a step, 1 - b2 = 0.1%, is under half a last
// place and would be lost. So there they are rounded at random (`dither`; math.h, appendix E).

// All that changes from step to step, in device memory, so that a captured step can be replayed. A
// step is `accumulate` passes; both count from the start of the run.
struct Clock {
  uint64_t step, pass;
  double lr, correction1, correction2, follow, norm, clip_scale;
};
struct Record {
  double loss, norm, lr;
};
constexpr size_t records = 1024;  // how many steps' records are kept on the device

// The slab is walked in chunks, none of which spans two tensors: a team's piece of work, in which
// every parameter is treated alike. (A team reads whole quads: what follows a tensor in the slab,
// up to the next quad, is zero everywhere and stays so.)
//
// Parameters that are fixed are in no chunk: AdamW leaves them, their moments and their average as
// they began, and their gradients do not enter the norm, which scales the steps of the others.
//
// A chunk knows its parameter's place in the table (dit.cu, appendix A), which has its shape. An
// optimiser of whole matrices goes through the table itself, on the host.
struct Chunk {
  size_t begin;
  uint32_t parameter;
  uint16_t count;
  bool decays;
};
constexpr size_t largest_chunk = 16384;
inline std::vector<Chunk> chunks_of(const Table& table) {
  std::vector<Chunk> chunks;
  for (size_t number = 0; number < table.parameters.size(); ++number) {
    const Parameter& p = table.parameters[number];
    for (size_t i = 0; i < p.count() && !p.fixed; i += largest_chunk)
      chunks.push_back({p.offset + i, uint32_t(number),
                        uint16_t(std::min(largest_chunk, p.count() - i)), p.decays()});
  }
  return chunks;
}

// Start of a step: the learning rate, which rises over the first `warmup` steps and falls over the
// last `decay_steps` of all, both in equal parts; Adam's bias corrections; and `follow`, how far
// the average of the weights goes towards them. With a decay e it looks back over the last 1 / (1 -
// e) steps or so; where a run is young, over the last tenth of it:
//
//     avg_s = avg_(s-1) + follow (w_s - avg_(s-1)),   follow = max(1 - e, 10 / (s + 9)).
//
// So avg_1 = w_1, and while 10 / (s + 9) is the larger, w_k has a weight of about 10 k^9 / s^10.
inline void begin_step(const Device& device, Clock* clock, Optimizer o, size_t steps, double ema) {
  for_each(device, 1, [=] HD(size_t) {
    double s = double(clock->step + 1), left = double(steps) + 1 - s;
    clock->lr = o.lr * min_(1.0, s / double(max_<size_t>(o.warmup, 1)));
    if (o.decay_steps) clock->lr *= min_(1.0, left / double(o.decay_steps));
    clock->correction1 = 1 - pow(o.beta1, s);
    clock->correction2 = 1 - pow(o.beta2, s);
    clock->follow = max_(1 - ema, 10 / (s + 9));
  });
}

// The gradient's norm and the clipping factor, from chunk sums of squares (partial: one a chunk).
template <class Kept>
void gradient_norm(const Device& device, Clock* clock, double* partial, const Kept* gradients,
                   const Chunk* chunks, size_t count, double clip) {
  for_each_team(device, count, Team::max_size, [=] HD(Team team) {
    Chunk c = chunks[team.index];
    AccOf<Kept> sum = 0;
    for (size_t i = c.begin + 4 * team.rank; i < c.begin + c.count; i += 4 * team.size) {
      Quad<AccOf<Kept>> g = load<AccOf<Kept>>(gradients + i);
      sum += dot(g, g);
    }
    sum = team.sum(sum);
    if (team.rank == 0) partial[team.index] = double(sum);
  });
  for_each_team(device, 1, Team::max_size, [=] HD(Team team) {
    double sum = 0;
    for (size_t i = team.rank; i < count; i += team.size) sum += partial[i];
    sum = team.sum(sum);
    if (team.rank != 0) return;
    clock->norm = sqrt(sum);
    clock->clip_scale = clip > 0 ? min_(1.0, clip / (clock->norm + 1e-6)) : 1;
  });
}

// What a step works on: arrays as the weights lie, in chunks. `dither` is for slots that are
// rounded, `average_dither` for the weights' average, which may be null.
template <class Method, class Master, class Kept>
struct Moved {
  Master master;
  Kept* slots[Method::slots.size()];
  typename Master::Acc* average;
  const Kept* gradients;
  Clock* clock;
  Chunk* chunks;
  size_t chunk_count;
  Dither dither, average_dither;
  const Table* table = nullptr;  // on the host
};

// An optimiser is a struct as this: the arrays that it keeps beside the weights (`slots`), by what
// goes before their tensors' names in a file, and a step of it. Plan and state follow. Its settings
// are listed in data/options.h.
struct AdamW {
  static constexpr std::array slots = {"m.", "v."};

  template <class Master, class Kept>
  static void update(const Device& device, Moved<AdamW, Master, Kept> a, Optimizer o) {
    using Acc = typename Master::Acc;
    for_each_team(device, a.chunk_count, Team::max_size, [=] HD(Team team) {
      Chunk c = a.chunks[team.index];
      const Clock& now = *a.clock;
      Kept *m = a.slots[0], *v = a.slots[1];
      Acc clip = Acc(now.clip_scale), lr = Acc(now.lr), b1 = Acc(o.beta1), b2 = Acc(o.beta2);
      // 1 - 0.999 in float is off by 1.3e-5 of itself: take the difference in double.
      Acc one_minus_b1 = Acc(1 - o.beta1), one_minus_b2 = Acc(1 - o.beta2);
      Acc c1 = Acc(1 / now.correction1), c2 = Acc(1 / now.correction2);
      Acc decay = c.decays ? Acc(o.decay) : Acc(0), eps = Acc(o.eps);
      for (size_t i = c.begin + 4 * team.rank; i < c.begin + c.count; i += 4 * team.size) {
        Quad<Acc> w = a.master.get(i), g = clip * load<Acc>(a.gradients + i);
        Quad<Acc> m_next = b1 * load<Acc>(m + i) + one_minus_b1 * g;
        Quad<Acc> v_next = b2 * load<Acc>(v + i) + one_minus_b2 * g * g, change;
        for (int k = 0; k < 4; ++k)
          change[k] = m_next[k] * c1 / (std::sqrt(v_next[k] * c2) + eps) + decay * w[k];
        w = w - lr * change;
        a.master.set(i, w);
        if (a.average) {  // in float most of these small steps would round to nothing
          Quad<double> avg = load<double>(a.average + i);
          avg = avg + now.follow * (widen<double>(w) - avg);
          store_stochastically(a.average + i, avg, a.average_dither(i / 4), 0);
        }
        Random4 bits = Master::lean ? a.dither(i / 4) : Random4{};
        store_stochastically(m + i, m_next, bits, 0);
        store_stochastically(v + i, v_next, bits, 1);
      }
    });
  }
};

// End of a pass: put its samples' losses (b) into the step's (accumulate * b), and move on.
template <class Acc>
void end_pass(const Device& device, Clock* clock, Acc* step_losses, const Acc* losses, size_t b,
              size_t accumulate) {
  for_each_team(device, 1, Team::max_size, [=] HD(Team team) {
    Acc* out = step_losses + clock->pass % accumulate * b;
    for (size_t i = team.rank; i < b; i += team.size) out[i] = losses[i];
    team.sync();  // all have read the clock
    if (team.rank == 0) ++clock->pass;
  });
}

// End of a step: record it and move on.
template <class Acc>
void end_step(const Device& device, Clock* clock, Record* history, const Acc* losses,
              size_t count) {
  for_each_team(device, 1, Team::max_size, [=] HD(Team team) {
    double sum = 0;
    for (size_t i = team.rank; i < count; i += team.size) sum += double(losses[i]);
    sum = team.sum(sum);
    if (team.rank != 0) return;
    history[clock->step % records] = {sum / double(count), clock->norm, clock->lr};
    ++clock->step;
  });
}

// ---------------------------------------------------------------------------------------------
// 3. A step
//
// `accumulate` passes, each the gradients of a batch, then one update. `t` is the Trainer of
// appendix D: the network, the arrays of the run and its options. The host only enqueues all this:
// on a GPU it is captured once and replayed, so what changes from step to step is in t.a.clock. It
// draws batches (section 1) and the bits by which gradients are rounded; a forward draws nothing.
//
//     begin_step                              learning rate, bias corrections
//     training_pass, `accumulate` times       gradients
//     update_weights                          norm, AdamW, the average, the record

// Gradients of a batch: = for the step's first, += for the others.
template <class Trainer, class Observer>
void training_pass(Trainer& t, bool first, const Observer& observe) {
  const Config& m = t.o.model;
  draw_training_batch(t.net, t.a, t.train, t.o);  // -> arrays.z, arrays.text, a.target
  t.net.forward(t.o.batch);                       // -> arrays.velocity
  flow_loss(t.device, t.a.losses, t.net.arrays.dvelocity, t.net.arrays.velocity, t.a.target,
            t.o.batch, m.pixels(), 1 / double(m.pixels() * t.o.batch * t.o.accumulate));
  t.net.backward(t.o.batch, !first, /*inputs=*/false, observe,
                 t.dither(streams::gradient_rounding));
  end_pass(t.device, t.a.clock, t.a.step_losses, t.a.losses, t.o.batch, t.o.accumulate);
}

// What a step does with its gradients: clip them, look for a spike (appendix B), move the weights.
template <class Trainer>
void update_weights(Trainer& t, bool diagnose) {
  auto& a = t.a;
  size_t samples = t.o.batch * t.o.accumulate;
  gradient_norm(t.device, a.clock, a.partial, a.gradients, a.chunks, a.chunk_count,
                t.o.optimizer.clip);
  if (diagnose) t.diagnose_gradients();
  t.look_for_spike();
  AdamW::update<decltype(a.master)>(t.device, a, t.o.optimizer);
  t.copy_spike();
  end_step(t.device, a.clock, a.history, a.step_losses, samples);
}

// ---------------------------------------------------------------------------------------------
// 4. Sampling
//
// Euler steps from noise at t = 1 to data at t = 0, with classifier-free guidance. On the line of
// section 1, dz/dt = x1 - x0 = -v, so a step from t to t_next < t adds (t_next - t) (-v):
//     z <- z + (t - t_next) v,     v = v_u + w (v_c - v_u),
// v_c with the caption, v_u with the empty one.

template <class Real>
struct Sampler {
  using Acc = AccOf<Real>;
  Acc* conditional;    // (B, C, H, W)
  Real *text, *empty;  // (B, L, d_text)

  void lay(Carver& c, const Config& m, size_t batch) {
    conditional = c.take<Acc>(batch * m.pixels());
    text = c.take<Real>(batch * m.text_size()), empty = c.take<Real>(batch * m.text_size());
  }
};

template <class Real>
void start_from_noise(const Device& device, AccOf<Real>* z, size_t n, uint64_t seed,
                      uint64_t first) {
  for_each(device, n, [=] HD(size_t i) {
    z[i] = AccOf<Real>(gaussian(seed, streams::sampling_noise, first + i));
  });
}
template <class Real>
void euler_step(const Device& device, AccOf<Real>* z, const AccOf<Real>* conditional,
                const AccOf<Real>* unconditional, size_t n, double dt, double guidance) {
  using Acc = AccOf<Real>;
  for_each(device, n, [=] HD(size_t i) {
    Acc v = unconditional[i] + Acc(guidance) * (conditional[i] - unconditional[i]);
    z[i] += Acc(dt) * v;
  });
}

// How many images are drawn, and how.
struct Drawing {
  size_t images, steps;
  double guidance, shift;
  uint64_t seed;
};

// Images (n, C, H, W) for captions (n, L, d_text), all on the host. Image i depends on seed and i
// only.
template <class Real, class Kept>
std::vector<float> sample_images(Network<Real, Kept>& net, Sampler<Real> sampler,
                                 const std::vector<float>& text,
                                 const std::vector<float>& empty_text, Drawing o) {
  using Acc = AccOf<Real>;
  Device& device = net.device;
  Arrays<Real>& a = net.arrays;
  size_t pixels = net.config.pixels(), words = net.config.text_size();
  std::vector<float> images;
  Progress progress("drawing " + std::to_string(o.images) + " samples",
                    ceil_div(o.images, net.batch) * o.steps);
  for (size_t first = 0; first < o.images; first += net.batch) {
    size_t b = std::min(net.batch, o.images - first);
    std::vector<Real> conditional, empty;
    for (size_t i = 0; i < b * words; ++i) {
      conditional.push_back(Real(text[first * words + i]));
      empty.push_back(Real(empty_text[i % words]));
    }
    device.upload(sampler.text, conditional.data(), b * words * sizeof(Real));
    device.upload(sampler.empty, empty.data(), b * words * sizeof(Real));
    start_from_noise<Real>(device, a.z, b * pixels, o.seed, first * pixels);
    auto time = [&](size_t k) { return shift_time(1 - double(k) / double(o.steps), o.shift); };
    for (size_t k = 0; k < o.steps; ++k) {
      device.copy(a.text, sampler.text, b * words * sizeof(Real));
      net.forward(b);
      const Acc* with_caption = a.velocity;
      if (o.guidance != 1) {
        device.copy(sampler.conditional, a.velocity, b * pixels * sizeof(Acc));
        with_caption = sampler.conditional;
        device.copy(a.text, sampler.empty, b * words * sizeof(Real));
        net.forward(b);
      }
      euler_step<Real>(device, a.z, with_caption, a.velocity, b * pixels, time(k) - time(k + 1),
                       o.guidance);
      progress.advance(1);
    }
    std::vector<Acc> z = downloaded(device, a.z, b * pixels);
    images.insert(images.end(), z.begin(), z.end());
  }
  return images;
}

// Appendix. The straight way ends here. Below: how weights and moments are kept (A), the watch for
// spikes (B), arrays and what fits (C), the trainer (D), a run and its command (E, F), the other
// subcommands (G), gradcheck (H), the probe (I), the command line (J). Saving and resuming are in
// data/state.h.

// ---------------------------------------------------------------------------------------------
// A. How weights and moments are kept
//
// Bytes a parameter, with bf16 weights:
//
//                  weights   master   gradient   m   v
//     fp32 state      2        4         4       4   4    18
//     lean state      2       +2         2       2   2    10     Kept = Real in the code
//
// In the lean state the gradient and the moments are bf16, rounded stochastically (math.h, appendix
// E), and the master is the bf16 weight and the 16 bits of the float that it lacks.

// A float in two halves: the nearest bf16, and the rest. Of the float's bits the rest is the lower
// 16, read as a signed number: from half a gap on it is negative, and the upper half one more
// (which may carry into the exponent, as it should). So joining the halves is one addition on the
// bits, exact for every float. A tie becomes the larger magnitude; a NaN stays a NaN, though not
// with the same bits.
struct Halves {
  bf16 nearest;
  int16_t rest;
};
HD inline Halves split(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  Halves h;
  bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  h.nearest.bits = nan ? uint16_t(0x7fff) : uint16_t((u + 0x8000u) >> 16);
  h.rest = nan ? int16_t(0) : int16_t(uint16_t(u));
  return h;
}
HD inline float join(Halves h) {
  uint32_t u = (uint32_t(h.nearest.bits) << 16) + uint32_t(int32_t(h.rest));
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// The weights that AdamW moves, in Acc, beside the network's copy of them in Real.
template <class Real, class Kept>
struct Master {
  using Acc = AccOf<Real>;
  static constexpr bool lean = !std::is_same_v<Kept, Acc>;
  Real* weights;  // the network's
  // What AdamW moves; lean: only what `weights` lack of it; where Real is Acc: `weights` again.
  std::conditional_t<lean, int16_t, Acc>* own;

  HD Quad<Acc> get(size_t i) const {
    if constexpr (!lean) {
      return load<Acc>(own + i);
    } else {
      Quad<Real> nearest = *reinterpret_cast<const Quad<Real>*>(weights + i);
      Quad<int16_t> rest = *reinterpret_cast<const Quad<int16_t>*>(own + i);
      Quad<Acc> w;
      for (int k = 0; k < 4; ++k) w[k] = join({nearest[k], rest[k]});
      return w;
    }
  }
  HD void set(size_t i, Quad<Acc> w) const {
    if constexpr (!lean) {
      store(own + i, w);
      store(weights + i, w);
    } else {
      Quad<Real> nearest;
      Quad<int16_t> rest;
      for (int k = 0; k < 4; ++k) {
        Halves h = split(w[k]);
        nearest[k] = h.nearest, rest[k] = h.rest;
      }
      *reinterpret_cast<Quad<Real>*>(weights + i) = nearest;
      *reinterpret_cast<Quad<int16_t>*>(own + i) = rest;
    }
  }
};

// Draw all parameters as the table says into the master, and into `average` if it is not null. What
// is behind a tensor's last number, up to the next quad, is zero, and between tensors' weights all.
template <class Real, class Kept>
void initialise(const Device& device, const Table& table, Master<Real, Kept> master,
                AccOf<Real>* average, uint64_t seed) {
  device.fill(master.weights, 0, table.size * sizeof(Real));
  for (size_t number = 0; number < table.parameters.size(); ++number) {
    const Parameter& p = table.parameters[number];
    size_t offset = p.offset, count = p.count();
    Init init = p.init;
    double scale = p.scale;
    uint64_t stream = streams::parameters + number;
    for_each(device, ceil_div(count, 4), [=] HD(size_t quad_index) {
      Quad<double> q{};
      for (size_t i = 4 * quad_index; i < min_<size_t>(4 * quad_index + 4, count); ++i)
        q[int(i % 4)] = init == Init::constant  ? scale
                        : init == Init::uniform ? scale * (2 * uniform(seed, stream, i) - 1)
                                                : scale * gaussian(seed, stream, i);
      Quad<AccOf<Real>> w = widen<AccOf<Real>>(q);
      master.set(offset + 4 * quad_index, w);
      if (average) store(average + offset + 4 * quad_index, w);
    });
  }
}

// ---------------------------------------------------------------------------------------------
// B. The watch for spikes
//
// A step stands out if its gradient's norm is above `factor` times the median over the 100 steps
// before it, or as many as there are from 50 on. By the time the host reads the norms that step's
// gradients are gone; so the device decides within the step, and copies what a report needs. No
// step waits for the host, and none is changed.

constexpr size_t spike_window = 100, spike_least = 50;
static_assert(longest_log_every + spike_window <= records, "all of them are read");

// A step that stood out: its number, its norm, and the median over the `window` steps before it.
struct Event {
  uint64_t step, window;
  double norm, median;
};

// Until the host has read an event, only what exceeds it by `factor` is another one. `kept` events
// have room; the last place is taken over by what exceeds even that.
constexpr uint32_t kept_events = 3;

struct SpikeWatch {
  uint64_t first;        // steps before this one are not in `history`
  uint64_t quiet_until;  // before this step only what exceeds the last event by `factor` is one
  double last;           // the last event's norm
  uint32_t fired;        // at the step under way
  uint32_t pending;      // events that the host has not read yet
  Event events[kept_events];

  // Where the event of the step under way is kept.
  HD uint32_t place() const { return pending - 1; }
};

// Is a norm beyond `factor` times what is usual? NaN is, but not beside NaN.
HD inline bool stands_out(double norm, double factor, double usual) {
  return !(norm <= factor * usual) && usual == usual;
}

// What is copied at an event, of each chunk: its gradients' squares, and how many are not finite;
// and of each sample: its loss and, in the last pass, dL/dvelocity's sum, squares and largest.
struct ChunkSeen {
  double squares;
  uint32_t bad_gradients, bad_weights;
};
struct SampleSeen {
  double loss, sum, squares, largest;
};

// The events, and the writers' modes of every step.
struct SpikeArrays {
  SpikeWatch* watch;
  double* modes;        // (records, layers, 2, 2): G_mean and G_ctr of W_O and W2
  ChunkSeen* chunks;    // (kept_events, chunks)
  SampleSeen* samples;  // (kept_events, accumulate * B)

  void lay(Carver& c, size_t layers, size_t chunk_count, size_t sample_count) {
    watch = c.take<SpikeWatch>(1), modes = c.take<double>(records * layers * 4);
    chunks = c.take<ChunkSeen>(kept_events * chunk_count);
    samples = c.take<SampleSeen>(kept_events * sample_count);
  }
};

// Keep this step's writer modes, means over the samples, and decide whether its norm stands out.
inline void watch_step(const Device& device, SpikeArrays a, const Clock* clock,
                       const Record* history, const WriterModes* modes, size_t layers,
                       size_t samples, double factor) {
  for_each(device, layers * 2, [=] HD(size_t i) {
    double* out = a.modes + (clock->step % records * layers * 2 + i) * 2;
    out[0] = out[1] = 0;
    for (size_t s = 0; s < samples; ++s) {
      out[0] += modes[i * samples + s].g_mean / double(samples);
      out[1] += modes[i * samples + s].g_ctr / double(samples);
    }
  });
  for_each_team(device, 1, Team::max_size, [=] HD(Team team) {
    uint64_t now = clock->step;
    size_t n = min_<size_t>(size_t(now - a.watch->first), spike_window);
    auto norm = [&](size_t i) { return history[(now - 1 - i) % records].norm; };
    double median = 0;  // the one that n / 2 others are below; equal ones count by age
    for (size_t i = team.rank; i < n; i += team.size) {
      size_t below = 0;
      for (size_t j = 0; j < n; ++j) below += norm(j) < norm(i) || (norm(j) == norm(i) && j < i);
      if (below == n / 2) median = norm(i);
    }
    median = team.sum(median);
    if (team.rank != 0) return;
    SpikeWatch& w = *a.watch;
    bool rests = now < w.quiet_until || w.pending;
    bool armed = !rests || stands_out(clock->norm, factor, w.last);
    w.fired = n >= spike_least && armed && stands_out(clock->norm, factor, median);
    if (!w.fired) return;
    w.last = clock->norm, w.pending = min_(w.pending + 1, kept_events);
    w.events[w.place()] = {now + 1, n, clock->norm, median};
  });
}

// At a spike, copy what the report needs. After the step, so that its weights are those looked at.
// dvelocity (b, n) is the last pass's; `run` are the arrays of a run (C).
template <class Acc, class RunArrays>
void copy_spike(const Device& device, SpikeArrays a, RunArrays run, size_t samples,
                const Acc* dvelocity, size_t b, size_t n) {
  size_t count = run.chunk_count, teams = std::min<size_t>(count, 1024);
  for_each_team(device, teams, Team::max_size, [=] HD(Team team) {
    if (!a.watch->fired) return;
    for (size_t k = team.index; k < count; k += teams) {
      Chunk c = run.chunks[k];
      double bad_gradients = 0, bad_weights = 0;
      for (size_t i = c.begin + team.rank; i < c.begin + c.count; i += team.size) {
        bad_gradients += !(fabs(double(run.gradients[i])) <= 1.7e308);
        bad_weights += !(fabs(double(run.master.weights[i])) <= 1.7e308);
      }
      bad_gradients = team.sum(bad_gradients), bad_weights = team.sum(bad_weights);
      if (team.rank == 0)
        a.chunks[a.watch->place() * count + k] = {run.partial[k], uint32_t(bad_gradients),
                                                  uint32_t(bad_weights)};
    }
  });
  for_each_team(device, samples, Team::max_size, [=] HD(Team team) {
    if (!a.watch->fired) return;
    size_t numbers = team.index < b ? n : 0;
    double sum = 0, squares = 0, largest = 0;
    for (size_t i = team.rank; i < numbers; i += team.size) {
      double g = double(dvelocity[team.index * n + i]);
      sum += g, squares += g * g, largest = max_(largest, fabs(g));
    }
    sum = team.sum(sum), squares = team.sum(squares), largest = team.max(largest);
    if (team.rank == 0)
      a.samples[a.watch->place() * samples + team.index] = {double(run.step_losses[team.index]),
                                                            sum, squares, largest};
  });
}

// ---------------------------------------------------------------------------------------------
// C. The arrays of a run, and what fits

inline size_t count_chunks(const Table& table) {
  size_t count = 0;
  for (const Parameter& p : table.parameters)
    if (!p.fixed) count += ceil_div(p.count(), largest_chunk);
  return count;
}

// The arrays of a run besides the network's.
template <class Real, class Kept>
struct TrainArrays : Moved<AdamW, Master<Real, Kept>, Kept> {
  using Base = Moved<AdamW, Master<Real, Kept>, Kept>;
  using Base::master, Base::slots, Base::average, Base::clock, Base::chunks, Base::chunk_count;
  using Acc = AccOf<Real>;
  Real* average_rounded;  // what the network evaluates with; the average where Real is Acc
  double* partial;
  Acc *target, *losses, *step_losses;  // (B, C, H, W), (B), (accumulate * B)
  Record* history;

  void lay_optimizer(Carver& c, const Table& table, bool averages) {
    auto take = [&](auto*& array) {
      array = c.take<std::remove_pointer_t<std::remove_reference_t<decltype(array)>>>(table.size);
    };
    if (!std::is_same_v<Real, Acc>) take(master.own);
    for (Kept*& slot : slots) take(slot);
    if (averages) take(average);
    if (averages && !std::is_same_v<Real, Acc>) take(average_rounded);
    chunk_count = count_chunks(table);
    chunks = c.take<Chunk>(chunk_count), partial = c.take<double>(chunk_count);
    clock = c.take<Clock>(1), history = c.take<Record>(records);
  }
  void lay_batch(Carver& c, const TrainOptions& o, size_t held_out) {
    target = c.take<Acc>(o.batch * o.model.pixels());
    losses = c.take<Acc>(std::max(o.batch, held_out));
    step_losses = c.take<Acc>(o.batch * o.accumulate);
  }
};

// A data set's arrays, laid out like everything else.
inline DeviceData lay_data(Carver& c, const Config& m, size_t images, size_t captions) {
  float* pixels = c.take<float>(images * m.pixels());
  float* text = c.take<float>((captions + 1) * m.text_size());
  int32_t* caption = c.take<int32_t>(images);
  return {pixels, text, caption, images, captions, m.pixels(), m.text_size()};
}

inline void upload_data(const Device& device, const DeviceData& to, const Dataset& from) {
  auto put = [&](const auto* data, const auto& values, size_t count) {
    device.upload(const_cast<void*>(static_cast<const void*>(data)), values.data(),
                  count * sizeof(values[0]));
  };
  put(to.pixels, from.pixels, to.images * to.pixels_per_image);
  put(to.text, from.text, from.text.size());
  put(to.text + to.captions * to.text_per_caption, from.empty_text, from.empty_text.size());
  put(to.caption, from.caption, to.images);
}

// All that a run takes besides the network.
template <class Real, class Kept>
struct RunArrays {
  TrainArrays<Real, Kept> a = {};
  DeviceData train, held_out;
  Sampler<Real> sampler;
  Diagnostics<Real> diagnostics;
  SpikeArrays spikes;

  explicit RunArrays(const TrainOptions& o)
      : diagnostics(o.model, chosen_layers(o), std::min(o.diagnose_samples, o.batch), o.batch) {}

  void add_to(Plan& plan, const TrainOptions& o, const Table& table, DataSizes data) {
    const Config& m = o.model;
    plan.add("optimizer", [&](Carver& c) { a.lay_optimizer(c, table, o.ema > 0); });
    plan.add("batch", [&](Carver& c) { a.lay_batch(c, o, data.held_out); });
    if (o.observes())
      plan.add("diagnostics", [&](Carver& c) {
        diagnostics.lay(c);
        spikes.lay(c, diagnostics.layers.size(), a.chunk_count, o.batch * o.accumulate);
      });
    plan.add("data", [&](Carver& c) { train = lay_data(c, m, data.images, data.captions); });
    plan.add("held-out data",
             [&](Carver& c) { held_out = lay_data(c, m, data.held_out, data.captions); });
    plan.add("sampling", [&](Carver& c) { sampler.lay(c, m, o.batch); });
  }
};

// What the driver takes for captured steps, which no carver sees: an estimate. With CUDA 13.0 on an
// H100 a graph takes 0.19 MB a block, and 0.12 MB more for each merge with gates, at bf16 and fp32
// alike.
inline size_t graph_bytes(const TrainOptions& o) {
  Residual mode = o.model.mode();
  size_t graphs = std::min<size_t>(o.accumulate, 3) + (o.diagnose_every > 0);
  size_t gated = size_t(!about(mode.attention).gates.empty()) + !about(mode.ffn).gates.empty();
  return graphs * o.model.depth * (200'000 + 115'000 * gated);
}

// Everything a run will take, by slab, before it is taken.
template <class Real, class Kept = AccOf<Real>>
Plan training_plan(const TrainOptions& o, const Table& table, DataSizes data, bool on_gpu) {
  double numbers = (double(data.images) + double(data.held_out)) * double(o.model.pixels()) +
                   double(data.captions) * double(o.model.text_size());
  if (numbers > 1e15)
    fail("%zu images and %zu captions are larger than any machine", data.images, data.captions);
  Plan plan = network_plan<Real, Kept>(o.model, table, o.batch, o.recompute, true, on_gpu);
  RunArrays<Real, Kept>(o).add_to(plan, o, table, data);
  plan.slabs.emplace_back(
      on_gpu ? "cuBLAS workspace" : "products' workspace",
      on_gpu ? Device::workspace_bytes(true) : HostGemm<AccOf<Real>>::workspace_bytes());
  if (on_gpu) plan.slabs.emplace_back("captured steps", graph_bytes(o));
  return plan;
}

// C.1 What fits
//
// Memory decides between the optimiser's states and between lengths of spans. Replaying costs up to
// a third more work and no accuracy, a lean state costs accuracy and hardly any time: so fp32
// first, with as few blocks replayed as it takes.

struct Choice {
  bool lean;
  size_t recompute, bytes;
  double flops;
  std::vector<std::pair<std::string, size_t>> slabs;

  const char* state() const { return lean ? "lean" : "fp32"; }
  std::string text() const {
    return text_of("%s state, recompute %zu: %.2f GB, %.4g TFLOP a step", state(), recompute,
                   1e-9 * double(bytes), 1e-12 * flops);
  }
};

// A replay runs each span but the last again.
inline double step_flops(const TrainOptions& o) {
  size_t span = span_length(o.model, o.recompute);
  size_t replayed = (ceil_div(o.model.depth, span) - 1) * span;
  return double(o.accumulate) * forward_flops(o.model, o.batch) *
         (3 + double(replayed) / double(o.model.depth));
}

// What is to be run, and where.
struct Job {
  TrainOptions o;
  const Table& table;
  DataSizes data;
  bool gpu;
};

template <class Real>
Choice way_to_run(Job job, bool lean, size_t recompute) {
  job.o.recompute = recompute;
  Plan plan = lean ? training_plan<Real, Real>(job.o, job.table, job.data, job.gpu)
                   : training_plan<Real>(job.o, job.table, job.data, job.gpu);
  return {lean, recompute, plan.total(), step_flops(job.o), plan.slabs};
}

// The ways to run that the options leave open, best first. Of those with one state each takes less
// memory than the one before it, and more work. So the last takes least of all.
template <class Real>
std::vector<Choice> choices(const Job& job) {
  constexpr bool can_be_lean = std::is_same_v<Real, bf16>;
  const TrainOptions& o = job.o;
  if (o.state == "lean" && !can_be_lean) fail("--state lean is for --precision bf16 alone");
  std::set<size_t> lengths = {o.recompute};
  if (o.recompute == automatic) {
    lengths = {0};
    for (size_t spans = 2; spans <= o.model.depth; ++spans)
      lengths.insert(ceil_div(o.model.depth, spans));
  }
  std::vector<Choice> all, best;
  for (bool lean : {false, true})
    if (lean ? can_be_lean && o.state != "fp32" : o.state != "lean")
      for (size_t length : lengths) all.push_back(way_to_run<Real>(job, lean, length));
  std::sort(all.begin(), all.end(), [](const Choice& a, const Choice& b) {
    return std::tuple(a.lean, a.flops, a.bytes) < std::tuple(b.lean, b.flops, b.bytes);
  });
  for (const Choice& way : all)
    if (best.empty() || way.lean != best.back().lean || way.bytes < best.back().bytes)
      best.push_back(way);
  return best;
}

// What to say where not even `least`, the way that takes the least memory, fits.
template <class Real>
std::string does_not_fit(Job job, const Choice& least, double limit) {
  size_t fitting = 0, too_large = job.o.batch;  // all that grows with the batch grows alike
  while (too_large - fitting > 1) {
    job.o.batch = (fitting + too_large) / 2;
    Choice way = way_to_run<Real>(job, least.lean, least.recompute);
    (double(way.bytes) <= limit ? fitting : too_large) = job.o.batch;
  }
  std::string text =
      text_of("this run needs at least %.2f GB (%s state, recompute %zu) and may take %.2f GB: ",
              1e-9 * double(least.bytes), least.state(), least.recompute, 1e-9 * limit);
  return text + (fitting ? "the largest --batch that fits is " + std::to_string(fitting)
                         : std::string("not even a batch of one fits"));
}

// The best way that fits into `limit` bytes, and on the console the next best. If none does: fails,
// or says so and returns the one that takes least.
template <class Real>
Choice choose(const Job& job, double limit, bool must_fit) {
  std::vector<Choice> all = choices<Real>(job);
  auto fits = [&](const Choice& c) { return double(c.bytes) <= limit; };
  auto best = std::find_if(all.begin(), all.end(), fits);
  if (best == all.end()) {
    std::string text = does_not_fit<Real>(job, all.back(), limit);
    if (must_fit) fail("%s", text.c_str());
    std::printf("%s\n", text.c_str());
    return all.back();
  }
  if (all.size() == 1 || !std::isfinite(limit)) return *best;
  auto next = std::find_if(best + 1, all.end(), fits);
  std::string other = next == all.end() ? "nothing else fits" : "next best: " + next->text();
  std::printf("chosen for %.2f GB: %s; %s\n", 1e-9 * limit, best->text().c_str(), other.c_str());
  return *best;
}

// ---------------------------------------------------------------------------------------------
// D. The trainer: a run's network and arrays, and the step as captured graphs

// The time of the n-th held-out image. Steps of the golden ratio spread evenly, in an order that
// has nothing to do with the images'.
HD inline double validation_time(size_t n, double shift) {
  return shift_time(fmod((double(n) + 0.5) * 0.6180339887498949, 1.0), shift);
}

// Held-out images [first, first + b) with fixed noise and times.
template <class Net, class Acc>
void draw_validation_batch(const Net& net, Acc* target, DeviceData data, double shift, size_t first,
                           size_t b) {
  auto draw = [=] HD(size_t i) {
    size_t n = first + i;
    return Draw{n, size_t(data.caption[n]), validation_time(n, shift), n};
  };
  constexpr uint64_t fixed_seed = 1;  // every network is validated on the same noise
  noisy_batch(net, target, data, b, fixed_seed, streams::validation_noise, draw);
}

// Each held-out image's loss (N), on the host; losses (N) and target (B, C, H, W) are scratch.
template <class Real, class Kept, class Acc = AccOf<Real>>
std::vector<Acc> validation_losses(Network<Real, Kept>& net, Acc* losses, Acc* target,
                                   DeviceData data, double shift) {
  Progress progress("validating", data.images);
  for (size_t first = 0; first < data.images; first += net.batch) {
    size_t b = std::min(net.batch, data.images - first);
    draw_validation_batch(net, target, data, shift, first, b);
    net.forward(b);
    flow_loss<Acc>(net.device, losses + first, nullptr, net.arrays.velocity, target, b,
                   net.config.pixels(), 0);
    progress.advance(b);
  }
  return downloaded(net.device, losses, data.images);
}

// Real: what the network computes with; Kept: what its gradients and AdamW's moments are kept as.
template <class Real, class Kept = AccOf<Real>>
class Trainer : public RunArrays<Real, Kept> {
  using Base = RunArrays<Real, Kept>;

 public:
  using Number = Real;
  using Acc = AccOf<Real>;
  using Base::a, Base::train, Base::held_out, Base::sampler, Base::diagnostics, Base::spikes;
  static constexpr bool mixed = !std::is_same_v<Real, Acc>, lean = Master<Real, Kept>::lean;

  const TrainOptions o;
  Device& device;
  Network<Real, Kept> net;
  uint64_t step = 0;  // steps done
  uint64_t data_hash, validated_hash;
  bool words;  // are captions words, or numbers of a file?

  Trainer(Device& on, const TrainOptions& options, const Dataset& data, const Dataset& validation)
      : Base(options),
        o(options),
        device(on),
        net(on, o.model, o.batch, o.recompute, true),
        data_hash(hash_data(data)),
        words(!data.names.empty()) {
    std::vector<Chunk> chunks = chunks_of(net.table);
    size_t V = std::min(o.val_images, validation.images);
    this->add_to(memory_, o, net.table, {data.images, V, data.captions});
    a.master.weights = net.weights(), a.gradients = net.gradients();
    a.table = &net.table;
    a.dither = dither(streams::moment_rounding);
    a.average_dither = dither(streams::average_rounding);
    if constexpr (!mixed) a.master.own = net.weights(), a.average_rounded = a.average;
    upload_data(device, train, data);
    Dataset validated_on = every_nth(validation, V);
    validated_hash = hash_data(validated_on);
    upload_data(device, held_out, validated_on);
    device.upload(a.chunks, chunks.data(), chunks.size() * sizeof(Chunk));
    initialise(device, net.table, a.master, a.average, o.seed);
    set_step(0);
    // Nothing may be taken later: not by the first diagnosed step either.
    for (bool diagnose : {false, o.diagnose_every > 0}) run_passes(diagnose, false);
  }

  // Continue after `done` steps: master and slots are as they were then.
  void set_step(uint64_t done) {
    step = done;
    if constexpr (mixed && !lean) convert(device, net.weights(), a.master.own, net.table.size);
    Clock clock{done, done * o.accumulate, 0, 0, 0, 0, 0, 0};
    device.upload(a.clock, &clock, sizeof clock);
    SpikeWatch watch{};
    watch.first = done;
    if (o.spike_factor > 0) device.upload(spikes.watch, &watch, sizeof watch);
  }

  // The events have been read: look for others, fully from step `quiet_until` on.
  void watch_spikes_from(uint64_t quiet_until) {
    SpikeWatch watch = downloaded(device, spikes.watch, 1)[0];
    watch.pending = 0, watch.quiet_until = quiet_until;
    device.upload(spikes.watch, &watch, sizeof watch);
  }

  // One training step. With `diagnose`, `diagnostics` can be read after it.
  void train_step(bool diagnose = false) {
    run_passes(diagnose, true);
    ++step;
  }

  // Where bits for rounding come from: the passes that have ended tell one pass from the next.
  Dither dither(uint64_t stream) const { return {o.seed, stream, &a.clock->pass}; }

  // The optimiser's arrays, and their names in a file.
  auto slots() const {
    std::array<Stored<Kept>, AdamW::slots.size()> named;
    for (size_t i = 0; i < named.size(); ++i) named[i] = {AdamW::slots[i], a.slots[i]};
    return named;
  }

  // What update_weights() looks on with.
  void diagnose_gradients() {
    diagnostics.gradients(device, locate<Kept>(o.model, net.table, net.gradients()));
  }
  void look_for_spike() {
    if (o.spike_factor > 0)
      watch_step(device, spikes, a.clock, a.history, diagnostics.modes(), diagnostics.layers.size(),
                 diagnostics.samples, o.spike_factor);
  }
  void copy_spike() {
    if (o.spike_factor > 0)
      ::copy_spike(device, spikes, a, o.batch * o.accumulate, net.arrays.dvelocity, o.batch,
                   o.model.pixels());
  }

  // What steps [first, step) recorded; at most `records` back.
  std::vector<Record> history(uint64_t first) {
    std::vector<Record> ring = downloaded(device, a.history, records), out;
    for (uint64_t s = first; s < step; ++s) out.push_back(ring[s % records]);
    return out;
  }

  // The spikes that the device has found and that watch_spikes_from() has not dismissed.
  std::vector<Spike> found_spikes() {
    SpikeWatch watch{};
    if (o.spike_factor > 0) device.download(&watch, spikes.watch, sizeof watch);
    std::vector<Spike> found;
    for (uint32_t k = 0; k < watch.pending; ++k) found.push_back(read_spike(watch.events[k], k));
    return found;
  }

  // Mean loss over the held-out images, with the averaged weights if there are any.
  double validate() {
    return with_average([&] {
      double sum = 0;
      for (Acc loss : validation_losses(net, a.losses, a.target, held_out, o.time_shift))
        sum += double(loss);
      return sum / double(held_out.images);
    });
  }

  std::vector<float> samples(const std::vector<float>& text, const std::vector<float>& empty,
                             size_t n, size_t steps, double guidance) {
    return with_average([&] {
      return sample_images(net, sampler, text, empty, {n, steps, guidance, o.time_shift, o.seed});
    });
  }

  // The weights to evaluate: the average, where one is kept.
  const Real* evaluated_weights() {
    if (!a.average) return net.weights();
    if constexpr (mixed) convert(device, a.average_rounded, a.average, net.table.size);
    return a.average_rounded;
  }

 private:
  Plan memory_{&device, 0};
  Graph graphs_[2][2][2];  // see run_passes()

  // A step. The host only enqueues it: a graph for each pass, and in the last one's all that
  // follows. Not `now`: see Graph.
  void run_passes(bool diagnose, bool now) {
    for (size_t micro = 0; micro < o.accumulate; ++micro) {
      bool first = micro == 0, last = micro + 1 == o.accumulate, observe = last && diagnose;
      auto pass = [&] {
        if (first) begin_step(device, a.clock, o.optimizer, o.steps, o.ema);
        training_pass(*this, first, last ? observer(diagnose) : Observer<Real>());
        if (last) update_weights(*this, diagnose);
      };
      graphs_[observe][last][first].run(device, pass, now);
    }
  }

  Observer<Real> observer(bool diagnose) {
    if (!diagnose && o.spike_factor == 0) return {};
    return [=](size_t block, int writer, const BlockSaved<Real>& saved, const Real* delta) {
      diagnostics.observe(device, block, writer, saved, delta, diagnose);
    };
  }

  Spike read_spike(const Event& event, size_t place) {
    Spike s{};
    s.step = event.step, s.window = event.window, s.norm = event.norm, s.median = event.median;
    s.factor = o.spike_factor;
    read_gradients(s, place);
    read_modes(s);
    size_t samples = o.batch * o.accumulate;
    double numbers = double(o.batch * o.model.pixels());
    for (const SampleSeen& seen : downloaded(device, spikes.samples + place * samples, samples)) {
      s.losses.push_back(seen.loss);
      s.mean += seen.sum / numbers, s.rms += seen.squares / numbers;
      s.largest = std::max(s.largest, seen.largest);
    }
    s.rms = std::sqrt(s.rms);
    return s;
  }

  // The norm of each parameter's gradient, from its chunks' squares, and what is not finite.
  void read_gradients(Spike& s, size_t place) {
    size_t count = a.chunk_count;
    std::vector<ChunkSeen> seen = downloaded(device, spikes.chunks + place * count, count),
                           all(net.table.parameters.size());
    std::vector<Chunk> chunks = chunks_of(net.table);
    for (size_t k = 0; k < count; ++k) {
      ChunkSeen& sum = all[chunks[k].parameter];
      sum.squares += seen[k].squares;
      sum.bad_gradients |= seen[k].bad_gradients, sum.bad_weights |= seen[k].bad_weights;
    }
    for (size_t i = 0; i < all.size(); ++i) {
      const std::string& name = net.table.parameters[i].name;
      s.gradients.push_back({name, std::sqrt(all[i].squares)});
      if (all[i].bad_gradients) s.bad_gradients.push_back(name);
      if (all[i].bad_weights) s.bad_weights.push_back(name);
    }
  }

  // The writers' modes at the spike, and their medians over its window.
  void read_modes(Spike& s) {
    size_t per_step = diagnostics.layers.size() * 4;
    std::vector<double> ring = downloaded(device, spikes.modes, records * per_step), past(s.window);
    auto at = [&](uint64_t when, size_t i) { return ring[when % records * per_step + i]; };
    auto usual = [&](size_t i) {
      for (size_t k = 0; k < s.window; ++k) past[k] = at(s.step - 2 - k, i);
      std::nth_element(past.begin(), past.begin() + ptrdiff_t(s.window / 2), past.end());
      return past[s.window / 2];
    };
    for (size_t i = 0; i < per_step; i += 2)
      s.modes.push_back({diagnostics.layers[i / 4], int(i / 2 % 2), at(s.step - 1, i),
                         at(s.step - 1, i + 1), usual(i), usual(i + 1)});
  }

  template <class Function>
  auto with_average(const Function& function) {
    Real* own = net.use_weights(const_cast<Real*>(evaluated_weights()));
    auto result = function();
    net.use_weights(own);
    return result;
  }
};

// ---------------------------------------------------------------------------------------------
// E. The run

// The first `rows` captions of text (M, size), each so many times one after the other.
inline std::vector<float> each_times(const std::vector<float>& text, size_t size, size_t rows,
                                     size_t times) {
  std::vector<float> out;
  for (size_t i = 0; i < rows * times; ++i)
    out.insert(out.end(), &text[i / times * size], &text[i / times * size] + size);
  return out;
}

inline volatile std::sig_atomic_t interrupted = 0;

// The first one ends the run after its step, saved; another one at once. What follows within a
// fifth of a second is the same one: `timeout` sends its signal to a process and to its group.
inline void interrupt(int signal) {
  static const char text[] = "\nstopping after this step, to save (once more: at once, unsaved)\n";
  static timespec first;
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  double since = double(now.tv_sec - first.tv_sec) + 1e-9 * double(now.tv_nsec - first.tv_nsec);
  if (interrupted && since < 0.2) return;
  if (interrupted) {
    std::signal(signal, SIG_DFL);
    raise(signal);
    return;
  }
  interrupted = 1, first = now;
  if (write(STDERR_FILENO, text, sizeof text - 1) < 0) return;
}

template <class Real>
void print_plan(const Job& job, const Choice& choice) {
  const TrainOptions& o = job.o;
  const Config& m = o.model;
  double parameters = double(job.table.count());
  std::printf("%s: %zu layers, width %zu, %zu heads, ffn %zu; %zu image + %zu text tokens\n",
              m.residual.c_str(), m.depth, m.width, m.heads, m.ffn, m.image_tokens(),
              m.text_tokens);
  std::printf("%.3f million parameters, batch %zu x %zu, %s, %s state, recompute %zu, ",
              1e-6 * parameters, o.batch, o.accumulate, dtype_name<Real>(), choice.state(),
              choice.recompute);
  std::printf("%.4g TFLOP a step\n", 1e-12 * choice.flops);
  auto line = [&](const std::string& name, size_t bytes) {
    std::printf("  %-21s %12.3f MB", name.c_str(), 1e-6 * double(bytes));
    if (name == "weights" || name == "gradients" || name == "optimizer")
      std::printf(" %9.3f bytes a parameter", double(bytes) / parameters);
    std::printf("\n");
  };
  for (const auto& [name, bytes] : choice.slabs) line(name, bytes);
  line("total", choice.bytes);
}

// A run and its console: what is logged, validated, sampled and saved, and when.
template <class Real, class Kept>
class Run {
 public:
  // `in_use`: bytes in use on the device before the data was read.
  Run(Device& device, const TrainOptions& options, Dataset data, const Dataset& validation,
      size_t in_use)
      : in_use_before_(in_use),
        trainer_(device, options, data, validation),
        o_(trainer_.o),
        data_(std::move(data)) {
    std::vector<float>().swap(data_.pixels);  // the device has them
    require_room(trainer_);
    if (o_.resume && std::filesystem::exists(o_.out + "/state.safetensors")) {
      resume_run(trainer_);
      if (trainer_.step > o_.steps)
        fail("--steps %zu: %s is at step %zu already; ask for more", o_.steps, o_.out.c_str(),
             size_t(trainer_.step));
      std::printf("resumed %s after step %zu\n", visible(o_.out).c_str(), size_t(trainer_.step));
    } else {
      if (o_.resume) std::printf("no state in %s: starting at step 1\n", visible(o_.out).c_str());
      if (!o_.weights.empty()) begin_with_weights(trainer_);
      set_aside(logs_in(o_.out));
    }
    logged_ = first_ = trainer_.step;
    if (o_.diagnose_every) {  // first: it may refuse, before anything is written
      const Diagnostics<Real>& d = trainer_.diagnostics;  // nothing is measured yet: for the names
      std::string header = diagnostics_header(d.read(device)[0], o_.model, d.samples);
      diagnostics_ =
          std::make_unique<CsvLog>(o_.out + "/diagnostics.csv", header, logged_, 2,
                                   "resume with the same --diagnose-samples, or move it away");
    }
    log_ = std::make_unique<CsvLog>(o_.out + "/log.csv", "step,loss,gradient_norm,lr", logged_);
    validation_ = std::make_unique<CsvLog>(o_.out + "/validation.csv", "step,loss", logged_);
    if (log_->last() != logged_)
      std::printf("note: log.csv has no rows of steps %zu to %zu\n", size_t(log_->last() + 1),
                  size_t(logged_));
    if (!o_.ini.empty()) {
      SafeFile file(o_.out + "/config.ini");
      file.write(o_.ini);
      file.commit();
    }
  }

  // What the disk does not take costs no work: pictures and reports are only warned of, rows wait,
  // a save is tried again when the next one is due. (The last has no next.)
  int go() {
    for (int signal : {SIGINT, SIGTERM}) std::signal(signal, interrupt);
    start_ = last_ = Time::now();
    while (trainer_.step < o_.steps && !interrupted) {
      bool diagnose = o_.diagnose_every && (trainer_.step + 1) % o_.diagnose_every == 0;
      trainer_.train_step(diagnose);
      if (diagnose) {
        const Diagnostics<Real>& d = trainer_.diagnostics;
        diagnostics_->row(trainer_.step,
                          diagnostics_rows(trainer_.step, d.layers, d.read(trainer_.device)));
      }
      if (trainer_.step == first_ + 1) print_memory();
      bool keep = due(o_.save_every), check = due(o_.val_every), draw = due(o_.sample_every);
      if ((due(o_.log_every) || keep || check || draw) && !log()) return 1;
      // The state last: what a resumed run goes on from has left all that belongs to its steps.
      if (check) validate();
      if (draw) warn_of([&] { grid(samples("_" + padded(trainer_.step))); });
      if (keep) warn_of([&] { save(); });
    }
    if (!log()) return 1;
    if (saved_ != trainer_.step) save();  // what follows, a run that is resumed at its end makes
    if (interrupted) {
      std::printf("\nstopped at step %zu and saved%s\n", size_t(trainer_.step),
                  o_.save == "all" ? ": go on with --resume" : " the weights");
      return 130;
    }
    for (int signal : {SIGINT, SIGTERM}) std::signal(signal, SIG_DFL);  // all is saved
    grid(samples());
    double loss = validate();
    validation_->sync();
    std::printf("validation loss %.4f%s   weights %s/weights.safetensors   samples %s\n", loss,
                trainer_.a.average ? " of the weights' average" : "", visible(o_.out).c_str(),
                visible(samples()).c_str());
    if (o_.diagnose_every) make_page(o_.out);
    return std::isfinite(loss) ? 0 : 1;
  }

 private:
  using Time = std::chrono::steady_clock;
  const size_t in_use_before_;
  Trainer<Real, Kept> trainer_;
  const TrainOptions& o_;
  Dataset data_;
  std::unique_ptr<CsvLog> log_, validation_, diagnostics_;
  uint64_t first_, logged_, saved_ = ~uint64_t(0);
  static constexpr size_t most_reports = 10;
  size_t reports_ = 0;
  Time::time_point start_, last_;

  static double plain(double x) { return std::isnan(x) ? std::fabs(x) : x; }  // nan, never -nan
  bool due(size_t every) const { return every && trainer_.step % every == 0; }
  static std::string padded(uint64_t step) { return text_of("%06zu", size_t(step)); }
  static double seconds(Time::time_point from) {
    return std::chrono::duration<double>(Time::now() - from).count();
  }

  // What has really been taken, to be held against the plan: on a GPU what its driver says, on a
  // CPU the growth of the resident set.
  void print_memory() {
    trainer_.device.synchronize();
    size_t now = trainer_.device.in_use(), taken = now - std::min(now, in_use_before_);
    std::printf("  %-21s %12.3f MB\n", "taken", 1e-6 * double(taken));
    std::fflush(stdout);
  }

  // Log all steps since the last time; false if training has diverged.
  bool log() {
    if (logged_ == trainer_.step) return true;
    std::vector<Record> history = trainer_.history(logged_);  // waits for the device
    double loss = 0;
    for (const Record& r : history) {
      ++logged_;
      log_->row(logged_,
                text_of("%zu,%.9g,%.9g,%.9g", size_t(logged_), plain(r.loss), plain(r.norm), r.lr));
      loss += r.loss / double(history.size());
    }
    const Record& now = history.back();
    double step = seconds(last_) / double(history.size());
    double left =
        seconds(start_) / double(trainer_.step - first_) * double(o_.steps - trainer_.step);
    double tokens = double(o_.batch * o_.accumulate * o_.model.tokens()),
           flops = step_flops(o_) / step;
    std::printf("step %6zu/%zu  loss %.4f  norm %8.3g  lr %.2e  %.1f ms/step  %.3g tokens/s  ",
                size_t(trainer_.step), o_.steps, plain(loss), plain(now.norm), now.lr, 1e3 * step,
                tokens / step);
    if (double peak = peak_flops<Real>(trainer_.device.name))
      std::printf("HFU %.1f%% of %.0f TFLOP/s  ", 100 * flops / peak, 1e-12 * peak);
    else
      std::printf("%.3g GFLOP/s  ", 1e-9 * flops);
    std::printf("left %s\n", duration(left).c_str());
    std::fflush(stdout);
    warn_of([&] { report_spikes(); });
    last_ = Time::now();
    if (std::isfinite(loss) && std::isfinite(now.norm)) return true;
    warn_of([&] { log_->sync(); });
    std::fprintf(
        stderr,
        "mvsplit: the loss or the gradient is not finite at step %zu: training has diverged; "
        "nothing was saved since then. Lower --lr or use --residual mvsplit.\n",
        size_t(trainer_.step));
    if (o_.diagnose_every) make_page(o_.out);
    return false;
  }

  template <class Act>
  void warn_of(const Act& act) {
    try {
      act();
    } catch (const Error& e) {
      std::fprintf(stderr, "warning: %s\n", e.what());
    }
  }

  void save() {
    for (CsvLog* log : {log_.get(), validation_.get(), diagnostics_.get()})
      if (log) log->sync();
    save_run(trainer_);
    saved_ = trainer_.step;
  }

  // Write a report a spike: ten of a process, at least 25 steps apart unless one outgrows the last.
  // (A collapse can follow a first spike within a few steps.)
  void report_spikes() {
    if (reports_ == most_reports) return;
    std::vector<Spike> found = trainer_.found_spikes();
    for (const Spike& spike : found) {
      if (reports_ == most_reports) return;
      std::string path = o_.out + "/spike_" + padded(spike.step) + ".txt";
      SafeFile file(path);
      file.write(spike_report(spike));
      file.commit();
      std::printf("step %6zu  norm %.3g, %.3g times its median: %s\n", size_t(spike.step),
                  spike.norm, spike.norm / spike.median, visible(path).c_str());
      ++reports_;
    }
    if (!found.empty()) trainer_.watch_spikes_from(found.back().step + 25);
  }

  double validate() {
    double loss = trainer_.validate();
    validation_->row(trainer_.step, text_of("%zu,%.9g", size_t(trainer_.step), loss));
    if (trainer_.step != o_.steps)
      std::printf("step %6zu  validation loss %.4f\n", size_t(trainer_.step), loss);
    last_ = Time::now();
    return loss;
  }

  // The file of the samples that are drawn at some step: no picture has more than three channels.
  std::string samples(const std::string& at = "") const {
    return o_.out + "/samples" + at + (o_.model.channels > 3 ? ".safetensors" : ".png");
  }

  // A row a caption, the first ten.
  void grid(const std::string& path) {
    const Config& m = o_.model;
    size_t scale = grid_scale(m.height, m.image_width);
    auto fit = [&](size_t most, size_t size) {  // a picture's side, with room for captions
      return std::clamp<size_t>(15000 / (size * scale + 2), 1, most);
    };
    size_t rows = fit(std::min<size_t>(data_.captions, 10), m.height),
           columns = fit(o_.columns, m.image_width);
    std::vector<std::string> captions;
    for (size_t i = 0; i < rows; ++i) captions.push_back(data_.name_of(i));
    std::vector<float> text = each_times(data_.text, m.text_size(), rows, columns);
    std::vector<float> images = trainer_.samples(text, data_.empty_text, rows * columns, 25, 2);
    write_samples(path, images,
                  {rows, columns, m.channels, m.height, m.image_width, scale, captions});
    last_ = Time::now();
  }
};

// ---------------------------------------------------------------------------------------------
// F. The command `train`

// The model's sizes that the data decides.
inline void fit_to_data(Config& model, const Dataset& data) {
  model.channels = data.channels, model.height = data.height, model.image_width = data.width;
  model.text_tokens = data.text_tokens, model.text_dim = data.text_dim;
}

// Fails unless the network of `weights` takes the data.
inline void require_fit(const std::string& path, const Dataset& data, const std::string& weights,
                        const Config& m) {
  if (m.channels != data.channels || m.height != data.height || m.image_width != data.width ||
      m.text_tokens != data.text_tokens || m.text_dim != data.text_dim)
    fail(
        "%s has images of %zu x %zu x %zu and captions of %zu x %zu numbers, the model takes "
        "%zu x %zu x %zu and %zu x %zu (%s)",
        path.c_str(), data.channels, data.height, data.width, data.text_tokens, data.text_dim,
        m.channels, m.height, m.image_width, m.text_tokens, m.text_dim, weights.c_str());
}

// Bytes that may be taken of those that are free. Part of the plan is an estimate.
inline double memory_limit(const Device& device) {
  return 0.99 * double(device.available() + Device::workspace_bytes(device.gpu));
}

// Fails if the run's folder holds what this run would write over and does not go on with.
inline void refuse_to_overwrite(const TrainOptions& o) {
  auto there = [&](const char* name) { return std::filesystem::exists(o.out + "/" + name); };
  bool state = there("state.safetensors");
  if (state && o.resume && o.save == "weights")
    fail("%s/state.safetensors would be left behind by the weights: resume with --save all",
         o.out.c_str());
  if (state && !o.resume)
    fail("%s/state.safetensors exists: go on with --resume, or choose another --out",
         o.out.c_str());
  for (const char* name :
       {"weights.safetensors", "ema.safetensors", "samples.png", "samples.safetensors"})
    if (!state && there(name))
      fail("%s/%s exists, but no state to go on from: choose another --out", o.out.c_str(), name);
  if (!state && !o.resume && !logs_in(o.out).empty())
    fail(
        "%s holds logs or a config.ini, but no state to go on from: choose another --out, or keep "
        "them under other names and begin anew with --resume",
        o.out.c_str());
}

template <class Real>
int train(Device& device, const Machine& machine, TrainOptions o, Dataset data, Dataset validation,
          size_t in_use) {
  const TrainOptions asked = o;
  o.val_images = std::min(o.val_images, validation.images);
  Table table = parameter_table(o.model);
  Job job{o, table, {data.images, o.val_images, data.captions}, device.gpu};
  double limit = memory_limit(device);
  if (o.memory > 0) limit = std::min(limit, 1e9 * o.memory);
  std::string saved = o.out + "/state.safetensors";
  File own{nullptr, std::fclose};  // from before its state is looked at
  std::error_code error;
  if (std::filesystem::is_directory(o.out, error)) own = own_folder(o.out);
  bool resumed = o.resume && std::filesystem::exists(saved);
  if (resumed) {
    SafetensorsReader file(saved);
    require_same_run<Real>(file, saved, o, data, validation);
    if (o.state == "auto") o.state = job.o.state = described(file, saved, "state");
  }
  Choice choice = choose<Real>(job, limit, true);
  o.recompute = choice.recompute;
  if (!resumed || !o.changes.empty() || !std::filesystem::exists(o.out + "/config.ini"))
    o.ini = ini_of(asked, machine, choice.state());
  std::filesystem::create_directories(o.out, error);
  if (error) fail("cannot create %s: %s", o.out.c_str(), error.message().c_str());
  if (!own) own = own_folder(o.out);
  refuse_to_overwrite(o);
  print_plan<Real>(job, choice);
  auto start = [&](auto kept) {
    Run<Real, decltype(kept)> run(device, o, std::move(data), validation, in_use);
    validation = {};
    return run.go();
  };
  if constexpr (std::is_same_v<Real, bf16>)
    if (choice.lean) return start(Real());
  return start(AccOf<Real>());
}

// ---------------------------------------------------------------------------------------------
// G. The other subcommands

// `mvsplit plan`: as `train` would choose on this machine, or for the memory that is named.
template <class Real>
void plan(const TrainOptions& o, DataSizes data, bool on_gpu) {
  Table table = parameter_table(o.model);
  bool is_here = !on_gpu || Device::gpus() > 0;
  double limit = o.memory > 0 ? 1e9 * o.memory : is_here ? memory_limit(Device(on_gpu)) : HUGE_VAL;
  Job job{o, table, data, on_gpu};
  print_plan<Real>(job, choose<Real>(job, limit, o.memory > 0));
}

// The captions that the prompts ask for. A prompt is encoded as it is. With --data its words must
// be among those of that data's captions, or it is the number of one of them (unless captions are
// called by numbers), and nothing else where captions are numbers.
inline Captions prompt_text(const SampleOptions& o, const Config& m, Captions data) {
  if (!o.data.empty() && (data.text_tokens != m.text_tokens || data.text_dim != m.text_dim))
    fail("%s has captions of %zu x %zu numbers, the model takes %zu x %zu", o.data.c_str(),
         data.text_tokens, data.text_dim, m.text_tokens, m.text_dim);
  std::set<std::string> known;
  for (const std::string& name : data.names)
    for (const std::string& word : words_of(caption_of(name))) known.insert(word);
  Captions asked;
  asked.empty_text =
      o.data.empty() ? encode_text("", m.text_tokens, m.text_dim) : std::move(data.empty_text);
  for (const std::string& prompt : o.prompts) {
    std::vector<std::string> words = words_of(caption_of(prompt));
    auto is_known = [&](const std::string& word) { return known.count(word) > 0; };
    std::vector<float> row;
    if (o.data.empty() || (!known.empty() && std::all_of(words.begin(), words.end(), is_known))) {
      row = encode_text(caption_of(prompt), m.text_tokens, m.text_dim);
      asked.names.push_back(prompt);
    } else {
      auto number = [](const std::string& name) { return number_in<size_t>(name).has_value(); };
      bool named_so = std::any_of(data.names.begin(), data.names.end(), number);
      size_t n = named_so ? data.captions : number_in<size_t>(prompt).value_or(data.captions);
      if (n >= data.captions)
        fail("--prompt %s: %s has captions %s", prompt.c_str(), o.data.c_str(),
             known.empty() ? ("0 to " + std::to_string(data.captions - 1)).c_str()
                           : list_of(data.names).c_str());
      row.assign(data.text.begin() + ptrdiff_t(n * m.text_size()),
                 data.text.begin() + ptrdiff_t((n + 1) * m.text_size()));
      asked.names.push_back(data.name_of(n));
    }
    asked.text.insert(asked.text.end(), row.begin(), row.end());
  }
  return asked;
}

template <class Real>
int sample(Device& device, const SampleOptions& o) {
  bool numbers = has_extension(o.out, ".safetensors");
  if (!numbers && !has_extension(o.out, ".png"))
    fail("--out %s: the name must end in .png or .safetensors", o.out.c_str());
  SafetensorsReader file(o.weights);
  auto said = [&](const char* key) { return file.metadata().count(key) > 0; };
  Config m;
  m.height = m.image_width = o.size.value_or(32), m.text_tokens = o.text_tokens.value_or(8);
  Words assumed = read_config(file, o.weights, m, o.heads, o.norm_eps);
  if (o.size && (*o.size != m.height || *o.size != m.image_width))
    fail("--size %zu: %s says that its images are %zux%zu", *o.size, o.weights.c_str(), m.height,
         m.image_width);
  if (o.text_tokens && *o.text_tokens != m.text_tokens)
    fail("--text-tokens %zu: %s says that it has %zu", *o.text_tokens, o.weights.c_str(),
         m.text_tokens);
  double shift = read_time_shift(file, o.weights, o.time_shift, assumed);
  if (!(shift > 0)) fail("--time-shift must be positive, not %g", shift);
  if (!o.size && !(said("height") && said("image_width")))
    assumed.push_back("images of " + std::to_string(m.height) + "x" +
                      std::to_string(m.image_width) + " (--size)");
  Dataset data;
  if (!o.data.empty()) data = load_captions(o.data);
  bool text_alone = !o.data.empty() && data.images == 0;  // of any length
  if (!o.data.empty() && !o.text_tokens && (text_alone || !said("text_tokens")))
    m.text_tokens = data.text_tokens, m.check();
  else if (!o.text_tokens && !said("text_tokens"))
    assumed.push_back(std::to_string(m.text_tokens) + " text tokens (--text-tokens)");
  auto captions = file.metadata().find("captions");
  if (o.data.empty() && captions != file.metadata().end() && captions->second == "file")
    fail("%s was trained on captions from a file: name it with --data, and give --prompt a number",
         o.weights.c_str());
  Captions prompts = prompt_text(o, m, std::move(data));
  note_assumed(o.weights, assumed);
  size_t rows = o.prompts.size(), n = rows * o.columns, scale = grid_scale(m.height, m.image_width);
  // Better refused now than after the work.
  Grid grid{rows, o.columns, m.channels, m.height, m.image_width, scale, prompts.names};
  if (!numbers) grid_layout(o.out, grid);
  SafeFile(o.out).abandon();
  std::vector<float> text = each_times(prompts.text, m.text_size(), rows, o.columns);
  Network<Real> net(device, m, std::min(n, o.batch), 0, false);
  load_tensors(file, o.weights, device, net.table, Stored{"", net.weights()});
  Sampler<Real> sampler;
  Plan memory(&device);
  memory.add("scratch", [&](Carver& c) { sampler.lay(c, m, net.batch); });
  std::vector<float> images = sample_images(net, sampler, text, prompts.empty_text,
                                            {n, o.steps, o.guidance, shift, o.seed});
  for (float x : images)
    if (!std::isfinite(x)) fail("the samples hold NaN or infinity: are these trained weights?");
  write_samples(o.out, images, grid);
  std::printf("%zu samples: %s\n", n, visible(o.out).c_str());
  return 0;
}

// Read tensor `name` into a device array of Real, through numbers that must be finite.
template <class Real>
void upload_tensor(const SafetensorsReader& file, const std::string& path, const Device& device,
                   const std::string& name, const std::vector<size_t>& shape, Real* to) {
  std::vector<Real> host = read_finite<Real>(file, path, file.require(name, shape));
  device.upload(to, host.data(), host.size() * sizeof(Real));
}

template <class Real>
int forward(Device& device, const ForwardOptions& o) {
  using Acc = AccOf<Real>;
  SafetensorsReader weights(o.weights), inputs(o.inputs);
  SafeFile(o.out).abandon();  // better refused now than after the work
  const TensorInfo *z = inputs.find("z"), *text = inputs.find("text");
  if (!z || z->shape.size() != 4 || !text || text->shape.size() != 3 || z->shape[0] == 0)
    fail("%s: expected z (B,C,H,W) and text (B,L,d_text)", o.inputs.c_str());
  inputs.require_only({"z", "text", "cotangent"});
  size_t b = z->shape[0];
  Config m;
  auto fit_to_inputs = [&] {
    m.height = z->shape[2], m.image_width = z->shape[3], m.text_tokens = text->shape[1];
  };
  fit_to_inputs();
  note_assumed(o.weights, read_config(weights, o.weights, m, o.heads, o.norm_eps));
  fit_to_inputs();  // whatever the weights were trained on
  m.check();
  std::vector<size_t> image{b, m.channels, m.height, m.image_width};
  std::vector<size_t> caption{b, m.text_tokens, m.text_dim};
  bool backward = inputs.find("cotangent");
  Network<Real> net(device, m, b, o.recompute, backward);
  Arrays<Real>& a = net.arrays;
  load_tensors(weights, o.weights, device, net.table, Stored{"", net.weights()});
  upload_tensor(inputs, o.inputs, device, "z", image, a.z);
  upload_tensor(inputs, o.inputs, device, "text", caption, a.text);
  if (backward) upload_tensor(inputs, o.inputs, device, "cotangent", image, a.dvelocity);
  net.forward(b);
  if (backward) net.backward(b, false, true);

  SafetensorsWriter out(o.out);
  out.declare("velocity", dtype_name<Acc>(), image);
  if (backward) {
    out.declare("grad.z", dtype_name<Acc>(), image);
    out.declare("grad.text", dtype_name<Acc>(), caption);
    for (const Parameter& p : net.table.parameters)
      out.declare("grad." + p.name, dtype_name<Acc>(), p.shape);
  }
  auto put = [&](const Acc* from, size_t n) {
    std::vector<Acc> host = downloaded(device, from, n);
    for (Acc x : host)
      if (!std::isfinite(x)) fail("the results hold NaN or infinity: are these trained weights?");
    out.write(host.data(), n);
  };
  put(a.velocity, b * m.pixels());
  if (backward) {
    put(a.dz, b * m.pixels());
    put(a.dtext, b * m.text_size());
    for (const Parameter& p : net.table.parameters) put(net.gradients() + p.offset, p.count());
  }
  out.finish();
  std::printf("velocity%s: %s\n", backward ? " and gradients" : "", visible(o.out).c_str());
  return 0;
}

// `mvsplit validate`: what validates a run, for every held-out image, by time.
template <class Real>
int validate(Device& device, const ValidateOptions& o) {
  using Acc = AccOf<Real>;
  SafetensorsReader file(o.weights);
  Dataset held_out = load_dataset(o.data, 2).held_out;
  size_t N = o.images.value_or(held_out.images);
  if (N < 1 || N > held_out.images)
    fail("--images %zu: %s has %zu held-out images", N, o.data.c_str(), held_out.images);
  Config m;
  fit_to_data(m, held_out);
  Words assumed = read_config(file, o.weights, m, o.heads, o.norm_eps);
  double shift = read_time_shift(file, o.weights, o.time_shift, assumed);
  if (!(shift > 0)) fail("--time-shift must be positive, not %g", shift);
  note_assumed(o.weights, assumed);
  require_fit(o.data, held_out, o.weights, m);
  SafeFile out(o.out);  // better refused now than after the work
  Network<Real> net(device, m, std::min(N, o.batch), 0, false);
  load_tensors(file, o.weights, device, net.table, Stored{"", net.weights()});
  DeviceData data;
  Acc *losses, *target;
  Plan memory(&device);
  memory.add("scratch", [&](Carver& c) {
    data = lay_data(c, m, N, held_out.captions);
    losses = c.take<Acc>(N), target = c.take<Acc>(net.batch * m.pixels());
  });
  upload_data(device, data, every_nth(held_out, N));
  std::vector<LossBin> bins(o.bins);
  out.write("t,loss\n");
  size_t image = 0;
  for (double loss : validation_losses(net, losses, target, data, shift)) {
    if (!std::isfinite(loss)) fail("the loss is NaN or infinity: are these trained weights?");
    double t = validation_time(image++, shift);
    LossBin& bin = bins[std::min(size_t(t * double(o.bins)), o.bins - 1)];
    ++bin.n, bin.sum += loss, bin.squares += loss * loss;
    out.write(text_of("%.6f,%.9g\n", t, loss));
  }
  out.commit();
  std::printf("%s%s\n", validation_table(bins, double(N)).c_str(), visible(o.out).c_str());
  return 0;
}

// ---------------------------------------------------------------------------------------------
// H. Gradients of the whole network
//
// L(w) = <cotangent, velocity(w)> with a random cotangent, in fp64. For each parameter family, and
// for z and the text, u is one random direction through all layers. Two witnesses are asked about
// the backward's <dL/dw, u>:
//
// - The forward in dual numbers, on w + u e (math.h, appendix F). It is exact at any depth, also of
//   a chaotic network: on the CPU its values are the backward's bit by bit.
// - Differences, which share nothing with the backward but L:
//       ( 45 (L(h) - L(-h)) - 9 (L(2h) - L(-2h)) + L(3h) - L(-3h) ) / 60 h
//   (error O(h^6) + rounding / h). For a thousand layers a step between 1.3e-3 and 2.5e-3 of the
//   values is small enough for the one error and large enough for the other; four points leave no
//   such room, and where the layers are chaotic nothing does: differences fail, the gradient not.
//
// Errors are relative to |dL/dw|: <dL/dw, u> is a draw from N(0, |dL/dw|^2), and may be small by
// chance. But what is left of larger terms that cancel has their rounding. (Behind RMSNorm a text
// of one number has the gradient that eps leaves it; tokens that are alike leave Q and K next to
// none.) Those terms are about as large as L's, over the size of w. So an error counts as a part of
// 1e-3 of that, at least: a limit of 1e-11 forgives 1e-14 of the terms.

class Gradcheck {
 public:
  struct Errors {
    double dual = 0, differences = 0;
  };
  static constexpr double difference_limit = 1e-7;

  // Writers, gates and the final projection start at random values, unless there are weights: at
  // their zeros most gradients vanish.
  Gradcheck(Device& device, const GradcheckOptions& o)
      : o_(o),
        net_(device, o.model, o.batch, o.recompute, true),
        exact_(cpu_, o.model, o.batch, 0, false) {
    const Table& table = net_.table;
    bool drawn = o.weights.empty();
    if (drawn)
      initialise(device, table, Master<double, double>{net_.weights(), net_.weights()}, nullptr,
                 o.seed);
    else
      load_tensors(SafetensorsReader(o.weights), o.weights, device, table,
                   Stored{"", net_.weights()});
    for (size_t i = 0; i < table.parameters.size(); ++i) {
      const Parameter& p = table.parameters[i];
      Piece piece{net_.weights() + p.offset, net_.gradients() + p.offset,
                  exact_.weights() + p.offset, p.count()};
      std::vector<double> w = downloaded(device, piece.value, piece.count);
      double spread = 0.3 * std::abs(p.scale) + (p.scale == 0 ? 0.1 : 0);
      for (size_t k = 0; k < p.count(); ++k)
        piece.exact[k] = w[k] + (drawn && p.init == Init::constant ? spread * normal(0, i, k) : 0);
      add(p.family(), piece);
    }
    Arrays<double>& a = net_.arrays;
    Arrays<Dual>& e = exact_.arrays;
    size_t pixels = o.batch * o.model.pixels(), words = o.batch * o.model.text_size();
    for (size_t k = 0; k < words; ++k) e.text[k] = normal(0, inputs + 2, k);
    for (size_t k = 0; k < pixels; ++k) {
      e.z[k] = normal(0, inputs, k);
      cotangent_.push_back(normal(0, inputs + 1, k));
    }
    add("input z", {a.z, a.dz, e.z, pixels});
    add("input text", {a.text, a.dtext, e.text, words});
    for (const Family& family : families_) move(family, 0);
    device.upload(a.dvelocity, cotangent_.data(), pixels * sizeof(double));
    net_.forward(o.batch);
    net_.backward(o.batch, false, true);
  }

  Network<double>& network() { return net_; }  // its gradients are what is checked

  // Check every family; one line each. Returns the largest errors.
  Errors run() {
    Errors worst;
    for (const Family& family : families_) {
      Errors e = check(family);
      worst.dual = std::max(worst.dual, e.dual);
      worst.differences = std::max(worst.differences, e.differences);
    }
    return worst;
  }

 private:
  // The parameters of one name. `exact` has the values and, while they are checked, u.
  struct Piece {
    double* value;
    const double* gradient;
    Dual* exact;
    size_t count;
  };
  struct Family {
    std::string name;
    std::vector<Piece> pieces;
  };
  static constexpr uint64_t inputs = 1 << 20;  // the numbers of what is drawn besides parameters

  const GradcheckOptions o_;
  Device cpu_;
  Network<double> net_;
  Network<Dual> exact_;
  std::vector<Family> families_;
  std::vector<double> cotangent_;

  double normal(uint64_t other_seed, uint64_t number, size_t k) const {
    return gaussian(o_.seed + other_seed, streams::check, number << 40 | k);
  }
  void add(const std::string& name, Piece piece) {
    auto named = [&](const Family& f) { return f.name == name; };
    auto at = std::find_if(families_.begin(), families_.end(), named);
    if (at == families_.end()) at = families_.insert(at, {name, {}});
    at->pieces.push_back(piece);
  }

  // The network's values to w + h u.
  void move(const Family& family, double h) {
    std::vector<double> w;
    for (const Piece& p : family.pieces) {
      w.clear();
      for (size_t k = 0; k < p.count; ++k) w.push_back(p.exact[k].v + h * p.exact[k].d);
      net_.device.upload(p.value, w.data(), p.count * sizeof(double));
    }
  }
  double difference_quotient(const Family& family, double h) {
    auto loss = [&](double x) {
      move(family, x);
      net_.forward(o_.batch);
      std::vector<double> v = downloaded(net_.device, net_.arrays.velocity, cotangent_.size());
      return std::inner_product(v.begin(), v.end(), cotangent_.begin(), 0.0);
    };
    auto odd = [&](double x) { return loss(x) - loss(-x); };
    double quotient = (45 * odd(h) - 9 * odd(2 * h) + odd(3 * h)) / (60 * h);
    move(family, 0);
    return quotient;
  }

  Errors check(const Family& family) {
    double by_hand = 0, dual = 0, squares = 0, values = 0, terms = 0;
    size_t count = 0;
    for (size_t i = 0; i < family.pieces.size(); ++i) {
      const Piece& p = family.pieces[i];
      std::vector<double> g = downloaded(net_.device, p.gradient, p.count);
#pragma omp parallel for schedule(static)
      for (size_t k = 0; k < p.count; ++k) p.exact[k].d = normal(1, i, k);
      for (size_t k = 0; k < p.count; ++k) {
        by_hand += g[k] * p.exact[k].d;
        squares += g[k] * g[k], values += p.exact[k].v * p.exact[k].v;
      }
      count += p.count;
    }
    exact_.forward(o_.batch);
    for (size_t k = 0; k < cotangent_.size(); ++k) {
      Dual term = cotangent_[k] * exact_.arrays.velocity[k];
      dual += term.d, terms += std::abs(term.v);
    }
    double size = values > 0 ? std::sqrt(values / double(count)) : 1;
    // A step in proportion to the family's values, shared out over its many members.
    double h = o_.step * size / std::sqrt(double(family.pieces.size()));
    double differences = h > 0 ? difference_quotient(family, h) : by_hand;
    for (const Piece& p : family.pieces)
      for (size_t k = 0; k < p.count; ++k) p.exact[k].d = 0;

    double gradient = std::max({std::sqrt(squares), std::abs(by_hand), std::abs(dual)});
    double unit = std::max({gradient, 1e-3 * terms / size, 1e-300});
    auto error = [&](double other) {
      double e = std::abs(by_hand - other) / unit;
      return std::isfinite(e) ? e : HUGE_VAL;
    };
    Errors e{error(dual), error(differences)};
    bool good = e.dual <= o_.tolerance, failed = e.differences > difference_limit;
    std::printf("%-36s %9zu  %+.10e  %+.10e  %.1e  ", family.name.c_str(), count, by_hand, dual,
                e.dual);
    if (h > 0) std::printf("%+.10e  %.1e  ", differences, e.differences);
    std::printf("%s\n", !good    ? (failed ? "WRONG, by differences too" : "WRONG")
                        : failed ? "ok: the differences failed"
                        : gradient <= o_.tolerance * unit ? "ok: vanishes"
                                                          : "ok");
    return e;
  }
};

// Does nothing hold a branch back, neither gates nor, behind Pre-Norm, a trunk that grows?
inline bool is_bare(Merge merge) { return about(merge).gates.empty() && !about(merge).trunk_apart; }

inline int gradcheck(Device& device, const GradcheckOptions& o) {
  o.model.check();
  if (!(o.step >= 0) || !(o.tolerance > 0))
    fail("--step must be at least 0 and --tolerance positive");
  Gradcheck check(device, o);
  std::printf("%s, %zu layers, recompute %zu, fp64 on %s\n", o.model.residual.c_str(),
              o.model.depth, o.recompute, device.name.c_str());
  std::printf("%-36s %9s  %-17s  %-17s  %-7s  %s\n", "family", "numbers", "by hand",
              "by dual numbers", "error", o.step > 0 ? "by differences     error" : "");
  Gradcheck::Errors worst = check.run();
  bool good = worst.dual <= o.tolerance;
  std::printf("largest error against dual numbers %.1e: %s (limit %.0e)\n", worst.dual,
              good ? "ok" : "WRONG", o.tolerance);
  if (good && worst.differences > check.difference_limit)
    std::printf(
        "the differences failed (%.1e, limit %.0e), the gradient agrees with the exact derivative: "
        "no step is right for both truncation and rounding (NOTES.md, \"How the gradients are "
        "checked\")\n",
        worst.differences, check.difference_limit);
  const Residual& mode = o.model.mode();
  bool bare = is_bare(mode.attention) || is_bare(mode.ffn);
  if (!good && bare && device.gpu)
    std::printf(
        "dual numbers run on the CPU, which rounds otherwise than a GPU: without gates a deep "
        "network is too chaotic for that, unless with --writer-std 0.02\n");
  return good ? 0 : 1;
}

// ---------------------------------------------------------------------------------------------
// I. The probe (the paper's App. H)
//
// The network is told the noise level t by its input alone. Where does it keep it? Take images,
// each with its caption and with a time t ~ U[0, 1] (not shifted) and noise of its own; describe
// the state at some layer by D numbers a sample; fit t as a linear function of them, and see how
// much of t's variance it explains in images that the fit has not seen. Those are of the data set's
// held-out part: if the network was trained on the same data, it has not seen them either. The fit
// is a ridge regression (data/ridge.h).

// 0 to n - 1 in the order of n random numbers.
inline std::vector<size_t> shuffled(size_t n, uint64_t seed, uint64_t stream) {
  std::vector<double> key(n);
  std::vector<size_t> order(n);
  for (size_t i = 0; i < n; ++i) key[i] = uniform(seed, stream, order[i] = i);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return key[a] < key[b]; });
  return order;
}

// What there is to read t off without a network: scalars (b, 5) of each image of z (b, n), which
// are its mean, root mean square, standard deviation, smallest and largest number.
template <class Acc>
void image_scalars(const Device& device, Acc* scalars, const Acc* z, size_t b, size_t n) {
  for_each_team(device, b, threads_for(n), [=] HD(Team team) {
    const Acc* x = z + team.index * n;
    Acc sum = 0, squares = 0, rest = 0, below = -x[0], largest = x[0];
    for (size_t i = team.rank; i < n; i += team.size) {
      sum += x[i], squares += x[i] * x[i];
      below = max_(below, -x[i]), largest = max_(largest, x[i]);
    }
    Acc mean = team.sum(sum) / Acc(n);
    for (size_t i = team.rank; i < n; i += team.size) rest += (x[i] - mean) * (x[i] - mean);
    squares = team.sum(squares), rest = team.sum(rest);
    below = team.max(below), largest = team.max(largest);
    if (team.rank != 0) return;
    Acc* out = scalars + 5 * team.index;
    out[0] = mean, out[1] = std::sqrt(squares / Acc(n)), out[2] = std::sqrt(rest / Acc(n));
    out[3] = -below, out[4] = largest;
  });
}

// A kind of features at a layer, x (n, D) for n samples.
template <class Acc>
struct Features {
  std::string layer, name;
  std::vector<Acc> x;
};

// The time of a sample; its noise has the sample's number too.
HD inline double probe_time(uint64_t seed, size_t sample) {
  return uniform(seed, streams::probe_time, sample);
}

// The scalars of z, then for each layer the image tokens' mean and centered root mean square by
// channel and the text tokens' mean, for every image of `data`. Only these leave the device.
template <class Real>
std::vector<Features<AccOf<Real>>> probe_features(Network<Real>& net, const Dataset& data,
                                                  const std::vector<size_t>& layers,
                                                  uint64_t seed) {
  using Acc = AccOf<Real>;
  Device& device = net.device;
  const Config& m = net.config;
  size_t D = m.width, B = net.batch;
  DeviceData samples;
  Acc *target, *scalars, *means, *spreads;  // (B, C, H, W), (B, 5), twice (B, 2, D)
  Plan memory(&device);
  memory.add("scratch", [&](Carver& c) {
    samples = lay_data(c, m, data.images, data.captions);
    target = c.take<Acc>(B * m.pixels()), scalars = c.take<Acc>(B * 5);
    means = c.take<Acc>(B * 2 * D), spreads = c.take<Acc>(B * 2 * D);
  });
  upload_data(device, samples, data);

  std::vector<Features<Acc>> all = {{"z", "scalars", {}}};
  for (size_t layer : layers)
    for (const char* name : {"image_mean", "image_rms", "text_mean"})
      all.push_back({std::to_string(layer), name, {}});
  for (Features<Acc>& f : all) f.x.reserve(data.images * (f.layer == "z" ? 5 : D));
  for (size_t first = 0; first < data.images; first += B) {
    size_t b = std::min(B, data.images - first);
    auto draw = [=] HD(size_t i) {
      size_t n = first + i;
      return Draw{n, size_t(samples.caption[n]), probe_time(seed, n), n};
    };
    noisy_batch(net, target, samples, b, seed, streams::probe_noise, draw);
    // Rows of `size` numbers, `stride` apart on the device, onto the end of f.
    auto append = [&](Features<Acc>& f, const Acc* from, size_t size, size_t stride) {
      std::vector<Acc> rows = downloaded(device, from, b * stride - (stride - size));
      for (size_t i = 0; i < b; ++i)
        f.x.insert(f.x.end(), &rows[i * stride], &rows[i * stride] + size);
    };
    image_scalars(device, scalars, net.arrays.z, b, m.pixels());
    append(all[0], scalars, 5, 5);
    Features<Acc>* next = &all[1];
    net.forward(b, [&](size_t layer, const Real* X) {
      if (!std::binary_search(layers.begin(), layers.end(), layer)) return;
      Tokens tokens{b, m.image_tokens(), m.text_tokens};
      token_means(device, means, X, tokens, D);
      token_spreads(device, spreads, X, means, tokens, D);
      append(*next++, means, D, 2 * D), append(*next++, spreads, D, 2 * D);
      append(*next++, means + D, D, 2 * D);
    });
  }
  return all;
}

// The samples' images, at random and none twice, in the order of ProbeSplit: as many as are asked
// for; else the usual number, or as many as there are.
inline Dataset probe_images(const ProbeOptions& o) {
  constexpr size_t least = 64;
  auto [train, held_out, shared] = load_dataset(o.data, 2);
  if (shared) held_out = without_images(train);
  // Three quarters of the images are to train on, rounded up.
  size_t most = std::min(4 * held_out.images + 3, train.images * 4 / 3);
  if (most < least)
    fail(
        "%s is too small to probe: it has %zu training and %zu held-out images, expected at least "
        "%zu and %zu",
        o.data.c_str(), train.images, held_out.images, least - least / 4, least / 4);
  size_t count = o.images.value_or(std::min(usual_probe, most));
  if (count < least || count > most)
    fail(
        "--images %zu: it must be at least %zu, and at most %zu with the %zu training and %zu "
        "held-out images of %s",
        count, least, most, train.images, held_out.images, o.data.c_str());
  if (!o.images && count < usual_probe)
    std::printf("%zu images, as many as there are held-out ones for\n", count);
  ProbeSplit split(count);
  Dataset images = without_images(train);
  auto add = [&](const Dataset& from, size_t count) {
    std::vector<size_t> which = shuffled(from.images, o.seed, streams::probe_images);
    which.resize(count);
    append_images(images, from, which);
  };
  add(train, split.fit + split.choose), add(held_out, split.test);
  return images;
}

template <class Real>
int probe(Device& device, const ProbeOptions& o) {
  SafetensorsReader file(o.weights);
  Dataset data = probe_images(o);
  Config m;
  fit_to_data(m, data);
  note_assumed(o.weights, read_config(file, o.weights, m, o.heads, o.norm_eps));
  require_fit(o.data, data, o.weights, m);
  std::vector<size_t> layers = chosen_layers("--layers", o.layers, m.depth);
  double bytes = double(layers.size() * 3 * data.images * m.width * sizeof(AccOf<Real>));
  if (bytes > double(Device().available()))
    fail("the features of %zu layers need %.2f GB: name fewer --layers", layers.size(),
         1e-9 * bytes);
  SafeFile out(o.out);  // better refused now than after the work
  Network<Real> net(device, m, std::min(data.images, o.batch), 0, false);
  load_tensors(file, o.weights, device, net.table, Stored{"", net.weights()});
  auto all = probe_features(net, data, layers, o.seed);

  ProbeSplit split(data.images);
  Labels labels(2);
  for (size_t i = 0; i < data.images; ++i) labels[0].push_back(probe_time(o.seed, i));
  for (size_t i : shuffled(data.images, o.seed, streams::probe_shuffle))
    labels[1].push_back(labels[0][i]);
  std::vector<ProbeRow> rows;
  for (const auto& f : all) {
    for (auto x : f.x)
      if (!std::isfinite(double(x)))
        fail("the states at layer %s hold NaN or infinity: are these trained weights?",
             f.layer.c_str());
    std::vector<Probed> found = fit_and_test(f.x, labels, split);
    rows.push_back({f.layer, f.name, found[0].r2, found[1].r2, found[0].penalty});
  }
  out.write(probe_csv(rows, m, split.fit, split.choose, split.test));
  out.commit();
  std::printf(
      "R^2 of t on %zu held-out images, in brackets with t shuffled; %zu to fit, %zu for the "
      "penalty\n%s%s\n",
      split.test, split.fit, split.choose, probe_table(rows).c_str(), visible(o.out).c_str());
  return 0;
}

// ---------------------------------------------------------------------------------------------
// J. The command line

// Is it the same file by another name, or does it lie in that folder?
inline bool is_or_lies_in(const std::string& file, const std::string& input) {
  std::error_code error;
  if (fs::equivalent(file, input, error)) return true;
  auto canonical = [&](const std::string& path) {
    fs::path p = fs::weakly_canonical(fs::absolute(path, error), error);
    return p.has_filename() ? p : p.parent_path();
  };
  fs::path a = canonical(file), b = canonical(input);
  if (!fs::is_directory(b, error)) return a == b;
  return std::mismatch(b.begin(), b.end(), a.begin(), a.end()).first == b.end();
}

// Fails if what a subcommand writes would take the place of what it reads, or of something else
// than it writes.
inline void check_output(const Subcommand& sub, const GivenOptions& given) {
  const Option* option = sub.find("out");
  if (!option) return;
  const std::string out = option->write();
  if (out.empty()) fail("--out must name a %s", sub.name == "train" ? "folder" : "file");
  std::map<std::string, std::string> inputs;
  if (const Option* data = sub.find("data")) inputs["data"] = data->write();
  for (const char* name : {"weights", "inputs", "config"})  // those of a resumed run are past
    if (given.count(name)) inputs[name] = given.at(name).texts[0];
  Words written = {out};
  if (sub.name == "train")
    for (const char* name : {"weights", "ema", "state", "samples"})
      written.push_back(out + "/" + name + ".safetensors");
  for (const auto& [name, path] : inputs) {
    const std::string input = FashionMnist::folder(path);
    for (const std::string& file : written)
      for (const char* end : {"", ".tmp"})  // SafeFile's
        if (!input.empty() && is_or_lies_in(file + end, input))
          fail("%s would be written over --%s %s, or into it: choose another --out", file.c_str(),
               name.c_str(), path.c_str());
  }
  std::error_code none;
  if (sub.name == "train" || !fs::is_regular_file(out, none) || fs::is_empty(out, none)) return;
  // How an output of the subcommand begins, and which tensor it holds if it is a file of tensors.
  struct Output {
    const char *start, *tensor;
  };
  std::map<std::string, Output> outputs = {{"forward", {nullptr, "velocity"}},
                                           {"sample", {"\x89PNG", "samples"}},
                                           {"validate", {"t,loss\n", nullptr}},
                                           {"probe", {"# The time t,", nullptr}}};
  const Output ours = outputs[sub.name];
  std::optional<SafetensorsReader> tensors;
  try {
    tensors.emplace(out);
  } catch (const Error&) {  // not a file of tensors
  }
  char start[16] = "";
  std::ifstream(out, std::ios::binary).read(start, sizeof start - 1);
  if (tensors ? ours.tensor && tensors->find(ours.tensor)
              : ours.start && std::string(start).rfind(ours.start, 0) == 0)
    return;
  fail("--out %s %s: choose another name, or remove it", out.c_str(),
       tensors ? "holds other tensors" : ("is no output of " + sub.name).c_str());
}

// Parse and run. Returns the exit status: 0, 1 if a check or the training failed, 2 for bad input.
inline int command(int argc, const char* const* argv) {
  CLI::App app{"MV-Split: 1000-layer diffusion transformers with mean-variance split residuals",
               "mvsplit"};
  app.require_subcommand(1);
  TrainOptions train_options, plan_options;
  SampleOptions sample_options;
  ForwardOptions forward_options;
  ProbeOptions probe_options;
  ValidateOptions validate_options;
  GradcheckOptions gradcheck_options;
  DataSizes sizes{60000, 256, 10};
  Machine machine;
  const std::vector<Subcommand> all = {
      add_train(app, train_options, machine),       add_sample(app, sample_options, machine),
      add_forward(app, forward_options, machine),   add_probe(app, probe_options, machine),
      add_validate(app, validate_options, machine), add_gradcheck(app, gradcheck_options, machine),
      add_plan(app, plan_options, sizes, machine)};
  try {
    CommandLine line = read_words(Words(argv + std::min(argc, 1), argv + argc), all);
    if (!line.sub || line.help) {
      std::printf("%s", line.sub ? line.sub->help().c_str() : app.help().c_str());
      return 0;
    }
    auto is = [&](const char* name) { return line.sub->name == name; };
    if (line.sub->find("out")) outlive_console();
    GivenOptions given = line.given;  // the words win
    for (const char* name : {"config", "weights", "inputs"})
      if (given.count(name) && given[name].texts[0].empty()) fail("--%s names no file", name);
    if (given.count("config")) {
      const std::string path = given["config"].texts[0];
      auto sections = read_ini(path, all);
      if (!sections.count(line.sub->name))
        fail("%s has no section [%s]", path.c_str(), line.sub->name.c_str());
      given.merge(sections[line.sub->name]);
    }
    Words missing;
    for (const std::string& name : line.sub->required)
      if (!given.count(name)) missing.push_back("--" + name);
    if (!missing.empty())
      fail("%s needs %s", line.sub->name.c_str(), join_list(missing, " and ").c_str());
    set_options(*line.sub, given);
    // gradcheck has a writer-std of its own, which gives way to what is asked for.
    if (given.count("xavier-gain") && !given.count("writer-std"))
      gradcheck_options.model.writer_std = -1;
    std::error_code ignored;
    GivenOptions kept;  // by the config.ini of a run that goes on
    if (is("train") && train_options.resume &&
        std::filesystem::exists(train_options.out + "/config.ini", ignored))
      kept = set_resumed(*line.sub, all, given, train_options);
    check_output(*line.sub, given);
    if (is("train") || is("gradcheck"))
      refuse_starts(given, is("train") ? train_options.weights : gradcheck_options.weights);
    // A gate that is asked for by hand and not there would be passed over in silence.
    const Config& model = is("gradcheck") ? gradcheck_options.model
                          : is("plan")    ? plan_options.model
                                          : train_options.model;
    for (const std::string& gate : gate_names())
      if (given.count(gate) && !model.has_gate(gate))
        fail("--%s: residual %s has no such gate", gate.c_str(), model.residual.c_str());
    if (is("plan"))
      return machine.with_precision([&](auto t) {
        if (plan_options.data != FashionMnist::about) {
          for (const char* of_data : {"images", "captions", "channels", "height", "image-width",
                                      "text-tokens", "text-dim"})
            if (given.count(of_data))
              fail("--%s is what --data %s has: leave one out", of_data, plan_options.data.c_str());
          Split data = load_dataset(plan_options.data, 0);
          fit_to_data(plan_options.model, data.train);
          sizes.images = data.train.images, sizes.captions = data.train.captions;
          plan_options.val_images = std::min(plan_options.val_images, data.held_out.images);
        }
        check_options(plan_options);
        sizes.held_out = plan_options.val_images;
        plan<decltype(t)>(plan_options, sizes, machine.gpu());
        return 0;
      });
    Device device(machine.gpu());
    if (is("gradcheck")) {
      GradcheckOptions& o = gradcheck_options;
      if (!o.weights.empty()) {
        std::optional<size_t> heads;
        if (given.count("heads")) heads = o.model.heads;
        note_assumed(o.weights,
                     read_config(SafetensorsReader(o.weights), o.weights, o.model, heads));
        set_options(*line.sub, given);  // a smaller image, say
      }
      return gradcheck(device, o);
    }
    if (is("train")) {
      size_t in_use = device.in_use() - Device::workspace_bytes(device.gpu);
      Split data = load_dataset(train_options.data, device.gpu ? 1 : 2);
      TrainOptions& o = train_options;
      fit_to_data(o.model, data.train);
      auto note_all = [&](const char* flag, size_t asked, size_t there) {
        if (given.count(flag) && asked > there)
          std::fprintf(stderr, "note: --%s %zu: there are %zu, and all are taken\n", flag, asked,
                       there);
      };
      note_all("val-images", o.val_images, data.held_out.images);
      note_all("diagnose-samples", o.diagnose_samples, o.batch);
      // What a run began with is in its state and its config.ini.
      bool goes_on =
          !kept.empty() && std::filesystem::exists(o.out + "/state.safetensors", ignored);
      if (!o.weights.empty() && !goes_on) {
        given.merge(kept);
        set_by_weights(*line.sub, given, o);
        require_fit(o.data, data.train, o.weights, o.model);
      }
      check_options(o);
      bool begins = o.weights.empty() && !goes_on;
      if (begins && o.model.residual == "mvsplit" && o.model.depth >= 400 && !given.count("beta"))
        std::fprintf(stderr,
                     "note: beta starts at 1; 400 layers stood higher rates with 1/sqrt(depth), "
                     "here --beta %.2g (data/experiments/RESULTS.md, cure1e3)\n",
                     1 / std::sqrt(double(o.model.depth)));
      return machine.with_precision([&](auto t) {
        return train<decltype(t)>(device, machine, o, std::move(data.train),
                                  std::move(data.held_out), in_use);
      });
    }
    return machine.with_precision([&](auto t) {
      if (is("probe")) return probe<decltype(t)>(device, probe_options);
      if (is("validate")) return validate<decltype(t)>(device, validate_options);
      return is("sample") ? sample<decltype(t)>(device, sample_options)
                          : forward<decltype(t)>(device, forward_options);
    });
  } catch (const Error& e) {
    std::fflush(stdout);  // what led to it comes first, in a file too
    std::fprintf(stderr, "mvsplit: %s\n", e.what());
    return 2;
  } catch (const std::filesystem::filesystem_error& e) {
    std::fprintf(stderr, "mvsplit: cannot use %s: %s\n", visible(e.path1()).c_str(),
                 e.code().message().c_str());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "mvsplit: the memory is used up: use a smaller --batch or model\n");
    return 2;
  }
}

#ifndef MVSPLIT_NO_MAIN  // the tests bring their own
int main(int argc, char** argv) {
  open_console();
  // OpenMP threads that spin while they wait take the processor from each other on a busy machine
  // (up to nine times slower was seen). libgomp reads its policy when it is loaded: set it, and
  // start again.
  if (!std::getenv("OMP_WAIT_POLICY")) {
    setenv("OMP_WAIT_POLICY", "passive", 1);
    execv("/proc/self/exe", argv);
  }
  int status = command(argc, argv);
  // What a command says is all that some make, or a table of it. (train has it in its files.)
  Words words(argv + 1, argv + argc);
  size_t at = subcommand_at(words);
  bool trains = at < words.size() && words[at] == "train";
  if (status == 0 && !trains && (std::fflush(stdout) != 0 || std::ferror(stdout))) {
    std::fprintf(stderr, "mvsplit: the output could not be written: %s\n", std::strerror(errno));
    return 2;
  }
  return status;
}
#endif
