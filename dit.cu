// dit.cu - the model: a single-stream diffusion transformer, forward and backward by hand.
//
// What it is: each operation with its backward, derived above the two; one block; and the chain of
// blocks with activation checkpointing. What it is not: training (train.cu), or how a branch joins
// the trunk (mvsplit.cu). The model has no AdaLN and no timestep embedding: it reads the noise
// level off its input. Blocks have no biases.
//
// How to read it: straight through to the appendix. Operations in the order of the forward pass (1
// to 3), a block (4), the chain of blocks and its two ends (5). `net`, in 5, is the class Network
// of appendix C: the parameters, arrays and sizes in one place.
//
// Shapes: B sequences of T tokens (N image tokens, then L text tokens) of D channels; H heads of hd
// = D/H channels; an FFN of width ffn. Rows (B T) of any array are its tokens; every weight is
// (out, in) and acts as y = x W^T. The letters of the mathematics are those of mvsplit.cu, but G is
// the cotangent of what an operation puts out; here also Q, K, V, the scores S, and A, attention's.
#pragma once

#include "mvsplit.cu"

#include <functional>
#include <map>
#include <optional>
#include <set>

// ---------------------------------------------------------------------------------------------
// 1. Linear maps
//
// Y = X W^T. With G the cotangent of Y: <G, dX W^T + X dW^T> = <G W, dX> + <G^T X, dW>, so
//     dX = G W,     dW = G^T X = sum_t g_t x_t^T.

// Y (rows, out) = X (rows, in) W^T, W (out, in).
template <class TY, class Real>
void linear_forward(Device& device, TY* Y, const Real* X, const Real* W, size_t rows, size_t out,
                    size_t in) {
  gemm(device, Matrix(Y, out), Matrix(X, in), Matrix(W, in).transpose(), {rows, out, in});
}

// dX (rows, in) = G W, or += if `accumulate`.
template <class TX, class Real>
void linear_backward_input(Device& device, TX* dX, const Real* G, const Real* W, size_t rows,
                           size_t out, size_t in, bool accumulate = false) {
  gemm(device, Matrix(dX, in), Matrix(G, out), Matrix(W, in), {rows, in, out}, 1, accumulate);
}

// dW (out, in) = G^T X, or += if `accumulate`.
template <class Number, class Real>
void linear_backward_weight(Device& device, Number* dW, const Real* G, const Real* X, size_t rows,
                            size_t out, size_t in, bool accumulate) {
  gemm(device, Matrix(dW, in), Matrix(G, out).transpose(), Matrix(X, in), {out, in, rows}, 1,
       accumulate);
}

// Y (rows, n) += bias (n), on each row.
template <class Real>
void bias_forward(const Device& device, Real* Y, const Real* bias, size_t rows, size_t n) {
  using Acc = AccOf<Real>;
  for_each(device, rows * n, [=] HD(size_t i) { Y[i] = Real(Acc(Y[i]) + Acc(bias[i % n])); });
}

// dbias (n) = the sum of the rows of G (rows, n), or += if `accumulate`.
template <class Number, class Real>
void bias_backward(const Device& device, Number* dbias, const Real* G, size_t rows, size_t n,
                   bool accumulate) {
  for_each_team(device, n, Team::max_size, [=] HD(Team team) {
    AccOf<Real> sum = 0;
    for (size_t row = team.rank; row < rows; row += team.size)
      sum += AccOf<Real>(G[row * n + team.index]);
    sum = team.sum(sum);
    if (team.rank == 0) set_or_add(dbias + team.index, sum, accumulate);
  });
}

// ---------------------------------------------------------------------------------------------
// 2. Attention
//
// Q, K, V lie side by side in one (B, T, 3, H, hd) array, as the product with (W_Q; W_K; W_V)
// leaves them. Q and K are rotated and normalised in place; the matrix product walks over heads by
// strides.

struct Heads {
  size_t batch, length, count, dim;  // B, T, H, hd

  HD size_t width() const { return count * dim; }
};

// 2.1 Two-dimensional RoPE and QK-norm
//
// A head's channels are two halves x1, x2 of hd/2 each. Channel j of both halves is a point in a
// plane, which is turned by where the token stands in the patch grid: by its row in the first half
// of the planes, by its column in the others,
//
//     angle_j = row w_j  for j < hd/4,   col w_(j - hd/4)  after that,   w_j = 10000^(-2j/(hd/2)),
//     R x = (x1 c + x2 s, x2 c - x1 s),   c and s the cosine and sine of the angles.
//
// That is by minus the angle, as the released weights were trained; the commoner rotate-half turns
// the other way. Text tokens are not turned. Then RMS-norm over the head, without gain. A rotation
// R keeps the norm and the norm has no gain, so the two commute:
//
//     y = r R x,     r = (|x|^2 / hd + eps)^(-1/2).
//
// Backward. With x' = R x, (Delta) of mvsplit.cu gives dx' = r g - (r^3/hd) <g, x'> x'. Since y = r
// x', this is
//     dx' = r (g - (<g, y> / hd) y)      and      dx = R^T dx':
// the saved y and r are enough, x is not kept.

constexpr double qk_eps = 1e-6, rope_theta = 10000;

// cos and sin (N, hd/2) of each image token's angles.
template <class Acc>
void rope_table(std::vector<Acc>& cosine, std::vector<Acc>& sine, size_t grid_rows,
                size_t grid_columns, size_t head_dim) {
  size_t quarter = head_dim / 4;
  for (size_t n = 0; n < grid_rows * grid_columns; ++n)
    for (size_t j = 0; j < 2 * quarter; ++j) {
      double position = double(j < quarter ? n / grid_columns : n % grid_columns);
      double w = std::pow(rope_theta, -2.0 * double(j % quarter) / double(head_dim / 2));
      cosine.push_back(Acc(std::cos(position * w)));
      sine.push_back(Acc(std::sin(position * w)));
    }
}

// Channel j of both halves of a head.
template <class Acc>
struct Point {
  Acc x1, x2;
};
template <class Acc>
HD Point<Acc> operator-(Point<Acc> a, Point<Acc> b) {
  return {a.x1 - b.x1, a.x2 - b.x2};
}
template <class Acc>
HD Point<Acc> operator*(Acc scale, Point<Acc> a) {
  return {scale * a.x1, scale * a.x2};
}

// R of one plane.
template <class Acc>
struct Rotation {
  Acc c, s;
};
template <class Acc>
HD Point<Acc> turn(Rotation<Acc> R, Point<Acc> x) {  // R x
  return {x.x1 * R.c + x.x2 * R.s, x.x2 * R.c - x.x1 * R.s};
}
template <class Acc>
HD Point<Acc> turn_back(Rotation<Acc> R, Point<Acc> x) {  // R^T x
  return {x.x1 * R.c - x.x2 * R.s, x.x2 * R.c + x.x1 * R.s};
}

// The tables, and how many tokens at the start of a sequence they cover.
template <class Acc>
struct Rope {
  const Acc *cosine, *sine;  // (image_tokens, hd/2)
  size_t image_tokens;
};

// The two ways, forward and back, go through the heads of Q and K by replace_heads() (appendix D).
// Its first function gets a head's |x|^2 or <g, y>, and returns what the second needs; the second
// is called for each point, and what it returns takes the place of x or g. `number` is the head's
// place in r (B, T, 2, H); `mine`: of the threads that call, this one writes there.

// y = r R x for Q and K inside qkv (B, T, 3, H, hd), in place; r is kept. hd/2 is even.
template <class Real>
void rope_qk_norm_forward(const Device& device, Real* qkv, AccOf<Real>* r, Rope<AccOf<Real>> rope,
                          Heads heads) {
  using Acc = AccOf<Real>;
  replace_heads(
      device, qkv, rope, heads,
      [=] HD(size_t number, Acc xx, bool mine) {  // xx = |x|^2
        Acc scale = inverse_rms(xx, heads.dim, Acc(qk_eps));
        if (mine) r[number] = scale;
        return scale;
      },
      [=] HD(Point<Acc> x, Point<Acc>, Rotation<Acc> R, Acc scale) { return scale * turn(R, x); });
}

// dx = R^T r (g - (<g, y> / hd) y) for dqkv's Q and K, in place of g. y is in qkv.
template <class Real>
void rope_qk_norm_backward(const Device& device, Real* dqkv, const Real* qkv, const AccOf<Real>* r,
                           Rope<AccOf<Real>> rope, Heads heads) {
  using Acc = AccOf<Real>;
  replace_heads(
      device, dqkv, qkv, rope, heads,
      [=] HD(size_t number, Acc gy, bool) {  // gy = <g, y>
        return Pair<Acc>{r[number], gy / Acc(heads.dim)};
      },
      [=] HD(Point<Acc> g, Point<Acc> y, Rotation<Acc> R, Pair<Acc> k) {
        return turn_back(R, k.a * (g - k.b * y));
      });
}

// 2.2 Softmax attention
//
//     S = Q K^T / sqrt(hd),   A = softmax by rows of S,   Y = A V          for each head.
//
// What it does to the token mean. Rows of A are probabilities, A 1 = 1, so A J = J for the global
// J. Split what is averaged, V = J V + P V:
//
//     A J V = J V                    a state that is all mean passes unchanged,          (Prop. 1)
//     J A V = J V + J A P V          otherwise the centered part leaks into the mean,
//     P A V = P A P V                and nothing flows back, since P A J = P J = 0,
//     ||P A V|| <= mu_eff ||P V||,   mu_eff = ||P A P||_2.                          (Prop. 2), (4)
//
// The mean has gain one, however deep the network. Where mu_eff < 1, attention alone makes tokens
// more alike from layer to layer. (mu_eff can be larger: rows that put all their weight on one of
// two tokens, half of them on each, have mu_eff = sqrt(T/2).) JAPV would vanish if columns summed
// to one as well, since then J A = J. For means within segments Prop. 1 fails: rows of A mix the
// image's and the text's mean in different proportions.
//
// Backward, with G the cotangent of Y. Y = A V is linear in each factor:
//     dV = A^T G,     dA = G V^T.
// A row a = softmax(s) has log a_j = s_j - log sum_k e^(s_k), so da_j / a_j = ds_j - sum_k a_k ds_k
// or, for the whole row, da = (diag(a) - a a^T) ds. The Jacobian is symmetric, so the gradient is
// the same matrix applied to dA's row:
//
//     dS_j = a_j (dA_j - <a, dA>).                                                            (dS)
//
// Its null space. x^T (diag(a) - a a^T) x = sum a_j x_j^2 - (sum a_j x_j)^2 is the variance of x
// under the probabilities a, which are all positive: it is zero for x constant and for nothing
// else. So the null space is span(1), and dS measures only how dA VARIES along the row.
//
// Lemma 1. dA_ij = <g_i, V_j>, g_i being row i of G. If all tokens have the same value, V_j = vbar,
// then row i of dA is <g_i, vbar> 1^T, in the null space: dS = 0 exactly, and with it dQ = dK = 0.
// When token states collapse to their mean, queries and keys stop learning: in a collapsed network
// their gradients fall by orders of magnitude at once. (In a whole collapsed network this is seen
// in the last blocks; below them G itself vanishes.) Meanwhile the writer's gradient dW_O = sum_i
// delta_i y_i^T (39), delta_i the adjoint of token i of F = Y W_O^T, is alive: with y_i = vbar for
// all i it is (sum_i delta_i) vbar^T = T dbar vbar^T, all of it the dW_mu of section 2 in
// mvsplit.cu, and dW_c = 0. So a collapsed block keeps writing into the mean while Q and K, which
// could tell tokens apart, stand still. (MV-Split at alpha = 0 has dbar = 0: then the writer gets
// nothing either.) On the way there dS is linear in V - J V: it falls in proportion to the spread
// of the values. Image and text collapsed each to a mean of its own are not Lemma 1's case: a row
// of dA then has two values, and dS still moves weight from one segment to the other. (Its test, in
// fp64: dit_test Statement.Lemma1_EqualValuesStopQueriesAndKeys; in bf16 and on tensor cores:
// Attention.IsExactInBf16*. Its picture: q_grad_rms, data/figures/scream.html from step 317 on.)
//
// Finally S = Q K^T / sqrt(hd) gives
//     dQ = dS K / sqrt(hd),     dK = dS^T Q / sqrt(hd).
//
// Rounding to bf16 breaks the null space, just where tokens are alike. A row of A then sums to 1 +
// e, and dA_j = <g, vbar> gives dS_j = -e a_j <g, vbar> where Lemma 1 has zero: so <a, dA> is
// divided by the row's actual sum. Nor do rows of the rounded dS sum to zero, which adds
// (dS 1) kbar^T to dQ, kbar the mean key. But dS 1 = 0 is dS = dS P: keys may be taken less their
// mean, dQ = dS P K / sqrt(hd). (Columns of dS need not sum to zero: dK has nothing to restore.)
// With Q, K and V alike to 1%, dQ is off by 0.35%, 15% with the divisor alone, 540% with neither.

// The Q (part 0), K (1) or V (2) matrices (T, hd) of all sequences and heads inside a qkv array.
template <class Real>
Matrix<Real> head_part(Real* qkv, size_t part, Heads heads) {
  return Matrix<Real>(qkv + part * heads.width(), 3 * heads.width())
      .batch(heads.length * 3 * heads.width(), heads.dim);
}
// The heads' slices (T, hd) of a (B, T, D) array, and the (T, T) matrices of a (B, H, T, T) one.
template <class Real>
Matrix<Real> head_slice(Real* y, Heads heads) {
  return Matrix<Real>(y, heads.width()).batch(heads.length * heads.width(), heads.dim);
}
template <class Real>
Matrix<Real> head_square(Real* a, Heads heads) {
  return Matrix<Real>(a, heads.length)
      .batch(heads.count * heads.length * heads.length, heads.length * heads.length);
}

// The probabilities A (B, H, T, T), `probs`, from qkv (B, T, 3, H, hd). The scores S (B, H, T, T)
// are scratch, in Acc: rounded to bf16, a score just under 8 (QK-norm bounds |S| by sqrt(hd), 8
// for hd = 64) would be off by up to 0.016, and its probability by 1.6%. Both may be one array.
template <class Real, class Probability>
void attention_matrices(Device& device, Probability* probs, AccOf<Real>* scores, const Real* qkv,
                        Heads heads) {
  using Acc = AccOf<Real>;
  size_t n = heads.length;
  gemm(device, head_square(scores, heads), head_part(qkv, 0, heads),
       head_part(qkv, 1, heads).transpose(), {n, n, heads.dim, heads.batch, heads.count},
       rsqrt_(Acc(heads.dim)));
  for_each_team(device, heads.batch * heads.count * n, threads_for(n / 4), [=] HD(Team team) {
    Acc* s = scores + team.index * n;
    Acc largest = s[0], sum = 0;
    for (size_t j = team.rank; j < n; j += team.size) largest = max_(largest, s[j]);
    largest = team.max(largest);  // exp never overflows
    for (size_t j = team.rank; j < n; j += team.size) sum += s[j] = exp_(s[j] - largest);
    Acc scale = Acc(1) / team.sum(sum);
    for (size_t j = team.rank; j < n; j += team.size)
      probs[team.index * n + j] = Probability(scale * s[j]);
  });
}

// Y (B, T, D) from qkv. The probabilities are kept, scores are scratch.
template <class Real>
void attention_forward(Device& device, Real* Y, Real* probs, AccOf<Real>* scores, const Real* qkv,
                       Heads heads) {
  size_t n = heads.length;
  attention_matrices(device, probs, scores, qkv, heads);
  gemm(device, head_slice(Y, heads), head_square(probs, heads), head_part(qkv, 2, heads),
       {n, heads.dim, n, heads.batch, heads.count});
}

// dqkv (=) (B, T, 3, H, hd) from dY (B, T, D). Scratch: dA (B, H, T, T) in Acc, dS (B, H, T, T).
// (On tensor cores appendix D.2 has the same formulas.)
template <class Real>
void attention_backward(Device& device, Real* dqkv, const Real* dY, const Real* probs,
                        const Real* qkv, AccOf<Real>* dA, Real* dS, Heads heads) {
  using Acc = AccOf<Real>;
  constexpr bool rounds = !std::is_same_v<Real, Acc>;
  size_t n = heads.length;
  Acc scale = rsqrt_(Acc(heads.dim));
  Sizes to_tokens{n, heads.dim, n, heads.batch, heads.count};
  gemm(device, head_part(dqkv, 2, heads), head_square(probs, heads).transpose(),
       head_slice(dY, heads), to_tokens);
  gemm(device, head_square(dA, heads), head_slice(dY, heads), head_part(qkv, 2, heads).transpose(),
       {n, n, heads.dim, heads.batch, heads.count});
  for_each_team(device, heads.batch * heads.count * n, threads_for(n / 4), [=] HD(Team team) {
    const Real* a = probs + team.index * n;
    const Acc* da = dA + team.index * n;
    Acc inner = 0, total = 0;
    for (size_t j = team.rank; j < n; j += team.size)
      inner += Acc(a[j]) * da[j], total += Acc(a[j]);
    inner = team.sum(inner) / (rounds ? team.sum(total) : Acc(1));
    for (size_t j = team.rank; j < n; j += team.size)
      dS[team.index * n + j] = Real(Acc(a[j]) * (da[j] - inner));  // (dS)
  });
  if constexpr (rounds)  // P K, where dK will be
    center_columns(device, head_part(dqkv, 1, heads), head_part(qkv, 1, heads), to_tokens);
  gemm(device, head_part(dqkv, 0, heads), head_square(dS, heads),
       head_part(rounds ? dqkv : qkv, 1, heads), to_tokens, scale);
  gemm(device, head_part(dqkv, 1, heads), head_square(dS, heads).transpose(),
       head_part(qkv, 0, heads), to_tokens, scale);
}

// ---------------------------------------------------------------------------------------------
// 3. SwiGLU
//
// [g, v] = W13 x (gate half first), h = silu(g) * v, silu(g) = g s with s = 1 / (1 + e^-g).
// Backward: ds/dg = s (1 - s), so silu'(g) = s + g s (1 - s) = s (1 + g (1 - s)), and
//     dg = dh * v * silu'(g),     dv = dh * silu(g).

template <class Acc>
HD Acc sigmoid(Acc g) {
  return Acc(1) / (Acc(1) + exp_(-g));
}

// hidden (rows, ffn) from u = [g, v] (rows, 2 ffn).
template <class Real>
void swiglu_forward(const Device& device, Real* hidden, const Real* u, size_t rows, size_t ffn) {
  using Acc = AccOf<Real>;
  for_each_quad(device, rows, ffn, [=] HD(size_t row, size_t f) {
    Quad<Acc> g = load<Acc>(u + row * 2 * ffn + f), v = load<Acc>(u + row * 2 * ffn + ffn + f);
    for (int k = 0; k < 4; ++k) v[k] *= g[k] * sigmoid(g[k]);
    store(hidden + row * ffn + f, v);
  });
}

// du (=) (rows, 2 ffn) from dhidden (rows, ffn).
template <class Real>
void swiglu_backward(const Device& device, Real* du, const Real* dhidden, const Real* u,
                     size_t rows, size_t ffn) {
  using Acc = AccOf<Real>;
  for_each_quad(device, rows, ffn, [=] HD(size_t row, size_t f) {
    Quad<Acc> g = load<Acc>(u + row * 2 * ffn + f), v = load<Acc>(u + row * 2 * ffn + ffn + f);
    Quad<Acc> dh = load<Acc>(dhidden + row * ffn + f), dg, dv;
    for (int k = 0; k < 4; ++k) {
      Acc s = sigmoid(g[k]);
      dg[k] = dh[k] * v[k] * s * (Acc(1) + g[k] * (Acc(1) - s));
      dv[k] = dh[k] * g[k] * s;
    }
    store(du + row * 2 * ffn + f, dg);
    store(du + row * 2 * ffn + ffn + f, dv);
  });
}

// ---------------------------------------------------------------------------------------------
// 4. A block
//
//     qkv    = X W_QKV^T, its Q and K rotated and normalised
//     Y      = attention(Q, K, V),   F1 = Y W_O^T
//     X1     = merge_1(X, F1)
//     u      = X1 W13^T
//     hidden = SwiGLU(u),            F2 = hidden W2^T
//     X_next = merge_2(X1, F2)

// Pointers to a block's parameters (Number = const Real) or to their gradients.
template <class Number>
struct BlockParameters {
  Number *qkv, *proj, *w13, *w2;  // (3D, D); W_O, (D, D); (2 ffn, D), gate half first; W2, (D, ffn)
  Gates<Number> gates[2];         // after attention, after the FFN
};

// What a block's forward leaves for its backward: the arrays above and what attention and the
// merges save.
template <class Real>
struct BlockSaved {
  Real *X, *qkv, *probs, *Y, *F1, *X1, *u, *hidden, *F2, *X_next;
  AccOf<Real>* r_qk;  // (B, T, 2, H)
  std::array<MergeSaved<AccOf<Real>>, 2> merge;
  // In place of probs, where attention runs on tensor cores (appendix D): the logarithm of each
  // softmax's sum, and what rounding took from Y.
  AccOf<Real>* log_sums;
  Real* Y_rest;
};

// Arrays that live within one block's pass, shared by all blocks. On tensor cores attention needs
// `inner` in place of scores and dS.
template <class Real>
struct BlockScratch {
  AccOf<Real>*scores, *inner;  // S, or in the backward dA, (B, H, T, T); c of D.2, (B, H, T)
  Real* dF[2];                 // (B T, D), of both branches
  Real *dhidden, *du, *dY, *dqkv, *dS;  // (B T, ffn), (, 2 ffn), (, D), (, 3D), (B, H, T, T)
  MergeScratch<AccOf<Real>> merge[2];
};

// The sizes and tables that all blocks share.
template <class Real>
struct BlockShape {
  MergeShape merge;  // with tokens in the segments that the merges average over
  Heads heads;
  size_t ffn;
  Rope<AccOf<Real>> rope;
};

// A block, with all that its two passes work on.
template <class Real>
struct Block {
  BlockParameters<const Real> w;
  BlockSaved<Real> saved;
  BlockScratch<Real> scratch;
  BlockShape<Real> shape;
};

// saved.X_next (B, T, D), unless that is null, from saved.X. `again`: a replay (5.1), which finds
// what the merges saved the first time.
template <class Real>
void block_forward(Device& device, const Block<Real>& block, bool again = false) {
  const BlockParameters<const Real>& w = block.w;
  const BlockSaved<Real>& s = block.saved;
  const BlockShape<Real>& shape = block.shape;
  size_t rows = shape.merge.tokens.rows(), D = shape.merge.D, ffn = shape.ffn;

  linear_forward(device, s.qkv, s.X, w.qkv, rows, 3 * D, D);
  rope_qk_norm_forward(device, s.qkv, s.r_qk, shape.rope, shape.heads);
  if (!fused_attention_forward(device, s, shape.heads))  // appendix D: where tensor cores do it
    attention_forward(device, s.Y, s.probs, block.scratch.scores, s.qkv, shape.heads);
  linear_forward(device, s.F1, s.Y, w.proj, rows, D, D);
  merge_forward(device, s.X1, s.merge[0], s.X, s.F1, w.gates[0], shape.merge, again);

  linear_forward(device, s.u, s.X1, w.w13, rows, 2 * ffn, D);
  swiglu_forward(device, s.hidden, s.u, rows, ffn);
  linear_forward(device, s.F2, s.hidden, w.w2, rows, D, ffn);
  if (s.X_next)
    merge_forward(device, s.X_next, s.merge[1], s.X1, s.F2, w.gates[1], shape.merge, again);
}

// G holds dL/dX_next on entry and dL/dX on return; dw, the gradients of the parameters w, = (or +=
// if `accumulate`). Each line of block_forward has its backward here, last first; a linear map has
// two, its weight's and its input's. X1 and X are read twice, by the merge and by the branch: so
// the merge replaces G, and the branch's first linear map adds its part. Nothing in a backward
// waits for the gradient of a weight or a gate: they run beside, and end with this function, as the
// next block overwrites scratch. (What a merge gets last, the other's dF, is for Pre-Norm alone.)
//
// `observe(i)`, if any, is called when scratch.dF[i] is the adjoint of writer i: 1 (W2), then 0
// (W_O).
template <class Real, class Number>
void block_backward(Device& device, Real* G, BlockParameters<Number> dw, const Block<Real>& block,
                    bool accumulate, const std::function<void(int)>& observe = {}) {
  const BlockParameters<const Real>& w = block.w;
  const BlockSaved<Real>& s = block.saved;
  const BlockScratch<Real>& scratch = block.scratch;
  const BlockShape<Real>& shape = block.shape;
  size_t rows = shape.merge.tokens.rows(), D = shape.merge.D, ffn = shape.ffn;
  Real *dF1 = scratch.dF[0], *dF2 = scratch.dF[1];
  Beside beside(device);
  auto weight_gradient = [&](Number* dW, const Real* dY, const Real* X, size_t out, size_t in) {
    beside([&] { linear_backward_weight(device, dW, dY, X, rows, out, in, accumulate); });
  };

  merge_backward(beside, G, dF2, dw.gates[1], scratch.merge[1],
                 {G, s.X_next, s.X1, s.F2, w.gates[1], s.merge[1], dF1}, shape.merge, accumulate);
  if (observe) observe(1);
  weight_gradient(dw.w2, dF2, s.hidden, D, ffn);
  linear_backward_input(device, scratch.dhidden, dF2, w.w2, rows, D, ffn);
  swiglu_backward(device, scratch.du, scratch.dhidden, s.u, rows, ffn);
  weight_gradient(dw.w13, scratch.du, s.X1, 2 * ffn, D);
  linear_backward_input(device, G, scratch.du, w.w13, rows, 2 * ffn, D, true);  // +=

  merge_backward(beside, G, dF1, dw.gates[0], scratch.merge[0],
                 {G, s.X1, s.X, s.F1, w.gates[0], s.merge[0], dF2}, shape.merge, accumulate);
  if (observe) observe(0);
  weight_gradient(dw.proj, dF1, s.Y, D, D);
  linear_backward_input(device, scratch.dY, dF1, w.proj, rows, D, D);
  if (!fused_attention_backward(device, block)) {  // which turns back as well
    attention_backward(device, scratch.dqkv, scratch.dY, s.probs, s.qkv, scratch.scores, scratch.dS,
                       shape.heads);
    rope_qk_norm_backward(device, scratch.dqkv, s.qkv, s.r_qk, shape.rope, shape.heads);
  }
  weight_gradient(dw.qkv, scratch.dqkv, s.X, 3 * D, D);
  linear_backward_input(device, G, scratch.dqkv, w.qkv, rows, 3 * D, D, true);  // +=
}

// ---------------------------------------------------------------------------------------------
// 5. The network: a chain of blocks and its two ends

// Pointers to all parameters, or to their gradients. What the configuration does not have is null.
template <class Number>
struct Parameters {
  Number *patch_weight, *patch_bias, *context, *final_weight, *final_bias;
  BlockParameters<Number> first_block;
  size_t block_stride;

  BlockParameters<Number> block(size_t i) const {
    BlockParameters<Number> b = first_block;
    auto shift = [&](Number*& p) { p = p ? p + i * block_stride : nullptr; };
    for (Number** p : {&b.qkv, &b.proj, &b.w13, &b.w2}) shift(*p);
    for (Gates<Number>& g : b.gates)
      for (Number*& p : g.of) shift(p);
    return b;
  }
};

// 5.1 Activation checkpointing
//
// The blocks are cut into spans of k blocks. The forward keeps the input of each span and the few
// numbers that each merge saves (r and the segment means, which cost two reductions to make), and
// has room for what else k blocks save; each span overwrites the one before. The backward takes the
// spans from the last to the first and replays each from its checkpoint before it goes back through
// it. The same kernels on the same inputs give the same bits, so gradients do not depend on k. (A
// merge's replay alone is another kernel, which has r and the means already: its Z is the same
// function of the same inputs. Tests: Merge.AReplayHasTheSameBits, Network.RecomputeDoesNot*.) What
// the forward left of the last span is still there and needs no replay, so "keep everything" is one
// span of all the blocks, not a special case.
//
// Memory is depth / k checkpoints, k blocks' activations and 2 B (T + 4 D) numbers a block for what
// its merges save (2 B T where they do not split); the price is one more forward, less the last
// span.

// Looks on during a forward: called with the input X (B, T, D) of each block before it runs, and as
// layer `depth` with the trunk's output. It enqueues kernels that read X; later blocks write over
// X.
template <class Real>
using StateObserver = std::function<void(size_t layer, const Real* X)>;

// Looks on during a backward: called for each block and each of its writers with all that the
// block saved and the writer's adjoint delta (B, T, D). It enqueues kernels that only read these.
template <class Real>
using Observer =
    std::function<void(size_t block, int writer, const BlockSaved<Real>& saved, const Real* delta)>;

// The trunk's output, net.input(depth), from its input, net.input(0), for b sequences.
template <class Net, class Real>
void trunk_forward(Net& net, const Parameters<const Real>& w, size_t b,
                   const StateObserver<Real>& observe) {
  size_t depth = net.config.depth, last_span = (depth - 1) / net.span * net.span;
  for (size_t i = 0; i < depth; ++i) {
    if (observe) observe(i, net.input(i));
    Block<Real> block = net.block(i, w, b);
    if (i < last_span) block.saved.Y_rest = nullptr;  // the replay will make it
    block_forward(net.device, block);
  }
  if (observe) observe(depth, net.input(depth));
}

// How a backward goes.
template <class Real>
struct BackwardOptions {
  bool accumulate = false;                // += for =, in all gradients of parameters
  bool inputs = false;                    // the gradients of z and text as well
  Observer<Real> observe = {};            // may be empty, as the next
  std::function<void(size_t)> done = {};  // called when the gradients of block i are enqueued
};

// net.arrays.G from dL/d(the trunk's output) to dL/d(its input), and the blocks' gradients dw.
template <class Net, class Real, class Number>
void trunk_backward(Net& net, const Parameters<Number>& dw, const Parameters<const Real>& w,
                    size_t b, const BackwardOptions<Real>& o) {
  for (size_t first, end = net.config.depth; end > 0; end = first) {
    first = (end - 1) / net.span * net.span;
    if (end < net.config.depth)
      for (size_t i = first; i < end; ++i) {
        Block<Real> block = net.block(i, w, b);
        if (i + 1 == end) block.saved.X_next = nullptr;  // it is the next span's checkpoint
        block_forward(net.device, block, true);
      }
    for (size_t i = end; i-- > first;) {
      Block<Real> block = net.block(i, w, b);
      block_backward(net.device, net.arrays.G, dw.block(i), block, o.accumulate, [&](int writer) {
        if (o.observe) o.observe(i, writer, block.saved, block.scratch.dF[writer]);
      });
      if (o.done) o.done(i);
    }
  }
}

// 5.2 Images and patches
//
// A patch of p x p pixels of the image is one token. Going in, its numbers are ordered (channel,
// row, column), as a convolution's weight is; coming out, (row, column, channel). For either order
// the two functions are inverse permutations, so each is the other's backward.

enum class PatchOrder { channel_first, channel_last };

struct Patches {
  size_t channels, height, width, patch;  // of the image; patch divides height and width

  HD size_t tokens() const { return height / patch * (width / patch); }
  HD size_t dim() const { return patch * patch * channels; }
  HD size_t pixels() const { return channels * height * width; }
  // Index into one image (channels, height, width) of number e of image token n.
  HD size_t pixel(size_t n, size_t e, PatchOrder order) const {
    size_t per_row = width / patch, c, in_patch;
    if (order == PatchOrder::channel_first)
      c = e / (patch * patch), in_patch = e % (patch * patch);
    else
      c = e % channels, in_patch = e / channels;
    size_t y = n / per_row * patch + in_patch / patch, x = n % per_row * patch + in_patch % patch;
    return (c * height + y) * width + x;
  }
};

// tokens (B, length, dim) from images (B, channels, height, width); rows after the image tokens get
// zeros.
template <class Real, class Acc>
void image_to_tokens(const Device& device, Real* tokens, const Acc* image, size_t batch,
                     size_t length, Patches p, PatchOrder order) {
  for_each(device, batch * length * p.dim(), [=] HD(size_t i) {
    size_t e = i % p.dim(), n = i / p.dim() % length, b = i / p.dim() / length;
    tokens[i] = n < p.tokens() ? Real(image[b * p.pixels() + p.pixel(n, e, order)]) : Real(0);
  });
}

// images (B, channels, height, width) from tokens (B, length, dim) + bias (dim; may be null); text
// rows are ignored.
template <class Real, class Acc>
void tokens_to_image(const Device& device, Acc* image, const Acc* tokens, const Real* bias,
                     size_t batch, size_t length, Patches p, PatchOrder order) {
  for_each(device, batch * p.tokens() * p.dim(), [=] HD(size_t i) {
    size_t e = i % p.dim(), n = i / p.dim() % p.tokens(), b = i / p.dim() / p.tokens();
    image[b * p.pixels() + p.pixel(n, e, order)] =
        tokens[(b * length + n) * p.dim() + e] + (bias ? Acc(bias[e]) : Acc(0));
  });
}

// 5.3 The two ends, and the whole
//
// In front, patches and text are projected to D channels, and each token is normalised. Behind, the
// image tokens are projected to patches of the velocity.

// The arrays outside the trunk, part of net.arrays.
template <class Real>
struct EndArrays {
  AccOf<Real>*z, *velocity;                       // (B, channels, height, width): in and out
  Real* text;                                     // (B, L, text_dim): in
  Real *patches, *image_embed, *text_embed;       // (B, N, p p channels), (B, N, D), (B, L, D)
  AccOf<Real>*r_image, *r_text;                   // (B, N), (B, L)
  AccOf<Real>* prediction;                        // (B, T, p p channels)
  AccOf<Real>*dvelocity, *dz, *dtext, *dpatches;  // their gradients
  Real *dimage_embed, *dtext_embed, *dprediction;
};

// The trunk's input from arrays.z and arrays.text.
template <class Net, class Real>
void embed_forward(Net& net, const Parameters<const Real>& w, size_t b) {
  Device& device = net.device;
  const auto& c = net.config;
  auto& a = net.arrays;
  size_t N = c.image_tokens(), L = c.text_tokens, D = c.width, stride = c.tokens() * D;
  Real* X = net.input(0);
  image_to_tokens(device, a.patches, a.z, b, N, c.patches(), PatchOrder::channel_first);
  linear_forward(device, a.image_embed, a.patches, w.patch_weight, b * N, D, c.patch_dim());
  if (w.patch_bias) bias_forward(device, a.image_embed, w.patch_bias, b * N, D);
  rmsnorm_forward(device, X, a.r_image, a.image_embed, {b, N, D, stride}, c.norm_eps);
  if (w.context)  // else text has D channels, and is text_embed
    linear_forward(device, a.text_embed, a.text, w.context, b * L, D, c.text_dim);
  rmsnorm_forward(device, X + N * D, a.r_text, a.text_embed, {b, L, D, stride}, c.norm_eps);
}

// dw from arrays.G, dL/d(the trunk's input); with o.inputs also arrays.dz and arrays.dtext.
template <class Net, class Real, class Number>
void embed_backward(Net& net, const Parameters<Number>& dw, const Parameters<const Real>& w,
                    size_t b, const BackwardOptions<Real>& o) {
  Device& device = net.device;
  const auto& c = net.config;
  auto& a = net.arrays;
  size_t N = c.image_tokens(), L = c.text_tokens, D = c.width, stride = c.tokens() * D;
  rmsnorm_backward(device, a.dimage_embed, a.G, a.image_embed, a.r_image, {b, N, D, stride});
  if (w.patch_bias) bias_backward(device, dw.patch_bias, a.dimage_embed, b * N, D, o.accumulate);
  linear_backward_weight(device, dw.patch_weight, a.dimage_embed, a.patches, b * N, D,
                         c.patch_dim(), o.accumulate);
  rmsnorm_backward(device, a.dtext_embed, a.G + N * D, a.text_embed, a.r_text, {b, L, D, stride});
  if (w.context)
    linear_backward_weight(device, dw.context, a.dtext_embed, a.text, b * L, D, c.text_dim,
                           o.accumulate);
  if (!o.inputs) return;
  linear_backward_input(device, a.dpatches, a.dimage_embed, w.patch_weight, b * N, D,
                        c.patch_dim());
  tokens_to_image<Real>(device, a.dz, a.dpatches, nullptr, b, N, c.patches(),
                        PatchOrder::channel_first);
  if (w.context)
    linear_backward_input(device, a.dtext, a.dtext_embed, w.context, b * L, D, c.text_dim);
  else
    convert(device, a.dtext, a.dtext_embed, b * L * D);
}

// arrays.velocity from the trunk's output. Text tokens are projected too, and ignored: L / N more
// work, and no gather.
template <class Net, class Real>
void output_forward(Net& net, const Parameters<const Real>& w, size_t b) {
  const auto& c = net.config;
  auto& a = net.arrays;
  linear_forward(net.device, a.prediction, net.input(c.depth), w.final_weight, b * c.tokens(),
                 c.patch_dim(), c.width);
  tokens_to_image(net.device, a.velocity, a.prediction, w.final_bias, b, c.tokens(), c.patches(),
                  PatchOrder::channel_last);
}

// arrays.G = dL/d(the trunk's output), and dw, from arrays.dvelocity. (image_to_tokens gives the
// rows of text tokens a zero gradient.)
template <class Net, class Real, class Number>
void output_backward(Net& net, const Parameters<Number>& dw, const Parameters<const Real>& w,
                     size_t b, const BackwardOptions<Real>& o) {
  Device& device = net.device;
  const auto& c = net.config;
  auto& a = net.arrays;
  size_t rows = b * c.tokens(), dim = c.patch_dim();
  image_to_tokens(device, a.dprediction, a.dvelocity, b, c.tokens(), c.patches(),
                  PatchOrder::channel_last);
  bias_backward(device, dw.final_bias, a.dprediction, rows, dim, o.accumulate);
  linear_backward_weight(device, dw.final_weight, a.dprediction, net.input(c.depth), rows, dim,
                         c.width, o.accumulate);
  linear_backward_input(device, a.G, a.dprediction, w.final_weight, rows, dim, c.width);
}

// arrays.z (b, channels, height, width), arrays.text (b, L, text_dim)  ->  arrays.velocity, as z.
template <class Net, class Real>
void network_forward(Net& net, const Parameters<const Real>& w, size_t b,
                     const StateObserver<Real>& observe) {
  embed_forward(net, w, b);
  trunk_forward(net, w, b, observe);
  output_forward(net, w, b);
}

// arrays.dvelocity  ->  the gradients dw of all parameters, and with o.inputs arrays.dz,
// arrays.dtext: after network_forward() with the same inputs.
template <class Net, class Real, class Number>
void network_backward(Net& net, const Parameters<Number>& dw, const Parameters<const Real>& w,
                      size_t b, const BackwardOptions<Real>& o) {
  output_backward(net, dw, w, b, o);
  trunk_backward(net, dw, w, b, o);
  embed_backward(net, dw, w, b, o);
}

// Appendix. The straight way ends here. Below: the configuration and the table of parameters (A),
// memory (B), the class Network (C), attention's schedules and its way over tensor cores (D),
// diagnostics (E).

// ---------------------------------------------------------------------------------------------
// A. The configuration and the table of parameters

// What a residual mode means: the merge after attention and the one after the FFN.
struct Residual {
  std::string name;
  Merge attention, ffn;
};
inline const std::vector<Residual> residuals = [] {
  std::vector<Residual> all;
  Merges::each([&](auto m) {
    all.push_back({decltype(m)::name, merge_of<decltype(m)>, merge_of<decltype(m)>});
  });
  all.push_back(
      {"mvsplit-attention", merge_of<MvSplit>, merge_of<PostNorm>});  // on one branch only
  all.push_back({"mvsplit-ffn", merge_of<PostNorm>, merge_of<MvSplit>});
  return all;
}();

struct Config {
  size_t depth = 48, width = 64, heads = 4, ffn = 192;
  size_t channels = 1, height = 32, image_width = 32, patch = 4;
  size_t text_tokens = 8, text_dim = 64;
  std::string residual = "mvsplit";
  std::string means = "segment";  // of the merges: over a segment's tokens, or global: a sequence's
  bool patch_bias = true;  // of the patch embedding; without it RMSNorm hides a patch's magnitude
  double norm_eps = 1e-6;  // of the merges and the input norms
  std::map<std::string, std::optional<double>> gates;  // where they start, else as their merge says
  std::set<std::string> fix;                           // gates that keep these values
  double writer_std = -1;  // W_O, W2 ~ N(0, std^2); -1: as the merge says
  // Above 0: a block's matrices are drawn from Xavier's normal distribution with this gain, as
  // DeepNorm's paper has it (arXiv 2203.00555), where it is (8 depth)^(-1/4).
  double xavier_gain = 0;
  double final_std = 0;  // the final projection

  size_t image_tokens() const { return height / patch * (image_width / patch); }
  size_t tokens() const { return image_tokens() + text_tokens; }
  size_t head_dim() const { return width / heads; }
  size_t patch_dim() const { return patch * patch * channels; }
  size_t pixels() const { return channels * height * image_width; }
  Patches patches() const { return {channels, height, image_width, patch}; }
  size_t text_size() const { return text_tokens * text_dim; }
  bool projects_text() const { return text_dim != width; }

  const Residual& mode() const {
    for (const Residual& r : residuals)
      if (residual == r.name) return r;
    std::string known;
    for (const Residual& r : residuals) known += std::string(known.empty() ? "" : ", ") + r.name;
    fail("residual '%s' is not known: choose one of %s", residual.c_str(), known.c_str());
  }
  // Writers start at zero, so that each block starts as the identity (RMSNorm leaves a normalised
  // token alone, up to eps, while alpha = 0), unless the merge says otherwise.
  double writer_init() const { return writer_std >= 0 ? writer_std : about(mode().ffn).writer_std; }
  // The gates of either merge, each once.
  std::vector<Gate> gates_of_mode() const {
    std::vector<Gate> all = about(mode().attention).gates;
    if (all.empty()) all = about(mode().ffn).gates;
    return all;
  }
  bool has_gate(const std::string& name) const {
    for (const Gate& gate : gates_of_mode())
      if (gate.name == name) return true;
    return false;
  }
  double start(const Gate& gate) const {
    auto at = gates.find(gate.name);
    return at == gates.end() ? gate.start : at->second.value_or(gate.start);
  }
  void check() const;
};

// Throws Error, with what to change, unless the sizes fit together.
inline void Config::check() const {
  mode();
  if (means != "segment" && means != "global")
    fail("means '%s' is not known: choose segment or global", means.c_str());
  if (!depth || !width || !heads || !ffn || !channels || !height || !image_width || !patch ||
      !text_tokens || !text_dim)
    fail("every size of the model must be at least 1");
  if (depth > 100000 || width > 1 << 20 || ffn > 1 << 20 || channels > 4096 || height > 1 << 16 ||
      image_width > 1 << 16 || text_tokens > 1 << 16 || text_dim > 1 << 20)
    fail("a size of the model is out of range (depth 100,000, widths 1,048,576, images 65,536)");
  if (width % heads)
    fail("width %zu is not divisible by %zu heads: choose a number of heads that divides the width",
         width, heads);
  if (head_dim() % 4)
    fail("head dimension %zu (width %zu / heads %zu) is not a multiple of 4, which 2-D RoPE needs",
         head_dim(), width, heads);
  if (ffn % 4) fail("ffn %zu is not a multiple of 4", ffn);
  if (height % patch || image_width % patch)
    fail(
        "an image of %zux%zu cannot be cut into patches of %zux%zu: choose a patch that divides "
        "both",
        height, image_width, patch, patch);
  if (!(norm_eps > 0) || norm_eps > 1) fail("norm-eps %g is not in (0, 1]", norm_eps);
  if ((writer_std < 0 && writer_std != -1) || final_std < 0)
    fail("writer-std and final-std must be at least 0 (writer-std -1: the mode's own)");
  if (xavier_gain < 0) fail("xavier-gain %g is below 0", xavier_gain);
  if (xavier_gain > 0 && writer_std >= 0)
    fail("xavier-gain and writer-std both say how W_O and W2 start: leave one out (writer-std -1)");
  for (const std::string& gate : fix)
    if (!has_gate(gate))
      fail("fix '%s': residual %s has no such gate", gate.c_str(), residual.c_str());
}

// The parameter table: each parameter once. Allocation, initialisation, AdamW, files, gradient
// checks and reports are all driven from it.
enum class Init { uniform, normal, constant };  // U(-scale, scale), N(0, scale^2), scale

struct Parameter {
  std::string name;  // as in the checkpoint
  std::vector<size_t> shape;
  Init init;
  double scale;
  size_t offset = 0;   // in elements, from the start of the slab
  bool fixed = false;  // keeps its initial value

  size_t count() const {
    size_t n = 1;
    for (size_t s : shape) n *= s;
    return n;
  }
  bool decays() const { return shape.size() >= 2; }  // weight decay: matrices only
  // The name without the block's number: the reports' unit.
  std::string family() const {
    if (name.rfind("blocks.", 0) != 0) return name;
    return "blocks.*" + name.substr(name.find('.', 7));
  }
};

struct Table {
  std::vector<Parameter> parameters;
  size_t size = 0;          // elements of the slab
  size_t block_stride = 0;  // elements from a block's parameters to the next block's

  const Parameter& at(const std::string& name) const {
    for (const Parameter& p : parameters)
      if (p.name == name) return p;
    fail("there is no parameter '%s' in this configuration", name.c_str());
  }
  size_t count() const {
    size_t n = 0;
    for (const Parameter& p : parameters) n += p.count();
    return n;
  }
};

// A gate's name in a checkpoint, behind its block's: of the merge after attention (0) or the FFN
// (1).
inline std::string file_name(const Gate& gate, int merge) {
  std::string name = gate.file;
  return name.replace(name.find('#'), 1, std::to_string(merge + 1));
}

// Each tensor starts at a multiple of 8 elements (16 bytes of bf16). A (D, D) matrix is a multiple
// of 16 long, so W_Q, W_K, W_V follow one another without a gap and are read as one (3D, D) matrix.
inline Table parameter_table(const Config& c) {
  Table table;
  auto add = [&](std::string name, std::vector<size_t> shape, Init init, double scale) {
    Parameter p{std::move(name), std::move(shape), init, scale};
    p.offset = round_up(table.size, 8);
    table.size = p.offset + p.count();
    table.parameters.push_back(std::move(p));
  };
  auto linear = [](size_t fan_in) { return 1 / std::sqrt(double(fan_in)); };
  size_t D = c.width, p = c.patch;
  add("patch_embed.patch_proj.weight", {D, c.channels, p, p}, Init::uniform, linear(c.patch_dim()));
  if (c.patch_bias) add("patch_embed.patch_proj.bias", {D}, Init::uniform, linear(c.patch_dim()));
  if (c.projects_text())
    add("context_proj.weight", {D, c.text_dim}, Init::uniform, linear(c.text_dim));
  const Merge merges[2] = {c.mode().attention, c.mode().ffn};
  for (size_t i = 0; i < c.depth; ++i) {
    std::string block = "blocks." + std::to_string(i) + ".";
    table.size = round_up(table.size, 64);
    size_t start = table.size;
    for (const char* name : {"q_proj", "k_proj", "v_proj"})
      add(block + "operator." + name + ".weight", {D, D}, Init::uniform, linear(D));
    add(block + "operator.proj.weight", {D, D}, Init::normal, c.writer_init());
    add(block + "ffn.w13.weight", {2 * c.ffn, D}, Init::uniform, linear(D));
    add(block + "ffn.w2.weight", {D, c.ffn}, Init::normal, c.writer_init());
    if (c.xavier_gain > 0)
      for (size_t k = 0; k < 6; ++k) {  // N(0, gain^2 2 / (in + out)), W_Q and W_K with gain 1
        Parameter& p = table.parameters[table.parameters.size() - 6 + k];
        size_t out = p.shape[0] / (k == 4 ? 2 : 1), in = p.shape[1];  // w13 are two matrices
        p.init = Init::normal;
        p.scale = (k < 2 ? 1 : c.xavier_gain) * std::sqrt(2 / double(in + out));
      }
    for (int m = 0; m < 2; ++m)
      for (const Gate& gate : about(merges[m]).gates) {
        size_t size = about(merges[m]).one_number ? 1 : D;
        add(block + file_name(gate, m), {size}, Init::constant, c.start(gate));
        table.parameters.back().fixed = c.fix.count(gate.name);
      }
    table.size = round_up(table.size, 64);
    table.block_stride = table.size - start;
  }
  add("final_proj.weight", {c.patch_dim(), D}, Init::normal, c.final_std);
  add("final_proj.bias", {c.patch_dim()}, Init::constant, 0);
  table.size = round_up(table.size, 64);
  return table;
}

// Where the parameters are in a slab, or their gradients: in the table's order.
template <class Number>
Parameters<Number> locate(const Config& config, const Table& table, Number* slab) {
  const Parameter* next = table.parameters.data();
  auto take = [&](bool there = true) { return there ? slab + (next++)->offset : nullptr; };
  Parameters<Number> all{};
  all.block_stride = table.block_stride;
  all.patch_weight = take(), all.patch_bias = take(config.patch_bias);
  all.context = take(config.projects_text());
  BlockParameters<Number>& block = all.first_block;
  block.qkv = take(), next += 2;  // W_K and W_V lie behind W_Q
  block.proj = take(), block.w13 = take(), block.w2 = take();
  const Merge merges[2] = {config.mode().attention, config.mode().ffn};
  for (int m = 0; m < 2; ++m) {
    block.gates[m].merge = merges[m];
    for (size_t i = 0; i < about(merges[m]).gates.size(); ++i) block.gates[m].of[i] = take();
  }
  next = &table.parameters.back() - 1;
  all.final_weight = take(), all.final_bias = take();
  return all;
}

// ---------------------------------------------------------------------------------------------
// B. Memory

// Whether attention runs on tensor cores (D.2): then there are no (T, T) matrices to make room for.
template <class Real>
bool fused_attention(bool gpu, size_t head_dim) {
  constexpr bool has_kernels = built_for() >= 800;
  return gpu && has_kernels && std::is_same_v<Real, bf16> && (head_dim == 64 || head_dim == 128);
}

// All arrays of a network for a largest batch, and the functions that lay them out. With a Carver
// that has no base they only count, which is how `plan` knows the bytes without taking them.
template <class Real>
struct Arrays : EndArrays<Real> {
  using Acc = AccOf<Real>;
  Real *inputs, *output;                 // (spans, B, T, D), (B, T, D): inputs of spans; the last X
  std::vector<BlockSaved<Real>> blocks;  // what a span's blocks save
  std::vector<std::array<MergeSaved<Acc>, 2>> merges;  // of every block
  BlockScratch<Real> scratch;
  Real* G;             // (B, T, D), the trunk's gradient
  Acc *cosine, *sine;  // (N, hd / 2)

  // Without training, blocks pass two arrays back and forth.
  void lay_checkpoints(Carver& c, const Config& m, size_t B, size_t span, bool trains) {
    size_t X = B * m.tokens() * m.width, means = 2 * B * m.width;
    inputs = c.take<Real>((trains ? ceil_div(m.depth, span) : 2) * input_stride(m, B));
    output = trains ? c.take<Real>(X) : nullptr;
    merges.resize(trains ? m.depth : 1);
    for (auto& of_block : merges)
      for (int i = 0; i < 2; ++i) {
        of_block[i] = {c.take<Acc>(B * m.tokens()), nullptr, nullptr};
        if (about(i ? m.mode().ffn : m.mode().attention).means)
          of_block[i].xbar = c.take<Acc>(means), of_block[i].fbar = c.take<Acc>(means);
      }
  }
  static size_t input_stride(const Config& m, size_t B) {
    return round_up(B * m.tokens() * m.width, 128);  // on a 256-byte boundary
  }

  void lay_blocks(Carver& c, const Config& m, size_t B, size_t span, bool trains, bool gpu) {
    size_t rows = B * m.tokens(), X = rows * m.width;
    bool fused = fused_attention<Real>(gpu, m.head_dim());
    blocks.resize(span);
    for (size_t i = 0; i < span; ++i) {
      BlockSaved<Real>& s = blocks[i];
      s.X = i ? c.take<Real>(X) : nullptr;  // the first block's input is the span's checkpoint
      s.qkv = c.take<Real>(3 * X);
      s.probs = fused ? nullptr : c.take<Real>(rows * m.heads * m.tokens());
      s.log_sums = fused ? c.take<Acc>(rows * m.heads) : nullptr;
      s.Y_rest = fused && trains ? c.take<Real>(X) : nullptr;
      s.Y = c.take<Real>(X), s.F1 = c.take<Real>(X), s.X1 = c.take<Real>(X);
      s.u = c.take<Real>(2 * rows * m.ffn), s.hidden = c.take<Real>(rows * m.ffn);
      s.F2 = c.take<Real>(X);
      s.r_qk = c.take<Acc>(2 * rows * m.heads);
    }
  }

  void lay_scratch(Carver& c, const Config& m, size_t B, bool trains, bool gpu) {
    size_t rows = B * m.tokens(), squares = rows * m.heads * m.tokens();
    bool fused = fused_attention<Real>(gpu, m.head_dim());
    scratch = {};
    if (!fused) scratch.scores = c.take<Acc>(squares);
    if (!trains) return;
    if (fused)
      scratch.inner = c.take<Acc>(rows * m.heads);
    else
      scratch.dS = c.take<Real>(squares);
    G = c.take<Real>(rows * m.width);
    for (Real*& dF : scratch.dF) dF = c.take<Real>(rows * m.width);
    scratch.dY = c.take<Real>(rows * m.width);
    scratch.dhidden = c.take<Real>(rows * m.ffn), scratch.du = c.take<Real>(2 * rows * m.ffn);
    scratch.dqkv = c.take<Real>(3 * rows * m.width);
    for (MergeScratch<Acc>& merge : scratch.merge)
      merge.lay(c, {B, m.image_tokens(), m.text_tokens}, m.width);
  }

  void lay_ends(Carver& c, const Config& m, size_t B, bool trains) {
    EndArrays<Real>& e = *this;
    size_t N = B * m.image_tokens(), L = B * m.text_tokens, rows = N + L, dim = m.patch_dim();
    e.z = c.take<Acc>(B * m.pixels()), e.velocity = c.take<Acc>(B * m.pixels());
    e.text = c.take<Real>(B * m.text_size());
    e.patches = c.take<Real>(N * dim), e.image_embed = c.take<Real>(N * m.width);
    e.text_embed = m.projects_text() ? c.take<Real>(L * m.width) : e.text;
    e.r_image = c.take<Acc>(N), e.r_text = c.take<Acc>(L);
    e.prediction = c.take<Acc>(rows * dim);
    cosine = c.take<Acc>(m.image_tokens() * m.head_dim() / 2);
    sine = c.take<Acc>(m.image_tokens() * m.head_dim() / 2);
    if (!trains) return;
    e.dvelocity = c.take<Acc>(B * m.pixels()), e.dz = c.take<Acc>(B * m.pixels());
    e.dtext = c.take<Acc>(B * m.text_size());
    e.dimage_embed = c.take<Real>(N * m.width), e.dtext_embed = c.take<Real>(L * m.width);
    e.dprediction = c.take<Real>(rows * dim), e.dpatches = c.take<Acc>(N * dim);
  }
};

// Memory by slabs. Without a device a plan only counts their bytes, which are printed before
// anything is taken, and by `mvsplit plan`. With one it takes what it counts.
struct Plan {
  Device* device;
  int fill_byte;
  std::vector<std::pair<std::string, size_t>> slabs;
  std::vector<std::unique_ptr<Slab>> taken;

  explicit Plan(Device* on = nullptr, int byte = 0xff) : device(on), fill_byte(byte) {}

  // The slab `name`, whose arrays lay(Carver&) lays out.
  template <class Lay>
  void add(const char* name, const Lay& lay) {
    Carver count;
    lay(count);
    slabs.emplace_back(name, count.used);
    if (!device) return;
    taken.push_back(std::make_unique<Slab>(*device, count.used, fill_byte));
    Carver carver{taken.back()->data};
    lay(carver);
  }
  size_t total() const {
    size_t sum = 0;
    for (const auto& slab : slabs) sum += slab.second;
    return sum;
  }
};

// The same network with one block: its table has room for what one block, and all that is outside
// the blocks, add to a gradient.
inline Config one_block(Config config) {
  config.depth = 1;
  return config;
}

// How many blocks a span has for `--recompute k`: 0 means all of them.
inline size_t span_length(const Config& config, size_t recompute) {
  return recompute == 0 ? config.depth : std::min(recompute, config.depth);
}

// All that a network takes. Kept: what gradients are kept as, Acc or Real (see Network).
template <class Real, class Kept>
struct NetworkArrays : Arrays<Real> {
  Real* weights = nullptr;
  Kept* gradients = nullptr;
  AccOf<Real>* unrounded = nullptr;  // gradients of a block, and of all outside the blocks

  void add_to(Plan& plan, const Config& m, const Table& table, size_t B, size_t span, bool trains,
              bool gpu) {
    plan.add("weights", [&](Carver& c) { weights = c.take<Real>(table.size); });
    if (trains) plan.add("gradients", [&](Carver& c) { gradients = c.take<Kept>(table.size); });
    if (trains && !std::is_same_v<Kept, AccOf<Real>>)
      plan.add("a block's gradients", [&](Carver& c) {
        unrounded = c.take<AccOf<Real>>(parameter_table(one_block(m)).size);
      });
    plan.add("checkpoints", [&](Carver& c) { this->lay_checkpoints(c, m, B, span, trains); });
    plan.add("activations", [&](Carver& c) { this->lay_blocks(c, m, B, span, trains, gpu); });
    plan.add("scratch", [&](Carver& c) { this->lay_scratch(c, m, B, trains, gpu); });
    plan.add("inputs, outputs", [&](Carver& c) { this->lay_ends(c, m, B, trains); });
  }
};

template <class Real, class Kept = AccOf<Real>>
Plan network_plan(const Config& config, const Table& table, size_t batch, size_t recompute,
                  bool trains, bool gpu) {
  // Beyond any machine; below, no product of sizes overflows 64 bits.
  double D = double(config.width), rows = double(batch) * double(config.tokens());
  double parameters_about = D * (double(config.depth) * (4 * D + 3 * double(config.ffn)) +
                                 2 * double(config.patch_dim()));
  size_t span = trains ? span_length(config, recompute) : 1;
  double of_a_row = double(config.heads * config.tokens()) + 20 * D + 6 * double(config.ffn) +
                    double(config.patch_dim());
  if (parameters_about > 1e13 || rows * (double(span) * of_a_row + double(config.depth) * D) > 1e16)
    fail("this model and batch are larger than any machine: check --depth, --width and --batch");
  Plan plan;
  NetworkArrays<Real, Kept>().add_to(plan, config, table, batch, span, trains, gpu);
  return plan;
}

// Floating-point operations of one forward pass: 2 for each weight and token it acts on, and 4 T D
// a token for the two products of attention. A backward has twice as many; a replay, once. (As in
// 2.2: what D.2 makes again is not counted. Nor is the final projection of text tokens, which
// nobody reads.)
inline double forward_flops(const Config& m, size_t batch) {
  double D = double(m.width), T = double(m.tokens()), N = double(m.image_tokens());
  double block = 2 * T * (4 * D * D + 3 * D * double(m.ffn)) + 4 * T * T * D;
  double ends = 4 * N * D * double(m.patch_dim());
  if (m.projects_text()) ends += 2 * double(m.text_tokens * m.text_dim) * D;
  return double(batch) * (double(m.depth) * block + ends);
}

// ---------------------------------------------------------------------------------------------
// C. The class Network

// to (n) = from, or += if `accumulate`, rounded by the draws first, first + 1, ... of `dither`.
template <class Kept, class Acc>
void add_rounded(const Device& device, Kept* to, const Acc* from, size_t n, bool accumulate,
                 Dither dither, size_t first) {
  for_each(device, n / 8, [=] HD(size_t i) {
    Random4 bits = dither(first + i);
    UNROLL
    for (int half = 0; half < 2; ++half) {
      size_t at = 8 * i + 4 * size_t(half);
      Quad<Acc> sum = load<Acc>(from + at);
      if (accumulate) sum = load<Acc>(to + at) + sum;
      store_stochastically(to + at, sum, bits, half);
    }
  });
}

// Kept is what gradients are kept as. With Acc the kernels write or add to them in place. bf16
// gradients (Kept = Real, half the bytes) cannot be added to in place without loss: a block's are
// made in Acc, in an array for one block, and added to the kept ones with stochastic rounding
// (math.h, appendix E): the same kernels, and one pass more over a block's gradients.
template <class Real, class Kept = AccOf<Real>>
class Network {
 public:
  using Acc = AccOf<Real>;
  static constexpr bool rounds_gradients = !std::is_same_v<Kept, Acc>;

  Device& device;
  const Config config;
  const Table table;
  const size_t batch;  // the largest
  const size_t span;   // blocks of one (5.1)
  const bool trains;
  NetworkArrays<Real, Kept> arrays;

  Network(Device& on, const Config& c, size_t largest_batch, size_t recompute, bool training)
      : device(on),
        config(c),
        table(parameter_table(c)),
        batch(largest_batch),
        span(training ? span_length(c, recompute) : 1),
        trains(training) {
    Plan plan = network_plan<Real, Kept>(c, table, batch, recompute, trains, device.gpu);
    if (plan.total() > device.available())
      fail("the network needs %.2f GB and %s has %.2f GB free: use a smaller --batch",
           1e-9 * double(plan.total()), device.name.c_str(), 1e-9 * double(device.available()));
    arrays.add_to(memory_, config, table, batch, span, trains, device.gpu);
    // Padding between tensors is never written: it must not be NaN when the slab is summed.
    if (trains) device.fill(arrays.gradients, 0, table.size * sizeof(Kept));
    if (arrays.unrounded) device.fill(arrays.unrounded, 0, block_table_.size * sizeof(Acc));
    std::vector<Acc> cosine, sine;
    rope_table(cosine, sine, config.height / config.patch, config.image_width / config.patch,
               config.head_dim());
    device.upload(arrays.cosine, cosine.data(), cosine.size() * sizeof(Acc));
    device.upload(arrays.sine, sine.data(), sine.size() * sizeof(Acc));
  }

  Real* weights() { return arrays.weights; }
  Kept* gradients() { return arrays.gradients; }
  // Compute with another copy of the weights (an average of them) until told otherwise; returns the
  // one used so far.
  Real* use_weights(Real* slab) { return std::exchange(arrays.weights, slab); }

  // arrays.z and arrays.text -> arrays.velocity, for b <= batch sequences.
  void forward(size_t b, const StateObserver<Real>& observe = {}) {
    network_forward(*this, parameters(), b, observe);
  }

  // arrays.dvelocity -> gradients of all parameters (=, or += if `accumulate`), after forward(b)
  // with the same inputs; with `inputs` also arrays.dz and arrays.dtext. `dither`: where gradients
  // are rounded.
  void backward(size_t b, bool accumulate, bool inputs = false, const Observer<Real>& observe = {},
                Dither dither = {}) {
    if (rounds_gradients && !dither.pass) fail("gradients that are rounded need a Dither");
    Beside beside(device);
    BackwardOptions<Real> o{accumulate && !rounds_gradients, inputs, observe, {}};
    size_t first = table.at("blocks.0.operator.q_proj.weight").offset, stride = table.block_stride;
    size_t end = first + config.depth * stride;
    // gradients (=, or +=) [at, at + n) from unrounded [from, from + n); multiples of 8. It runs
    // where the weight gradients do, so the next block's wait for it.
    auto round = [&](size_t at, size_t from, size_t n) {
      if constexpr (rounds_gradients)
        beside([&] {
          add_rounded(device, arrays.gradients + at, arrays.unrounded + from, n, accumulate, dither,
                      at / 8);
        });
    };
    o.done = [&](size_t i) { round(first + i * stride, first, stride); };
    if (about(config.mode().ffn).trunk_apart)  // Pre-Norm: beyond the last merge there is no trunk
      device.fill(arrays.scratch.dF[0], 0, b * config.tokens() * config.width * sizeof(Real));
    network_backward(*this, gradient_targets(), parameters(), b, o);
    round(0, 0, first), round(end, first + stride, table.size - end);
  }

  Parameters<const Real> parameters() const {
    return locate<const Real>(config, table, arrays.weights);
  }
  // Block i at work on b sequences.
  Block<Real> block(size_t i, const Parameters<const Real>& w, size_t b) {
    return {w.block(i), saved(i), arrays.scratch, shape(b)};
  }
  BlockShape<Real> shape(size_t b) const {
    Tokens tokens{b, config.image_tokens(), config.text_tokens};
    if (config.means == "global") tokens = {b, config.tokens(), 0};
    return {{tokens, config.width, config.norm_eps},
            {b, config.tokens(), config.heads, config.head_dim()},
            config.ffn,
            {arrays.cosine, arrays.sine, config.image_tokens()}};
  }

  // The input (B, T, D) of block i; of block `depth`: the trunk's output.
  Real* input(size_t i) {
    size_t stride = Arrays<Real>::input_stride(config, batch);
    if (!trains) return arrays.inputs + i % 2 * stride;
    if (i == config.depth) return arrays.output;
    return i % span ? arrays.blocks[i % span].X : arrays.inputs + i / span * stride;
  }
  BlockSaved<Real> saved(size_t i) {
    BlockSaved<Real> s = arrays.blocks[i % span];
    s.X = input(i), s.X_next = input(i + 1), s.merge = arrays.merges[trains ? i : 0];
    s.merge[0].r_X = i ? arrays.merges[trains ? i - 1 : 0][1].r : nullptr;
    s.merge[1].r_X = s.merge[0].r;
    return s;
  }

 private:
  Plan memory_{&device};
  const Table block_table_ = parameter_table(one_block(config));  // of arrays.unrounded

  // Where the backward's kernels write.
  Parameters<Acc> gradient_targets() {
    if constexpr (!rounds_gradients) return locate<Acc>(config, table, arrays.gradients);
    Parameters<Acc> dw = locate<Acc>(one_block(config), block_table_, arrays.unrounded);
    dw.block_stride = 0;  // every block's are the one block's
    return dw;
  }
};

// ---------------------------------------------------------------------------------------------
// D. Attention: how heads are gone through, and all of it on tensor cores
//
// D.1 Heads

// Neighbouring channels of both halves of a head, of one array or of two.
template <class Real, int wide, int arrays>
struct HeadPiece {
  Several<Real, wide> of[arrays][2];

  HD Point<AccOf<Real>> point(int array, int i) const {
    return {AccOf<Real>(of[array][0].v[i]), AccOf<Real>(of[array][1].v[i])};
  }
};

// For each head of Q and K inside x and y (B, T, 3, H, hd): found = finish(number, <x, y>, mine),
// and x = put(x, y, R, found) for each of its points. (With one array y is x.)
//
// A team, a warp or less, takes one of a token's 2 H head vectors, the queries, then the keys. A
// thread has `wide` neighbouring channels of each half, and keeps the first that it has, on a GPU
// all of them up to hd = 64 `wide`.
template <int wide, int arrays, class Real, class Finish, class Put>
void replace_heads_by(const Device& device, Real* x, const Real* y, Rope<AccOf<Real>> rope,
                      Heads heads, const Finish& finish, const Put& put) {
  using Acc = AccOf<Real>;
  using Piece = HeadPiece<Real, wide, arrays>;
  using Wide = Several<Real, wide>;
  size_t half = heads.dim / 2, vectors = 2 * heads.count;  // of a token
  int threads = threads_to_cover(half, wide, 32);
  for_each_team(device, heads.batch * heads.length * vectors, threads, [=] HD(Team team) {
    // (In 32 bits, which all teams of a GPU have: 64-bit divisions take long.)
    size_t row = uint32_t(team.index) / uint32_t(vectors),
           head = uint32_t(team.index) % uint32_t(vectors);
    size_t token = uint32_t(row) % uint32_t(heads.length), own = size_t(wide * team.rank);
    size_t at = row * 3 * heads.width() + head * heads.dim;
    auto angle = [&](const Acc* table, size_t j) {
      size_t image_token = token < rope.image_tokens ? token : 0;  // text: not used, no branch
      return *reinterpret_cast<const Several<Acc, wide>*>(table + image_token * half + j);
    };
    auto read = [&](size_t j) {
      Piece p;
      for (int a = 0; a < arrays; ++a)
        for (int i = 0; i < 2; ++i)
          p.of[a][i] = *reinterpret_cast<const Wide*>((a ? y : x) + at + j + size_t(i) * half);
      return p;
    };
    Piece kept = {};
    Several<Acc, wide> cosine = {}, sine = {};
    Acc sum = 0;
    for (size_t j = own; j < half; j += size_t(wide * team.size)) {
      Piece p = read(j);
      if (j == own) kept = p, cosine = angle(rope.cosine, j), sine = angle(rope.sine, j);
      for (int i = 0; i < wide; ++i) {
        Point<Acc> u = p.point(0, i), v = p.point(arrays - 1, i);
        sum += u.x1 * v.x1 + u.x2 * v.x2;
      }
    }
    auto found = finish(team.index, team.sum(sum), team.rank == 0);
    for (size_t j = own; j < half; j += size_t(wide * team.size)) {
      bool first = j == own;
      Piece p = first ? kept : read(j);
      Several<Acc, wide> c = first ? cosine : angle(rope.cosine, j);
      Several<Acc, wide> s = first ? sine : angle(rope.sine, j);
      for (int i = 0; i < wide; ++i) {
        Rotation<Acc> R{c.v[i], s.v[i]};
        if (token >= rope.image_tokens) R = {1, 0};
        Point<Acc> out = put(p.point(0, i), p.point(arrays - 1, i), R, found);
        p.of[0][0].v[i] = Real(out.x1), p.of[0][1].v[i] = Real(out.x2);
      }
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<Wide*>(x + at + j + size_t(i) * half) = p.of[0][i];
    }
  });
}

// One array: loads as wide as the halves allow.
template <class Real, class Finish, class Put>
void replace_heads(const Device& device, Real* x, Rope<AccOf<Real>> rope, Heads heads,
                   const Finish& finish, const Put& put) {
  if (heads.dim % 8 == 0)
    replace_heads_by<4, 1>(device, x, x, rope, heads, finish, put);
  else
    replace_heads_by<2, 1>(device, x, x, rope, heads, finish, put);
}
// Two: a channel at a time. This runs off tensor cores alone, where other kernels take the time.
template <class Real, class Finish, class Put>
void replace_heads(const Device& device, Real* x, const Real* y, Rope<AccOf<Real>> rope,
                   Heads heads, const Finish& finish, const Put& put) {
  replace_heads_by<1, 2>(device, x, y, rope, heads, finish, put);
}

// D.2 On tensor cores
//
// Each of the six products of 2.2 writes or reads a (T, T) matrix in memory. For bf16 on a GPU
// there is a second way that keeps them in registers (the idea is FlashAttention's). A thread block
// has 64 rows of S, a warp 16 of them; it walks over tiles of 32 columns, makes that much of S, and
// uses it up at once. Two things make this shorter than it is in general:
//
// - QK-norm bounds |S| by sqrt(hd), 11.3 for hd = 128, so exp(S) needs no running maximum. The
//   forward is
//       Y_i = sum_j e^(S_ij) V_j / sum_j e^(S_ij),   and keeps   l_i = log_2 sum_j e^(S_ij),
//   both sums of what is rounded for the product: then Y is vbar, to fp32, where all V_j are (2.2).
// - The backward makes A_ij = e^(S_ij) / 2^(l_i) again. Since <a, dA> = sum_j a_j <g, V_j> = <g,
//   y>, the inner product of 2.2 is c_i = <G_i, Y_i>, known before any S is. (Not of the rounded Y:
//   an error d of c_i is one of -d A_ij in all of row i of dS, which does not average out as those
//   of single dA_ij do; and when values are alike, dA - c is small. So the forward keeps what
//   rounding took from Y as well.) Then
//       dQ = dS K / sqrt(hd),      dK = dS^T Q / sqrt(hd),      dV = A^T G,      dS = A * (dA - c)
//   are two walks. A block keeps 64 rows of two factors, L1 and L2, and goes over the other two, C1
//   and C2, 32 rows at a time:
//
//                 L1   L2   C1   C2     sums
//       dQ        Q    G    K    V      dS C1              S   = L1 C1^T / sqrt(hd), dA   = L2 C2^T
//       dK, dV    K    V    Q    G      dS^T C1, A^T C2    S^T = L1 C1^T / sqrt(hd), dA^T = L2 C2^T
//
//   That makes S twice, but each sum belongs to one thread block (no atomics, the same bits each
//   time) and fits into its registers. The products are not scaled in the code: 1/sqrt(hd) goes
//   into the exponent, and to dQ and dK on the way out. There dQ becomes dS P K (2.2) as well: dS K
//   less (dS 1) kbar^T, from the sums of the rounded dS that went into the product and of the keys,
//   which the walk has both at hand.
//
// dQ and dK leave through RoPE and QK-norm's backward (2.1), since a thread that holds channel j of
// a row also holds channel j + hd/2.
//
// Two kinds of product are needed, of 64 rows, L, with 32 rows, C,
//     product_of_rows:   x (64 x 32) = L C^T,
// and a sum of C's rows,
//     add_rows:          y (64 x hd) += x C,     x (64 x 32) rounded.
// Hopper's wgmma reads C from shared memory; L too in the first, in the second x from registers.
// The four warps call it together and go on while it works; wait<k>(x, ...) waits for all calls but
// the latest k, and keeps the compiler from reading the sums x earlier. mma is a product of one
// warp's, done when the call returns. Before Hopper it makes these two products as well. Sums are
// products with ones, by mma everywhere, which need no exchange between lanes: of x 1 all columns
// are the sum of each row, of 1 C all rows that of each column.

// inner (B, H, T), c_i = <G_i, Y_i> for each head, from dY and Y (B, T, D), given as Y and what
// rounding took from it.
template <class Real>
void head_products(const Device& device, AccOf<Real>* inner, const Real* dY, const Real* Y,
                   const Real* Y_rest, Heads heads) {
  using Acc = AccOf<Real>;
  size_t all = heads.batch * heads.length * heads.count;
  for_each_team(device, all, threads_for_row(heads.dim), [=] HD(Team team) {
    Acc sum = sum_of_row<Acc>(team, heads.dim, [&](size_t d) {
      size_t at = team.index * heads.dim + d;
      return dot(load<Acc>(dY + at), load<Acc>(Y + at) + load<Acc>(Y_rest + at));
    });
    if (team.rank != 0) return;
    uint32_t all_heads = uint32_t(heads.count), length = uint32_t(heads.length);
    uint32_t row = uint32_t(team.index) / all_heads, head = uint32_t(team.index) % all_heads;
    inner[(row / length * heads.count + head) * heads.length + row % length] = sum;
  });
}

#ifdef __CUDACC__
constexpr int block_rows = 64, tile_columns = 32, block_threads = 128;

// A warp's 32 lanes are 8 groups of 4, lane = 4 g + t. Of a 16 x 16 piece of a left factor, a lane
// holds rows g and g + 8, and of each the columns 2t, 2t + 1, 2t + 8, 2t + 9: r[0..3] are (row g,
// first two), (row g + 8, first two), (row g, last two), (row g + 8, last two). (PTX manual,
// mma.m16n8k16.)
struct Fragment {
  uint32_t r[4];
};

// A tile in shared memory, `rows` of `dim` bf16, at an address in bytes that 1024 divides: panels
// of 64 columns, 128 bytes a row. Chunk c (16 bytes) of a row is at place c ^ row % 8, so that the
// same chunk of eight rows, which is what a tensor core reads at once, lies in different banks.
// (Hopper's name for this order is the 128-byte swizzle.)
template <int dim, int rows>
struct Tile {
  unsigned at;
  static constexpr unsigned panel = 128 * rows, size = dim / 64 * panel;

  __device__ unsigned address(int row, int column) const {
    unsigned r = unsigned(row), c = unsigned(column);
    return at + c / 64 * panel + r * 128 + (c / 8 % 8 ^ r % 8) * 16 + c % 8 * 2;
  }
  __device__ uint32_t& pair(int row, int column) const {  // a number of even column and the next
    return *static_cast<uint32_t*>(__cvta_shared_to_generic(address(row, column)));
  }

  // Start to copy rows first.. of a matrix of n rows; after the last, zeros, and nothing is read.
  __device__ void load(const bf16* from, unsigned stride, int first, int n) const {
    constexpr int chunks = dim / 8, step = block_threads / chunks;  // step % 8 == 0: one place
    int row = int(threadIdx.x) / chunks, column = int(threadIdx.x) % chunks * 8;
    // (A product of 32-bit factors is one instruction. The CUDA library's copy would branch.)
    const bf16* source = from + size_t(unsigned(first + row)) * stride + column;
    unsigned to = address(row, column);
    UNROLL
    for (int i = 0; i < rows; i += step)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + unsigned(i) * 128),
                   "l"(source + size_t(i) * stride), "r"(first + row + i < n ? 16 : 0));
  }
  // Copy the warp's 16 rows, which it has written, to rows first.. of a matrix of n rows.
  __device__ void store(bf16* to, size_t stride, int first, int n) const {
    constexpr int chunks = dim / 8, step = 32 / chunks;
    int row = int(threadIdx.x / 32) * 16 + int(threadIdx.x % 32) / chunks;
    int column = int(threadIdx.x % 32) % chunks * 8;
    __syncwarp();
    UNROLL
    for (int i = 0; i < 16; i += step)
      if (first + row + i < n)
        *reinterpret_cast<uint4*>(to + size_t(first + row + i) * stride + column) =
            *static_cast<const uint4*>(__cvta_shared_to_generic(address(row + i, column)));
  }
};

// Two neighbours as bf16, the first in the lower half.
__device__ inline uint32_t packed(float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
__device__ inline float first_of(uint32_t both) { return __uint_as_float(both << 16); }
__device__ inline float second_of(uint32_t both) { return __uint_as_float(both & 0xffff0000u); }

// A product's 64 rows are the block's, 16 a warp. Of columns 8 i to 8 i + 7 lane 4 g + t holds, as
// x[i][0..3], (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). Rounded, x[i] and x[i + 1] are a
// left factor as they lie:
__device__ inline Fragment as_left(const float (*x)[4]) {
  return {{packed(x[0][0], x[0][1]), packed(x[0][2], x[0][3]), packed(x[1][0], x[1][1]),
           packed(x[1][2], x[1][3])}};
}
// Columns from n on become zero.
__device__ inline void zero_from(float (&x)[4][4], int n) {
  if (n >= tile_columns) return;
  UNROLL
  for (int i = 0; i < 16; ++i)
    if (i / 4 * 8 + 2 * int(threadIdx.x % 4) + i % 2 >= n) x[i / 4][i % 4] = 0;
}
// Four 8 x 8 matrices, each lane naming a row of one, as they lie or transposed.
template <bool transposed>
__device__ Fragment gather(unsigned row_address) {
  Fragment f;
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                 : "r"(row_address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                 : "r"(row_address));
  return f;
}
// x (16 x 8) += a b, b0 and b1 being b's upper and lower eight rows.
__device__ inline void multiply(float (&x)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
}
// x[0], x[1] += a b for the two 16 x 8 halves of b.
__device__ inline void multiply(float (*x)[4], const Fragment& a, const Fragment& b) {
  multiply(x[0], a, b.r[0], b.r[1]), multiply(x[1], a, b.r[2], b.r[3]);
}

constexpr uint32_t ones = 0x3f803f80;  // two of bf16
// sum[0], sum[2] += rows g, g + 8 of two left factors, side by side. ([1] and [3] are the same.)
__device__ inline void add_row_sums(float (&sum)[4], const Fragment (&x)[2]) {
  multiply(sum, x[0], ones, ones), multiply(sum, x[1], ones, ones);
}
// A warp has dim / 4 columns, from `first` on: sum[i][0], sum[i][1] += columns 8 i + 2 t of these,
// and the next.
template <int dim>
__device__ void add_column_sums(float (&sum)[dim / 32][4], Tile<dim, tile_columns> C) {
  int lane = int(threadIdx.x % 32), first = int(threadIdx.x / 32) * dim / 4;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    UNROLL
    for (int i = 0; i < dim / 32; i += 2)
      multiply(sum + i, {{ones, ones, ones, ones}},
               gather<true>(C.address(16 * half + lane % 16, first + 8 * i + lane / 16 * 8)));
  }
}
// means (dim), in shared memory: those sums over n. (Eight lanes store the same.)
template <int dim>
__device__ void column_means(float* means, const float (&sum)[dim / 32][4], int n) {
  int first = int(threadIdx.x / 32) * dim / 4 + 2 * int(threadIdx.x % 4);
  UNROLL
  for (int i = 0; i < dim / 16; ++i)
    means[first + i / 2 * 8 + i % 2] = sum[i / 2][i % 2] / float(n);
  __syncthreads();
}
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define QUAD(x) "+f"((x)[0]), "+f"((x)[1]), "+f"((x)[2]), "+f"((x)[3])

__device__ inline void begin_product() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_product() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int n>
__device__ void settle(float (&x)[n][4]) {
  UNROLL
  for (int i = 0; i < n; ++i) asm volatile("" : QUAD(x[i])::"memory");
}
template <int k, class... Sums>
__device__ void wait(Sums&... x) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(k) : "memory");
  (settle(x), ...);
}
// A tile, from `offset` bytes on, as the instruction is told of it: in units of 16 bytes, its
// address (14 bits: shared memory is smaller), the distance of its panels and, in the upper half,
// that of groups of eight rows; bit 30 there: 128-byte swizzle.
template <int dim, int rows>
__device__ uint64_t described(Tile<dim, rows> tile, unsigned offset) {
  unsigned low = tile.at / 16 + offset / 16 + (tile.panel / 16 << 16);
  return (uint64_t(1u << 30 | 1024 / 16) << 32) | low;
}

// Step k is columns 16 k to 16 k + 15, 32 bytes of a row. `add`: not in the first, which overwrites
// x. Then the signs of both factors, and that neither is transposed.
template <int dim>
__device__ void product_of_rows(float (&x)[4][4], Tile<dim, block_rows> L,
                                Tile<dim, tile_columns> C) {
  begin_product();
  UNROLL
  for (int k = 0; k < dim / 16; ++k)
    asm volatile(
        "{.reg .pred add; setp.ne.u32 add, %18, 0; "
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, add, 1, 1, 0, 0;}"
        : QUAD(x[0]), QUAD(x[1]), QUAD(x[2]), QUAD(x[3])
        : "l"(described(L, k / 4 * L.panel + k % 4 * 32)),
          "l"(described(C, k / 4 * C.panel + k % 4 * 32)), "r"(k));
  end_product();
}

// Step k is rows 16 k to 16 k + 15 of C, 128 bytes each; it is always added. Then the signs, and
// that C is transposed.
template <int dim>
__device__ void add_rows(float (&y)[dim / 8][4], const Fragment (&x)[2],
                         Tile<dim, tile_columns> C) {
  begin_product();
  UNROLL
  for (int k = 0; k < 2; ++k) {
    UNROLL
    for (int panel = 0; panel < dim / 64; ++panel) {
      float(*to)[4] = y + 8 * panel;
      asm volatile(
          "{.reg .pred add; setp.eq.u32 add, 0, 0; "
          "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
          "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
          "{%32, %33, %34, %35}, %36, add, 1, 1, 1;}"
          : QUAD(to[0]), QUAD(to[1]), QUAD(to[2]), QUAD(to[3]), QUAD(to[4]), QUAD(to[5]),
            QUAD(to[6]), QUAD(to[7])
          : "r"(x[k].r[0]), "r"(x[k].r[1]), "r"(x[k].r[2]), "r"(x[k].r[3]),
            "l"(described(C, unsigned(panel) * C.panel + unsigned(k) * 2048)));
    }
  }
  end_product();
}
#undef QUAD
#else
template <int k, class... Sums>
__device__ void wait(Sums&...) {}

template <int dim>
__device__ void product_of_rows(float (&x)[4][4], Tile<dim, block_rows> L,
                                Tile<dim, tile_columns> C) {
  int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32) * 16;
  UNROLL
  for (int i = 0; i < 16; ++i) x[i / 4][i % 4] = 0;
  UNROLL
  for (int k = 0; k < dim / 16; ++k) {
    Fragment l = gather<false>(L.address(warp + lane % 16, 16 * k + lane / 16 * 8));
    UNROLL
    for (int half = 0; half < 2; ++half)
      multiply(x + 2 * half, l,
               gather<false>(
                   C.address(16 * half + lane / 16 * 8 + lane % 8, 16 * k + lane / 8 % 2 * 8)));
  }
}

template <int dim>
__device__ void add_rows(float (&y)[dim / 8][4], const Fragment (&x)[2],
                         Tile<dim, tile_columns> C) {
  int lane = int(threadIdx.x % 32);
  UNROLL
  for (int half = 0; half < 2; ++half) {
    UNROLL
    for (int k = 0; k < dim / 16; ++k)
      multiply(y + 2 * k, x[half],
               gather<true>(C.address(16 * half + lane % 16, 16 * k + lane / 16 * 8)));
  }
}
#endif

// All but the latest group of loads are there, for every thread of the block and for wgmma. (Each
// __pipeline_commit() ends a group: after the last tile an empty one, which keeps the count.)
__device__ inline void wait_for_loads_but_one() {
  __pipeline_wait_prior(1);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;");
#endif
  __syncthreads();
}
// 2^x, to 2 units in the last place of a float.
__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
constexpr float log2_e = 1.4426950408889634f;

// Where a thread block, and this thread in it, works. Blocks count 64 rows of a head first, then
// heads, then sequences.
struct AttentionPlace {
  Heads heads;
  int n = int(heads.length), blocks = (n + block_rows - 1) / block_rows;  // T; of one head
  int first = int(blockIdx.x) % blocks * block_rows;                      // the block's first row
  int warp = int(threadIdx.x / 32) * 16;  // in the block, the warp's first row
  int g = int(threadIdx.x % 32 / 4), t = int(threadIdx.x % 4);               // the lane is 4 g + t
  unsigned H = unsigned(heads.count), pair = blockIdx.x / unsigned(blocks);  // b H + head
  unsigned head = pair % H;
  size_t before = pair / H * heads.length;  // b T, tokens of earlier sequences
};

// Y, Y_rest (B, T, D) and log_sums (B, H, T) from qkv.
template <int dim>
__global__ void __launch_bounds__(block_threads, 4)
    attention_forward_kernel(bf16* Y, bf16* Y_rest, float* log_sums, const bf16* qkv, Heads heads) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(1024) unsigned char shared[];
  using Rows = Tile<dim, block_rows>;
  using Columns = Tile<dim, tile_columns>;
  Rows Q{unsigned(__cvta_generic_to_shared(shared))};
  auto columns = [&](int i) { return Columns{Q.at + Q.size + unsigned(i) * Columns::size}; };
  AttentionPlace p{heads};
  unsigned D = p.H * dim, stride = 3 * D;
  const bf16* q = qkv + p.before * stride + p.head * dim;
  float log2_scale = log2_e / sqrtf(float(dim));  // e^x = 2^(x log2 e)
  auto load_columns = [&](int tile) {
    columns(tile % 2).load(q + D, stride, tile * tile_columns, p.n);
    columns(2 + tile % 2).load(q + 2 * D, stride, tile * tile_columns, p.n);
  };

  Q.load(q, stride, p.first, p.n), load_columns(0);
  __pipeline_commit();
  float y[dim / 8][4] = {}, sum[4] = {};
  for (int tile = 0; tile * tile_columns < p.n; ++tile) {
    if ((tile + 1) * tile_columns < p.n) load_columns(tile + 1);
    __pipeline_commit();
    wait_for_loads_but_one();
    Columns K = columns(tile % 2), V = columns(2 + tile % 2);
    float probs[4][4];
    product_of_rows(probs, Q, K);
    wait<0>(probs);
    UNROLL
    for (int i = 0; i < 16; ++i) {
      float& x = probs[i / 4][i % 4];
      x = power_of_2(x * log2_scale);
    }
    zero_from(probs, p.n - tile * tile_columns);
    const Fragment left[2] = {as_left(probs), as_left(probs + 2)};
    add_row_sums(sum, left);
    add_rows(y, left, V);
    wait<0>(y);
    __syncthreads();  // before the tile is overwritten
  }
  // Y leaves by way of Q's tile, what rounding takes from it by way of K's two.
  Rows rest{columns(0).at};
  UNROLL
  for (int i = 0; i < 2; ++i) {
    float total = sum[2 * i], inverse = 1 / total;
    int row = p.warp + p.g + 8 * i;
    UNROLL
    for (int k = 0; k < dim / 8; ++k) {
      float even = inverse * y[k][2 * i], odd = inverse * y[k][2 * i + 1];
      uint32_t both = packed(even, odd);
      Q.pair(row, 8 * k + 2 * p.t) = both;
      rest.pair(row, 8 * k + 2 * p.t) = packed(even - first_of(both), odd - second_of(both));
    }
    if (p.t == 0 && p.first + row < p.n)
      log_sums[p.pair * heads.length + size_t(p.first + row)] = log2f(total);
  }
  size_t out = p.before * D + p.head * dim;
  Q.store(Y + out, D, p.first, p.n);
  if (Y_rest) rest.store(Y_rest + out, D, p.first, p.n);
#endif
}

// What the backward reads, and dqkv (B, T, 3, H, hd), which it writes.
struct AttentionBackward {
  bf16* dqkv;
  const bf16 *qkv, *dY;               // dY (B, T, D)
  const float *log_sums, *inner, *r;  // l and c (B, H, T); r (B, T, 2, H), of QK-norm
  Rope<float> rope;
  Heads heads;
};

// y, normalised Q or K, becomes dx = R^T (r g - r (<g, y> / hd) y), g = scale d. r: the QK-norm
// factor of the sequence's first token, r_stride apart. (2.1)
template <int dim>
__device__ void leave_through_rope(Tile<dim, block_rows> y, const float (&d)[dim / 8][4],
                                   float scale, const float* r, size_t r_stride, Rope<float> rope,
                                   const AttentionPlace& p) {
  constexpr int half = dim / 2;
  UNROLL
  for (int i = 0; i < 2; ++i) {
    int row = p.warp + p.g + 8 * i;
    size_t token = size_t(min(p.first + row, p.n - 1));  // rows after the last are not stored
    float r_scale = scale * __ldg(r + token * r_stride), d_y = 0;  // <d, y>
    UNROLL
    for (int k = 0; k < dim / 8; ++k) {
      uint32_t both = y.pair(row, 8 * k + 2 * p.t);
      d_y += d[k][2 * i] * first_of(both) + d[k][2 * i + 1] * second_of(both);
    }
    for (int bit = 1; bit < 4; bit *= 2) d_y += __shfl_xor_sync(~0u, d_y, bit);
    float along_y = r_scale * d_y / dim;  // r <g, y> / hd
    UNROLL
    for (int k = 0; k < dim / 16; ++k) {
      int at = 8 * k + 2 * p.t;
      uint32_t &low = y.pair(row, at), &high = y.pair(row, at + half);
      float2 cosine = {1, 1}, sine = {0, 0};
      if (token < rope.image_tokens) {
        size_t angle = token * half + size_t(at);
        cosine = __ldg(reinterpret_cast<const float2*>(rope.cosine + angle));
        sine = __ldg(reinterpret_cast<const float2*>(rope.sine + angle));
      }
      auto turned = [&](float c, float s, int j, float y1, float y2) {  // channel at + j
        return turn_back({c, s}, Point<float>{r_scale * d[k][2 * i + j] - along_y * y1,
                                              r_scale * d[k + dim / 16][2 * i + j] - along_y * y2});
      };
      Point<float> first = turned(cosine.x, sine.x, 0, first_of(low), first_of(high));
      Point<float> second = turned(cosine.y, sine.y, 1, second_of(low), second_of(high));
      low = packed(first.x1, second.x1), high = packed(first.x2, second.x2);
    }
  }
}

// One of the two walks, for 64 rows: dK and dV (`keys`: rows are keys, columns queries; A, dA and
// dS below are then the transposed ones, d1 = dK, d2 = dV), or dQ (rows are queries, d1 = dQ). dS
// is made in dA's place.
template <int dim, bool keys>
__device__ void attention_backward_rows(unsigned char* shared, const AttentionBackward& c) {
  using Rows = Tile<dim, block_rows>;
  using Columns = Tile<dim, tile_columns>;
  Rows L1{unsigned(__cvta_generic_to_shared(shared))}, L2{L1.at + Rows::size};
  auto columns = [&](int i) { return Columns{L2.at + Rows::size + unsigned(i) * Columns::size}; };
  AttentionPlace p{c.heads};
  unsigned D = p.H * dim, stride = 3 * D;
  size_t start = p.before * stride + p.head * dim;
  const bf16 *q = c.qkv + start, *k = q + D, *v = k + D;
  const bf16* dy = c.dY + p.before * D + p.head * dim;
  const float* log_sums = c.log_sums + p.pair * c.heads.length;
  const float* inner = c.inner + p.pair * c.heads.length;
  float scale = 1 / sqrtf(float(dim)), log2_scale = log2_e * scale;
  // l and c of a tile's queries, where these are the columns: two rows of 32 floats a stage.
  float* of_columns = reinterpret_cast<float*>(shared + 2 * Rows::size + 4 * Columns::size);
  auto load_columns = [&](int tile) {
    int from = tile * tile_columns, i = int(threadIdx.x), query = from + i % tile_columns;
    columns(tile % 2).load(keys ? q : k, stride, from, p.n);
    columns(2 + tile % 2).load(keys ? dy : v, keys ? D : stride, from, p.n);
    if (keys && i < 2 * tile_columns)
      __pipeline_memcpy_async(of_columns + tile % 2 * 2 * tile_columns + i,
                              (i < tile_columns ? log_sums : inner) + query, 4,
                              query < p.n ? 0 : 4);  // so many are zeros, not read
  };

  L1.load(keys ? k : q, stride, p.first, p.n);
  L2.load(keys ? v : dy, keys ? stride : D, p.first, p.n);
  load_columns(0);
  __pipeline_commit();
  float d1[dim / 8][4] = {}, d2[keys ? dim / 8 : 1][4] = {}, row_log[2], row_inner[2], sum[4] = {};
  float key_sum[dim / 32][4] = {};
  if (!keys) {
    UNROLL
    for (int i = 0; i < 2; ++i) {
      int query = min(p.first + p.warp + p.g + 8 * i, p.n - 1);
      row_log[i] = log_sums[query], row_inner[i] = inner[query];
    }
  }
  for (int tile = 0; tile * tile_columns < p.n; ++tile) {
    if ((tile + 1) * tile_columns < p.n) load_columns(tile + 1);
    __pipeline_commit();
    wait_for_loads_but_one();
    Columns C1 = columns(tile % 2), C2 = columns(2 + tile % 2);
    const float* of_tile = of_columns + tile % 2 * 2 * tile_columns;
    auto column = [&](int i) { return i / 4 * 8 + 2 * p.t + i % 2; };
    float probs[4][4], dA[4][4];
    product_of_rows(probs, L1, C1);
    product_of_rows(dA, L2, C2);
    wait<1>(probs);
    // Rows and columns after the last are zero in every tile: A, finite, adds nothing to a product.
    // But rows of dS are summed as well, so their keys must be there.
    UNROLL
    for (int i = 0; i < 16; ++i) {
      float& x = probs[i / 4][i % 4];
      x = power_of_2(log2_scale * x - (keys ? of_tile[column(i)] : row_log[i / 2 % 2]));
    }
    if (!keys) zero_from(probs, p.n - tile * tile_columns);
    wait<0>(dA);
    UNROLL
    for (int i = 0; i < 16; ++i)  // (dS)
      dA[i / 4][i % 4] =
          probs[i / 4][i % 4] *
          (dA[i / 4][i % 4] - (keys ? of_tile[tile_columns + column(i)] : row_inner[i / 2 % 2]));
    const Fragment dS[2] = {as_left(dA), as_left(dA + 2)};
    const Fragment A[2] = {as_left(probs), as_left(probs + 2)};
    // Before the product: until it is done, its left factor must not be read.
    if (!keys) add_row_sums(sum, dS), add_column_sums(key_sum, C1);
    add_rows(d1, dS, C1);
    if constexpr (keys) add_rows(d2, A, C2);
    wait<0>(d1, d2);
    __syncthreads();
  }
  if (!keys) {
    float* kbar = reinterpret_cast<float*>(shared + 2 * Rows::size);  // where the tiles were
    column_means<dim>(kbar, key_sum, p.n);
    UNROLL
    for (int i = 0; i < dim / 2; ++i)  // less (dS 1) kbar^T
      d1[i / 4][i % 4] -= sum[i % 4 / 2 * 2] * kbar[i / 4 * 8 + 2 * p.t + i % 2];
  }
  // The sums leave by way of the rows' tiles.
  constexpr size_t part = keys ? 1 : 0;
  const float* r = c.r + (p.before * 2 + part) * p.H + p.head;
  leave_through_rope<dim>(L1, d1, scale, r, 2 * p.H, c.rope, p);
  L1.store(c.dqkv + start + part * D, stride, p.first, p.n);
  if constexpr (keys) {
    UNROLL
    for (int i = 0; i < dim / 4; ++i)
      L2.pair(p.warp + p.g + i % 2 * 8, i / 2 * 8 + 2 * p.t) =
          packed(d2[i / 2][i % 2 * 2], d2[i / 2][i % 2 * 2 + 1]);
    L2.store(c.dqkv + start + 2 * D, stride, p.first, p.n);
  }
}

template <int dim>
__global__ void __launch_bounds__(block_threads, dim == 64 ? 3 : 2)
    attention_backward_kernel(AttentionBackward c) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(1024) unsigned char shared[];
  if (blockIdx.z == 0)  // the longer walks first
    attention_backward_rows<dim, true>(shared, c);
  else
    attention_backward_rows<dim, false>(shared, c);
#endif
}
#endif

// attention_forward() on tensor cores: s.Y, what rounding took from it (s.Y_rest, unless null) and
// s.log_sums (B, H, T) from s.qkv, whose Q and K are normalised. False where that is not how it is
// done: then nothing is.
template <class Real>
bool fused_attention_forward(Device& device, const BlockSaved<Real>& s, Heads heads) {
  if (!s.log_sums) return false;
#ifdef __CUDACC__
  if constexpr (std::is_same_v<Real, bf16>) {
    dim3 blocks(unsigned(ceil_div(heads.length, block_rows) * heads.batch * heads.count));
    size_t rows = block_rows + 4 * tile_columns;
    auto kernel = heads.dim == 64 ? attention_forward_kernel<64> : attention_forward_kernel<128>;
    launch(device, kernel, blocks, 1, block_threads, rows * heads.dim * sizeof(Real), s.Y, s.Y_rest,
           s.log_sums, s.qkv, heads);
  }
#endif
  (void)device, (void)heads;
  return true;
}

// attention_backward() and rope_qk_norm_backward() on tensor cores: scratch.dqkv (=) from
// scratch.dY and what the forward saved; or false.
template <class Real>
bool fused_attention_backward(Device& device, const Block<Real>& block) {
  const BlockSaved<Real>& s = block.saved;
  const BlockScratch<Real>& scratch = block.scratch;
  Heads heads = block.shape.heads;
  if (!s.log_sums) return false;
  head_products(device, scratch.inner, scratch.dY, s.Y, s.Y_rest, heads);
#ifdef __CUDACC__
  if constexpr (std::is_same_v<Real, bf16>) {
    dim3 blocks(unsigned(ceil_div(heads.length, block_rows) * heads.batch * heads.count), 1, 2);
    size_t rows = 2 * block_rows + 4 * tile_columns, floats = 4 * tile_columns;
    AttentionBackward c{scratch.dqkv,  s.qkv,  scratch.dY,       s.log_sums,
                        scratch.inner, s.r_qk, block.shape.rope, heads};
    auto kernel = heads.dim == 64 ? attention_backward_kernel<64> : attention_backward_kernel<128>;
    launch(device, kernel, blocks, 1, block_threads,
           rows * heads.dim * sizeof(Real) + floats * sizeof(float), c);
  }
#endif
  return true;
}

// ---------------------------------------------------------------------------------------------
// E. Diagnostics: the quantities that the paper argues with (its Table 2)
//
// All of them describe the first `samples` sequences of a batch in a few chosen blocks, and are
// read off during the backward, when what the forward saved and the writers' adjoints are both
// there. The kernels write to arrays of their own, so a step with them has the same bits as one
// without.
//
// A measurement is one struct, as WritersMeasured: how many numbers it leaves, its scratch, the
// kernels that make them, and the columns of diagnostics.csv that are read off them; and one entry
// in the list `Measurements`.

// The sizes of what is measured.
struct MeasuredSizes {
  Config config;
  size_t samples, batch;  // sequences that most measurements are of, and that a pass has

  Tokens tokens() const { return {samples, config.image_tokens(), config.text_tokens}; }
  Heads heads() const { return {samples, config.tokens(), config.heads, config.head_dim()}; }
};

// What there is to see during a backward: what a block saved, one of its writers, 0 (W_O) or 1
// (W2), with its input y (B, T, n), its adjoint delta (B, T, D), and the X, F (B, T, D) of its
// merge.
template <class Real>
struct Sight {
  const BlockSaved<Real>& saved;
  int writer;
  const Real* delta;

  const Real* y() const { return writer ? saved.hidden : saved.Y; }
  const Real* X() const { return writer ? saved.X1 : saved.X; }
  const Real* F() const { return writer ? saved.F2 : saved.F1; }
};

// One column of diagnostics.csv, and what a measurement gives its columns to.
struct Reading {
  std::string name, about;
  double value;
};
using Add = std::function<void(const std::string& name, const std::string& about, double value)>;

// The mean of of(i) for i < n over those that are defined: one sample without a ratio does not take
// the others'.
template <class Of>
double mean_of(size_t n, const Of& of) {
  double sum = 0, count = 0;
  for (size_t i = 0; i < n; ++i)
    if (double x = of(i); !std::isnan(x)) sum += x, ++count;
  return count > 0 ? sum / count : NAN;
}
inline std::string shape_text(size_t rows, size_t columns) {
  return "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

// What a measurement need not say.
struct Measurement {
  static constexpr bool of_writers = false;  // once for each of a block's writers, or once a block?
  static constexpr bool of_spikes = false;   // also where only spikes are watched for (train.cu)?

  // Lay out the scratch; measurements take the same bytes by turns.
  void lay(Carver&, const MeasuredSizes&) {}
  // Enqueue what makes the numbers `to`: during a backward, or after it, from gradients.
  template <class Real>
  void during(Device&, double*, const Sight<Real>&, const MeasuredSizes&) {}
  template <class Kept>
  void after(Device&, double*, const BlockParameters<Kept>&, const MeasuredSizes&) {}
};

// The two parts of the writers' gradients, and their alignment (mvsplit.cu, appendix C).
template <class Real>
struct WritersMeasured : Measurement {
  static constexpr bool of_writers = true, of_spikes = true;
  WriterScratch<AccOf<Real>> scratch;

  // How many numbers (double) it leaves: WriterModes (samples).
  static size_t count(const MeasuredSizes& m) {
    return m.samples * sizeof(WriterModes) / sizeof(double);
  }
  static size_t inputs(int writer, const Config& c) { return writer ? c.ffn : c.width; }
  void lay(Carver& c, const MeasuredSizes& m) {
    scratch.lay(c, m.tokens(), std::max(m.config.width, m.config.ffn), m.config.width);
  }
  void during(Device& device, double* to, const Sight<Real>& see, const MeasuredSizes& m) {
    writer_modes(device, reinterpret_cast<WriterModes*>(to), scratch, see.y(), see.delta,
                 m.tokens(), inputs(see.writer, m.config), m.config.width);
  }
  // The columns. (Where they are of writers, "attention_" or "ffn_" is put before their names.)
  static void read(const double* from, int w, const MeasuredSizes& m, const Add& add) {
    std::string writer = w ? "W2" : "W_O", shape = shape_text(m.config.width, inputs(w, m.config));
    const WriterModes* modes = reinterpret_cast<const WriterModes*>(from);
    auto mode = [&](double WriterModes::*field) {
      return mean_of(m.samples, [&](size_t i) { return modes[i].*field; });
    };
    add("g_mean", "|dW_mu|_F of " + writer + " " + shape + ", global mean (5)",
        mode(&WriterModes::g_mean));
    add("g_ctr", "|dW_c|_F of " + writer + ", global mean (5)", mode(&WriterModes::g_ctr));
    add("amplification", "A = |dW|_F^2 / sum_t |delta_t|^2 |y_t|^2 (26)",
        mode(&WriterModes::amplification));
    add("khat", "weighted mean |cos(y_t, y_s) cos(delta_t, delta_s)|, s != t (32)",
        mode(&WriterModes::khat));
    add("amplification_author", "the author's: A over image tokens, of the first sample",
        modes[0].image_amplification);
    add("kappa_author", "likewise, the plain mean of |cos(y_t, y_s) cos(delta_t, delta_s)|, s != t",
        modes[0].image_kappa);
  }
};

// squares (count): |x|^2 of each of `count` stretches of x, `size` long.
template <class Number>
void sum_squares(const Device& device, double* squares, const Number* x, size_t count,
                 size_t size) {
  for_each_team(device, count, Team::max_size, [=] HD(Team team) {
    double sum = 0;
    for (size_t i = team.rank; i < size; i += team.size) {
      double value = double(x[team.index * size + i]);
      sum += value * value;
    }
    sum = team.sum(sum);
    if (team.rank == 0) squares[team.index] = sum;
  });
}

// The two parts of the gradient that a writer gets from all B sequences of a pass,
//     dW_mu = T sum_b dbar_b ybar_b^T,     dW_c = sum_bt dtil_bt ytil_bt^T,
// as the author's tool has them. Parts of single sequences, above, need not agree in direction.
template <class Real>
struct WriterSumsMeasured : Measurement {
  using Acc = AccOf<Real>;
  static constexpr bool of_writers = true;
  Acc *ybar, *dbar, *y, *delta, *dW;  // (B, 2, n), (B, 2, D), (samples, T, n), (, T, D), (D, n)

  static size_t count(const MeasuredSizes&) { return 2; }  // |dW_mu|^2, |dW_c|^2
  void lay(Carver& c, const MeasuredSizes& m) {
    size_t n = std::max(m.config.width, m.config.ffn), D = m.config.width, rows = m.tokens().rows();
    ybar = c.take<Acc>(m.batch * 2 * n), dbar = c.take<Acc>(m.batch * 2 * D);
    y = c.take<Acc>(rows * n), delta = c.take<Acc>(rows * D), dW = c.take<Acc>(D * n);
  }
  void during(Device& device, double* to, const Sight<Real>& see, const MeasuredSizes& m) {
    size_t T = m.config.tokens(), D = m.config.width, n = see.writer ? m.config.ffn : D;
    token_means(device, ybar, see.y(), {m.batch, T, 0}, n);
    token_means(device, dbar, see.delta, {m.batch, T, 0}, D);
    gemm(device, Matrix(dW, n), Matrix(dbar, 2 * D).transpose(), Matrix(ybar, 2 * n),
         {D, n, m.batch}, Acc(T));
    sum_squares(device, to, dW, 1, D * n);
    for (size_t b = 0; b < m.batch; b += m.samples) {
      size_t some = std::min(m.samples, m.batch - b);
      auto center = [&](Acc* out, const Real* x, size_t channels) {
        center_columns(device, Matrix(out, channels).batch(T * channels, 0),
                       Matrix(x + b * T * channels, channels).batch(T * channels, 0),
                       {T, channels, 0, some});
      };
      center(y, see.y(), n), center(delta, see.delta, D);
      linear_backward_weight(device, dW, delta, y, some * T, D, n, b > 0);
    }
    sum_squares(device, to + 1, dW, 1, D * n);
  }
  static void read(const double* from, int, const MeasuredSizes&, const Add& add) {
    add("g_mean_author", "the author's: |dW_mu|_F, dW_mu summed over the last pass's batch",
        std::sqrt(from[0]));
    add("g_ctr_author", "|dW_c|_F, likewise", std::sqrt(from[1]));
  }
};

// States of tokens. Of X with every token scaled to length 1: the mean u of T unit vectors has
// |u|^2 = (T + the sum of their T (T - 1) pairwise cosines) / T^2, so the mean cosine is
// (T |u|^2 - 1) / (T - 1): TCS, from the mean's energy T |u|^2.
template <class Real>
struct StatesMeasured : Measurement {
  using Acc = AccOf<Real>;
  static constexpr bool of_writers = true;
  Acc* inverse_norms;  // (samples, T)

  // Energies (3, samples, 2) of X, of F, and of X's unit tokens.
  static size_t count(const MeasuredSizes& m) { return 3 * m.samples * 2; }
  void lay(Carver& c, const MeasuredSizes& m) { inverse_norms = c.take<Acc>(m.tokens().rows()); }
  void during(Device& device, double* to, const Sight<Real>& see, const MeasuredSizes& m) {
    size_t B = m.samples, n = m.config.tokens(), D = m.config.width;
    const Real* X = see.X();
    Acc* inverse = inverse_norms;
    for_each_team(device, B * n, threads_for(D), [=] HD(Team team) {
      Acc squares = 0;
      for (size_t d = team.rank; d < D; d += team.size) {
        Acc x = Acc(X[team.index * D + d]);
        squares += x * x;
      }
      squares = team.sum(squares);
      if (team.rank == 0) inverse[team.index] = rsqrt_(squares);
    });
    matrix_energies(device, to, X, B, n, D);
    matrix_energies(device, to + 2 * B, see.F(), B, n, D);
    split_energies<Acc>(device, to + 4 * B, B, n, D, [=] HD(size_t b, size_t t, size_t d) {
      return inverse[b * n + t] * Acc(X[(b * n + t) * D + d]);
    });
  }
  static void read(const double* from, int, const MeasuredSizes& m, const Add& add) {
    auto mean = [&](size_t kind, size_t i) { return from[(kind * m.samples + i) * 2]; };
    auto rest = [&](size_t kind, size_t i) { return from[(kind * m.samples + i) * 2 + 1]; };
    auto all = [&](size_t kind, size_t i) { return mean(kind, i) + rest(kind, i); };
    auto root = [&](auto of) {
      return mean_of(m.samples, [&](size_t i) { return std::sqrt(of(i)); });
    };
    add("rho", "|mu(X)|_F / |c(X)|_F of the merge's trunk X",
        root([&](size_t i) { return mean(0, i) / rest(0, i); }));
    add("tr", "|F|_F / |X|_F", root([&](size_t i) { return all(1, i) / all(0, i); }));
    add("vargain", "|c(F)|_F / |c(X)|_F", root([&](size_t i) { return rest(1, i) / rest(0, i); }));
    add("tcs", "mean cosine of two tokens of X", mean_of(m.samples, [&](size_t i) {
          return (mean(2, i) - 1) / (double(m.config.tokens()) - 1);
        }));
  }
};

// Attention. Two facts about its matrix A keep this short. Its rows sum to one, A 1 = 1, hence A J
// = (1/T) A 1 1^T = J and P A J = P J = 0. So
//
//     P A P = P A (I - J) = P A:
//
// centering A's columns is all there is to do. (The left P matters: 1^T A is not 1^T. If all tokens
// look at one, a "sink", A = 1 e^T, then ||A P||_2 is about sqrt(T) and P A P = 0.) And mu_eff =
// ||P A P||_2 is the root of the largest eigenvalue of (P A)^T (P A), which power iteration finds
// from below: |(P A)^T (P A) x| <= mu_eff^2 |x|. What A does to a centered state P X has two parts,
// P A P X, the retention, at most mu_eff |P X| (Prop. 2), and J A P X, the leakage (Prop. 1).

// out = P x for each x (m, n) of a batch: every column is centered.
template <class Out, class Real>
void center_columns(const Device& device, Matrix<Out> out, Matrix<Real> x, Sizes s) {
  using Acc = AccOf<Out>;
  for_each_team(device, s.outer * s.inner, Team::max_size, [=] HD(Team team) {
    Out* to = out.at(team.index / s.inner, team.index % s.inner);
    const Real* from = x.at(team.index / s.inner, team.index % s.inner);
    for (size_t j = team.rank; j < s.n; j += team.size) {
      Acc sum = 0;
      for (size_t i = 0; i < s.m; ++i) sum += Acc(from[i * x.stride + j]);
      for (size_t i = 0; i < s.m; ++i)
        to[i * out.stride + j] = Out(Acc(from[i * x.stride + j]) - sum / Acc(s.m));
    }
  });
}

// norms (batch) = ||P A P||_2 of row-stochastic A (batch, n, n): power iteration on (P A)^T (P A),
// squared twice beforehand, so that a step counts for four. Scratch: centered, power as A; x
// (batch, 2, n).
//
// After k steps the estimate is short by about ln(n) / 4k of itself at most, 0.3% after these 400,
// where singular values are close. (Of 3160 random matrices 1% by more than 1.2e-5, one by 0.4%.)
// P A is brought to |P A|_F = 1 first: of one that is small, the power would vanish in fp32.
constexpr int power_steps = 100;

template <class Acc>
void centered_norms(Device& device, double* norms, const Acc* matrices, Acc* centered, Acc* power,
                    Acc* x, size_t batch, size_t n) {
  auto all = [&](auto* x) { return Matrix(x, n).batch(n * n, 0); };
  auto square = [&](Acc* to, Acc* from, bool of_columns) {
    gemm(device, all(to), of_columns ? all(from).transpose() : all(from), all(from),
         {n, n, n, batch});
  };
  center_columns(device, all(centered), all(matrices), {n, n, n, batch});
  for_each_team(device, batch, Team::max_size, [=] HD(Team team) {
    Acc* c = centered + team.index * n * n;
    double squares = 0;
    for (size_t i = team.rank; i < n * n; i += team.size) squares += double(c[i]) * double(c[i]);
    double length = std::sqrt(team.sum(squares));
    Acc inverse = length > 0 ? Acc(1 / length) : Acc(0);
    for (size_t i = team.rank; i < n * n; i += team.size) c[i] *= inverse;
    if (team.rank == 0) norms[team.index] = length;
  });
  square(power, centered, true);   // (P A)^T (P A)
  square(centered, power, false);  // its 2nd
  square(power, centered, false);  // and 4th power
  for_each_team(device, batch, Team::max_size, [=] HD(Team team) {
    const Acc* m = power + team.index * n * n;
    Acc *v = x + team.index * 2 * n, *next = v + n;
    for (size_t i = team.rank; i < n; i += team.size)
      v[i] =
          Acc(2 * uniform(0, streams::check, i) - 1);  // fixed, and orthogonal to nothing special
    Acc scale = 0;
    // The first product has no unit vector yet: one more.
    for (int step = 0; step <= power_steps; ++step) {
      team.sync();
      Acc squares = 0;
      for (size_t j = team.rank; j < n; j += team.size) {
        Acc sum = 0;
        for (size_t i = 0; i < n; ++i) sum += m[i * n + j] * v[i];  // it is symmetric
        next[j] = sum;
        squares += sum * sum;
      }
      scale = std::sqrt(team.sum(squares));
      Acc inverse = scale > 0 ? Acc(1) / scale : Acc(0);
      for (size_t j = team.rank; j < n; j += team.size) v[j] = inverse * next[j];
    }
    if (team.rank == 0) norms[team.index] *= pow(double(scale), 0.125);  // |power x|^(1/8), |x| = 1
  });
}

// norms (batch): an estimate of ||A P||_2 as the author's tool has it, |A v| after five steps v = P
// A^T A v, v of length 1. x (batch, 2, n) is scratch.
template <class Acc>
void uncentered_norms(const Device& device, double* norms, const Acc* matrices, Acc* x,
                      size_t batch, size_t n) {
  for_each_team(device, batch, Team::max_size, [=] HD(Team team) {
    const Acc* A = matrices + team.index * n * n;
    Acc *v = x + team.index * 2 * n, *Av = v + n;
    for (size_t i = team.rank; i < n; i += team.size) v[i] = Acc(gaussian(0, streams::check, i));
    for (int step = 0; step <= 5; ++step) {
      Acc sum = 0, squares = 0, moved = 0;
      for (size_t i = team.rank; i < n; i += team.size) sum += v[i];
      Acc mean = team.sum(sum) / Acc(n);
      for (size_t i = team.rank; i < n; i += team.size) v[i] -= mean, squares += v[i] * v[i];
      squares = team.sum(squares);
      for (size_t i = team.rank; i < n; i += team.size) v[i] *= squares > 0 ? rsqrt_(squares) : 0;
      team.sync();
      for (size_t i = team.rank; i < n; i += team.size) {
        Av[i] = 0;
        for (size_t j = 0; j < n; ++j) Av[i] += A[i * n + j] * v[j];
        moved += Av[i] * Av[i];
      }
      moved = team.sum(moved);
      if (team.rank == 0) norms[team.index] = std::sqrt(double(moved));
      team.sync();
      for (size_t j = team.rank; j < n; j += team.size) {
        v[j] = 0;
        for (size_t i = 0; i < n; ++i) v[j] += A[i * n + j] * Av[i];
      }
    }
  });
}

template <class Real>
struct AttentionMeasured : Measurement {
  using Acc = AccOf<Real>;
  Acc *probs, *columns, *products, *vectors;  // three (samples, H, T, T), (samples, H, 2, T)
  Acc *centered, *moved;                      // (samples, T, D), (samples, H, T, D)

  // Energies of A (samples, H, 2), and of A c(X), X the block's input, likewise; ||P A P||_2 and
  // the author's estimate (samples, H); and energies of X (samples, 2).
  static size_t count(const MeasuredSizes& m) { return m.samples * (6 * m.config.heads + 2); }
  void lay(Carver& c, const MeasuredSizes& m) {
    size_t n = m.config.tokens(), D = m.config.width, pairs = m.samples * m.config.heads;
    for (Acc** squares : {&probs, &columns, &products}) *squares = c.take<Acc>(pairs * n * n);
    vectors = c.take<Acc>(pairs * 2 * n);
    centered = c.take<Acc>(m.samples * n * D), moved = c.take<Acc>(pairs * n * D);
  }
  void during(Device& device, double* to, const Sight<Real>& see, const MeasuredSizes& m) {
    if (see.writer != 0) return;
    Heads heads = m.heads();
    size_t n = heads.length, D = heads.width(), pairs = heads.batch * heads.count;
    double *moved_to = to + 2 * pairs, *norms = moved_to + 2 * pairs, *trunk = norms + 2 * pairs;
    attention_matrices(device, probs, probs, see.saved.qkv, heads);
    centered_norms(device, norms, probs, columns, products, vectors, pairs, n);
    uncentered_norms(device, norms + pairs, probs, vectors, pairs, n);
    matrix_energies(device, to, probs, pairs, n, n);
    matrix_energies(device, trunk, see.X(), heads.batch, n, D);
    Matrix<Acc> PX = Matrix<Acc>(centered, D).batch(n * D, 0);
    center_columns(device, PX, Matrix(see.X(), D).batch(n * D, 0), {n, D, n, heads.batch});
    gemm(device, Matrix<Acc>(moved, D).batch(heads.count * n * D, n * D), head_square(probs, heads),
         PX, {n, D, n, heads.batch, heads.count});
    matrix_energies(device, moved_to, moved, pairs, n, D);
  }
  static void read(const double* from, int, const MeasuredSizes& m, const Add& add) {
    size_t H = m.config.heads, pairs = m.samples * H;
    const double *moved = from + 2 * pairs, *norms = moved + 2 * pairs, *trunk = norms + 2 * pairs;
    double largest = NAN;  // which fmax() passes over
    for (size_t i = 0; i < pairs; ++i) largest = std::fmax(largest, norms[i]);
    auto root = [&](auto of) { return mean_of(pairs, [&](size_t i) { return std::sqrt(of(i)); }); };
    add("mu_eff", "|P A P|_2, mean over samples and heads (4)",
        mean_of(pairs, [&](size_t i) { return norms[i]; }));
    add("mu_eff_max", "the largest of them", largest);
    add("mu_eff_author", "the author's: |A P|_2 by five power steps, mean over samples and heads",
        mean_of(pairs, [&](size_t i) { return norms[pairs + i]; }));
    add("row_diversity", "|A - J A|_F / |A|_F, mean over samples and heads",
        root([&](size_t i) { return from[2 * i + 1] / (from[2 * i] + from[2 * i + 1]); }));
    add("retention", "|c(A c(X))|_F / |c(X)|_F, X the block's input, mean over samples and heads",
        root([&](size_t i) { return moved[2 * i + 1] / trunk[i / H * 2 + 1]; }));
    add("leakage", "|mu(A c(X))|_F / |c(X)|_F, likewise",
        root([&](size_t i) { return moved[2 * i] / trunk[i / H * 2 + 1]; }));
  }
};

// Queries and keys: the whole step's gradients (Lemma 1).

struct QueriesAndKeysMeasured : Measurement {
  static size_t count(const MeasuredSizes&) { return 2; }  // |dW_Q|^2, |dW_K|^2
  template <class Kept>
  void after(Device& device, double* to, const BlockParameters<Kept>& d, const MeasuredSizes& m) {
    sum_squares(device, to, d.qkv, 2, m.config.width * m.config.width);
  }
  static void read(const double* from, int, const MeasuredSizes& m, const Add& add) {
    size_t D = m.config.width;
    add("q_grad_rms", "root mean square of the whole batch's dL/dW_Q " + shape_text(D, D),
        std::sqrt(from[0]) / double(D));
    add("k_grad_rms", "of dL/dW_K", std::sqrt(from[1]) / double(D));
  }
};

// All there are. Columns come in this order: those of one writer, those of the other, then a
// block's.
template <class Real>
using Measurements =
    std::tuple<WritersMeasured<Real>, WriterSumsMeasured<Real>, StatesMeasured<Real>,
               AttentionMeasured<Real>, QueriesAndKeysMeasured>;

template <class Real>
class Diagnostics {
 public:
  const MeasuredSizes sizes;
  const std::vector<size_t> layers;  // the chosen blocks, in order
  const size_t samples;

  Diagnostics(const Config& c, std::vector<size_t> chosen, size_t first_samples, size_t batch)
      : sizes{c, first_samples, batch}, layers(std::move(chosen)), samples(first_samples) {
    each(all_, [&](auto& m, size_t k) {
      begins_[k] = total_;
      total_ += round_up(layers.size() * (m.of_writers ? 2 : 1) * m.count(sizes), 32);  // 256 bytes
    });
  }

  void lay(Carver& c) {
    numbers_ = c.take<double>(total_);
    Carver end = c;
    each(all_, [&](auto& m, size_t) {
      Carver own = c;
      m.lay(own, sizes);
      end.used = std::max(end.used, own.used);
    });
    c = end;
  }

  // Measure during a backward: what spikes are described by, and with `all` the rest.
  void observe(Device& device, size_t block, int writer, const BlockSaved<Real>& s,
               const Real* delta, bool all) {
    auto at = std::find(layers.begin(), layers.end(), block);
    if (at == layers.end()) return;
    each(all_, [&](auto& m, size_t k) {
      if (all || m.of_spikes)
        m.during(device, place(numbers_, m, k, size_t(at - layers.begin()), writer),
                 Sight<Real>{s, writer, delta}, sizes);
    });
  }

  // After a backward, from the whole batch's gradients.
  template <class Kept>
  void gradients(Device& device, const Parameters<Kept>& d) {
    for (size_t slot = 0; slot < layers.size(); ++slot)
      each(all_, [&](auto& m, size_t k) {
        m.after(device, place(numbers_, m, k, slot, 0), d.block(layers[slot]), sizes);
      });
  }

  // (layers, 2, samples) on the device: of W_O, of W2.
  const WriterModes* modes() const { return reinterpret_cast<const WriterModes*>(numbers_); }

  // The chosen layers' columns; waits for the device.
  std::vector<std::vector<Reading>> read(const Device& device) const {
    std::vector<double> host(total_);
    device.download(host.data(), numbers_, total_ * sizeof(double));
    std::vector<std::vector<Reading>> rows(layers.size());
    for (size_t slot = 0; slot < layers.size(); ++slot)
      for (int writer : {0, 1, -1})  // -1: what is not of a writer
        each(all_, [&](auto& m, size_t k) {
          if (m.of_writers != (writer >= 0)) return;
          std::string branch = writer == 0 ? "attention_" : writer == 1 ? "ffn_" : "";
          m.read(place(host.data(), m, k, slot, writer), writer, sizes,
                 [&](const std::string& name, const std::string& about, double value) {
                   rows[slot].push_back({branch + name, about, value});
                 });
        });
    return rows;
  }

 private:
  Measurements<Real> all_;
  double* numbers_ = nullptr;
  // Where those of each measurement begin, (layers, 2 if of writers, else 1, count()); all of them.
  std::array<size_t, std::tuple_size_v<Measurements<Real>>> begins_;
  size_t total_ = 0;

  // f(measurement, its number) for all.
  template <class All, class F>
  static void each(All& all, const F& f) {
    size_t k = 0;
    std::apply([&](auto&... m) { (f(m, k++), ...); }, all);
  }
  // Those of measurement m, number k, in a copy of all.
  template <class M, class Number>
  Number* place(Number* all, const M& m, size_t k, size_t slot, int writer) const {
    return all + begins_[k] + (m.of_writers ? slot * 2 + size_t(writer) : slot) * m.count(sizes);
  }
};
