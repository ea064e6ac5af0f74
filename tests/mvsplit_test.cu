// mvsplit_test.cu - tests of mvsplit.cu: the token means, RMSNorm, and the merges.
#include "../mvsplit.cu"

#include "check.h"

// Small, with two segments of different lengths; and one that spans several tiles of channels, with
// more rows than a team has.
struct Shape {
  Tokens tokens;
  size_t D;
};
// From D 512 on other schedules walk; beyond 4096 a GPU's threads cannot keep a row.
const Shape shapes[] = {
    {{2, 5, 3}, 8}, {{2, 37, 11}, 136}, {{1, 6, 0}, 12}, {{1, 21, 3}, 516}, {{1, 3, 2}, 4100}};
const Shape wide_shapes[] = {{{2, 70, 65}, 256}, {{2, 130, 0}, 512},  {{3, 256, 64}, 1024},
                             {{1, 67, 9}, 1028}, {{140, 5, 3}, 1024}, {{1, 1100, 2}, 128}};
// For clusters: several rows a warp; fewer than warps, and no text; more text than image; in fp32
// too long for an H200's backward.
const Shape narrow_shapes[] = {
    {{3, 300, 7}, 128}, {{2, 20, 0}, 128}, {{33, 5, 70}, 128}, {{2, 400, 12}, 128}};

// A merge with random gates, and everything that its backward leaves behind.
struct MergeOp : Op {
  Tensor dZbar, xbar, fbar;
  std::function<void()> replay, backward_in_place;  // the latter leaves dX in the cotangent
};

// Pre-Norm passes more on than X_next. So two merges, the second of which adds F2 to the trunk that
// the first left; the output (2, B, T, D) is both X_next, its cotangent what would come back from
// the branches that read them.
template <class Real>
MergeOp prenorm_op(Device& device, Shape shape) {
  using Acc = AccOf<Real>;
  Tokens tokens = shape.tokens;
  size_t D = shape.D, n = tokens.rows() * D;
  MergeOp op;
  const std::pair<const char*, double> inputs[] = {{"X", 1}, {"F", 0.7}, {"F2", 1.5}};
  for (auto [name, scale] : inputs)
    op.inputs.push_back({name, Tensor::random<Real>(device, n, 1 + op.inputs.size(), scale),
                         Tensor::of<Real>(device, n)});
  Tensor X = op.inputs[0].value, F = op.inputs[1].value, F2 = op.inputs[2].value;
  Tensor dX = op.inputs[0].gradient, dF = op.inputs[1].gradient, dF2 = op.inputs[2].gradient;
  op.output = Tensor::of<Real>(device, 2 * n),
  op.cotangent = Tensor::random<Real>(device, 2 * n, 6);
  Tensor r = Tensor::of<Acc>(device, 2 * tokens.rows()), h = Tensor::of<Acc>(device, tokens.rows());
  Tensor mean = Tensor::of<Acc>(device, 2 * tokens.batch * D);  // not looked at
  op.kept = {r, h, mean};
  Acc *r1 = r.data<Acc>(), *r2 = r1 + tokens.rows(), *m = mean.data<Acc>();
  Real *Y = op.output.data<Real>(), *g = op.cotangent.data<Real>();
  MergeSaved<Acc> first{r1, m, m}, second{r2, m, m, r1};
  MergeScratch<Acc> scratch{h.data<Acc>(), m, m, nullptr};
  Gates<const Real> gates{merge_of<PreNorm>, {}};
  Gates<Acc> none{merge_of<PreNorm>, {}};
  MergeShape sizes{tokens, D, 1e-6};
  Device* d = &device;
  op.forward = [=] {
    merge_forward(*d, Y, first, X.data<Real>(), F.data<Real>(), gates, sizes);
    merge_forward(*d, Y + n, second, Y, F2.data<Real>(), gates, sizes);
  };
  op.backward = [=] {
    Real *G = dX.data<Real>(), *dF_1 = dF.data<Real>(), *dF_2 = dF2.data<Real>();
    d->fill(dF_1, 0, n * sizeof(Real));  // no merge comes after the second
    Beside beside(*d);
    merge_backward(beside, G, dF_2, none, scratch,
                   {g + n, Y + n, Y, F2.data<Real>(), gates, second, dF_1}, sizes, false);
    merge_backward(beside, G, dF_1, none, scratch,
                   {g, Y, X.data<Real>(), F.data<Real>(), gates, first, dF_2}, sizes, false);
  };
  return op;
}

template <class Real>
MergeOp merge_op(Device& device, Merge merge, Shape shape, double eps = 1e-6) {
  if (about(merge).trunk_apart) return prenorm_op<Real>(device, shape);
  using Acc = AccOf<Real>;
  Tokens tokens = shape.tokens;
  size_t D = shape.D, n = tokens.rows() * D, means = 2 * tokens.batch * D;
  MergeOp op;
  Tensor X = Tensor::random<Real>(device, n, 1), F = Tensor::random<Real>(device, n, 2, 0.7);
  // A mean that is not small: the leaky term and the split have something to do.
  std::vector<double> x = X.get();
  for (size_t i = 0; i < n; ++i) x[i] += 0.5 * gaussian(7, streams::check, i % D);
  X.set(x);
  op.inputs = {{"X", X, Tensor::of<Real>(device, n)}, {"F", F, Tensor::of<Real>(device, n)}};
  auto gate = [&](const char* name, size_t size, uint64_t seed) {
    op.inputs.push_back(
        {name, Tensor::random<Real>(device, size, seed, 0.6), Tensor::of<Acc>(device, size)});
    return op.inputs.back();
  };
  Gates<const Real> gates{merge, {}};
  Gates<Acc> dgates{merge, {}};
  for (size_t i = 0; i < about(merge).gates.size(); ++i) {
    Op::Input g = gate(about(merge).gates[i].name, about(merge).one_number ? 1 : D, 3 + i);
    gates.of[i] = g.value.data<Real>(), dgates.of[i] = g.gradient.data<Acc>();
  }
  MergeShape sizes{tokens, D, eps};
  op.output = Tensor::of<Real>(device, n), op.cotangent = Tensor::random<Real>(device, n, 6);
  Tensor r = Tensor::of<Acc>(device, tokens.rows()), h = Tensor::of<Acc>(device, tokens.rows());
  op.xbar = Tensor::of<Acc>(device, means), op.fbar = Tensor::of<Acc>(device, means);
  op.dZbar = Tensor::of<Acc>(device, means);
  Tensor dgate = Tensor::of<Acc>(device, means), Y = op.output, G = op.cotangent;
  MergeSaved<Acc> saved{r.data<Acc>(), op.xbar.data<Acc>(), op.fbar.data<Acc>()};
  Tensor partial = Tensor::of<Acc>(device, 8 * partial_sums(tokens, D));
  MergeScratch<Acc> scratch{h.data<Acc>(), op.dZbar.data<Acc>(), dgate.data<Acc>(),
                            reinterpret_cast<Pair<Quad<Acc>>*>(partial.data<Acc>())};
  op.kept = {r, op.xbar, op.fbar, op.dZbar, dgate, h, partial};
  Device* d = &device;
  Tensor dX = op.inputs[0].gradient, dF = op.inputs[1].gradient;
  auto forward = [=](bool again) {
    merge_forward(*d, Y.data<Real>(), saved, X.data<Real>(), F.data<Real>(), gates, sizes, again);
  };
  auto backward = [=](Tensor to) {
    Beside beside(*d);
    merge_backward(beside, to.data<Real>(), dF.data<Real>(), dgates, scratch,
                   {G.data<Real>(), Y.data<Real>(), X.data<Real>(), F.data<Real>(), gates, saved},
                   sizes, false);
  };
  op.forward = [=] { forward(false); };
  op.backward = [=] { backward(dX); };
  op.replay = [=] { forward(true); };
  op.backward_in_place = [=] { backward(G); };
  return op;
}

const std::vector<Merge> all_merges = [] {
  std::vector<Merge> all;
  Merges::each([&](auto m) { all.push_back(merge_of<decltype(m)>); });
  return all;
}();

// What lacks a member is no merge, and does not compile in the list.
struct WithoutName : MergeBase {
  template <class Acc>
  static Quad<Acc> Z(Gains<Acc>, Joined<Acc>);
  template <class Acc>
  static Pair<Quad<Acc>> gradients(Gains<Acc>, Quad<Acc>, Quad<Acc>);
};
struct Whole : WithoutName {
  static constexpr const char* name = "whole";
};
struct WithoutZ : Whole {
  static void Z();
};
struct WithoutGradients : Whole {
  static void gradients();
};
struct WithoutFactor : Whole {
  static constexpr std::array gates = {Gate{"alpha", "#", 0}};
};
struct FactorOfNoGate : Leaky {
  static constexpr std::array<Gate, 0> gates = {};
};
struct FactorForgotten : WithoutFactor {
  enum { alpha, by_token = alpha };
};
static_assert(is_merge<Whole> && !is_merge<WithoutName> && !is_merge<WithoutZ>);
static_assert(!is_merge<WithoutGradients> && has_factors<Whole>() && has_factors<Leaky>());
static_assert(!has_factors<WithoutFactor>() && !has_factors<FactorOfNoGate>());
static_assert(!has_factors<FactorForgotten>());

TEST(Merge, GradientsAgreeWithDifferences) {
  for (Merge merge : all_merges)
    for (const Shape& shape : shapes) {
      SCOPED_TRACE(testing::Message() << about(merge).name << " D " << shape.D);
      check_gradients([&](Device& d, auto t) { return merge_op<decltype(t)>(d, merge, shape); });
    }
}

TEST(Merge, AgreesOnBothDevices) {
  if (devices().size() < 2) GTEST_SKIP() << "no GPU";
  for (Merge merge : all_merges) {
    std::vector<Shape> all = {shapes[1], shapes[3], shapes[4]};
    all.insert(all.end(), std::begin(narrow_shapes), std::end(narrow_shapes));
    for (const Shape& shape : all) {
      SCOPED_TRACE(testing::Message() << about(merge).name << " D " << shape.D);
      check_devices([&](Device& d, auto t) {
        return merge_op<decltype(t)>(d, merge, shape, 1e-2);  // so large that its lack would show
      });
    }
  }
  for (Merge merge : {merge_of<MvSplit>, merge_of<MvSplitNoLeak>})
    for (const Shape& shape : wide_shapes) {
      SCOPED_TRACE(testing::Message() << about(merge).name << " D " << shape.D);
      check_devices([&](Device& d, auto t) { return merge_op<decltype(t)>(d, merge, shape); });
    }
}

// A replay has the bits of the first time, and dX may take the place of G.
TEST(Merge, AReplayHasTheSameBits) {
  for (Device* device : devices())
    for (Merge merge : all_merges) {
      if (about(merge).trunk_apart) continue;
      for (const Shape& shape : {shapes[1], shapes[3], wide_shapes[3], narrow_shapes[0],
                                 narrow_shapes[2], narrow_shapes[3]}) {
        SCOPED_TRACE(testing::Message() << about(merge).name << " D " << shape.D);
        MergeOp op = merge_op<bf16>(*device, merge, shape);
        op.forward(), op.backward();
        std::vector<double> first = op.output.get();
        auto left = [&] {
          std::vector<std::vector<double>> all;
          if (about(merge).means) all = {op.xbar.get(), op.fbar.get(), op.dZbar.get()};
          for (size_t i = 1; i < op.inputs.size(); ++i) all.push_back(op.inputs[i].gradient.get());
          return all;
        };
        std::vector<std::vector<double>> left_first = left();
        op.output.set(std::vector<double>(first.size()));
        op.replay();
        EXPECT_EQ(op.output.get(), first);
        op.backward_in_place();
        EXPECT_EQ(op.cotangent.get(), op.inputs[0].gradient.get());
        EXPECT_EQ(left(), left_first);
      }
    }
}

// Clusters run where they should: nothing else would show that they do not.
TEST(Merge, NarrowOnesRunInClusters) {
#ifdef __CUDACC__
  if (devices().size() < 2) GTEST_SKIP() << "no GPU";
  Device& device = *devices()[1];
  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  ASSERT_EQ(device.cluster_bytes > 0, properties.clusterLaunch && __CUDA_ARCH_LIST__ >= 900);
  if (device.cluster_bytes == 0) GTEST_SKIP() << "no clusters";
  auto forward = [&](Tokens t, size_t D) { return Cluster<bf16, 2>::fits(device, {t, D, 0}); };
  EXPECT_TRUE(forward({32, 256, 8}, 128));
  EXPECT_FALSE(forward({32, 256, 8}, 136));
  EXPECT_FALSE(forward({32, 500, 13}, 128));
  // 16 warps' and 3 blocks' sums, and 6 rows a warp: 38,912 + 73,728 bytes.
  EXPECT_EQ((Cluster<bf16, 3>::fits(device, {{32, 256, 8}, 128, 0})),
            device.cluster_bytes >= 112640);
#else
  GTEST_SKIP() << "no GPU";
#endif
}

// x + s * factor_d * dZbar of the row's segment; only in rows where keep(segment).
template <class Keep>
std::vector<double> add_mean(const MergeOp& op, const Shape& shape, std::vector<double> x,
                             const std::vector<double>& factor, double s, const Keep& keep) {
  std::vector<double> dZbar = op.dZbar.get();
  for (size_t i = 0; i < x.size(); ++i) {
    size_t segment = shape.tokens.segment_of(i / shape.D), d = i % shape.D;
    if (keep(segment % 2)) x[i] += s * factor[d] * dZbar[segment * shape.D + d];
  }
  return x;
}

TEST(Merge, WrongBackwardsAreRejected) {
  Shape shape = shapes[0];
  MergeOp op = merge_op<double>(*devices()[0], merge_of<MvSplit>, shape);
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
  std::vector<double> dZbar = op.dZbar.get(), xbar = op.xbar.get(), fbar = op.fbar.get();
  std::vector<double> image_only = dalpha;
  for (size_t s = 0; s < 2 * shape.tokens.batch; ++s)
    for (size_t d = 0; d < shape.D; ++d) {
      size_t i = s * shape.D + d;
      double n = double(shape.tokens.count(s % 2));
      dbeta[d] += n * dZbar[i] * fbar[i];
      dalpha[d] += n * dZbar[i] * xbar[i];
      if (s % 2) image_only[d] -= n * dZbar[i] * (fbar[i] - xbar[i]);
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
  for (Merge merge : {merge_of<LayerScale>, merge_of<ReZero>}) {
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

// Pre-Norm: of the gradient r (g - h Y) of the branch and the trunk's, which must stay whole.
TEST(Merge, WrongTrunkGradientsAreRejected) {
  Shape shape = shapes[0];
  MergeOp op = merge_op<double>(*devices()[0], merge_of<PreNorm>, shape);
  op.forward(), op.backward();
  std::vector<double> Y = op.output.get(), g = op.cotangent.get(), r = op.kept[0].get();
  std::vector<double> dX = op.input("X").gradient.get(), trunk = op.input("F2").gradient.get();
  auto projection = [&](const std::vector<double>& v, size_t i) {  // of v's token onto Y's
    double sum = 0;
    for (size_t k = i / shape.D * shape.D, end = k + shape.D; k < end; ++k) sum += v[k] * Y[k];
    return sum / double(shape.D) * Y[i];
  };
  struct {
    const char* what;
    std::function<double(size_t)> gradient;
  } wrong[] = {
      {"the trunk's gradient is missing", [&](size_t i) { return dX[i] - trunk[i]; }},
      {"it is projected", [&](size_t i) { return dX[i] - projection(trunk, i); }},
      {"it is scaled by r", [&](size_t i) { return dX[i] + (r[i / shape.D] - 1) * trunk[i]; }},
      {"its sign", [&](size_t i) { return dX[i] - 2 * trunk[i]; }},
      {"the branch's gradient is missing", [&](size_t i) { return trunk[i]; }},
      {"it is not projected", [&](size_t i) { return dX[i] + r[i / shape.D] * projection(g, i); }},
      {"it is not scaled by r",
       [&](size_t i) { return trunk[i] + (dX[i] - trunk[i]) / r[i / shape.D]; }},
  };
  for (const auto& w : wrong) {
    std::vector<double> gradient(dX.size());
    for (size_t i = 0; i < gradient.size(); ++i) gradient[i] = w.gradient(i);
    for (const char* input : {"X", "F"}) expect_rejected(op, input, gradient, w.what);
  }
  expect_rejected(op, "F2", dX, "the first merge's part is in the second");
}

// Pre-Norm's too: RMSNorm(X + F), RMSNorm(X + F + F2).
TEST(Merge, PreNormAddsToWhatIsNotNormalised) {
  for (Device* device : devices()) {
    Shape shape = shapes[0];
    MergeOp op = merge_op<double>(*device, merge_of<PreNorm>, shape);
    op.forward();
    std::vector<double> trunk = op.input("X").value.get(), want;
    for (const char* branch : {"F", "F2"}) {
      std::vector<double> f = op.input(branch).value.get();
      for (size_t i = 0; i < f.size(); ++i) trunk[i] += f[i];
      for (size_t i = 0; i < f.size(); ++i) {
        double squares = 0;
        for (size_t k = i / shape.D * shape.D, end = k + shape.D; k < end; ++k)
          squares += trunk[k] * trunk[k];
        want.push_back(trunk[i] / std::sqrt(squares / double(shape.D) + 1e-6));
      }
    }
    EXPECT_LE(relative_difference(op.output.get(), want), 1e-14);
  }
}

// The definition, each mean summed anew for each element, against the kernels.
TEST(Merge, ForwardFollowsTheDefinition) {
  for (Device* device : devices())
    for (Merge merge : all_merges) {
      if (about(merge).trunk_apart) continue;  // it has two merges: see above
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
          double fbar = J(f, row, d), xbar = J(x, row, d);
          const std::map<std::string, std::function<double()>> updates = {
              {"postnorm", [&] { return f[i]; }},
              {"layerscale", [&] { return gate("lambda", d) * f[i]; }},
              {"rezero", [&] { return gate("lambda", d) * f[i]; }},
              {"mvsplit",
               [&] { return gate("beta", d) * (f[i] - fbar) + gate("alpha", d) * (fbar - xbar); }},
              {"mvsplit-noleak",
               [&] { return gate("beta", d) * (f[i] - fbar) + gate("alpha", d) * fbar; }},
              {"centered", [&] { return f[i] - fbar; }},
              {"leaky", [&] { return gate("alpha", d) * (f[i] - x[i]); }}};
          z[i] += updates.at(about(merge).name)();
          squares += z[i] * z[i];
        }
        for (size_t d = 0; d < D; ++d) z[row * D + d] /= std::sqrt(squares / double(D) + 1e-6);
      }
      EXPECT_LE(relative_difference(op.output.get(), z), 1e-14) << about(merge).name;
    }
}

// The consequence of (dF): at alpha = 0 the adjoint of the branch has no segment mean.
TEST(Merge, BranchAdjointHasNoMeanAtAlphaZero) {
  for (Device* device : devices()) {
    Shape shape = shapes[1];
    MergeOp op = merge_op<double>(*device, merge_of<MvSplit>, shape);
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
    MergeOp op = merge_op<float>(*device, merge_of<MvSplit>, shapes[0]);
    op.forward(), op.backward();
    std::vector<double> once = op.input("beta").gradient.get();
    Tokens tokens = shapes[0].tokens;
    Tensor h = Tensor::of<float>(*device, tokens.rows()),
           dgate = Tensor::random<float>(*device, 2 * tokens.batch * shapes[0].D, 8);
    MergeScratch<float> scratch{h.data<float>(), op.dZbar.data<float>(), dgate.data<float>(),
                                nullptr};
    MergeSaved<float> saved{nullptr, op.xbar.data<float>(), op.fbar.data<float>()};
    auto run = [&](bool accumulate) {
      Gates<float> d{
          merge_of<MvSplit>,
          {op.input("alpha").gradient.data<float>(), op.input("beta").gradient.data<float>()}};
      gate_gradients<MvSplit, float>(*device, d, saved, scratch, {tokens, shapes[0].D, 1e-6},
                                     accumulate);
      return op.input("beta").gradient.get();
    };
    std::vector<double> sum = run(true), second = run(false);
    for (size_t i = 0; i < sum.size(); ++i) EXPECT_FLOAT_EQ(sum[i], once[i] + second[i]);
  }
}

// RMSNorm of packed rows into strided places, as the input norms use it.
template <class Real>
Op rmsnorm_op(Device& device, size_t batch, size_t n, size_t D) {
  using Acc = AccOf<Real>;
  Op op;
  size_t stride = (n + 3) * D;
  Tensor X = Tensor::random<Real>(device, batch * n * D, 1), r = Tensor::of<Acc>(device, batch * n);
  op.inputs = {{"X", X, Tensor::of<Real>(device, batch * n * D)}};
  op.output = Tensor::random<Real>(device, batch * stride, 2);
  op.cotangent = Tensor::random<Real>(device, batch * stride, 3);
  Tensor Y = op.output, G = op.cotangent, dX = op.inputs[0].gradient;
  Device* d = &device;
  op.forward = [=] {
    rmsnorm_forward(*d, Y.data<Real>(), r.data<Acc>(), X.data<Real>(), {batch, n, D, stride}, 1e-6);
  };
  op.backward = [=] {
    rmsnorm_backward(*d, dX.data<Real>(), G.data<Real>(), X.data<Real>(), r.data<Acc>(),
                     {batch, n, D, stride});
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
  for (Tokens any : {t, Tokens{1, 4, 1}, Tokens{2, 6, 0}, Tokens{2, 9, 8}}) {
    std::vector<int> seen(any.rows());
    for (size_t most : {4, 16}) {
      std::fill(seen.begin(), seen.end(), 0);
      for (size_t i = 0; i < any.pieces(most).rows(); ++i) {
        Piece rows = any.piece(most, i);
        EXPECT_EQ(any.pieces(most).segment_of(i), rows.group);
        for (int k = 0; k < int(most); ++k) {
          EXPECT_EQ(any.segment_of(rows.row(k)), rows.group);
          seen[rows.row(k)] += rows.has(k);
        }
      }
      EXPECT_EQ(seen, std::vector<int>(any.rows(), 1)) << "each row in one piece";
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Measuring

WriterModes plain_modes(const Dense& y, const Dense& delta, size_t image) {
  auto unit = [](const Dense& x, size_t t) {
    Dense row = rows_of(x, t, 1);
    return (1 / norm(row)) * row;
  };
  double cosines = 0;
  for (size_t t = 0; t < image; ++t)
    for (size_t s = 0; s < image; ++s)
      if (s != t)
        cosines += std::abs(inner(unit(y, t), unit(y, s)) * inner(unit(delta, t), unit(delta, s)));
  auto [g_mean, g_ctr, amplification, khat] = plain_writer(y, delta);
  return {g_mean,
          g_ctr,
          amplification,
          khat,
          plain_writer(rows_of(y, 0, image), rows_of(delta, 0, image))[2],
          cosines / double(image * (image - 1))};
}

double worst_difference(const WriterModes& a, const WriterModes& b) {
  double worst = 0;
  for (auto field :
       {&WriterModes::g_mean, &WriterModes::g_ctr, &WriterModes::amplification, &WriterModes::khat,
        &WriterModes::image_amplification, &WriterModes::image_kappa}) {
    double difference = std::abs(a.*field - b.*field) / std::abs(b.*field);
    worst = std::isfinite(difference) ? std::max(worst, difference) : HUGE_VAL;
  }
  return worst;
}

// A writer with tokens that share a direction (`offset` times as long as the rest) and differ in
// magnitude.
template <class Real>
struct Writer {
  Tokens tokens;
  size_t n, D;
  Tensor y, delta;

  Writer(Device& device, Tokens t, size_t in, size_t out, double offset)
      : tokens(t),
        n(in),
        D(out),
        y(Tensor::of<Real>(device, t.rows() * in)),
        delta(Tensor::of<Real>(device, t.rows() * out)) {
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
  Dense plain(const Tensor& x, size_t channels, size_t b) const {
    std::vector<double> all = x.get();
    auto from = all.begin() + ptrdiff_t(b * tokens.length() * channels);
    return {tokens.length(), channels, {from, from + ptrdiff_t(tokens.length() * channels)}};
  }
  std::vector<WriterModes> modes(Device& device) const {
    WriterScratch<AccOf<Real>> scratch;
    Carver count;
    scratch.lay(count, tokens, n, D);
    Slab slab(device, count.used), out(device, tokens.batch * sizeof(WriterModes));
    Carver carver{slab.data};
    scratch.lay(carver, tokens, n, D);
    auto* modes = reinterpret_cast<WriterModes*>(out.data);
    writer_modes(device, modes, scratch, y.data<Real>(), delta.data<Real>(), tokens, n, D);
    std::vector<WriterModes> host(tokens.batch);
    device.download(host.data(), modes, host.size() * sizeof(WriterModes));
    return host;
  }
};

const Tokens some_tokens[] = {{2, 5, 3}, {3, 37, 11}, {1, 6, 0}};

// In bf16 too: the reference starts from the rounded numbers. `size`: of delta; below zero, no
// number of it is positive.
template <class Real>
void check_modes(Device& device, double offset, double tolerance, double size = 1) {
  for (Tokens tokens : some_tokens) {
    Writer<Real> writer(device, tokens, 24, 12, offset);
    std::vector<double> delta = writer.delta.get();
    for (double& x : delta) x = size * (size < 0 ? std::abs(x) : x);
    writer.delta.set(delta);
    std::vector<WriterModes> got = writer.modes(device);
    for (size_t b = 0; b < tokens.batch; ++b) {
      Dense y = writer.plain(writer.y, 24, b), delta = writer.plain(writer.delta, 12, b);
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
    // Behind a collapse: squares of delta are below what fp32 has.
    for (double size : {1e-25, 1e25, -1e-25}) {
      check_modes<float>(*device, 0.5, 1e-5, size);
      check_modes<bf16>(*device, 0.5, 1e-5, size);
    }
    check_modes<float>(*device, 0.5, 1e-3, 1e-40);  // subnormal, with fewer digits
  }
}

// One token that is not zero has no other to agree with: whatever rounding leaves of the others'
// weight.
TEST(WriterModes, OneTokenHasNoPartner) {
  for (Device* device : devices()) {
    Writer<float> writer(*device, {1, 6, 2}, 24, 12, 0.5);
    std::vector<double> delta = writer.delta.get();
    std::fill(delta.begin() + 12, delta.end(), 0.0);
    for (int i = 0; i < 30; ++i) {
      for (double& x : delta) x *= 1.01;
      writer.delta.set(delta);
      WriterModes m = writer.modes(*device)[0];
      EXPECT_NEAR(m.amplification, 1, 1e-6);
      EXPECT_TRUE(std::isnan(m.khat)) << m.khat;
      EXPECT_EQ(m.image_kappa, 0);
    }
  }
}

// The scale is that of the largest number, wherever it stands: a GPU's team has 8192 at once.
TEST(WriterModes, ScalesFindTheLargestNumber) {
  for (Device* device : devices()) {
    Tokens tokens{2, 700, 3};
    size_t n = 24, count = tokens.length() * n;
    Tensor x = Tensor::of<float>(*device, 2 * count), scales = Tensor::of<float>(*device, 2);
    for (size_t at :
         {size_t(0), size_t(1030), size_t(4099), size_t(8191), size_t(8196), count - 1}) {
      std::vector<double> values(2 * count, -1.0);
      values[at] = -1000, values[count + at] = 3;
      x.set(values);
      token_scales(*device, scales.data<float>(), x.data<float>(), tokens, n);
      EXPECT_EQ(scales.get(), (std::vector<double>{512, 2})) << device->name << ", number " << at;
    }
  }
}

// Where no image token has a gradient, nothing is known of how they agree, whatever the text's do.
TEST(WriterModes, ImageTokensWithoutAGradientHaveNoAlignment) {
  for (Device* device : devices()) {
    Writer<float> writer(*device, {1, 6, 2}, 24, 12, 0.5);
    std::vector<double> delta = writer.delta.get();
    std::fill(delta.begin(), delta.begin() + 6 * 12, 0.0);
    writer.delta.set(delta);
    WriterModes m = writer.modes(*device)[0];
    EXPECT_TRUE(std::isnan(m.image_amplification)) << m.image_amplification;
    EXPECT_TRUE(std::isnan(m.image_kappa)) << m.image_kappa;
    EXPECT_GT(m.amplification, 0);
    EXPECT_GT(m.khat, 0);
  }
}

TEST(WriterModes, WrongDefinitionsAreRejected) {
  Device& device = *devices()[0];
  Tokens tokens{1, 37, 11};
  Writer<double> writer(device, tokens, 24, 12, 0.5);
  WriterModes got = writer.modes(device)[0];
  Dense y = writer.plain(writer.y, 24, 0), delta = writer.plain(writer.delta, 12, 0);
  WriterModes right = plain_modes(y, delta, tokens.image);
  ASSERT_LE(worst_difference(got, right), 1e-12);
  auto rejects = [&](double WriterModes::*field, double wrong, const char* what) {
    WriterModes changed = right;
    changed.*field = wrong;
    EXPECT_GT(worst_difference(got, changed), 1e-3) << what;
  };
  size_t T = y.rows;
  Dense by_segment = mean_over({tokens.image, tokens.text});
  rejects(&WriterModes::g_mean, writer_norm(by_segment * delta, by_segment * y),
          "a mean a segment for the global one");
  rejects(&WriterModes::g_ctr, writer_norm(delta - by_segment * delta, y - by_segment * y),
          "centered by segment");
  rejects(&WriterModes::image_amplification, right.amplification, "text tokens as well");
  rejects(&WriterModes::g_mean, right.g_mean / double(T), "T forgotten");
  rejects(&WriterModes::g_ctr, writer_norm(delta, y), "nothing centered");
  auto feature_mean = [](const Dense& x) { return x * mean_over({x.cols}); };
  rejects(&WriterModes::g_mean, writer_norm(feature_mean(delta), feature_mean(y)),
          "a mean over channels");
  rejects(&WriterModes::amplification,
          std::pow(writer_norm(delta, y), 2) / (inner(delta, delta) * inner(y, y)),
          "A against all pairs of tokens");
  Dense unit_y = y, unit_delta = delta;  // all magnitudes alike: khat without weights
  for (Dense* x : {&unit_y, &unit_delta})
    for (size_t t = 0; t < T; ++t) {
      double length = norm(rows_of(*x, t, 1));
      for (size_t d = 0; d < x->cols; ++d) (*x)(t, d) /= length;
    }
  rejects(&WriterModes::khat, plain_modes(unit_y, unit_delta, tokens.image).khat,
          "khat without weights");
  rejects(&WriterModes::image_kappa,
          plain_modes(rows_of(y, 0, tokens.image), rows_of(delta, 0, tokens.image), 2).khat,
          "kappa with weights");
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
    EXPECT_LE(m.amplification - 1, double(T - 1) * m.khat * (1 + 1e-12));
    double plain = 2 / double(T * (T - 1));  // one pair of 66 has |M_ts| = 1, the others 0
    EXPECT_EQ(m.amplification - 1 <= double(T - 1) * plain + 1e-12, magnitude == 1);
  }
}

template <class Real>
void check_energies(Device& device, double tolerance) {
  size_t n = 19, D = 37, batch = 3;
  Tensor x = Tensor::random<Real>(device, batch * n * D, 5),
         out = Tensor::of<double>(device, 2 * batch);
  std::vector<double> values = x.get();
  const Real* data = x.data<Real>();
  matrix_energies(device, out.data<double>(), data, batch, n, D);
  for (size_t b = 0; b < batch; ++b) {
    Dense X{
        n, D, {values.begin() + ptrdiff_t(b * n * D), values.begin() + ptrdiff_t((b + 1) * n * D)}};
    Dense mean = mean_over({n}) * X;
    EXPECT_NEAR(out.get()[2 * b], inner(mean, mean), tolerance * inner(X, X));
    EXPECT_NEAR(out.get()[2 * b + 1], inner(X - mean, X - mean), tolerance * inner(X, X));
  }
}
TEST(SplitEnergies, AreThoseOfTheProjections) {
  for (Device* device : devices()) {
    check_energies<double>(*device, 1e-14);
    check_energies<float>(*device, 1e-6);
    check_energies<bf16>(*device, 1e-6);
  }
}

// The reference for mu_eff. M = U diag(s) V with U, V reflections I - 2 u u^T has the values s.
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

// ---------------------------------------------------------------------------------------------
// The paper's statements about merges
//
// (n) is the paper's number. Each statement is checked on what the kernels return, and the same
// check must reject each mutation beside it.

// One merge of one sequence, forward and backward, as matrices (T, D). Z = X_next / r undoes the
// RMSNorm, which (7) and (9) do not speak of; Delta = dL/dZ = r G - q Z.
struct Merged {
  Dense X_next, Z, Delta, dX, dF;
};
struct MergeGains {
  Merge merge;
  std::vector<double> alpha, beta, lambda;
};

Merged merged(Device& device, Tokens tokens, const MergeGains& gains, const Dense& X,
              const Dense& F, const Dense& G) {
  auto tensor = [&](const std::vector<double>& values) {
    Tensor t = Tensor::of<double>(device, values.size());
    if (!values.empty()) t.set(values);  // a gate that this merge does not have
    return t;
  };
  size_t T = X.rows, D = X.cols;
  std::vector<double> row(T), mean(2 * D), array(T * D);
  Tensor x = tensor(X.v), f = tensor(F.v), g = tensor(G.v), y = tensor(array), dx = tensor(array),
         df = tensor(array), alpha = tensor(gains.alpha), beta = tensor(gains.beta),
         lambda = tensor(gains.lambda), da = tensor(mean), db = tensor(mean), dl = tensor(mean),
         r = tensor(row), h = tensor(row), xbar = tensor(mean), fbar = tensor(mean),
         dZbar = tensor(mean), dgate = tensor(mean);
  auto at = [](const Tensor& t) { return t.data<double>(); };
  Gates<const double> gates{gains.merge, {}};
  Gates<double> dgates{gains.merge, {}};
  for (size_t i = 0; i < about(gains.merge).gates.size(); ++i) {
    std::string name = about(gains.merge).gates[i].name;
    gates.of[i] = at(name == "alpha" ? alpha : name == "beta" ? beta : lambda);
    dgates.of[i] = at(name == "alpha" ? da : name == "beta" ? db : dl);
  }
  MergeSaved<double> saved{at(r), at(xbar), at(fbar)};
  MergeShape shape{tokens, D, 1e-6};
  merge_forward(device, at(y), saved, at(x), at(f), gates, shape);
  Beside beside(device);
  Tensor partial = tensor(std::vector<double>(8 * partial_sums(tokens, D)));
  MergeScratch<double> scratch{at(h), at(dZbar), at(dgate),
                               reinterpret_cast<Pair<Quad<double>>*>(at(partial))};
  merge_backward(beside, at(dx), at(df), dgates, scratch,
                 {at(g), at(y), at(x), at(f), gates, saved}, shape, false);
  Merged m{{T, D, y.get()}, {T, D}, {T, D}, {T, D, dx.get()}, {T, D, df.get()}};
  std::vector<double> rs = r.get(), hs = h.get();
  for (size_t i = 0; i < T * D; ++i) {
    m.Z.v[i] = m.X_next.v[i] / rs[i / D];
    m.Delta.v[i] = rs[i / D] * (G.v[i] - hs[i / D] * m.X_next.v[i]);
  }
  return m;
}

const Tokens one_segment{1, 12, 0}, two_segments{1, 9, 3};
std::vector<size_t> groups(Tokens t) {
  return t.text ? std::vector<size_t>{t.image, t.text} : std::vector<size_t>{t.image};
}
std::vector<double> gain(uint64_t seed, size_t D, double scale = 0.3) {
  return random_values(D, seed, scale);
}
std::vector<double> minus(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> c = a;
  for (size_t i = 0; i < c.size(); ++i) c[i] -= b[i];
  return c;
}

// J (mean = 1) or P (mean = 0) as the merge applies it: with X = 0 and F = I, (7) without the leaky
// term is Z = J for alpha = 1, beta = 0 and Z = P for alpha = 0, beta = 1.
Dense projector(Device& device, Tokens tokens, double mean) {
  size_t T = tokens.length();
  MergeGains gains{
      merge_of<MvSplitNoLeak>, std::vector<double>(T, mean), std::vector<double>(T, 1 - mean), {}};
  return merged(device, tokens, gains, Dense(T, T), identity(T), Dense(T, T)).Z;
}

TEST(Statement, Eq3_SplitAndProjectors) {
  for (Device* device : devices())
    for (Tokens tokens : {one_segment, two_segments}) {
      size_t T = tokens.length();
      Dense one(T, 1, std::vector<double>(T, 1.0)), I = identity(T);
      Dense J = projector(*device, tokens, 1), P = projector(*device, tokens, 0);
      // J + P = I, JJ = J = J^T, PP = P, JP = 0, J1 = 1, and J is the mean over these tokens.
      auto residual = [&](const Dense& j, const Dense& p) {
        return (norm(j + p - I) + norm(j * j - j) + norm(j - transpose(j)) + norm(p * p - p) +
                norm(j * p) + norm(j * one - one) + norm(j - mean_over(groups(tokens)))) /
               double(T);
      };
      Dense weights = random_dense(1, T, 31), oblique = 1 / (weights * one)(0, 0) * (one * weights);
      double n = double(tokens.image);
      expect_statement(
          *device, tokens.text ? "(3) two segments" : "(3) one segment", residual(J, P),
          {{"P without centering", residual(J, I)},
           {"divided by n - 1", residual(n / (n - 1) * J, I - n / (n - 1) * J)},
           {"a weighted mean", residual(oblique, I - oblique)},
           {"J and P exchanged", residual(P, J)},
           {"another segmentation", residual(mean_over({5, 7}), I - mean_over({5, 7}))}});
    }
}

TEST(Statement, Eq43_45_SegmentAlgebra) {
  for (Device* device : devices()) {
    size_t T = two_segments.length();
    Dense J = projector(*device, one_segment, 1), I = identity(T);
    Dense J_seg = projector(*device, two_segments, 1), P_seg = projector(*device, two_segments, 0);
    // J J_seg = J_seg J = J, J P_seg = P_seg J = 0, and all of them symmetric.
    auto residual = [&](const Dense& j, const Dense& js, const Dense& ps) {
      return norm(j * js - j) + norm(js * j - j) + norm(j * ps) + norm(ps * j) + norm(js + ps - I) +
             norm(j - transpose(j)) + norm(js - transpose(js));
    };
    Dense image_only = J_seg, overlapping = J_seg, unweighted = J;
    for (size_t i = 0; i < T; ++i)
      for (size_t j = 0; j < T; ++j) {
        if (i >= 9) image_only(i, j) = 0;
        if (i == 8) overlapping(i, j) = J(i, j);
        unweighted(i, j) = j < 9 ? 0.5 / 9 : 0.5 / 3;
      }
    expect_statement(*device, "(43)-(45)", residual(J, J_seg, P_seg),
                     {{"text tokens in no segment", residual(J, image_only, I - image_only)},
                      {"a token in both segments", residual(J, overlapping, I - overlapping)},
                      {"the mean of the two means", residual(unweighted, J_seg, P_seg)},
                      {"J in the segments' place for P", residual(J, J_seg, I - J)}});
    // But not the other way round: what is centered globally has segment means.
    EXPECT_GT(norm(J_seg * (I - J)), 0.9);
  }
}

TEST(Statement, Eq7_10_OneMerge) {
  for (Device* device : devices())
    for (Tokens tokens : {one_segment, two_segments}) {
      size_t T = tokens.length(), D = 8;
      Dense X = random_dense(T, D, 1), F = random_dense(T, D, 2), G = random_dense(T, D, 3);
      MergeGains gains{merge_of<MvSplit>, gain(4, D), gain(5, D), {}};
      Merged m = merged(*device, tokens, gains, X, F, G);
      std::vector<double> one(D, 1.0);
      Dense I = identity(T), J = mean_over({T}), J_seg = mean_over(groups(tokens));
      Dense P_seg = I - J_seg;
      // The mean of Z is (1 - alpha) that of X plus alpha that of F; what is left is X + beta F.
      auto integrator = [&](const Dense& j, const std::vector<double>& keep,
                            const std::vector<double>& in) {
        return difference(j * m.Z, j * X * diagonal(keep) + j * F * diagonal(in));
      };
      auto stream = [&](const Dense& p) {
        return difference(p * m.Z, p * X + p * F * diagonal(gains.beta));
      };
      // The branch's adjoint: alpha times the mean of Delta, beta times what is left.
      auto adjoint = [&](const Dense& p, const std::vector<double>& a) {
        return difference(m.dF,
                          (I - p) * m.Delta * diagonal(a) + p * m.Delta * diagonal(gains.beta));
      };
      std::vector<double> keep = minus(one, gains.alpha);
      std::string which = tokens.text ? ", two segments" : ", one segment";
      for (const Dense& j : {J_seg, J})
        expect_statement(*device, "(9) mean" + which, integrator(j, keep, gains.alpha),
                         {{"no leak", integrator(j, one, gains.alpha)},
                          {"beta for alpha", integrator(j, minus(one, gains.beta), gains.beta)}});
      std::vector<Mutation> centered = {{"the mean's equation", stream(J_seg)}},
                            back = {{"one gain for both", adjoint(P_seg, gains.beta)}};
      if (tokens.text) {
        // The difference of the two segment means leaks too, though globally it counts as centered.
        centered.push_back({"centered by the global mean", stream(I - J)});
        back.push_back({"centered by the global mean", adjoint(I - J, gains.alpha)});
      }
      expect_statement(*device, "(9) centered" + which, stream(P_seg), centered);
      expect_statement(*device, "(10)" + which, adjoint(P_seg, gains.alpha), back);
    }
}

// Over depth, with F = 0: each Z is the next X, so that the RMSNorm stays out.
TEST(Statement, Eq7_10_LeakyIntegratorOverDepth) {
  for (Device* device : devices())
    for (Tokens tokens : {one_segment, two_segments}) {
      size_t T = tokens.length(), D = 8, depth = 30;
      Dense X0 = random_dense(T, D, 1), zero(T, D), I = identity(T);
      for (size_t i = 0; i < X0.v.size(); ++i) X0.v[i] += 1;  // a mean to lose
      std::vector<double> product(D, 1.0), but_one = product, grown = product;
      Dense leaky = X0, kept = X0;
      for (size_t l = 0; l < depth; ++l) {
        std::vector<double> alpha = gain(10 + l, D, 0.1);
        for (size_t d = 0; d < D; ++d) {
          alpha[d] = std::abs(alpha[d]);
          product[d] *= 1 - alpha[d], grown[d] *= 1 + alpha[d];
          if (l) but_one[d] *= 1 - alpha[d];
        }
        leaky =
            merged(*device, tokens, {merge_of<MvSplit>, alpha, gain(5, D), {}}, leaky, zero, zero)
                .Z;
        kept = merged(*device, tokens, {merge_of<MvSplitNoLeak>, alpha, gain(5, D), {}}, kept, zero,
                      zero)
                   .Z;
      }
      Dense J_seg = mean_over(groups(tokens)), J = mean_over({T}), P_seg = I - J_seg;
      auto residual = [&](const Dense& Z, const Dense& j, const std::vector<double>& decay) {
        return difference(j * Z, j * X0 * diagonal(decay)) + difference(P_seg * Z, P_seg * X0);
      };
      for (const Dense& j : {J_seg, J})
        expect_statement(*device, tokens.text ? "prod(1 - alpha), two segments" : "prod(1 - alpha)",
                         residual(leaky, j, product),
                         {{"no leaky term", residual(kept, j, product)},
                          {"one merge fewer", residual(leaky, j, but_one)},
                          {"1 + alpha", residual(leaky, j, grown)},
                          {"no decay", residual(leaky, j, std::vector<double>(D, 1.0))}});
      // What the RMSNorm does: with one alpha for all channels it gives a state that is nothing but
      // mean its length back at once (up to eps). The leak is a claim about the mean against the
      // rest, not about the size of X_next.
      Dense mean = J * X0;
      double rms = norm(mean) / std::sqrt(double(T * D));
      MergeGains gains{merge_of<MvSplit>, std::vector<double>(D, 0.25), gain(5, D), {}};
      Merged m = merged(*device, tokens, gains, 1 / rms * mean, zero, zero);
      expect_statement(*device, "RMSNorm restores a pure mean",
                       difference(m.X_next, 1 / rms * mean),
                       {{"Z is not restored", difference(m.Z, 1 / rms * mean)}}, 1e-5);
    }
}

// RMSNorm(a X + F) = RMSNorm(X + F / a), so both have one dF, and dX is a times smaller by X.
TEST(Merge, ReZeroAtOneOverAIsDeepNorm) {
  for (Device* device : devices()) {
    size_t T = two_segments.length(), D = 8;
    double a = std::pow(2 * 1000, 0.25);
    Dense X = random_dense(T, D, 1), F = random_dense(T, D, 2), G = random_dense(T, D, 3);
    Merged deep = merged(*device, two_segments, {merge_of<PostNorm>, {}, {}, {}}, a * X, F, G);
    auto residual = [&](double lambda) {
      Merged m = merged(*device, two_segments, {merge_of<ReZero>, {}, {}, {lambda}}, X, F, G);
      return difference(m.X_next, deep.X_next) + difference(m.dF, deep.dF) +
             difference(m.dX, a * deep.dX);
    };
    EXPECT_LE(residual(1 / a), 1e-5) << "up to eps";
    EXPECT_GT(residual(1.001 / a), 1e-4) << "another lambda";
  }
}

// (40): the update Z - X of LayerScale is lambda * F for some lambda. How far an update is from the
// nearest such, by channel.
double distance_from_layerscale(const Dense& update, const Dense& F) {
  double left = 0;
  for (size_t d = 0; d < F.cols; ++d) {
    double uu = 0, uf = 0, ff = 0;
    for (size_t i = 0; i < F.rows; ++i)
      uu += update(i, d) * update(i, d), uf += update(i, d) * F(i, d), ff += F(i, d) * F(i, d);
    left += std::max(uu - uf * uf / ff, 0.0);  // at lambda = uf / ff
  }
  return std::sqrt(left) / norm(update);
}

TEST(Statement, Eq40_42_LayerScaleIsNotASplit) {
  for (Device* device : devices()) {
    Tokens tokens = two_segments;
    size_t T = tokens.length(), D = 8;
    Dense X = random_dense(T, D, 1), F = random_dense(T, D, 2), G = random_dense(T, D, 3);
    Dense y = random_dense(T, 6, 6), J = mean_over(groups(tokens)), P = identity(T) - J;
    for (size_t i = 0; i < T * D; ++i) F.v[i] += 0.7;
    std::vector<double> alpha = gain(4, D), beta = gain(5, D), zero(D);
    auto update = [&](const MergeGains& gains) {
      return merged(*device, tokens, gains, X, F, G).Z - X;
    };
    auto distance = [&](const MergeGains& g) { return distance_from_layerscale(update(g), F); };
    // Rounding of a difference of squares: the root of 1e-16.
    expect_statement(*device, "(40) LayerScale", distance({merge_of<LayerScale>, {}, {}, beta}),
                     {{"MV-Split", distance({merge_of<MvSplit>, alpha, beta, {}})},
                      {"alpha = 0", distance({merge_of<MvSplit>, zero, beta, {}})},
                      {"beta = 0", distance({merge_of<MvSplit>, alpha, zero, {}})},
                      {"alpha = beta, which leaks", distance({merge_of<MvSplit>, beta, beta, {}})},
                      {"no leak", distance({merge_of<MvSplitNoLeak>, alpha, beta, {}})}},
                     1e-7);
    // The two cases in which they agree after all.
    EXPECT_LE(distance({merge_of<MvSplitNoLeak>, beta, beta, {}}), 1e-7);
    EXPECT_LE(norm(update({merge_of<MvSplit>, zero, zero, {}})), 1e-14);  // Z = X, up to rounding

    // (41), (42): gains of the update's and of the writer gradient's two parts. Rows of dW are the
    // channels of dF: dW_mu = diag(mean gain) (J Delta)^T J y, dW_c = diag(rest) (P Delta)^T P y.
    auto gains_are = [&](const MergeGains& g, const std::vector<double>& mean,
                         const std::vector<double>& rest) {
      Merged m = merged(*device, tokens, g, X, F, G);
      Dense into_mean = g.merge == merge_of<MvSplit> ? F - X : F;
      return difference(J * (m.Z - X), J * into_mean * diagonal(mean)) +
             difference(P * (m.Z - X), P * F * diagonal(rest)) +
             difference(transpose(J * m.dF) * (J * y),
                        diagonal(mean) * transpose(J * m.Delta) * (J * y)) +
             difference(transpose(P * m.dF) * (P * y),
                        diagonal(rest) * transpose(P * m.Delta) * (P * y));
    };
    MergeGains split{merge_of<MvSplit>, alpha, beta, {}}, scale{merge_of<LayerScale>, {}, {}, beta};
    expect_statement(*device, "(41) LayerScale's gains", gains_are(scale, beta, beta),
                     {{"of a split", gains_are(split, beta, beta)},
                      {"two gains", gains_are(scale, alpha, beta)}});
    expect_statement(*device, "(42) MV-Split's gains", gains_are(split, alpha, beta),
                     {{"of LayerScale", gains_are(scale, alpha, beta)},
                      {"exchanged", gains_are(split, beta, alpha)}});
  }
}

// (50)-(54) written with matrices, against differences and against the kernels. J is that of both
// segments of both sequences; the other arguments are 1 in the paper.
struct ClosedForm {
  std::vector<double> dX, dF, dalpha, dbeta;
};
ClosedForm closed_form(const MergeOp& op, const Dense& J, double q_factor, double leak,
                       double cross) {
  size_t D = op.input("alpha").value.count(), n = J.rows;
  Dense X(n, D, op.input("X").value.get()), F(n, D, op.input("F").value.get());
  Dense G(n, D, op.cotangent.get()), I = identity(n);
  std::vector<double> a = op.input("alpha").value.get(), b = op.input("beta").value.get();
  Dense PF = (I - J) * F, into_mean = J * (F - X),
        Z = X + PF * diagonal(b) + into_mean * diagonal(a);
  Dense Delta = G;
  for (size_t i = 0; i < n; ++i) {
    Dense z = rows_of(Z, i, 1), g = rows_of(G, i, 1);
    double r = 1 / std::sqrt(inner(z, z) / double(D) + 1e-6);
    for (size_t d = 0; d < D; ++d)
      Delta(i, d) = r * g(0, d) - q_factor * r * r * r / double(D) * inner(g, z) * z(0, d);
  }
  Dense Dbar = J * Delta;
  ClosedForm c{(Delta - leak * (Dbar * diagonal(a))).v,
               (Delta * diagonal(b) + cross * (Dbar * diagonal(minus(a, b)))).v,
               std::vector<double>(D), std::vector<double>(D)};
  for (size_t i = 0; i < n * D; ++i) {
    c.dalpha[i % D] += Delta.v[i] * into_mean.v[i];
    c.dbeta[i % D] += Delta.v[i] * PF.v[i];
  }
  return c;
}

TEST(Statement, Eq50_54_ClosedFormBackward) {
  for (Device* device : devices()) {
    MergeOp op = merge_op<double>(*device, merge_of<MvSplit>, shapes[0]);
    op.forward(), op.backward();
    Dense segments = mean_over({5, 3, 5, 3}), sequences = mean_over({8, 8});
    auto parts = [&](const ClosedForm& c) {
      return std::vector<std::pair<const char*, std::vector<double>>>{
          {"X", c.dX}, {"F", c.dF}, {"alpha", c.dalpha}, {"beta", c.dbeta}};
    };
    auto kernels = [&](const ClosedForm& c) {
      double largest = 0;
      for (const auto& part : parts(c))
        largest = std::max(largest,
                           relative_difference(op.input(part.first).gradient.get(), part.second));
      return largest;
    };
    auto differences = [&](const ClosedForm& c) {
      double largest = 0;
      for (const auto& part : parts(c))
        largest = std::max(largest, directional_error(op, op.input(part.first), part.second));
      return largest;
    };
    ClosedForm right = closed_form(op, segments, 1, 1, 1);
    const std::pair<const char*, ClosedForm> wrong[] = {
        {"one mean over both segments", closed_form(op, sequences, 1, 1, 1)},
        {"no projection: r G alone", closed_form(op, segments, 0, 1, 1)},
        {"no leaky term in dX", closed_form(op, segments, 1, 0, 1)},
        {"no (alpha - beta) Dbar in dF", closed_form(op, segments, 1, 1, 0)}};
    std::vector<Mutation> from_kernels, from_differences;
    for (const auto& w : wrong) {
      from_kernels.push_back({w.first, kernels(w.second)});
      from_differences.push_back({w.first, differences(w.second)});
    }
    expect_statement(*device, "(50)-(54) kernels", kernels(right), from_kernels);
    expect_statement(*device, "(50)-(54) differences", differences(right), from_differences,
                     gradient_tolerance);
  }
}
