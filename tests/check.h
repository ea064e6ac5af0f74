// check.h - what the tests share: tensors on a device, operations with their gradients, and the
// check of a gradient by dual numbers and by differences.
//
// An Op is a forward and a backward over named inputs. check_gradients() moves each input along a
// random direction and compares; check_devices() compares a GPU with the CPU in three precisions. A
// check that could not fail is worth nothing: expect_rejected() feeds it gradients that are wrong.
#pragma once

#include "../math.h"

#include <gtest/gtest.h>

#include <array>
#include <functional>

// The CPU, and the GPU where there is one.
inline std::vector<Device*> devices() {
  static Device cpu(false);
  static std::unique_ptr<Device> gpu(Device::gpus() > 0 ? new Device(true) : nullptr);
  std::vector<Device*> all{&cpu};
  if (gpu) all.push_back(gpu.get());
  return all;
}

inline std::vector<double> random_values(size_t n, uint64_t seed, double scale = 1) {
  std::vector<double> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = scale * gaussian(seed, streams::check, i);
  return x;
}

// An array on a device, of double, float, bf16 or Dual, seen from here as doubles.
class Tensor {
 public:
  Tensor() = default;
  template <class X>
  static Tensor of(Device& device, size_t count) {
    Tensor t;
    t.slab_ = std::make_shared<Slab>(device, count * sizeof(X));
    t.count_ = count;
    t.get_ = [](const Tensor& s) {
      std::vector<X> host(s.count_);
      s.slab_->device.synchronize();  // what was made beside too
      s.slab_->device.download(host.data(), s.slab_->data, s.count_ * sizeof(X));
      std::vector<double> values;
      for (X x : host) values.push_back(double(x));
      return values;
    };
    t.set_ = [](const Tensor& s, const std::vector<double>& values) {
      std::vector<X> host;
      for (double v : values) host.push_back(X(v));
      s.slab_->device.upload(s.slab_->data, host.data(), s.count_ * sizeof(X));
    };
    return t;
  }
  template <class X>
  static Tensor random(Device& device, size_t count, uint64_t seed, double scale = 1) {
    Tensor t = of<X>(device, count);
    t.set(random_values(count, seed, scale));
    return t;
  }
  template <class X>
  X* data() const {
    return reinterpret_cast<X*>(slab_->data);
  }
  size_t count() const { return count_; }
  std::vector<double> get() const { return get_(*this); }
  void set(const std::vector<double>& values) const {
    ASSERT_EQ(values.size(), count_);
    set_(*this, values);
  }

 private:
  std::shared_ptr<Slab> slab_;
  size_t count_ = 0;
  std::function<std::vector<double>(const Tensor&)> get_;
  std::function<void(const Tensor&, const std::vector<double>&)> set_;
};

// The sentence of the Error that f throws, or "no error".
template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}
#define EXPECT_ERROR(statement, words) \
  EXPECT_PRED_FORMAT2(testing::IsSubstring, words, error_of([&] { statement; }))

struct Op {
  struct Input {
    std::string name;
    Tensor value, gradient;
  };
  std::vector<Input> inputs;
  Tensor output, cotangent;
  std::vector<Tensor> kept;  // what the two functions need besides, kept alive with them
  std::function<void()> forward, backward;

  const Input& input(const std::string& name) const {
    for (const Input& i : inputs)
      if (i.name == name) return i;
    throw std::out_of_range(name);
  }
  // <cotangent, output>: a random cotangent sees everything. (The plain sum of Z, for one, is blind
  // to beta, because 1^T P = 0.)
  double loss() const {
    forward();
    std::vector<double> y = output.get(), c = cotangent.get();
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * c[i];
    return sum;
  }
};

// |<gradient, u> - four-point difference along u| / the larger of the two.
inline double directional_error(const Op& op, const Op::Input& input,
                                const std::vector<double>& gradient, uint64_t seed = 99,
                                double h = 1e-3) {
  std::vector<double> x = input.value.get(), u = random_values(x.size(), seed);
  auto at = [&](double s) {
    std::vector<double> moved = x;
    for (size_t i = 0; i < x.size(); ++i) moved[i] += s * u[i];
    input.value.set(moved);
    double value = op.loss();
    input.value.set(x);
    return value;
  };
  double numeric = (at(-2 * h) - 8 * at(-h) + 8 * at(h) - at(2 * h)) / (12 * h), analytic = 0;
  for (size_t i = 0; i < u.size(); ++i) analytic += gradient[i] * u[i];
  double error = std::abs(numeric - analytic) / std::max(std::abs(numeric), std::abs(analytic));
  return std::isfinite(error) ? error : HUGE_VAL;
}

// |<gradient, u> - the derivative along u by `exact`, the same Op in dual numbers| / |gradient|.
// (<gradient, u> itself may be small by chance.)
inline double dual_error(const Op& exact, size_t input, const std::vector<double>& gradient) {
  std::vector<double> u = random_values(gradient.size(), 99);
  Dual* x = exact.inputs[input].value.data<Dual>();
  double error = 0, squares = 0;
  for (size_t i = 0; i < u.size(); ++i) {
    x[i].d = u[i];
    error += gradient[i] * u[i], squares += gradient[i] * gradient[i];
  }
  exact.forward();
  for (size_t i = 0; i < exact.output.count(); ++i)
    error -= (exact.cotangent.data<Dual>()[i] * exact.output.data<Dual>()[i]).d;
  for (size_t i = 0; i < u.size(); ++i) x[i].d = 0;
  error = std::abs(error) / std::sqrt(squares);
  return std::isfinite(error) ? error : HUGE_VAL;
}

constexpr double gradient_tolerance = 1e-8, dual_tolerance = 1e-12;

// Every input's gradient, in fp64, on every device.
template <class Make>
void check_gradients(const Make& make) {
  Op exact = make(*devices()[0], Dual{});
  for (Device* device : devices()) {
    Op op = make(*device, double{});
    op.forward();
    op.backward();
    for (size_t i = 0; i < op.inputs.size(); ++i) {
      SCOPED_TRACE(op.inputs[i].name + " on " + device->name);
      std::vector<double> g = op.inputs[i].gradient.get(), wrong = g, blurred = g;
      EXPECT_LE(dual_error(exact, i, g), dual_tolerance);
      EXPECT_LE(directional_error(op, op.inputs[i], g), gradient_tolerance);
      for (double& x : blurred) x *= 1 + 1e-9;
      for (double& x : wrong) x *= 1 + 1e-6;
      EXPECT_GT(dual_error(exact, i, blurred), dual_tolerance) << "the check is blind";
      EXPECT_GT(directional_error(op, op.inputs[i], wrong), gradient_tolerance)
          << "the check is blind";
    }
  }
}

// A wrong gradient of op's input `name` must fail the check that the right one passes.
inline void expect_rejected(const Op& op, const std::string& name, const std::vector<double>& wrong,
                            const char* what) {
  const Op::Input& input = op.input(name);
  ASSERT_LE(directional_error(op, input, input.gradient.get()), gradient_tolerance) << name;
  EXPECT_GT(directional_error(op, input, wrong), gradient_tolerance) << name << ": " << what;
}

inline double relative_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  double r = std::sqrt(difference / norm);
  return std::isfinite(r) ? r : HUGE_VAL;
}

// A matrix in fp64 on the host, for statements about matrices: small, and written like mathematics.
struct Dense {
  size_t rows, cols;
  std::vector<double> v;

  Dense(size_t m, size_t n) : rows(m), cols(n), v(m * n) {}
  Dense(size_t m, size_t n, std::vector<double> values) : rows(m), cols(n), v(std::move(values)) {}
  double& operator()(size_t i, size_t j) { return v[i * cols + j]; }
  double operator()(size_t i, size_t j) const { return v[i * cols + j]; }
};
inline Dense random_dense(size_t rows, size_t cols, uint64_t seed, double scale = 1) {
  return {rows, cols, random_values(rows * cols, seed, scale)};
}
inline Dense diagonal(const std::vector<double>& d) {
  Dense m(d.size(), d.size());
  for (size_t i = 0; i < d.size(); ++i) m(i, i) = d[i];
  return m;
}
inline Dense identity(size_t n) { return diagonal(std::vector<double>(n, 1.0)); }
inline Dense operator*(const Dense& a, const Dense& b) {
  Dense c(a.rows, b.cols);
  for (size_t i = 0; i < a.rows; ++i)
    for (size_t k = 0; k < a.cols; ++k)
      for (size_t j = 0; j < b.cols; ++j) c(i, j) += a(i, k) * b(k, j);
  return c;
}
inline Dense operator*(double s, Dense a) {
  for (double& x : a.v) x *= s;
  return a;
}
inline Dense operator+(Dense a, const Dense& b) {
  for (size_t i = 0; i < a.v.size(); ++i) a.v[i] += b.v[i];
  return a;
}
inline Dense operator-(const Dense& a, const Dense& b) { return a + (-1.0) * b; }
inline Dense transpose(const Dense& a) {
  Dense t(a.cols, a.rows);
  for (size_t i = 0; i < a.rows; ++i)
    for (size_t j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
  return t;
}
// Rows first, first + 1, ..., of a.
inline Dense rows_of(const Dense& a, size_t first, size_t count) {
  auto from = a.v.begin() + std::ptrdiff_t(first * a.cols);
  return {count, a.cols, {from, from + std::ptrdiff_t(count * a.cols)}};
}
inline double inner(const Dense& a, const Dense& b) {
  double sum = 0;
  for (size_t i = 0; i < a.v.size(); ++i) sum += a.v[i] * b.v[i];
  return sum;
}
inline double norm(const Dense& a) { return std::sqrt(inner(a, a)); }
inline double difference(const Dense& a, const Dense& b) { return norm(a - b) / norm(b); }

// J: the mean over each of consecutive groups of tokens. {T} is the global one, {N, L} that of the
// segments, and the sequences of a batch are further groups.
inline Dense mean_over(const std::vector<size_t>& groups) {
  size_t n = 0, start = 0;
  for (size_t g : groups) n += g;
  Dense J(n, n);
  for (size_t g : groups) {
    for (size_t i = start; i < start + g; ++i)
      for (size_t j = start; j < start + g; ++j) J(i, j) = 1 / double(g);
    start += g;
  }
  return J;
}

// |sum_t delta_t y_t^T|_F, through the (D, n) matrix.
inline double writer_norm(const Dense& delta, const Dense& y) { return norm(transpose(delta) * y); }
// What a writer's gradient dW = delta^T y is made of, by the definitions: J and P put in, cosines
// token by token. g_mean, g_ctr, A and khat.
inline std::array<double, 4> plain_writer(const Dense& y, const Dense& delta) {
  size_t T = y.rows;
  const Dense J = mean_over({T});
  std::vector<double> w(T);
  auto row_norm = [](const Dense& x, size_t t) { return norm(rows_of(x, t, 1)); };
  auto cosine = [&](const Dense& x, size_t t, size_t s) {
    return inner(rows_of(x, t, 1), rows_of(x, s, 1)) / (row_norm(x, t) * row_norm(x, s));
  };
  double w2 = 0, above = 0, below = 0;
  for (size_t t = 0; t < T; ++t) w[t] = row_norm(y, t) * row_norm(delta, t), w2 += w[t] * w[t];
  for (size_t t = 0; t < T; ++t)
    for (size_t s = 0; s < T; ++s)
      if (s != t && w[t] * w[s] > 0) {
        above += w[t] * w[s] * std::abs(cosine(y, t, s) * cosine(delta, t, s));
        below += w[t] * w[s];
      }
  return {writer_norm(J * delta, J * y), writer_norm(delta - J * delta, y - J * y),
          std::pow(writer_norm(delta, y), 2) / w2, above / below};
}

// A statement of the paper as a residual: zero up to rounding for this code, and for none of the
// false statements or mutated ingredients beside it. --gtest_output=xml writes the numbers.
struct Mutation {
  const char* what;
  double residual;
};
inline void expect_statement(const Device& device, const std::string& name, double residual,
                             const std::vector<Mutation>& mutations, double tolerance = 1e-12) {
  EXPECT_LE(residual, tolerance) << name << " on " << device.name;
  double least = HUGE_VAL;
  for (const Mutation& m : mutations) {
    EXPECT_GT(m.residual, tolerance) << name << ": not rejected: " << m.what;
    EXPECT_TRUE(std::isfinite(m.residual)) << name << ": " << m.what;
    least = std::min(least, m.residual);
  }
  char text[64];
  std::snprintf(text, sizeof text, "%.1e; %zu mutations, least %.1e", residual, mutations.size(),
                least);
  testing::Test::RecordProperty(name + (device.gpu ? " (GPU)" : ""), text);
}

// The slope of log y against log x, by least squares.
inline double log_slope(const std::vector<double>& x, const std::vector<double>& y) {
  double n = double(x.size()), sx = 0, sy = 0, sxx = 0, sxy = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    double a = std::log(x[i]), b = std::log(y[i]);
    sx += a, sy += b, sxx += a * a, sxy += a * b;
  }
  return (n * sxy - sx * sy) / (n * sxx - sx * sx);
}

// The singular values of M (n, n), largest first, by one-sided Jacobi rotations: two rows at a time
// are turned in their plane until all rows are orthogonal. Rotations from the left keep the
// singular values, and those of a matrix with orthogonal rows are the rows' norms. What is below
// rounding of the largest is left as it is.
inline std::vector<double> singular_values(std::vector<double> m, size_t n) {
  auto dot = [&](size_t p, size_t q) {
    double sum = 0;
    for (size_t k = 0; k < n; ++k) sum += m[p * n + k] * m[q * n + k];
    return sum;
  };
  double squares = 0, eps = double(n) * 2.3e-16;
  for (double x : m) squares += x * x;
  bool turned = true;
  for (int sweep = 0; turned && sweep < 60; ++sweep) {
    turned = false;
    for (size_t p = 0; p < n; ++p)
      for (size_t q = p + 1; q < n; ++q) {
        double a = dot(p, p), b = dot(q, q), c = dot(p, q);
        if (!(std::abs(c) > eps * std::max(std::sqrt(a * b), eps * squares))) continue;
        // tan of the angle: the smaller root of t^2 + 2 zeta t - 1 = 0.
        double zeta = (b - a) / (2 * c);
        double t = std::copysign(1 / (std::abs(zeta) + std::hypot(1, zeta)), zeta);
        double cosine = 1 / std::hypot(1, t), sine = cosine * t;
        for (size_t k = 0; k < n; ++k) {
          double x = m[p * n + k], y = m[q * n + k];
          m[p * n + k] = cosine * x - sine * y;
          m[q * n + k] = sine * x + cosine * y;
        }
        turned = true;
      }
  }
  EXPECT_FALSE(turned) << "60 sweeps of Jacobi rotations were not enough";
  std::vector<double> values(n);
  for (size_t p = 0; p < n; ++p) values[p] = std::sqrt(dot(p, p));
  std::sort(values.rbegin(), values.rend());
  return values;
}
inline double spectral_norm(const std::vector<double>& m, size_t n) {
  return singular_values(m, n)[0];
}

// The GPU's outputs and gradients against the CPU's on the same numbers.
template <class Real, class Make>
void compare_devices(const Make& make, double tolerance) {
  Op a = make(*devices()[0], Real{}), b = make(*devices()[1], Real{});
  for (Op* op : {&a, &b}) op->forward(), op->backward();
  EXPECT_LE(relative_difference(b.output.get(), a.output.get()), tolerance) << "output";
  for (size_t i = 0; i < a.inputs.size(); ++i)
    EXPECT_LE(relative_difference(b.inputs[i].gradient.get(), a.inputs[i].gradient.get()),
              tolerance)
        << "gradient of " << a.inputs[i].name;
}

// Both machines in three precisions. a bf16 rounding is off by up to 2^-9 of the value, fp32 sums
// in another order.
template <class Make>
void check_devices(const Make& make) {
  if (devices().size() < 2) GTEST_SKIP() << "no GPU";
  compare_devices<double>(make, 1e-12);
  compare_devices<float>(make, 1e-5);
  compare_devices<bf16>(make, 1e-2);
}
