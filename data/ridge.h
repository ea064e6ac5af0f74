// ridge.h - linear ridge regression, and how much of a label it explains.
//
// What it is: the fit behind `mvsplit probe` (train.cu, appendix I), on the CPU in fp64.
// What it is not: anything that knows where the samples come from.
//
// How to read it: the derivation below, then class Ridge, then fit_and_test().
#pragma once

#include "../math.h"

#include <numeric>

// With features standardised over the n samples of the fit, x' = (x - m) / s, find for labels t the
// w and c for which
//
//     (1/n) sum_i (t_i - c - <w, x'_i>)^2 + penalty |w|^2
//
// is least. Its derivative by c vanishes at c = mean t, as the x' have mean zero (the intercept
// is not penalised). That by w vanishes where
//
//     (S + penalty I) w = (1/n) sum_i (t_i - c) x'_i,     S = (1/n) sum_i x'_i x'_i^T,
//
// which a Cholesky factor L L^T of the matrix solves, in fp64.

// S (n, n), symmetric and positive definite, becomes L in its lower triangle, row by row: from
// S_ij = sum_(k <= j) L_ik L_jk for j <= i.
inline void cholesky(double* S, size_t n) {
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j <= i; ++j) {
      const double *a = S + i * n, *b = S + j * n;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (size_t k = 0; k < j; ++k) sum += a[k] * b[k];
      S[i * n + j] = i == j ? std::sqrt(a[i] - sum) : (a[j] - sum) / b[j];
    }
}

// t = intercept + <weights, x>, x as it is.
struct Line {
  double intercept = 0;
  std::vector<double> weights;

  template <class Acc>
  double at(const Acc* x) const {
    return std::inner_product(weights.begin(), weights.end(), x, intercept);
  }
};

// The share of the labels' variance that a line explains: 1 if it is exact, 0 if it knows no more
// than their mean, below 0 if less. x (n, D), t (n).
template <class Acc>
double r_squared(const Line& line, const Acc* x, const double* t, size_t n) {
  double mean = std::accumulate(t, t + n, 0.0) / double(n), rest = 0, all = 0;
  for (size_t i = 0; i < n; ++i) {
    rest += std::pow(t[i] - line.at(x + i * line.weights.size()), 2);
    all += std::pow(t[i] - mean, 2);
  }
  return 1 - rest / all;
}

// Several labels share the features, and with them the matrix and its factor.
using Labels = std::vector<std::vector<double>>;

// The regressions on samples [0, n) of x (n, D), for any penalty.
class Ridge {
 public:
  template <class Acc>
  Ridge(const Acc* samples, const Labels& labels, size_t n, size_t D)
      : mean_(D), inverse_(D), gram_(D * D), intercepts_(labels.size()) {
    std::vector<double> X(samples, samples + n * D), variance(D);
    auto each = [&](const auto& f) {
      for (size_t i = 0; i < n; ++i)
        for (size_t d = 0; d < D; ++d) f(i, d, X[i * D + d]);
    };
    each([&](size_t, size_t d, double x) { mean_[d] += x / double(n); });
    each([&](size_t, size_t d, double& x) { x -= mean_[d], variance[d] += x * x / double(n); });
    for (size_t d = 0; d < D; ++d) {
      double s = std::sqrt(variance[d]);
      inverse_[d] = s > 1e-6 * std::abs(mean_[d]) ? 1 / s : 0;  // constant but for rounding: unused
    }
    each([&](size_t, size_t d, double& x) { x *= inverse_[d]; });
    Matrix<double> rows(X.data(), D);
    Device host;
    gemm(host, Matrix<double>(gram_.data(), D), rows.transpose(), rows, {D, D, n}, 1 / double(n));
    for (size_t k = 0; k < labels.size(); ++k) {
      const double* t = labels[k].data();
      intercepts_[k] = std::accumulate(t, t + n, 0.0) / double(n);
      std::vector<double>& product = products_.emplace_back(D);
      each([&](size_t i, size_t d, double x) {
        product[d] += (t[i] - intercepts_[k]) * x / double(n);
      });
    }
  }

  // A line a label.
  std::vector<Line> solve(double penalty) const {
    size_t D = mean_.size();
    std::vector<double> L = gram_;
    for (size_t d = 0; d < D; ++d) L[d * D + d] += penalty;
    cholesky(L.data(), D);
    std::vector<Line> lines;
    for (size_t k = 0; k < products_.size(); ++k) {
      std::vector<double> w = products_[k];
      for (size_t i = 0; i < D; ++i)  // L u = product
        w[i] = (w[i] - std::inner_product(&L[i * D], &L[i * D + i], &w[0], 0.0)) / L[i * D + i];
      for (size_t i = D; i-- > 0;) {  // L^T w = u
        w[i] /= L[i * D + i];
        for (size_t j = 0; j < i; ++j) w[j] -= L[i * D + j] * w[i];
      }
      for (size_t d = 0; d < D; ++d) w[d] *= inverse_[d];
      double shift = std::inner_product(w.begin(), w.end(), mean_.begin(), 0.0);
      lines.push_back({intercepts_[k] - shift, w});
    }
    return lines;
  }

 private:
  std::vector<double> mean_, inverse_, gram_, intercepts_;
  Labels products_;
};

// How many samples (images) to fit with, then to choose the penalty with, then to test with.
struct ProbeSplit {
  size_t fit, choose, test;

  explicit ProbeSplit(size_t images) : test(images / 4) {
    choose = (images - test) / 4, fit = images - test - choose;
  }
};

struct Probed {
  Line line;
  double penalty = 0, r2 = -HUGE_VAL;
};

// For each label the line through the first two parts of x (n, D), and its R^2 in the third.
template <class Acc>
std::vector<Probed> fit_and_test(const std::vector<Acc>& x, const Labels& labels,
                                 ProbeSplit split) {
  size_t n = split.fit + split.choose, D = x.size() / (n + split.test);
  std::vector<Probed> best(labels.size());
  Ridge part(x.data(), labels, split.fit, D), all(x.data(), labels, n, D);
  for (int power = -8; power <= 2; ++power) {
    std::vector<Line> lines = part.solve(std::pow(10, power));
    for (size_t k = 0; k < labels.size(); ++k) {
      double r2 = r_squared(lines[k], &x[split.fit * D], &labels[k][split.fit], split.choose);
      if (r2 > best[k].r2) best[k] = {{}, std::pow(10, power), r2};
    }
  }
  for (size_t k = 0; k < labels.size(); ++k) {
    best[k].line = all.solve(best[k].penalty)[k];
    best[k].r2 = r_squared(best[k].line, &x[n * D], &labels[k][n], split.test);
  }
  return best;
}
