// train_test.cu - training, sampling, checkpoints and the command line, on every device at hand.
//
// What it is: the optimiser and the sampler against plain restatements, runs against each other bit
// for bit, files against what they held, and a table of bad input. What it is not: a test of the
// network's operations (dit_test.cu), or of hostile files (data_test.cu).
// How to read it: the helpers, then one section a section of train.cu.
#define MVSPLIT_NO_MAIN
#include "../train.cu"
#include "check.h"

#include <functional>

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

namespace fs = std::filesystem;

// The names of the files that were flushed to the disk, in order: this takes the place of libc's.
std::vector<std::string> flushed;
extern "C" int fsync(int file) {
  flushed.push_back(fs::read_symlink("/proc/self/fd/" + std::to_string(file)).filename());
  return int(syscall(SYS_fsync, file));
}

namespace {

// test(device, T{}) in each precision, on the CPU and on the GPU if there is one.
template <class Test>
void everywhere(const Test& test) {
  for (int gpu = 0; gpu <= (Device::gpus() > 0); ++gpu) {
    Device device(gpu);
    auto with = [&](auto t) {
      SCOPED_TRACE(device.name + ", " + dtype_name<decltype(t)>());
      test(device, t);
    };
    with(double{}), with(float{}), with(bf16{});
  }
}

// How far two machines or two orders of adding may differ, in parts of the whole.
template <class Real>
constexpr double rounding = std::is_same_v<Real, double>  ? 1e-11
                            : std::is_same_v<Real, float> ? 1e-4
                                                          : 0.03;

template <class Real>
std::vector<Real> from(const Device& device, const Real* data, size_t n) {
  std::vector<Real> host(n);
  device.download(host.data(), data, n * sizeof(Real));
  return host;
}
template <class Real>
Real* put(const Device& device, Slab& slab, const std::vector<Real>& host) {
  device.upload(slab.data, host.data(), host.size() * sizeof(Real));
  return reinterpret_cast<Real*>(slab.data);
}

// |a - b| / |a|
template <class Acc, class B>
double distance(const std::vector<Acc>& a, const std::vector<B>& b) {
  double difference = 0, size = 0;
  EXPECT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(double(a[i]) - double(b[i]), 2);
    size += std::pow(double(a[i]), 2);
  }
  return std::sqrt(difference / size);
}

// Images of 8x8: a caption's own pattern and some noise. Four captions of three tokens.
Dataset synthetic(size_t images = 64) {
  Dataset d;
  d.images = images, d.channels = 1, d.height = d.width = 8;
  d.captions = 4, d.text_tokens = 3, d.text_dim = 5;
  for (size_t n = 0; n < d.images; ++n) {
    d.caption.push_back(int32_t(n % d.captions));
    for (size_t i = 0; i < 64; ++i)
      d.pixels.push_back(
          float(gaussian(1, n % d.captions, i / 4) + 0.1 * gaussian(2, 0, n * 64 + i)));
  }
  for (size_t i = 0; i < 60; ++i) d.text.push_back(float(gaussian(3, 0, i)));
  for (size_t i = 0; i < 15; ++i) d.empty_text.push_back(float(gaussian(3, 1, i)));
  return d;
}

void save_latents(const std::string& path, const Dataset& d) {
  SafetensorsWriter file(path);
  file.declare("latents", "F32", {d.images, d.channels, d.height, d.width});
  file.declare("text", "F32", {d.captions, d.text_tokens, d.text_dim});
  file.declare("empty", "F32", {d.text_tokens, d.text_dim});
  file.declare("caption", "I32", {d.images});
  file.write(d.pixels.data(), d.pixels.size()), file.write(d.text.data(), d.text.size());
  file.write(d.empty_text.data(), d.empty_text.size());
  file.write(d.caption.data(), d.caption.size());
  file.finish();
}

// A test with the data set, as it is and split as a file of it would be, and an empty folder.
class TrainTest : public testing::Test {
 protected:
  TrainTest()
      : all_(synthetic()), data_(split_off(all_).train), held_out_(split_off(all_).held_out) {
    std::string pattern = testing::TempDir() + "/train_test.XXXXXX";
    folder_ = mkdtemp(pattern.data());
  }
  ~TrainTest() override { fs::remove_all(folder_); }

  std::string at(const std::string& name) const { return folder_ + "/" + name; }

  // A small run whose every gradient is alive from the first step.
  TrainOptions options(size_t depth = 4) const {
    TrainOptions o;
    Config& m = o.model;
    m.depth = depth, m.width = 32, m.heads = 2, m.ffn = 64, m.patch = 2;
    m.writer_std = 0.1, m.final_std = 0.1, m.gates = {{"alpha", 0.1}, {"beta", 0.5}};
    fit_to_data(m, data_);
    o.batch = 4, o.optimizer.warmup = 2, o.out = folder_;
    return o;
  }

  // One that a GPU runs on kernels of its own, 67 tokens of two heads of 64, with all that may be.
  TrainOptions wide() const {
    TrainOptions o = options(3);
    o.model.width = 128, o.model.ffn = 192, o.model.patch = 1;
    o.batch = o.accumulate = o.recompute = 2, o.ema = 0.9, o.spike_factor = 0;
    return o;
  }

  // Everything in the folder.
  std::map<std::string, std::string> files() const {
    std::map<std::string, std::string> all;
    for (const auto& entry : fs::recursive_directory_iterator(folder_))
      all[entry.path()] = entry.is_regular_file() ? read_text(entry.path()) : "no file";
    return all;
  }

  Dataset all_, data_, held_out_;
  std::string folder_;
};

// Call f(device, T(), G()) for each device, precision and state of the optimiser.
template <class F>
void every_state(const F& f) {
  everywhere([&](Device& device, auto type) {
    using Real = decltype(type);
    f(device, type, AccOf<Real>());
    if constexpr (std::is_same_v<Real, bf16>) f(device, type, type);
  });
}

// The bits of all that a run can be resumed from.
template <class Real, class G>
std::string bits(Trainer<Real, G>& t) {
  std::string all(reinterpret_cast<char*>(&t.step), sizeof t.step);
  auto add = [&](const auto* data) {
    if (!data) return;
    auto host = from(t.device, data, t.net.table.size);
    all.append(reinterpret_cast<const char*>(host.data()), host.size() * sizeof(host[0]));
  };
  with_state(t, [&](auto... slabs) { (add(slabs.slab), ...); });
  add(t.net.weights());
  return all;
}
template <class Real, class G>
void steps(Trainer<Real, G>& t, size_t n) {
  for (size_t i = 0; i < n; ++i) t.train_step();
}

// ---------------------------------------------------------------------------------------------
// 1. Rectified flow

// Whether d is the gradient of the mean loss at v, in a random direction. The mean square of b
// samples is the mean of their losses.
bool is_loss_gradient(Device& device, const std::vector<double>& d, const std::vector<double>& v,
                      const std::vector<double>& target, size_t b) {
  size_t n = v.size();
  Slab losses(device, b * 8), x(device, n * 8), y(device, n * 8);
  auto loss = [&](double h) {
    std::vector<double> moved = v;
    for (size_t i = 0; i < n; ++i) moved[i] += h * gaussian(9, 9, i);
    double* out = reinterpret_cast<double*>(losses.data);
    flow_loss<double>(device, out, nullptr, put(device, x, moved), put(device, y, target), b, n / b,
                      0);
    double sum = 0;
    for (double l : from(device, out, b)) sum += l / double(b);
    return sum;
  };
  double analytic = 0, h = 1e-2;
  for (size_t i = 0; i < n; ++i) analytic += d[i] * gaussian(9, 9, i);
  double numeric = (loss(-2 * h) - 8 * loss(-h) + 8 * loss(h) - loss(2 * h)) / (12 * h);
  return std::abs(numeric - analytic) <= 1e-8 * std::abs(numeric);
}

template <class Acc>
void check_flow_loss(Device& device) {
  constexpr size_t b = 3, n = 500;
  std::vector<Acc> v, target;
  for (size_t i = 0; i < b * n; ++i)
    v.push_back(Acc(gaussian(1, 1, i))), target.push_back(Acc(gaussian(1, 2, i)));
  Slab x(device, b * n * 8), y(device, b * n * 8), dx(device, b * n * 8), losses(device, b * 8);
  Acc* d = reinterpret_cast<Acc*>(dx.data);
  Acc* l = reinterpret_cast<Acc*>(losses.data);
  flow_loss(device, l, d, put(device, x, v), put(device, y, target), b, n, 1.0 / (b * n));
  std::vector<Acc> gradient = from(device, d, b * n), loss = from(device, l, b);
  for (size_t s = 0; s < b; ++s) {
    double sum = 0;
    for (size_t i = s * n; i < (s + 1) * n; ++i) sum += std::pow(double(v[i]) - target[i], 2);
    EXPECT_NEAR(loss[s], sum / n, rounding<Acc> * 2);
  }
  if constexpr (std::is_same_v<Acc, double>) {
    EXPECT_TRUE(is_loss_gradient(device, gradient, v, target, b));
    struct {
      const char* wrong;
      double factor;
    } table[] = {
        {"the 2 is missing", 0.5}, {"sign", -1}, {"per sample", b}, {"1e-7 off", 1 + 1e-7}};
    for (auto [wrong, factor] : table) {
      std::vector<double> bad = gradient;
      for (double& g : bad) g *= factor;
      EXPECT_FALSE(is_loss_gradient(device, bad, v, target, b)) << wrong;
    }
  } else {
    for (size_t i = 0; i < b * n; ++i)
      ASSERT_NEAR(gradient[i], 2 * (v[i] - target[i]) / (b * n), 1e-8) << i;
  }
}

TEST(Flow, LossAndItsGradient) {
  for (int gpu = 0; gpu <= (Device::gpus() > 0); ++gpu) {
    Device device(gpu);
    SCOPED_TRACE(device.name);
    check_flow_loss<double>(device), check_flow_loss<float>(device);
  }
}

TEST(Flow, ShiftTimeSpendsMoreOnNoise) {
  for (double t : {0.0, 0.3, 1.0}) EXPECT_EQ(shift_time(t, 1), t);
  EXPECT_EQ(shift_time(0, 4), 0);
  EXPECT_EQ(shift_time(1, 4), 1);
  EXPECT_DOUBLE_EQ(shift_time(0.5, 4), 0.8);
}

// z = (1 - t) x0 + t x1 and target = x0 - x1 give z = x0 - t target: the batch alone tells which
// image, time, noise and caption each of its places got.
TEST_F(TrainTest, BatchesAreWhatTheyShouldBe) {
  everywhere([&](Device& device, auto type) {
    using Real = decltype(type);
    TrainOptions o = options(1);
    o.batch = 60, o.time_shift = 4;
    Trainer<Real> t(device, o, data_, held_out_);
    constexpr size_t rounds = 50;
    const double n = double(rounds * o.batch);
    std::vector<double> images(data_.images), times(10);
    std::vector<double> joint(16);  // of image, time, noise and caption, each one of two kinds
    std::set<std::pair<double, double>> noises;  // two numbers of each place's
    double dropped = 0, mean = 0, square = 0;
    for (size_t round = 0; round < rounds; ++round) {
      t.set_step(round);
      draw_training_batch(t.net, t.a, t.train, o);
      auto z = from(device, t.net.arrays.z, o.batch * 64);
      auto target = from(device, t.a.target, o.batch * 64);
      auto text = from(device, t.net.arrays.text, o.batch * 15);
      for (size_t i = 0; i < o.batch; ++i) {
        size_t image = data_.images;
        double time = 0;
        for (size_t k = 0; k < data_.images && image == data_.images; ++k) {
          double up = 0, down = 0, rest = 0;
          for (size_t p = 0; p < 64; ++p) {
            double g = double(target[i * 64 + p]);
            up += (data_.pixels[k * 64 + p] - double(z[i * 64 + p])) * g, down += g * g;
          }
          time = up / down;
          for (size_t p = 0; p < 64; ++p)
            rest += std::abs(data_.pixels[k * 64 + p] - time * double(target[i * 64 + p]) -
                             double(z[i * 64 + p]));
          if (rest < 1e-4) image = k;
        }
        ASSERT_LT(image, data_.images) << "no image of the data set is behind place " << i;
        ASSERT_TRUE(time >= 0 && time < 1) << time;
        double drawn = time / (4 - 3 * time);  // the shift undone
        ++images[image], ++times[size_t(10 * drawn)];
        for (size_t p = 0; p < 64; ++p) {
          double x1 = data_.pixels[image * 64 + p] - double(target[i * 64 + p]);
          mean += x1 / n / 64, square += x1 * x1 / n / 64;
        }
        noises.insert({double(target[i * 64]), double(target[i * 64 + 1])});
        const float* caption = &data_.text[size_t(data_.caption[image]) * 15];
        bool empty = float(text[i * 15]) == float(Real(data_.empty_text[0]));
        for (size_t w = 0; w < 15; ++w)
          ASSERT_EQ(float(text[i * 15 + w]), float(Real(empty ? data_.empty_text[w] : caption[w])));
        dropped += empty;
        bool noise_is_positive = data_.pixels[image * 64] > double(target[i * 64]);
        bool kinds[] = {2 * image < data_.images, (drawn < 0.5), noise_is_positive, empty};
        ++joint[size_t(kinds[0] + 2 * kinds[1] + 4 * kinds[2] + 8 * kinds[3])];
      }
    }
    auto chi_square = [&](const std::vector<double>& counts, const auto& share) {
      double sum = 0, others = double(counts.size() - 1);
      for (size_t i = 0; i < counts.size(); ++i)
        sum += std::pow(counts[i] - n * share(i), 2) / (n * share(i));
      return (sum - others) / std::sqrt(2 * others);
    };
    EXPECT_LT(std::abs(chi_square(images, [&](size_t) { return 1 / double(images.size()); })), 4)
        << "images are drawn evenly";
    EXPECT_LT(std::abs(chi_square(times, [](size_t) { return 0.1; })), 4)
        << "times are uniform before the shift";
    EXPECT_LT(std::abs(chi_square(joint, [](size_t i) { return (i < 8 ? 0.9 : 0.1) / 8; })), 4)
        << "all are independent";
    EXPECT_EQ(double(noises.size()), n) << "no place of any pass has another's noise";
    EXPECT_NEAR(dropped / n, 0.1, 4 * std::sqrt(0.1 * 0.9 / n));
    EXPECT_NEAR(mean, 0, 4 / std::sqrt(64 * n));
    EXPECT_NEAR(square, 1, 4 * std::sqrt(2 / (64 * n)));
  });
}

// Weights and all that a batch is made of. The images are black and each has a caption of its own,
// so that the target is the noise, and the caption tells the image.
TEST_F(TrainTest, ASeedIsForAllThatIsDrawn) {
  everywhere([&](Device& device, auto type) {
    using Real = decltype(type);
    Dataset black = data_;
    black.captions = black.images, black.text.clear();
    std::fill(black.pixels.begin(), black.pixels.end(), 0.f);
    for (size_t i = 0; i < black.images; ++i) {
      black.caption[i] = int32_t(i);
      black.text.insert(black.text.end(), 15, float(i));
    }
    black.empty_text.assign(15, -1.f);
    using Numbers = std::vector<double>;
    auto drawn = [&](uint64_t seed) {
      TrainOptions o = options(1);
      o.batch = 60, o.seed = seed, o.dropout = 0;
      Trainer<Real> t(device, o, black, held_out_);
      std::map<std::string, Numbers> all;
      auto keep = [&](const char* what, const auto& x) { all[what] = {x.begin(), x.end()}; };
      keep("weights", from(device, t.a.master.own, t.net.table.size));
      draw_training_batch(t.net, t.a, t.train, o);
      auto target = from(device, t.a.target, o.batch * 64);
      auto z = from(device, t.net.arrays.z, o.batch * 64);
      keep("noise", target);
      for (size_t i = 0; i < o.batch; ++i)
        all["times"].push_back(std::round(1e4 * double(z[i * 64]) / double(target[i * 64])));
      auto text = [&] {
        std::vector<Real> words = from(device, t.net.arrays.text, o.batch * 15);
        Numbers first;
        for (size_t i = 0; i < o.batch; ++i) first.push_back(double(words[i * 15]));
        return first;
      };
      keep("images", text());
      o.dropout = 0.5;
      draw_training_batch(t.net, t.a, t.train, o);
      for (double word : text()) all["dropped"].push_back(word < 0);
      return all;
    };
    auto one = drawn(1), same = drawn(1), other = drawn(2);
    EXPECT_EQ(one.size(), 5u);
    for (const auto& [what, numbers] : one) {
      EXPECT_EQ(same.at(what), numbers) << what;
      EXPECT_NE(other.at(what), numbers) << what;
    }
  });
}

// The images to validate on are spread over all that are held out, and times over [0, 1]; the noise
// is the same in every run, and none that is trained on. A network that answers 0 is off by v.
TEST_F(TrainTest, ValidationIsOnImagesAndTimesSpreadEvenly) {
  everywhere([&](Device& device, auto type) {
    using Real = decltype(type);
    TrainOptions o = options(1);
    o.val_images = o.batch = 32, o.time_shift = 4, o.seed = 5, o.model.final_std = 0;
    Trainer<Real> t(device, o, data_, all_);
    double squares = 0;
    draw_validation_batch(t.net, t.a.target, t.held_out, o.time_shift, 0, o.batch);
    auto z = from(device, t.net.arrays.z, o.batch * 64);
    auto target = from(device, t.a.target, o.batch * 64);
    std::vector<double> times;
    for (size_t i = 0; i < o.batch; ++i) {
      const float* image = &all_.pixels[i * all_.images / o.batch * 64];
      double up = 0, down = 0;
      for (size_t p = 0; p < 64; ++p) {
        double g = double(target[i * 64 + p]);
        up += (image[p] - double(z[i * 64 + p])) * g, down += g * g;
      }
      double time = up / down;
      for (size_t p = 0; p < 64; ++p)
        ASSERT_NEAR(image[p] - time * double(target[i * 64 + p]), z[i * 64 + p], 1e-4) << i;
      for (size_t p = 0; p < 64; ++p) {
        double v = image[p] - gaussian(1, streams::validation_noise, i * 64 + p);
        ASSERT_NEAR(target[i * 64 + p], v, 1e-5) << i;
        squares += v * v;
      }
      times.push_back(time / (4 - 3 * time));  // the shift undone
      double golden = (std::sqrt(5.0) - 1) / 2, whole;
      EXPECT_NEAR(times[i], std::modf((double(i) + 0.5) * golden, &whole), 1e-4) << i;
    }
    EXPECT_NEAR(t.validate(), squares / 32 / 64, 1e-5);
    // The loss of a network that answers hangs on the times.
    o.model.final_std = 0.3;
    Trainer<Real> alive(device, o, data_, all_);
    auto loss = [&](double shift) {
      draw_validation_batch(alive.net, alive.a.target, alive.held_out, shift, 0, o.batch);
      alive.net.forward(o.batch);
      auto velocity = from(device, alive.net.arrays.velocity, o.batch * 64);
      auto target = from(device, alive.a.target, o.batch * 64);
      double sum = 0;
      for (size_t i = 0; i < o.batch * 64; ++i)
        sum += std::pow(double(velocity[i]) - double(target[i]), 2) / double(o.batch * 64);
      return sum;
    };
    EXPECT_NEAR(alive.validate(), loss(4), 1e-5 * loss(4));
    EXPECT_GT(std::abs(loss(1) - loss(4)), 1e-3) << "the check is blind";
    std::sort(times.begin(), times.end());
    for (size_t i = 0; i < o.batch; ++i) EXPECT_NEAR(times[i], (double(i) + 0.5) / 32, 2.0 / 32);
  });
}

// ---------------------------------------------------------------------------------------------
// 2. AdamW

// Linear maps start as PyTorch's do: uniform up to one over the root of what is summed; a bias as
// its weight. No two tensors start with the same numbers.
TEST(Table, LinearMapsStartByWhatTheySumAndEachAnew) {
  Config c;
  c.depth = 2, c.width = 16, c.heads = 2, c.ffn = 24, c.channels = 2, c.patch = 2, c.text_dim = 5;
  c.writer_std = 0.1, c.final_std = 0.2;
  Table table = parameter_table(c);
  std::vector<double> values(table.size);
  initialise(*devices()[0], table, Master<double, double>{values.data(), values.data()}, nullptr,
             1);
  std::set<double> first;
  size_t drawn = 0;
  for (const Parameter& p : table.parameters) {
    if (p.init == Init::constant) continue;
    ++drawn, first.insert(values[p.offset] / p.scale);
    if (p.init == Init::normal) continue;
    size_t summed = p.shape.size() > 1 ? p.count() / p.shape[0] : c.patch_dim();
    EXPECT_DOUBLE_EQ(p.scale, 1 / std::sqrt(double(summed))) << p.name;
    auto begin = values.begin() + ptrdiff_t(p.offset), end = begin + ptrdiff_t(p.count());
    EXPECT_GT(*std::max_element(begin, end), 0.8 * p.scale) << p.name;
    EXPECT_LT(*std::max_element(begin, end), p.scale) << p.name;
    EXPECT_LT(*std::min_element(begin, end), -0.8 * p.scale) << p.name;
    EXPECT_GE(*std::min_element(begin, end), -p.scale) << p.name;
  }
  EXPECT_EQ(first.size(), drawn);
  EXPECT_EQ(drawn, 3u + 2 * 6 + 1);
}

TEST(AdamW, ChunksCoverEachParameterOnce) {
  for (const Residual& residual : residuals) {
    Config c;
    c.depth = 3, c.residual = residual.name;
    Table table = parameter_table(c);
    std::vector<int> covered(table.size), matrix(table.size, -1);
    for (const Parameter& p : table.parameters) {
      std::string end = p.name.substr(p.name.rfind('.') + 1);
      for (size_t i = 0; i < p.count(); ++i) matrix[p.offset + i] = end == "weight";
    }
    EXPECT_EQ(chunks_of(table).size(), count_chunks(table));
    for (const Chunk& chunk : chunks_of(table)) {
      const Parameter& p = table.parameters.at(chunk.parameter);
      EXPECT_TRUE(chunk.begin >= p.offset && chunk.begin + chunk.count <= p.offset + p.count());
      for (size_t i = chunk.begin; i < chunk.begin + chunk.count; ++i) {
        ++covered.at(i);
        ASSERT_EQ(chunk.decays, matrix[i] == 1) << residual.name << " element " << i;
      }
    }
    for (size_t i = 0; i < table.size; ++i) ASSERT_EQ(covered[i], matrix[i] >= 0) << i;
  }
}

// With --fix a gate keeps its initial value and its gradient is not part of the norm; all else
// moves. Unlike names must not match: LayerScale's and ReZero's gates are both lambda.
TEST_F(TrainTest, FixedGatesKeepTheirValuesAndStayOutOfTheNorm) {
  struct {
    const char* residual;
    std::set<std::string> fix;
    const char* ends;  // of the fixed parameters' names
  } rows[] = {{"mvsplit", {"alpha"}, ".alpha"},
              {"mvsplit", {"beta"}, ".beta"},
              {"mvsplit-ffn", {"alpha", "beta"}, "norm2.alpha norm2.beta"},
              {"mvsplit-noleak", {}, ""},
              {"layerscale", {"lambda"}, "layerscale1 layerscale2"},
              {"rezero", {"lambda"}, "rezero1 rezero2"}};
  every_state([&](Device& device, auto type, auto kept) {
    using Acc = AccOf<decltype(type)>;
    for (const auto& row : rows) {
      SCOPED_TRACE(std::string(row.residual) + row.ends);
      TrainOptions o = options();
      o.model.residual = row.residual, o.model.gates["lambda"] = 0.5, o.model.fix = row.fix,
      o.ema = 0.9;
      Trainer<decltype(type), decltype(kept)> t(device, o, data_, held_out_);
      const Table& table = t.net.table;
      std::vector<Acc> first = from(device, t.a.average, table.size);
      steps(t, 1);
      auto g = from(device, t.net.gradients(), table.size);
      auto w = from(device, t.net.weights(), table.size);
      std::vector<Acc> average = from(device, t.a.average, table.size);
      double moving = 0, fixed = 0;
      for (const Parameter& p : table.parameters) {
        std::istringstream ends(row.ends);
        bool is_fixed = false;
        for (std::string end; ends >> end;)
          is_fixed |= p.name.size() > end.size() &&
                      p.name.compare(p.name.size() - end.size(), end.size(), end) == 0;
        bool moved = false;
        for (size_t i = p.offset; i < p.offset + p.count(); ++i) {
          (is_fixed ? fixed : moving) += double(g[i]) * double(g[i]);
          moved |= average[i] != first[i];
          if (is_fixed) {
            EXPECT_EQ(double(w[i]), double(decltype(type)(first[i]))) << p.name;
          }
        }
        EXPECT_EQ(moved, !is_fixed) << p.name;
      }
      double norm = t.history(0)[0].norm;
      EXPECT_NEAR(norm / std::sqrt(moving), 1, 1e-5);
      if (row.fix.empty()) continue;
      EXPECT_GT(std::abs(norm / std::sqrt(moving + fixed) - 1), 1e-5) << "the check is blind";
    }
  });
}

TEST_F(TrainTest, AStepIsClippedAsAsked) {
  Device cpu;
  for (double clip : {0.0, 1e-3, 0.02, 1e3}) {
    TrainOptions o = options();
    o.optimizer.clip = clip;
    Trainer<float> t(cpu, o, data_, held_out_);
    steps(t, 1);
    double norm = t.history(0)[0].norm, most = clip > 0 ? clip / (norm + 1e-6) : 1;
    EXPECT_TRUE(norm > 0.03 && norm < 900) << norm;
    EXPECT_DOUBLE_EQ(from(cpu, t.a.clock, 1)[0].clip_scale, std::min(most, 1.0)) << clip;
  }
}

// A table of a matrix and a vector, with a gap between them and more than one chunk.
Table two_parameters() {
  Table table;
  table.parameters = {{"w.weight", {150, 120}, Init::normal, 1, 0},
                      {"b", {50}, Init::normal, 1, 18016}};
  table.size = 18080;
  return table;
}

template <class Real, class Kept>
using MovedBy = Moved<AdamW, Master<Real, Kept>, Kept>;

struct PlainAdam {
  std::vector<long double> w, m, v, average;

  // Step s of `steps` with gradients g, by the formula above AdamW; returns the gradient's norm.
  double step(const Table& table, const std::vector<double>& g, int s, int steps,
              const Optimizer& o, double ema) {
    long double norm = 0;
    for (const Parameter& p : table.parameters)
      for (size_t i = p.offset; i < p.offset + p.count(); ++i) norm += (long double)g[i] * g[i];
    norm = std::sqrt(norm);
    long double clip = o.clip > 0 ? std::min(1.0L, o.clip / (norm + 1e-6L)) : 1;  // as PyTorch's
    long double lr = s < int(o.warmup) ? o.lr * s / (long double)o.warmup : o.lr;
    if (s > steps - int(o.decay_steps)) lr *= (steps + 1 - s) / (long double)o.decay_steps;
    for (const Parameter& p : table.parameters)
      for (size_t i = p.offset; i < p.offset + p.count(); ++i) {
        m[i] = o.beta1 * m[i] + (1 - (long double)o.beta1) * clip * g[i];
        v[i] = o.beta2 * v[i] + (1 - (long double)o.beta2) * clip * clip * g[i] * g[i];
        long double mhat = m[i] / (1 - std::pow((long double)o.beta1, s));
        long double vhat = v[i] / (1 - std::pow((long double)o.beta2, s));
        long double decay = p.shape.size() >= 2 ? o.decay * w[i] : 0;
        w[i] -= lr * (mhat / (std::sqrt(vhat) + o.eps) + decay);
        average[i] += std::max(1 - (long double)ema, 10 / (s + 9.0L)) * (w[i] - average[i]);
      }
    return double(norm);
  }
};

template <class Real, class G>
void check_adamw(Device& device, double clip) {
  using Acc = AccOf<Real>;
  constexpr bool lean = Master<Real, G>::lean;
  Table table = two_parameters();
  std::vector<Chunk> chunks = chunks_of(table);
  ASSERT_EQ(chunks.size(), 3u);
  size_t n = table.size, count = chunks.size();
  Optimizer o;
  o.warmup = 7, o.decay_steps = 6, o.clip = clip, o.lr = 0.01;
  constexpr int steps = 20;
  constexpr double ema = 0.4;  // of more than the last tenth of the steps from step 8 on
  // Lean moments are rounded stochastically by up to a gap of bf16, 0.8%, and remember some ten
  // roundings: a step of lr is off by a few percent of itself, and twenty of them by a fifth of
  // one.
  constexpr double tolerance = lean ? 2e-3 : std::is_same_v<Acc, double> ? 1e-12 : 1e-5;
  // Zeros up to a tensor's last quad; in the gap after it NaN: nobody may look.
  std::vector<Acc> start(n, Acc(NAN));
  std::vector<G> zeros(n, G(0));
  for (const Parameter& p : table.parameters)
    for (size_t i = 0; i < round_up(p.count(), 4); ++i)
      start[p.offset + i] = i < p.count() ? Acc(gaussian(1, 1, p.offset + i)) : Acc(0);
  PlainAdam plain{{start.begin(), start.end()},
                  std::vector<long double>(n),
                  std::vector<long double>(n),
                  {start.begin(), start.end()}};
  Slab w(device, n * 8), ma(device, n * 8), m(device, n * 8), v(device, n * 8), e(device, n * 8),
      g(device, n * 8), ch(device, count * sizeof(Chunk)), pa(device, count * 8),
      cl(device, sizeof(Clock)), hi(device, records * sizeof(Record)), lo(device, 4 * 8);
  Master<Real, G> master{reinterpret_cast<Real*>(w.data), nullptr};
  master.own = reinterpret_cast<decltype(master.own)>(ma.data);
  std::vector<Real> nearest;
  std::vector<std::remove_pointer_t<decltype(master.own)>> own;
  for (Acc x : start) {
    if constexpr (lean)
      nearest.push_back(split(x).nearest), own.push_back(split(x).rest);
    else
      nearest.push_back(Real(x)), own.push_back(x);
  }
  put(device, w, nearest), put(device, ma, own);
  G *dm = put(device, m, zeros), *dv = put(device, v, zeros);
  Acc* average = put(device, e, start);
  const Acc* losses = put(device, lo, std::vector<Acc>{1, 2, 3, 6});
  Chunk* dchunks = put(device, ch, chunks);
  Clock* clock = put(device, cl, std::vector<Clock>(1));
  Record* history = reinterpret_cast<Record*>(hi.data);
  for (int s = 1; s <= steps; ++s) {
    std::vector<G> gradient(n, G(NAN));
    for (const Parameter& p : table.parameters)
      for (size_t i = 0; i < round_up(p.count(), 4); ++i)  // of norm 0.26 to 4.2
        gradient[p.offset + i] =
            i < p.count() ? G(std::exp2(s % 5 - 9) * gaussian(2, uint64_t(s), p.offset + i)) : G(0);
    const G* dg = put(device, g, gradient);
    begin_step(device, clock, o, steps, ema);
    gradient_norm(device, clock, reinterpret_cast<double*>(pa.data), dg, dchunks, count, o.clip);
    AdamW::update(device,
                  MovedBy<Real, G>{master,
                                   {dm, dv},
                                   average,
                                   dg,
                                   clock,
                                   dchunks,
                                   count,
                                   {1, streams::moment_rounding, &clock->step},
                                   {1, streams::average_rounding, &clock->step}},
                  o);
    end_step(device, clock, history, losses, 4);
    double norm = plain.step(table, {gradient.begin(), gradient.end()}, s, steps, o, ema);
    Record r = from(device, history, records)[size_t(s - 1)];
    EXPECT_NEAR(r.norm, norm, 1e-5 * norm) << "step " << s;
    EXPECT_NEAR(r.lr, s < 7 ? 0.01 * s / 7 : s < 15 ? 0.01 : 0.01 * (21 - s) / 6, 1e-16);
    EXPECT_EQ(r.loss, 3);
    EXPECT_EQ(from(device, clock, 1)[0].step, uint64_t(s));
    auto got_e = from(device, average, n);
    nearest = from(device, master.weights, n), own = from(device, master.own, n);
    for (const Parameter& p : table.parameters)
      for (size_t i = p.offset; i < p.offset + p.count(); ++i) {
        Acc got;
        if constexpr (lean)
          got = join({nearest[i], own[i]});
        else
          got = own[i];
        ASSERT_NEAR(got, double(plain.w[i]), tolerance) << p.name << " step " << s;
        ASSERT_NEAR(got_e[i], double(plain.average[i]), tolerance) << p.name << " step " << s;
        ASSERT_EQ(float(nearest[i]), lean ? float(split(float(got)).nearest) : float(Real(got)));
      }
  }
  if constexpr (!lean) {  // 1 - 0.999 in float would be off by 1.3e-5 of itself
    std::vector<G> got = from(device, dv, n);
    for (const Parameter& p : table.parameters)
      for (size_t i = p.offset; i < p.offset + p.count(); ++i)
        ASSERT_NEAR(got[i] / double(plain.v[i]), 1, 3e-6) << p.name;
  }
  EXPECT_EQ(double(nearest[18066]), 0) << "what a quad reads behind a tensor stays zero";
}

TEST(AdamW, FollowsThePlainFormula) {
  every_state([](Device& device, auto type, auto kept) {
    for (double clip : {1.0, 0.0}) check_adamw<decltype(type), decltype(kept)>(device, clip);
  });
}

// 2.1 The lean state

void next_pass(const Device& device, uint64_t* pass) {
  for_each(device, 1, [=] HD(size_t) { ++*pass; });
}

// A float, its two halves, and what the nearest bf16 must be.
// Weights that stand still and an average that is 1e-3 short of them, at a rate of 1e-5: each step
// is a sixth of half a gap between floats, and all of them would be lost by rounding to nearest.
TEST(AdamW, TheAverageDoesNotFreeze) {
  for (Device* device : devices()) {
    Table table = two_parameters();
    std::vector<Chunk> chunks = chunks_of(table);
    size_t n = table.size;
    std::vector<float> zeros(n, 0), ones(n, 1), above(n, 1.001f);
    Slab w(*device, n * 4), g(*device, n * 4), m(*device, n * 4), v(*device, n * 4),
        e(*device, n * 4), ch(*device, chunks.size() * sizeof(Chunk)), cl(*device, sizeof(Clock));
    float *weights = put(*device, w, above), *average = put(*device, e, ones);
    float *dm = put(*device, m, zeros), *dv = put(*device, v, zeros), *dg = put(*device, g, zeros);
    Chunk* dchunks = put(*device, ch, chunks);
    Clock late{};
    late.step = 10'000'000;
    Clock* clock = put(*device, cl, std::vector<Clock>{late});
    Optimizer o;
    o.lr = 0;
    constexpr double ema = 0.99999;
    constexpr int count = 2000;
    for (int s = 0; s < count; ++s) {
      begin_step(*device, clock, o, 0, ema);
      AdamW::update(*device,
                    MovedBy<float, float>{{weights, weights},
                                          {dm, dv},
                                          average,
                                          dg,
                                          clock,
                                          dchunks,
                                          chunks.size(),
                                          {},
                                          {1, streams::average_rounding, &clock->pass}},
                    o);
      next_pass(*device, &clock->pass);
    }
    double want = 1e-3 * (1 - std::pow(ema, count)), mean = 0;
    std::vector<float> got = from(*device, average, n);
    for (const Parameter& p : table.parameters)
      for (size_t i = p.offset; i < p.offset + p.count(); ++i)
        mean += (double(got[i]) - 1) / double(table.count());
    EXPECT_NEAR(mean / want, 1, 0.01) << device->name;
  }
}

TEST(Lean, AFloatIsTheNearestBf16AndTheRest) {
  struct {
    uint32_t bits, nearest;
    const char* what;
  } rows[] = {
      {0x00000000, 0x0000, "zero"},
      {0x80000000, 0x8000, "minus zero"},
      {0x3f800000, 0x3f80, "one"},
      {0x3f807fff, 0x3f80, "just under a tie"},
      {0x3f808000, 0x3f81, "a tie above an even number: the larger magnitude"},
      {0x3f818000, 0x3f82, "a tie above an odd number"},
      {0xbf808000, 0xbf81, "a negative tie"},
      {0x3fffffff, 0x4000, "a carry into the exponent"},
      {0xbfff8000, 0xc000, "a negative one"},
      {0x00000001, 0x0000, "the smallest subnormal"},
      {0x00008000, 0x0001, "a subnormal tie"},
      {0x807fffff, 0x8080, "from the largest subnormal to a normal number"},
      {0x7f7f7fff, 0x7f7f, "the largest that stays finite"},
      {0x7f7fffff, 0x7f80, "the largest float: to infinity, and back"},
      {0x7f800000, 0x7f80, "infinity"},
      {0xff800000, 0xff80, "minus infinity"},
  };
  auto as_float = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  auto as_bits = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
  };
  for (const auto& row : rows) {
    Halves h = split(as_float(row.bits));
    EXPECT_EQ(h.nearest.bits, row.nearest) << row.what;
    EXPECT_EQ(as_bits(join(h)), row.bits) << row.what;
  }
  for (uint32_t nan : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    Halves h = split(as_float(nan));
    EXPECT_TRUE(std::isnan(float(h.nearest)) && std::isnan(join(h)));
  }
  for (uint64_t bits = 0; bits <= 0xffffffffu; bits += 251) {  // 17 million, of all kinds
    float x = as_float(uint32_t(bits));
    if (std::isnan(x)) continue;
    Halves h = split(x);
    ASSERT_EQ(as_bits(join(h)), bits);
    // Not nearest to even, so a tie may differ; nothing else does.
    ASSERT_TRUE(h.nearest.bits == bf16(x).bits || (bits & 0xffffu) == 0x8000u) << bits;
  }
}

// The same random updates of weights in two halves and of floats.
void update_both(const Device& device, Master<bf16, bf16> halves, float* whole, size_t n,
                 size_t updates) {
  for_each(device, n / 4, [=] HD(size_t i) {
    uint32_t random = uint32_t(i) * 2654435761u + 1;
    for (size_t k = 0; k < updates; ++k) {
      Quad<float> a = halves.get(4 * i), b = load<float>(whole + 4 * i);
      for (int j = 0; j < 4; ++j) {
        random = random * 1664525u + 1013904223u;
        // Up to a 32nd of the weight, and in every 16th update its sign.
        float change = (float(random >> 8) * 0x1p-23f - 1.f) * 0x1p-5f;
        float factor = random >> 28 == 0 ? -1.f : 1.f;
        a[j] = factor * fmaf(change, a[j], a[j]), b[j] = factor * fmaf(change, b[j], b[j]);
      }
      halves.set(4 * i, a), store(whole + 4 * i, b);
    }
  });
}

// 10^8 of them.
TEST(Lean, AHundredMillionUpdatesAreThoseOfAFloat) {
  for (Device* device : devices()) {
    constexpr size_t n = 1 << 14, updates = 6104;
    std::vector<float> start(n);
    for (size_t i = 0; i < n; ++i) start[i] = float(std::exp2(double(i % 60) - 50));
    std::vector<bf16> nearest;
    std::vector<int16_t> rest;
    for (float x : start) nearest.push_back(split(x).nearest), rest.push_back(split(x).rest);
    Slab w(*device, n * 2), r(*device, n * 2), f(*device, n * 4);
    Master<bf16, bf16> halves{put(*device, w, nearest), put(*device, r, rest)};
    float* whole = put(*device, f, start);
    update_both(*device, halves, whole, n, updates);
    nearest = from(*device, halves.weights, n), rest = from(*device, halves.own, n);
    std::vector<float> want = from(*device, whole, n);
    size_t moved = 0;
    for (size_t i = 0; i < n; ++i) {
      float got = join({nearest[i], rest[i]});
      ASSERT_EQ(std::memcmp(&got, &want[i], 4), 0) << i;
      moved += want[i] != start[i];
    }
    EXPECT_GT(moved, n - n / 100);
  }
}

// v = 0.999 v + 0.001 g^2 from v = 1, three thousand steps: towards 2, and towards 0. A mean over
// 4096 weights, of v as AdamW keeps it and of v rounded to nearest.
TEST(Lean, SecondMomentsMoveWhereNearestRoundingFreezesThem) {
  for (Device* device : devices())
    for (double g2 : {2.0, 0.0}) {
      constexpr size_t n = 4096, steps = 3000;
      Table table;
      table.parameters = {{"w", {n}, Init::constant, 1, 0}}, table.size = n;
      std::vector<Chunk> chunks = chunks_of(table);
      Slab w(*device, n * 2, 0), r(*device, n * 2, 0), m(*device, n * 2, 0), v(*device, n * 2),
          g(*device, n * 2), ch(*device, sizeof(Chunk)), cl(*device, sizeof(Clock));
      Master<bf16, bf16> master{reinterpret_cast<bf16*>(w.data),
                                reinterpret_cast<int16_t*>(r.data)};
      bf16* dv = put(*device, v, std::vector<bf16>(n, bf16(1)));
      bf16 root = bf16(float(std::sqrt(g2))), nearest = bf16(1);
      bf16* dg = put(*device, g, std::vector<bf16>(n, root));
      Chunk* dchunks = put(*device, ch, chunks);
      Clock* clock = put(*device, cl, std::vector<Clock>{{0, 0, 0, 1, 1, 0, 0, 1}});
      Optimizer o;
      double exact = 1;
      for (size_t s = 0; s < steps; ++s) {
        AdamW::update(*device,
                      MovedBy<bf16, bf16>{master,
                                          {reinterpret_cast<bf16*>(m.data), dv},
                                          nullptr,
                                          dg,
                                          clock,
                                          dchunks,
                                          1,
                                          {1, streams::moment_rounding, &clock->pass},
                                          {}},
                      o);
        next_pass(*device, &clock->pass);
        float square = float(root) * float(root);
        nearest = bf16(0.999f * float(nearest) + 0.001f * square);
        exact = 0.999 * exact + 0.001 * double(square);
      }
      double mean = 0;
      for (bf16 x : from(*device, dv, n)) mean += double(x) / n;
      EXPECT_NEAR(mean, exact, 0.01 * exact) << "g^2 = " << g2;
      EXPECT_EQ(float(nearest), 1.f) << "if this moves, stochastic rounding is not needed";
      EXPECT_GT(std::abs(exact - 1), 0.9);
    }
}

// <a, b> / |a| |b| of rounding errors: 0 where they share no bits, and 0.5 or so where they do.
double correlation(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0) /
         std::sqrt(std::inner_product(a.begin(), a.end(), a.begin(), 0.0) *
                   std::inner_product(b.begin(), b.end(), b.begin(), 0.0));
}

// A draw is for eight numbers, four in each half, or for four that become floats.
template <class To, class From>
void check_draws(int halves, double step) {
  constexpr size_t n = 1 << 14;
  uint64_t pass = 3;
  Dither dither{1, streams::moment_rounding, &pass};
  std::vector<std::vector<double>> errors(size_t(halves * 4));
  for (size_t i = 0; i < n; ++i)
    for (int half = 0; half < halves; ++half) {
      Quad<To> rounded;
      Quad<From> x{{From(1 + step), From(1 + 2 * step), From(1 + 3 * step), From(1 + 4 * step)}};
      store_stochastically(rounded.v, x, dither(i), half);
      for (int k = 0; k < 4; ++k)
        errors[size_t(4 * half + k)].push_back(double(rounded[k]) - double(x[k]));
    }
  for (size_t a = 0; a < errors.size(); ++a)
    for (size_t b = 0; b < a; ++b)
      EXPECT_LT(std::abs(correlation(errors[a], errors[b])), 0.04)  // 5 standard deviations
          << a << " and " << b << " of " << dtype_name<To>();
}
TEST(Lean, RoundingsOfADrawAreIndependent) {
  check_draws<bf16, float>(2, 1e-3), check_draws<float, double>(1, 1e-8);
}

// With the largest of payloads: one bit more and they would be zero.
TEST(Lean, InfinityAndNaNStayWhatTheyAre) {
  uint32_t quiet = 0x7fffffff;
  uint64_t wide = 0x7fffffffffffffff;
  float nan;
  double wide_nan;
  std::memcpy(&nan, &quiet, 4), std::memcpy(&wide_nan, &wide, 8);
  for (uint32_t random : {0u, 1u, 0xffffu, 0xffffffffu}) {
    for (float sign : {1.f, -1.f}) {
      EXPECT_EQ(float(round_stochastically(sign * INFINITY, random)), sign * INFINITY);
      EXPECT_EQ(round_stochastically(double(sign) * HUGE_VAL, random), sign * INFINITY);
    }
    EXPECT_TRUE(std::isnan(float(round_stochastically(nan, random))));
    EXPECT_TRUE(std::isnan(round_stochastically(wide_nan, random)));
  }
}

// A first step's moments follow from the gradients that are kept, by a stream's bits that nobody
// else draws from: a draw for four weights, one half for m, the other for v. A second step's
// average follows from the first's and from the weights, by those of another.
TEST_F(TrainTest, MomentsAndAverageAreRoundedByBitsOfTheirOwn) {
  for (Device* device : devices()) {
    TrainOptions o = options();
    o.seed = 2, o.ema = 0.5;
    Trainer<bf16, bf16> t(*device, o, data_, held_out_);
    t.train_step();
    size_t n = t.net.table.size;
    auto g = from(*device, t.net.gradients(), n), m = from(*device, t.a.slots[0], n),
         v = from(*device, t.a.slots[1], n);
    float clip = float(from(*device, t.a.clock, 1)[0].clip_scale);
    uint64_t passes = 1;
    Dither dither{o.seed, streams::moment_rounding, &passes};
    for (const Parameter& p : t.net.table.parameters)
      for (size_t i = p.offset; i < p.offset + p.count(); i += 4) {
        Quad<float> clipped = clip * load<float>(&g[i]);
        Quad<bf16> m_next, v_next;
        store_stochastically(m_next.v, float(1 - o.optimizer.beta1) * clipped, dither(i / 4), 0);
        store_stochastically(v_next.v, float(1 - o.optimizer.beta2) * clipped * clipped,
                             dither(i / 4), 1);
        for (int k = 0; k < 4; ++k) {
          ASSERT_EQ(float(m[i + size_t(k)]), float(m_next[k])) << p.name;
          ASSERT_EQ(float(v[i + size_t(k)]), float(v_next[k])) << p.name;
        }
      }
    auto before = from(*device, t.a.average, n);
    t.train_step();
    auto average = from(*device, t.a.average, n);
    auto nearest = from(*device, t.a.master.weights, n);
    auto rest = from(*device, t.a.master.own, n);
    passes = 2, dither.stream = streams::average_rounding;
    for (const Parameter& p : t.net.table.parameters)
      for (size_t i = p.offset; i < p.offset + p.count(); i += 4) {
        Quad<double> next;
        Quad<float> rounded;
        for (size_t k = 0; k < 4; ++k) {
          double a = before[i + k], w = join({nearest[i + k], rest[i + k]});
          next[int(k)] = a + 10 / 11.0 * (w - a);
        }
        store_stochastically(rounded.v, next, dither(i / 4), 0);
        for (int k = 0; k < 4; ++k) ASSERT_EQ(average[i + size_t(k)], rounded[k]) << p.name;
      }
  }
}

// Thirty-two passes into bf16 gradients: contributions that rounding to nearest would lose, and a
// random sum, against sums in fp32.
TEST(Lean, GradientsAddUpWithoutLosingWhatIsSmall) {
  for (Device* device : devices()) {
    constexpr size_t n = 1 << 16, passes = 32;
    for (bool small : {true, false}) {
      Slab sums(*device, n * 2), x(*device, n * 4), count(*device, 8, 0);
      bf16* sum = reinterpret_cast<bf16*>(sums.data);
      float* values = reinterpret_cast<float*>(x.data);
      uint64_t* pass = reinterpret_cast<uint64_t*>(count.data);
      std::vector<double> exact(n, 0);
      std::vector<bf16> nearest(n, bf16(0));
      for (size_t p = 0; p < passes; ++p) {
        std::vector<float> host(n);
        for (size_t i = 0; i < n; ++i) {
          host[i] = small ? (p == 0 ? 1.f : 0x1p-10f) : float(gaussian(7, p, i));
          exact[i] += double(host[i]);
          nearest[i] = bf16(float(nearest[i]) + host[i]);
        }
        device->upload(values, host.data(), n * sizeof(float));
        add_rounded(*device, sum, values, n, p > 0, {1, streams::gradient_rounding, pass}, 0);
        next_pass(*device, pass);
      }
      std::vector<double> got, plain;
      double bias = 0, plain_bias = 0;
      for (bf16 b : from(*device, sum, n)) got.push_back(double(b));
      for (bf16 b : nearest) plain.push_back(double(b));
      for (size_t i = 0; i < n; ++i) {
        bias += (got[i] - exact[i]) / n, plain_bias += (plain[i] - exact[i]) / n;
      }
      EXPECT_LT(std::abs(bias), small ? 3e-4 : 3e-3);
      EXPECT_LT(distance(exact, got), 0.015);
      EXPECT_EQ(plain_bias < -0.02, small) << "nearest loses all 31 small ones";
    }
  }
}

// App. J: clipping cannot change the share of the mean in a writer's gradient. What AdamW keeps in
// m of two gradients of very different size, dW_mu and dW_c.
TEST(Statement, AppJ_ClippingKeepsTheRatio) {
  for (Device* device : devices()) {
    Table table;
    table.parameters = {{"mu", {24, 40}, Init::normal, 1, 0},
                        {"c", {24, 40}, Init::normal, 1, 960}};
    table.size = 1920;
    std::vector<double> g = random_values(1920, 1), zeros(1920);
    for (size_t i = 0; i < 960; ++i) g[i] = 155 * g[960 + i / 40] * g[1000 + i % 40];  // rank one
    std::vector<Chunk> chunks = chunks_of(table);
    Slab gs(*device, 1920 * 8), ws(*device, 1920 * 8), xs(*device, 1920 * 8), ms(*device, 1920 * 8),
        vs(*device, 1920 * 8), ch(*device, chunks.size() * sizeof(Chunk)), pa(*device, 64),
        cl(*device, sizeof(Clock));
    double *gradient = put(*device, gs, g), *m = put(*device, ms, zeros);
    Chunk* dchunks = put(*device, ch, chunks);
    Clock* clock = put(*device, cl, std::vector<Clock>(1));
    Optimizer o;
    begin_step(*device, clock, o, 0, 0);
    gradient_norm(*device, clock, reinterpret_cast<double*>(pa.data), gradient, dchunks,
                  chunks.size(), o.clip);
    Master<double, double> master{put(*device, ws, g), put(*device, xs, g)};
    AdamW::update(*device,
                  MovedBy<double, double>{master,
                                          {m, put(*device, vs, zeros)},
                                          nullptr,
                                          gradient,
                                          clock,
                                          dchunks,
                                          chunks.size(),
                                          {},
                                          {}},
                  o);
    EXPECT_LT(from(*device, clock, 1)[0].clip_scale, 1e-3);
    auto ratio = [](const std::vector<double>& x) {
      return norm(rows_of({2, 960, x}, 0, 1)) / norm(rows_of({2, 960, x}, 1, 1));
    };
    auto changed = [&](const std::vector<double>& x) { return std::abs(ratio(x) / ratio(g) - 1); };
    std::vector<double> each = g, by_element = g;
    for (size_t i = 0; i < 960; ++i) each[i] /= ratio(g);
    for (double& x : by_element) x = std::clamp(x, -1.0, 1.0);
    expect_statement(
        *device, "App. J: clipping", changed(from(*device, m, 1920)),
        {{"each tensor by its own norm", changed(each)}, {"each element", changed(by_element)}});
  }
}

// ---------------------------------------------------------------------------------------------
// 3. Sampling

template <class Real>
struct SamplingNetwork {
  Network<Real> net;
  Sampler<Real> sampler;
  Slab slab;

  SamplingNetwork(Device& device, const Config& c, size_t batch)
      : net(device, c, batch, 0, false), slab(device, bytes(c, batch)) {
    Carver carver{slab.data};
    sampler.lay(carver, c, batch);
    Slab drawn(device, net.table.size * sizeof(AccOf<Real>));
    AccOf<Real>* values = reinterpret_cast<AccOf<Real>*>(drawn.data);
    initialise(device, net.table, Master<Real, AccOf<Real>>{net.weights(), values}, nullptr, 3);
    device.synchronize();
  }
  static size_t bytes(const Config& c, size_t batch) {
    Carver count;
    Sampler<Real>().lay(count, c, batch);
    return count.used;
  }
};

TEST(Sampling, ARowIsOneCaption) {
  EXPECT_EQ(each_times({1, 2, 3, 4, 5, 6, 7, 8}, 2, 3, 2),
            (std::vector<float>{1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 5, 6}));
}

TEST_F(TrainTest, SamplingIsEulerWithGuidance) {
  everywhere([&](Device& device, auto type) {
    using Real = decltype(type);
    using Acc = AccOf<Real>;
    constexpr size_t n = 4, count = 5, pixels = 64, words = 15;
    SamplingNetwork<Real> s(device, options().model, 3);  // four images: a batch of three and one
    Arrays<Real>& a = s.net.arrays;
    auto velocity = [&](const std::vector<double>& z, const float* text) {
      std::vector<Acc> in(z.begin(), z.end());
      std::vector<Real> caption;
      for (size_t i = 0; i < words; ++i) caption.push_back(Real(text[i]));
      device.upload(a.z, in.data(), pixels * sizeof(Acc));
      device.upload(a.text, caption.data(), words * sizeof(Real));
      s.net.forward(1);
      return from(device, a.velocity, pixels);
    };
    auto plain = [&](size_t image, double guidance) {
      std::vector<double> z(pixels);
      for (size_t i = 0; i < pixels; ++i)
        z[i] = gaussian(11, streams::sampling_noise, image * pixels + i);
      for (size_t k = 0; k < count; ++k) {
        auto time = [](size_t j) { return 3 * (1 - j / 5.0) / (1 + 2 * (1 - j / 5.0)); };
        auto vc = velocity(z, &data_.text[image * words]);
        auto vu = velocity(z, data_.empty_text.data());
        for (size_t i = 0; i < pixels; ++i)
          z[i] += (time(k) - time(k + 1)) *
                  (double(vu[i]) + guidance * (double(vc[i]) - double(vu[i])));
      }
      return z;
    };
    for (double guidance : {2.5, 1.0, 0.0}) {
      // Guidance 1 is the conditional velocity alone: the empty caption is not even looked at.
      std::vector<float> empty = guidance == 1 ? std::vector<float>(words, NAN) : data_.empty_text;
      auto images = sample_images(s.net, s.sampler, data_.text, empty, {n, count, guidance, 3, 11});
      ASSERT_EQ(images.size(), n * pixels);
      for (size_t i = 0; i < n; ++i) {
        std::vector<float> image(&images[i * pixels], &images[i * pixels] + pixels);
        double limit = std::is_same_v<Real, double> ? 1e-7 : rounding<Real>;  // images are floats
        EXPECT_LT(distance(plain(i, guidance), image), limit) << i << ", guidance " << guidance;
      }
      // All at once. On a CPU the bits do not depend on the batch; cuBLAS may choose otherwise.
      SamplingNetwork<Real> whole(device, options().model, n);
      auto at_once =
          sample_images(whole.net, whole.sampler, data_.text, empty, {n, count, guidance, 3, 11});
      if (device.gpu)
        EXPECT_LT(distance(at_once, images), std::max(1e-7, rounding<Real>));
      else
        EXPECT_EQ(at_once, images);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// 4. The trainer

TEST_F(TrainTest, TheSameSeedGivesTheSameBitsHoweverMuchIsRecomputed) {
  every_state([&](Device& device, auto type, auto kept) {
    std::string first;
    for (size_t recompute : {0, 0, 1, 3, 7}) {
      TrainOptions o = options(8);
      o.recompute = recompute;
      Trainer<decltype(type), decltype(kept)> t(device, o, data_, held_out_);
      steps(t, 3);
      if (first.empty()) first = bits(t);
      EXPECT_TRUE(bits(t) == first) << "recompute " << recompute;
    }
    TrainOptions o = options(8);
    o.seed = 2;
    Trainer<decltype(type), decltype(kept)> t(device, o, data_, held_out_);
    steps(t, 3);
    EXPECT_FALSE(bits(t) == first) << "another seed";
  });
}

TEST_F(TrainTest, StoppedAndResumedIsAsGoingThrough) {
  every_state([&](Device& device, auto type, auto kept) {
    using Real = decltype(type);
    using G = decltype(kept);
    for (double ema : {0.0, 0.9}) {
      TrainOptions o = options();
      o.ema = ema;
      if (ema > 0) o.model.fix = {"beta"}, o.accumulate = 2;
      Trainer<Real, G> through(device, o, data_, held_out_), stopped(device, o, data_, held_out_);
      steps(through, 5), steps(stopped, 3);
      save_run(stopped);
      EXPECT_EQ(fs::exists(at("ema.safetensors")), ema > 0);
      Trainer<Real, G> resumed(device, o, data_, held_out_);
      resume_run(resumed);
      EXPECT_TRUE(bits(resumed) == bits(stopped));
      EXPECT_EQ(from(device, resumed.spikes.watch, 1)[0].first, 3u) << "norms that it has not seen";
      if (ema > 0) {
        SafetensorsReader file(at("ema.safetensors"));
        auto average = from(device, stopped.a.average, stopped.net.table.size);
        auto weights = from(device, stopped.net.weights(), stopped.net.table.size);
        bool differs = false;
        for (const Parameter& p : stopped.net.table.parameters) {
          std::vector<Real> kept(p.count());
          file.read(file.require(p.name, p.shape), kept.data(), 0, kept.size());
          for (size_t i = 0; i < kept.size(); ++i) {
            ASSERT_EQ(double(kept[i]), double(Real(average[p.offset + i]))) << p.name;
            differs |= double(kept[i]) != double(weights[p.offset + i]);
          }
        }
        EXPECT_TRUE(differs);
      }
      steps(resumed, 2);
      EXPECT_TRUE(bits(resumed) == bits(through));
      fs::remove(at("ema.safetensors"));
    }
  });
}

// Gradients, and the loss of the first step, of a trainer.
template <class Real, class G>
std::pair<std::vector<G>, double> first_step(Trainer<Real, G>& t) {
  t.train_step();
  return {from(t.device, t.net.gradients(), t.net.table.size), t.history(0)[0].loss};
}

// Whatever was drawn: with the weights of a file the first step is that of its network, master and
// average are those numbers, and a rate of 0 keeps them.
TEST_F(TrainTest, ARunBeginsWithTheNetworkOfAFile) {
  every_state([&](Device& device, auto type, auto kept) {
    using Real = decltype(type);
    using G = decltype(kept);
    TrainOptions o = options();
    Trainer<Real, G> first(device, o, data_, held_out_);
    save_run(first);
    o.weights = at("weights.safetensors"), o.model.writer_std = 0.3, o.model.gates["beta"] = 0.1;
    o.optimizer.lr = 0, o.ema = 0.5, o.model.fix = {"beta"};
    Trainer<Real, G> other(device, o, data_, held_out_);
    size_t n = other.net.table.size;
    auto weights = from(device, first.net.weights(), n);
    ASSERT_FALSE(from(device, other.net.weights(), n) == weights);
    begin_with_weights(other);
    auto same = [&] {
      auto average = from(device, other.a.average, n);
      for (size_t i = 0; i < n; ++i) ASSERT_EQ(double(average[i]), double(weights[i])) << i;
      EXPECT_TRUE(from(device, other.net.weights(), n) == weights);
    };
    same();
    EXPECT_EQ(other.validate(), first.validate());
    EXPECT_TRUE(first_step(other) == first_step(first));
    steps(other, 2), same();
  });
}

// Where a GPU has kernels of its own: steps that are captured and blocks that are replayed against
// steps that are enqueued with all blocks kept, saved and resumed; and gradients against fp64's.
TEST_F(TrainTest, TheGpusOwnKernelsTrainAndGoOn) {
  Device cpu;
  Trainer<double> exact(cpu, wide(), data_, held_out_);
  std::vector<double> right = first_step(exact).first;
  for (Device* device : devices()) {
    EXPECT_EQ(fused_attention<bf16>(device->gpu, 64), device->gpu && Device::has_bf16());
    auto check = [&](auto kept) {
      SCOPED_TRACE(device->name + ", gradients in " + dtype_name<decltype(kept)>());
      using T = Trainer<bf16, decltype(kept)>;
      TrainOptions o = wide();
      T through(*device, o, data_, held_out_), resumed(*device, o, data_, held_out_);
      auto gradients = first_step(through).first;
      std::map<std::string, std::pair<std::vector<double>, std::vector<double>>> families;
      for (const Parameter& p : through.net.table.parameters)
        for (size_t i = p.offset; i < p.offset + p.count(); ++i) {
          auto& [want, got] = families[p.family()];
          want.push_back(right[i]), got.push_back(double(gradients[i]));
        }
      for (const auto& [family, both] : families)
        EXPECT_LT(distance(both.first, both.second), rounding<bf16>) << family;
      steps(through, 4);
      o.recompute = 0;
      T enqueued(*device, o, data_, held_out_);
      for (; enqueued.step < 3; ++enqueued.step) {
        begin_step(*device, enqueued.a.clock, o.optimizer, o.steps, o.ema);
        for (size_t pass = 0; pass < o.accumulate; ++pass)
          training_pass(enqueued, pass == 0, Observer<bf16>());
        update_weights(enqueued, false);
      }
      save_run(enqueued), resume_run(resumed);
      EXPECT_TRUE(bits(resumed) == bits(enqueued));
      steps(resumed, 2);
      EXPECT_TRUE(bits(resumed) == bits(through));
    };
    check(float{}), check(bf16{});
  }
}

TEST_F(TrainTest, AccumulatedBatchesAreOneBatch) {
  every_state([&](Device& device, auto type, auto kept) {
    using Real = decltype(type);
    using G = decltype(kept);
    TrainOptions whole = options(), parts = options();
    parts.batch = 2, parts.accumulate = 2;
    Trainer<Real, G> a(device, whole, data_, held_out_), b(device, parts, data_, held_out_);
    auto [da, la] = first_step(a);
    auto [db, lb] = first_step(b);
    EXPECT_LT(distance(da, db), rounding<Real>);
    EXPECT_NEAR(la, lb, rounding<Real> * la);
    EXPECT_NEAR(a.validate(), b.validate(), rounding<Real>) << "in batches of 4 and of 2";
  });
}

// Many times more images than a batch has.
TEST_F(TrainTest, ValidationLeavesTheStepsLossesAlone) {
  everywhere([&](Device& device, auto type) {
    using Real = decltype(type);
    TrainOptions o = options();
    o.batch = 2, o.accumulate = 3;
    Trainer<Real> t(device, o, data_, synthetic(256));
    steps(t, 1);
    auto before = from(device, t.a.step_losses, 6);
    std::string state = bits(t);
    EXPECT_GT(t.validate(), 0);
    EXPECT_EQ(from(device, t.a.step_losses, 6), before);
    EXPECT_TRUE(bits(t) == state);
  });
}

// The same network and passes with bf16 and with fp32 gradients: each tensor's, over 32 passes.
TEST_F(TrainTest, LeanGradientsAreThoseOfTheFp32State) {
  for (Device* device : devices())
    for (size_t accumulate : {1, 32}) {
      TrainOptions o = options();
      o.batch = 2, o.accumulate = accumulate;
      Trainer<bf16> full(*device, o, data_, held_out_);
      Trainer<bf16, bf16> lean(*device, o, data_, held_out_);
      auto [a, loss_a] = first_step(full);
      auto [b, loss_b] = first_step(lean);
      EXPECT_EQ(full.diagnostics.samples, 2u) << "as many as a batch has";
      EXPECT_NEAR(loss_a, loss_b, 1e-3 * loss_a);  // weights differ where they were ties
      for (const Parameter& p : full.net.table.parameters) {
        std::vector<double> want, got;
        for (size_t i = p.offset; i < p.offset + p.count(); ++i)
          want.push_back(double(a[i])), got.push_back(double(b[i]));
        EXPECT_LT(distance(want, got), accumulate > 1 ? 0.03 : 0.01) << p.name;
      }
      if (accumulate > 1) continue;
      // Two blocks' roundings have nothing in common.
      const Table& table = full.net.table;
      std::vector<double> errors[2];
      for (size_t block : {0, 1, 2})
        for (size_t i = 0; i < table.block_stride; ++i)
          for (size_t other : {0, 1}) {
            size_t at = table.at("blocks.0.operator.q_proj.weight").offset +
                        (block + other) * table.block_stride + i;
            errors[other].push_back(a[at] == 0 ? 0 : double(b[at]) / double(a[at]) - 1);
          }
      EXPECT_LT(std::abs(correlation(errors[0], errors[1])), 0.04);
    }
}

TEST_F(TrainTest, MachinesAndPrecisionsTrainAlike) {
  Device cpu;
  Trainer<double> exact(cpu, options(), data_, held_out_);
  auto [de, le] = first_step(exact);
  everywhere([&, &d = de, &l = le](Device& device, auto type) {
    using Real = decltype(type);
    Trainer<Real> t(device, options(), data_, held_out_);
    auto [dt, lt] = first_step(t);
    EXPECT_LT(distance(d, dt), rounding<Real>);
    EXPECT_NEAR(l, lt, rounding<Real> * l);
  });
}

TEST_F(TrainTest, TakesWhatThePlanSaysAndNothingLater) {
  every_state([&](Device& device, auto type, auto kept) {
    using Real = decltype(type);
    using G = decltype(kept);
    size_t before = device.allocated;
    for (size_t recompute : {0, 3})
      for (double ema : {0.0, 0.9}) {
        TrainOptions o = options();
        o.recompute = recompute, o.ema = ema, o.accumulate = 2;
        o.spike_factor = ema > 0 ? 5 : 0, o.diagnose_every = recompute;
        Trainer<Real, G> t(device, o, data_, held_out_);
        DataSizes sizes{data_.images, held_out_.images, data_.captions};
        Plan plan = training_plan<Real, G>(o, t.net.table, sizes, device.gpu);
        // On a CPU the products' threads take what they work in by themselves, on a GPU the driver
        // what a graph is kept in.
        EXPECT_EQ(device.allocated +
                      (device.gpu ? graph_bytes(o) : HostGemm<AccOf<Real>>::workspace_bytes()),
                  plan.total());
        t.train_step();
        size_t taken = device.allocations, in_use = device.in_use();
        t.train_step();
        t.train_step(o.diagnose_every > 0);
        if (device.gpu) {
          EXPECT_EQ(device.in_use(), in_use) << "by the driver's count";
        }
        t.validate();
        t.samples(data_.text, data_.empty_text, 4, 2, 2);
        t.train_step(o.diagnose_every > 0);
        EXPECT_EQ(device.allocations, taken);
      }
    EXPECT_EQ(device.allocated, before);
  });
}

// Two passes a step, so that the observer looks on at the second only.
TEST_F(TrainTest, DiagnosticsChangeNoBitOfTheWeights) {
  every_state([&](Device& device, auto type, auto kept) {
    using Real = decltype(type);
    using G = decltype(kept);
    for (size_t recompute : {0, 7}) {
      TrainOptions plain = options(10), watched = plain;
      plain.recompute = recompute, plain.accumulate = 2, plain.spike_factor = 0;
      watched = plain, watched.spike_factor = 5;
      TrainOptions diagnosed = watched;
      diagnosed.diagnose_every = 2, diagnosed.diagnose_samples = 3;
      Trainer<Real, G> a(device, plain, data_, held_out_), b(device, watched, data_, held_out_),
          c(device, diagnosed, data_, held_out_);
      steps(a, 6), steps(b, 6);
      for (int i = 0; i < 6; ++i) c.train_step(i % 2);
      EXPECT_TRUE(bits(a) == bits(b)) << "spike watch, recompute " << recompute;
      EXPECT_TRUE(bits(a) == bits(c)) << "diagnostics, recompute " << recompute;
      a.train_step();
      EXPECT_FALSE(bits(a) == bits(b)) << "the comparison is blind";
      for (const auto& row : c.diagnostics.read(device))
        for (const Reading& r : row) EXPECT_TRUE(std::isfinite(r.value)) << r.name;
    }
  });
}

// The watch alone, on norms that are written down here.
TEST(Spike, FiresAboveAMultipleOfTheRunningMedian) {
  for (int gpu = 0; gpu <= (Device::gpus() > 0); ++gpu) {
    Device device(gpu);
    Slab slab(device, 1 << 20, 0);
    Carver carver{slab.data};
    SpikeArrays a;
    a.lay(carver, 1, 1, 1);
    Record* history = carver.take<Record>(records);
    Clock* clock = carver.take<Clock>(1);
    WriterModes* modes = carver.take<WriterModes>(2);
    // A step `now` of norm `norm` after norms from 3 to 5, no two alike within a window.
    auto norm_of = [](uint64_t s) { return 3 + 2 * double(s * 38 % 101) / 101; };
    auto fires = [&](uint64_t now, double norm, SpikeWatch watch = {}) {
      std::vector<Record> past(records);
      for (uint64_t s = 0; s < now; ++s) past[s % records].norm = norm_of(s);
      Clock c{now, now, 0, 0, 0, 0, norm, 0};
      device.upload(history, past.data(), records * sizeof(Record));
      device.upload(clock, &c, sizeof c), device.upload(a.watch, &watch, sizeof watch);
      watch_step(device, a, clock, history, modes, 1, 1, 5);
      SpikeWatch after = from(device, a.watch, 1)[0];
      if (after.fired) {
        size_t n = std::min<size_t>(now - watch.first, spike_window);
        std::vector<double> window;
        for (size_t k = 1; k <= n; ++k) window.push_back(norm_of(now - k));
        std::sort(window.begin(), window.end());
        Event event = after.events[after.place()];
        EXPECT_EQ(event.window, n);
        EXPECT_EQ(event.median, window[n / 2]);
        EXPECT_EQ(event.step, now + 1);
        EXPECT_EQ(event.norm == norm || std::isnan(norm), true);
        EXPECT_EQ(after.pending, std::min(watch.pending + 1, kept_events));
      }
      return after.fired != 0;
    };
    EXPECT_FALSE(fires(200, 19.9));  // the median is 4, or a hundredth beside it
    EXPECT_TRUE(fires(200, 20.1));
    EXPECT_TRUE(fires(5000, 20.1)) << "around the ring";
    EXPECT_TRUE(fires(200, NAN));
    EXPECT_TRUE(fires(200, INFINITY));
    EXPECT_FALSE(fires(49, 1000)) << "too few steps for a median";
    EXPECT_TRUE(fires(50, 1000));
    SpikeWatch resumed{}, quiet{}, unread{};
    resumed.first = 151, quiet.quiet_until = 201, quiet.last = unread.last = 300;
    EXPECT_FALSE(fires(200, 1000, resumed)) << "steps of another process are not known";
    EXPECT_TRUE(fires(201, 1000, resumed));
    EXPECT_FALSE(fires(200, 1000, quiet));
    EXPECT_TRUE(fires(200, 1501, quiet)) << "five times the last spike";
    EXPECT_TRUE(fires(200, NAN, quiet));
    EXPECT_TRUE(fires(201, 1000, quiet));
    quiet.last = NAN;
    EXPECT_FALSE(fires(200, NAN, quiet)) << "it was reported";
    for (unread.pending = 1; unread.pending <= kept_events; ++unread.pending) {
      EXPECT_FALSE(fires(200, 1000, unread));
      EXPECT_TRUE(fires(200, 1501, unread)) << "a collapse before the host has read its first sign";
    }
  }
}

// Sixty calm steps; then a final projection that is fifty times too large, and six steps later one
// that is fifty times larger still. Only then both reports are read, and must hold the numbers of
// the spikes themselves.
template <class Real>
void check_spike(Device& device, const TrainOptions& o, const Dataset& data,
                 const Dataset& held_out) {
  using Acc = AccOf<Real>;
  Trainer<Real> t(device, o, data, held_out);
  using Row = std::map<std::string, double>;
  auto rows = [&] {
    std::vector<Row> all;
    for (const auto& layer : t.diagnostics.read(device)) {
      all.emplace_back();
      for (const Reading& r : layer) all.back()[r.name] = r.value;
    }
    return all;
  };
  std::vector<std::vector<Row>> before;
  for (int i = 0; i < 60; ++i) {
    t.train_step();
    before.push_back(rows());
  }
  auto median = [&](size_t slot, const std::string& name) {
    std::vector<double> values;
    for (const auto& step : before) values.push_back(step[slot].at(name));
    std::sort(values.begin(), values.end());
    return values[30];
  };
  EXPECT_TRUE(t.found_spikes().empty()) << "a calm run";
  auto enlarge = [&] {
    const Parameter& p = t.net.table.at("final_proj.weight");
    std::vector<Acc> weights = from(device, t.a.master.own + p.offset, p.count());
    for (Acc& w : weights) w *= 50;
    device.upload(t.a.master.own + p.offset, weights.data(), weights.size() * sizeof(Acc));
    if constexpr (Trainer<Real>::mixed)
      convert(device, t.net.weights() + p.offset, t.a.master.own + p.offset, p.count());
  };
  enlarge();
  t.train_step(true);
  std::vector<Acc> gradients = from(device, t.net.gradients(), t.net.table.size);
  std::vector<Acc> losses = from(device, t.a.step_losses, o.batch * o.accumulate);
  std::vector<Acc> dv = from(device, t.net.arrays.dvelocity, o.batch * o.model.pixels());
  std::vector<Row> readings = rows();
  Record record = t.history(60)[0];
  steps(t, 5);
  enlarge();
  t.train_step();
  std::vector<Acc> later_losses = from(device, t.a.step_losses, o.batch * o.accumulate);
  std::vector<Spike> found = t.found_spikes();
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[1].step, 67u);
  EXPECT_EQ(found[1].norm, t.history(66)[0].norm);
  EXPECT_EQ(found[1].losses, std::vector<double>(later_losses.begin(), later_losses.end()));
  const Spike* spike = &found[0];
  EXPECT_EQ(spike->step, 61u);
  EXPECT_EQ(spike->norm, record.norm);
  EXPECT_EQ(spike->window, 60u);
  EXPECT_GT(spike->norm, 5 * spike->median);
  ASSERT_EQ(spike->gradients.size(), t.net.table.parameters.size());
  double total = 0;
  for (size_t i = 0; i < spike->gradients.size(); ++i) {
    const Parameter& q = t.net.table.parameters[i];
    double sum = 0;
    for (size_t k = q.offset; k < q.offset + q.count(); ++k)
      sum += double(gradients[k]) * double(gradients[k]);
    EXPECT_EQ(spike->gradients[i].first, q.name);
    EXPECT_NEAR(spike->gradients[i].second, std::sqrt(sum), 1e-4 * std::sqrt(sum));
    total += sum;
  }
  EXPECT_NEAR(spike->norm, std::sqrt(total), 1e-4 * spike->norm);
  EXPECT_TRUE(spike->bad_gradients.empty() && spike->bad_weights.empty());
  EXPECT_EQ(spike->losses, std::vector<double>(losses.begin(), losses.end()));
  double sum = 0, squares = 0, largest = 0;
  for (Acc g : dv) {
    sum += double(g), squares += double(g) * double(g);
    largest = std::max(largest, std::abs(double(g)));
  }
  EXPECT_NEAR(spike->mean, sum / double(dv.size()), 1e-12);
  EXPECT_NEAR(spike->rms, std::sqrt(squares / double(dv.size())), 1e-12);
  EXPECT_EQ(spike->largest, largest);
  ASSERT_EQ(spike->modes.size(), 2 * t.diagnostics.layers.size());
  for (const Spike::Mode& m : spike->modes) {
    size_t slot =
        size_t(std::find(t.diagnostics.layers.begin(), t.diagnostics.layers.end(), m.layer) -
               t.diagnostics.layers.begin());
    std::string branch = m.writer ? "ffn_" : "attention_";
    EXPECT_EQ(m.mean, readings[slot].at(branch + "g_mean"));
    EXPECT_EQ(m.centered, readings[slot].at(branch + "g_ctr"));
    EXPECT_EQ(m.usual_mean, median(slot, branch + "g_mean"));
    EXPECT_EQ(m.usual_centered, median(slot, branch + "g_ctr"));
    EXPECT_GT(m.centered, 5 * m.usual_centered) << "the writers see the larger projection";
  }
  // A bias that is NaN: so is then each gradient and, after the step, each weight.
  const Parameter& bias = t.net.table.at("final_proj.bias");
  Acc nan = Acc(NAN);
  device.upload(t.a.master.own + bias.offset, &nan, sizeof nan);
  if constexpr (Trainer<Real>::mixed)
    convert(device, t.net.weights() + bias.offset, t.a.master.own + bias.offset, 1);
  t.train_step();
  found = t.found_spikes();
  ASSERT_EQ(found.size(), 3u);
  EXPECT_TRUE(std::isnan(found[2].norm));
  EXPECT_EQ(found[2].bad_gradients.size(), t.net.table.parameters.size());
  EXPECT_EQ(found[2].bad_weights.size(), t.net.table.parameters.size());
  t.watch_spikes_from(1000);
  EXPECT_TRUE(t.found_spikes().empty());
}
TEST_F(TrainTest, ASpikeIsKeptUntilTheHostAsks) {
  everywhere([&](Device& device, auto type) {
    TrainOptions o = options();
    o.accumulate = 2, o.optimizer.lr = 1e-4, o.seed = 2;
    check_spike<decltype(type)>(device, o, data_, held_out_);
  });
}

// A large network has more chunks than teams copy at a time: each has its square, and its count of
// numbers that are not finite.
TEST(Spike, EveryChunkIsCopied) {
  constexpr size_t count = 2500, samples = 3;
  for (int gpu = 0; gpu <= (Device::gpus() > 0); ++gpu) {
    Device device(gpu);
    Slab slab(device, 1 << 20, 0);
    Carver carver{slab.data};
    SpikeArrays a;
    a.lay(carver, 1, count, samples);
    TrainArrays<float, float> run{};
    run.chunk_count = count;
    std::vector<Chunk> chunks;
    std::vector<double> partial;
    std::vector<float> gradients, weights, losses = {3, 1, 2}, dvelocity = {1, -5, 2, 4};
    for (size_t k = 0; k < count; ++k) {
      chunks.push_back({4 * k, 0, 3, false});
      partial.push_back(double(k) + 0.5);
      for (size_t i = 0; i < 4; ++i) {
        gradients.push_back(i < k % 4 ? (i % 2 ? -INFINITY : INFINITY) : 1.f);
        weights.push_back(i < k % 3 ? (i % 2 ? -INFINITY : NAN) : 1.f);
      }
    }
    auto upload = [&](auto*& to, const auto& from) {
      to = carver.take<std::remove_reference_t<decltype(*to)>>(from.size());
      device.upload(to, from.data(), from.size() * sizeof(from[0]));
    };
    upload(run.chunks, chunks), upload(run.partial, partial), upload(run.step_losses, losses);
    upload(run.master.weights, weights);
    float *dg, *dv;
    upload(dg, gradients), upload(dv, dvelocity);
    run.gradients = dg;
    SpikeWatch watch{};
    watch.fired = 1, watch.pending = 2;
    device.upload(a.watch, &watch, sizeof watch);
    copy_spike(device, a, run, samples, dv, 2, 2);
    std::vector<ChunkSeen> seen = from(device, a.chunks + count, count);  // the second event's
    for (size_t k = 0; k < count; ++k) {
      ASSERT_EQ(seen[k].squares, partial[k]) << k;
      ASSERT_EQ(seen[k].bad_gradients, k % 4) << k;
      ASSERT_EQ(seen[k].bad_weights, k % 3) << k;
    }
    std::vector<std::vector<double>> got;
    for (const SampleSeen& s : from(device, a.samples + samples, samples))
      got.push_back({s.loss, s.sum, s.squares, s.largest});
    EXPECT_EQ(got, (std::vector<std::vector<double>>{{3, -4, 26, 5}, {1, 6, 20, 4}, {2, 0, 0, 0}}));
  }
}

Spike some_spike() {
  Spike s{};
  s.step = 61, s.window = 60, s.norm = 30, s.median = 2, s.factor = 5;
  for (int i = 0; i < 20; ++i)
    s.gradients.push_back({"blocks." + std::to_string(i) + ".w", 20 - i});
  s.losses = {1, 7, 2};
  s.modes = {{0, 0, 3, 2, 2, 1}, {200, 0, 1000, 5, 999, 4}, {399, 1, 310, 2.6, 2, 1.3}};
  return s;
}

TEST(Spike, ReportSaysWhatKindItIs) {
  Spike s = some_spike();
  auto says = [&](const char* words) {
    EXPECT_PRED_FORMAT2(testing::IsSubstring, words, spike_report(s));
  };
  says("Spike at step 61: gradient norm 30 is 15 times 2, the median of the 60 steps before");
  says("Verdict: mean mode: G_mean of W2 at layer 399 is 155 times its running median, G_ctr 2");
  says(
      "  layer   200 W_O          1000 (       1)            5 (    1.25)\n"
      "  layer   399 W2            310 (     155)          2.6 (       2)\n");
  says("  blocks.0.w                                             20   44.4%\n");
  says("blocks.14.w");
  EXPECT_EQ(spike_report(s).find("blocks.15.w"), std::string::npos) << "fifteen";
  says("Losses, largest first: sample, loss\n       1          7\n       2          2\n");
  s.losses[2] = NAN;
  says("sample, loss\n       2        nan\n       1          7\n       0          1\n");
  s.modes[2].centered = 130;
  says("Verdict: both modes");
  s.modes[2].mean = 8;
  says("Verdict: not the writers' mean mode");
  s.bad_gradients = {"blocks.3.w"};
  says("Verdict: not finite: the gradient of blocks.3.w");
  says("Gradients with NaN or infinity: 1\n  blocks.3.w");
}

TEST_F(TrainTest, TheLossFalls) {
  every_state([&](Device& device, auto type, auto kept) {
    TrainOptions o = options();
    o.model.writer_std = -1, o.model.final_std = 0, o.model.gates.clear();
    o.batch = 8, o.optimizer.warmup = 10, o.optimizer.lr = 3e-3;
    Trainer<decltype(type), decltype(kept)> t(device, o, data_, held_out_);
    double before = t.validate();
    EXPECT_EQ(t.validate(), before) << "validation has its own, fixed noise";
    steps(t, 120);
    EXPECT_GT(before, 1.5) << "a network that answers 0";
    EXPECT_LT(t.validate(), 0.6 * before);
    std::vector<Record> history = t.history(100);
    ASSERT_EQ(history.size(), 20u);
    for (const Record& r : history) EXPECT_LT(r.loss, before);
  });
}

// From its own start, where the gates are zero: they move, and then the branches' weights do.
TEST_F(TrainTest, ADefaultReZeroLearns) {
  Device cpu;
  TrainOptions o = options();
  o.model.writer_std = -1, o.model.final_std = 0, o.model.gates.clear();
  o.model.residual = "rezero";
  Trainer<float> t(cpu, o, data_, held_out_);
  auto weights = [&](const char* name) {
    const Parameter& p = t.net.table.at(name);
    return from(cpu, t.net.weights() + p.offset, p.count());
  };
  EXPECT_EQ(weights("blocks.1.rezero2"), std::vector<float>{0});
  steps(t, 3);
  auto before = weights("blocks.1.operator.q_proj.weight");
  steps(t, 1);
  EXPECT_NE(weights("blocks.1.rezero2"), std::vector<float>{0});
  auto after = weights("blocks.1.operator.q_proj.weight");
  EXPECT_GT(distance(before, after), 5e-4) << "decay alone makes 1e-4";
}

TEST_F(TrainTest, TheAverageFollowsTheWeightsAndIsWhatIsEvaluated) {
  everywhere([&](Device& device, auto type) {
    using Real = decltype(type);
    using Acc = AccOf<Real>;
    TrainOptions o = options();
    o.ema = 0.2, o.time_shift = 3, o.seed = 2;
    Trainer<Real> t(device, o, data_, held_out_);
    size_t n = t.net.table.size;
    std::vector<Acc> average(n, Acc(1e6));  // what was before the first step has no part in it
    for (int s = 1; s <= 8; ++s) {
      t.train_step();
      std::vector<Acc> master = from(device, t.a.master.own, n);
      Acc follow = Acc(std::max(0.8, 10 / (s + 9.0)));
      for (size_t i = 0; i < n; ++i) average[i] = (1 - follow) * average[i] + follow * master[i];
    }
    EXPECT_LT(distance(average, from(device, t.a.average, n)), 1e-6);
    EXPECT_GT(distance(average, from(device, t.a.master.own, n)), 1e-4);
    o.ema = 0;
    Trainer<Real> plain(device, o, data_, held_out_);
    device.copy(plain.a.master.own, t.a.average, n * sizeof(Acc));
    plain.set_step(8);
    std::string before = bits(t);
    EXPECT_EQ(t.validate(), plain.validate());
    EXPECT_EQ(t.samples(data_.text, data_.empty_text, 4, 3, 2),
              sample_images(plain.net, plain.sampler, data_.text, data_.empty_text,
                            {4, 3, 2, o.time_shift, o.seed}));
    EXPECT_TRUE(bits(t) == before) << "evaluating changes nothing";
  });
}

// ---------------------------------------------------------------------------------------------
// 5. Checkpoints

// All parameters at random, no two alike: a file that mixes up two names shows.
template <class Acc>
std::vector<Acc> random_weights(const Table& table) {
  std::vector<Acc> all(table.size, Acc(0));
  for (const Parameter& p : table.parameters)
    for (size_t i = 0; i < p.count(); ++i) all[p.offset + i] = Acc(gaussian(4, p.offset, i));
  return all;
}

template <class Real>
void check_loads(Device& device, const std::string& path, const Table& table) {
  Slab slab(device, table.size * sizeof(Real), 0);
  Real* weights = reinterpret_cast<Real*>(slab.data);
  load_tensors(SafetensorsReader(path), path, device, table, Stored{"", weights});
  std::vector<double> want = random_weights<double>(table);
  std::vector<Real> got = from(device, weights, table.size);
  for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(double(got[i]), double(Real(want[i]))) << i;
}

TEST_F(TrainTest, WeightsAndConfigurationSurviveAFile) {
  Device device;
  for (const Residual& residual : residuals) {
    SCOPED_TRACE(residual.name);
    Config c;
    c.depth = 3, c.width = 24, c.heads = 3, c.ffn = 20, c.channels = 2, c.height = 6;
    c.image_width = 9, c.patch = 3, c.text_tokens = 5, c.norm_eps = 1.0 / 3;
    c.residual = residual.name, c.text_dim = c.residual == "rezero" ? 24 : 7;
    c.patch_bias = c.residual != "layerscale";
    c.means = c.residual == "mvsplit" ? "global" : "segment";
    Table table = parameter_table(c);
    std::vector<double> weights = random_weights<double>(table);
    for (bool silent : {false, true}) {
      Metadata about = silent ? Metadata() : describe(c, 4);
      std::string path = at("w.safetensors");
      save_tensors(path, about, device, table, Stored{"", weights.data()});
      Config read;
      if (silent) read.height = 6, read.image_width = 9, read.text_tokens = 5;
      SafetensorsReader file(path);
      std::optional<size_t> heads;
      if (silent) {
        EXPECT_ERROR(read_config(file, path, read),
                     "does not say how many attention heads it has: "
                     "give --heads (the author's released model has 8)");
        heads = 3;
      }
      EXPECT_EQ(read_config(file, path, read, heads).empty(), !silent);
      // Some have the same tensors: only the metadata can tell.
      std::string looks_like = c.residual == "mvsplit-noleak" ? "mvsplit"
                               : c.residual == "prenorm"      ? "postnorm"
                               : c.residual == "centered"     ? "postnorm"
                                                              : c.residual;
      EXPECT_EQ(read.residual, silent ? looks_like : c.residual);
      if (silent) read.residual = c.residual, read.norm_eps = c.norm_eps, read.means = c.means;
      EXPECT_EQ(describe(read, 4), describe(c, 4));
      EXPECT_EQ(read.norm_eps, c.norm_eps) << "with all its digits";
      EXPECT_EQ(read.patch_bias, c.patch_bias);
      check_loads<double>(device, path, table), check_loads<float>(device, path, table);
      check_loads<bf16>(device, path, table);
    }
  }
}

struct Named {
  std::string name;
  std::vector<size_t> shape;
  std::vector<double> values;
};

TEST_F(TrainTest, OnlyTheModelsOwnTensorsLoad) {
  using File = std::vector<Named>;
  Device device;
  Table table = parameter_table(options(2).model);
  std::vector<double> weights = random_weights<double>(table);
  auto add = [](const char* name, double last) {
    return [=](File& f) { f.push_back({name, {4}, {1, 1, 1, last}}); };
  };
  struct {
    std::function<void(File&)> change;
    const char* words;
  } rows[] = {
      {[](File&) {}, "no error"},
      {add("norm_img_input.weight", 1), "no error"},
      {add("norm_text_input.weight", 1), "no error"},
      {add("blocks.1.fused_mvsplit_norm2.weight", 1), "no error"},
      {add("blocks.0.operator.qk_norm.q.weight", 1), "no error"},
      {add("norm_img_input.weight", 1.5), "norm_img_input.weight is not all ones"},
      {add("blocks.0.fused_mvsplit_norm1.weight", 0), "norm1.weight is not all ones"},
      {add("blocks.0.operator.qk_norm.k.weight", NAN), "holds NaN or infinity"},
      {add("blocks.2.ffn.w2.weight", 1), "unknown tensor \"blocks.2.ffn.w2.weight\""},
      {[](File& f) { f.pop_back(); }, "\"final_proj.bias\" of shape [4] is missing"},
      {[](File& f) { f.back().name += "es"; }, "unknown tensor \"final_proj.biases\""},
      {[](File& f) {
         f.back().shape = {2, 2};
       },
       "has shape [2, 2], expected [4]"},
      {[](File& f) { f[3].values[5] = INFINITY; }, "q_proj.weight holds NaN or infinity"},
  };
  for (const auto& row : rows) {
    File file;
    for (const Parameter& p : table.parameters)
      file.push_back({p.name, p.shape, {&weights[p.offset], &weights[p.offset] + p.count()}});
    row.change(file);
    SafetensorsWriter writer(at("w.safetensors"));
    for (const Named& t : file) writer.declare(t.name, "F64", t.shape);
    for (const Named& t : file) writer.write(t.values.data(), t.values.size());
    writer.finish();
    EXPECT_ERROR(check_loads<double>(device, at("w.safetensors"), table), row.words);
  }
}

TEST_F(TrainTest, WhatIsNotFiniteIsNotWritten) {
  Device device;
  Table table = parameter_table(options(2).model);
  for (double bad : {double(NAN), HUGE_VAL}) {
    std::vector<double> weights = random_weights<double>(table);
    weights[table.at("blocks.1.ffn.w2.weight").offset] = bad;
    EXPECT_ERROR(save_tensors(at("w.safetensors"), {}, device, table, Stored{"", weights.data()}),
                 "was not written: blocks.1.ffn.w2.weight holds NaN or infinity");
  }
  EXPECT_TRUE(files().empty());
}

TEST_F(TrainTest, ConfigurationsThatContradictTheirFileAreRefused) {
  Device device;
  Config c = options(2).model;
  Table table = parameter_table(c);
  std::vector<float> weights = random_weights<float>(table);
  const char* rows[][3] = {{"depth", "3", "says depth 3, but its tensors have 2"},
                           {"heads", "many", "heads is 'many', expected a positive integer"},
                           {"heads", "0", "heads is '0'"},
                           {"heads", "5", "not divisible by 5 heads"},
                           {"residual", "magic", "w: residual 'magic' is not known"},
                           {"means", "geometric", "w: means 'geometric' is not known"},
                           {"norm_eps", "x", "norm_eps is 'x', expected a number"}};
  for (auto [key, value, words] : rows) {
    Metadata about = describe(c, 1);
    about[key] = value;
    save_tensors(at("w.safetensors"), about, device, table, Stored{"", weights.data()});
    Config read;
    EXPECT_ERROR(read_config(SafetensorsReader(at("w.safetensors")), "w", read), words);
  }
  save_tensors(at("w.safetensors"), describe(c, -1), device, table, Stored{"", weights.data()});
  Words assumed;
  EXPECT_ERROR(read_time_shift(SafetensorsReader(at("w.safetensors")), "w", {}, assumed),
               "w: metadata time_shift is -1, not positive");
  save_tensors(at("w.safetensors"), describe(c, 1), device, table, Stored{"", weights.data()});
  SafetensorsReader file(at("w.safetensors"));
  Config read;
  EXPECT_ERROR(read_config(file, "w", read, 4), "--heads 4: w says that it has 2");
  EXPECT_EQ(read_config(file, "w", read, 2), Words());
}

// ---------------------------------------------------------------------------------------------
// 7.1 The probe

// A regression's samples: t = 3 + <a, x> + noise, the features of very different sizes and far from
// zero.
struct Relation {
  static constexpr size_t n = 1200, D = 70;
  static constexpr double noise = 2;
  std::vector<double> x, a;
  Labels labels{1};

  static double size(size_t d) { return std::pow(10, double(d % 5) * 2 - 4); }
  Relation() {
    for (size_t d = 0; d < D; ++d) a.push_back((d % 2 ? 1 : -0.5) / size(d));
    for (size_t i = 0; i < n * D; ++i)
      x.push_back(size(i % D) * (5 + gaussian(1, streams::check, i)));
    for (size_t i = 0; i < n; ++i)
      labels[0].push_back(std::inner_product(a.begin(), a.end(), &x[i * D], 3.0) +
                          noise * gaussian(2, streams::check, i));
  }
  // Of the best line: the features' part of the variance.
  static double expected() {
    double part = 0.5 * D * (1 + 0.25);
    return part / (part + noise * noise);
  }
};

// The same written down plainly, with the flaws that such a thing may have.
struct Plain {
  const char* flaw = "";

  bool has(const char* what) const { return std::string(flaw) == what; }

  // The intercept is a feature that is one everywhere and is not penalised.
  Line line(const std::vector<double>& x, const std::vector<double>& t, size_t n, size_t D,
            double penalty, size_t scaled_by) const {
    std::vector<double> mean(D), s(D, 1);
    Dense rows(n, D + 1);
    for (size_t i = 0; i < scaled_by; ++i)
      for (size_t d = 0; d < D; ++d) mean[d] += x[i * D + d] / double(scaled_by);
    for (size_t d = 0; d < D && !has("not standardised"); ++d) {
      double squares = 0;
      for (size_t i = 0; i < scaled_by; ++i) squares += std::pow(x[i * D + d] - mean[d], 2);
      s[d] = std::sqrt(squares / double(scaled_by));
    }
    for (size_t i = 0; i < n; ++i) {
      for (size_t d = 0; d < D; ++d) rows(i, d) = (x[i * D + d] - mean[d]) / s[d];
      rows(i, D) = has("no intercept") ? 0 : 1;
    }
    Dense S = transpose(rows) * rows, w = transpose(rows) * Dense(n, 1, {t.begin(), t.begin() + n});
    for (size_t d = 0; d <= D; ++d)
      if (d < D || rows(0, D) == 0) S(d, d) += penalty * (has("a sum for a mean") ? 1 : double(n));
    for (size_t k = 0; k <= D; ++k)  // Gauss and Jordan
      for (size_t i = 0; i <= D; ++i) {
        if (i == k) continue;
        double f = S(i, k) / S(k, k);
        for (size_t j = k; j <= D; ++j) S(i, j) -= f * S(k, j);
        w(i, 0) -= f * w(k, 0);
      }
    Line line{w(D, 0) / S(D, D), {}};
    for (size_t d = 0; d < D; ++d) {
      line.weights.push_back(w(d, 0) / S(d, d) / s[d]);
      line.intercept -= line.weights[d] * mean[d];
    }
    return line;
  }

  Probed operator()(const std::vector<double>& x, const Labels& labels, ProbeSplit split) const {
    const std::vector<double>& t = labels[0];
    size_t n = split.fit + split.choose, D = x.size() / t.size();
    bool peeks = has("chosen on the test images"),
         scales = has("standardised over the test images");
    Probed best;
    for (int power = -8; power <= 2; ++power) {
      double penalty = std::pow(10, power);
      Line part = line(x, t, split.fit, D, penalty, scales ? t.size() : split.fit);
      size_t from = peeks ? n : split.fit;
      double r2 = r_squared(part, &x[from * D], &t[from], peeks ? split.test : split.choose);
      if (r2 > best.r2) best = {{}, penalty, r2};
    }
    best.line = line(x, t, n, D, best.penalty, scales ? t.size() : n);
    size_t from = has("tested on the training images") ? 0 : n;
    best.r2 = r_squared(best.line, &x[from * D], &t[from], split.test);
    return best;
  }
};

// Whether what is found is the relation, and owes nothing to the test images.
template <class Prober>
bool is_honest(const Prober& probe) {
  Relation r;
  ProbeSplit split(r.n);
  Probed found = probe(r.x, r.labels, split), same = Plain()(r.x, r.labels, split);
  bool good = std::abs(found.r2 - r.expected()) < 0.03 && found.penalty == same.penalty &&
              std::abs(found.line.intercept - same.line.intercept) < 1e-6;
  for (size_t d = 0; d < r.D; ++d) {
    good &= std::abs(found.line.weights[d] / r.a[d] - 1) < 0.6;
    good &= std::abs(found.line.weights[d] / same.line.weights[d] - 1) < 1e-8;
  }
  for (size_t i = split.fit + split.choose; i < r.n; ++i) {
    r.labels[0][i] = 3 + gaussian(3, streams::check, i);
    for (size_t d = 0; d < r.D; ++d) r.x[i * r.D + d] *= 2;
  }
  Probed other = probe(r.x, r.labels, split);
  return good && other.r2 < 0 && other.penalty == found.penalty &&
         other.line.weights == found.line.weights;
}

TEST(Probe, RidgeFindsARelationAndWrongOnesAreRejected) {
  EXPECT_TRUE(is_honest([](const std::vector<double>& x, const Labels& labels, ProbeSplit split) {
    return fit_and_test(x, labels, split)[0];
  }));
  EXPECT_TRUE(is_honest(Plain()));
  for (const char* flaw :
       {"no intercept", "not standardised", "a sum for a mean", "chosen on the test images",
        "standardised over the test images", "tested on the training images"})
    EXPECT_FALSE(is_honest(Plain{flaw})) << flaw;
}

TEST(Probe, ShuffledLabelsAndConstantFeaturesTellNothing) {
  Relation r;
  ProbeSplit split(r.n);
  Labels labels = {r.labels[0], {}, random_values(r.n, 5)};
  for (size_t i : shuffled(r.n, 1, streams::probe_shuffle)) labels[1].push_back(labels[0][i]);
  std::vector<Probed> found = fit_and_test(r.x, labels, split);
  EXPECT_NEAR(found[0].r2, Relation::expected(), 0.03);
  EXPECT_LT(found[1].r2, 0.05);
  EXPECT_GT(found[1].r2, -0.1);
  EXPECT_EQ(found[2].penalty, 100) << "of noise: the smaller the weights the better";
  for (size_t i = 0; i < r.x.size(); ++i) r.x[i] = 1e3 * (1 + 1e-9 * double(i % 7));
  found = fit_and_test(r.x, labels, split);
  EXPECT_LE(found[0].r2, 0);
  for (double w : found[0].line.weights) EXPECT_EQ(w, 0);
}

// A feature that varies by a ten-thousandth of itself tells as much as any.
TEST(Probe, SmallVariationsAreRead) {
  constexpr size_t n = 256;
  std::vector<double> x;
  Labels labels(1);
  for (size_t i = 0; i < n; ++i) {
    labels[0].push_back(uniform(1, streams::check, i));
    x.push_back(7 * (1 + 1e-4 * labels[0][i]));
  }
  Probed found = fit_and_test(x, labels, ProbeSplit(n))[0];
  EXPECT_NEAR(found.r2, 1, 1e-14);
  EXPECT_DOUBLE_EQ(found.penalty, 1e-8) << "of an exact relation: the larger, the worse";
}

TEST(Probe, ShufflingIsAPermutationAndTheSplitIsWhole) {
  std::vector<size_t> order = shuffled(500, 1, 2), sorted = order;
  std::sort(sorted.begin(), sorted.end());
  size_t fixed = 0;
  for (size_t i = 0; i < 500; ++i) EXPECT_EQ(sorted[i], i), fixed += order[i] == i;
  EXPECT_LT(fixed, 8u);
  EXPECT_NE(shuffled(500, 2, 2), order);
  for (size_t n : {64, 65, 66, 67, 4096}) {
    ProbeSplit split(n);
    EXPECT_EQ(split.fit + split.choose + split.test, n);
    EXPECT_EQ(split.test, n / 4);
    EXPECT_NEAR(double(split.fit), 3 * double(split.choose), 3) << "a quarter of what is left";
  }
}

// Every 16th image of the file is held out: on these it is tested, and on no image twice.
TEST_F(TrainTest, TheProbeIsTestedOnHeldOutImages) {
  Dataset numbered = synthetic(1024);
  for (size_t i = 0; i < numbered.images; ++i) numbered.pixels[i * 64] = float(i);
  save_latents(at("numbered.safetensors"), numbered);
  ProbeOptions o;
  o.data = at("numbered.safetensors"), o.images = 256;
  Dataset images = probe_images(o);
  ProbeSplit split(256);
  std::set<float> seen;
  for (size_t i = 0; i < 256; ++i) {
    float number = images.pixels[i * 64];
    EXPECT_TRUE(seen.insert(number).second) << number;
    EXPECT_EQ(size_t(number) % 16 == 15, i >= split.fit + split.choose) << i;
    EXPECT_EQ(images.caption[i], int32_t(size_t(number) % 4));
  }
}

// Each sample's image, time, noise and caption are restated here; the states are those that a
// network which trains keeps, and the features come from them in fp64.
TEST_F(TrainTest, ProbeFeaturesAreThoseOfTheStates) {
  everywhere([&](Device& device, auto type) {
    using Real = decltype(type);
    using Acc = AccOf<Real>;
    constexpr size_t n = 7, depth = 4, D = 32, N = 16, tokens = 19, pixels = 64;
    SamplingNetwork<Real> s(device, options(depth).model, 3);
    Dataset some = without_images(data_);
    append_images(some, data_, {5, 0, 9, 20, 3, 8, 41});
    auto features = probe_features(s.net, some, {0, 3, depth}, 6);
    ASSERT_EQ(features.size(), 10u);

    Network<Real> keeps(device, s.net.config, n, 0, true);
    device.copy(keeps.weights(), s.net.weights(), s.net.table.size * sizeof(Real));
    std::vector<Acc> z;
    std::vector<Real> text;
    std::vector<std::vector<double>> expected(10);
    for (size_t i = 0; i < n; ++i) {
      double t = uniform(6, streams::probe_time, i), sum = 0, squares = 0;
      for (size_t p = 0; p < pixels; ++p)
        z.push_back(Acc((1 - t) * some.pixels[i * pixels + p] +
                        t * gaussian(6, streams::probe_noise, i * pixels + p)));
      for (size_t w = 0; w < 15; ++w)
        text.push_back(Real(some.text[size_t(some.caption[i]) * 15 + w]));
      std::vector<double> image(z.end() - pixels, z.end());
      for (double v : image) sum += v / pixels, squares += v * v / pixels;
      auto [least, most] = std::minmax_element(image.begin(), image.end());
      for (double v : {sum, std::sqrt(squares), std::sqrt(squares - sum * sum), *least, *most})
        expected[0].push_back(v);
    }
    device.upload(keeps.arrays.z, z.data(), z.size() * sizeof(Acc));
    device.upload(keeps.arrays.text, text.data(), text.size() * sizeof(Real));
    keeps.forward(n);
    size_t kind = 1;
    for (size_t layer : {size_t(0), size_t(3), depth}) {
      auto X = from(device, keeps.input(layer), n * tokens * D);
      for (size_t at = 0; at < n * D; ++at) {
        auto x = [&](size_t t) { return double(X[(at / D * tokens + t) * D + at % D]); };
        double image = 0, rest = 0, caption = 0;
        for (size_t t = 0; t < tokens; ++t) (t < N ? image : caption) += x(t);
        image /= N, caption /= double(tokens - N);
        for (size_t t = 0; t < N; ++t) rest += std::pow(x(t) - image, 2) / N;
        expected[kind].push_back(image);
        expected[kind + 1].push_back(std::sqrt(rest));
        expected[kind + 2].push_back(caption);
      }
      kind += 3;
    }
    for (size_t k = 0; k < 10; ++k) {
      SCOPED_TRACE(features[k].layer + " " + features[k].name);
      EXPECT_LT(distance(expected[k], features[k].x), device.gpu ? rounding<Real> : 1e-6);
      EXPECT_EQ(features[k].layer, k == 0 ? "z" : k < 4 ? "0" : k < 7 ? "3" : "4");
    }
  });
}

// ---------------------------------------------------------------------------------------------
// 8. The command line

struct Outcome {
  int status;
  std::string out, err;
};

// The words of `mvsplit subcommand`; `changes` replace the flags of the same name. --flag= is one
// whose value is empty.
std::vector<std::string> arguments(const char* subcommand, const std::string& flags,
                                   const std::string& changes) {
  std::map<std::string, std::string> values;
  std::string name, word;
  for (std::istringstream in(flags + " " + changes); in >> word;)
    if (word.rfind("--", 0) == 0 && word.back() == '=')
      values.erase(word.substr(0, word.size() - 1)), values[word] = "";
    else if (word.rfind("--", 0) == 0)
      values[name = word] = "";
    else
      values[name] = word;
  std::vector<std::string> words = {"mvsplit", subcommand};
  for (const auto& [flag, value] : values) {
    words.push_back(flag);
    if (flag.back() == '=') words.back().pop_back();
    if (!value.empty() || flag.back() == '=') words.push_back(value);
  }
  return words;
}

Outcome run(const std::vector<std::string>& words) {
  std::vector<const char*> argv;
  for (const std::string& word : words) argv.push_back(word.c_str());
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  int status = command(int(argv.size()), argv.data());
  std::string out = testing::internal::GetCapturedStdout();
  return {status, out, testing::internal::GetCapturedStderr()};
}
Outcome run(const char* subcommand, const std::string& flags, const std::string& changes = "") {
  return run(arguments(subcommand, flags, changes));
}

// The program as a process of its own, which begins with prepare().
pid_t start_program(std::vector<std::string> words, const std::function<void()>& prepare) {
  std::string program = fs::read_symlink("/proc/self/exe").parent_path() / "mvsplit";
  EXPECT_TRUE(fs::exists(program)) << "build it first: make test does";
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  pid_t child = fork();
  if (child == 0) {
    for (int signal : {SIGPIPE, SIGHUP}) std::signal(signal, SIG_DFL);  // train has run in here
    prepare();
    execv(program.c_str(), argv.data());
    _exit(1);
  }
  return child;
}
pid_t start_program(const std::vector<std::string>& words, const std::string& console) {
  return start_program(words, [&] {
    if (!std::freopen(console.c_str(), "w", stdout)) _exit(1);
  });
}

std::vector<std::string> device_flags() {
  if (Device::gpus() == 0) return {"--device cpu"};
  return {"--device cpu", "--device gpu"};
}

// The file's tensors with "__metadata__": null, which is none.
void without_metadata(const std::string& from, const std::string& to) {
  std::string bytes = read_text(from), key = "\"__metadata__\":";
  uint64_t length;
  std::memcpy(&length, bytes.data(), 8);
  size_t begin = bytes.find(key) + key.size(), size = bytes.find('}', begin) + 1 - begin;
  bytes.replace(begin, size, "null" + std::string(size - 4, ' '));
  std::ofstream(to, std::ios::binary) << bytes;
}

// Status 2 and one line that says what is wrong.
void expect_refused(const Outcome& outcome, const std::string& words) {
  EXPECT_EQ(outcome.status, 2) << words;
  EXPECT_PRED_FORMAT2(testing::IsSubstring, words, outcome.err);
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
}

// While it lives, no file may grow beyond `bytes`: writes fail as on a full disk.
struct FullDisk {
  explicit FullDisk(rlim_t bytes) : handler(std::signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &before);
    rlimit now = {bytes, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &now);
  }
  ~FullDisk() {
    setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, handler);
  }
  void (*handler)(int);
  rlimit before;
};

// With a file of latents, and a run of two steps in "run".
class CommandTest : public TrainTest {
 protected:
  CommandTest() {
    save_latents(at("data.safetensors"), all_);
    Dataset bad = all_;
    bad.pixels[1000] = NAN;
    save_latents(at("nan.safetensors"), bad);
    save_latents(at("many.safetensors"), synthetic(1024));
    std::string common = "--device cpu --steps 2 --data " + at("data.safetensors");
    sizes_ = " --depth 4 --width 32 --heads 2 --ffn 64 --patch 2 --batch 4 --precision fp32";
    train_ = common + sizes_ + " --out " + at("run");
    sample_ = common + " --prompt 3 --columns 2 --weights " + at("run/weights.safetensors") +
              " --out " + at("out.safetensors");
    probe_ = "--device cpu --precision fp32 --images 256 --data " + at("many.safetensors") +
             " --weights " + at("run/weights.safetensors") + " --out " + at("probe.csv");
    EXPECT_EQ(run("train", train_).status, 0);
  }
  // The start of a file in another file.
  std::string cut(const std::string& name) const {
    std::string bytes = read_text(at(name));
    std::ofstream(at("cut.safetensors"), std::ios::binary) << bytes.substr(0, bytes.size() - 100);
    return at("cut.safetensors");
  }
  std::string sizes_, train_, sample_, probe_;
};

TEST_F(CommandTest, BadInputIsRefusedAndNothingIsTouched) {
  const std::string small = "--width 64 --height 32 --image-width 32";
  fs::create_directories(at("torn"));
  fs::rename(cut("run/state.safetensors"), at("torn/state.safetensors"));
  const std::string weights = cut("run/weights.safetensors"),
                    begin = "--out " + at("new") + " --weights " + at("run/weights.safetensors");
  std::ofstream(at("lambda.ini")) << "[train]\nlambda = 1\n[plan]\nlambda = 1\n";
  fs::create_directories(at("foreign"));
  std::ofstream(at("foreign/weights.safetensors")) << "somebody's";
  std::ofstream(at("probe.csv")) << "# The time t, of an earlier probe";
  auto save = [&](const char* name, Dataset d, const std::function<void(Dataset&)>& change) {
    change(d);
    d.pixels.resize(d.images * d.image_size()), d.empty_text.resize(d.text_tokens * d.text_dim);
    d.text.resize(d.captions * d.empty_text.size());
    save_latents(at(name) + ".safetensors", d);
    return "--data " + at(name) + ".safetensors";
  };
  const Dataset some = synthetic(256);
  save("longer", synthetic(1024), [](Dataset& d) { d.text_tokens = 5, d.text_dim = 3; });
  const std::string other = save("other", all_, [](Dataset&d) { d.pixels[0] += 1; }),
                    other_text = save("text", all_, [](Dataset&d) { d.text[20] += 1; }),
                    other_empty = save("empty", all_, [](Dataset&d) { d.empty_text[3] += 1; }),
                    other_caption = save("caption", all_, [](Dataset&d) { d.caption[0] = 1; }),
                    channels = save("channels", some, [](Dataset&d) { d.channels = 2; }),
                    height = save("height", some, [](Dataset&d) { d.height = 4; }),
                    width = save("width", some, [](Dataset&d) { d.width = 4; }),
                    tokens = save("tokens", some, [](Dataset&d) { d.text_tokens = 2; }),
                    dim = save("dim", some, [](Dataset&d) { d.text_dim = 4; });
  save("other_validation", all_, [](Dataset& d) { d.pixels[15 * 64] += 1; });  // held out
  const std::string huge_weights = "--weights " + at("huge.safetensors");
  {
    Config c;
    read_config(SafetensorsReader(at("run/weights.safetensors")), "", c);
    Table table = parameter_table(c);
    std::vector<float> numbers(table.size, 1e38f);
    save_tensors(at("huge.safetensors"), describe(c, 1), Device(), table,
                 Stored{"", numbers.data()});
  }
  for (const char* name : {"samples.png", "samples.safetensors", "ema.safetensors"}) {
    fs::create_directories(at("with_") + name);
    std::ofstream(at("with_") + name + "/" + name) << "somebody's";
  }
  struct {
    const char* subcommand;
    std::string changes;
    std::string words;
  } rows[] = {
      {"train", "", at("run") + "/state.safetensors exists: go on with --resume"},
      {"train", "--heads 3", "width 32 is not divisible by 3 heads"},
      {"train", "--heads 16", "head dimension 2 (width 32 / heads 16) is not a multiple"},
      {"train", "--patch 3", "image of 8x8 cannot be cut into patches of 3x3"},
      {"train", "--residual magic", "residual 'magic' is not known: choose one of postnorm"},
      {"train", "--means no", "means 'no' is not known: choose segment or global"},
      {"train", "--magic 1", "'--magic' is no option of train (mvsplit train --help lists them)"},
      {"train", "--stepps 1", "'--stepps' is no option of train; did you mean --steps?"},
      {"train", "--save_every 1",
       "'--save_every' is no option of train; did you mean --save-every?"},
      {"train", "--weight 1", "did you mean --weight-decay?"},
      {"train", "--confg 1", "did you mean --config?"},
      {"train", "--prompt cat", "'--prompt' is no option of train, but of sample"},
      {"sample", "--depth 3", "'--depth' is no option of sample, but of train, gradcheck, plan"},
      {"train", "--resume=perhaps", "--resume perhaps: expected true or false"},
      {"train", "--resume yes", "'yes' was not expected: a value that has blanks needs quotes"},
      {"train", "--resume sample", "train and sample: give one subcommand"},
      {"probe", "--weights --seed", "--seed needs a value"},
      {"trian", "",
       "'trian' is not a subcommand: choose one of train, sample, forward, probe, "
       "validate, gradcheck, plan; did you mean train?"},
      {"bare forward", "", "forward needs --weights and --inputs and --out\n"},
      {"magic", "", "'magic' is not a subcommand: choose one of train, sample"},
      {"train", "--batch -4", "--batch"},
      {"train", "--batch 0", "--batch"},
      {"train", "--batch 2000000", "must be from 1 to 1,048,575"},
      {"train", "--batch four",
       "--batch four: expected a whole number in decimal digits, below 2^64"},
      {"train", "--batch 1000000 --width 4096", "the largest --batch that fits is"},
      {"plan", "--depth 1 --patch 65536 --channels 4096", "larger than any machine"},
      {"plan", small + " --depth 100000 --batch 1048575", "larger than any machine"},
      {"plan", "--height 8 --data " + at("data.safetensors"), "--height is what --data"},
      {"plan", small + " --images 18446744073709551615", "images and 10 captions are larger"},
      {"plan", small + " --val-images 18446744073709551615",
       "captions are larger than any machine"},
      {"plan", small + " --images 18446744073709551400 --val-images 216", "captions are larger"},
      {"plan", small + " --captions 18446744073709551614", "captions are larger than any machine"},
      {"plan", "--depth 1 --patch 65536 --channels 4096 --batch 1000000 --width 8 --heads 1",
       "larger than any machine"},
      {"train", "--batch 1000000 --width 4096 --memory 1e9", "the largest --batch that fits is"},
      {"train", "--beta 1e39", "--beta 1e39: expected a number below 3.4e38"},
      {"sample", "--cfg -1e300", "--cfg -1e300: expected a number below 3.4e38"},
      {"plan", "--config " + at("run/config.ini"), "config.ini has no section [plan]"},
      {"train", "--accumulate 0", "--batch and --accumulate must be from 1"},
      {"train", "--accumulate 2000000", "--batch and --accumulate must be from 1"},
      {"train", "--depth 0", "at least 1"},
      {"train", "--depth -1", "--depth -1: expected a whole number in decimal digits"},
      {"train", "--steps -5", "--steps -5: expected a whole number in decimal digits"},
      {"train", "--weight-decay nan", "--weight-decay nan: expected a decimal number"},
      {"train", "--clip -1", "--clip must be"},
      {"train", "--writer-std -2", "writer-std and final-std must be at least 0"},
      {"gradcheck", "--final-std -0.1", "writer-std and final-std must be at least 0"},
      {"train", "--xavier-gain -1", "xavier-gain -1 is below 0"},
      {"gradcheck", "--xavier-gain 1 --writer-std 0", "leave one out (writer-std -1)"},
      {"train", "--steps 4 --decay-steps 5", "--decay-steps must be at most --steps"},
      {"train", "--beta nan", "--beta nan: expected a decimal number"},
      {"train", "--warmup -5", "--warmup -5: expected"},
      {"train", "--recompute -1",
       "--recompute -1: expected a whole number in decimal digits, from 0 to 100000, or auto"},
      {"train", "--val-images -1", "--val-images -1: expected"},
      {"train", "--clip nan", "--clip nan: expected a decimal number"},
      {"train", "--weight-decay -1", "--weight-decay must be at least 0"},
      {"train", "--alpha nan", "--alpha nan: expected a decimal number"},
      {"train", "--out " + at("foreign"), "weights.safetensors exists, but no state to go on from"},
      {"train", "--out " + at("with_samples.png"), "samples.png exists, but no state to go on"},
      {"train", "--out " + at("with_samples.safetensors"), "samples.safetensors exists, but no"},
      {"train", "--out " + at("with_ema.safetensors"), "ema.safetensors exists, but no state"},
      {"train", "--ffn 6", "ffn 6 is not a multiple of 4"},
      {"train", "--lr 0", "--lr must be positive"},
      {"train", "--lr nan", "--lr nan: expected a decimal number"},
      {"train", "--ema 1", "--ema must be"},
      {"train", "--dropout 1.5", "--dropout must be"},
      {"train", "--time-shift -1", "--time-shift must be"},
      {"train", "--log-every 0", "--log-every must be"},
      {"train", "--log-every 925", "--log-every must be from 1 to 924"},
      {"train", "--val-images 0", "--val-images must be"},
      {"train", "--norm-eps 0", "norm-eps 0 is not in"},
      {"train", "--diagnose-layers 0,4", "'4' is not a layer: give numbers from 0 to 3"},
      {"train", "--diagnose-layers first", "'first' is not a layer"},
      {"train", "--diagnose-layers -1", "'-1' is not a layer"},
      {"train", "--diagnose-every -1",
       "--diagnose-every -1: expected a whole number in decimal digits"},
      {"train", "--diagnose-samples 0", "--diagnose-samples must be at least 1"},
      {"train", "--spike-factor 0.5", "--spike-factor must be 0 (off) or above 1"},
      {"train", "--spike-factor nan", "--spike-factor nan: expected a decimal number"},
      {"train", "--device tpu", "--device"},
      {"train", "--precision fp8", "--precision"},
      {"train", "--config " + at("none.ini"), "none.ini"},
      {"train", "--data " + at("none.safetensors"), "none.safetensors: No such file"},
      {"train", "--data " + weights, "cut.safetensors: truncated"},
      {"train", "--data " + at("nan.safetensors"), "nan.safetensors: latents[15, 0, 5, 0] is nan"},
      {"train", "--out " + at("data.safetensors/run"), "cannot create " + at("data.safetensors")},
      {"train", "--out=", "--out must name a folder"},
      {"train", "--out " + std::string(300, 'x'), "cannot create xxx"},
      {"train", "--resume --out " + std::string(300, 'x'), "x/state.safetensors: File name too"},
      {"train", "--resume --out " + at("torn"), "torn/state.safetensors: truncated"},
      {"train", "--resume --depth 5", "was made with depth = 4 (now 5): resume with the same"},
      {"train", "--resume --residual postnorm", "made with residual = mvsplit"},
      {"train", "--resume --means global", "made with means = segment"},
      {"train", "--resume --batch 5", "was made with batch = 4"},
      {"train", "--resume --no-patch-bias", "was made with no-patch-bias = false (now true)"},
      {"train", "--resume --seed 2", "was made with seed = 1"},
      {"train", "--resume --accumulate 2", "was made with accumulate = 1 (now 2)"},
      {"train", "--resume --dropout 0.2", "was made with dropout = 0.1 (now 0.2)"},
      {"train", "--resume " + other,
       "was made with other images or captions than " + at("other.safetensors")},
      {"train", "--resume " + other_text, "with other images or captions than " + at("text")},
      {"train", "--resume " + other_empty, "with other images or captions than " + at("empty")},
      {"train", "--resume " + other_caption, "with other images or captions than " + at("caption")},
      {"train", "--resume --data " + at("other_validation.safetensors"),
       "was made with other held-out images than " + at("other_validation.safetensors")},
      {"train", "--resume --val-images 3", "was made with val-images = 4 (now 3)"},
      {"train", "--resume --fix beta,alpha", "made with fix = nothing (now alpha,beta)"},
      {"train", "--fix lambda", "fix 'lambda': residual mvsplit has no such gate"},
      {"train", "--fix alpha --residual rezero", "fix 'alpha': residual rezero has no such gate"},
      {"train", "--fix beta,gamma", "fix 'gamma': residual mvsplit has no such gate"},
      {"train", "--lambda nan --residual rezero", "--lambda nan: expected a decimal number"},
      {"train", "--lambda 1", "--lambda: residual mvsplit has no such gate"},
      {"train", "--alpha 0 --residual postnorm", "--alpha: residual postnorm has no such gate"},
      {"train", "--config " + at("lambda.ini"), "--lambda: residual mvsplit has no such gate"},
      {"train", "--resume --config " + at("lambda.ini") + " --residual prenorm",
       "--lambda: residual prenorm has no such gate"},
      {"plan", "--config " + at("lambda.ini"), "--lambda: residual mvsplit has no such gate"},
      {"plan", "--beta 1 --residual layerscale", "--beta: residual layerscale has no such gate"},
      {"gradcheck", "--beta 1 --residual prenorm", "--beta: residual prenorm has no such gate"},
      {"train", begin + " --depth 5 --heads 4 --patch 4 --no-patch-bias --residual postnorm",
       "--weights " + at("run/weights.safetensors") +
           " has depth = 4 (not 5), heads = 2 (not 4), patch = 2 (not 4), residual = mvsplit (not "
           "postnorm), no-patch-bias = false (not true)"},
      {"train", begin + " --residual mvsplit-ffn", "has residual = mvsplit (not mvsplit-ffn)"},
      {"train", begin + " --residual magic", "residual 'magic' is not known"},
      {"train", begin + " --beta 1", "--beta is where a drawn network starts, not that of --weig"},
      {"train", begin + " --lambda 1", "--lambda is where a drawn network starts"},
      {"train", begin + " --writer-std 0", "--writer-std is where a drawn network starts"},
      {"train", begin + " --final-std 0", "--final-std is where a drawn network starts"},
      {"train", begin + " --xavier-gain 0", "--xavier-gain is where a drawn network starts"},
      {"train", begin + " --fix lambda", "fix 'lambda': residual mvsplit has no such gate"},
      {"train", begin + " " + height,
       "numbers, the model takes 1 x 8 x 8 and 3 x 5 (" + at("run/weights.safetensors")},
      {"train", begin + " " + channels, "images of 2 x 8 x 8 and captions of 3 x 5 numbers, the"},
      {"train", begin + " " + dim, "captions of 3 x 4 numbers, the model takes 1 x 8 x 8 and 3 x"},
      {"train", begin + " --weights " + weights, "cut.safetensors: truncated"},
      {"train", begin + " --weights " + at("none"), "none: No such file"},
      {"train", begin + " --weights " + at("run/state.safetensors"), "not the weights of this mo"},
      {"train", "--resume --weights " + at("bare.safetensors"),
       "was made with weights = nothing (now " + at("bare.safetensors")},
      {"bare train", "--weights " + at("bare.safetensors"), "give --heads (the author's released"},
      {"train", "--resume --ema 0.9", "was made with ema = 0"},
      {"train", "--resume --precision fp64", "was made with precision = fp32"},
      {"train", "--resume --precision bf16", "was made with precision = fp32"},
      {"train", "--state lean", "--state lean is for --precision bf16 alone"},
      {"train", "--state tiny", "--state"},
      {"train", "--save nothing", "--save"},
      {"train", "--recompute some", "--recompute"},
      {"train", "--memory -1", "--memory must be at least 0"},
      {"train", "--memory 1e-6", "may take 0.00 GB: not even a batch of one fits"},
      {"train", "--batch 4000 --memory 0.1", "may take 0.10 GB: the largest --batch that fits is"},
      {"sample", "--weights " + at("none"), "none: No such file"},
      {"sample", "--weights " + weights, "cut.safetensors: truncated"},
      {"sample", "--weights " + at("data.safetensors"), "not the weights of this model"},
      {"sample", "--prompt 4", "--prompt 4: " + at("data.safetensors") + " has captions 0 to 3"},
      {"sample", "--prompt 18446744073709551617", "has captions 0 to 3"},
      {"sample", "--prompt sneaker",
       "--prompt sneaker: " + at("data.safetensors") + " has captions"},
      {"sample", "--prompt=", "--prompt : " + at("data.safetensors") + " has captions 0 to 3"},
      {"sample", "--heads 4",
       "--heads 4: " + at("run/weights.safetensors") + " says that it has 2"},
      {"sample", "--size 16", "says that its images are 8x8"},
      {"sample", "--text-tokens 8", "says that it has 3"},
      {"sample", "--columns 1000 --out " + at("out.png"), "pixels are more than 16384 a side"},
      {"sample", "--weights " + at("bare.safetensors"),
       "bare.safetensors does not say how many attention heads it has: give --heads"},
      {"probe", "--weights " + at("bare.safetensors"), "give --heads (the author's released model"},
      {"forward", "--weights " + at("bare.safetensors"), "give --heads (the author's released"},
      {"sample", "--weights " + at("pipe"), "pipe: it is not a regular file"},
      {"train", "--data " + at("pipe.safetensors"), "it is not a regular file"},
      {"sample", "--columns 0", "--columns"},
      {"bare sample", "", "was trained on captions from a file: name it with --data"},
      {"sample", "--out " + at("out.jpg"), "out.jpg: the name must end in .png or .safetensors"},
      {"sample", tokens, "captions of 2 x 5 numbers, the model takes 3 x 5"},
      {"sample", dim, "captions of 3 x 4 numbers, the model takes 3 x 5"},
      {"sample", huge_weights, "the samples hold NaN or infinity"},
      {"forward", huge_weights, "the results hold NaN or infinity"},
      {"forward", "--inputs=", "--inputs names no file"},
      {"train", "--weights=", "--weights names no file"},
      {"sample", "--cfg nan", "--cfg nan: expected a decimal number"},
      {"sample", "--norm-eps 0", "norm-eps 0 is not in"},
      {"probe", "--norm-eps -1", "norm-eps -1 is not in"},
      {"sample", "--time-shift -1", "must be positive"},
      {"sample", "--out " + at("none/out.png"), "create its directory"},
      {"probe", "--weights " + at("none"), "none: No such file"},
      {"probe", "--weights " + weights, "cut.safetensors: truncated"},
      {"probe", "--weights " + at("data.safetensors"), "not the weights of this model"},
      {"probe", "--layers 0,5", "--layers: '5' is not a layer: give numbers from 0 to 4"},
      {"probe", "--layers z", "'z' is not a layer"},
      {"probe", "--images 63", "--images 63: it must be at least 64, and at most 259"},
      {"probe", "--data " + at("data.safetensors"),
       "is too small to probe: it has 60 training and 4 held-out images, expected at least 48 and "
       "16"},
      {"probe", "--images 260", "960 training and 64 held-out images of " + at("many.safetensors")},
      {"probe", "--images -64", "--images -64: expected a whole number in decimal digits"},
      {"probe", "--batch 0", "--batch"},
      {"probe", "--data " + at("run/weights.safetensors"), "unknown tensor"},
      {"probe", "--data " + at("textless.safetensors"), "tensor text (M,L,d_text) is missing"},
      {"probe", "--data " + at("longer.safetensors"), "captions of 5 x 3 numbers, the model takes"},
      {"probe", "--images 64 " + channels,
       "images of 2 x 8 x 8 and captions of 3 x 5 numbers, the model takes"},
      {"probe", "--images 64 " + height,
       "images of 1 x 4 x 8 and captions of 3 x 5 numbers, the model takes"},
      {"probe", "--images 64 " + width,
       "images of 1 x 8 x 4 and captions of 3 x 5 numbers, the model takes"},
      {"probe", "--images 64 " + tokens,
       "images of 1 x 8 x 8 and captions of 2 x 5 numbers, the model takes"},
      {"probe", "--images 64 " + dim,
       "captions of 3 x 4 numbers, the model takes 1 x 8 x 8 and 3 x 5"},
      {"probe", huge_weights, "the states at layer 0 hold NaN or infinity"},
      {"probe", "--out " + at("none/probe.csv"), "create its directory"},
      {"probe", "--out " + at("run"), "it exists and is not a regular file"},
      {"bare validate", "", "validate needs --weights"},
      {"validate", "--weights " + at("data.safetensors"), "not the weights of this model"},
      {"validate", "--images 5",
       "--images 5: " + at("data.safetensors") + " has 4 held-out images"},
      {"validate", "--images 0",
       "--images 0: " + at("data.safetensors") + " has 4 held-out images"},
      {"validate", "--bins 0",
       "--bins 0: expected a whole number in decimal digits, from 1 to 1000"},
      {"validate", "--time-shift 0", "--time-shift must be positive, not 0"},
      {"validate", dim, "captions of 3 x 4 numbers, the model takes 1 x 8 x 8 and 3 x 5"},
      {"validate", huge_weights, "the loss is NaN or infinity"},
      {"validate", "--out " + at("run"), "it exists and is not a regular file"},
  };
  {
    SafetensorsWriter textless(at("textless.safetensors"));
    textless.declare("latents", "F32", {1, 1, 8, 8});
    textless.write(all_.pixels.data(), 64);
    textless.finish();
  }
  {
    SafetensorsWriter inputs(at("in.safetensors"));
    inputs.declare("z", "F32", {1, 1, 8, 8}), inputs.declare("text", "F32", {1, 3, 5});
    inputs.write(all_.pixels.data(), 64), inputs.write(all_.text.data(), 15);
    inputs.finish();
  }
  without_metadata(at("run/weights.safetensors"), at("bare.safetensors"));
  ASSERT_EQ(mkfifo(at("pipe").c_str(), 0600), 0);
  fs::create_symlink(at("pipe"), at("pipe.safetensors"));
  const std::string huge = "--width 1048576 --height 65536 --image-width 65536 --memory 1";
  std::map<std::string, std::string> flags = {
      {"train", train_}, {"sample", sample_}, {"probe", probe_}, {"plan", huge}};
  flags["forward"] = "--device cpu --inputs " + at("in.safetensors") + " --out " + at("out");
  flags["validate"] = "--device cpu --data " + at("data.safetensors") + " --weights " +
                      at("run/weights.safetensors") + " --out " + at("losses.csv");
  flags["bare train"] = "--device cpu --data " + at("data.safetensors") + " --out " + at("new");
  flags["bare sample"] = "--device cpu --prompt 3 --weights " + at("run/weights.safetensors") +
                         " --out " + at("out.png");
  auto before = files();
  for (const auto& row : rows) {
    std::string name = row.subcommand;
    expect_refused(run(name.substr(name.find(' ') + 1).c_str(), flags[name], row.changes),
                   row.words);
    ASSERT_TRUE(files() == before) << row.words;
  }
}

TEST_F(CommandTest, MemoryThatIsUsedUpIsAnError) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the sanitizer takes memory of its own";
#endif
  std::vector<std::string> words = arguments("sample", sample_, "--columns 1000");
  for (int i = 0; i < 3000; ++i) words.insert(words.end(), {"--prompt", "3"});  // 180 MB of text
  size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit before, now;
  getrlimit(RLIMIT_AS, &before);
  now = before, now.rlim_cur = pages * size_t(sysconf(_SC_PAGESIZE)) + 50'000'000;
  setrlimit(RLIMIT_AS, &now);
  Outcome outcome = run(words);
  setrlimit(RLIMIT_AS, &before);
  expect_refused(outcome, "the memory is used up");
}

TEST_F(CommandTest, AFullDiskLeavesWhatWasThere) {
  auto numbers = [&] {
    std::map<std::string, std::string> kept;
    for (const auto& [path, bytes] : files())
      if (path.find(".csv") == std::string::npos && path.find(".ini") == std::string::npos)
        kept[path] = bytes;  // logs grow while they can, and the options say what is wanted
    return kept;
  };
  auto before = numbers();
  {
    FullDisk full(16384);
    expect_refused(run("train", train_, "--resume --steps 3"),
                   "cannot write " + at("run") + "/state.safetensors: File too large");
    expect_refused(run("sample", sample_, "--columns 100"), "out.safetensors: File too");
  }
  EXPECT_TRUE(numbers() == before);
  EXPECT_EQ(run("train", train_, "--resume --steps 3").status, 0) << "with room";
  EXPECT_EQ(run("sample", sample_).status, 0);
}

// What a resumed run will not do again is on the disk when a state says that it is done.
TEST_F(CommandTest, AStateIsSavedAfterAllThatBelongsToItsSteps) {
  const std::string flags =
      "--resume --steps 3 --columns 1 --diagnose-every 1 --save-every 1 --val-every 1 "
      "--sample-every 1";
  {
    FullDisk full(16384);  // for the state alone
    Outcome full_disk = run("train", train_, flags);
    EXPECT_EQ(full_disk.status, 2);
    for (const char* when : {"warning: ", "mvsplit: "})  // when it is due, and at the end
      EXPECT_PRED_FORMAT2(testing::IsSubstring,
                          when + ("cannot write " + at("run")) + "/state.safetensors",
                          full_disk.err);
  }
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "\n3,", read_text(at("run/validation.csv")));
  EXPECT_TRUE(fs::exists(at("run/samples_000003.png")));
  flushed.clear();
  EXPECT_EQ(run("train", train_, flags).status, 0);
  auto last = [&](const char* name) {
    return std::find(flushed.rbegin(), flushed.rend(), name).base() - flushed.begin();
  };
  for (const char* name : {"log.csv", "diagnostics.csv", "samples_000003.png.tmp"})
    EXPECT_LT(last(name), last("state.safetensors.tmp")) << name;
  auto validation = std::find(flushed.begin(), flushed.end(), "validation.csv");
  EXPECT_LT(validation - flushed.begin(), last("state.safetensors.tmp"));
  for (auto [log, times] : {std::pair("log.csv", 1),
                            {"diagnostics.csv", 1},
                            {"validation.csv", 2}})  // again with the row of the run's end
    EXPECT_EQ(std::count(flushed.begin(), flushed.end(), log), times) << log;
  for (size_t i = 0; i < flushed.size(); ++i) {  // a name lives in its folder
    if (fs::path(flushed[i]).extension() != ".tmp") continue;
    EXPECT_EQ(i + 1 < flushed.size() ? flushed[i + 1] : "", "run") << flushed[i];
  }
}

TEST_F(TrainTest, ALogKeepsWholeRowsOfStepsThatAreDone) {
  struct {
    const char *before, *after;
  } rows[] = {{"1,0.5\n2,0.25\n", "1,0.5\n2,0.25\n"},
              {"1,0.5\n2,0.25\n3,0.125\n", "1,0.5\n2,0.25\n"},
              {"1,0.5\n2,0.2", "1,0.5\n"},  // of 0.25, maybe
              {"1,0.5\n2", "1,0.5\n"},
              {"1,0.5\n\n2,0.25,9\n", "1,0.5\n"},
              {"1,0.5\n1,0.75\n2,0.25\n", "1,0.5\n2,0.25\n"}};
  for (auto [before, after] : rows) {
    const std::string header = "step,loss\n";
    std::ofstream(at("log.csv")) << header << before;
    CsvLog(at("log.csv"), "step,loss", 2);
    EXPECT_EQ(read_text(at("log.csv")), header + after) << before;
  }
  {
    CsvLog log(at("log.csv"), "step,loss", 2);
    for (const char* row : {"2,9", "3,0.5", "3,9"}) log.row(uint64_t(row[0] - '0'), row);
  }
  EXPECT_EQ(read_text(at("log.csv")), "step,loss\n1,0.5\n2,0.25\n3,0.5\n") << "each step once";
  // What is left out for another reason than that its step is done again is kept.
  for (const char* before : {"1,0.5\n# mine\n2,0.25\n", "9,0.5\n1,0.5\n", "1,0.5\n2,0.25"}) {
    for (const auto& entry : fs::directory_iterator(folder_)) fs::remove(entry);
    std::ofstream(at("log.csv")) << "step,loss\n" << before;
    testing::internal::CaptureStderr();
    CsvLog(at("log.csv"), "step,loss", 2);
    bool lost = *before == '1';  // not the step that is done again
    EXPECT_EQ(testing::internal::GetCapturedStderr().empty(), !lost) << before;
    EXPECT_EQ(fs::exists(at("log.csv.1")), lost) << before;
    if (lost) {
      EXPECT_EQ(read_text(at("log.csv.1")), std::string("step,loss\n") + before);
    }
  }
  std::ofstream(at("log.csv")) << "step,loss\n1,0.5\n2,0.25\n";
  EXPECT_ERROR(CsvLog(at("log.csv"), "step,norm", 2), "describes other rows than this run's: move");
  EXPECT_ERROR(CsvLog(folder_, "step,loss", 2), "it is not a regular file");
}

TEST_F(TrainTest, RowsWaitForTheDisk) {
  CsvLog log(at("log.csv"), "step,loss", 0);
  const std::string names = "step,loss\n", loss = "," + std::string(3000, '1');
  testing::internal::CaptureStderr();
  {
    FullDisk full(5000);  // for the names and a row
    for (const char* step : {"1", "2", "3"}) log.row(std::stoul(step), step + loss);
    EXPECT_EQ(read_text(at("log.csv")), names + "1" + loss + "\n") << "whole rows";
    EXPECT_ERROR(log.sync(), "cannot write " + at("log.csv"));
  }
  log.sync();
  EXPECT_EQ(read_text(at("log.csv")), names + "1" + loss + "\n2" + loss + "\n3" + loss + "\n");
  std::string warned = testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(warned.begin(), warned.end(), '\n'), 1) << warned;
}

TEST_F(TrainTest, ARunBeginsWhereItsStateHasRoom) {
  float number;
  struct {
    bool lean = false;
    TrainOptions o;
    TrainArrays<float, float> a{};
    struct {
      struct {
        size_t count() const { return size_t(1) << 50; }
      } table;
      const float* weights() const { return nullptr; }
    } net;
    std::array<Stored<float>, 1> slots() const { return {Stored{"m.", a.average}}; }
  } huge;
  huge.a.average = &number, huge.o.out = folder_;
  EXPECT_ERROR(require_room(huge), "state.safetensors: it needs 9007199254740992 bytes");
  huge.o.save_every = 1;  // the next one is written beside it
  EXPECT_ERROR(require_room(huge), "state.safetensors: it needs 18014398509481984 bytes");
  huge.o.save = "weights", huge.o.save_every = 0;
  EXPECT_ERROR(require_room(huge), "weights.safetensors: it needs 4503599627370496 bytes");
  EXPECT_TRUE(files().empty());
}

TEST_F(CommandTest, ADivergedRunHasItsPage) {
  if (!fs::exists("data/page.sh")) GTEST_SKIP() << "it is made where the source is";
  const std::string flags = "--warmup 0 --lr 1e30 --steps 30 --diagnose-every 1 --out " + at("far");
  Outcome outcome = run("train", train_, flags + " --diagnose-samples 99 --val-images 99");
  EXPECT_EQ(outcome.status, 1) << outcome.err;
  EXPECT_TRUE(fs::exists(at("far/page.html")));
  for (const char* flag :
       {"note: --diagnose-samples 99: there are", "note: --val-images 99: there"})
    EXPECT_NE(outcome.err.find(flag), std::string::npos) << outcome.err;
}

// What failed at 400 layers with beta 1 held with 1/sqrt(depth) (RESULTS.md). The runs do not begin.
TEST_F(CommandTest, DeepNetworksAreToldOfBeta) {
  auto said = [&](const std::string& flags) {
    Outcome outcome = run("train", train_, "--memory 1e-6 --out " + flags);
    EXPECT_NE(outcome.err.find("not even a batch of one fits"), std::string::npos) << outcome.err;
    return outcome.err.find("1/sqrt(depth), here --beta 0.05 (") != std::string::npos;
  };
  EXPECT_TRUE(said(at("deep") + " --depth 400"));
  EXPECT_FALSE(said(at("asked") + " --depth 400 --beta 1"));
  EXPECT_FALSE(said(at("other") + " --depth 400 --residual postnorm"));
  EXPECT_FALSE(said(at("shallow") + " --depth 399"));
}

// main() asks whether it is train, whose files hold what the console does.
TEST(CommandLineTest, ASubcommandIsFoundBehindItsConfiguration) {
  EXPECT_EQ(subcommand_at({"sample", "--prompt", "train"}), 0u);
  EXPECT_EQ(subcommand_at({"--config", "x.ini", "train"}), 2u);
  EXPECT_EQ(subcommand_at({"--config=x.ini", "train", "--steps", "1"}), 1u);
}

TEST_F(CommandTest, ResumingNothingSaysSo) {
  const std::string fresh = "--resume --out " + at("fresh"), words = "no state in " + at("fresh");
  for (const char* steps : {" --steps 1", " --steps 2"}) {
    Outcome outcome = run("train", train_, fresh + steps);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_EQ(outcome.out.find(words) != std::string::npos, steps[9] == '1') << outcome.out;
  }
}

// Whether it is seen in a line of the log, behind the last one, in the gradient alone, or by the
// validation of weights that no step has tried.
TEST_F(CommandTest, ARunThatDivergesIsNotSaved) {
  std::string before = read_text(at("run/weights.safetensors"));
  const std::pair<std::string, const char*> rows[] = {
      {"--resume --steps 30 --lr 1e30", "loss nan"},
      {"--resume --steps 9 --lr 1e30", "loss nan"},
      {"--steps 1 --final-std 1e16 --out " + at("far"), "norm      inf"}};
  for (const auto& [changes, words] : rows) {
    Outcome outcome = run("train", train_, "--warmup 0 " + changes);
    EXPECT_EQ(outcome.status, 1) << changes;
    EXPECT_PRED_FORMAT2(testing::IsSubstring, "training has diverged", outcome.err);
    EXPECT_PRED_FORMAT2(testing::IsSubstring, words, outcome.out);
    EXPECT_TRUE(read_text(at("run/weights.safetensors")) == before);
  }
  EXPECT_FALSE(fs::exists(at("far/weights.safetensors")));
  Outcome last = run("train", train_, "--warmup 0 --resume --steps 3 --lr 1e30");
  EXPECT_EQ(last.status, 1);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "validation loss ", last.out);
}

// log.csv and validation.csv against a trainer that is asked itself.
TEST_F(CommandTest, LogsHoldWhatTheTrainerSays) {
  Outcome outcome =
      run("train", train_,
          "--steps 3 --val-every 2 --final-std 0.1 --accumulate 2 --out " + at("logged"));
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  TrainOptions o;
  Config& m = o.model;
  m.depth = 4, m.width = 32, m.heads = 2, m.ffn = 64, m.patch = 2, m.final_std = 0.1;
  fit_to_data(m, data_);
  o.batch = 4, o.accumulate = 2;
  Device cpu;
  Trainer<float> t(cpu, o, data_, held_out_);
  std::string log = "step,loss,gradient_norm,lr\n", validation = "step,loss\n";
  for (size_t step = 1; step <= 3; ++step) {
    t.train_step();
    Record r = t.history(step - 1)[0];
    EXPECT_GT(std::abs(r.loss - r.norm), 0.1) << "which is which could not be told";
    EXPECT_GT(t.validate(), 1);
    log += text_of("%zu,%.9g,%.9g,%.9g\n", step, r.loss, r.norm, r.lr);
    if (step > 1) validation += text_of("%zu,%.9g\n", step, t.validate());
  }
  EXPECT_EQ(read_text(at("logged/log.csv")), log);
  EXPECT_EQ(read_text(at("logged/validation.csv")), validation);
  // On the console two steps' mean, and how many tokens their time was for.
  std::vector<Record> two = t.history(0);
  double milliseconds = 0, tokens = 0, loss = (two[0].loss + two[1].loss) / 2;
  size_t line = outcome.out.find("step      2/3  loss "), time = outcome.out.find("lr ", line);
  ASSERT_NE(line, std::string::npos) << outcome.out;
  EXPECT_NEAR(std::stod(outcome.out.substr(line + 20)), loss, 1e-4);
  EXPECT_GT(std::abs(two[1].loss - loss), 1e-3) << "the check is blind";
  ASSERT_EQ(std::sscanf(outcome.out.c_str() + time, "lr %*f %lf ms/step %lf tokens/s",
                        &milliseconds, &tokens),
            2);
  EXPECT_NEAR(1e-3 * milliseconds * tokens / (2 * 4 * 19), 1, 0.3) << "of few digits";
}

// `forward` on the inputs, weights and cotangents of tests/oracle.safetensors.
TEST_F(TrainTest, ForwardAgreesWithTheOracle) {
  SafetensorsReader oracle("tests/oracle.safetensors");
  const std::set<std::string> inputs = {"z", "text", "cotangent"};
  // A file of the model's inputs, or of its weights; one tensor may be damaged.
  auto copy = [&](const char* file_name, const std::string& model, const Metadata& about,
                  bool of_inputs, const std::string& damaged = "") {
    SafetensorsWriter file(at(file_name), about);
    for (bool write : {false, true})
      for (const TensorInfo& tensor : oracle.tensors()) {
        if (tensor.name.rfind(model + "/", 0) != 0) continue;
        std::string name = tensor.name.substr(model.size() + 1);
        bool output = name == "velocity" || name.rfind("grad.", 0) == 0;
        if (output || (inputs.count(name) > 0) != of_inputs) continue;
        std::vector<double> values(tensor.count());
        oracle.read(tensor, values.data(), 0, values.size());
        if (name == damaged) values[7] = NAN;
        write ? file.write(values.data(), values.size()) : file.declare(name, "F64", tensor.shape);
      }
    file.finish();
  };
  for (const std::string& device : device_flags())
    for (const auto& entry : oracle.metadata()) {
      const std::string& model = entry.first;
      Metadata about;
      std::istringstream words(entry.second);
      for (std::string word; words >> word;)
        about[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
      copy("weights", model, about, false), copy("inputs", model, {}, true);
      auto forward = [&] {
        return run("forward", device + " --precision fp64 --recompute 1 --weights " +
                                  at("weights") + " --inputs " + at("inputs") + " --out " +
                                  at("out"));
      };
      Outcome outcome = forward();
      ASSERT_EQ(outcome.status, 0) << outcome.err;
      SafetensorsReader out(at("out"));
      for (const TensorInfo& tensor : out.tensors()) {
        std::vector<double> got(tensor.count()), want(got.size());
        out.read(tensor, got.data(), 0, got.size());
        oracle.read(oracle.require(model + "/" + tensor.name, tensor.shape), want.data(), 0,
                    want.size());
        EXPECT_LE(distance(want, got), 1e-10) << model << " " << tensor.name;
      }
      EXPECT_EQ(out.tensors().size(), SafetensorsReader(at("weights")).tensors().size() + 3);
      for (const std::string& input : inputs) {
        copy("inputs", model, {}, true, input);
        outcome = forward();
        expect_refused(outcome, "inputs: " + input + "[0, ");
        expect_refused(outcome, "is nan, expected a finite float");
      }
    }
}

TEST_F(CommandTest, StoppedAndResumedWritesTheSameFiles) {
  for (const char* precision : {"fp32", "bf16"}) {
    auto train = [&](const char* out, const std::string& changes) {
      std::string common = std::string(
                               " --ema 0.9 --log-every 3 --diagnose-every 1 "
                               "--diagnose-layers 3,0 --precision ") +
                           precision;
      ASSERT_EQ(run("train", train_, changes + common + " --out " + at(out)).status, 0);
    };
    train("through", "--steps 5"), train("stopped", "--steps 3");
    // Killed between two saves, a run has logged a step that it will do again.
    std::ofstream(at("stopped/log.csv"), std::ios::app) << "4,9,9,9\n5,9";
    std::string rows = read_text(at("stopped/diagnostics.csv")), again = rows;
    again.replace(0, again.rfind("\n3,3,") + 1, "");
    std::ofstream(at("stopped/diagnostics.csv"), std::ios::app) << again << "4" << again.substr(1);
    train("stopped", "--steps 5 --resume");
    for (const char* name : {"weights.safetensors", "ema.safetensors", "state.safetensors",
                             "log.csv", "diagnostics.csv", "samples.png"}) {
      EXPECT_FALSE(read_text(at("through/") + name).empty()) << name;
      EXPECT_TRUE(read_text(at("through/") + name) == read_text(at("stopped/") + name)) << name;
    }
    fs::remove_all(at("through")), fs::remove_all(at("stopped"));
  }
}

// One row a chosen layer, in order, under a header that names and explains every column.
TEST_F(CommandTest, DiagnosticsAreARowAStepAndLayer) {
  ASSERT_EQ(run("train", train_,
                "--steps 5 --diagnose-every 2 --diagnose-layers 3,1 --out " + at("diagnosed"))
                .status,
            0);
  std::istringstream csv(read_text(at("diagnosed/diagnostics.csv")));
  std::string line, about, names, steps;
  size_t columns = 0;
  while (std::getline(csv, line)) {
    if (line[0] == '#') {
      about += line + "\n";
    } else if (names.empty()) {
      names = line;
      std::istringstream words(line);
      for (std::string name; std::getline(words, name, ','); ++columns)
        EXPECT_PRED_FORMAT2(testing::IsSubstring, "# " + name + ": ", about);
    } else {
      steps += line.substr(0, 4);
      EXPECT_EQ(size_t(std::count(line.begin(), line.end(), ',')), columns - 1);
    }
  }
  EXPECT_EQ(columns, 34u);
  EXPECT_EQ(steps, "2,1,2,3,4,1,4,3,");
  // A run that goes on counts from its first step.
  ASSERT_EQ(run("train", train_, "--resume --steps 6 --out " + at("diagnosed")).status, 0);
  std::string rows = read_text(at("diagnosed/diagnostics.csv"));
  EXPECT_EQ(rows.substr(rows.rfind('\n', rows.size() - 2) + 1, 4), "6,3,");
  auto before = files();
  expect_refused(
      run("train", train_,
          "--resume --steps 7 --diagnose-every 1 --diagnose-samples 3 --out " + at("diagnosed")),
      "diagnostics.csv describes other rows than this run's");
  EXPECT_TRUE(files() == before);
}

TEST_F(CommandTest, ASpikeLeavesAReportAndACalmRunNone) {
  auto reports = [&](const std::string& changes) {
    std::string out = " --steps 75 --out " + at("spikes");
    EXPECT_EQ(run("train", train_, out + " " + changes).status, 0);
    std::map<size_t, std::string> found;  // by step
    for (const auto& entry : fs::directory_iterator(at("spikes"))) {
      std::string name = entry.path().filename();
      if (name.rfind("spike_", 0) == 0) found[std::stoul(name.substr(6))] = read_text(entry.path());
    }
    fs::remove_all(at("spikes"));
    return found;
  };
  EXPECT_TRUE(reports("").empty());
  EXPECT_TRUE(reports("--spike-factor 0").empty());
  auto found = reports("--spike-factor 1.01");  // a step above the median is enough
  ASSERT_FALSE(found.empty());
  for (const char* words : {"Verdict: ", "blocks.", "Writers, largest G_mean first",
                            "layer     3 W2", "Gradients with NaN or infinity: 0",
                            "dL/dvelocity, last pass: mean", "Losses, largest first"})
    EXPECT_PRED_FORMAT2(testing::IsSubstring, words, found.begin()->second);
  // A collapse can follow within a hundred steps of a first spike, which it need not have to do
  // with.
  found = reports("--spike-factor 1.01 --log-every 1 --steps 450");
  EXPECT_EQ(found.size(), 10u) << "ten of a process";
  auto norm = [](const std::string& report) {
    return std::stod(report.substr(report.find("norm ") + 5));
  };
  size_t soon = 0, nearest = 100;
  for (auto next = found.begin(), last = next++; next != found.end(); last = next++) {
    if (next->first > last->first + 25) nearest = std::min(nearest, next->first - last->first);
    EXPECT_LT(next->first, last->first + 100);
    if (next->first > last->first + 25) continue;
    ++soon;  // only because it outgrew the last one
    EXPECT_GT(norm(next->second), norm(last->second));
  }
  EXPECT_LT(soon, 9u);
  EXPECT_LT(nearest, 40u) << "25 steps of rest";
}

TEST_F(CommandTest, AConfigurationFileGivesWhatNoFlagDoes) {
  std::ofstream(at("train.ini")) << "[train]\ndepth = 3\nwidth=16\nheads = 1\nresidual=\"rezero\"\n"
                                 << "batch=2\nffn = 20\npatch=4\nsteps = 1\nwarmup=5\nlr=0.02\n"
                                 << "data=\"" << at("data.safetensors") << "\"\ndevice=\"cpu\"\n";
  for (bool flag : {false, true}) {
    std::string flags = "--config " + at("train.ini") + " --out " + at("configured");
    if (flag) flags += " --depth 2 --residual postnorm";
    ASSERT_EQ(run("train", flags).status, 0);
    std::string path = at("configured/weights.safetensors");
    SafetensorsReader file(path);
    Config c;
    read_config(file, path, c);
    EXPECT_EQ(c.residual, flag ? "postnorm" : "rezero");
    EXPECT_EQ((std::vector<size_t>{c.depth, c.width, c.heads, c.ffn, c.patch}),
              (std::vector<size_t>{flag ? 2u : 3u, 16, 1, 20, 4}));
    EXPECT_EQ(file.metadata().at("step"), "1");
    std::string log = read_text(at("configured/log.csv"));
    EXPECT_EQ(log.substr(log.rfind(',')), ",0.004\n") << "lr / warmup";
    fs::remove_all(at("configured"));
  }
}

// ---------------------------------------------------------------------------------------------
// 8.1 Options, from words and from files

// The options of two subcommands, and what reads them.
struct OptionsOf {
  CLI::App app;
  TrainOptions train;
  SampleOptions sample;
  Machine machine;
  const std::vector<Subcommand> all = {add_train(app, train, machine),
                                       add_sample(app, sample, machine)};

  void take(const Words& words) {
    CommandLine line = read_words(words, all);
    set_options(*line.sub, line.given);
  }
  void take_file(const std::string& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
    for (const auto& [name, given] : read_ini(path, all)) set_options(*find(all, name), given);
  }
};

TEST_F(TrainTest, NumbersAreDecimalAndFit) {
  const std::string ini = at("x.ini");
  const char* no_whole[] = {
      "",      "-1",    "+5",   " 5",   "5 ",    "5.0", "1e3", "0x10",
      "1_000", "1'000", "0b11", "true", "1,000", "nan", "٣",   "18446744073709551616"};
  const char* no_decimal[] = {"",       "nan",    "inf",  "-infinity", "1e400", "1e-400", "0,001",
                              "1e-3ab", "0x1p-3", "+0.1", " 1",        "1 ",    "1_000",  "1'000",
                              "--1",    "1e",     "1e 3", ".",         "1.2.3", "true",   "-"};
  for (const char* text : no_whole) {
    std::string said = *text ? text : "''",
                expected = said + ": expected a whole number in decimal digits";
    EXPECT_ERROR(OptionsOf().take({"train", "--seed", text}), "--seed " + expected);
    EXPECT_ERROR(OptionsOf().take({"train", std::string("--seed=") + text}), "--seed " + expected);
    EXPECT_ERROR(OptionsOf().take_file(ini, "[train]\n" + ini_line("seed", text)),
                 "x.ini:2: seed = " + expected);
    EXPECT_ERROR(positive_integer(text, "it"), "it is '" + std::string(text));
  }
  for (const char* text : no_decimal) {
    std::string said = *text ? text : "''", expected = said + ": expected a decimal number";
    EXPECT_ERROR(OptionsOf().take({"train", "--lr", text}), "--lr " + expected);
    EXPECT_ERROR(OptionsOf().take_file(ini, "[train]\n" + ini_line("lr", text)),
                 "x.ini:2: lr = " + expected);
    EXPECT_ERROR(finite_number(text, "it"), "it is '" + std::string(text));
  }
  std::pair<const char*, size_t> wholes[] = {
      {"0", 0}, {"010", 10}, {"0009", 9}, {"18446744073709551615", SIZE_MAX}};
  for (auto [text, value] : wholes) {
    OptionsOf words, file;
    words.take({"train", "--seed", text}),
        file.take_file(ini, "[train]\nseed = " + std::string(text));
    EXPECT_EQ(words.train.seed, value) << text;
    EXPECT_EQ(file.train.seed, value) << text;
  }
  std::pair<const char*, double> decimals[] = {{"1e-3", 1e-3},   {".5", 0.5}, {"5.", 5},
                                               {"-0.25", -0.25}, {"010", 10}, {"1E+2", 100}};
  for (auto [text, value] : decimals) {
    OptionsOf words, file;
    words.take({"train", "--lr", text}), file.take_file(ini, "[train]\nlr = " + std::string(text));
    EXPECT_EQ(words.train.optimizer.lr, value) << text;
    EXPECT_EQ(file.train.optimizer.lr, value) << text;
  }
  for (double x : {0.1, 1e-6, 1.0 / 3, 1e300, 4.9e-324, -7.0})
    EXPECT_EQ(finite_number(shortest(x), ""), x);
  EXPECT_ERROR(OptionsOf().take({"train", "--columns", "1001"}), "digits, from 1 to 1000");
  EXPECT_ERROR(OptionsOf().take({"train", "--recompute", "18446744073709551615"}), "or auto");
}

// Whatever a text holds, it is one text and stays as it is.
TEST_F(TrainTest, TextsAreTakenAsTheyAre) {
  const Words texts = {"",
                       "cat",
                       "a,b",
                       "a b",
                       "[cat]",
                       "[cat, dog]",
                       "[]",
                       "[[cat]]",
                       "{}",
                       "{a,b}",
                       "%%",
                       "-x",
                       "--",
                       "--x",
                       "'",
                       "\"",
                       "'a'",
                       "\"a\"",
                       "a\"b",
                       "it's",
                       "a\\nb",
                       "a\nb",
                       "a#b",
                       "a # b",
                       "# a",
                       "; a",
                       "a ; b",
                       " a ",
                       "\ta",
                       "a=b",
                       "=",
                       "@x",
                       "$HOME",
                       "🐱",
                       "\\",
                       "train",
                       "-h",
                       "--help",
                       "true",
                       "\r",
                       "a\x01z",
                       "[train]",
                       std::string(5000, 'x')};
  Words words = {"sample"};
  std::string ini = "[sample]\n";
  for (const std::string& text : texts) {
    words.push_back("--prompt"), words.push_back(text), ini += ini_line("prompt", text);
    for (const char* option : {"weights", "data", "out"}) {
      OptionsOf one, joined, file;
      one.take({"sample", std::string("--") + option, text});
      joined.take({"sample", std::string("--") + option + "=" + text});
      file.take_file(at("x.ini"), "[sample]\n" + ini_line(option, text));
      for (const OptionsOf* o : {&one, &joined, &file})
        EXPECT_EQ(o->all[1].find(option)->write(), text);
    }
  }
  OptionsOf from_words, from_file;
  from_words.take(words), from_file.take_file(at("x.ini"), ini);
  EXPECT_EQ(from_words.sample.prompts, texts);
  EXPECT_EQ(from_file.sample.prompts, texts);
  from_words.take({"sample", "--prompt=--steps", "--prompt", "cat", "--steps", "3"});
  EXPECT_EQ(from_words.sample.prompts, (Words{"--steps", "cat"}));
  EXPECT_ERROR(from_words.take({"sample", "--prompt", "--steps", "3"}), "--prompt needs a value");
  EXPECT_ERROR(from_words.take({"sample", "--prompt"}), "--prompt needs a value");
  for (const char* word : {"-steps", "---steps", "--", "-", "-5"})
    EXPECT_ERROR(from_words.take({"sample", word, "3"}),
                 "'" + std::string(word) + "' was not expected: options begin with two dashes");
  EXPECT_ERROR(from_words.take({"sample", "--prompt", "cat", "dog"}), "'dog' was not expected");
  EXPECT_ERROR(from_words.take({"train", "--steps", "3", "--lr", "1", "--steps=4"}),
               "--steps is given twice, as 3 and as 4: leave one out");
}

TEST_F(TrainTest, ConfigurationFilesAreReadOrRefused) {
  const std::string bom = "\xef\xbb\xbf", nul(1, '\0');
  const std::string good[] = {
      "[train]\nsteps=3\n",
      "[train]\r\nsteps=3\r\n",
      bom + "[train]\nsteps=3\n",
      bom + "# a run\n[train]\nsteps=3",
      "; x\r\n# y\r\n[train]\r\nsteps=3",
      "[ train ] # mine\n steps =\t3",
      "[train]\nsteps=3 ; three\n",
      "[train]\nsteps = 3 # three\n",
      "[train]\nsteps=\"3\" # three",
      "[train]\nsteps='3'\n\n",
      "[sample]\nsteps=4\n[train]\nsteps=3",
      "[train]\n[train]\n#\n  ;\nsteps=3",
  };
  for (const std::string& bytes : good) {
    OptionsOf o;
    o.take_file(at("x.ini"), bytes);
    EXPECT_EQ(o.train.steps, 3u) << bytes;
  }
  const std::pair<std::string, std::string> bad[] = {
      {"[train]\n\ndpth = 3\n", "x.ini:3: 'dpth' is no option of train; did you mean depth?"},
      {"[train]\n--depth=3", "x.ini:2: '--depth' is no option of train; did you mean depth?"},
      {"[train]\nprompt=3", "x.ini:2: 'prompt' is no option of train, but of sample"},
      {"[sample]\nstps=3", "x.ini:2: 'stps' is no option of sample; did you mean steps?"},
      {"[trian]\nsteps=3",
       "x.ini:1: there is no section [trian]: choose one of train, sample; did"},
      {"[train\nsteps=3", "x.ini:1: '[train' is no section"},
      {"[train] steps=3", "x.ini:1: '[train] steps=3' is no section"},
      {"steps=3\n[train]", "x.ini:1: 'steps' stands before the first section"},
      {"train.steps=3", "x.ini:1: 'train.steps' stands before the first section"},
      {"[train]\nsteps=3\nlr=1\nsteps=3", "x.ini:4: steps is given twice"},
      {"[train]\nsteps", "x.ini:2: 'steps' has no value: expected steps = ..."},
      {"[train]\nsteps=", "x.ini:2: steps = '': expected a whole number"},
      {"[train]\nsteps= # three", "x.ini:2: steps = '': expected a whole number"},
      {"[train]\n=3", "x.ini:2: '' is no option of train"},
      {"[train]\nsteps=3#4", "x.ini:2: steps = 3#4: expected a whole number"},
      {"[train]\nsteps=3 4", "x.ini:2: steps = 3 4: expected a whole number"},
      {"[train]\nsteps=\"3", "x.ini:2: the quote \" has no partner"},
      {"[train]\nout='a' b", "x.ini:2: 'b' follows the quotes"},
      {"[train]\nout=\"\\d\"", "x.ini:2: \"\\d\" is no text: write \\\\ for a backslash"},
      {"[train]\nout=\"\\u0000\"", "is no text"},
      {"[train]\nno-patch-bias=1", "x.ini:2: no-patch-bias = 1: expected true or false"},
      {"[train]\ndevice=tpu", "x.ini:2: device = tpu: expected one of auto, cpu, gpu"},
      {"[train]\nconfig=y.ini", "x.ini:2: a configuration file cannot name another"},
      {"[train]\nsteps=" + nul + "3", "x.ini:2: there is a zero byte"},
      {"[train]\n\x1b[31m=3", "x.ini:2: '\\x1b[31m' is no option"},
      {"\xff\xfe[" + nul, "x.ini is UTF-16: save it as UTF-8"},
      {"\xfe\xff" + nul + "[", "x.ini is UTF-16: save it as UTF-8"},
      {std::string(1 << 20, '#'), "x.ini is too large"},
  };
  for (const auto& file : bad)
    EXPECT_ERROR(OptionsOf().take_file(at("x.ini"), file.first), file.second) << file.first;
  for (const char* list : {"alpha,beta", "alpha, beta", "alpha beta", "[alpha,beta] # two",
                           "[\"alpha\", \"beta\"]", "\"alpha\" \"beta\"", "'alpha','beta'"}) {
    OptionsOf file, words;
    file.take_file(at("x.ini"), "[train]\nfix = " + std::string(list));
    EXPECT_EQ(file.train.model.fix, (std::set<std::string>{"alpha", "beta"})) << list;
  }
  OptionsOf o;
  o.take({"train", "--fix", "alpha", "--fix", "lambda,beta", "--diagnose-layers=0,3",
          "--resume=false"});
  EXPECT_EQ(o.train.model.fix, (std::set<std::string>{"alpha", "beta", "lambda"}));
  EXPECT_EQ(o.train.diagnose_layers, (Words{"0", "3"}));
  EXPECT_FALSE(o.train.resume);
  o.take_file(at("x.ini"), "[train]\nfix=\nno-patch-bias=true\nresume=true\nrecompute=auto");
  EXPECT_TRUE(o.train.model.fix.empty() && !o.train.model.patch_bias && o.train.resume);
  EXPECT_EQ(o.train.recompute, automatic);

  ASSERT_EQ(mkfifo(at("pipe").c_str(), 0600), 0);
  EXPECT_ERROR(read_ini(at("pipe"), o.all), "pipe: it is not a regular file");
  EXPECT_ERROR(read_ini(folder_, o.all), "it is not a regular file");
  EXPECT_ERROR(read_ini(at("none.ini"), o.all), "none.ini: No such file or directory");
  EXPECT_ERROR(read_ini("", o.all), "--config must name a file");
}

TEST(Options, DefaultsAreThePapers) {
  Optimizer o;
  EXPECT_EQ((std::vector<double>{o.lr, o.beta1, o.beta2, o.eps, o.decay, o.clip, double(o.warmup)}),
            (std::vector<double>{1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 100}));
  EXPECT_EQ(TrainOptions().dropout, 0.1);
  // Five layers, the nearest to quarters of the way.
  EXPECT_EQ(chosen_layers("", {}, 6), (std::vector<size_t>{0, 2, 3, 5, 6}));
  EXPECT_EQ(chosen_layers("", {}, 47), (std::vector<size_t>{0, 12, 24, 35, 47}));
  EXPECT_EQ(chosen_layers("", {}, 2), (std::vector<size_t>{0, 1, 2}));
}

// Ten blocks in spans of three are four spans, of which all but the last are replayed.
TEST(Options, OperationsAreThoseOfEachPass) {
  TrainOptions o;
  o.model.depth = 10, o.batch = 3;
  double forward = forward_flops(o.model, 3);
  EXPECT_EQ((o.accumulate = 1, o.recompute = 0, step_flops(o)), 3 * forward);
  EXPECT_NEAR((o.accumulate = 2, o.recompute = 3, step_flops(o)) / forward, 2 * (3 + 0.9), 1e-12);
  EXPECT_EQ(peak_flops<bf16>("NVIDIA H100 80GB HBM3"), 989e12);
  EXPECT_EQ(peak_flops<bf16>("NVIDIA H200 NVL"), 836e12);
  EXPECT_EQ(peak_flops<float>("NVIDIA H200"), 67e12);
  EXPECT_EQ(peak_flops<double>("NVIDIA H200"), 0);
  EXPECT_EQ(peak_flops<bf16>("CPU"), 0);
}

// Of the ways to run with one state each next one takes less memory, and more work.
TEST(Options, EachWayToRunGivesWorkForMemory) {
  TrainOptions o;
  o.model.depth = 100;
  Table table = parameter_table(o.model);
  std::vector<Choice> all = choices<bf16>({o, table, {60, 4, 10}, false});
  EXPECT_TRUE(!all.front().lean && all.front().recompute == 0 && all.back().lean);
  size_t pairs = 0;
  for (size_t i = 1; i < all.size(); ++i) {
    if (all[i].lean != all[i - 1].lean) continue;
    EXPECT_LT(all[i].bytes, all[i - 1].bytes) << all[i].text();
    EXPECT_GT(all[i].flops, all[i - 1].flops) << all[i].text();
    EXPECT_GE(all[i].bytes, all.back().bytes) << all[i].text();
    ++pairs;
  }
  EXPECT_GE(pairs, 6u);
}

TEST(Options, ARunTakesLessThanThereIs) {
  Device cpu;
  double before = double(cpu.available()), limit = memory_limit(cpu);
  EXPECT_LT(limit, std::max(before, double(cpu.available())));
  EXPECT_GT(limit, 0.8 * before);
}

TEST(Options, TheNearestNameIsMeant) {
  const Words names = {"depth", "width", "steps", "lr", "weight-decay", "diagnose-every"};
  const std::pair<const char*, const char*> meant[] = {{"dpth", "depth"},
                                                       {"detph", "depth"},
                                                       {"stepss", "steps"},
                                                       {"rl", "lr"},
                                                       {"weight_decay", "weight-decay"},
                                                       {"diag", "diagnose-every"}};
  for (auto [word, name] : meant)
    EXPECT_EQ(like(word, names), "; did you mean " + std::string(name) + "?");
  const Words strangers = {"magic", "x", "learning-rate", "", std::string(100000, 's')};
  for (const std::string& word : strangers) EXPECT_EQ(like(word, names), "") << word;
}

TEST(Options, HelpSaysWhatThereIsAndTheDefaults) {
  OptionsOf o;
  for (const Subcommand& sub : o.all) {
    Outcome outcome = run(sub.name.c_str(), "--help");
    EXPECT_EQ(outcome.status, 0);
    EXPECT_EQ(outcome.err, "");
    for (const Option& option : sub.options) {
      EXPECT_PRED_FORMAT2(testing::IsSubstring, " --" + option.name, outcome.out);
      std::string value = option.write();
      bool said = outcome.out.find("[" + value + "]") < outcome.out.size() ||
                  outcome.out.find("=" + value) < outcome.out.size();
      EXPECT_TRUE(said || value.empty() || option.kind == Option::flag) << option.name;
    }
  }
  const char* words[] = {"mvsplit", "--help"};
  testing::internal::CaptureStdout();
  EXPECT_EQ(command(2, words), 0);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "gradcheck", testing::internal::GetCapturedStdout());
  for (int argc : {0, 1}) {
    testing::internal::CaptureStderr();
    EXPECT_EQ(command(argc, words), 2);
    EXPECT_EQ(testing::internal::GetCapturedStderr(),
              "mvsplit: no subcommand: choose one of train, sample, forward, probe, validate, "
              "gradcheck, plan\n");
  }
}

// A run that goes on has the options of its folder, and by that file it is made again.
TEST_F(CommandTest, AResumedRunHasTheOptionsOfItsFolder) {
  const std::string flags =
      "--ema 0.9 --beta 0.3 --fix beta --clip 0.5 --dropout 0.2 --time-shift 2 --seed 7 --warmup 3 "
      "--accumulate 2 --weight-decay 0.3 --no-patch-bias --norm-eps 1e-5 --writer-std 0.01 --batch "
      "3 "
      "--val-images 3 --diagnose-every 1 --diagnose-layers 0,3 --lr 3e-3 --spike-factor 7 "
      "--columns 1 --out ";
  ASSERT_EQ(run("train", train_, flags + at("through") + " --steps 4").status, 0);
  ASSERT_EQ(run("train", train_, flags + at("stopped") + " --steps 2").status, 0);
  Outcome resumed = run("train", "--resume --steps 4 --out " + at("stopped"));
  EXPECT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "note: steps was 2 and goes on as 4\n", resumed.out);
  ASSERT_EQ(run("train", "--config " + at("stopped/config.ini") + " --out " + at("again")).status,
            0);
  EXPECT_EQ(run("train", "--resume --out " + at("again")).status, 0);
  for (const char* name : {"weights.safetensors", "ema.safetensors", "state.safetensors", "log.csv",
                           "diagnostics.csv", "samples.png", "config.ini"})
    for (const char* folder : {"stopped/", "again/"})
      EXPECT_TRUE(read_text(at("through/") + name) == read_text(at(folder) + name))
          << folder << name;
  for (const Residual& residual : residuals) {
    std::string out = at(residual.name), name = std::string(" --residual ") + residual.name;
    if (std::string(residual.name) == "rezero")
      name += " --fix lambda --lambda 0.2 --xavier-gain 0.3";
    ASSERT_EQ(run("train", train_, name + " --steps 1 --columns 1 --out " + out).status, 0);
    EXPECT_EQ(run("train", "--resume --steps 2 --out " + out).status, 0) << name;
    EXPECT_EQ(run("train", "--config " + out + "/config.ini --out " + out + "2").status, 0) << name;
    EXPECT_EQ(read_text(out + "/weights.safetensors"), read_text(out + "2/weights.safetensors"));
  }
}

// What is given and other than it was: all that cannot be is named at once, and nothing is touched;
// what may be is taken, and told.
TEST_F(CommandTest, WhatAResumedRunIsGivenIsTakenOrNamed) {
  const std::string resume = "--resume --out " + at("run");
  auto before = files();
  expect_refused(
      run("train", resume + " --steps 3 --depth 5 --fix beta --beta 0.03 --seed 2 --lr 1"
                            " --precision fp64 --val-images 3 --residual mvsplit-ffn"),
      "state.safetensors was made with beta = 1 (now 0.03), depth = 4 (now 5), fix = nothing "
      "(now beta), precision = fp32 (now fp64), residual = mvsplit (now mvsplit-ffn), seed = "
      "1 (now 2), val-images = 4 (now 3), other held-out images than ");
  expect_refused(
      run("train", resume + " --alpha 1 --xavier-gain 0.5 --final-std 1 --no-patch-bias"),
      "made with alpha = 0 (now 1), final-std = 0 (now 1), no-patch-bias = false (now true), "
      "xavier-gain = 0 (now 0.5): resume with the same");
  expect_refused(run("train", resume + " --writer-std 0.5"),
                 "made with writer-std = -1 (now 0.5): resume with the same");
  EXPECT_TRUE(files() == before);
  fs::rename(at("data.safetensors"), at("moved.safetensors"));
  expect_refused(run("train", resume), "data.safetensors: No such file");
  Outcome resumed =
      run("train", resume + " --steps 3 --lr 2e-3 --clip 0 --log-every 2 --columns 3 --data " +
                       at("moved.safetensors") + " --precision auto --state auto");
  EXPECT_EQ(resumed.status, 0) << resumed.err;
  for (const std::string& note :
       {std::string("steps was 2 and goes on as 3"),
        std::string("lr was 0.001 and goes on as 0.002"),
        std::string("clip was 1 and goes on as 0"),
        std::string("log-every was 10 and goes on as 2"),
        std::string("columns was 8 and goes on as 3"),
        "data was " + at("data.safetensors") + " and goes on as " + at("moved")})
    EXPECT_PRED_FORMAT2(testing::IsSubstring, "note: " + note, resumed.out);
  std::string ini = read_text(at("run/config.ini"));
  for (const char* line : {"\nsteps=3\n", "\nlr=0.002\n", "\nclip=0\n", "\nlog-every=2\n",
                           "\nprecision=fp32\n", "\nstate=fp32\n"})
    EXPECT_PRED_FORMAT2(testing::IsSubstring, line, ini);
  EXPECT_EQ(run("train", resume).out.find("note:"), std::string::npos) << "all is as it was";
}

// A run that begins with weights has their shapes. It goes on, and is made again, bit for bit; only
// until its first save does it need the file.
TEST_F(CommandTest, ARunBeginsWithWeights) {
  const std::string common =
                        "--device cpu --batch 4 --precision fp32 --data " + at("data.safetensors"),
                    own =
                        " --norm-eps 1e-3 --means global --time-shift 2 --no-patch-bias --ema 0.5 "
                        "--final-std 0.1 --out ";
  ASSERT_EQ(run("train", train_, own + at("base")).status, 0);
  auto losses = [&](const std::string& name) {
    std::string rows = read_text(at(name) + "/validation.csv");
    return rows.substr(rows.rfind(',') + 1);
  };
  auto begin = [&](const std::string& file, const std::string& flags) {
    Outcome o = run("train", common + " --weights " + at(file) + ".safetensors " + flags);
    EXPECT_EQ(o.status, 0) << o.err;
    return o.err;
  };
  EXPECT_EQ(begin("base/ema", "--lr 1e-30 --steps 2 --out " + at("same")), "");
  EXPECT_EQ(losses("same"), losses("base"));
  EXPECT_NE(losses("same"), losses("run"));
  EXPECT_TRUE(read_text(at("same/weights.safetensors")) == read_text(at("base/ema.safetensors")));
  // What is no shape is free.
  begin("base/weights",
        "--steps 0 --means segment --norm-eps 0.25 --time-shift 3 --residual "
        "mvsplit-noleak --width 32 --out " +
            at("free"));
  Metadata said = SafetensorsReader(at("free/weights.safetensors")).metadata();
  EXPECT_EQ(said["means"] + said["norm_eps"] + said["time_shift"] + said["residual"],
            "segment0.253mvsplit-noleak");
  // Weights that do not say all.
  without_metadata(at("base/weights.safetensors"), at("bare.safetensors"));
  EXPECT_PRED_FORMAT2(testing::IsSubstring,
                      "taken are residual mvsplit-noleak, means segment, norm_eps 0.001\n",
                      begin("bare",
                            "--steps 0 --heads 2 --norm-eps 1e-3 --time-shift 2 --residual "
                            "mvsplit-noleak --out " +
                                at("told")));
  EXPECT_PRED_FORMAT2(testing::IsSubstring,
                      "taken are residual mvsplit, means segment, norm_eps "
                      "1e-06, time shift 1 (the author's released model has 4: --time-shift)\n",
                      begin("bare", "--steps 0 --heads 2 --out " + at("silent")));

  fs::copy(at("base/weights.safetensors"), at("start.safetensors"));
  const std::string flags =
      "--fix beta --ema 0.5 --columns 1 --norm-eps 1e-4 --means segment --out ";
  begin("start", flags + at("through") + " --steps 3");
  begin("start", flags + at("stopped") + " --steps 2");
  begin("start", flags + at("unsaved") + " --steps 2");
  for (const char* name :
       {"state.safetensors", "weights.safetensors", "ema.safetensors", "samples.png"})
    fs::remove(at("unsaved/") + name);
  const std::string go_on = "--resume --steps 3 --out ";
  EXPECT_EQ(run("train", go_on + at("unsaved")).status, 0);
  EXPECT_EQ(run("train", "--config " + at("stopped/config.ini") + " --steps 3 --out " + at("again"))
                .status,
            0);
  fs::rename(at("start.safetensors"), at("gone.safetensors"));
  expect_refused(run("train", go_on + at("stopped") + " --beta 1"), "--beta is where a drawn");
  expect_refused(run("train", go_on + at("stopped") + " --weights " + at("gone.safetensors")),
                 "was made with weights = " + at("start.safetensors") + " (now " + at("gone"));
  EXPECT_EQ(run("train", go_on + at("stopped")).status, 0);
  for (const char* name : {"weights.safetensors", "ema.safetensors", "state.safetensors", "log.csv",
                           "samples.png", "config.ini"})
    for (const char* folder : {"stopped/", "unsaved/", "again/"})
      EXPECT_TRUE(read_text(at("through/") + name) == read_text(at(folder) + name))
          << folder << name;
  const std::string ini = read_text(at("through/config.ini"));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "\nweights=" + at("start.safetensors") + "\n", ini);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "\nmeans=segment\n", ini);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "\ntime-shift=2\n", ini);
  EXPECT_EQ(ini.find("\nbeta="), ini.npos);
  EXPECT_EQ(ini.find("-std="), ini.npos);
  for (const char* name :
       {"state.safetensors", "weights.safetensors", "ema.safetensors", "samples.png"})
    fs::remove(at("unsaved/") + name);
  expect_refused(run("train", go_on + at("unsaved")), "start.safetensors: No such file");
}

TEST_F(CommandTest, AChangedConfigurationOfARunIsSaid) {
  const std::string path = at("run/config.ini"), ini = read_text(path),
                    resume = "--resume --out " + at("run");
  auto with = [&](const std::string& from, const std::string& to) {
    std::string changed = ini;
    return changed.replace(changed.find(from), from.size(), to);
  };
  const std::pair<std::string, std::string> bad[] = {
      {ini + "dpth=3\n",
       "config.ini:" + std::to_string(std::count(ini.begin(), ini.end(), '\n') + 1) +
           ": 'dpth' is no option of train; did you mean depth?"},
      {"", "config.ini has no options of train"},
      {with("\ndepth=4", "\ndepth=5"), "made with depth = 4 (now 5)"},
      {with("\nbeta=1", "\nbeta=2"), "made with beta = 1 (now 2)"},
      {with("\nseed=1", "\nseed=x"), "seed = x: expected a whole number"},
      {with("[train]", "[tain]"), "no section [tain]"},
      {with("\nwidth", "\nwid\nwidth"), "'wid' is no option of train; did you mean width?"},
      {"\xff\xfe" + ini, "is UTF-16"},
      {ini + std::string(1, '\0'), "a zero byte"},
  };
  for (const auto& [bytes, words] : bad) {
    std::ofstream(path, std::ios::binary) << bytes;
    auto before = files();
    expect_refused(run("train", resume), words);
    EXPECT_TRUE(files() == before) << words;
  }
  // Comments stay where nothing is to be changed; what is missing is told.
  std::string edited = "# mine\n" + with("\nclip=1\n", "\n");
  std::ofstream(path, std::ios::binary) << edited;
  Outcome outcome = run("train", resume);
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "note: it does not say clip: ", outcome.out);
  EXPECT_EQ(read_text(path), edited);
  // Without the file the flags say it all, as they did when the run began.
  fs::remove(path);
  EXPECT_EQ(run("train", train_, "--resume --steps 3").status, 0);
  EXPECT_EQ(read_text(path), with("\nsteps=2", "\nsteps=3"));
  // Without a state the run begins anew, with these options; what is given wins.
  fs::remove(at("run/state.safetensors")), fs::remove(at("run/weights.safetensors"));
  fs::remove(at("run/samples.png"));
  EXPECT_EQ(run("train", resume + " --steps 1 --depth 3").status, 0);
  Config c;
  read_config(SafetensorsReader(at("run/weights.safetensors")), "", c);
  EXPECT_EQ((std::vector<size_t>{c.depth, c.width}), (std::vector<size_t>{3, 32}));
  EXPECT_EQ(read_text(at("run/config.ini.1")), with("\nsteps=2", "\nsteps=3"));
}

// Neither an input, by whatever name, nor other tensors are written over.
TEST_F(CommandTest, WhatIsReadIsNotWrittenOver) {
  const std::string weights = at("run/weights.safetensors"), data = at("data.safetensors");
  std::string z_and_text = at("inputs.safetensors");
  {
    SafetensorsWriter inputs(z_and_text);
    inputs.declare("z", "F32", {1, 1, 8, 8}), inputs.declare("text", "F32", {1, 3, 5});
    std::vector<float> numbers(64 + 15);
    inputs.write(numbers.data(), 64), inputs.write(numbers.data(), 15);
    inputs.finish();
  }
  fs::copy(weights, at("w.safetensors.tmp"));
  fs::create_symlink(weights, at("link.safetensors"));
  fs::create_hard_link(weights, at("hard.safetensors"));
  fs::create_symlink(at("run"), at("linked"));
  fs::create_directories(at("pictures/cat"));
  std::vector<float> picture(64);
  for (const char* name : {"pictures/cat/1.png", "pictures/cat/2.png"})
    write_png_grid(at(name), picture.data(), {1, 1, 1, 8, 8, 1});
  std::ofstream(at("sample.ini")) << "[sample]\nsteps=2\n[probe]\nseed=1\n[train]\nsteps=1\n";
  const std::string forward =
      "--device cpu --weights " + weights + " --inputs " + z_and_text + " --out ";
  struct {
    const char* subcommand;
    std::string flags, changes, words;
  } rows[] = {
      {"sample", sample_, "--out " + weights, "would be written over --weights"},
      {"sample", sample_, "--out " + at("run/../run/./weights.safetensors"), "over --weights"},
      {"sample", sample_, "--out " + at("linked/weights.safetensors"), "over --weights"},
      {"sample", sample_, "--out " + at("link.safetensors"), "over --weights"},
      {"sample", sample_, "--out " + at("hard.safetensors"), "over --weights"},
      {"sample", sample_, "--out " + data, "over --data"},
      {"sample", sample_, "--out " + at("w.safetensors") + " --weights " + at("w.safetensors.tmp"),
       "over --weights"},
      {"sample", sample_, "--out " + at("run/state.safetensors"), "holds other tensors"},
      {"sample", sample_, "--out " + at("pictures/cat/1.png") + " --data " + at("pictures"),
       "over --data " + at("pictures") + ", or into it"},
      {"sample", sample_, "--out " + at("pictures/new.png") + " --data " + at("pictures"),
       "or into it"},
      {"forward", forward + weights, "", "over --weights"},
      {"forward", forward + z_and_text, "", "over --inputs"},
      {"forward", forward + data, "", "holds other tensors"},
      {"forward", forward + at("run/log.csv"), "", "is no output of forward"},
      {"sample", sample_, "--out " + at("text.png"), "is no output of sample"},
      {"validate", "--data " + data + " --weights " + weights + " --out " + at("run/log.csv"), "",
       "is no output of validate"},
      {"probe", probe_, "--out " + at("run/config.ini"), "is no output of probe"},
      {"probe", probe_, "--out " + weights, "over --weights"},
      {"probe", probe_, "--out " + at("many.safetensors"), "over --data"},
      {"probe", probe_, "--out " + data, "holds other tensors"},
      {"validate", "--data " + data, "--weights " + weights + " --out " + weights,
       "over --weights"},
      {"validate", "--weights " + weights, "--data " + data + " --out " + data, "over --data"},
      {"probe", probe_, "--out " + at("sample.ini") + " --config " + at("sample.ini"),
       "over --config"},
      {"train", train_, "--out " + at("held") + " --weights " + weights, "over --weights"},
      {"train", train_, "--out " + at("held") + " --weights " + at("held/ema.safetensors"),
       "over --weights"},
      {"train", train_,
       "--resume --out " + at("held") + " --weights " + at("held/x/../weights.safetensors"),
       "over --weights"},
      {"train", train_, "--out " + data, "over --data"},
      {"train", train_, "--out " + at("pictures") + " --data " + at("pictures"), "over --data"},
      {"train", train_, "--out " + at("pictures/run") + " --data " + at("pictures/"), "or into it"},
      {"train", train_, "--resume --out " + at("run") + " --data " + at("linked/ema.safetensors"),
       "over --data"},
      {"train", train_, "--out " + at("sample.ini") + " --config " + at("sample.ini"),
       "over --config"},
  };
  std::ofstream(at("text.png")) << "no picture";
  fs::create_hard_link(data, at("run/ema.safetensors"));
  fs::create_directories(at("held"));
  fs::create_hard_link(weights, at("held/ema.safetensors"));
  auto before = files();
  for (const auto& row : rows) {
    expect_refused(run(row.subcommand, row.flags, row.changes), row.words);
    EXPECT_TRUE(files() == before) << row.words;
  }
  // An earlier output is.
  for (int again = 0; again < 2; ++again) {
    EXPECT_EQ(run("sample", sample_).status, 0);
    EXPECT_EQ(run("forward", forward + at("velocity.safetensors")).status, 0);
    EXPECT_EQ(run("probe", probe_).status, 0);
  }
}

// The line of a plan that begins with this word.
std::string line_of(const std::string& out, const std::string& word) {
  size_t begin = out.find("  " + word + " "), end = out.find('\n', begin);
  return begin == std::string::npos ? "none" : out.substr(begin, end - begin);
}
std::string total_of(const std::string& out) { return line_of(out, "total"); }

// A process of its own, whose resident set is the run's: some 400 MB.
TEST_F(CommandTest, TakesWhatIsPlannedToOnePercent) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the sanitizer takes memory of its own";
#endif
  // On a GPU many layers of few tokens: what the graphs take is a tenth of it all.
  for (const std::string& device : device_flags()) {
    std::string sizes = device == "--device gpu"
                            ? " --depth 400 --width 128 --ffn 384 --precision bf16"
                            : " --depth 48 --width 192 --ffn 576";
    pid_t child = start_program(
        arguments("train", train_,
                  device + sizes + " --steps 1 --columns 1 --save weights --out " + at("large")),
        at("console"));
    int status = 1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_EQ(status, 0);
    std::string console = read_text(at("console"));
    double planned = std::stod(total_of(console).substr(8)),
           taken = std::stod(line_of(console, "taken").substr(8));
    EXPECT_GT(planned, 300) << "MB";
    EXPECT_NEAR(taken / planned, 1, 0.01) << console;
    fs::remove_all(at("large"));
  }
}

TEST_F(CommandTest, PlanPrintsTheTotalThatTrainTakes) {
  const std::string data =
      " --images 60 --captions 4 --val-images 4 --height 8 --image-width 8 --text-tokens 3 "
      "--text-dim 5";
  for (const std::string& device : device_flags())
    for (const char* precision : {"fp64", "fp32", "bf16"})
      for (const char* recompute : {"0", "3"}) {
        std::string changes =
            device + " --ema 0.5 --precision " + precision + " --recompute " + recompute;
        Outcome trained = run("train", train_, changes + " --out " + at("other"));
        Outcome planned = run("plan", sizes_ + data, changes);
        EXPECT_EQ(trained.status, 0) << trained.err;
        EXPECT_EQ(planned.status, 0) << planned.err;
        EXPECT_NE(total_of(planned.out), "none");
        EXPECT_EQ(total_of(planned.out), total_of(trained.out)) << changes;
        fs::remove_all(at("other"));
      }
}

// The memory that a run may take decides: fp32 state with all activations, then with ever fewer of
// them, then lean. What is refused names the largest batch that is not.
TEST_F(CommandTest, TheBestWayThatFitsIsChosen) {
  const std::string big =
      "--depth 100 --width 64 --heads 2 --ffn 192 --device cpu --images 60 "
      "--precision bf16 --batch 16 --patch 4 --height 32 --image-width 32 "
      "--captions 4 --val-images 4 --text-tokens 8 --text-dim 8";
  auto planned = [&](const std::string& changes) { return run("plan", big, changes); };
  auto megabytes = [&](const std::string& changes) {
    Outcome outcome = planned(changes + " --memory 1000");
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return std::stod(total_of(outcome.out).substr(8));
  };
  double everything = megabytes(""), fewer = megabytes("--recompute 10"),
         lean = megabytes("--recompute 10 --state lean");
  EXPECT_GT(everything, 2 * fewer);
  EXPECT_GT(fewer, 1.3 * lean);
  auto with = [&](double mb, const std::string& more = "") {
    return planned("--memory " + std::to_string(1e-3 * mb) + more).out;
  };
  auto says = [](const std::string& out, const char* words) {
    EXPECT_PRED_FORMAT2(testing::IsSubstring, words, out);
  };
  says(with(everything + 1), " GB: fp32 state, recompute 0: ");
  says(with(everything + 1), "next best: fp32 state, recompute 50: ");
  says(with(everything - 1), " GB: fp32 state, recompute 50: ");
  says(with(fewer + 1), " GB: fp32 state, recompute 10: ");
  says(with(1.05 * lean), " GB: lean state, recompute ");
  says(with(everything + 1, " --state lean"), " GB: lean state, recompute 0: ");
  // The batch that is named fits, and one more does not.
  Outcome refused = planned("--memory 0.12 --batch 1000");
  EXPECT_EQ(refused.status, 2);
  std::string words = "the largest --batch that fits is ";
  size_t found = refused.err.find(words);
  ASSERT_NE(found, std::string::npos) << refused.err;
  size_t batch = std::stoul(refused.err.substr(found + words.size()));
  EXPECT_EQ(planned("--memory 0.12 --batch " + std::to_string(batch)).status, 0);
  EXPECT_EQ(planned("--memory 0.12 --batch " + std::to_string(batch + 1)).status, 2);
  // train chooses as plan does.
  Outcome trained = run("train", train_, "--precision bf16 --memory 1 --out " + at("chosen"));
  says(trained.out, "chosen for 1.00 GB: fp32 state, recompute 0: ");
}

// --state auto goes on with what the run began with, whatever memory says now.
TEST_F(CommandTest, AResumedRunKeepsItsState) {
  for (const char* state : {"fp32", "lean"}) {
    std::string flags = "--precision bf16 --out " + at("kept");
    EXPECT_EQ(run("train", train_, flags + " --state " + state).status, 0);
    Outcome resumed = run("train", train_, flags + " --resume --steps 3");
    EXPECT_EQ(resumed.status, 0) << resumed.err;
    EXPECT_PRED_FORMAT2(testing::IsSubstring, std::string(state) + " state, ", resumed.out);
    const char* other = state == std::string("lean") ? "fp32" : "lean";
    expect_refused(run("train", train_, flags + " --resume --steps 4 --state " + other),
                   std::string("was made with state = ") + state);
    expect_refused(run("train", train_, flags + " --resume --precision fp32"),
                   "was made with precision = bf16 (now fp32): resume with the same");
    expect_refused(run("train", train_, flags + " --resume --steps 4 --save weights"),
                   "resume with --save all");
    fs::remove_all(at("kept"));
  }
}

// A state that does not say it goes on, and what is saved then does.
TEST_F(CommandTest, AStateNeedNotSayWhatItWasValidatedOn) {
  std::string path = at("run/state.safetensors"), bytes = read_text(path);
  for (const char* key : {"\"val_images\"", "\"val_images_hash\""})
    bytes[bytes.find(key) + 1] = '_';
  std::ofstream(path, std::ios::binary) << bytes;
  EXPECT_EQ(run("train", train_, "--resume --steps 3 --val-images 3").status, 0);
  EXPECT_EQ(run("train", train_, "--resume --steps 4").status, 0);
  expect_refused(run("train", train_, "--resume --steps 5 --val-images 4"),
                 "made with val-images = 3 (now 4)");
}

// Weights alone, without the state: half a file, and nothing to resume from.
TEST_F(CommandTest, WeightsCanBeSavedAlone) {
  for (const char* state : {"fp32", "lean"}) {
    std::string flags = std::string("--precision bf16 --state ") + state + " --out " + at("alone");
    ASSERT_EQ(run("train", train_, flags + " --save weights").status, 0);
    EXPECT_FALSE(fs::exists(at("alone/state.safetensors")));
    EXPECT_EQ(run("sample", sample_, "--weights " + at("alone/weights.safetensors")).status, 0);
    expect_refused(run("train", train_, flags + " --resume"), "no state to go on from");
    fs::remove_all(at("alone"));
  }
}

// A process that saves at every step, killed twenty times within four milliseconds of a save's
// beginning. Each time a whole state of some step is left, and what goes on from it ends as a run
// never killed does.
TEST_F(CommandTest, AKillWhileSavingLosesNothing) {
  for (const char* state : {"fp32", "lean"}) {
    std::string folder = at(std::string("killed_") + state), file = folder + "/state.safetensors";
    std::string changes =
        std::string("--resume --columns 1 --save-every 1 --width 128 --heads 2 ") +
        "--ffn 384 --precision bf16 --state " + state + " --out " + folder;
    auto start = [&](size_t last) {
      return start_program(arguments("train", train_, changes + " --steps " + std::to_string(last)),
                           "/dev/null");
    };
    auto step_of = [&](const std::string& path) {
      return fs::exists(path) ? std::stoul(SafetensorsReader(path).metadata().at("step")) : 0ul;
    };
    const std::vector<std::string> temporary = {file + ".tmp", folder + "/weights.safetensors.tmp"};
    auto writing = [&] { return fs::exists(temporary[0]) || fs::exists(temporary[1]); };
    size_t done = 0, cut = 0;
    for (size_t kill_number = 0; kill_number < 20; ++kill_number) {
      for (const std::string& name : temporary) fs::remove(name);  // what the last kill left
      pid_t child = start(100000);
      ASSERT_GT(child, 0);
      int status = 0;
      bool ended = false;
      auto wait_while = [&](bool is_writing) {
        while (writing() == is_writing && !ended) {
          usleep(20);
          ended = waitpid(child, &status, WNOHANG) != 0;
        }
      };
      // Until a save begins, this one's first, second or third; then for some part of it.
      for (size_t saves = 0; saves < kill_number % 3; ++saves) wait_while(false), wait_while(true);
      wait_while(false);
      usleep(useconds_t(uniform(5, 0, kill_number) * 4000));
      ASSERT_FALSE(ended) << "the run ended by itself";
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      cut += writing();
      ASSERT_GE(step_of(file), done);
      done = step_of(file);
      step_of(folder + "/weights.safetensors");  // whole, or not there yet
    }
    EXPECT_GT(done, 5u);
    EXPECT_GE(cut, 10u) << "too few kills fell into a save";
    auto finish = [&] {
      pid_t child = start(done + 2);
      int status = 1;
      return child > 0 && waitpid(child, &status, 0) == child && status == 0;
    };
    ASSERT_TRUE(finish());
    std::string end = read_text(file);
    fs::remove_all(folder);
    ASSERT_TRUE(finish());
    EXPECT_TRUE(read_text(file) == end) << "after " << done << " steps and twenty kills";
    fs::remove_all(folder);
  }
}

// The second signal ends a run at once, unless it is the first again, to the process and its group.
TEST(Interrupt, TheSecondEndsARunAtOnce) {
  for (useconds_t apart : {0u, 400000u}) {
    pid_t child = fork();
    if (child == 0) {
      interrupted = 0;
      interrupt(SIGINT);
      usleep(apart);
      interrupt(SIGINT);
      _exit(7);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (apart)
      EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGINT);
    else
      EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 7);
  }
}

// A reader that goes, a terminal that closes, outputs that are closed or full: the run goes on,
// saves when it is asked to end, and no word of the console is in its log.
TEST_F(CommandTest, TheEndOfAConsoleEndsNoRun) {
  int pipe_ends[2];
  ASSERT_EQ(pipe(pipe_ends), 0);
  auto without = [](std::vector<int> closed) {
    return [=] {
      for (int descriptor : closed) close(descriptor);
    };
  };
  const std::pair<const char*, std::function<void()>> consoles[] = {
      {"a pipe that nobody reads",
       [&] {
         dup2(pipe_ends[1], 1), dup2(pipe_ends[1], 2);
         close(pipe_ends[0]), close(pipe_ends[1]);
       }},
      {"no output", without({1})},
      {"nothing", without({0, 1, 2})},
      {"a full disk", [] { dup2(open("/dev/full", O_WRONLY), 1); }}};
  for (const auto& [name, prepare] : consoles) {
    SCOPED_TRACE(name);
    const std::string folder = at("console");
    pid_t child = start_program(
        arguments("train", train_, "--steps 1000000 --log-every 1 --out " + folder), prepare);
    ASSERT_GT(child, 0);
    auto rows = [&] {
      std::string text = read_text(folder + "/log.csv");
      return std::count(text.begin(), text.end(), '\n');
    };
    int status = 0;
    auto wait_for = [&](ptrdiff_t count) {
      for (int i = 0; i < 5000 && rows() < count; ++i) usleep(2000);
    };
    if (child && pipe_ends[0] >= 0) close(std::exchange(pipe_ends[0], -1)), close(pipe_ends[1]);
    wait_for(5);
    kill(child, SIGHUP);
    wait_for(rows() + 5);
    ASSERT_EQ(waitpid(child, &status, WNOHANG), 0) << "it has ended";
    for (int i = 0; i < 2; ++i) kill(child, SIGINT), usleep(2000);  // as `timeout` does: one
    pid_t ended = 0;
    for (int i = 0; i < 6000 && !ended; ++i) {
      usleep(10000);
      ended = waitpid(child, &status, WNOHANG);
    }
    if (!ended) kill(child, SIGKILL);
    ASSERT_EQ(ended, child) << "it goes on";
    EXPECT_EQ(WIFEXITED(status) ? WEXITSTATUS(status) : -1, 130);
    std::ifstream log(folder + "/log.csv");
    std::string line;
    std::getline(log, line);
    size_t step = 0;
    while (std::getline(log, line)) {
      ASSERT_EQ(line.rfind(std::to_string(++step) + ",", 0), 0u) << line;
      ASSERT_EQ(std::count(line.begin(), line.end(), ','), 3) << line;
    }
    EXPECT_EQ(SafetensorsReader(folder + "/state.safetensors").metadata().at("step"),
              std::to_string(step));
    fs::remove_all(folder);
  }
}

// Nor any other work whose result is a file.
TEST_F(CommandTest, WhatNobodyReadsIsWrittenAllTheSame) {
  save_latents(at("more.safetensors"), synthetic(4096));
  int pipe_ends[2], status = 0;
  ASSERT_EQ(pipe(pipe_ends), 0);
  close(pipe_ends[0]);
  pid_t child = start_program(
      arguments("validate", "--device cpu --bins 1000 --data " + at("more.safetensors"),
                "--weights " + at("run/weights.safetensors") + " --out " + at("losses.csv")),
      [&] { dup2(pipe_ends[1], 1), dup2(pipe_ends[1], 2); });
  close(pipe_ends[1]);
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(WIFEXITED(status) ? WEXITSTATUS(status) : -1, 2);
  std::string rows = read_text(at("losses.csv"));
  EXPECT_EQ(std::count(rows.begin(), rows.end(), '\n'), 257);
  for (const char* command : {"validate", "probe"})
    expect_refused(run(command, "--weights " + at("run/weights.safetensors") + " --out="),
                   "--out must name a file");
}

// On a terminal: a line, and at the end it is taken away. What is quick shows nothing.
TEST(Console, ShowsHowFarLongWorkHasCome) {
  int terminal = posix_openpt(O_RDWR | O_NOCTTY);
  ASSERT_TRUE(terminal >= 0 && grantpt(terminal) == 0 && unlockpt(terminal) == 0);
  std::fflush(stdout);
  int before = dup(1), window = open(ptsname(terminal), O_RDWR | O_NOCTTY);
  ASSERT_EQ(dup2(window, 1), 1);
  {
    Progress quick("quick", 2);
    quick.advance(1);
  }
  {
    Progress slow("drawing 8 samples", 3);
    usleep(600000);
    slow.advance(1), slow.advance(1);
  }
  dup2(before, 1), close(before), close(window);
  std::string text;
  char part[256];
  for (ssize_t n; (n = read(terminal, part, sizeof part)) > 0;) text.append(part, size_t(n));
  EXPECT_EQ(text, "\r\033[Kdrawing 8 samples: 1 of 3\r\033[K");
  close(terminal);
}

// A picture that cannot be written is warned of, and the run goes on; rows that somebody took out
// of a log are told of, and a run is not "done" at a step that lies behind it.
TEST_F(CommandTest, SmallTroubleCostsNoWork) {
  const std::string flags = "--steps 4 --sample-every 2 --out " + at("trouble");
  fs::create_directories(at("trouble/samples_000002.png.tmp"));  // in the way
  Outcome first = run("train", train_, flags + " --resume");
  EXPECT_EQ(first.status, 0) << first.err;
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "warning: cannot write " + at("trouble/samples_000002"),
                      first.err);
  EXPECT_TRUE(fs::exists(at("trouble/samples_000004.png")));
  std::ofstream(at("trouble/log.csv")) << "step,loss,gradient_norm,lr\n1,1,1,1\n";
  expect_refused(run("train", train_, flags + " --resume --steps 3"), "is at step 4 already");
  Outcome more = run("train", train_, flags + " --resume --steps 5");
  EXPECT_EQ(more.status, 0) << more.err;
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "log.csv has no rows of steps 2 to 4", more.out);
}

TEST_F(CommandTest, AFolderAndAFileHaveOneOwner) {
  auto before = files();
  {
    File own = own_folder(at("run"));
    for (const char* changes : {"--resume --steps 4", ""})
      expect_refused(run("train", train_, changes), "another process trains in " + at("run"));
    SafeFile file(at("out.safetensors"));
    file.write("whole");
    expect_refused(run("sample", sample_), "another process is writing it");
    EXPECT_EQ(read_text(at("out.safetensors")), "");
    file.commit();
    EXPECT_EQ(read_text(at("out.safetensors")), "whole");
    fs::remove(at("out.safetensors"));
  }
  EXPECT_TRUE(files() == before);
  std::ofstream(at("out.safetensors.tmp")) << "of a process that was killed";
  EXPECT_EQ(run("sample", sample_).status, 0);
  EXPECT_EQ(run("train", train_, "--resume --steps 4").status, 0);
}

// Killed between the state and the weights, at the last step too.
TEST_F(CommandTest, AFinishedRunWritesTheWeightsThatItLacks) {
  const std::string flags = "--ema 0.9 --out " + at("done");
  ASSERT_EQ(run("train", train_, flags).status, 0);
  auto before = files();
  fs::remove(at("done/ema.safetensors"));
  std::ofstream(at("done/weights.safetensors")) << "stale";
  ASSERT_EQ(run("train", train_, flags + " --resume").status, 0);
  EXPECT_TRUE(files() == before);
}

// Nothing to go on from, as after a kill before the first save: what was logged is not lost.
TEST_F(CommandTest, ARunWithoutAStateKeepsTheLogsThatWereThere) {
  const std::string flags = "--diagnose-every 1 --out " + at("begun");
  ASSERT_EQ(run("train", train_, flags).status, 0);
  auto fresh = files();
  const std::string logs[] = {"log.csv", "validation.csv", "diagnostics.csv", "spike_000002.txt"};
  auto begin_again = [&] {
    for (const char* name : {"state.safetensors", "weights.safetensors", "samples.png"})
      fs::remove(at("begun/") + name);
    for (const std::string& name : logs) std::ofstream(at("begun/") + name) << "old " << name;
  };
  for (const char* number : {".1", ".2"}) {
    begin_again();
    auto before = files();
    expect_refused(run("train", train_, flags),
                   at("begun") + " holds logs or a config.ini, but no state");
    EXPECT_TRUE(files() == before);
    EXPECT_EQ(run("train", train_, flags + " --resume").status, 0);
    for (const std::string& name : logs) {
      EXPECT_EQ(read_text(at("begun/") + name + number), "old " + name);
      fresh[at("begun/") + name + number] = "old " + name;
    }
    for (const char* name : {"begun/config.ini", "begun/page.html"})  // a page where there is bash
      if (fresh.count(at(name))) fresh[at(name) + number] = fresh[at(name)];
    EXPECT_TRUE(files() == fresh);
  }
}

TEST_F(CommandTest, SamplesAreTheSameForTheSameSeed) {
  auto samples = [&](const std::string& changes) {
    EXPECT_EQ(run("sample", sample_, changes).status, 0);
    SafetensorsReader file(at("out.safetensors"));
    std::vector<float> images(2 * 64);
    file.read(file.require("samples", {2, 1, 8, 8}), images.data(), 0, images.size());
    EXPECT_EQ(file.metadata().at("captions"), "[\"caption 3\"]");
    return images;
  };
  auto first = samples("");
  EXPECT_EQ(samples(""), first);
  EXPECT_EQ(samples("--batch 1"), first);
  EXPECT_NE(samples("--seed 2"), first);
  ASSERT_EQ(run("train", train_, "--time-shift 3 --out " + at("shifted")).status, 0);
  std::string shifted = " --weights " + at("shifted/weights.safetensors");
  EXPECT_EQ(samples(shifted), samples(shifted + " --time-shift 3")) << "as the weights say";
  EXPECT_NE(samples(shifted), samples(shifted + " --time-shift 1"));
  EXPECT_EQ(run("sample", sample_, "--out " + at("out.png")).status, 0);
  size_t C, H, W;
  read_png(at("out.png"), &C, &H, &W);
  EXPECT_GE(W, 16u);
}

// Weights that do not say how they were trained, as of others, are told so, in one line.
TEST_F(CommandTest, WhatTheWeightsDoNotSayIsToldOrAFlag) {
  const std::string trained = "--norm-eps 0.25 --residual prenorm --out " + at("other");
  ASSERT_EQ(run("train", train_, trained).status, 0);
  const std::string path = at("other/weights.safetensors"), bytes = read_text(path);
  auto without = [&](const std::vector<std::string>& keys) {
    std::string changed = bytes;
    for (const std::string& key : keys) changed[changed.find("\"" + key + "\"") + 1] = '_';
    std::ofstream(at("silent.safetensors"), std::ios::binary) << changed;
  };
  auto sample = [&](const std::string& weights, const std::string& changes, size_t notes) {
    Outcome outcome = run("sample", sample_, "--weights " + weights + " " + changes);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_EQ(size_t(std::count(outcome.err.begin(), outcome.err.end(), '\n')), notes);
    return read_text(at("out.safetensors")) + outcome.err;
  };
  std::string said = sample(path, "", 0), silent = at("silent.safetensors");
  without({"norm_eps"});
  EXPECT_NE(sample(silent, "", 1), said);
  EXPECT_EQ(sample(silent, "--norm-eps 0.25", 0), said);
  EXPECT_NE(sample(path, "--norm-eps 1e-6", 0), said);
  auto probe = [&](const std::string& weights, const std::string& changes) {
    EXPECT_EQ(run("probe", probe_, "--weights " + weights + " " + changes).status, 0);
    return read_text(at("probe.csv"));
  };
  EXPECT_NE(probe(silent, ""), probe(path, ""));
  EXPECT_EQ(probe(silent, "--norm-eps 0.25"), probe(path, ""));
  for (const char* key : {"residual", "means"}) {
    without({key});
    sample(silent, "", 1);
  }
  without({"residual", "means", "norm_eps"});
  EXPECT_PRED_FORMAT2(testing::IsSubstring,
                      "note: the metadata of " + silent +
                          " does not say all: taken are residual postnorm, means segment, norm_eps "
                          "1e-06\n",
                      sample(silent, "", 1));
  // Of what no shape says heads must be told; for the rest there is a guess, which is told.
  std::string bare = at("bare.safetensors");
  without_metadata(path, bare);
  expect_refused(run("sample", sample_, "--weights " + bare), "give --heads");
  EXPECT_PRED_FORMAT2(
      testing::IsSubstring,
      "taken are residual postnorm, means segment, norm_eps 1e-06, time shift 1 (the "
      "author's released model has 4: --time-shift)\n",
      sample(bare, "--heads 2 --size 8", 1));
  EXPECT_PRED_FORMAT2(testing::IsSubstring,
                      "released model has 4: --time-shift), images of 32x32 (--size)\n",
                      sample(bare, "--heads 2", 1));
  EXPECT_PRED_FORMAT2(testing::IsSubstring,
                      "images of 32x32 (--size), 8 text tokens (--text-tokens)\n",
                      sample(bare, "--heads 2 --data=", 1));
  expect_refused(run("sample", sample_, "--heads 2 --text-tokens 8 --weights " + bare),
                 "captions of 3 x 5 numbers, the model takes 8 x 5");
  EXPECT_PRED_FORMAT2(
      testing::IsSubstring, "taken are residual postnorm, means segment\n",
      sample(bare, "--heads 2 --size 8 --text-tokens 3 --norm-eps 0.25 --time-shift 1", 1));
  // Inputs and data say the sizes themselves.
  Outcome probed = run("probe", probe_, "--heads 2 --norm-eps 0.25 --weights " + bare);
  EXPECT_EQ(probed.status, 0);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "taken are residual postnorm, means segment\n",
                      probed.err);
}

// A file that holds only text, of any length, with the empty caption or without.
TEST_F(CommandTest, CaptionsMayComeFromAFileOfTextAlone) {
  auto save = [&](const std::string& name, size_t tokens, const std::vector<float>& empty) {
    Dataset d = all_;
    d.text_tokens = tokens, d.captions = 4, d.empty_text.resize(tokens * 5);
    d.text.clear();
    for (size_t i = 0; i < 4 * tokens * 5; ++i) d.text.push_back(float(gaussian(5, tokens, i)));
    std::copy(empty.begin(), empty.end(), d.empty_text.begin());
    save_latents(at("all_" + name), d);
    SafetensorsWriter file(at(name));
    file.declare("text", "F32", {4, tokens, 5});
    if (!empty.empty()) file.declare("empty", "F32", {tokens, 5});
    file.write(d.text.data(), d.text.size());
    file.write(empty.data(), empty.size());
    file.finish();
  };
  const std::vector<float> empty(30, 0.5f), zeros(30, 0);
  save("text.safetensors", 6, empty), save("zeros.safetensors", 6, zeros);
  save("bare_text.safetensors", 6, {});
  without_metadata(at("run/weights.safetensors"), at("bare.safetensors"));
  auto drawn = [&](const std::string& changes, const std::string& said = "") {
    Outcome outcome = run("sample", sample_, changes);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_EQ(outcome.err, said);
    SafetensorsReader(at("out.safetensors")).require("samples", {2, 1, 8, 8});
    return read_text(at("out.safetensors"));
  };
  const std::string text = "--data " + at("text.safetensors"), six = drawn(text);
  // What a data set of that length gives to weights that do not say theirs.
  Outcome same = run("sample", sample_,
                     "--heads 2 --size 8 --time-shift 1 --norm-eps 1e-6 --data " +
                         at("all_text.safetensors") + " --weights " + at("bare.safetensors"));
  EXPECT_EQ(same.status, 0) << same.err;
  EXPECT_TRUE(read_text(at("out.safetensors")) == six);
  EXPECT_TRUE(drawn(text + " --prompt 2") != six);
  const std::string without_empty =
      drawn("--data " + at("bare_text.safetensors"),
            "note: " + at("bare_text.safetensors") +
                " has no empty (6, 5): guidance takes zeros for it\n");
  EXPECT_TRUE(without_empty == drawn("--data " + at("zeros.safetensors")));
  EXPECT_TRUE(without_empty != six);
  expect_refused(run("sample", sample_, text + " --prompt 4"), " has captions 0 to 3");
  expect_refused(run("sample", sample_, text + " --text-tokens 3"),
                 "captions of 6 x 5 numbers, the model takes 3 x 5");
  expect_refused(run("train", train_, text + " --out " + at("new")),
                 "tensor latents (N,C,H,W) is missing");
  {
    SafetensorsWriter file(at("wide.safetensors"));
    file.declare("text", "F32", {1, 3, 4}), file.declare("empty", "F32", {3, 4});
    file.write(zeros.data(), 12), file.write(zeros.data(), 12);
    file.finish();
  }
  expect_refused(run("sample", sample_, "--data " + at("wide.safetensors")),
                 "captions of 3 x 4 numbers, the model takes 3 x 5");
}

// Weights in several files are those in one.
TEST_F(CommandTest, WeightsMayBeSharded) {
  SafetensorsReader whole(at("run/weights.safetensors"));
  nlohmann::json index;
  for (size_t shard : {0, 1}) {
    std::string name = "part-" + std::to_string(shard) + ".safetensors";
    SafetensorsWriter file(at(name), whole.metadata());
    for (bool declares : {true, false})
      for (size_t i = shard; i < whole.tensors().size(); i += 2) {
        const TensorInfo& tensor = whole.tensors()[i];
        std::vector<float> numbers(tensor.count());
        whole.read(tensor, numbers.data(), 0, numbers.size());
        if (declares)
          file.declare(tensor.name, "F32", tensor.shape);
        else
          file.write(numbers.data(), numbers.size());
        index["weight_map"][tensor.name] = name;
      }
    file.finish();
  }
  std::ofstream(at("part.safetensors.index.json")) << index;
  ASSERT_EQ(run("sample", sample_, "").status, 0);
  const std::string expected = read_text(at("out.safetensors"));
  Outcome outcome = run("sample", sample_, "--weights " + at("part.safetensors.index.json"));
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_TRUE(read_text(at("out.safetensors")) == expected);
  fs::remove(at("part-1.safetensors"));
  expect_refused(run("sample", sample_, "--weights " + at("part.safetensors.index.json")),
                 "cannot open " + at("part-1.safetensors") + ": No such file");
}

// No picture is made of more channels than it has; a run leaves the numbers.
TEST_F(CommandTest, SamplesOfManyChannelsAreNumbers) {
  Dataset latents = all_;
  latents.channels = 4, latents.images /= 4, latents.caption.resize(latents.images);
  save_latents(at("four.safetensors"), latents);
  const std::string data = "--data " + at("four.safetensors");
  Outcome trained = run("train", train_, data + " --sample-every 1 --out " + at("four"));
  ASSERT_EQ(trained.status, 0) << trained.err;
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "samples " + at("four/samples.safetensors") + "\n",
                      trained.out);
  for (const char* name : {"samples", "samples_000001"}) {
    EXPECT_FALSE(fs::exists(at("four/") + name + ".png"));
    SafetensorsReader(at("four/") + name + ".safetensors").require("samples", {32, 4, 8, 8});
  }
  const std::string weights = data + " --weights " + at("four/weights.safetensors");
  expect_refused(run("sample", sample_, weights + " --out " + at("out.png")),
                 "out.png: a picture has three channels at most, not 4: name a .safetensors");
  EXPECT_FALSE(fs::exists(at("out.png")));
  EXPECT_EQ(run("sample", sample_, weights).status, 0);
  SafetensorsReader(at("out.safetensors")).require("samples", {2, 4, 8, 8});
}

// Of a folder, captions are asked for by name, in words that it has, or by number.
TEST_F(CommandTest, CaptionsOfAFolderAreAskedForByName) {
  for (const char* name : {"cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"}) {
    fs::create_directories(fs::path(at("pets/") + name).parent_path());
    write_png_grid(at("pets/") + name, all_.pixels.data(), {1, 1, 1, 8, 8, 1});
  }
  std::string data = " --data " + at("pets");
  Outcome trained = run("train", train_, data + " --final-std 0.5 --out " + at("named"));
  ASSERT_EQ(trained.status, 0) << trained.err;
  EXPECT_EQ(trained.out.rfind("4 images of 1x8x8, 2 captions, 1 held out\n", 0), 0u) << trained.out;
  EXPECT_EQ(trained.out.find("images of", 10), std::string::npos) << "once";
  auto sample = [&](const std::string& prompt, const std::string& changes) {
    std::vector<std::string> words =
        arguments("sample", sample_, changes + " --weights " + at("named/weights.safetensors"));
    *(std::find(words.begin(), words.end(), "--prompt") + 1) = prompt;
    return run(words);
  };
  auto drawn = [&](const std::string& prompt, const std::string& changes) {
    Outcome outcome = sample(prompt, changes);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    SafetensorsReader file(at("out.safetensors"));
    std::vector<float> images(2 * 64);
    file.read(file.require("samples", {2, 1, 8, 8}), images.data(), 0, images.size());
    return images;
  };
  std::vector<float> cat = drawn("cat", data), dog = drawn("dog", data);
  EXPECT_TRUE(cat != dog);
  // Where captions are called by numbers, a number is a name.
  for (const char* name : {"numbers/10", "numbers/20"}) {
    fs::create_directories(at(name));
    write_png_grid(at(name) + "/1.png", all_.pixels.data(), {1, 1, 1, 8, 8, 1});
  }
  expect_refused(sample("1", " --data " + at("numbers")), "has captions 10, 20");
  EXPECT_EQ(sample("20", " --data " + at("numbers")).status, 0);
  EXPECT_TRUE(drawn(" CAT\n", data) == cat);
  EXPECT_TRUE(drawn("a photo of a cat", data) == cat);
  EXPECT_TRUE(drawn("0", data) == cat);
  EXPECT_TRUE(drawn("1", data) == dog);
  EXPECT_TRUE(drawn("cat dog", data) != cat) << "words that it knows, in an order that it does not";
  EXPECT_TRUE(drawn("", data) == drawn("", "--data="));
  for (const char* wrong : {"cow", "cat cow", "2", "-1", "1x"})
    expect_refused(sample(wrong, data),
                   std::string("--prompt ") + wrong + ": " + at("pets") + " has captions cat, dog");
  // Without --data there is nothing to hold it against.
  EXPECT_TRUE(drawn("cat", "--data=") == cat);
  EXPECT_TRUE(drawn("cow", "--data=") != cat);
  // Beside a row is its caption.
  size_t C, H, W, wide;
  for (const char* prompt : {"cat", "cat dog cat"}) {
    drawn(prompt, data + " --out " + at("out.PNG"));
    read_png(at("out.PNG"), &C, &H, &wide);
    EXPECT_GT(wide, prompt[3] ? W + 20 : 2 * 16 + 2 + 20);
    W = wide;
  }
  read_png(at("named/samples.png"), &C, &H, &W);
  EXPECT_GT(W, 8 * 18 + 20u);
  // That picture is what `sample` draws, with its guidance.
  for (const char* guidance : {"2", "1"}) {
    std::vector<std::string> words = arguments(
        "sample", sample_,
        std::string("--prompt cat --columns 8 --steps 25 --cfg ") + guidance + data + " --out " +
            at("drawn.png") + " --weights " + at("named/weights.safetensors"));
    words.insert(words.end(), {"--prompt", "dog"});
    EXPECT_EQ(run(words).status, 0);
    EXPECT_EQ(read_text(at("drawn.png")) == read_text(at("named/samples.png")),
              guidance == std::string("2"));
  }
}

// A row a layer and kind of features, the time where it must be and not where it cannot be; the
// same however many images go through the network at once.
TEST_F(CommandTest, ProbeReadsTimeOffTheStates) {
  auto probe = [&](const std::string& changes) {
    Outcome outcome = run("probe", probe_, changes);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_PRED_FORMAT2(testing::IsSubstring, "R^2 of t on 64 held-out images", outcome.out);
    return read_text(at("probe.csv"));
  };
  std::string csv = probe("--layers 4,0 --seed 2");
  std::istringstream lines(csv);
  std::string keys;
  std::map<std::string, double> r2;
  for (std::string line; std::getline(lines, line);) {
    if (line[0] == '#' || line[0] == 'l') continue;
    std::vector<std::string> cells;
    std::istringstream words(line);
    for (std::string cell; std::getline(words, cell, ',');) cells.push_back(cell);
    ASSERT_EQ(cells.size(), 5u) << line;
    keys += cells[0] + cells[1] + " ";
    r2[cells[0] + cells[1]] = std::stod(cells[2]);
    if (r2[cells[0] + cells[1]] > 0.5) {
      EXPECT_LT(std::stod(cells[4]), 10) << "the penalty of what is found, not of noise: " << line;
    }
    EXPECT_LT(std::stod(cells[3]), 0.1) << "shuffled labels: " << line;
  }
  EXPECT_EQ(keys, "zscalars 0image_mean 0image_rms 0text_mean 4image_mean 4image_rms 4text_mean ");
  EXPECT_GT(r2["0image_rms"], 0.5);
  EXPECT_GT(r2["4image_rms"], 0.5);
  EXPECT_LT(r2["0text_mean"], 0.1) << "the caption knows nothing of t";
  EXPECT_EQ(probe("--layers 0,4 --seed 2 --batch 7"), csv);
  EXPECT_NE(probe("--layers 0,4"), csv);
  // As many as there are, if no number is given.
  std::vector<std::string> words = arguments("probe", probe_, "");
  auto images = std::find(words.begin(), words.end(), "--images");
  words.erase(images, images + 2);
  Outcome most = run(words);
  EXPECT_EQ(most.status, 0) << most.err;
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "\n259 images, as many as there are", most.out);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, " 147 to fit, 48 to choose",
                      read_text(at("probe.csv")));
  for (const std::string& device : device_flags()) {
    std::string all = probe(device + " --precision auto --layers all");
    EXPECT_EQ(std::count(all.begin(), all.end(), '\n'),
              std::count(csv.begin(), csv.end(), '\n') + 3 * 3);
  }
}

// The loss that train ends with, for each image: whatever the batch, the same bits on the same
// images. The table's rows are the images' of their bin, and make up that loss.
TEST_F(CommandTest, ValidateIsTrainsValidationByTime) {
  const std::string flags = "--device cpu --precision fp32 --data " + at("data.safetensors") +
                            " --weights " + at("run/weights.safetensors") + " --out " +
                            at("losses.csv");
  auto validated = [&](const std::string& changes, std::string* table = nullptr) {
    Outcome outcome = run("validate", flags, changes);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    if (table) *table = outcome.out;
    return read_text(at("losses.csv"));
  };
  std::string train = read_text(at("run/validation.csv"));
  double expected = std::stod(train.substr(train.rfind(',') + 1));
  auto mean_of = [](const std::string& csv, const std::string& bounds = "0 1.1") {
    std::istringstream lines(csv), ends(bounds);
    double from = 0, to = 0, t = 0, loss = 0, sum = 0, squares = 0, n = 0;
    ends >> from >> to;
    std::string line;
    EXPECT_TRUE(std::getline(lines, line) && line == "t,loss");
    for (char comma; lines >> t >> comma >> loss;)
      if (t >= from && t < to) sum += loss, squares += loss * loss, ++n;
    double mean = sum / n;
    return std::array<double, 3>{n, mean, std::sqrt((squares / n - mean * mean) / (n - 1))};
  };
  std::string csv = validated("");
  EXPECT_EQ(mean_of(csv)[0], 4);
  EXPECT_NEAR(mean_of(csv)[1], expected, 1e-7);
  EXPECT_EQ(validated("--batch 3"), csv);

  const std::string many = "--data " + at("many.safetensors") + " --bins 4";
  std::string table;
  csv = validated(many, &table);
  EXPECT_EQ(validated(many), csv);
  std::istringstream lines(csv);
  std::string line;
  std::getline(lines, line);
  for (size_t i = 0; std::getline(lines, line); ++i)
    EXPECT_NEAR(std::stod(line), std::fmod((double(i) + 0.5) * 0.6180339887498949, 1), 1e-6);
  double total = 0, variance = 0;
  for (const char* bounds : {"0.000 0.250", "0.250 0.500", "0.500 0.750", "0.750 1.000"}) {
    auto [n, mean, error] = mean_of(csv, bounds);
    EXPECT_GT(error, 1e-3);
    std::string row = text_of("%.5s to %s %8.0f  %.5f  ", bounds, bounds + 6, n, mean);
    size_t found = table.find(row);
    ASSERT_NE(found, table.npos) << row << "\n" << table;
    EXPECT_NEAR(std::stod(table.substr(found + row.size())), error, 2e-5);
    total += n / 64 * mean, variance += std::pow(n / 64 * error, 2);
  }
  std::string row = text_of("all            %8d  %.5f  %.5f\n", 64, total, std::sqrt(variance));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, row, table);
  EXPECT_EQ(mean_of(validated(many + " --images 16"))[0], 16);
  EXPECT_NEAR(mean_of(csv)[1], total, 1e-7);
  EXPECT_GT(std::stod(validated(many + " --time-shift 4").substr(7)), 0.4) << "0.309 shifted";
  for (const std::string& device : device_flags())
    EXPECT_NEAR(mean_of(validated(many + " " + device))[1], total, 1e-3);
}

// The mean of eight numbers of which two are in one bin, with its error from within the bins.
TEST(Validate, TheTotalCountsImagesAndNotBins) {
  std::string table = validation_table({{2, 6, 20}, {}, {6, 12, 30}}, 8);
  for (const char* row : {"0.000 to 0.333        2  3.00000  1.00000\n",
                          "0.667 to 1.000        6  2.00000  0.44721\n",
                          "all                   8  2.25000  0.41833\n"})
    EXPECT_PRED_FORMAT2(testing::IsSubstring, row, table);
}

// By itself bf16 is for tensor cores: of a GPU from 8.0 on, by a binary that has code for them.
TEST(Precision, IsBf16WhereTensorCoresTakeIt) {
  bool fast = built_for() >= 800;
#ifdef __CUDACC__
  cudaDeviceProp properties;
  if (Device::gpus() > 0 && cudaGetDeviceProperties(&properties, 0) == cudaSuccess)
    fast = fast && properties.major >= 8;
#endif
  EXPECT_EQ((Machine{"cpu", "auto"}.chosen_precision()), "fp32");
  EXPECT_EQ((Machine{"gpu", "auto"}.chosen_precision()), fast ? "bf16" : "fp32");
  EXPECT_EQ((Machine{"auto", "auto"}.chosen_precision()),
            Device::gpus() > 0 && fast ? "bf16" : "fp32");
  EXPECT_EQ((Machine{"gpu", "bf16"}.chosen_precision()), "bf16");
}

// Differences that fail are a lesson and no error: a step too long, and one too short.
TEST(Gradcheck, SaysWhichOfTheTwoFailed) {
  const std::string lesson = "the gradient agrees with the exact derivative";
  for (const std::string& device : device_flags())
    for (const char* step : {"1.5e-3", "0.5", "1e-12", "0"}) {
      Outcome outcome = run("gradcheck", device + " --depth 3 --step " + step);
      double h = std::stod(step);
      EXPECT_EQ(outcome.status, 0) << outcome.out;
      EXPECT_EQ(outcome.out.find(lesson) != std::string::npos, h == 0.5 || h == 1e-12)
          << outcome.out;
      EXPECT_EQ(outcome.out.find("by differences") != std::string::npos, h > 0) << outcome.out;
    }
}

// What is left of a gradient when all else cancels: behind RMSNorm a text of one number has what
// norm_eps leaves.
TEST(Gradcheck, ForgivesTheRoundingOfWhatCancels) {
  for (const std::string& device : device_flags()) {
    Outcome outcome = run("gradcheck", device + " --depth 3 --text-tokens 1 --text-dim 1");
    EXPECT_EQ(outcome.status, 0) << outcome.out;
    EXPECT_EQ(outcome.out.find("fail"), std::string::npos) << outcome.out;
  }
}

// Through a thousand layers and their recomputation: every residual mode, family and input. On a
// GPU the dual numbers' roundings are not the backward's: there no chaotic network (--writer-std).
TEST(Gradcheck, PassesAtAThousandLayers) {
  for (const std::string& device : device_flags())
    for (const Residual& residual : residuals) {
      std::string flags =
          device + " --depth 1000 --recompute 32 --step 0 --residual " + residual.name;
      bool bare = is_bare(residual.attention) || is_bare(residual.ffn);
      if (bare && device != "--device cpu") flags += " --writer-std 0.02";
      Outcome outcome = run("gradcheck", flags);
      EXPECT_EQ(outcome.status, 0) << outcome.out;
      EXPECT_EQ(outcome.out.find("vanishes"), std::string::npos) << "not checked:\n" << outcome.out;
    }
}

TEST(Gradcheck, PassesAtTenThousandLayers) {
  Outcome outcome = run("gradcheck", "--device cpu --depth 10000 --step 0");
  EXPECT_EQ(outcome.status, 0) << outcome.out;
}

// A network that was trained, and on other images than it was trained on.
TEST_F(CommandTest, GradcheckTakesWeights) {
  const std::string weights = " --weights " + at("run/weights.safetensors");
  for (const std::string& device : device_flags()) {
    Outcome own = run("gradcheck", device + weights);
    Outcome small = run("gradcheck", device + weights + " --height 4 --image-width 2");
    for (const Outcome& o : {own, small}) {
      EXPECT_EQ(o.status, 0) << o.out << o.err;
      EXPECT_PRED_FORMAT2(testing::IsSubstring, "mvsplit, 4 layers", o.out);
    }
    EXPECT_PRED_FORMAT2(testing::IsSubstring, "\ninput z  ", own.out);
    EXPECT_NE(own.out.substr(own.out.find("\ninput z")),
              small.out.substr(small.out.find("\ninput z")));
  }
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "--beta is where a drawn network starts",
                      run("gradcheck", "--device cpu --beta 1" + weights).err);
}

TEST(Gradcheck, PassesForEveryResidualAndCanFail) {
  for (const std::string& device : device_flags())
    for (const Residual& residual : residuals) {
      Config c;
      c.residual = residual.name;
      std::string flags = device + " --depth 24 --recompute 7 --residual " + residual.name;
      // Ungated branches drown the early layers unless they are weak.
      if (is_bare(residual.attention) || is_bare(residual.ffn)) flags += " --writer-std 0.02";
      Outcome good = run("gradcheck", flags), bad = run("gradcheck", flags, "--tolerance 1e-30");
      EXPECT_EQ(good.status, 0) << good.out;
      EXPECT_EQ(good.out.find("WRONG"), std::string::npos) << good.out;
      EXPECT_EQ(bad.status, 1) << flags;
      for (const Parameter& p : parameter_table(c).parameters)
        EXPECT_PRED_FORMAT2(testing::IsSubstring, "\n" + p.family() + " ", good.out);
      for (const char* input : {"\ninput z ", "\ninput text "})
        EXPECT_PRED_FORMAT2(testing::IsSubstring, input, good.out);
    }
}

// Another start than gradcheck's own writers, which give way to it.
TEST(Gradcheck, TakesAXavierGain) {
  Outcome outcome = run("gradcheck", "--device cpu --depth 24 --residual rezero --xavier-gain 0.4");
  EXPECT_EQ(outcome.status, 0) << outcome.out << outcome.err;
}

// One part in a hundred million of one matrix of twelve of a family shows, in whichever layer; and
// so do errors of two layers that are each other's opposite. Errors are told as parts of a family's
// gradient.
TEST(Gradcheck, RejectsAWrongGradient) {
  CLI::App app;
  Machine machine;
  GradcheckOptions o;
  add_gradcheck(app, o, machine);
  o.model.depth = 12, o.recompute = 5;
  Gradcheck check(*devices()[0], o);
  auto worst = [&] {
    testing::internal::CaptureStdout();
    double error = check.run().dual;
    testing::internal::GetCapturedStdout();
    return error;
  };
  EXPECT_LE(worst(), o.tolerance);
  Network<double>& net = check.network();
  EXPECT_EQ(net.span, o.recompute) << "what is checked is replayed";
  const Parameter& gate = net.table.at("blocks.1.fused_mvsplit_norm1.alpha");
  auto gains = from(net.device, net.weights() + gate.offset, gate.count());
  EXPECT_EQ(std::set<double>(gains.begin(), gains.end()).size(), gains.size()) << "channels differ";
  std::map<std::string, std::vector<const Parameter*>> families;
  for (const Parameter& p : net.table.parameters) families[p.family()].push_back(&p);
  const std::vector<double> right = from(net.device, net.gradients(), net.table.size);
  size_t layer = 0;
  for (const auto& family : families) {
    const std::vector<const Parameter*>& of = family.second;
    const Parameter& p = *of[(layer += 5) % of.size()];
    std::vector<double> wrong = right;
    for (size_t i = p.offset; i < p.offset + p.count(); ++i) wrong[i] *= 1 + 1e-8;
    net.device.upload(net.gradients(), wrong.data(), wrong.size() * sizeof(double));
    EXPECT_GT(worst(), o.tolerance) << p.name;
    wrong[p.offset] = NAN;
    net.device.upload(net.gradients(), wrong.data(), wrong.size() * sizeof(double));
    EXPECT_GT(worst(), o.tolerance) << p.name << " is NaN";
    if (family.first != "blocks.*.ffn.w13.weight") continue;
    wrong = right;
    for (size_t i = 0; i < p.count(); ++i) {
      double error = 1e-8 * right[p.offset + i];
      wrong[of[0]->offset + i] += error, wrong[of[1]->offset + i] -= error;
    }
    net.device.upload(net.gradients(), wrong.data(), wrong.size() * sizeof(double));
    EXPECT_GT(worst(), o.tolerance) << family.first << ": opposite errors";
  }
  std::vector<double> larger = right;
  for (double& x : larger) x *= 1.001;
  net.device.upload(net.gradients(), larger.data(), larger.size() * sizeof(double));
  testing::internal::CaptureStdout();
  check.run();
  std::string out = "\n" + testing::internal::GetCapturedStdout();
  for (const auto& [name, of] : families) {
    double squares = 0, by_hand = 0, dual = 0, error = 0;
    for (const Parameter* p : of)
      for (size_t i = 0; i < p->count(); ++i) squares += std::pow(larger[p->offset + i], 2);
    size_t row = out.find("\n" + name + " ");
    ASSERT_NE(row, std::string::npos) << name;
    ASSERT_EQ(std::sscanf(out.c_str() + row + 1, "%*s %*u %lf %lf %lf", &by_hand, &dual, &error),
              3);
    double unit = std::max({std::sqrt(squares), std::abs(by_hand), std::abs(dual)});
    EXPECT_NEAR(error / (std::abs(by_hand - dual) / unit), 1, 0.06) << name;  // of two digits
  }
}

}  // namespace
