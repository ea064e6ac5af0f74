// mvsplit_test.cu - tests of mvsplit.cu: the token means, RMSNorm, and the merges.
#include "../mvsplit.cu"

#include "check.h"

// Small, with two segments of different lengths; and one that spans several tiles of channels, with
// more rows than a team has.
struct Shape {
  Tokens tokens;
  size_t D;
};
const Shape shapes[] = {{{2, 5, 3}, 8}, {{2, 37, 11}, 136}, {{1, 6, 0}, 12}};

// A merge with random gates, and everything that its backward leaves behind.
struct MergeOp : Op {
  Tensor dbar, xbar, fbar;
};

template <class T>
MergeOp merge_op(Device& device, Merge merge, Shape shape) {
  using A = Acc<T>;
  Tokens tokens = shape.tokens;
  size_t D = shape.D, n = tokens.rows() * D, means = 2 * tokens.batch * D;
  MergeOp op;
  Tensor X = Tensor::random<T>(device, n, 1), F = Tensor::random<T>(device, n, 2, 0.7);
  // A mean that is not small: the leaky term and the split have something to do.
  std::vector<double> x = X.get();
  for (size_t i = 0; i < n; ++i) x[i] += 0.5 * gaussian(7, streams::check, i % D);
  X.set(x);
  op.inputs = {{"X", X, Tensor::of<T>(device, n)}, {"F", F, Tensor::of<T>(device, n)}};
  auto gate = [&](const char* name, size_t size, uint64_t seed) {
    op.inputs.push_back(
        {name, Tensor::random<T>(device, size, seed, 0.6), Tensor::of<A>(device, size)});
    return op.inputs.back();
  };
  Gates<const T> gates{merge, nullptr, nullptr, nullptr};
  Gates<A> dgates{merge, nullptr, nullptr, nullptr};
  if (splits(merge)) {
    Op::Input alpha = gate("alpha", D, 3), beta = gate("beta", D, 4);
    gates.alpha = alpha.value.data<T>(), dgates.alpha = alpha.gradient.data<A>();
    gates.beta = beta.value.data<T>(), dgates.beta = beta.gradient.data<A>();
  } else if (merge != Merge::plain) {
    Op::Input lambda = gate("lambda", merge == Merge::rezero ? 1 : D, 5);
    gates.lambda = lambda.value.data<T>(), dgates.lambda = lambda.gradient.data<A>();
  }
  op.output = Tensor::of<T>(device, n), op.cotangent = Tensor::random<T>(device, n, 6);
  Tensor r = Tensor::of<A>(device, tokens.rows()), q = Tensor::of<A>(device, tokens.rows());
  op.xbar = Tensor::of<A>(device, means), op.fbar = Tensor::of<A>(device, means);
  op.dbar = Tensor::of<A>(device, means);
  Tensor dgate = Tensor::of<A>(device, means), Y = op.output, G = op.cotangent;
  MergeSaved<A> saved{r.data<A>(), op.xbar.data<A>(), op.fbar.data<A>()};
  MergeScratch<A> scratch{q.data<A>(), op.dbar.data<A>(), dgate.data<A>()};
  op.kept = {r, q, op.xbar, op.fbar, op.dbar, dgate};
  Device* d = &device;
  Tensor dX = op.inputs[0].gradient, dF = op.inputs[1].gradient;
  op.forward = [=] {
    merge_forward(*d, Y.data<T>(), saved, X.data<T>(), F.data<T>(), gates, tokens, D, 1e-6);
  };
  op.backward = [=] {
    merge_backward(*d, dX.data<T>(), dF.data<T>(), dgates, G.data<T>(), X.data<T>(), F.data<T>(),
                   gates, saved, scratch, tokens, D, false);
  };
  return op;
}

const Merge all_merges[] = {Merge::plain, Merge::layerscale, Merge::rezero, Merge::mvsplit,
                            Merge::mvsplit_noleak};

TEST(Merge, GradientsAgreeWithDifferences) {
  for (Merge merge : all_merges)
    for (const Shape& shape : shapes) {
      SCOPED_TRACE(testing::Message() << "merge " << int(merge) << " D " << shape.D);
      check_gradients([&](Device& d, auto t) { return merge_op<decltype(t)>(d, merge, shape); });
    }
}

TEST(Merge, AgreesOnBothDevices) {
  if (devices().size() < 2) GTEST_SKIP() << "no GPU";
  for (Merge merge : all_merges) {
    SCOPED_TRACE(int(merge));
    check_devices([&](Device& d, auto t) { return merge_op<decltype(t)>(d, merge, shapes[1]); });
  }
}

// x + s * factor_d * dbar of the row's segment; only in rows where keep(segment).
template <class Keep>
std::vector<double> add_mean(const MergeOp& op, const Shape& shape, std::vector<double> x,
                             const std::vector<double>& factor, double s, const Keep& keep) {
  std::vector<double> dbar = op.dbar.get();
  for (size_t i = 0; i < x.size(); ++i) {
    size_t segment = shape.tokens.segment_of(i / shape.D), d = i % shape.D;
    if (keep(segment % 2)) x[i] += s * factor[d] * dbar[segment * shape.D + d];
  }
  return x;
}

TEST(Merge, WrongBackwardsAreRejected) {
  Shape shape = shapes[0];
  MergeOp op = merge_op<double>(*devices()[0], Merge::mvsplit, shape);
  op.forward(), op.backward();
  std::vector<double> alpha = op.input("alpha").value.get(), beta = op.input("beta").value.get();
  std::vector<double> dX = op.input("X").gradient.get(), dF = op.input("F").gradient.get();
  std::vector<double> difference = alpha;
  for (size_t d = 0; d < shape.D; ++d) difference[d] -= beta[d];
  auto everywhere = [](size_t) { return true; };
  auto text_only = [](size_t s) { return s == 1; };
  expect_rejected(op, "X", add_mean(op, shape, dX, alpha, 1, everywhere), "no leaky term (dX)");
  expect_rejected(op, "X", add_mean(op, shape, dX, alpha, 2, everywhere), "its sign");
  expect_rejected(op, "X", add_mean(op, shape, dX, alpha, 1, text_only), "no text segment");
  expect_rejected(op, "F", add_mean(op, shape, dF, difference, -1, everywhere), "beta alone (dF)");
  expect_rejected(op, "F", add_mean(op, shape, dF, alpha, -1, everywhere), "no alpha in (dF)");
  expect_rejected(op, "F", add_mean(op, shape, dF, difference, -1, text_only), "no text segment");

  // The gates with an uncentered factor: dbeta with F for P F, dalpha without the leaky term.
  std::vector<double> dalpha = op.input("alpha").gradient.get(),
                      dbeta = op.input("beta").gradient.get();
  std::vector<double> dbar = op.dbar.get(), xbar = op.xbar.get(), fbar = op.fbar.get();
  std::vector<double> image_only = dalpha;
  for (size_t s = 0; s < 2 * shape.tokens.batch; ++s)
    for (size_t d = 0; d < shape.D; ++d) {
      size_t i = s * shape.D + d;
      double n = double(shape.tokens.count(s % 2));
      dbeta[d] += n * dbar[i] * fbar[i];
      dalpha[d] += n * dbar[i] * xbar[i];
      if (s % 2) image_only[d] -= n * dbar[i] * (fbar[i] - xbar[i]);
    }
  expect_rejected(op, "beta", dbeta, "F for P F in (dbeta)");
  expect_rejected(op, "alpha", dalpha, "no Xbar in (dalpha)");
  expect_rejected(op, "alpha", image_only, "no text segment in (dalpha)");
  for (const Op::Input& input : op.inputs) {
    std::vector<double> g = input.gradient.get();
    for (double& v : g) v = -v;
    expect_rejected(op, input.name, g, "wrong sign");
  }
}

// The other gates: a gradient that forgets a token, or scales the trunk by lambda as well.
TEST(Merge, WrongScaleGradientsAreRejected) {
  for (Merge merge : {Merge::layerscale, Merge::rezero}) {
    Shape shape = shapes[0];
    MergeOp op = merge_op<double>(*devices()[0], merge, shape);
    op.forward(), op.backward();
    std::vector<double> lambda = op.input("lambda").value.get();
    std::vector<double> dX = op.input("X").gradient.get(), F = op.input("F").value.get();
    std::vector<double> dlambda = op.input("lambda").gradient.get(), scaled = dX;
    size_t last = dX.size() - shape.D;
    for (size_t i = 0; i < dX.size(); ++i) {
      scaled[i] *= lambda[i % lambda.size()];
      if (i >= last) dlambda[i % lambda.size()] -= dX[i] * F[i];
    }
    expect_rejected(op, "X", scaled, "lambda on the trunk");
    expect_rejected(op, "F", dX, "no lambda on the branch");
    expect_rejected(op, "lambda", dlambda, "the last token is missing");
  }
}

// The definition, each mean summed anew for each element, against the kernels.
TEST(Merge, ForwardFollowsTheDefinition) {
  for (Device* device : devices())
    for (Merge merge : all_merges) {
      Shape shape = shapes[0];
      MergeOp op = merge_op<double>(*device, merge, shape);
      op.forward();
      std::vector<double> x = op.input("X").value.get(), f = op.input("F").value.get(), z = x;
      auto gate = [&](const char* name, size_t d) {
        std::vector<double> g = op.input(name).value.get();
        return g[g.size() == 1 ? 0 : d];
      };
      size_t D = shape.D, T = shape.tokens.length();
      auto J = [&](const std::vector<double>& v, size_t row, size_t d) {
        double sum = 0, n = 0;
        for (size_t other = row / T * T; other < (row / T + 1) * T; ++other)
          if ((other % T < shape.tokens.image) == (row % T < shape.tokens.image))
            sum += v[other * D + d], n += 1;
        return sum / n;
      };
      for (size_t row = 0; row < shape.tokens.rows(); ++row) {
        double squares = 0;
        for (size_t d = 0; d < D; ++d) {
          size_t i = row * D + d;
          double mean = J(f, row, d), leak = merge == Merge::mvsplit ? J(x, row, d) : 0;
          if (splits(merge))
            z[i] += gate("beta", d) * (f[i] - mean) + gate("alpha", d) * (mean - leak);
          else
            z[i] += (merge == Merge::plain ? 1 : gate("lambda", d)) * f[i];
          squares += z[i] * z[i];
        }
        for (size_t d = 0; d < D; ++d) z[row * D + d] /= std::sqrt(squares / double(D) + 1e-6);
      }
      EXPECT_LE(relative_difference(op.output.get(), z), 1e-14) << int(merge);
    }
}

// The consequence of (dF): at alpha = 0 the adjoint of the branch has no segment mean.
TEST(Merge, BranchAdjointHasNoMeanAtAlphaZero) {
  for (Device* device : devices()) {
    Shape shape = shapes[1];
    MergeOp op = merge_op<double>(*device, Merge::mvsplit, shape);
    auto largest_mean = [&] {
      op.forward(), op.backward();
      std::vector<double> g = op.input("F").gradient.get(), mean(2 * shape.tokens.batch * shape.D);
      for (size_t i = 0; i < g.size(); ++i)
        mean[shape.tokens.segment_of(i / shape.D) * shape.D + i % shape.D] += g[i];
      double largest = 0;
      for (double m : mean) largest = std::max(largest, std::abs(m));
      return largest;
    };
    EXPECT_GT(largest_mean(), 0.01);
    op.input("alpha").value.set(std::vector<double>(shape.D, 0.0));
    EXPECT_LT(largest_mean(), 1e-13);
  }
}

TEST(Merge, AccumulatesGateGradients) {
  for (Device* device : devices()) {
    MergeOp op = merge_op<float>(*device, Merge::mvsplit, shapes[0]);
    op.forward(), op.backward();
    std::vector<double> once = op.input("beta").gradient.get();
    Tokens tokens = shapes[0].tokens;
    Tensor q = Tensor::of<float>(*device, tokens.rows()),
           dgate = Tensor::random<float>(*device, 2 * tokens.batch * shapes[0].D, 8);
    MergeScratch<float> scratch{q.data<float>(), op.dbar.data<float>(), dgate.data<float>()};
    MergeSaved<float> saved{nullptr, op.xbar.data<float>(), op.fbar.data<float>()};
    auto run = [&](bool accumulate) {
      Gates<float> d{Merge::mvsplit, op.input("alpha").gradient.data<float>(),
                     op.input("beta").gradient.data<float>(), nullptr};
      gate_gradients<float>(*device, d, saved, scratch, tokens, shapes[0].D, accumulate);
      return op.input("beta").gradient.get();
    };
    std::vector<double> sum = run(true), second = run(false);
    for (size_t i = 0; i < sum.size(); ++i) EXPECT_FLOAT_EQ(sum[i], once[i] + second[i]);
  }
}

// RMSNorm of packed rows into strided places, as the input norms use it.
template <class T>
Op rmsnorm_op(Device& device, size_t batch, size_t n, size_t D) {
  using A = Acc<T>;
  Op op;
  size_t stride = (n + 3) * D;
  Tensor X = Tensor::random<T>(device, batch * n * D, 1), r = Tensor::of<A>(device, batch * n);
  op.inputs = {{"X", X, Tensor::of<T>(device, batch * n * D)}};
  op.output = Tensor::random<T>(device, batch * stride, 2);
  op.cotangent = Tensor::random<T>(device, batch * stride, 3);
  Tensor Y = op.output, G = op.cotangent, dX = op.inputs[0].gradient;
  Device* d = &device;
  op.forward = [=] {
    rmsnorm_forward(*d, Y.data<T>(), r.data<A>(), X.data<T>(), batch, n, D, stride, 1e-6);
  };
  op.backward = [=] {
    rmsnorm_backward(*d, dX.data<T>(), G.data<T>(), X.data<T>(), r.data<A>(), batch, n, D, stride);
  };
  return op;
}

TEST(RmsNorm, GradientsAgreeWithDifferences) {
  for (size_t D : {4, 64, 1100})
    check_gradients([&](Device& d, auto t) { return rmsnorm_op<decltype(t)>(d, 3, 5, D); });
}
TEST(RmsNorm, AgreesOnBothDevices) {
  check_devices([](Device& d, auto t) { return rmsnorm_op<decltype(t)>(d, 3, 5, 200); });
}
TEST(RmsNorm, WrongBackwardsAreRejected) {
  size_t B = 1, n = 5, D = 12;
  Op op = rmsnorm_op<double>(*devices()[0], B, n, D);
  op.forward(), op.backward();
  std::vector<double> x = op.inputs[0].value.get(), g = op.cotangent.get(), no_projection(n * D);
  for (size_t row = 0; row < n; ++row) {
    double squares = 0;
    for (size_t d = 0; d < D; ++d) squares += x[row * D + d] * x[row * D + d];
    for (size_t d = 0; d < D; ++d)
      no_projection[row * D + d] = g[row * D + d] / std::sqrt(squares / double(D) + 1e-6);
  }
  expect_rejected(op, "X", no_projection, "r g alone: no projection in (Delta)");
  std::vector<double> dx = op.inputs[0].gradient.get();
  for (size_t i = 0; i < dx.size(); ++i) dx[i] = 2 * no_projection[i] - dx[i];
  expect_rejected(op, "X", dx, "the sign of q in (Delta)");
}

TEST(Tokens, KnowTheirSegments) {
  Tokens t{3, 5, 2};
  EXPECT_EQ(t.length(), 7u);
  EXPECT_EQ(t.rows(), 21u);
  for (size_t row = 0; row < t.rows(); ++row)
    EXPECT_EQ(t.segment_of(row), row / 7 * 2 + (row % 7 >= 5)) << row;
}

// ---------------------------------------------------------------------------------------------
// Measuring

// A (T, D) array in plain doubles, with the operations of section 1 spelled out.
struct Plain {
  size_t T, D;
  std::vector<double> x;

  double at(size_t t, size_t d) const { return x[t * D + d]; }
  // J X over tokens [begin, end), X elsewhere.
  Plain averaged(size_t begin, size_t end) const {
    Plain out = *this;
    for (size_t d = 0; d < D; ++d) {
      double sum = 0;
      for (size_t t = begin; t < end; ++t) sum += at(t, d);
      for (size_t t = begin; t < end; ++t) out.x[t * D + d] = sum / double(end - begin);
    }
    return out;
  }
  Plain operator-(const Plain& other) const {
    Plain out = *this;
    for (size_t i = 0; i < x.size(); ++i) out.x[i] -= other.x[i];
    return out;
  }
  double squares() const {
    double sum = 0;
    for (double v : x) sum += v * v;
    return sum;
  }
};

// |sum_t delta_t y_t^T|_F, through the (D, n) matrix.
double writer_norm(const Plain& delta, const Plain& y) {
  double squares = 0;
  for (size_t d = 0; d < delta.D; ++d)
    for (size_t i = 0; i < y.D; ++i) {
      double sum = 0;
      for (size_t t = 0; t < y.T; ++t) sum += delta.at(t, d) * y.at(t, i);
      squares += sum * sum;
    }
  return std::sqrt(squares);
}

// WriterModes by the definitions: dW = delta^T y with J and P put in, cosines token by token.
WriterModes plain_modes(const Plain& y, const Plain& delta, size_t image) {
  size_t T = y.T;
  auto global = [&](const Plain& x) { return x.averaged(0, T); };
  auto segments = [&](const Plain& x) { return x.averaged(0, image).averaged(image, T); };
  std::vector<double> w(T);
  auto row_norm = [](const Plain& x, size_t t) {
    double sum = 0;
    for (size_t d = 0; d < x.D; ++d) sum += x.at(t, d) * x.at(t, d);
    return std::sqrt(sum);
  };
  auto cosine = [&](const Plain& x, size_t t, size_t s) {
    double sum = 0;
    for (size_t d = 0; d < x.D; ++d) sum += x.at(t, d) * x.at(s, d);
    return sum / (row_norm(x, t) * row_norm(x, s));
  };
  double w2 = 0, above = 0, below = 0;
  for (size_t t = 0; t < T; ++t) w[t] = row_norm(y, t) * row_norm(delta, t), w2 += w[t] * w[t];
  for (size_t t = 0; t < T; ++t)
    for (size_t s = 0; s < T; ++s)
      if (s != t) {
        above += w[t] * w[s] * std::abs(cosine(y, t, s) * cosine(delta, t, s));
        below += w[t] * w[s];
      }
  WriterModes m;
  m.mean = writer_norm(global(delta), global(y));
  m.centered = writer_norm(delta - global(delta), y - global(y));
  m.segment_mean = writer_norm(segments(delta), segments(y));
  m.segment_centered = writer_norm(delta - segments(delta), y - segments(y));
  m.amplification = std::pow(writer_norm(delta, y), 2) / w2;
  m.coherence = above / below;
  return m;
}

double worst_difference(const WriterModes& a, const WriterModes& b) {
  double worst = 0;
  for (auto field :
       {&WriterModes::mean, &WriterModes::centered, &WriterModes::segment_mean,
        &WriterModes::segment_centered, &WriterModes::amplification, &WriterModes::coherence}) {
    double difference = std::abs(a.*field - b.*field) / std::abs(b.*field);
    worst = std::isfinite(difference) ? std::max(worst, difference) : HUGE_VAL;
  }
  return worst;
}

// A writer with tokens that share a direction (`offset` times as long as the rest) and differ in
// magnitude.
template <class T>
struct Writer {
  Tokens tokens;
  size_t n, D;
  Tensor y, delta;

  Writer(Device& device, Tokens t, size_t in, size_t out, double offset)
      : tokens(t),
        n(in),
        D(out),
        y(Tensor::of<T>(device, t.rows() * in)),
        delta(Tensor::of<T>(device, t.rows() * out)) {
    auto fill = [&](Tensor& x, size_t channels, uint64_t seed) {
      std::vector<double> values = random_values(x.count(), seed);
      for (size_t i = 0; i < values.size(); ++i) {
        size_t row = i / channels;
        values[i] += offset * gaussian(seed + 1, streams::check, i % channels);
        values[i] *= 1 + double(row % 5) + (row % t.length() < t.image ? 0 : 2);
      }
      x.set(values);
    };
    fill(y, n, 20), fill(delta, D, 30);
  }
  Plain plain(const Tensor& x, size_t channels, size_t b) const {
    std::vector<double> all = x.get();
    auto from = all.begin() + ptrdiff_t(b * tokens.length() * channels);
    return {tokens.length(), channels, {from, from + ptrdiff_t(tokens.length() * channels)}};
  }
  std::vector<WriterModes> modes(Device& device) const {
    WriterScratch<Acc<T>> scratch;
    Carver count;
    scratch.lay(count, tokens, n, D);
    Slab slab(device, count.used), out(device, tokens.batch * sizeof(WriterModes));
    Carver carver{slab.data};
    scratch.lay(carver, tokens, n, D);
    auto* modes = reinterpret_cast<WriterModes*>(out.data);
    writer_modes(device, modes, scratch, y.data<T>(), delta.data<T>(), tokens, n, D);
    std::vector<WriterModes> host(tokens.batch);
    device.download(host.data(), modes, host.size() * sizeof(WriterModes));
    return host;
  }
};

const Tokens some_tokens[] = {{2, 5, 3}, {3, 37, 11}, {1, 6, 0}};

// In bf16 too: the reference starts from the rounded numbers.
template <class T>
void check_modes(Device& device, double offset, double tolerance) {
  for (Tokens tokens : some_tokens) {
    Writer<T> writer(device, tokens, 24, 12, offset);
    std::vector<WriterModes> got = writer.modes(device);
    for (size_t b = 0; b < tokens.batch; ++b) {
      Plain y = writer.plain(writer.y, 24, b), delta = writer.plain(writer.delta, 12, b);
      EXPECT_LE(worst_difference(got[b], plain_modes(y, delta, tokens.image)), tolerance)
          << device.name << ", " << tokens.image << " image tokens, offset " << offset;
    }
  }
}
TEST(WriterModes, AgreeWithTheMatrices) {
  for (Device* device : devices()) {
    check_modes<double>(*device, 0.5, 1e-12);
    check_modes<float>(*device, 0.5, 1e-5);
    check_modes<bf16>(*device, 0.5, 1e-5);
    // Tokens that are alike to one part in 300: centering the Gram matrices would lose G_ctr.
    check_modes<double>(*device, 300, 1e-9);
    check_modes<float>(*device, 300, 1e-3);
  }
}

TEST(WriterModes, WrongDefinitionsAreRejected) {
  Device& device = *devices()[0];
  Tokens tokens{1, 37, 11};
  Writer<double> writer(device, tokens, 24, 12, 0.5);
  WriterModes got = writer.modes(device)[0];
  Plain y = writer.plain(writer.y, 24, 0), delta = writer.plain(writer.delta, 12, 0);
  WriterModes right = plain_modes(y, delta, tokens.image);
  ASSERT_LE(worst_difference(got, right), 1e-12);
  auto rejects = [&](double WriterModes::*field, double wrong, const char* what) {
    WriterModes changed = right;
    changed.*field = wrong;
    EXPECT_GT(worst_difference(got, changed), 1e-3) << what;
  };
  size_t T = y.T;
  Plain ym = y.averaged(0, T), dm = delta.averaged(0, T);
  rejects(&WriterModes::mean, right.segment_mean, "a mean a segment for the global one");
  rejects(&WriterModes::segment_mean, right.mean, "the global mean for one a segment");
  rejects(&WriterModes::centered, right.segment_centered, "centered by segment");
  rejects(&WriterModes::mean, right.mean / double(T), "T forgotten");
  rejects(&WriterModes::centered, writer_norm(delta, y), "nothing centered");
  auto feature_mean = [](Plain x) {
    Plain turned{x.D, x.T, std::vector<double>(x.x.size())};
    for (size_t i = 0; i < x.x.size(); ++i) turned.x[i % x.D * x.T + i / x.D] = x.x[i];
    turned = turned.averaged(0, x.D);
    for (size_t i = 0; i < x.x.size(); ++i) x.x[i] = turned.x[i % x.D * x.T + i / x.D];
    return x;
  };
  rejects(&WriterModes::mean, writer_norm(feature_mean(delta), feature_mean(y)),
          "a mean over channels");
  rejects(&WriterModes::amplification,
          std::pow(writer_norm(delta, y), 2) / (delta.squares() * y.squares()),
          "A against all pairs of tokens");
  Plain unit_y = y, unit_delta = delta;  // all magnitudes alike: khat without weights
  for (Plain* x : {&unit_y, &unit_delta})
    for (size_t t = 0; t < T; ++t) {
      double squares = 0;
      for (size_t d = 0; d < x->D; ++d) squares += x->at(t, d) * x->at(t, d);
      for (size_t d = 0; d < x->D; ++d) x->x[t * x->D + d] /= std::sqrt(squares);
    }
  rejects(&WriterModes::coherence, plain_modes(unit_y, unit_delta, tokens.image).coherence,
          "khat without weights");
}

// (31)-(32): |A - 1| <= (T - 1) khat, whatever the magnitudes. Without the weights it is false: of
// twelve tokens two are large and alike, the others orthogonal to all.
TEST(WriterModes, AlignmentStaysUnderItsEnvelope) {
  size_t T = 12, n = 24, D = 12;
  for (double magnitude : {1.0, 10.0, 1000.0}) {
    Writer<double> writer(*devices()[0], {1, 9, 3}, n, D, 0);
    std::vector<double> y(T * n), delta(T * D);
    for (size_t t = 0; t < T; ++t)
      y[t * n + max_<size_t>(t, 1)] = delta[t * D + max_<size_t>(t, 1)] = 1;
    for (size_t t : {0, 1}) y[t * n + 1] = delta[t * D + 1] = magnitude;
    writer.y.set(y), writer.delta.set(delta);
    WriterModes m = writer.modes(*devices()[0])[0];
    double w = magnitude * magnitude;  // the two; the others' is 1
    EXPECT_NEAR(m.amplification - 1, 2 * w * w / (2 * w * w + 10), 1e-12);
    EXPECT_LE(m.amplification - 1, double(T - 1) * m.coherence * (1 + 1e-12));
    double plain = 2 / double(T * (T - 1));  // one pair of 66 has |M_ts| = 1, the others 0
    EXPECT_EQ(m.amplification - 1 <= double(T - 1) * plain + 1e-12, magnitude == 1);
  }
}

template <class T>
void check_energies(Device& device, double tolerance) {
  size_t n = 19, D = 37, batch = 3;
  Tensor x = Tensor::random<T>(device, batch * n * D, 5),
         out = Tensor::of<double>(device, 2 * batch);
  std::vector<double> values = x.get();
  const T* data = x.data<T>();
  matrix_energies(device, out.data<double>(), data, batch, n, D);
  for (size_t b = 0; b < batch; ++b) {
    Plain X{
        n, D, {values.begin() + ptrdiff_t(b * n * D), values.begin() + ptrdiff_t((b + 1) * n * D)}};
    Plain mean = X.averaged(0, n);
    EXPECT_NEAR(out.get()[2 * b], mean.squares(), tolerance * X.squares());
    EXPECT_NEAR(out.get()[2 * b + 1], (X - mean).squares(), tolerance * X.squares());
  }
}
TEST(SplitEnergies, AreThoseOfTheProjections) {
  for (Device* device : devices()) {
    check_energies<double>(*device, 1e-14);
    check_energies<float>(*device, 1e-6);
    check_energies<bf16>(*device, 1e-6);
  }
}

// The reference for mu_eff. M = U diag(s) V with U, V reflections I - 2 u u^T has singular values s.
TEST(Check, SingularValuesOfAKnownMatrix) {
  for (size_t n : {1, 6, 90}) {
    std::vector<double> s(n), m(n * n);
    for (size_t i = 0; i < n; ++i)
      s[i] = i + 2 < n ? 3 * std::pow(0.8, double(i)) : 0, m[i * n + i] = s[i];
    if (n == 1) s[0] = m[0] = 3;
    for (bool left : {true, false}) {
      std::vector<double> u = random_values(n, 60 + left), product(n);
      double squares = 0;
      for (double x : u) squares += x * x;
      for (size_t i = 0; i < n * n; ++i)
        product[left ? i % n : i / n] += u[left ? i / n : i % n] * m[i];
      for (size_t i = 0; i < n * n; ++i)
        m[i] -= 2 / squares * u[left ? i / n : i % n] * product[left ? i % n : i / n];
    }
    EXPECT_LE(relative_difference(singular_values(m, n), s), 1e-14);
    EXPECT_NEAR(spectral_norm(m, n), 3, 1e-13);
    m[0] += 1e-3;
    EXPECT_GT(relative_difference(singular_values(m, n), s), 1e-6) << "the check is blind";
  }
}
