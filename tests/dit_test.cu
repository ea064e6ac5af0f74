// dit_test.cu - tests of dit.cu: each operation's backward, the network against an outside oracle,
// and what checkpointing must not change.
#include "../dit.cu"

#include "../data/safetensors.h"
#include "check.h"

#include <sstream>

// ---------------------------------------------------------------------------------------------
// Operations

template <class Real>
Op linear_op(Device& device, size_t rows, size_t out, size_t in) {
  using Acc = AccOf<Real>;
  Op op;
  Device* d = &device;
  Tensor X = Tensor::random<Real>(device, rows * in, 1),
         W = Tensor::random<Real>(device, out * in, 2);
  Tensor bias = Tensor::random<Real>(device, out, 3);
  op.inputs = {{"X", X, Tensor::of<Real>(device, X.count())},
               {"W", W, Tensor::of<Acc>(device, W.count())},
               {"bias", bias, Tensor::of<Acc>(device, out)}};
  Tensor Y = op.output = Tensor::of<Real>(device, rows * out);
  Tensor G = op.cotangent = Tensor::random<Real>(device, rows * out, 4);
  Tensor dX = op.inputs[0].gradient, dW = op.inputs[1].gradient, db = op.inputs[2].gradient;
  op.forward = [=] {
    linear_forward(*d, Y.data<Real>(), X.data<Real>(), W.data<Real>(), rows, out, in);
    bias_forward(*d, Y.data<Real>(), bias.data<Real>(), rows, out);
  };
  op.backward = [=] {
    linear_backward_input(*d, dX.data<Real>(), G.data<Real>(), W.data<Real>(), rows, out, in);
    linear_backward_weight(*d, dW.data<Acc>(), G.data<Real>(), X.data<Real>(), rows, out, in,
                           false);
    bias_backward(*d, db.data<Acc>(), G.data<Real>(), rows, out, false);
  };
  return op;
}

TEST(Linear, GradientsAgreeWithDifferences) {
  for (size_t n : {3, 19})
    check_gradients([&](Device& d, auto t) { return linear_op<decltype(t)>(d, 7, n, 5); });
}
TEST(Linear, AgreesOnBothDevices) {
  check_devices([](Device& d, auto t) { return linear_op<decltype(t)>(d, 300, 40, 24); });
}
TEST(Linear, WrongBackwardsAreRejected) {
  size_t rows = 7, n = 6;  // square, so that a transposed W fits
  Op op = linear_op<double>(*devices()[0], rows, n, n);
  op.forward(), op.backward();
  Device& device = *devices()[0];
  Tensor wrong = Tensor::of<double>(device, rows * n);
  double *G = op.cotangent.data<double>(), *W = op.input("W").value.data<double>();
  double* X = op.input("X").value.data<double>();
  linear_forward(device, wrong.data<double>(), G, W, rows, n, n);
  expect_rejected(op, "X", wrong.get(), "W^T for W");
  Tensor dW = Tensor::of<double>(device, n * n), db = Tensor::of<double>(device, n);
  linear_backward_weight(device, dW.data<double>(), G, X, rows - 1, n, n, false);
  expect_rejected(op, "W", dW.get(), "the last token is missing");
  linear_backward_weight(device, dW.data<double>(), X, G, rows, n, n, false);
  expect_rejected(op, "W", dW.get(), "transposed");
  bias_backward(device, db.data<double>(), G, rows - 1, n, false);
  expect_rejected(op, "bias", db.get(), "the last token is missing");
}

template <class Real>
Op swiglu_op(Device& device, size_t rows, size_t ffn) {
  Op op;
  Device* d = &device;
  Tensor u = Tensor::random<Real>(device, rows * 2 * ffn, 1, 1.5);
  op.inputs = {{"u", u, Tensor::of<Real>(device, u.count())}};
  Tensor h = op.output = Tensor::of<Real>(device, rows * ffn);
  Tensor G = op.cotangent = Tensor::random<Real>(device, rows * ffn, 2), du = op.inputs[0].gradient;
  op.forward = [=] { swiglu_forward(*d, h.data<Real>(), u.data<Real>(), rows, ffn); };
  op.backward = [=] {
    swiglu_backward(*d, du.data<Real>(), G.data<Real>(), u.data<Real>(), rows, ffn);
  };
  return op;
}

TEST(SwiGlu, GradientsAgreeWithDifferences) {
  check_gradients([](Device& d, auto t) { return swiglu_op<decltype(t)>(d, 5, 12); });
}
TEST(SwiGlu, AgreesOnBothDevices) {
  check_devices([](Device& d, auto t) { return swiglu_op<decltype(t)>(d, 50, 64); });
}
TEST(SwiGlu, WrongBackwardsAreRejected) {
  size_t rows = 5, ffn = 8;
  Op op = swiglu_op<double>(*devices()[0], rows, ffn);
  op.forward(), op.backward();
  std::vector<double> u = op.inputs[0].value.get(), G = op.cotangent.get();
  std::vector<double> no_slope = op.inputs[0].gradient.get(), exchanged = no_slope;
  for (size_t i = 0; i < rows * ffn; ++i) {
    size_t g = i / ffn * 2 * ffn + i % ffn, v = g + ffn;
    no_slope[g] = G[i] * u[v] * sigmoid(u[g]);  // silu' without g s (1 - s)
    std::swap(exchanged[g], exchanged[v]);
  }
  expect_rejected(op, "u", no_slope, "the sigmoid's own slope is dropped");
  expect_rejected(op, "u", exchanged, "gate and value exchanged");
}

// RoPE and QK-norm in place; V passes through. qkv is (B, T, 3, H, hd).
template <class Real>
Op rope_op(Device& device, Heads heads, size_t grid_rows, size_t grid_columns, double turn = 1) {
  using Acc = AccOf<Real>;
  Op op;
  Device* d = &device;
  size_t n = heads.batch * heads.length * 3 * heads.width();
  Tensor x = Tensor::random<Real>(device, n, 1), r = Tensor::of<Acc>(device, n / 3 / heads.dim * 2);
  std::vector<Acc> c, s;
  rope_table(c, s, grid_rows, grid_columns, heads.dim);
  Tensor cosine = Tensor::of<Acc>(device, c.size()), sine = Tensor::of<Acc>(device, s.size());
  cosine.set({c.begin(), c.end()}), sine.set({s.begin(), s.end()});
  Tensor backward_sine = Tensor::of<Acc>(device, s.size());
  for (Acc& v : s) v *= Acc(turn);
  backward_sine.set({s.begin(), s.end()});
  op.inputs = {{"qkv", x, Tensor::of<Real>(device, n)}};
  Tensor y = op.output = Tensor::of<Real>(device, n), dx = op.inputs[0].gradient;
  Tensor G = op.cotangent = Tensor::random<Real>(device, n, 2);
  op.kept = {cosine, sine, r, backward_sine};
  Rope<Acc> rope{cosine.data<Acc>(), sine.data<Acc>(), grid_rows * grid_columns};
  Rope<Acc> back{cosine.data<Acc>(), backward_sine.data<Acc>(), grid_rows * grid_columns};
  op.forward = [=] {
    d->copy(y.data<Real>(), x.data<Real>(), n * sizeof(Real));
    rope_qk_norm_forward(*d, y.data<Real>(), r.data<Acc>(), rope, heads);
  };
  op.backward = [=] {
    d->copy(dx.data<Real>(), G.data<Real>(), n * sizeof(Real));
    rope_qk_norm_backward(*d, dx.data<Real>(), y.data<Real>(), r.data<Acc>(), back, heads);
  };
  return op;
}
const Heads some_heads{2, 9, 3, 8};  // 2 x 3 image tokens and 3 text tokens

TEST(RopeQkNorm, GradientsAgreeWithDifferences) {
  for (size_t dim : {4, 8, 12})
    check_gradients([=](Device& d, auto t) {
      return rope_op<decltype(t)>(d, Heads{2, 9, 3, dim}, 2, 3);
    });
}
TEST(RopeQkNorm, AgreesOnBothDevices) {
  check_devices([](Device& d, auto t) {
    return rope_op<decltype(t)>(d, Heads{2, 70, 2, 68}, 8, 8);  // more pairs than a warp has lanes
  });
  // Four channels a thread: part of a warp, a warp, and more channels than it has at once.
  for (Heads heads : {Heads{2, 70, 3, 64}, Heads{2, 70, 5, 128}, Heads{1, 70, 1, 320}})
    check_devices([&](Device& d, auto t) { return rope_op<decltype(t)>(d, heads, 8, 8); });
}
TEST(RopeQkNorm, WrongBackwardsAreRejected) {
  Device& device = *devices()[0];
  Op op = rope_op<double>(device, some_heads, 2, 3);
  op.forward(), op.backward();
  Op turned = rope_op<double>(device, some_heads, 2, 3, -1);
  turned.forward(), turned.backward();
  expect_rejected(op, "qkv", turned.inputs[0].gradient.get(), "R for R^T");
  Op unturned = rope_op<double>(device, some_heads, 2, 3, 0);
  unturned.forward(), unturned.backward();
  expect_rejected(op, "qkv", unturned.inputs[0].gradient.get(), "not turned back");
  Op flat = rope_op<double>(device, some_heads, 2, 3);
  flat.forward();
  flat.output.set(std::vector<double>(flat.output.count(), 0.0));  // <g, y> = 0: no projection
  flat.backward();
  expect_rejected(op, "qkv", flat.inputs[0].gradient.get(), "the norm's projection is dropped");
}
TEST(RopeQkNorm, ScoresDependOnRelativePositionsAndTextIsNotTurned) {
  // The same q and k at every token: the score of two image tokens is a function of the difference
  // of their places in the grid.
  size_t rows = 3, columns = 4;
  Heads heads{1, rows * columns + 1, 1, 8};
  Op op = rope_op<double>(*devices()[0], heads, rows, columns);
  std::vector<double> x = op.inputs[0].value.get();
  for (size_t i = 0; i < x.size(); ++i) x[i] = x[i % 24];
  op.inputs[0].value.set(x);
  op.forward();
  std::vector<double> y = op.output.get();
  auto score = [&](size_t i, size_t j) {
    double sum = 0;
    for (size_t k = 0; k < 8; ++k) sum += y[i * 24 + k] * y[j * 24 + 8 + k];
    return sum;
  };
  for (size_t r = 0; r + 1 < rows; ++r)
    for (size_t c = 0; c + 2 < columns; ++c) {
      size_t i = r * columns + c;
      EXPECT_NEAR(score(i, i + columns + 2), score(0, columns + 2), 1e-12);
      EXPECT_NEAR(score(i + 2, i + columns), score(2, columns), 1e-12);
    }
  EXPECT_GT(std::abs(score(0, columns + 2) - score(2, columns)), 1e-3);
  size_t text = rows * columns;
  double squares = 0;
  for (size_t k = 0; k < 8; ++k) squares += x[k] * x[k];
  for (size_t k = 0; k < 8; ++k)
    EXPECT_NEAR(y[text * 24 + k], x[k] / std::sqrt(squares / 8 + qk_eps), 1e-14);
  // Whatever the table begins with, which text is not turned by.
  std::vector<double> sine = op.kept[1].get();
  sine[0] = 1;
  op.kept[1].set(sine);
  op.forward();
  std::vector<double> other = op.output.get();
  EXPECT_NE(other[0], y[0]);
  for (size_t k = 0; k < 8; ++k) EXPECT_EQ(other[text * 24 + k], y[text * 24 + k]);
}

struct AttentionOp : Op {
  Tensor probs, dA, dS;
};

template <class Real>
AttentionOp attention_op(Device& device, Heads heads) {
  using Acc = AccOf<Real>;
  AttentionOp op;
  Device* d = &device;
  size_t X = heads.batch * heads.length * heads.width(),
         squares = heads.batch * heads.count * heads.length * heads.length;
  Tensor qkv = Tensor::random<Real>(device, 3 * X, 1);
  Tensor probs = op.probs = Tensor::of<Real>(device, squares),
         dA = op.dA = Tensor::of<Acc>(device, squares);
  Tensor dS = op.dS = Tensor::of<Real>(device, squares), dqkv = Tensor::of<Real>(device, 3 * X);
  op.inputs = {{"qkv", qkv, dqkv}};
  Tensor Y = op.output = Tensor::of<Real>(device, X);
  Tensor G = op.cotangent = Tensor::random<Real>(device, X, 2);
  op.kept = {probs, dA, dS};
  op.forward = [=] {
    attention_forward(*d, Y.data<Real>(), probs.data<Real>(), dA.data<Acc>(), qkv.data<Real>(),
                      heads);
  };
  op.backward = [=] {
    attention_backward(*d, dqkv.data<Real>(), G.data<Real>(), probs.data<Real>(), qkv.data<Real>(),
                       dA.data<Acc>(), dS.data<Real>(), heads);
  };
  return op;
}

TEST(Attention, GradientsAgreeWithDifferences) {
  for (size_t length : {1, 7, 40})
    check_gradients([&](Device& d, auto t) {
      return attention_op<decltype(t)>(d, Heads{2, length, 3, 8});
    });
}
TEST(Attention, AgreesOnBothDevices) {
  check_devices([](Device& d, auto t) {
    return attention_op<decltype(t)>(d, Heads{3, 77, 2, 16});
  });
}
TEST(Attention, WrongBackwardsAreRejected) {
  Device& device = *devices()[0];
  Heads heads{2, 6, 2, 8};
  AttentionOp op = attention_op<double>(device, heads);
  op.forward(), op.backward();
  size_t n = heads.length;
  std::vector<double> probs = op.probs.get(), dA = op.dA.get(), no_outer = probs, global = probs;
  for (size_t i = 0; i < probs.size(); ++i) no_outer[i] = probs[i] * dA[i];  // diag(a) alone
  for (size_t row = 0; row < probs.size(); row += n) {
    double sum = 0;
    for (size_t j = 0; j < n; ++j) sum += dA[row + j] / double(n);
    for (size_t j = 0; j < n; ++j) global[row + j] = probs[row + j] * (dA[row + j] - sum);
  }
  // dQ and dK from another dS, as attention_backward() makes them from the right one.
  auto with = [&](const std::vector<double>& dS, double scale) {
    Tensor s = Tensor::of<double>(device, dS.size());
    s.set(dS);
    double *qkv = op.inputs[0].value.data<double>(), *out = op.inputs[0].gradient.data<double>();
    std::vector<double> right = op.inputs[0].gradient.get();
    Sizes sizes{n, heads.dim, n, heads.batch, heads.count};
    gemm(device, head_part(out, 0, heads), head_square(s.data<double>(), heads),
         head_part(qkv, 1, heads), sizes, scale);
    gemm(device, head_part(out, 1, heads), head_square(s.data<double>(), heads).transpose(),
         head_part(qkv, 0, heads), sizes, scale);
    std::vector<double> wrong = op.inputs[0].gradient.get();
    op.inputs[0].gradient.set(right);
    return wrong;
  };
  double scale = 1 / std::sqrt(double(heads.dim));
  EXPECT_LE(directional_error(op, op.inputs[0], with(op.dS.get(), scale)), gradient_tolerance);
  expect_rejected(op, "qkv", with(no_outer, scale), "diag(a) without a a^T");
  expect_rejected(op, "qkv", with(global, scale), "the plain mean of dA for <a, dA>");
  expect_rejected(op, "qkv", with(op.dS.get(), 1), "1/sqrt(hd) forgotten");
}
TEST(Attention, ForwardFollowsTheDefinition) {
  Heads heads{2, 5, 2, 4};
  for (Device* device : devices()) {
    AttentionOp op = attention_op<double>(*device, heads);
    op.forward();
    std::vector<double> x = op.inputs[0].value.get(), want(op.output.count());
    auto at = [&](size_t b, size_t t, size_t part, size_t head, size_t k) {
      return x[(((b * heads.length + t) * 3 + part) * heads.count + head) * heads.dim + k];
    };
    for (size_t b = 0; b < heads.batch; ++b)
      for (size_t head = 0; head < heads.count; ++head)
        for (size_t i = 0; i < heads.length; ++i) {
          std::vector<double> p(heads.length);
          double sum = 0;
          for (size_t j = 0; j < heads.length; ++j) {
            for (size_t k = 0; k < heads.dim; ++k)
              p[j] += at(b, i, 0, head, k) * at(b, j, 1, head, k);
            sum += p[j] = std::exp(p[j] / std::sqrt(double(heads.dim)));
          }
          for (size_t j = 0; j < heads.length; ++j)
            for (size_t k = 0; k < heads.dim; ++k)
              want[(b * heads.length + i) * heads.width() + head * heads.dim + k] +=
                  p[j] / sum * at(b, j, 2, head, k);
        }
    EXPECT_LE(relative_difference(op.output.get(), want), 1e-14) << device->name;
  }
}

TEST(Patches, OrdersAreEachOthersBackward) {
  // <image_to_tokens(x), y> = <x, tokens_to_image(y)>, and a permutation undone is the identity.
  Patches p{3, 4, 6, 2};
  size_t B = 2, pixels = 72, length = p.tokens() + 2;
  for (Device* device : devices())
    for (PatchOrder order : {PatchOrder::channel_first, PatchOrder::channel_last}) {
      Tensor image = Tensor::random<double>(*device, B * pixels, 1);
      Tensor tokens = Tensor::of<double>(*device, B * length * p.dim());
      Tensor back = Tensor::of<double>(*device, B * pixels);
      image_to_tokens(*device, tokens.data<double>(), image.data<double>(), B, length, p, order);
      tokens_to_image<double>(*device, back.data<double>(), tokens.data<double>(), nullptr, B,
                              length, p, order);
      EXPECT_EQ(image.get(), back.get());
      std::vector<double> t = tokens.get();
      for (size_t i = 0; i < t.size(); ++i)
        EXPECT_TRUE(i / p.dim() % length < p.tokens() || t[i] == 0);
    }
  // Channel 2, row 1, column 0 of the patch at grid place (1, 2).
  EXPECT_EQ(p.pixel(5, 2 * 4 + 1 * 2 + 0, PatchOrder::channel_first), size_t(2 * 24 + 3 * 6 + 4));
  EXPECT_EQ(p.pixel(5, (1 * 2 + 0) * 3 + 2, PatchOrder::channel_last), size_t(2 * 24 + 3 * 6 + 4));
}

// Attention in bf16, by 2.2 of dit.cu or over tensor cores, against 2.2 in fp64 on the CPU from the
// same bf16 Q, K, V and cotangent: Y, and through RoPE and QK-norm dQ, dK, dV. Tokens are a common
// vector and `values` (of V) or `keys` (of Q, K and the angles) times noise. `forget` drops the
// last token's cotangent from the reference, and without `rest` the way over tensor cores does not
// get what rounding took from Y.
struct AttentionInBf16 {
  Heads heads;
  double values, keys;
  bool fused, forget = false, rest = true;

  std::vector<double> errors(Device& device) const;  // of Y, dQ, dK, dV
};
std::vector<double> AttentionInBf16::errors(Device& device) const {
  Device& cpu = *devices()[0];
  size_t rows = heads.batch * heads.length, D = heads.width(), X = rows * D, half = heads.dim / 2;
  size_t image_tokens = heads.length - 3, squares = rows * heads.count * heads.length;
  auto b16 = [&](size_t n) { return Tensor::of<bf16>(device, n); };
  auto f32 = [&](size_t n) { return Tensor::of<float>(device, n); };
  auto f64 = [&](size_t n) { return Tensor::of<double>(cpu, n); };
  auto b = [](const Tensor& t) { return t.data<bf16>(); };
  auto f = [](const Tensor& t) { return t.data<float>(); };
  auto at = [](const Tensor& t) { return t.data<double>(); };
  std::vector<double> x = random_values(3 * X, 1), common = random_values(3 * D, 4);
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = common[i % (3 * D)] + (i % (3 * D) < 2 * D ? keys : values) * x[i];
  std::vector<double> cosine = random_values(image_tokens * half, 3), sine = cosine;
  for (double& angle : cosine) angle = std::cos(keys * angle);
  for (double& angle : sine) angle = std::sin(keys * angle);
  Tensor c32 = f32(cosine.size()), s32 = f32(sine.size()), c64 = f64(cosine.size()),
         s64 = f64(sine.size());
  c64.set(cosine), c32.set(cosine), s64.set(sine), s32.set(sine);
  Rope<float> rope{f(c32), f(s32), image_tokens};
  Tensor qkv = b16(3 * X), dY = Tensor::random<bf16>(device, X, 2), r = f32(2 * rows * heads.count);
  qkv.set(x);
  rope_qk_norm_forward(device, b(qkv), f(r), rope, heads);

  Tensor Y = b16(X), dqkv = b16(3 * X);
  if (fused) {
    Tensor Y_rest = b16(X), l = f32(rows * heads.count), inner = f32(l.count());
    Block<bf16> block{};
    block.shape.heads = heads, block.shape.rope = rope;
    block.saved.qkv = b(qkv), block.saved.r_qk = f(r), block.saved.log_sums = f(l);
    block.saved.Y = b(Y), block.saved.Y_rest = b(Y_rest);
    block.scratch.dY = b(dY), block.scratch.dqkv = b(dqkv);
    block.scratch.inner = f(inner);
    EXPECT_TRUE(fused_attention_forward(device, block.saved, heads));
    if (!rest) device.fill(b(Y_rest), 0, X * sizeof(bf16));
    EXPECT_TRUE(fused_attention_backward(device, block));
    device.synchronize();
  } else {
    Tensor probs = b16(squares), dS = b16(squares), S = f32(squares);
    attention_forward(device, b(Y), b(probs), f(S), b(qkv), heads);
    attention_backward(device, b(dqkv), b(dY), b(probs), b(qkv), f(S), b(dS), heads);
    rope_qk_norm_backward(device, b(dqkv), b(qkv), f(r), rope, heads);
    device.synchronize();
  }

  Tensor qkv64 = f64(3 * X), dY64 = f64(X), r64 = f64(r.count()), Y64 = f64(X), dqkv64 = f64(3 * X);
  Tensor probs = f64(squares), S = f64(squares), dS = f64(squares);
  std::vector<double> cotangent = dY.get();
  if (forget) std::fill(cotangent.end() - ptrdiff_t(D), cotangent.end(), 0.0);
  qkv64.set(qkv.get()), dY64.set(cotangent), r64.set(r.get());
  attention_forward(cpu, at(Y64), at(probs), at(S), at(qkv64), heads);
  attention_backward(cpu, at(dqkv64), at(dY64), at(probs), at(qkv64), at(S), at(dS), heads);
  rope_qk_norm_backward(cpu, at(dqkv64), at(qkv64), at(r64), {at(c64), at(s64), image_tokens},
                        heads);
  std::vector<double> all{relative_difference(Y.get(), Y64.get())}, mine = dqkv.get(),
                                                                    right = dqkv64.get();
  for (size_t part = 0; part < 3; ++part) {
    std::vector<double> d, d64;
    for (size_t i = 0; i < mine.size(); ++i)
      if (i % (3 * D) / D == part) d.push_back(mine[i]), d64.push_back(right[i]);
    all.push_back(relative_difference(d, d64));
  }
  return all;
}
// On the way to Y, dQ, dK and dV up to four numbers are rounded, each by up to 2^-9: A; dS; keys
// less their mean, or their product with the sums of dS; and the result.
constexpr double bf16_attention = 4 * 0x1p-9;
void expect_exact(Device& device, AttentionInBf16 attention) {
  std::vector<double> errors = attention.errors(device);
  const char* const parts[] = {"Y", "dQ", "dK", "dV"};
  for (size_t i = 0; i < 4; ++i)
    EXPECT_LE(errors[i], bf16_attention)
        << parts[i] << " on " << device.name << (attention.fused ? " over tensor cores, " : ", ")
        << attention.heads.length << " tokens of " << attention.heads.dim << ", spread of V "
        << attention.values << ", of Q and K " << attention.keys;
}

// Lemma 1's neighbourhood: the more alike the values are, the more of dS cancels, and the more
// alike the keys, the more of dS K.
TEST(Attention, IsExactInBf16HoweverAlikeTokensAre) {
  for (Device* device : devices())
    for (bool fused : {false, true})
      for (size_t dim : {64, 128}) {
        if (device->gpu ? !Device::has_bf16() : fused || dim > 64) continue;
        for (double spread : {1.0, 0.1, 0.01, 0.001})
          for (auto [values, keys] : {std::pair(spread, 1.0), {1.0, spread}, {spread, spread}})
            expect_exact(*device, {{1, 264, 2, dim}, values, keys, fused});
      }
}

// Tiles and rows that are not full. One forgotten cotangent in hundreds shows in each of dQ, dK and
// dV; what rounding took from Y, where values are alike.
TEST(Attention, OnTensorCoresIsExactForAnyLength) {
  if (devices().size() < 2 || !Device::has_bf16()) GTEST_SKIP() << "no GPU with tensor cores";
  Device& gpu = *devices()[1];
  for (size_t dim : {64, 128}) {
    for (size_t length : {5, 16, 31, 33, 63, 72, 130, 264, 320}) {
      AttentionInBf16 attention{{2, length, 3, dim}, 1, 1, true};
      expect_exact(gpu, attention);
      attention.forget = true;
      std::vector<double> wrong = attention.errors(gpu);
      for (size_t i = 1; i < 4; ++i) EXPECT_GT(wrong[i], bf16_attention) << length << " tokens";
    }
    std::vector<double> rounded =
        AttentionInBf16{{2, 264, 3, dim}, 0.01, 1, true, false, false}.errors(gpu);
    for (size_t i : {1, 2}) EXPECT_GT(rounded[i], bf16_attention) << "c of a Y that was rounded";
  }
}

// ---------------------------------------------------------------------------------------------
// Configuration and table

TEST(Config, ImpossibleSizesAreRefused) {
  struct Case {
    void (*change)(Config&);
    const char* says;
  };
  const Case cases[] = {
      {[](Config& c) { c.heads = 3; }, "not divisible by 3 heads"},
      {[](Config& c) { c.heads = 32; }, "not a multiple of 4"},
      {[](Config& c) { c.patch = 5; }, "cannot be cut into patches"},
      {[](Config& c) { c.ffn = 6; }, "ffn 6"},
      {[](Config& c) { c.depth = 0; }, "at least 1"},
      {[](Config& c) { c.depth = size_t(-1); }, "out of range"},
      {[](Config& c) { c.residual = "prenrom"; }, "choose one of postnorm"},
      {[](Config& c) { c.means = "mean"; }, "choose segment or global"},
      {[](Config& c) { c.norm_eps = 0; }, "norm-eps"},
      {[](Config& c) { c.norm_eps = 1.5; }, "norm-eps"},
      {[](Config& c) { c.text_tokens = (1 << 16) + 1; }, "out of range"},
      {[](Config& c) { c.text_dim = (1 << 20) + 1; }, "out of range"},
  };
  for (const Case& test : cases) {
    Config c;
    EXPECT_NO_THROW(c.check());
    test.change(c);
    try {
      c.check();
      ADD_FAILURE() << "accepted: " << test.says;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(test.says), std::string::npos) << e.what();
    }
  }
}

TEST(Table, ListsEachParameterOnceWithoutOverlap) {
  for (const Residual& mode : residuals) {
    Config c;
    c.depth = 3, c.width = 12, c.heads = 1, c.ffn = 20, c.residual = mode.name;
    Table table = parameter_table(c);
    std::set<std::string> names;
    size_t end = 0;
    for (const Parameter& p : table.parameters) {
      EXPECT_TRUE(names.insert(p.name).second) << p.name;
      EXPECT_GE(p.offset, end) << p.name;
      EXPECT_EQ(p.offset % 8, 0u) << p.name;
      end = p.offset + p.count();
    }
    EXPECT_LE(end, table.size);
    // W_Q, W_K, W_V are read as one matrix; blocks repeat at a fixed stride.
    EXPECT_EQ(table.at("blocks.1.operator.v_proj.weight").offset,
              table.at("blocks.1.operator.q_proj.weight").offset + 2 * c.width * c.width);
    for (const Parameter& p : table.parameters)
      if (p.name.rfind("blocks.0.", 0) == 0) {
        EXPECT_EQ(table.at("blocks.2." + p.name.substr(9)).offset,
                  p.offset + 2 * table.block_stride);
      }
  }
}

// Where writers and gates start. A ReZero whose writers began at zero like its gates would be dead.
TEST(Table, StartsWhereTheModeSays) {
  const struct {
    const char* residual;
    double writers;
    std::map<std::string, double> gates;  // of the first block
  } rows[] = {
      {"postnorm", 0, {}},
      {"prenorm", 0, {}},
      {"layerscale", 0.02, {{"layerscale1", 0.01}, {"layerscale2", 0.01}}},
      {"rezero", 0.02, {{"rezero1", 0}, {"rezero2", 0}}},
      {"mvsplit",
       0,
       {{"fused_mvsplit_norm1.alpha", 0},
        {"fused_mvsplit_norm1.beta", 1},
        {"fused_mvsplit_norm2.alpha", 0},
        {"fused_mvsplit_norm2.beta", 1}}},
      {"mvsplit-noleak",
       0,
       {{"fused_mvsplit_norm1.alpha", 0},
        {"fused_mvsplit_norm1.beta", 1},
        {"fused_mvsplit_norm2.alpha", 0},
        {"fused_mvsplit_norm2.beta", 1}}},
      {"centered", 0, {}},
      {"leaky", 0, {{"leaky1", 0.1}, {"leaky2", 0.1}}},
      {"mvsplit-attention", 0, {{"fused_mvsplit_norm1.alpha", 0}, {"fused_mvsplit_norm1.beta", 1}}},
      {"mvsplit-ffn", 0, {{"fused_mvsplit_norm2.alpha", 0}, {"fused_mvsplit_norm2.beta", 1}}}};
  EXPECT_EQ(std::size(rows), residuals.size());
  for (const auto& row : rows) {
    Config c;
    c.depth = 2, c.residual = row.residual;
    std::map<std::string, double> gates, writers;
    for (const Parameter& p : parameter_table(c).parameters) {
      if (p.name.rfind("blocks.0.", 0) != 0) continue;
      if (p.init == Init::constant) gates[p.name.substr(9)] = p.scale;
      if (p.init == Init::normal) writers[p.name.substr(9)] = p.scale;
    }
    EXPECT_EQ(gates, row.gates) << row.residual;
    EXPECT_EQ(writers, (std::map<std::string, double>{{"operator.proj.weight", row.writers},
                                                      {"ffn.w2.weight", row.writers}}))
        << row.residual;
  }
}

// With a gain the matrices of blocks start as in DeepNorm's paper, and all else as without it.
TEST(Table, XavierGainScalesAllMatricesOfABlockButQueriesAndKeys) {
  Config c;
  c.depth = 2, c.width = 16, c.ffn = 24, c.residual = "rezero", c.final_std = 0.1;
  Table plain = parameter_table(c);
  c.xavier_gain = 0.25;
  Table table = parameter_table(c);
  const std::map<std::string, double> stds = {
      {"operator.q_proj.weight", std::sqrt(2. / 32)},
      {"operator.k_proj.weight", std::sqrt(2. / 32)},
      {"operator.v_proj.weight", 0.25 * std::sqrt(2. / 32)},
      {"operator.proj.weight", 0.25 * std::sqrt(2. / 32)},
      {"ffn.w13.weight", 0.25 * std::sqrt(2. / 40)},  // two maps from 16 to 24 numbers
      {"ffn.w2.weight", 0.25 * std::sqrt(2. / 40)}};
  size_t of_blocks = 0;
  for (size_t i = 0; i < table.parameters.size(); ++i) {
    const Parameter &p = table.parameters[i], &before = plain.parameters[i];
    EXPECT_EQ(p.name, before.name);
    EXPECT_EQ(p.shape, before.shape) << p.name;
    bool in_block = p.name.rfind("blocks.", 0) == 0 && p.shape.size() == 2;
    of_blocks += in_block;
    EXPECT_EQ(p.init, in_block ? Init::normal : before.init) << p.name;
    EXPECT_DOUBLE_EQ(p.scale, in_block ? stds.at(p.name.substr(9)) : before.scale) << p.name;
  }
  EXPECT_EQ(of_blocks, 12u);
  c.writer_std = 0.02;
  EXPECT_THROW(c.check(), Error);
  c.writer_std = -1;
  EXPECT_NO_THROW(c.check());
}

TEST(Table, HasThePapersSizes) {
  Config c;
  c.width = 1024, c.heads = 8, c.ffn = 3072, c.channels = 4, c.patch = 2, c.text_dim = 1024;
  c.depth = 400;
  EXPECT_NEAR(1e-9 * double(parameter_table(c).count()), 5.45, 0.01);
  c.depth = 1000;
  EXPECT_NEAR(1e-9 * double(parameter_table(c).count()), 13.64, 0.01);
}

// 24 + 3 tokens of 16 channels in 2 heads of 8, patches and outputs of 8 numbers, text of 5, an FFN
// of 24.
TEST(Flops, AreThoseOfTheProducts) {
  auto product = [](double m, double n, double k) { return 2 * m * n * k; };
  double block = product(27, 3 * 16, 16)                // Q, K, V
                 + 2 * product(27, 27, 8)               // S of two heads
                 + 2 * product(27, 8, 27)               // A V
                 + product(27, 16, 16)                  // W_O
                 + product(27, 2 * 24, 16)              // gate and value
                 + product(27, 16, 24);                 // W2
  double ends = product(24, 16, 8) + product(3, 16, 5)  // patches and text
                + product(24, 8, 16);                   // the image tokens' velocity
  Config c;
  c.depth = 3, c.width = 16, c.heads = 2, c.ffn = 24;
  c.channels = 2, c.height = 8, c.image_width = 12, c.patch = 2, c.text_tokens = 3, c.text_dim = 5;
  EXPECT_EQ(forward_flops(c, 7), 7 * (3 * block + ends));
}

// ---------------------------------------------------------------------------------------------
// The network

template <class Real>
struct Filled {
  std::unique_ptr<Network<Real>> net;
  size_t batch;

  // A network with random weights, inputs and cotangent.
  Filled(Device& device, const Config& config, size_t b, size_t recompute, uint64_t seed = 1)
      : net(std::make_unique<Network<Real>>(device, config, b, recompute, true)), batch(b) {
    std::vector<Real> weights(net->table.size, Real(0.f));
    uint64_t number = 0;
    for (const Parameter& p : net->table.parameters) {
      std::vector<double> values = random_values(p.count(), seed * 1000 + number++, 0.25);
      for (size_t i = 0; i < values.size(); ++i)
        weights[p.offset + i] = Real(float(values[i] + (p.shape.size() == 1 ? 0.3 : 0)));
    }
    device.upload(net->weights(), weights.data(), weights.size() * sizeof(Real));
    auto fill = [&](auto* to, size_t n, uint64_t s) {
      using X = std::remove_pointer_t<decltype(to)>;
      std::vector<X> host;
      for (double v : random_values(n, s)) host.push_back(X(float(v)));
      device.upload(to, host.data(), n * sizeof(X));
    };
    fill(net->arrays.z, b * config.pixels(), seed + 1);
    fill(net->arrays.text, b * config.text_size(), seed + 2);
    fill(net->arrays.dvelocity, b * config.pixels(), seed + 3);
  }
  std::vector<AccOf<Real>> run() {
    net->forward(batch);
    net->backward(batch, false, true);
    std::vector<AccOf<Real>> out(net->table.size + batch * net->config.pixels());
    AccOf<Real>* end = out.data() + net->table.size;
    net->device.download(out.data(), net->gradients(), net->table.size * sizeof(AccOf<Real>));
    net->device.download(end, net->arrays.velocity,
                         batch * net->config.pixels() * sizeof(AccOf<Real>));
    return out;
  }
};

Config small(size_t depth, const char* residual = "mvsplit", const char* means = "segment") {
  Config c;
  c.means = means;
  c.depth = depth, c.width = 16, c.heads = 2, c.ffn = 24, c.residual = residual;
  c.channels = 2, c.height = 8, c.image_width = 12, c.patch = 2, c.text_tokens = 3, c.text_dim = 5;
  return c;
}

// On each device the two kinds of trunk: normalised by the merges, and not.
std::vector<std::pair<Device*, const char*>> both_kinds() {
  std::vector<std::pair<Device*, const char*>> all;
  for (Device* device : devices())
    for (const char* residual : {"mvsplit", "prenorm"}) all.push_back({device, residual});
  return all;
}

template <class X>
bool same_bits(const std::vector<X>& a, const std::vector<X>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(X)) == 0;
}

template <class Real>
void recompute_keeps_bits(Device& device, const Config& config) {
  std::vector<AccOf<Real>> kept = Filled<Real>(device, config, 2, 0).run();
  EXPECT_TRUE(same_bits(kept, Filled<Real>(device, config, 2, 0).run())) << "two runs differ";
  for (size_t k : {1, 7, 32, 33, 100})
    EXPECT_TRUE(same_bits(kept, Filled<Real>(device, config, 2, k).run())) << "recompute " << k;
  Filled<Real> twice(device, config, 2, 7);
  twice.run();
  EXPECT_TRUE(same_bits(kept, twice.run())) << "a second pass over used arrays";
  Filled<Real> other(device, config, 2, 0, 2);
  EXPECT_FALSE(same_bits(kept, other.run())) << "the comparison is blind";
}
TEST(Network, RecomputeDoesNotChangeABit) {
  for (auto [device, residual] : both_kinds()) {
    SCOPED_TRACE(device->name + ", " + residual);
    recompute_keeps_bits<double>(*device, small(33, residual));
    recompute_keeps_bits<float>(*device, small(33, residual));
    recompute_keeps_bits<bf16>(*device, small(33, residual));
  }
  // Wide enough for attention on tensor cores.
  for (Device* device : devices())
    for (const char* residual : {"mvsplit", "mvsplit-noleak", "layerscale"}) {
      SCOPED_TRACE(device->name + ", wide, " + residual);
      Config config = small(9, residual);
      config.width = 128;
      recompute_keeps_bits<bf16>(*device, config);
    }
}

TEST(Network, AccumulatesGradients) {
  for (Device* device : devices())
    for (const Residual& residual : residuals) {
      Filled<double> f(*device, small(3, residual.name.c_str()), 2, 2);
      std::vector<double> once = f.run();
      f.net->forward(2);
      f.net->backward(2, true);
      std::vector<double> twice(f.net->table.size);
      device->download(twice.data(), f.net->gradients(), twice.size() * sizeof(double));
      for (double& x : once) x *= 2;
      for (const Parameter& p : f.net->table.parameters) {
        auto of = [&](const std::vector<double>& all) {
          auto from = all.begin() + ptrdiff_t(p.offset);
          return std::vector<double>(from, from + ptrdiff_t(p.count()));
        };
        EXPECT_LE(relative_difference(of(twice), of(once)), 1e-14)
            << residual.name << " " << p.name;
      }
    }
}

// A batch smaller than the largest, and a network that cannot train, answer the same.
TEST(Network, InferenceAgreesWithTraining) {
  for (auto [device, residual] : both_kinds()) {
    Config config = small(5, residual);
    Filled<float> f(*device, config, 3, 2);
    f.net->forward(3);
    size_t n = config.pixels();
    std::vector<float> all(3 * n), one(n);
    device->download(all.data(), f.net->arrays.velocity, all.size() * sizeof(float));
    Network<float> inference(*device, config, 2, 0, false);
    device->copy(inference.weights(), f.net->weights(), f.net->table.size * sizeof(float));
    device->copy(inference.arrays.z, f.net->arrays.z, n * sizeof(float));
    device->copy(inference.arrays.text, f.net->arrays.text, config.text_size() * sizeof(float));
    inference.forward(1);
    device->download(one.data(), inference.arrays.velocity, n * sizeof(float));
    all.resize(n);
    EXPECT_LE(relative_difference({one.begin(), one.end()}, {all.begin(), all.end()}), 1e-6);
  }
}

// What a chaotic network needs, and Gradcheck with it: not one bit of another path.
TEST(Network, DualsHaveTheValuesOfDoubles) {
  for (const Residual& residual : residuals) {
    Config config = small(9, residual.name.c_str());
    Device& cpu = *devices()[0];
    Filled<double> f(cpu, config, 2, 4);
    Network<Dual> duals(cpu, config, 2, 0, false);
    convert(cpu, duals.weights(), f.net->weights(), f.net->table.size);
    convert(cpu, duals.arrays.z, f.net->arrays.z, 2 * config.pixels());
    convert(cpu, duals.arrays.text, f.net->arrays.text, 2 * config.text_size());
    f.net->forward(2), duals.forward(2);
    for (size_t i = 0; i < 2 * config.pixels(); ++i)
      ASSERT_EQ(duals.arrays.velocity[i].v, f.net->arrays.velocity[i]) << residual.name;
  }
}

TEST(Network, PlanIsWhatIsTaken) {
  for (auto [device, residual] : both_kinds())
    for (bool trains : {true, false})
      for (size_t k : {0, 3}) {
        size_t before = device->allocated;
        Config config = small(8, residual);
        Network<float> net(*device, config, 3, k, trains);
        EXPECT_EQ(device->allocated - before,
                  network_plan<float>(config, net.table, 3, k, trains, device->gpu).total());
      }
}

// Of eight blocks spans of four, three, two and one are two, three, four and eight: as many inputs
// are kept, and the activations of as many blocks as a span has.
TEST(Network, ASpanTakesOneCheckpointAndItsBlocksActivations) {
  Config config = small(8);
  Table table = parameter_table(config);
  auto bytes = [&](size_t recompute, const std::string& name) {
    for (const auto& slab : network_plan<float>(config, table, 3, recompute, true, false).slabs)
      if (slab.first == name) return double(slab.second);
    return 0.0;
  };
  double input = double(round_up(3 * 27 * 16, 128) * sizeof(float));
  const std::pair<size_t, int> spans[] = {{3, 1}, {2, 2}, {1, 6}};  // more than spans of four have
  for (auto [recompute, more] : spans)
    EXPECT_EQ(bytes(recompute, "checkpoints") - bytes(4, "checkpoints"), more * input);
  double block = bytes(2, "activations") - bytes(1, "activations");
  EXPECT_GT(block, 10 * input) << "qkv, Y, F1, X1, u, hidden, F2 and the probabilities";
  for (size_t recompute : {3, 4})
    EXPECT_EQ(bytes(recompute, "activations") - bytes(recompute - 1, "activations"), block);
}

// Whether this build has CUDA or not.
TEST(Network, PlansForAGpuWithoutAttentionsMatrices) {
  bool has_kernels = built_for() >= 800;
  for (size_t dim : {64, 128}) EXPECT_EQ(fused_attention<bf16>(true, dim), has_kernels);
  EXPECT_FALSE(fused_attention<bf16>(false, 64) || fused_attention<bf16>(true, 32) ||
               fused_attention<float>(true, 64));
}

template <class Real>
void compare_networks(const Config& c, double tolerance) {
  auto [cpu, gpu] = std::pair{Filled<Real>(*devices()[0], c, 2, 0).run(),
                              Filled<Real>(*devices()[1], c, 2, 0).run()};
  EXPECT_LE(relative_difference({gpu.begin(), gpu.end()}, {cpu.begin(), cpu.end()}), tolerance);
}
// How far what Filled::run() returns is from `right`, by family of parameters, and the velocity.
std::map<std::string, double> errors_by_family(const Table& table, const std::vector<double>& out,
                                               const std::vector<double>& right) {
  std::map<std::string, std::pair<std::vector<double>, std::vector<double>>> parts;
  auto add = [&](const std::string& family, size_t begin, size_t end) {
    auto& [mine, exact] = parts[family];
    for (size_t i = begin; i < end; ++i) mine.push_back(out[i]), exact.push_back(right[i]);
  };
  for (const Parameter& p : table.parameters) add(p.family(), p.offset, p.offset + p.count());
  add("velocity", table.size, out.size());
  std::map<std::string, double> errors;
  for (const auto& [family, part] : parts)
    errors[family] = relative_difference(part.first, part.second);
  return errors;
}
// bf16, with the GPU's own kernels, against fp64: no family is much further off than the readable
// bf16's, nor, where that is lucky, than one rounding. An error of a fifth, or a sign, would show.
void compare_rounded_networks(const Config& c) {
  Table table = parameter_table(c);
  auto run = [&](Device* device, auto t) {
    auto out = Filled<decltype(t)>(*device, c, 2, 0).run();
    return std::vector<double>(out.begin(), out.end());
  };
  std::vector<double> exact = run(devices()[0], double());
  auto plain = errors_by_family(table, run(devices()[0], bf16()), exact);
  for (const auto& [family, error] : plain) EXPECT_LT(2 * error, 0.2) << family;
  if (devices().size() < 2) return;
  for (const auto& [family, error] : errors_by_family(table, run(devices()[1], bf16()), exact))
    EXPECT_LE(error, std::max(2 * plain.at(family), 0x1p-8)) << family << ", width " << c.width;
}
TEST(Network, AgreesOnBothDevices) {
  for (const char* residual : {"mvsplit", "prenorm"}) {
    SCOPED_TRACE(residual);
    compare_rounded_networks(small(6, residual));
    if (devices().size() < 2) continue;
    compare_networks<double>(small(6, residual), 1e-11);
    compare_networks<float>(small(6, residual), 1e-4);
  }
  for (size_t width : {128, 256}) {  // the GPU's own kernels of merges and attention
    Config wide = small(2);
    wide.width = width;
    compare_rounded_networks(wide);
  }
  if (devices().size() < 2) GTEST_SKIP() << "no GPU: the bounds alone were tested";
}

// tests/oracle.safetensors: velocities and gradients of small models in every residual mode, by
// automatic differentiation of an independent implementation (tests/oracle.py).
TEST(Network, AgreesWithTheOracle) {
  SafetensorsReader file("tests/oracle.safetensors");
  ASSERT_EQ(file.metadata().size(), std::size(residuals) + 1);  // and one with global means
  for (Device* device : devices())
    for (const auto& entry : file.metadata()) {
      const std::string name = entry.first, text = entry.second;
      std::map<std::string, std::string> m;
      std::istringstream words(text);
      for (std::string word; words >> word;)
        m[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
      auto n = [&](const char* key) { return size_t(std::stoul(m.at(key))); };
      Config c;
      c.depth = n("depth"), c.width = n("width"), c.heads = n("heads"), c.ffn = n("ffn");
      c.channels = n("channels"), c.height = n("height"), c.image_width = n("image_width");
      c.patch = n("patch"), c.text_tokens = n("text_tokens"), c.text_dim = n("text_dim");
      c.residual = m.at("residual"), c.means = m.at("means"),
      c.norm_eps = std::stod(m.at("norm_eps"));
      size_t b = file.find(name + "/z")->shape[0];
      Network<double> net(*device, c, b, 1, true);
      auto want = [&](const std::string& tensor) {
        const TensorInfo* info = file.find(name + "/" + tensor);
        std::vector<double> values(info ? info->count() : 0);
        EXPECT_TRUE(info) << tensor;
        if (info) file.read(*info, values.data(), 0, values.size());
        return values;
      };
      auto give = [&](const std::string& tensor, double* to) {
        std::vector<double> values = want(tensor);
        device->upload(to, values.data(), values.size() * sizeof(double));
      };
      for (const Parameter& p : net.table.parameters) give(p.name, net.weights() + p.offset);
      give("z", net.arrays.z), give("text", net.arrays.text);
      give("cotangent", net.arrays.dvelocity);
      net.forward(b);
      net.backward(b, false, true);
      auto compare = [&](const std::string& tensor, const double* from) {
        std::vector<double> wanted = want(tensor), got(wanted.size());
        device->download(got.data(), from, got.size() * sizeof(double));
        EXPECT_LE(relative_difference(got, wanted), 1e-10) << name << " " << tensor;
      };
      compare("velocity", net.arrays.velocity);
      compare("grad.z", net.arrays.dz);
      compare("grad.text", net.arrays.dtext);
      for (const Parameter& p : net.table.parameters)
        compare("grad." + p.name, net.gradients() + p.offset);
    }
}

// ---------------------------------------------------------------------------------------------
// The paper's statements about attention and the writers
//
// (n) is the paper's number. The quantities are those of a block of a network with random weights:
// its attention probabilities, its writers' inputs y and adjoints delta, its gradients. The same
// check must reject each mutation beside it.

// The second block of a network, forward, and backward from a random cotangent.
template <class Real>
struct OneBlock {
  using Acc = AccOf<Real>;
  struct Writer {
    Dense y, delta, dW;  // (B T, n), (B T, D), (D, n)
  };
  Filled<Real> filled;
  Network<Real>& net;
  size_t B, N, L, D;
  BlockSaved<Real> saved;

  OneBlock(Device& device, const char* residual, const char* means = "segment")
      : filled(device, small(2, residual, means), 2, 0),
        net(*filled.net),
        B(2),
        N(net.config.image_tokens()),
        L(net.config.text_tokens),
        D(net.config.width),
        saved(net.saved(1)) {
    net.forward(B);
  }
  size_t length() const { return N + L; }
  // The groups that J averages over: the sequences, or their segments.
  std::vector<size_t> sequences() const { return {N + L, N + L}; }
  std::vector<size_t> segments() const { return {N, L, N, L}; }

  template <class X>
  Dense read(const X* from, size_t rows, size_t cols) const {
    std::vector<X> host(rows * cols);
    net.device.download(host.data(), from, host.size() * sizeof(X));
    return {rows, cols, {host.begin(), host.end()}};
  }
  void write(Real* to, const std::vector<double>& values) {
    std::vector<Real> host;
    for (double x : values) host.push_back(Real(Acc(x)));
    net.device.upload(to, host.data(), host.size() * sizeof(Real));
  }
  Dense input() const { return read(saved.X, B * length(), D); }
  void set_input(const Dense& X) { write(saved.X, X.v); }
  void set_alpha(double alpha) {
    for (const char* name :
         {"blocks.1.fused_mvsplit_norm1.alpha", "blocks.1.fused_mvsplit_norm2.alpha"})
      write(net.weights() + net.table.at(name).offset, std::vector<double>(D, alpha));
  }

  // Both writers: attention's, the FFN's.
  std::vector<Writer> run() {
    Arrays<Real>& a = net.arrays;
    Block<Real> block = net.block(1, net.parameters(), B);
    auto d = locate<Acc>(net.config, net.table, net.gradients()).block(1);
    size_t rows = B * length(), ffn = net.config.ffn;
    block_forward(net.device, block);
    write(a.G, random_values(rows * D, 50));
    block_backward(net.device, a.G, d, block, false);
    return {{read(saved.Y, rows, D), read(a.scratch.dF[0], rows, D), read(d.proj, D, D)},
            {read(saved.hidden, rows, ffn), read(a.scratch.dF[1], rows, D), read(d.w2, D, ffn)}};
  }
  // After run(): dW_Q and dW_K.
  Dense query_key_gradient() const {
    return read(net.gradients() + net.table.at("blocks.1.operator.q_proj.weight").offset, 2 * D, D);
  }
  // Q (0), K (1), V (2) or Y (3) of one sequence and head: (T, hd).
  Dense part(size_t which, size_t b, size_t head) const {
    size_t hd = net.config.head_dim(), width = which == 3 ? D : 3 * D;
    Dense all = read(which == 3 ? saved.Y : saved.qkv, B * length(), width), out(length(), hd);
    for (size_t t = 0; t < length(); ++t)
      for (size_t k = 0; k < hd; ++k)
        out(t, k) = all(b * length() + t, which % 3 * D + head * hd + k);
    return out;
  }
  // Its attention matrix A (T, T), from Q and K as the block left them (turned and normalised).
  Dense attention(size_t b, size_t head) const {
    Dense S = part(0, b, head) * transpose(part(1, b, head));
    for (size_t i = 0; i < S.rows; ++i) {
      double sum = 0;
      for (size_t j = 0; j < S.cols; ++j)
        sum += S(i, j) = std::exp(S(i, j) / std::sqrt(double(net.config.head_dim())));
      for (size_t j = 0; j < S.cols; ++j) S(i, j) /= sum;
    }
    return S;
  }
  // The largest residual(A, V, Y) over sequences and heads.
  template <class Residual>
  double over_heads(const Residual& residual) const {
    double largest = 0;
    for (size_t b = 0; b < B; ++b)
      for (size_t head = 0; head < net.config.heads; ++head)
        largest =
            std::max(largest, residual(attention(b, head), part(2, b, head), part(3, b, head)));
    return largest;
  }
};

// Y is the block's own output A V throughout: what is said of A is said of attention_forward().
TEST(Statement, Prop1_PureMeanStatesAreKept) {
  for (Device* device : devices()) {
    OneBlock<double> block(*device, "postnorm");
    size_t T = block.length();
    Dense I = identity(T), J = mean_over({T}), J_seg = mean_over({block.N, block.L});
    Dense X = block.input(), X_pure = mean_over(block.sequences()) * X;
    auto kept = [&](const Dense& X) {
      block.set_input(X), block.run();
      return block.over_heads(
          [](const Dense&, const Dense& V, const Dense& Y) { return difference(Y, V); });
    };
    expect_statement(*device, "Prop. 1: A mu = mu", kept(X_pure),
                     {{"a general state", kept(X)},
                      {"a mean in each segment", kept(mean_over(block.segments()) * X)}});
    // For general V, the mean of Y is that of V plus a leak out of the centered part: J A V = J V +
    // J A P V, because A J = J.
    block.set_input(X), block.run();
    auto leak = [&](const Dense& j, double leaks, double sum, bool columns) {
      return block.over_heads([&](Dense A, const Dense& V, const Dense& Y) {
        if (columns) A = transpose(A);
        return difference(j * Y, j * V + leaks * (j * (sum * A) * (I - j) * V));
      });
    };
    expect_statement(*device, "Prop. 1: JAX = JX + JAPX", leak(J, 1, 1, false),
                     {{"no leak: J A = J", leak(J, 0, 1, false)},
                      {"columns that sum to one", leak(J, 1, 1, true)},
                      {"rows that sum to 1.01", leak(J, 1, 1.01, false)},
                      {"segment means", leak(J_seg, 1, 1, false)}});
  }
}

TEST(Statement, Prop2_Eq4_CenteredPartContracts) {
  for (Device* device : devices()) {
    OneBlock<double> block(*device, "postnorm");
    block.run();
    size_t T = block.length();
    Dense I = identity(T), J = mean_over({T}), P = I - J;
    Dense P_seg = I - mean_over({block.N, block.L});
    // c(AX) = P A P c(X), since P A J = P J = 0.
    auto centered = [&](const Dense& p, const Dense& left) {
      return block.over_heads([&](const Dense& A, const Dense& V, const Dense& Y) {
        return difference(p * Y, left * A * p * V);
      });
    };
    expect_statement(*device, "Prop. 2: c(AX) = PAPX", centered(P, P),
                     {{"A P X", centered(P, I)}, {"within segments", centered(P_seg, P_seg)}});
    // It need not be below 1: half of the rows on one token, half on another.
    Dense sinks(12, 12), P12 = identity(12) - mean_over({12});
    for (size_t i = 0; i < 12; ++i) sinks(i, i % 2) = 1;
    EXPECT_NEAR(spectral_norm((P12 * sinks * P12).v, 12), std::sqrt(6.0), 1e-12);
    // (4): mu_eff = ||PAP||_2 is how much A can keep of a centered state, and no less. The worst X:
    // A's own top singular vector, by squaring M^T M.
    auto bound = [&](const Dense& p, double factor) {
      return block.over_heads([&](const Dense& A, const Dense& V, const Dense&) {
        Dense M = P * A * P, MM = transpose(M) * M;
        for (int i = 0; i < 12; ++i) MM = 1 / norm(MM * MM) * (MM * MM);
        Dense worst = MM * V, PX = P * V;
        double mu = factor * spectral_norm((p * A * P).v, T);
        double excess = norm(P * A * V) / norm(PX) / mu - 1;  // must not be positive
        return std::max(excess, std::abs(norm(P * A * worst) / norm(P * worst) / mu - 1));
      });
    };
    expect_statement(*device, "(4) mu_eff", bound(P, 1),
                     {{"||AP|| for ||PAP||", bound(I, 1)}, {"0.999 mu_eff", bound(P, 0.999)}});
  }
}

TEST(Statement, Eq5_17_WriterGradientSplits) {
  for (Device* device : devices())
    for (const char* residual : {"postnorm", "mvsplit"}) {
      OneBlock<double> block(*device, residual);
      size_t rows = block.B * block.length();
      Dense I = identity(rows), J = mean_over(block.sequences()),
            J_seg = mean_over(block.segments());
      Dense weights = random_dense(1, rows, 51), one(rows, 1, std::vector<double>(rows, 1.0));
      Dense oblique = 1 / (weights * one)(0, 0) * (one * weights);
      for (const auto& writer : block.run()) {
        Dense delta_T = transpose(writer.delta);
        // dW = (J delta)^T J y + (P delta)^T P y, and each cross term is zero.
        auto split = [&](const Dense& j, const Dense& p) {
          Dense mean = transpose(j * writer.delta), rest = transpose(p * writer.delta);
          return difference(mean * (j * writer.y) + rest * (p * writer.y), writer.dW) +
                 (norm(mean * (p * writer.y)) + norm(rest * (j * writer.y))) / norm(writer.dW);
        };
        // dW_mu = sum over sequences of n dbar ybar^T: one rank-one term each.
        auto rank_one = [&](const Dense& j, const std::vector<size_t>& groups, double more) {
          Dense sum(writer.dW.rows, writer.dW.cols), dbar = j * writer.delta, ybar = j * writer.y;
          size_t first = 0;
          for (size_t n : groups) {
            sum = sum + (double(n) + more) *
                            (transpose(rows_of(dbar, first, 1)) * rows_of(ybar, first, 1));
            first += n;
          }
          return difference(sum, delta_T * j * writer.y);
        };
        std::string name = std::string(residual) + (writer.y.cols == block.D ? " W_O" : " W2");
        std::vector<Mutation> wrong = {{"P without centering", split(J, I)},
                                       {"a weighted mean", split(oblique, I - oblique)},
                                       {"J of sequences, P of segments", split(J, I - J_seg)},
                                       {"no mean part", split(0.0 * J, I - J)}};
        expect_statement(*device, "(5) " + name + ", global mean", split(J, I - J), wrong);
        expect_statement(*device, "(5) " + name + ", segment means", split(J_seg, I - J_seg),
                         wrong);
        expect_statement(*device, "(17) " + name + ", global mean",
                         rank_one(J, block.sequences(), 0),
                         {{"T - 1 for T", rank_one(J, block.sequences(), -1)},
                          {"one term for two segments", rank_one(J_seg, block.sequences(), 0)}});
        expect_statement(*device, "(17) " + name + ", segment means",
                         rank_one(J_seg, block.segments(), 0),
                         {{"n - 1 for n", rank_one(J_seg, block.segments(), -1)}});
        // The segments' terms are the global one and what they differ by, which is rank one too.
        Dense dbar = J_seg * writer.delta, ybar = J_seg * writer.y;
        auto between = [&](double scale) {
          Dense sum = delta_T * J * writer.y;
          for (size_t b = 0; b < block.B; ++b) {
            size_t i = b * block.length(), t = i + block.N;
            Dense d = rows_of(dbar, i, 1) - rows_of(dbar, t, 1);
            sum = sum + scale * (transpose(d) * (rows_of(ybar, i, 1) - rows_of(ybar, t, 1)));
          }
          return difference(sum, delta_T * J_seg * writer.y);
        };
        double n_i = double(block.N), n_t = double(block.L);
        expect_statement(*device, "global and segment means, " + name,
                         between(n_i * n_t / (n_i + n_t)),
                         {{"one mean is both", between(0)}, {"n_t for n_i n_t / T", between(n_t)}});
        // The parts are not orthogonal as matrices: G_mean^2 + G_ctr^2 is not ||dW||^2.
        Dense mean = delta_T * J * writer.y, rest = writer.dW - mean;
        EXPECT_GT(std::abs(inner(mean, rest)) / (norm(mean) * norm(rest)), 1e-3) << name;
      }
    }
}

// What has no mean within segments has none globally (J J_seg = J): at alpha = 0 both counts of the
// mean-coherent gradient are zero, up to the rounding of delta in T.
template <class Real>
double mean_coherent(Device& device, bool by_segments, const char* residual, double alpha,
                     const char* means = "segment") {
  OneBlock<Real> block(device, residual, means);
  if (residual == std::string("mvsplit")) block.set_alpha(alpha);
  Dense J = mean_over(by_segments ? block.segments() : block.sequences());
  double largest = 0;
  for (const auto& writer : block.run()) {
    double size = 0;  // of dW, were all its terms aligned
    for (size_t i = 0; i < writer.y.rows; ++i)
      size += norm(rows_of(writer.y, i, 1)) * norm(rows_of(writer.delta, i, 1));
    largest = std::max(largest, norm(transpose(J * writer.delta) * (J * writer.y)) / size);
  }
  return largest;
}
template <class Real>
void check_alpha_zero(Device& device, const char* precision, double rounding) {
  for (bool by_segments : {true, false}) {
    auto coherent = [&](const char* residual, double alpha) {
      return mean_coherent<Real>(device, by_segments, residual, alpha);
    };
    std::vector<Mutation> mutations = {{"alpha = 0.1", coherent("mvsplit", 0.1)},
                                       {"Post-Norm", coherent("postnorm", 0)},
                                       {"LayerScale", coherent("layerscale", 0)}};
    double global = mean_coherent<Real>(device, by_segments, "mvsplit", 0, "global");
    if (by_segments)
      mutations.push_back({"a merge of the global mean: the segments' only cancel", global});
    else
      EXPECT_LE(global, rounding);
    expect_statement(device,
                     std::string("alpha = 0, ") +
                         (by_segments ? "segment means, " : "global mean, ") + precision,
                     coherent("mvsplit", 0), mutations, rounding);
  }
}
TEST(Statement, AlphaZeroHasNoMeanCoherentGradient) {
  for (Device* device : devices()) {
    check_alpha_zero<double>(*device, "fp64", 1e-15);
    check_alpha_zero<float>(*device, "fp32", 0x1p-24);  // half a unit in the last place of delta
    check_alpha_zero<bf16>(*device, "bf16", 0x1p-9);
  }
}

// The pairs of (19)-(26): w_t = |delta_t| |y_t| and M_ts = cos(delta_t, delta_s) cos(y_t, y_s).
struct Alignment {
  Dense w, M;          // (T, 1), (T, T)
  double A;            // ||dW||^2 / sum_t w_t^2
  double kappa, khat;  // means over s != t of M_ts, of |M_ts|
  double weighted;     // mean of |M_ts| with weights w_t w_s

  static Dense cosines(const Dense& x) {
    Dense c = x * transpose(x), out = c;
    for (size_t s = 0; s < x.rows; ++s)
      for (size_t t = 0; t < x.rows; ++t) out(s, t) /= std::sqrt(c(s, s) * c(t, t));
    return out;
  }
  Alignment(const Dense& y, const Dense& delta, const Dense& dW)
      : w(y.rows, 1), M(cosines(delta)), A(0), kappa(0), khat(0), weighted(0) {
    Dense cos_y = cosines(y);
    double n = double(y.rows), weights = 0;
    for (size_t i = 0; i < M.v.size(); ++i) M.v[i] *= cos_y.v[i];
    for (size_t t = 0; t < y.rows; ++t)
      w(t, 0) = norm(rows_of(y, t, 1)) * norm(rows_of(delta, t, 1));
    for (size_t s = 0; s < y.rows; ++s)
      for (size_t t = 0; t < y.rows; ++t) {
        if (s == t) continue;
        kappa += M(s, t) / (n * (n - 1)), khat += std::abs(M(s, t)) / (n * (n - 1));
        weighted += w(s, 0) * w(t, 0) * std::abs(M(s, t)), weights += w(s, 0) * w(t, 0);
      }
    weighted /= weights;
    A = inner(dW, dW) / inner(w, w);
  }
};
// dW of unit vectors in the directions of y and delta, or of those times given magnitudes.
Alignment alignment_of(Device& device, Dense y, Dense delta, const std::vector<double>& magnitude) {
  for (Dense* x : {&y, &delta})
    for (size_t t = 0; t < x->rows; ++t) {
      double length = norm(rows_of(*x, t, 1));
      for (size_t k = 0; k < x->cols; ++k) (*x)(t, k) *= magnitude[t] / length;
    }
  Tensor Y = Tensor::of<double>(device, y.v.size()), G = Tensor::of<double>(device, delta.v.size());
  Tensor dW = Tensor::of<double>(device, y.cols * delta.cols);
  Y.set(y.v), G.set(delta.v);
  linear_backward_weight(device, dW.data<double>(), G.data<double>(), Y.data<double>(), y.rows,
                         delta.cols, y.cols, false);
  return {y, delta, {delta.cols, y.cols, dW.get()}};
}

TEST(Statement, Eq19_26_EnergyIdentity) {
  for (Device* device : devices())
    for (const char* residual : {"postnorm", "mvsplit"}) {
      OneBlock<double> block(*device, residual);
      for (const auto& writer : block.run()) {
        Alignment a(writer.y, writer.delta, writer.dW);
        auto identity_of = [&](const Dense& M) {
          return std::abs((transpose(a.w) * M * a.w)(0, 0) / inner(a.w, a.w) - a.A) / a.A;
        };
        Dense cos_y = Alignment::cosines(writer.y), cos_delta = Alignment::cosines(writer.delta);
        Dense absolute = a.M, flipped = a.M;
        for (double& x : absolute.v) x = std::abs(x);
        for (size_t i = 0; i < a.M.v.size(); ++i) flipped.v[i] *= i % (a.M.cols + 1) ? -1 : 1;
        std::string name = std::string(residual) + (writer.y.cols == block.D ? " W_O" : " W2");
        expect_statement(*device, "(19)-(26) " + name, identity_of(a.M),
                         {{"absolute cosines", identity_of(absolute)},
                          {"cosines of delta alone", identity_of(cos_delta)},
                          {"product of the matrices", identity_of(cos_delta * cos_y)},
                          {"no cross terms", identity_of(identity(a.M.rows))}});
        // A symmetric M is positive semidefinite just if its singular values add up to its trace.
        auto negative = [&](const Dense& M) {
          double sum = 0, trace = 0;
          for (double s : singular_values(M.v, M.rows)) sum += s;
          for (size_t t = 0; t < M.rows; ++t) trace += M(t, t);
          return (sum - trace) / trace;
        };
        expect_statement(
            *device, "M is PSD, " + name, negative(a.M),
            {{"signs of the pairs flipped", negative(flipped)},
             {"a difference for the product", negative(cos_delta - cos_y + identity(a.M.rows))}});
      }
    }
}

TEST(Statement, Eq30_EqualMagnitudes) {
  for (Device* device : devices()) {
    OneBlock<double> block(*device, "mvsplit");
    for (const auto& writer : block.run()) {
      double others = double(writer.y.rows - 1);
      std::vector<double> equal(writer.y.rows, 1.0);
      Alignment a = alignment_of(*device, writer.y, writer.delta, equal);
      Alignment unequal(writer.y, writer.delta, writer.dW);
      auto residual = [&](const Alignment& x, double kappa, double count) {
        return std::abs(x.A - 1 - count * kappa) / x.A;
      };
      std::string name = writer.y.cols == block.D ? "W_O" : "W2";
      expect_statement(*device, "(30) " + name, residual(a, a.kappa, others),
                       {{"T for T - 1", residual(a, a.kappa, others + 1)},
                        {"absolute values", residual(a, a.khat, others)},
                        {"unequal magnitudes", residual(unequal, unequal.kappa, others)}});
    }
  }
}

// |A - 1| <= (T-1) khat. khat has to be weighted by w_t w_s; where magnitudes are equal that is the
// plain mean of |M_ts|, and where they are not the plain mean is no bound.
TEST(Statement, Eq31_32_Envelope) {
  // How far |A - 1| is beyond (T-1) khat, in parts of itself.
  auto beyond = [](const Alignment& x, double khat, double others) {
    return std::max(0.0, 1 - others * khat / std::abs(x.A - 1));
  };
  for (Device* device : devices()) {
    OneBlock<double> block(*device, "mvsplit");
    block.set_alpha(0);  // centered adjoints: A < 1, kappa < 0
    size_t T = block.B * block.length();
    double others = double(T - 1);
    std::vector<double> equal(T, 1.0), two(T, 1e-3);
    // Two tokens that agree and outweigh all others: A = 2, whatever T is.
    two[0] = two[1] = 1;
    Dense x = random_dense(T, 64, 52);
    ASSERT_GT(T, 1u);
    for (size_t k = 0; k < x.cols; ++k) x(1, k) = two[1] * x(0, k);
    Alignment pair = alignment_of(*device, x, x, two);
    // All alike: the envelope is reached.
    Dense same = Dense(T, 1, equal) * random_dense(1, 16, 53);
    Alignment aligned = alignment_of(*device, same, same, equal);
    EXPECT_NEAR(pair.A, 2, 1e-3);
    EXPECT_NEAR(aligned.A, double(T), 1e-10);
    for (const auto& writer : block.run()) {
      Alignment a = alignment_of(*device, writer.y, writer.delta, equal);
      Alignment unequal(writer.y, writer.delta, writer.dW);
      double largest = beyond(a, a.khat, others);
      for (const Alignment* x : {&a, &unequal, &pair, &aligned})
        largest = std::max(largest, beyond(*x, x->weighted, others));
      std::string name = writer.y.cols == block.D ? "W_O" : "W2";
      expect_statement(*device, "(31)-(32) " + name, largest,
                       {{"plain mean, unequal magnitudes", beyond(pair, pair.khat, others)},
                        {"kappa for khat", beyond(a, a.kappa, others)},
                        {"T - 2 for T - 1", beyond(aligned, aligned.khat, others - 1)}});
    }
  }
}

// ||dW|| of a writer behind a merge, against T: tokens are a common vector, times `common`, plus
// noise of their own, in X, F, G and y alike.
double growth(Device& device, Merge merge, double alpha, double common) {
  std::vector<double> lengths, norms;
  const size_t D = 32;
  for (size_t T = 16; T <= 1024; T *= 2) {
    Tokens tokens{1, T / 4 * 3, T / 4};
    auto tokens_like = [&](uint64_t seed) {
      Tensor x = Tensor::random<double>(device, T * D, seed, common ? 0.3 : 1);
      std::vector<double> values = x.get(), shared = random_values(D, seed + 100, common);
      for (size_t i = 0; i < values.size(); ++i) values[i] += shared[i % D];
      x.set(values);
      return x;
    };
    Tensor X = tokens_like(1), F = tokens_like(2), G = tokens_like(3), y = tokens_like(4);
    auto of = [&](size_t n) { return Tensor::of<double>(device, n); };
    Tensor next = of(T * D), dX = of(T * D), dF = of(T * D), dW = of(D * D), r = of(T), q = of(T);
    Tensor means[4] = {of(2 * D), of(2 * D), of(2 * D), of(2 * D)}, dgains[2] = {of(D), of(D)};
    Tensor gain = of(D), one = of(D);
    gain.set(std::vector<double>(D, alpha)), one.set(std::vector<double>(D, 1.0));
    Gates<const double> gates{merge, {gain.data<double>(), one.data<double>()}};
    Gates<double> dgates{merge, {dgains[0].data<double>(), dgains[1].data<double>()}};
    MergeSaved<double> saved{r.data<double>(), means[0].data<double>(), means[1].data<double>()};
    Tensor partial = of(8 * partial_sums(tokens, D));
    MergeScratch<double> scratch{q.data<double>(), means[2].data<double>(), means[3].data<double>(),
                                 reinterpret_cast<Pair<Quad<double>>*>(partial.data<double>())};
    MergeShape shape{tokens, D, 1e-6};
    merge_forward(device, next.data<double>(), saved, X.data<double>(), F.data<double>(), gates,
                  shape);
    Beside beside(device);
    merge_backward(
        beside, dX.data<double>(), dF.data<double>(), dgates, scratch,
        {G.data<double>(), next.data<double>(), X.data<double>(), F.data<double>(), gates, saved},
        shape, false);
    linear_backward_weight(device, dW.data<double>(), dF.data<double>(), y.data<double>(), T, D, D,
                           false);
    lengths.push_back(double(T));
    norms.push_back(norm({D, D, dW.get()}));
  }
  return log_slope(lengths, norms);
}

TEST(Statement, SqrtTAndTScaling) {
  // ||dW||^2 of independent tokens varies by about sqrt(2) / D of itself, the slope through seven
  // points over a factor of 64 therefore by 0.01. Centering takes two tokens, one a segment, which
  // over these T adds 0.01.
  for (Device* device : devices()) {
    auto slope = [&](Merge merge, double alpha, double common) {
      return growth(*device, merge, alpha, common);
    };
    double apart = slope(merge_of<PostNorm>, 0, 0), alike = slope(merge_of<PostNorm>, 0, 1);
    double split = slope(merge_of<MvSplit>, 0, 1), leaking = slope(merge_of<MvSplit>, 0.5, 1);
    double scaled = slope(merge_of<LayerScale>, 0.01, 1);
    auto off = [](double a, double b) { return std::abs(a - b); };
    expect_statement(*device, "sqrt(T): tokens unlike, Post-Norm", off(apart, 0.5),
                     {{"T", off(apart, 1)}}, 0.03);
    expect_statement(*device, "T: tokens alike, Post-Norm", off(alike, 1),
                     {{"sqrt(T)", off(alike, 0.5)}}, 0.03);
    expect_statement(*device, "sqrt(T): tokens alike, MV-Split at alpha = 0", off(split, 0.5),
                     {{"alpha = 0.5", off(leaking, 0.5)},
                      {"LayerScale", off(scaled, 0.5)},
                      {"T", off(split, 1)}},
                     0.03);
    expect_statement(*device, "T: tokens alike, LayerScale", off(scaled, 1),
                     {{"alpha = 0", off(split, 1)}}, 0.03);
  }
}

// The gradient dS of a head's scores, diag(a) - a a^T row by row on dA = G V^T.
Dense score_gradient(const Dense& A, const Dense& G, const Dense& V) {
  Dense dA = G * transpose(V), dS = dA;
  for (size_t i = 0; i < A.rows; ++i) {
    double mean = inner(rows_of(A, i, 1), rows_of(dA, i, 1));
    for (size_t j = 0; j < A.cols; ++j) dS(i, j) = A(i, j) * (dA(i, j) - mean);
  }
  return dS;
}

TEST(Statement, Lemma1_EqualValuesStopQueriesAndKeys) {
  for (Device* device : devices()) {
    OneBlock<double> block(*device, "postnorm");
    block.run();
    size_t T = block.length(), hd = block.net.config.head_dim();
    Heads heads{1, T, 1, hd};
    const Dense A = block.attention(0, 0), Q = block.part(0, 0, 0), K = block.part(1, 0, 0);
    const Dense V = block.part(2, 0, 0), vbar = mean_over({T}) * V, spread = V - vbar;
    Dense image_text = mean_over({block.N, block.L}) * V;
    // dQ and dK by attention_backward() on the block's own Q and K with values V.
    AttentionOp op = attention_op<double>(*device, heads);
    Dense G(T, hd, op.cotangent.get());
    auto query_key = [&](const Dense& values) {
      std::vector<double> qkv;
      for (size_t t = 0; t < T; ++t)
        for (const Dense* x : {&Q, &K, &values})
          qkv.insert(qkv.end(), x->v.begin() + std::ptrdiff_t(t * hd),
                     x->v.begin() + std::ptrdiff_t((t + 1) * hd));
      op.inputs[0].value.set(qkv);
      op.forward(), op.backward();
      Dense d(T, 3 * hd, op.inputs[0].gradient.get());
      double squares = 0;
      for (size_t t = 0; t < T; ++t)
        for (size_t k = 0; k < 2 * hd; ++k) squares += d(t, k) * d(t, k);
      return std::sqrt(squares);
    };
    double alive = query_key(V);
    expect_statement(*device, "Lemma 1: dQ, dK", query_key(vbar) / alive,
                     {{"values that differ by 1e-9", query_key(vbar + 1e-9 * spread) / alive},
                      {"equal within segments", query_key(image_text) / alive}});
    auto scores = [&](const Dense& values) { return norm(score_gradient(A, G, values)); };
    expect_statement(*device, "Lemma 1: dS", scores(vbar) / scores(V),
                     {{"values that differ by 1e-9", scores(vbar + 1e-9 * spread) / scores(V)},
                      {"equal within segments", scores(image_text) / scores(V)}});
    // On the way there dS is proportional to the spread, being linear in V and zero at vbar. At
    // 1e-8 rounding is 1e-8 of it: the slope is 1 to about 1e-9.
    std::vector<double> spreads, dS, dQK;
    for (double e = 1; e > 1e-8; e /= 10) {
      spreads.push_back(e);
      dS.push_back(scores(vbar + e * spread)), dQK.push_back(query_key(vbar + e * spread));
    }
    double slope = log_slope(spreads, dS), slope_qk = log_slope(spreads, dQK);
    expect_statement(*device, "||dS|| ~ spread of V", std::abs(slope - 1),
                     {{"its square", std::abs(slope - 2)}}, 1e-7);
    expect_statement(*device, "||dQ, dK|| ~ spread of V", std::abs(slope_qk - 1),
                     {{"its square", std::abs(slope_qk - 2)}}, 1e-7);
  }
}

TEST(Statement, SoftmaxJacobianHasNullSpaceOfConstants) {
  for (Device* device : devices()) {
    OneBlock<double> block(*device, "postnorm");
    block.run();
    size_t n = block.length();
    Dense one(n, 1, std::vector<double>(n, 1.0)), A = block.attention(1, 1);
    // M 1 = 0, and the next eigenvalue is at least the smallest a_j: eigenvalues of diag(a) - a a^T
    // and of diag(a) interlace.
    auto residual = [&](const Dense& M, const Dense& a) {
      std::vector<double> s = singular_values(M.v, n);
      double least = *std::min_element(a.v.begin(), a.v.end());
      return norm(M * one) / s[0] + s[n - 1] / s[0] + std::max(0.0, 1 - s[n - 2] / least);
    };
    double right = 0;
    std::vector<Mutation> wrong = {
        {"diag(a)", HUGE_VAL}, {"a a^T", HUGE_VAL}, {"rows that sum to 1.01", HUGE_VAL}};
    for (size_t i = 0; i < n; ++i) {
      Dense a = rows_of(A, i, 1), outer = transpose(a) * a, D = diagonal(a.v);
      right = std::max(right, residual(D - outer, a));
      double r[] = {residual(D, a), residual(outer, a), residual(1.01 * D - 1.0201 * outer, a)};
      for (size_t k = 0; k < 3; ++k) wrong[k].residual = std::min(wrong[k].residual, r[k]);
    }
    expect_statement(*device, "null space of diag(a) - a a^T", right, wrong);
  }
}

// A block whose tokens have all become alike.
TEST(Statement, Eq39_WriterGradientsOutliveTheValues) {
  for (Device* device : devices()) {
    OneBlock<double> block(*device, "postnorm");
    Dense X = block.input(), J = mean_over(block.sequences()), J_seg = mean_over(block.segments());
    block.run();
    double alive = norm(block.query_key_gradient());
    // The writer's gradient against its mean part alone, and Q's and K's against that of X.
    std::vector<double> writer[2], query_key;
    for (const Dense& x : {J * X, X, J_seg * X}) {
      block.set_input(x);
      auto both = block.run();
      for (int k = 0; k < 2; ++k)
        writer[k].push_back(difference(transpose(J * both[k].delta) * (J * both[k].y), both[k].dW));
      query_key.push_back(norm(block.query_key_gradient()) / alive);
      for (const auto& w : both) EXPECT_GT(norm(w.dW), 0.1);
    }
    const char* names[] = {"(39) dW_O = dW_mu", "(39) dW_2 = dW_mu"};
    for (int k = 0; k < 2; ++k)
      expect_statement(
          *device, names[k], writer[k][0],
          {{"tokens that differ", writer[k][1]}, {"image and text differ", writer[k][2]}});
    expect_statement(
        *device, "(39) dW_Q, dW_K = 0", query_key[0],
        {{"tokens that differ", query_key[1]}, {"image and text differ", query_key[2]}});
    // Behind MV-Split at alpha = 0 such a block's writers get nothing: dW_mu is all there is.
    OneBlock<double> split(*device, "mvsplit");
    split.set_alpha(0), split.set_input(J * X);
    for (const auto& w : split.run()) EXPECT_LE(norm(w.dW), 1e-13);
  }
}

// ---------------------------------------------------------------------------------------------
// Diagnostics

// Row-stochastic matrices (batch, n, n); with `sink`, all tokens look mostly at number 0.
std::vector<double> stochastic(size_t batch, size_t n, double spread, bool sink) {
  std::vector<double> a = random_values(batch * n * n, 40, spread);
  for (size_t row = 0; row < batch * n; ++row) {
    double sum = 0;
    for (size_t j = 0; j < n; ++j) {
      double& x = a[row * n + j];
      sum += x = std::exp(x + (sink && j == 0 ? 5 + 0.2 * x : 0));
    }
    for (size_t j = 0; j < n; ++j) a[row * n + j] /= sum;
  }
  return a;
}
// L A R with L, R either P or the identity.
std::vector<double> projected(const double* a, size_t n, bool left, bool right) {
  std::vector<double> m(a, a + n * n);
  for (size_t i = 0; i < n && left; ++i) {
    double sum = 0;
    for (size_t k = 0; k < n; ++k) sum += m[k * n + i];
    for (size_t k = 0; k < n; ++k) m[k * n + i] -= sum / double(n);
  }
  for (size_t i = 0; i < n && right; ++i) {
    double sum = 0;
    for (size_t k = 0; k < n; ++k) sum += m[i * n + k];
    for (size_t k = 0; k < n; ++k) m[i * n + k] -= sum / double(n);
  }
  return m;
}

template <class Acc>
std::vector<double> centered_norms_of(Device& device, const std::vector<double>& matrices,
                                      size_t batch, size_t n) {
  Tensor a = Tensor::of<Acc>(device, matrices.size()), c = Tensor::of<Acc>(device, matrices.size());
  Tensor m = Tensor::of<Acc>(device, matrices.size()), x = Tensor::of<Acc>(device, batch * 2 * n);
  Tensor norms = Tensor::of<double>(device, batch);
  a.set(matrices);
  centered_norms(device, norms.data<double>(), a.data<Acc>(), c.data<Acc>(), m.data<Acc>(),
                 x.data<Acc>(), batch, n);
  return norms.get();
}

TEST(Diagnostics, MeansAreOverWhatIsDefined) {
  const std::vector<double> some = {1, NAN, 3, NAN, 8}, none = {NAN, NAN};
  auto mean = [](const std::vector<double>& x) {
    return mean_of(x.size(), [&](size_t i) { return x[i]; });
  };
  EXPECT_EQ(mean(some), 4);
  EXPECT_TRUE(std::isnan(mean(none)));
}

// An FFN wider than the trunk makes W2's arrays the larger ones. Both writers take their turn.
TEST(Diagnostics, WritersHaveRoomForTheLargerOne) {
  MeasuredSizes sizes{small(1), 3, 3};
  Carver both, apart[2];
  WritersMeasured<float>().lay(both, sizes);
  for (int w : {0, 1})
    WriterScratch<float>().lay(apart[w], sizes.tokens(), w ? 24 : 16, sizes.config.width);
  EXPECT_GT(apart[1].used, apart[0].used);
  EXPECT_EQ(both.used, apart[1].used);
}

// Of three samples and two heads the largest is neither the first nor the last.
TEST(Diagnostics, TheLargestMuEffIsOfAll) {
  MeasuredSizes sizes{small(1), 3, 3};
  std::vector<double> numbers(AttentionMeasured<double>::count(sizes), 1.0);
  const double norms[] = {0.2, 0.1, NAN, 0.9, 0.3, 0.4};
  std::copy(std::begin(norms), std::end(norms), numbers.begin() + 4 * 6);
  std::map<std::string, double> got;
  AttentionMeasured<double>::read(
      numbers.data(), 0, sizes,
      [&](const std::string& name, const std::string&, double value) { got[name] = value; });
  EXPECT_EQ(got.at("mu_eff_max"), 0.9);
  EXPECT_DOUBLE_EQ(got.at("mu_eff"), 1.9 / 5);
}

// Against singular values of the whole P A P. Power iteration is a lower bound, and slow where the
// two largest singular values are close.
TEST(Diagnostics, PowerIterationFindsTheNormOfPAP) {
  for (Device* device : devices())
    for (size_t n : {5, 40, 72})
      for (double spread : {1e-3, 0.1, 1.0, 3.0})
        for (bool sink : {false, true}) {
          std::vector<double> a = stochastic(3, n, spread, sink);
          std::vector<double> norms = centered_norms_of<double>(*device, a, 3, n);
          std::vector<double> rough = centered_norms_of<float>(*device, a, 3, n);
          std::vector<float> rounded(a.begin(), a.end());  // which alone costs up to 1e-3
          std::vector<double> same =
              centered_norms_of<double>(*device, {rounded.begin(), rounded.end()}, 3, n);
          for (size_t b = 0; b < 3; ++b) {
            const double* matrix = &a[b * n * n];
            double exact = spectral_norm(projected(matrix, n, true, true), n);
            double error = norms[b] / exact - 1;
            EXPECT_LE(error, 1e-12) << "a lower bound";
            EXPECT_GE(error, -1e-4) << n << " tokens, spread " << spread << " sink " << sink;
            EXPECT_NEAR(rough[b] / same[b], 1, 1e-4);
            EXPECT_NEAR(spectral_norm(projected(matrix, n, true, false), n) / exact, 1, 1e-12)
                << "P A = P A P";
            if (!sink) continue;
            EXPECT_GT(spectral_norm(projected(matrix, n, false, true), n) / exact, 1.01)
                << "without the left P";
          }
        }
}

// Arrays of one block as the observer saw them, in plain doubles.
struct Seen {
  std::vector<double> X, F, qkv, y, delta;
};

struct Energies {
  double mean, centered;
  double total() const { return mean + centered; }
};
Energies energies(const double* x, size_t n, size_t D) {
  Energies e{0, 0};
  for (size_t d = 0; d < D; ++d) {
    double mean = 0;
    for (size_t t = 0; t < n; ++t) mean += x[t * D + d] / double(n);
    e.mean += double(n) * mean * mean;
    for (size_t t = 0; t < n; ++t) e.centered += (x[t * D + d] - mean) * (x[t * D + d] - mean);
  }
  return e;
}

// rho, tr, vargain and tcs of one sample, by their definitions.
std::vector<double> plain_states(const double* X, const double* F, size_t n, size_t D) {
  Energies x = energies(X, n, D), f = energies(F, n, D);
  double cosines = 0;
  for (size_t t = 0; t < n; ++t)
    for (size_t s = 0; s < n; ++s) {
      double ts = 0, tt = 0, ss = 0;
      for (size_t d = 0; d < D; ++d) {
        ts += X[t * D + d] * X[s * D + d];
        tt += X[t * D + d] * X[t * D + d], ss += X[s * D + d] * X[s * D + d];
      }
      if (s != t) cosines += ts / std::sqrt(tt * ss) / double(n * (n - 1));
    }
  return {std::sqrt(x.mean / x.centered), std::sqrt(f.total() / x.total()),
          std::sqrt(f.centered / x.centered), cosines};
}

// |A v| after five steps v = P A^T A v, v of length 1, of one head of one sample.
double plain_uncentered_norm(const Dense& A) {
  size_t n = A.rows;
  Dense v(n, 1), P = identity(n) - mean_over({n});
  for (size_t i = 0; i < n; ++i) v(i, 0) = gaussian(0, streams::check, i);
  for (int step = 0; step <= 5; ++step) {
    if (step > 0) v = transpose(A) * (A * v);
    v = P * v;
    v = 1 / norm(v) * v;
  }
  return norm(A * v);
}

// mu_eff, row diversity, retention, leakage and the author's mu_eff of one head of one sample.
std::vector<double> plain_attention(const double* X, const double* qkv, Heads heads, size_t head,
                                    size_t D) {
  size_t n = heads.length;
  std::vector<double> a(n * n), centered = {X, X + n * D}, moved(n * D);
  for (size_t i = 0; i < n; ++i) {
    double sum = 0;
    for (size_t j = 0; j < n; ++j) {
      for (size_t k = 0; k < heads.dim; ++k)
        a[i * n + j] += qkv[(i * 3 * heads.count + head) * heads.dim + k] *
                        qkv[((j * 3 + 1) * heads.count + head) * heads.dim + k];
      sum += a[i * n + j] = std::exp(a[i * n + j] / std::sqrt(double(heads.dim)));
    }
    for (size_t j = 0; j < n; ++j) a[i * n + j] /= sum;
  }
  for (size_t d = 0; d < D; ++d) {
    double mean = 0;
    for (size_t t = 0; t < n; ++t) mean += X[t * D + d] / double(n);
    for (size_t t = 0; t < n; ++t) centered[t * D + d] -= mean;
  }
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < n; ++j)
      for (size_t d = 0; d < D; ++d) moved[i * D + d] += a[i * n + j] * centered[j * D + d];
  Energies A = energies(a.data(), n, n), z = energies(moved.data(), n, D);
  double before = energies(X, n, D).centered;
  return {spectral_norm(projected(a.data(), n, true, true), n), std::sqrt(A.centered / A.total()),
          std::sqrt(z.centered / before), std::sqrt(z.mean / before),
          plain_uncentered_norm({n, n, a})};
}

// The author's g_mean, g_ctr, A and kappa of a writer: input y, adjoint delta, `batch` sequences of
// which the first `image` tokens are image tokens.
std::vector<double> plain_author(const Dense& y, const Dense& delta, size_t batch, size_t image) {
  Dense J = mean_over(std::vector<size_t>(batch, y.rows / batch)), ybar = J * y, dbar = J * delta;
  double own = 0, cosines = 0;
  for (size_t t = 0; t < image; ++t)
    for (size_t s = 0; s < image; ++s) {
      auto products = [&](size_t a, size_t b) {
        return inner(rows_of(y, a, 1), rows_of(y, b, 1)) *
               inner(rows_of(delta, a, 1), rows_of(delta, b, 1));
      };
      if (t == s)
        own += products(t, t);
      else
        cosines += std::abs(products(t, s)) / std::sqrt(products(t, t) * products(s, s));
    }
  double dW = norm(transpose(rows_of(delta, 0, image)) * rows_of(y, 0, image));
  return {norm(transpose(dbar) * ybar), norm(transpose(delta - dbar) * (y - ybar)), dW * dW / own,
          cosines / double(image * (image - 1))};
}

// A network of four layers and three samples, of which two are measured in layers 1 and 3.
template <class Real>
struct Diagnosed {
  Filled<Real> filled;
  Diagnostics<Real> diagnostics;
  std::unique_ptr<Slab> slab;
  std::map<std::pair<size_t, int>, Seen> seen;
  std::vector<AccOf<Real>> gradients;

  Diagnosed(Device& device, const Config& config, size_t recompute, bool all = true)
      : filled(device, config, 3, recompute), diagnostics(config, {1, 3}, 2, 3) {
    Carver count;
    diagnostics.lay(count);
    slab = std::make_unique<Slab>(device, count.used);
    Carver carver{slab->data};
    diagnostics.lay(carver);
    Network<Real>& net = *filled.net;
    net.forward(3);
    net.backward(3, false, true,
                 [&](size_t block, int writer, const BlockSaved<Real>& s, const Real* delta) {
                   diagnostics.observe(device, block, writer, s, delta, all);
                   see(device, seen[{block, writer}], writer, s, delta);
                 });
    diagnostics.gradients(device, locate<AccOf<Real>>(config, net.table, net.gradients()));
    gradients.resize(net.table.size);
    device.download(gradients.data(), net.gradients(), gradients.size() * sizeof(AccOf<Real>));
  }

  void see(Device& device, Seen& to, int writer, const BlockSaved<Real>& s, const Real* delta) {
    const Config& c = filled.net->config;
    size_t rows = 3 * c.tokens();
    auto keep = [&](std::vector<double>& out, const Real* from, size_t width) {
      std::vector<Real> host(rows * width);
      device.download(host.data(), from, host.size() * sizeof(Real));
      out.assign(host.begin(), host.end());
    };
    keep(to.X, writer ? s.X1 : s.X, c.width), keep(to.F, writer ? s.F2 : s.F1, c.width);
    keep(to.qkv, s.qkv, 3 * c.width), keep(to.delta, delta, c.width);
    keep(to.y, writer ? s.hidden : s.Y, writer ? c.ffn : c.width);
  }

  std::map<std::string, double> readings(Device& device, size_t slot) const {
    std::map<std::string, double> values;
    auto rows = diagnostics.read(device);
    for (const Reading& r : rows[slot]) values[r.name] = r.value;
    return values;
  }
};

template <class Real>
void check_diagnostics(Device& device, double tolerance) {
  Config config = small(4);
  Diagnosed<Real> d(device, config, 3);
  size_t n = config.tokens(), D = config.width, squares = D * D;
  for (size_t slot = 0; slot < 2; ++slot) {
    size_t layer = d.diagnostics.layers[slot];
    std::map<std::string, double> got = d.readings(device, slot), want;
    for (int writer : {0, 1}) {
      const Seen& s = d.seen.at({layer, writer});
      std::string branch = writer ? "ffn_" : "attention_";
      const char* names[] = {"rho", "tr", "vargain", "tcs"};
      const char* writer_columns[] = {"g_mean", "g_ctr", "amplification", "khat"};
      for (size_t b = 0; b < 2; ++b) {
        std::vector<double> values = plain_states(&s.X[b * n * D], &s.F[b * n * D], n, D);
        for (size_t i = 0; i < 4; ++i) want[branch + names[i]] += values[i] / 2;
        size_t width = writer ? config.ffn : D;
        auto rows = [&](const std::vector<double>& x, size_t width) {
          auto from = x.begin() + ptrdiff_t(b * n * width);
          return Dense(n, width, {from, from + ptrdiff_t(n * width)});
        };
        auto modes = plain_writer(rows(s.y, width), rows(s.delta, D));
        for (size_t i = 0; i < 4; ++i) want[branch + writer_columns[i]] += modes[i] / 2;
      }
      std::vector<double> author = plain_author({3 * n, s.y.size() / (3 * n), s.y},
                                                {3 * n, D, s.delta}, 3, config.image_tokens());
      const char* of_author[] = {"g_mean_author", "g_ctr_author", "amplification_author",
                                 "kappa_author"};
      for (size_t i = 0; i < 4; ++i) want[branch + of_author[i]] = author[i];
    }
    const Seen& s = d.seen.at({layer, 0});
    const char* names[] = {"mu_eff", "row_diversity", "retention", "leakage", "mu_eff_author"};
    Heads heads{2, n, config.heads, config.head_dim()};
    for (size_t b = 0; b < 2; ++b)
      for (size_t head = 0; head < heads.count; ++head) {
        std::vector<double> values =
            plain_attention(&s.X[b * n * D], &s.qkv[b * n * 3 * D], heads, head, D);
        for (size_t i = 0; i < 5; ++i) want[names[i]] += values[i] / double(2 * heads.count);
        want["mu_eff_max"] = std::max(want["mu_eff_max"], values[0]);
      }
    const Table& table = d.filled.net->table;
    for (const char* part : {"q", "k"}) {
      std::string name = "blocks." + std::to_string(layer) + ".operator." + part + "_proj.weight";
      const AccOf<Real>* gradient = &d.gradients[table.at(name).offset];
      double sum = 0;
      for (size_t i = 0; i < squares; ++i) sum += double(gradient[i]) * double(gradient[i]);
      want[part + std::string("_grad_rms")] = std::sqrt(sum / double(squares));
    }
    EXPECT_EQ(got.size(), 32u);
    EXPECT_EQ(want.size(), got.size());
    for (const auto& [name, value] : want) {
      bool power = name.rfind("mu_eff", 0) == 0;
      EXPECT_NEAR(got.at(name) / value, 1, power ? 1e-4 : tolerance) << name << " layer " << layer;
    }
    for (const auto& [name, value] : got) EXPECT_TRUE(std::isfinite(value)) << name;
    EXPECT_GT(std::abs(got.at("mu_eff") / got.at("mu_eff_max") - 1), 1e-3);
    // What the check would not miss: 1 counted among the cosines, nothing centered, two exchanges.
    double tokens = double(n);
    const std::pair<const char*, double> wrong[] = {
        {"attention_tcs", want["attention_tcs"] * (tokens - 1) / tokens + 1 / tokens},
        {"retention", std::hypot(want["retention"], want["leakage"])},
        {"row_diversity", 1},
        {"attention_rho", want["ffn_rho"]},
        {"q_grad_rms", want["k_grad_rms"]},
        {"ffn_g_mean_author", want["ffn_g_mean"]},
        {"mu_eff_author", want["mu_eff"]},
    };
    for (const auto& [name, value] : wrong)
      EXPECT_GT(std::abs(got.at(name) / value - 1), 10 * tolerance) << name;
  }
  EXPECT_NE(d.readings(device, 0), d.readings(device, 1));
}
TEST(Diagnostics, ReadingsFollowTheirDefinitions) {
  for (Device* device : devices()) {
    SCOPED_TRACE(device->name);
    check_diagnostics<double>(*device, 1e-11);
    check_diagnostics<float>(*device, 1e-4);
    check_diagnostics<bf16>(*device, 1e-4);
  }
}

// The observer sees the same numbers with and without recomputation, and changes none.
template <class Real>
void check_bits(Device& device) {
  Config config = small(4);
  std::vector<AccOf<Real>> plain = Filled<Real>(device, config, 3, 0).run();
  plain.resize(parameter_table(config).size);
  Diagnosed<Real> kept(device, config, 0), replayed(device, config, 1),
      some(device, config, 0, false);
  for (const Diagnosed<Real>* d : {&kept, &replayed, &some})
    EXPECT_TRUE(same_bits(plain, d->gradients));
  EXPECT_EQ(kept.readings(device, 0), replayed.readings(device, 0));
  EXPECT_EQ(kept.readings(device, 1).at("ffn_g_ctr"), some.readings(device, 1).at("ffn_g_ctr"));
}
TEST(Diagnostics, ChangeNoBitOfTheGradients) {
  for (Device* device : devices()) {
    SCOPED_TRACE(device->name);
    check_bits<double>(*device), check_bits<float>(*device), check_bits<bf16>(*device);
  }
}
