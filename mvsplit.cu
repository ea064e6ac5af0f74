// mvsplit.cu - the residual merges, in token space.
//
// What it is: how a block's branch output F joins the trunk X. Post-Norm, Pre-Norm, LayerScale,
// ReZero and MV-Split, each fused with the RMSNorm that follows it, forward and backward, and the
// small algebra of token means that explains why very deep networks need the last of them. What it
// is not: the network. Attention, the FFN and the chain of blocks are in dit.cu.
//
// The mean here is over TOKENS, never over channels: J X replaces every token of a segment by the
// average token. (LayerNorm's mean, which runs over the channels of one token, plays no part.)
//
// Words: the trunk is X, passed from block to block; a branch (attention or FFN) computes F from
// it; its last matrix (W_O, W2) is the residual writer; a merge joins F to X. Post-Norm: the norm
// follows the sum. The leaky term is -alpha * J X in (7). Mean mode screaming is the paper's name
// for the collapse: the mean part of the writers' gradients bursts, and all tokens become alike.
// The adjoint of an array is the gradient of the loss by it, on its way back through the network;
// where a backward begins, and it is given, it is called the cotangent. The adjoint of a linear map
// is its transpose. <U, V> = tr(U^T V), the inner product of all numbers. The mean-coherent part of
// a gradient that is a sum over tokens is what their means contribute: dW_mu in section 5.
//
// Letters that mean several things, here and in dit.cu:
//
//          in the derivations                                     in the code
//     T    the tokens of a sequence, N of image, then L of text   the type that is stored
//     A    an attention matrix; alignment amplification (6)       Acc<T>, the type of sums
//     P    I - J, which centers tokens                            the type of parameters'
//                                                                 gradients; attention's matrix
//     F    a branch's output                                      the same, or the FFN's width
//     G    the cotangent that a backward begins with;             the same; in a block the
//          G_mean and G_ctr are sizes of parts of dW, in 5        trunk's gradient
//     Y, y what an operation makes; a writer's input in 5 and 6   the same
//     h    <G, X_next> / D of a token in 4; SwiGLU's output       the first; the sizes of heads
//     K    attention's keys; <y_t, y_s> in 6                      the same
//     C    <delta_t, delta_s> in 6                                the same; a product; in shapes
//                                                                 an image's channels
//     S    attention's scores                                     in shapes measured sequences
//     M    products of cosines (6); (P A)^T (P A) in dit.cu       the same
//     L    text tokens; blocks in 3 and 3.1                       text tokens; in shapes measured
//                                                                 layers; the type of a line in 4.1
//
// delta is the adjoint of F and Delta that of Z (dZ in the code); D the channels of a token, B a
// batch.
//
// How to read it: section 1 defines J and P and proves the three facts that everything uses;
// section 2 is RMSNorm; section 3 is one formula with all merges in it (skip 3.1 at first: two that
// are there for comparison); section 4 derives its backward down to the lines of code (skip 4.1 at
// first: the same formulas, for GPUs alone); section 5 says what the split does to the gradient of
// a residual writer, and 6 measures both parts. (n) is the equation's number in the paper.
#pragma once

#include "math.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#endif

// ---------------------------------------------------------------------------------------------
// 1. The token mean and the rest
//
// X is (T, D), a token a row. J = (1/T) 1 1^T averages over tokens, P = I - J centers:
//
//     X = J X + P X = mu(X) + c(X).                                                           (3)
//
// J is symmetric, and J J = (1/T^2) 1 (1^T 1) 1^T = J, so P P = I - 2J + J = P and J P = J - J = 0:
// complementary orthogonal projectors. Hence, for any U and V,
//
//     <J U, P V> = tr(U^T J P V) = 0:   a mean and a centered array are orthogonal,
//
// and the adjoint of "take the mean" is "take the mean", which is all a backward pass needs to
// know.
//
// A sequence has two segments, image tokens then text tokens, and the merges average within each
// one: J_seg = blkdiag(J_image, J_text), P_seg = I - J_seg.  (43)  Both projectors stay projectors.
// The global mean is a weighted sum of the segment means, J J_seg = J, so J P_seg = 0  (44)-(45):
// what is centered in each segment is centered globally, and a gate on the segment means reaches
// the global mean as well. (For comparison, --means global takes a sequence for one segment.)

// How tokens lie in memory: `batch` sequences of `image` then `text` rows. A kind is 0, image, or
// 1, text; a batch has 2 * batch segments, number 2 * sequence + kind.
struct Tokens {
  size_t batch, image, text;

  HD size_t length() const { return image + text; }
  HD size_t rows() const { return batch * length(); }
  HD size_t first(size_t kind) const { return kind == 0 ? 0 : image; }
  HD size_t count(size_t kind) const { return kind == 0 ? image : text; }
  HD size_t segment_of(size_t row) const {
    return row / length() * 2 + (row % length() < image ? 0 : 1);
  }

  // Neighbouring rows of one segment, up to four. A team that has them reads once what belongs to
  // the segment and the channel.
  struct Four {
    size_t segment, first, last;

    HD bool has(int k) const { return first + size_t(k) <= last; }
    HD size_t row(int k) const { return min_(first + size_t(k), last); }
  };
  HD size_t fours(size_t kind) const { return (count(kind) + 3) / 4; }
  HD size_t fours() const { return batch * (fours(0) + fours(1)); }
  HD Four four(size_t index) const {
    uint32_t each = uint32_t(fours(0) + fours(1)), i = uint32_t(index) % each;
    size_t sequence = uint32_t(index) / each, kind = i < fours(0) ? 0 : 1;
    size_t start = sequence * length() + first(kind), end = start + count(kind);
    size_t row = start + 4 * (kind ? i - fours(0) : i);
    return {2 * sequence + kind, row, min_(row + 3, end - 1)};
  }
};

// Sums over the tokens of each segment, for four channels d..d+3 at a time: adds up what
// body(segment, row, d) returns for the segment's rows, and calls finish(segment, d, sum) once with
// the result, or with `zero` for an empty segment. A mean is such a sum, finished with 1 / count.
//
// How the work is shared: a team takes one segment and 16 to 128 channels, fewer while there are
// less than a thousand teams. Its threads are a grid, a quad of channels a column, and each of its
// `lines` takes every lines-th token. (On a CPU the grid is 1 x 1, and the loop over tiles goes
// through the channels.)
template <class Sum, class Body, class Finish>
void sum_over_tokens(const Device& device, Tokens tokens, size_t D, Sum zero, const Body& body,
                     const Finish& finish) {
  int columns = 32;
  while (columns > 4 && tokens.batch * 2 * ceil_div(D, 4 * size_t(columns)) < 1024) columns /= 2;
  size_t width = 4 * size_t(columns), tiles = ceil_div(D, width);
  for_each_team(device, tokens.batch * 2 * tiles, Team::max_size, [=] HD(Team team) {
    Team line = team.part(columns);
    size_t segment = team.index / tiles, channel = team.index % tiles * width;
    size_t start = segment / 2 * tokens.length() + tokens.first(segment % 2);
    size_t end = start + tokens.count(segment % 2);
    for (size_t tile = 0; tile < width; tile += 4 * size_t(line.size)) {
      size_t d = channel + tile + 4 * size_t(line.rank);
      Sum sum = zero;
      // Four rows at a time, all their loads before the first sum. Past the end the last row is
      // read again, and not added.
      size_t lines = size_t(team.parts(columns));
      if (d < D)
        for (size_t row = start + line.index; row < end; row += 4 * lines) {
          Sum terms[4];
          UNROLL
          for (size_t k = 0; k < 4; ++k)
            terms[k] = body(segment, min_(row + k * lines, end - 1), d);
          UNROLL
          for (size_t k = 0; k < 4; ++k)
            if (row + k * lines < end) sum = sum + terms[k];
        }
      sum = team.sum_rows(sum, columns);
      if (d < D && line.index == 0) finish(segment, d, sum);
    }
  });
}

// Two sums over tokens that one pass makes: of X and of F on the way forward, of dZ and of the
// terms of a gate's gradient on the way back.
template <class A>
struct QuadPair {
  Quad<A> a, b;
};
template <class A>
HD QuadPair<A> operator+(QuadPair<A> x, QuadPair<A> y) {
  return {x.a + y.a, x.b + y.b};
}

// Segment means of X and of F in one pass: xbar, fbar (B, 2, D) from X, F (B, T, D). Eq. (43).
template <class T>
void segment_means(const Device& device, Acc<T>* xbar, Acc<T>* fbar, const T* X, const T* F,
                   Tokens tokens, size_t D) {
  using A = Acc<T>;
  sum_over_tokens(
      device, tokens, D, QuadPair<A>{quad(A(0)), quad(A(0))},
      [=] HD(size_t, size_t row, size_t d) {
        return QuadPair<A>{load<A>(X + row * D + d), load<A>(F + row * D + d)};
      },
      [=] HD(size_t segment, size_t d, QuadPair<A> sum) {
        // An empty segment has no mean and nobody asks for it; 1/1 keeps it free of NaN.
        A scale = A(1) / A(max_<size_t>(tokens.count(segment % 2), 1));
        store(xbar + segment * D + d, scale * sum.a);
        store(fbar + segment * D + d, scale * sum.b);
      });
}

// ---------------------------------------------------------------------------------------------
// 2. RMSNorm
//
// y = r z with r = (|z|^2 / D + eps)^(-1/2), one r a token, no learned gain.
//
// Backward. dr = -1/2 r^3 (2/D) <z, dz> = -(r^3 / D) <z, dz>. With the cotangent g of y,
//
//     <g, dy> = r <g, dz> + <g, z> dr = < r g - (r^3 / D) <g, z> z, dz >,
//
// so the gradient of z is
//
//     Delta = r g - q z,     q = (r^3 / D) <g, z>.                                        (Delta)
//
// Delta has, up to eps, no component along z, since y does not change when z is scaled: <Delta, z>
// = r <g, z> (1 - r^2 |z|^2 / D) = eps r^3 <g, z>. A consequence for very deep networks: y has
// length sqrt(D) whatever z's is, so all that a layer can do to a token is to turn it.

// r for one row, given the sum of its squares.
template <class A>
HD A inverse_rms(A sum_of_squares, size_t D, A eps) {
  return rsqrt_(sum_of_squares / A(D) + eps);
}

// Y = r X by rows; r (B, n) is kept for the backward. X is (B, n, D) packed; Y's sequences are
// y_stride elements apart, so that image and text tokens land in their places of one (B, T, D)
// array.
template <class T>
void rmsnorm_forward(const Device& device, T* Y, Acc<T>* r, const T* X, size_t batch, size_t n,
                     size_t D, size_t y_stride, double eps) {
  using A = Acc<T>;
  for_each_team(device, batch * n, threads_for_row(D), [=] HD(Team team) {
    const T* x = X + team.index * D;
    T* y = Y + team.index / n * y_stride + team.index % n * D;
    A squares = 0;
    for (size_t d = 4 * team.rank; d < D; d += 4 * team.size) {
      Quad<A> v = load<A>(x + d);
      squares += dot(v, v);
    }
    A scale = inverse_rms(team.sum(squares), D, A(eps));
    for (size_t d = 4 * team.rank; d < D; d += 4 * team.size) store(y + d, scale * load<A>(x + d));
    if (team.rank == 0) r[team.index] = scale;
  });
}

// dX (=) from dY by (Delta); X, r, dX (B, n, D) packed, dY strided as Y above.
template <class T>
void rmsnorm_backward(const Device& device, T* dX, const T* dY, const T* X, const Acc<T>* r,
                      size_t batch, size_t n, size_t D, size_t y_stride) {
  using A = Acc<T>;
  for_each_team(device, batch * n, threads_for_row(D), [=] HD(Team team) {
    const T* x = X + team.index * D;
    const T* g = dY + team.index / n * y_stride + team.index % n * D;
    A scale = r[team.index], gx = 0;
    for (size_t d = 4 * team.rank; d < D; d += 4 * team.size)
      gx += dot(load<A>(g + d), load<A>(x + d));
    A q = scale * scale * scale / A(D) * team.sum(gx);
    for (size_t d = 4 * team.rank; d < D; d += 4 * team.size)
      store(dX + team.index * D + d, scale * load<A>(g + d) - q * load<A>(x + d));
  });
}

// ---------------------------------------------------------------------------------------------
// 3. The merges
//
//     plain        Z = X + F                                   (Post-Norm)
//     prenorm      Z = X / r_X + F                             (Pre-Norm, see 3.1)
//     layerscale   Z = X + lambda * F        lambda in R^D
//     rezero       Z = X + lambda F          lambda a number
//     mvsplit      Z = X + beta * P F + alpha * J (F - X)      alpha, beta in R^D             (7)
//     mvsplit_noleak      without the leaky term: Z = X + beta * P F + alpha * J F
//
// and always X_next = RMSNorm(Z)  (8). J and P act within segments; * is by channel.
//
// What MV-Split does: apply P and J to (7), using that they commute with a gain by channel:
//
//     P Z = P X + beta * P F           the centered part is a residual stream with gain beta,
//     J Z = (1 - alpha) * J X + alpha * J F                                                   (9)
//
// while the mean is a leaky integrator: for 0 < alpha < 2 the old mean decays, and what the
// branches write into it comes in with gain alpha. Over depth, with F = 0 and each Z the next X,
// J Z_L = prod_l (1 - alpha_l) * J X_0 while P Z_L = P X_0. At alpha = 0, the start, J Z = J X: no
// branch can write into the mean at all.
//
// All this is exact for Z, with J and P of the segments. The global mean obeys (9) too (J J_seg =
// J), but what is centered globally does not: the difference of the two segment means leaks as they
// do. And the RMSNorm of (8) scales each token by its own r_i: the two parts mix a little, and a
// state that is all mean gets its decay back at once. The leak makes the mean smaller against the
// rest, not X_next smaller.
//
// LayerScale is no such split, whatever its lambda (40):
//
//     Z - X = lambda * J F + lambda * P F          one gain for both parts, nothing leaks    (41)
//     Z - X = alpha * J (F - X) + beta * P F       MV-Split                                  (42)
//
// For all X and F these are equal only if alpha = 0, since J X appears in one alone, and then alpha
// = lambda = beta, all zero. The consequence for training: a lambda small enough to tame the mean
// slows what the tokens learn about each other as much.

enum class Merge { plain, prenorm, layerscale, rezero, mvsplit, mvsplit_noleak };

HD constexpr bool splits(Merge merge) {
  return merge == Merge::mvsplit || merge == Merge::mvsplit_noleak;
}

HD constexpr bool has_gates(Merge merge) {
  return merge != Merge::plain && merge != Merge::prenorm;
}

// The learned gains of one merge, or their gradients. Only those of its kind are there: alpha, beta
// (D) when it splits, lambda (D) for LayerScale, lambda (1) for ReZero.
template <class T>
struct Gates {
  Merge merge;
  T *alpha, *beta, *lambda;
};

// What the forward leaves for the backward: r (B, T), and the segment means (B, 2, D) if it splits.
// For Pre-Norm there has to be r_X (B, T), what the merge before left; null where X is the trunk.
template <class A>
struct MergeSaved {
  A *r, *xbar, *fbar;
  const A* r_X = nullptr;
};

// The gates at four channels: beta or lambda, and alpha, where the merge has them.
template <class A>
struct GateValues {
  Quad<A> gain, alpha;
};
template <Merge merge, class T>
HD GateValues<Acc<T>> gates_at(Gates<const T> gates, size_t d) {
  using A = Acc<T>;
  if (merge == Merge::layerscale) return {load<A>(gates.lambda + d), {}};
  if (merge == Merge::rezero) return {quad(A(gates.lambda[0])), {}};
  if (splits(merge)) return {load<A>(gates.beta + d), load<A>(gates.alpha + d)};
  return {};
}

// Z at four channels of one token: the only place where the merges differ on the way forward.
// xbar and fbar are the means over the token's segment. For Pre-Norm x is that of X / r_X.
template <Merge merge, class A>
HD Quad<A> merge_rule(GateValues<A> gates, Quad<A> x, Quad<A> f, Quad<A> xbar, Quad<A> fbar) {
  if (merge == Merge::plain || merge == Merge::prenorm) return x + f;
  if (merge == Merge::layerscale || merge == Merge::rezero) return multiply_add(gates.gain, f, x);
  Quad<A> to_mean = merge == Merge::mvsplit ? fbar - xbar : fbar;
  return multiply_add(gates.alpha, to_mean, multiply_add(gates.gain, f - fbar, x));
}

// All of a merge in one kernel (4.1), where there is one: on a GPU, for bf16, a merge that splits,
// some D, and sequences that fit. Elsewhere it does nothing and returns false.
template <class T>
bool fused_merge_forward(const Device& device, T* X_next, MergeSaved<Acc<T>> saved, const T* X,
                         const T* F, Gates<const T> gates, Tokens tokens, size_t D, double eps);

// Call f with the kind of merge as a compile-time constant: a kernel for each kind, without
// branches between its loads.
template <class F>
void with_kind(Merge merge, const F& f) {
  switch (merge) {
    case Merge::plain:
      return f(std::integral_constant<Merge, Merge::plain>());
    case Merge::prenorm:
      return f(std::integral_constant<Merge, Merge::prenorm>());
    case Merge::layerscale:
      return f(std::integral_constant<Merge, Merge::layerscale>());
    case Merge::rezero:
      return f(std::integral_constant<Merge, Merge::rezero>());
    case Merge::mvsplit:
      return f(std::integral_constant<Merge, Merge::mvsplit>());
    case Merge::mvsplit_noleak:
      return f(std::integral_constant<Merge, Merge::mvsplit_noleak>());
  }
}

// X_next and r from X, F and, where it splits, the segment means. `again`: a replay (dit.cu, 7), r
// and the means are saved already.
template <Merge merge, class T>
void merge_rows(const Device& device, T* X_next, MergeSaved<Acc<T>> saved, const T* X, const T* F,
                Gates<const T> gates, Tokens tokens, size_t D, double eps, bool again) {
  using A = Acc<T>;
  for_each_team(device, tokens.fours(), threads_for_fours(D), [=] HD(Team team) {
    Tokens::Four rows = tokens.four(team.index);
    auto z = [&](int k, size_t d) {
      Quad<A> x = load<A>(X + rows.row(k) * D + d), f = load<A>(F + rows.row(k) * D + d);
      if (merge == Merge::prenorm && saved.r_X) x = A(1) / saved.r_X[rows.row(k)] * x;
      Quad<A> xbar = {}, fbar = {};
      if (splits(merge)) {
        xbar = load<A>(saved.xbar + rows.segment * D + d);
        fbar = load<A>(saved.fbar + rows.segment * D + d);
      }
      return merge_rule<merge>(gates_at<merge>(gates, d), x, f, xbar, fbar);
    };
    // kept[k]: Z of row k at the thread's first channels, on a GPU up to D = 1024 all that it has.
    // They are read before anything is written, so that all loads can be on their way at once.
    size_t own = 4 * size_t(team.rank), step = 4 * size_t(team.size);
    Quad<A> kept[4] = {}, squares = quad(A(0)), r;
    for (size_t d = own; d < (again ? min_(own + 1, D) : D); d += step) {
      UNROLL
      for (int k = 0; k < 4; ++k) {
        Quad<A> v = z(k, d);
        if (d == own) kept[k] = v;
        squares[k] += dot(v, v);
      }
    }
    if (!again) squares = team.sum_rows(squares, 1);
    UNROLL
    for (int k = 0; k < 4; ++k) {
      r[k] = again ? saved.r[rows.row(k)] : inverse_rms(squares[k], D, A(eps));
      if (!again && team.rank == 0 && rows.has(k)) saved.r[rows.row(k)] = r[k];
    }
    for (size_t d = own; d < D; d += step) {
      UNROLL
      for (int k = 0; k < 4; ++k)
        if (rows.has(k)) store(X_next + rows.row(k) * D + d, r[k] * (d == own ? kept[k] : z(k, d)));
    }
  });
}

// X_next = RMSNorm(Z(X, F)), eqs. (7)-(8). X, F, X_next (B, T, D). `again`: from the same X and F
// as before, with what that saved: one pass then, and the same bits.
template <class T>
void merge_forward(const Device& device, T* X_next, MergeSaved<Acc<T>> saved, const T* X,
                   const T* F, Gates<const T> gates, Tokens tokens, size_t D, double eps,
                   bool again = false) {
  if (!again && fused_merge_forward(device, X_next, saved, X, F, gates, tokens, D, eps)) return;
  if (!again && splits(gates.merge)) segment_means(device, saved.xbar, saved.fbar, X, F, tokens, D);
  with_kind(gates.merge, [&](auto kind) {
    merge_rows<decltype(kind)::value>(device, X_next, saved, X, F, gates, tokens, D, eps, again);
  });
}

// 3.1 For comparison; skip at first
//
// Pre-Norm. The trunk Z is used twice: normalised, X_next = RMSNorm(Z) = r Z, it is what the next
// branch reads; as it is, it goes on along the trunk, Z_next = Z + F(X_next). What is stored is
// X_next and r, as for the other merges, and Z = X_next / r, whatever eps. (In bf16 each merge
// rounds it, as it would if it stored Z itself.) So with r_X the r of the merge that made X,
//
//     Z = X / r_X + F,     X_next = RMSNorm(Z):                                        (Pre-Norm)
//
// Post-Norm with a weight on the trunk, its magnitude 1 / r_X, which grows with depth while the
// branches' does not: the trunk turns less and less. (The first X is the trunk: there r_X = 1. The
// RMSNorm of the last merge is the usual one before the final projection.)
//
// Backward. As Z is used twice, its gradient has two parts. G comes back from the branch alone, and
// through the norm it is the Delta of section 2; from the trunk comes dL/dZ_next as it is. So
//
//     dL/dZ = dL/dZ_next + Delta,     dL/dF = dL/dZ,                                      (trunk)
//
// and as Z = Z_prev + F with Z_prev = X / r_X, dL/dZ is the dL/dZ_next of the merge before. No
// norm stands in its way: all of it reaches the first block.
//
// DeepNorm is a ReZero whose lambda stays at 1 / a: a X + F = a (X + F / a), and RMSNorm takes the
// factor away (and divides its eps by a^2). DeepNet has a = (2 L)^(1/4) for L blocks.

// ---------------------------------------------------------------------------------------------
// 4. The merges, backward: the paper's (49)-(54)
//
// Given G = dL/dX_next. RMSNorm first: by (Delta), token i of dL/dZ is
//
//     Delta_i = r_i G_i - (r_i^3 / D) <G_i, Z_i> Z_i.
//
// (Pre-Norm: 3.1.) Then dL = <Delta, dZ>, for MV-Split with dZ = dX + beta * P dF + alpha * J (dF -
// dX) from (7). J and P are symmetric, so they may move to the other side of <,>; so may a gain,
// which multiplies; and as J and P act on tokens and gains on channels, they commute:
//
//     <Delta, beta * P dF> = <beta * Delta, P dF> = <P (beta * Delta), dF> = <beta * P Delta, dF>,
//
// and alpha * J likewise. Hence dL = <Delta - alpha * J Delta, dX> + <beta * P Delta + alpha * J
// Delta, dF>: what stands beside dX and dF are their gradients. A gain's is the sum over tokens of
// Delta times what it multiplies:
//
//     dL/dX = Delta - alpha * J Delta
//         token i:  Delta_i - alpha * Dbar_s                                                  (dX)
//     dL/dF = beta * P Delta + alpha * J Delta                                                (10)
//           = beta * (Delta - J Delta) + alpha * J Delta
//         token i:  beta * Delta_i + (alpha - beta) * Dbar_s                                  (dF)
//     dL/dalpha = sum_i Delta_i * (J (F - X))_i = sum_s n_s Dbar_s * (Fbar_s - Xbar_s)    (dalpha)
//     dL/dbeta  = sum_i Delta_i * (P F)_i       = sum_i Delta_i * (F_i - Fbar_s)           (dbeta)
//
// with Dbar_s the mean of Delta over the tokens of i's segment s. In (dalpha) the second factor is
// constant within a segment, so the sum over its n_s tokens is n_s Dbar_s: the gate's gradient
// costs no further pass. Without the leaky term, dX_i = Delta_i and Xbar drops out of dalpha.
// LayerScale and ReZero: dX = Delta, dF = lambda * Delta, dlambda = sum_i Delta_i * F_i.
//
// Consequence of (dF): the segment mean of dF is alpha * Dbar. At alpha = 0, where training starts,
// the branch's adjoint has no mean at all, however large Dbar is.
//
// What it reads. Z is not stored, but r is, and so is the merge's output X_next = r Z, which the
// next layer kept as its input. With Z = X_next / r the second term of Delta is, for each token,
// (r^3 / D) <G, Z> Z = (r / D) <G, X_next> X_next:
//
//     Delta = r (G - h X_next),        h = <G, X_next> / D,       for each token      (Delta')
//
// so X is not needed at all, and F for the gates alone. Three passes (two without gates): over rows
// for h; over tokens for Dbar and the gates; and one for the outputs. Delta is made in each of the
// last two from G and X_next. To store it would write one array and read one in the third pass;
// this reads two, writes none, takes no (B, T, D) array and rounds no Delta to bf16.
//
// In the code the gradients dL/dX, dL/dF and dL/dZ = Delta are dX, dF and dZ, and Dbar is dZbar.
// (For Pre-Norm dL/dZ is Delta and the trunk's part, which the third pass adds.)

// Scratch of the backward: h (B, T), of the passes alone; and (B, 2, D): dZbar, dZ's segment means,
// and dgate, a segment's sums of dZ * (F - Fbar_s), or of dZ * F where nothing is split.
template <class A>
struct MergeScratch {
  A *h, *dZbar, *dgate;
};

// *to = sum, or += if `accumulate`.
template <class P, class A>
HD void set_or_add(P* to, A sum, bool accumulate) {
  *to = P(accumulate ? A(*to) + sum : sum);
}

// Gate gradients from the segments' sums, (dalpha), (dbeta): dalpha, dbeta or dlambda (=, or += if
// `accumulate`).
template <class T, class P>
void gate_gradients(const Device& device, Gates<P> dgates, MergeSaved<Acc<T>> saved,
                    MergeScratch<Acc<T>> scratch, Tokens tokens, size_t D, bool accumulate) {
  using A = Acc<T>;
  constexpr int columns = 8;  // channels that a team's threads have at once
  size_t segments = 2 * tokens.batch;
  if (dgates.merge == Merge::rezero) {  // one number: a sum over channels as well
    for_each_team(device, 1, Team::max_size, [=] HD(Team team) {
      Team line = team.part(columns);
      A total = 0;
      for (size_t d = size_t(line.rank); d < D; d += size_t(line.size)) {
        A sum = 0;
        for (size_t s = line.index; s < segments; s += size_t(team.parts(columns)))
          sum += scratch.dgate[s * D + d];
        total += sum;
      }
      total = team.sum(total);
      if (team.rank == 0) set_or_add(dgates.lambda, total, accumulate);
    });
    return;
  }
  bool leak = dgates.merge == Merge::mvsplit, split = splits(dgates.merge);
  P *dalpha = dgates.alpha, *dgain = split ? dgates.beta : dgates.lambda;
  for_each_team(device, ceil_div(D, columns), Team::max_size, [=] HD(Team team) {
    Team line = team.part(columns);
    size_t first = team.index * columns, last = min_(first + columns, D);
    for (size_t tile = first; tile < last; tile += size_t(line.size)) {
      size_t d = tile + size_t(line.rank);
      A alpha_sum = 0, gain_sum = 0;
      if (d < last)
        for (size_t s = line.index; s < segments; s += size_t(team.parts(columns))) {
          gain_sum += scratch.dgate[s * D + d];
          if (!split) continue;
          A to_mean = saved.fbar[s * D + d] - (leak ? saved.xbar[s * D + d] : A(0));
          alpha_sum += A(tokens.count(s % 2)) * scratch.dZbar[s * D + d] * to_mean;  // (dalpha)
        }
      gain_sum = team.sum_rows(gain_sum, columns);
      if (split) alpha_sum = team.sum_rows(alpha_sum, columns);
      if (d >= last || line.index != 0) continue;
      set_or_add(dgain + d, gain_sum, accumulate);
      if (split) set_or_add(dalpha + d, alpha_sum, accumulate);
    }
  });
}

// The second pass: dZbar and dgate. dZ(row, d) is (Delta').
template <Merge merge, class T, class Adjoint>
void merge_token_sums(const Device& device, MergeScratch<Acc<T>> scratch, const T* F,
                      MergeSaved<Acc<T>> saved, Tokens tokens, size_t D, const Adjoint& dZ) {
  using A = Acc<T>;
  sum_over_tokens(
      device, tokens, D, QuadPair<A>{quad(A(0)), quad(A(0))},
      [=] HD(size_t segment, size_t row, size_t d) {
        Quad<A> f = load<A>(F + row * D + d), dZ_i = dZ(row, d);
        if (splits(merge)) f = f - load<A>(saved.fbar + segment * D + d);
        return QuadPair<A>{dZ_i, dZ_i * f};  // (dbeta)
      },
      [=] HD(size_t segment, size_t d, QuadPair<A> sum) {
        A scale = A(1) / A(max_<size_t>(tokens.count(segment % 2), 1));
        store(scratch.dZbar + segment * D + d, scale * sum.a);
        store(scratch.dgate + segment * D + d, sum.b);
      });
}

// dX and dF at four channels of one token, from dZ there and its mean over the token's segment.
template <class A>
struct MergeGradients {
  Quad<A> dX, dF;
};
template <Merge merge, class A>
HD MergeGradients<A> merge_rule_backward(GateValues<A> gates, Quad<A> dZ, Quad<A> dZbar) {
  if (!has_gates(merge)) return {dZ, dZ};
  if (!splits(merge)) return {dZ, gates.gain * dZ};
  return {merge == Merge::mvsplit ? dZ - gates.alpha * dZbar : dZ,  // (dX)
          gates.gain * dZ + (gates.alpha - gates.gain) * dZbar};    // (dF)
}

// The third pass: dX and dF.
template <Merge merge, class T, class Adjoint>
void merge_backward_rows(const Device& device, T* dX, T* dF, MergeScratch<Acc<T>> scratch,
                         Gates<const T> gates, Tokens tokens, size_t D, const Adjoint& dZ) {
  using A = Acc<T>;
  for_each_team(device, tokens.fours(), threads_for_fours(D), [=] HD(Team team) {
    Tokens::Four rows = tokens.four(team.index);
    for (size_t d = 4 * team.rank; d < D; d += 4 * team.size) {
      GateValues<A> values = gates_at<merge>(gates, d);
      Quad<A> dZbar = {};
      if (splits(merge)) dZbar = load<A>(scratch.dZbar + rows.segment * D + d);
      // All four are read before any is written: dX may be G, so the compiler could not move a
      // later load up by itself.
      MergeGradients<A> out[4];
      UNROLL
      for (int k = 0; k < 4; ++k) {
        Quad<A> dZ_k = dZ(rows.row(k), d);
        if (merge == Merge::prenorm) dZ_k = load<A>(dX + rows.row(k) * D + d) + dZ_k;  // (trunk)
        out[k] = merge_rule_backward<merge>(values, dZ_k, dZbar);
      }
      UNROLL
      for (int k = 0; k < 4; ++k)
        if (rows.has(k)) {
          store(dX + rows.row(k) * D + d, out[k].dX);
          store(dF + rows.row(k) * D + d, out[k].dF);
        }
    }
  });
}

// The three passes: h, the sums over tokens, the outputs.
template <class T>
void merge_backward_passes(const Device& device, T* dX, T* dF, MergeScratch<Acc<T>> scratch,
                           const T* G, const T* X_next, const T* F, Gates<const T> gates,
                           MergeSaved<Acc<T>> saved, Tokens tokens, size_t D) {
  using A = Acc<T>;
  for_each_team(device, tokens.rows(), threads_for_row(D), [=] HD(Team team) {
    size_t row = team.index;
    A sum = 0;  // <G, X_next>
    each_quad(team, D, [&](size_t d, bool inside) {
      A product = dot(load<A>(G + row * D + d), load<A>(X_next + row * D + d));
      sum += inside ? product : A(0);
    });
    sum = team.sum(sum);
    if (team.rank == 0) scratch.h[row] = sum / A(D);
  });
  auto dZ = [=] HD(size_t row, size_t d) {
    return saved.r[row] *
           (load<A>(G + row * D + d) - scratch.h[row] * load<A>(X_next + row * D + d));  // (Delta')
  };
  with_kind(gates.merge, [&](auto kind) {
    constexpr Merge merge = decltype(kind)::value;
    if (has_gates(merge)) merge_token_sums<merge>(device, scratch, F, saved, tokens, D, dZ);
    merge_backward_rows<merge>(device, dX, dF, scratch, gates, tokens, D, dZ);
  });
}

// All of it in one kernel (4.1), where fused_merge_forward() has one. Elsewhere it does nothing and
// returns false.
template <class T>
bool fused_merge_backward(const Device& device, T* dX, T* dF, MergeScratch<Acc<T>> scratch,
                          const T* G, const T* X_next, const T* F, Gates<const T> gates,
                          MergeSaved<Acc<T>> saved, Tokens tokens, size_t D);

// dX (=), dF (=) (B, T, D) and the gates' gradients (=, or += if `accumulate`) from G = dL/dX_next,
// X_next and F (read where there are gates). dX may be G itself, except for Pre-Norm, where it is
// dL/dZ_next on entry and dL/dZ on return. The gates' gradients are made beside what follows: they
// are there, and `scratch` may be used again, after device.join().
template <class T, class P>
void merge_backward(Device& device, T* dX, T* dF, Gates<P> dgates, const T* G, const T* X_next,
                    const T* F, Gates<const T> gates, MergeSaved<Acc<T>> saved,
                    MergeScratch<Acc<T>> scratch, Tokens tokens, size_t D, bool accumulate) {
  if (!fused_merge_backward(device, dX, dF, scratch, G, X_next, F, gates, saved, tokens, D))
    merge_backward_passes(device, dX, dF, scratch, G, X_next, F, gates, saved, tokens, D);
  if (has_gates(gates.merge))
    device.beside(
        [&] { gate_gradients<T>(device, dgates, saved, scratch, tokens, D, accumulate); });
}

// 4.1 Forward and backward, each in one kernel
//
// A segment's mean needs all its tokens, so between adding them up and using the sum all thread
// blocks must meet: that is why there are several kernels above, each of which reads X and F (or G
// and X_next) again. Here the blocks meet within one kernel, and keep what they have read: a
// multiprocessor has 64 K registers of 4 bytes and nearly as much shared memory, so that all 132 of
// an H200 hold the 42 MB of X and F of [32, 320, 1024] in bf16 at once.
//
// 1. A line of D / 4 threads takes up to `held` neighbouring rows of one segment, a thread four
//    channels. It reads them, all loads at once: one array into registers, the other into shared
//    memory, where each thread has its own place and no other reads it.
// 2. It adds up what is summed over tokens: X and F, or (with h from a sum over the row's threads)
//    Delta and Delta * (F - Fbar). All lines leave their sums in global memory, meet, and add up
//    those of their segment, in the same order.
// 3. It writes its rows, from what it holds.
//
// The formulas are those above: merge_rule(), (Delta'), merge_rule_backward().

#ifdef __CUDACC__
// Where a line is, two to a block. A sequence's lines come one after the other, first those of the
// image, then those of the text, and share the rows of their segment evenly. What a line reads is a
// window of `held` rows, some of which may be others': so the addresses differ by constants, and no
// load waits for a condition.
template <int D, int held>
struct HeldLine {
  static constexpr int columns = D / 4, threads = 2 * columns, warps = columns / 32;
  int place, number, first, end;  // of the block's two; in the sequence; its segment's lines
  size_t segment;                 // its number among the batch * 2
  size_t window;                  // the first of the rows that are read,
  int begin, rows;                // and which of them are the line's own
  int d;                          // this thread's first channel

  // One at least: an empty segment's means are written like others.
  HD static int lines(size_t count) { return int((max_<size_t>(count, 1) + held - 1) / held); }
  static size_t blocks(Tokens tokens) {
    return ceil_div(size_t(lines(tokens.image) + lines(tokens.text)), 2);
  }

  __device__ HeldLine(Tokens tokens, size_t first_sequence, int blocks) {
    size_t sequence = first_sequence + blockIdx.x / unsigned(blocks);
    place = int(threadIdx.x) / columns, d = 4 * (int(threadIdx.x) % columns);
    number = 2 * (int(blockIdx.x) % blocks) + place;
    int image = lines(tokens.image), text = lines(tokens.text), kind = number < image ? 0 : 1;
    first = kind ? image : 0, end = kind ? image + text : image;
    int count = int(tokens.count(size_t(kind)));
    int share = (count + end - first - 1) / (end - first), skipped = (number - first) * share;
    rows = max(min(share, count - skipped), 0);  // a line too many goes through the motions
    segment = 2 * sequence + size_t(kind);
    size_t start = sequence * tokens.length() + tokens.first(size_t(kind)) + size_t(skipped);
    window = min_(start, tokens.rows() - held);
    begin = int(start - window);
  }
  __device__ bool has(int k) const { return unsigned(k - begin) < unsigned(rows); }
  __device__ size_t row(int k) const { return window + size_t(k); }
  __device__ size_t at() const { return window * D + size_t(d); }
};

// A number a row and line, made from sums over the line's threads.
template <int D, int held>
struct RowNumbers {
  using L = HeldLine<D, held>;
  float partial[2][L::warps][held], value[2][held];

  // Four rows' summands, from rows k to k + 3. In two exchanges a warp's lanes give away half of
  // what they have, and are left with one row each; three more make its sum.
  __device__ void add(const L& line, int k, const float (&x)[4]) {
    int lane = int(threadIdx.x) % 32;
    auto other = [](float v, int bit) { return __shfl_xor_sync(0xffffffffu, v, bit); };
    bool upper = lane & 16, odd = lane & 8;
    float a = (upper ? x[2] : x[0]) + other(upper ? x[0] : x[2], 16);
    float b = (upper ? x[3] : x[1]) + other(upper ? x[1] : x[3], 16);
    float sum = (odd ? b : a) + other(odd ? a : b, 8);
    for (int bit = 4; bit > 0; bit /= 2) sum += other(sum, bit);
    if (lane % 8 == 0) partial[line.place][line.d / 128][k + lane / 8] = sum;
  }
  // value = finish(row k, its sum). Afterwards every thread may read it.
  template <class Finish>
  __device__ void finish(const L& line, const Finish& finish) {
    __syncthreads();
    for (int k = line.d / 4; k < held; k += L::columns) {
      float sum = partial[line.place][0][k];
      UNROLL
      for (int w = 1; w < L::warps; ++w) sum += partial[line.place][w][k];
      value[line.place][k] = finish(k, sum);
    }
    __syncthreads();
  }
};

// The sums of all lines of this line's segment. The kernel's blocks meet here.
template <class L>
__device__ QuadPair<float> meet(const L& line, QuadPair<float> own, float* place, int blocks) {
  constexpr int D = 4 * L::columns;
  float* sums = place + blockIdx.x / unsigned(blocks) * size_t(4 * blocks * D);
  auto of = [&](int number) { return sums + number * 2 * D + line.d; };
  store(of(line.number), own.a), store(of(line.number) + D, own.b);
  cooperative_groups::this_grid().sync();
  QuadPair<float> total = {};
  for (int i = line.first; i < line.end; i += 4) {
    QuadPair<float> sums_of[4];
    UNROLL
    for (int k = 0; k < 4; ++k) {
      const float* from = of(min(i + k, line.end - 1));
      sums_of[k] = {load<float>(from), load<float>(from + D)};
    }
    UNROLL
    for (int k = 0; k < 4; ++k)
      if (i + k < line.end) total = total + sums_of[k];
  }
  return total;
}

// What a thread holds of a row, 16 bytes: half in registers, half at its place in shared memory.
// First they are its four bf16 of two arrays, then the four floats that were made from them.
template <class L, int held>
struct Held {
  static constexpr int group = 8, groups = (held + group - 1) / group;  // rows that arrive together
  uint2 own[held];
  uint2* shared;

  // Send for the line's rows of both arrays.
  __device__ void load(const bf16* to_own, const bf16* to_shared) {
    UNROLL
    for (int k = 0; k < held; ++k) {
      __pipeline_memcpy_async(shared + k * L::threads, to_shared + k * 4 * L::columns,
                              sizeof *shared);
      own[k] = *reinterpret_cast<const uint2*>(to_own + k * 4 * L::columns);
      if (k % group == group - 1 || k == held - 1) __pipeline_commit();
    }
  }
  // Row k and those before it have come.
  __device__ void wait(int k) const {
    if (k % group == 0) __pipeline_wait_prior(size_t(groups - 1 - k / group));
  }
  // Row k of either array. A bf16 is the upper half of a float.
  __device__ static Quad<float> floats(uint2 q) {
    auto upper = [](uint32_t bits) { return __uint_as_float(bits & 0xffff0000u); };
    return {{upper(q.x << 16), upper(q.x), upper(q.y << 16), upper(q.y)}};
  }
  __device__ Quad<float> first(int k) {
    // The compiler would keep these floats for the next time, in registers that there are not. So
    // it is told that the bf16 may have changed.
    asm volatile("" : "+r"(own[k].x), "+r"(own[k].y));
    return floats(own[k]);
  }
  __device__ Quad<float> second(int k) const { return floats(shared[k * L::threads]); }

  __device__ void put(int k, Quad<float> q) {
    own[k] = {__float_as_uint(q[0]), __float_as_uint(q[1])};
    shared[k * L::threads] = {__float_as_uint(q[2]), __float_as_uint(q[3])};
  }
  __device__ Quad<float> get(int k) const {
    uint2 q = shared[k * L::threads];
    return {{__uint_as_float(own[k].x), __uint_as_float(own[k].y), __uint_as_float(q.x),
             __uint_as_float(q.y)}};
  }
};

template <Merge merge, int D, int held>
__global__ void __launch_bounds__(D / 2, 1)
    merge_forward_kernel(bf16* X_next, MergeSaved<float> saved, const bf16* X, const bf16* F,
                         Gates<const bf16> gates, Tokens tokens, float eps, float* place,
                         int blocks, size_t first_sequence) {
  using L = HeldLine<D, held>;
  extern __shared__ uint2 in_shared[];
  __shared__ RowNumbers<D, held> r;
  L line(tokens, first_sequence, blocks);
  Held<L, held> rows{{}, in_shared + threadIdx.x};
  rows.load(X + line.at(), F + line.at());
  QuadPair<float> sum = {};
  UNROLL
  for (int k = 0; k < held; ++k) {
    rows.wait(k);
    QuadPair<float> terms = {rows.first(k), rows.second(k)};
    if (line.has(k)) sum = sum + terms;
  }
  GateValues<float> values = gates_at<merge>(gates, size_t(line.d));
  sum = meet(line, sum, place, blocks);
  float scale = 1 / float(max_<size_t>(tokens.count(line.segment % 2), 1));
  Quad<float> xbar = scale * sum.a, fbar = scale * sum.b;
  if (line.number == line.first) {
    store(saved.xbar + line.segment * D + size_t(line.d), xbar);
    store(saved.fbar + line.segment * D + size_t(line.d), fbar);
  }
  UNROLL
  for (int k = 0; k < held; k += 4) {
    float squares[4];
    UNROLL
    for (int i = 0; i < 4; ++i) {
      Quad<float> z = merge_rule<merge>(values, rows.first(k + i), rows.second(k + i), xbar, fbar);
      squares[i] = dot(z, z);
      rows.put(k + i, z);
    }
    r.add(line, k, squares);
  }
  r.finish(line, [&](int k, float squares) {
    float r_k = inverse_rms(squares, D, eps);
    if (line.has(k)) saved.r[line.row(k)] = r_k;
    return r_k;
  });
  UNROLL
  for (int k = 0; k < held; ++k)
    if (line.has(k)) store(X_next + line.at() + k * D, r.value[line.place][k] * rows.get(k));
}

// dX may be G: all of a line's rows are read before any is written. F is not held: it is read while
// the sums are made, from the L2 cache, where it was asked for at the beginning.
template <Merge merge, int D, int held>
__global__ void __launch_bounds__(D / 2, 1)
    merge_backward_kernel(bf16* dX, bf16* dF, MergeScratch<float> scratch, const bf16* G,
                          const bf16* X_next, const bf16* F, Gates<const bf16> gates,
                          MergeSaved<float> saved, Tokens tokens, float* place, int blocks,
                          size_t first_sequence) {
  using L = HeldLine<D, held>;
  extern __shared__ uint2 in_shared[];
  __shared__ RowNumbers<D, held> h;
  __shared__ float r[2][held];
  L line(tokens, first_sequence, blocks);
  Held<L, held> rows{{}, in_shared + threadIdx.x};
  rows.load(G + line.at(), X_next + line.at());
  for (int k = line.d / 4; k < held; k += L::columns) {
    r[line.place][k] = saved.r[line.row(k)];
    UNROLL
    for (int i = 0; i < D; i += 64)  // 128 bytes
      asm volatile("prefetch.global.L2 [%0];" ::"l"(F + line.row(k) * D + i));
  }
  UNROLL
  for (int k = 0; k < held; k += 4) {
    rows.wait(k);
    float products[4];
    UNROLL
    for (int i = 0; i < 4; ++i) products[i] = dot(rows.first(k + i), rows.second(k + i));
    h.add(line, k, products);
  }
  h.finish(line, [&](int, float product) { return product / float(D); });
  Quad<float> fbar = load<float>(saved.fbar + line.segment * D + size_t(line.d));
  QuadPair<float> sum = {};
  UNROLL
  for (int k = 0; k < held; k += 4) {
    uint2 f[4];
    UNROLL
    for (int i = 0; i < 4; ++i) f[i] = *reinterpret_cast<const uint2*>(F + line.at() + (k + i) * D);
    UNROLL
    for (int i = 0; i < 4; ++i) {
      Quad<float> dZ =
          r[line.place][k + i] *
          (rows.first(k + i) - h.value[line.place][k + i] * rows.second(k + i));  // (Delta')
      QuadPair<float> terms = {dZ, dZ * (rows.floats(f[i]) - fbar)};              // (dbeta)
      if (line.has(k + i)) sum = sum + terms;
      rows.put(k + i, dZ);
    }
  }
  GateValues<float> values = gates_at<merge>(gates, size_t(line.d));
  sum = meet(line, sum, place, blocks);
  Quad<float> dZbar = 1 / float(max_<size_t>(tokens.count(line.segment % 2), 1)) * sum.a;
  if (line.number == line.first) {
    store(scratch.dZbar + line.segment * D + size_t(line.d), dZbar);
    store(scratch.dgate + line.segment * D + size_t(line.d), sum.b);
  }
  UNROLL
  for (int k = 0; k < held; ++k) {
    MergeGradients<float> out = merge_rule_backward<merge>(values, rows.get(k), dZbar);
    if (line.has(k)) store(dX + line.at() + k * D, out.dX), store(dF + line.at() + k * D, out.dF);
  }
}

// Call f with the kind of merge, D and `held` as compile-time constants, where there are kernels
// for them. Two lines of 44 rows of 1024 channels are what a multiprocessor can hold; 256 image and
// 64 text tokens then take eight lines, and 32 such sequences 128 of 132 multiprocessors.
template <class T, class F>
bool with_held_rows(const Device& device, Merge merge, size_t D, const F& f) {
  if (!device.gpu || !std::is_same_v<T, bf16>) return false;
  auto with_width = [&](auto width, auto held) {
    using Split = std::integral_constant<Merge, Merge::mvsplit>;
    using NoLeak = std::integral_constant<Merge, Merge::mvsplit_noleak>;
    if (merge == Merge::mvsplit) return f(Split(), width, held);
    if (merge == Merge::mvsplit_noleak) return f(NoLeak(), width, held);
    return false;
  };
  using std::integral_constant;
  if (D == 128) return with_width(integral_constant<int, 128>(), integral_constant<int, 12>());
  if (D == 256) return with_width(integral_constant<int, 256>(), integral_constant<int, 24>());
  if (D == 512) return with_width(integral_constant<int, 512>(), integral_constant<int, 44>());
  if (D == 1024) return with_width(integral_constant<int, 1024>(), integral_constant<int, 44>());
  return false;
}

// Launch one of the two kernels for as many sequences at once as the device can hold, until all are
// through. False if it cannot hold one.
template <class L, class... Parameters, class... Arguments>
bool launch_held(const Device& device, void (*kernel)(Parameters...), Tokens tokens, int held,
                 Arguments... arguments) {
  size_t blocks = L::blocks(tokens), shared = size_t(held) * L::threads * sizeof(uint2);
  size_t room = Device::meeting_bytes / (blocks * 4 * 4 * L::columns * sizeof(float));
  size_t at_once = std::min(room, blocks_at_once(kernel, L::threads, shared) / blocks);
  if (at_once == 0 || tokens.rows() < size_t(held)) return false;
  for (size_t first = 0; first < tokens.batch; first += at_once)
    launch(device, kernel, unsigned(std::min(at_once, tokens.batch - first) * blocks), true,
           L::threads, shared, arguments..., device.meeting_place(), int(blocks), first);
  return true;
}
#endif

template <class T>
bool fused_merge_forward(const Device& device, T* X_next, MergeSaved<Acc<T>> saved, const T* X,
                         const T* F, Gates<const T> gates, Tokens tokens, size_t D, double eps) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>)
    return with_held_rows<T>(device, gates.merge, D, [&](auto kind, auto width, auto held) {
      constexpr int columns = decltype(width)::value, rows = decltype(held)::value;
      return launch_held<HeldLine<columns, rows>>(
          device, merge_forward_kernel<decltype(kind)::value, columns, rows>, tokens, rows, X_next,
          saved, X, F, gates, tokens, float(eps));
    });
#endif
  (void)device, (void)X_next, (void)saved, (void)X, (void)F, (void)gates, (void)tokens, (void)D;
  return (void)eps, false;
}

template <class T>
bool fused_merge_backward(const Device& device, T* dX, T* dF, MergeScratch<Acc<T>> scratch,
                          const T* G, const T* X_next, const T* F, Gates<const T> gates,
                          MergeSaved<Acc<T>> saved, Tokens tokens, size_t D) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>)
    return with_held_rows<T>(device, gates.merge, D, [&](auto kind, auto width, auto held) {
      constexpr int columns = decltype(width)::value, rows = decltype(held)::value;
      return launch_held<HeldLine<columns, rows>>(
          device, merge_backward_kernel<decltype(kind)::value, columns, rows>, tokens, rows, dX, dF,
          scratch, G, X_next, F, gates, saved, tokens);
    });
#endif
  (void)device, (void)dX, (void)dF, (void)scratch, (void)G, (void)X_next, (void)F, (void)gates;
  return (void)saved, (void)tokens, (void)D, false;
}

// ---------------------------------------------------------------------------------------------
// 5. What the split does to a writer's gradient
//
// A residual writer is the last matrix of a branch, F = y W^T: W_O after attention, W2 in the FFN.
// Let delta (T, D) be the adjoint of F and y (T, n) the writer's input, for one sequence. Its
// gradient is
//
//     dW = sum_t delta_t y_t^T = delta^T y = (J delta + P delta)^T (J y + P y)
//        = (J delta)^T (J y) + (P delta)^T (P y)
//        = T dbar ybar^T  +  sum_t dtil_t ytil_t^T  =  dW_mu + dW_c,                      (5), (17)
//
// as the cross terms delta^T J P y and delta^T P J y are zero. Each of the T rows of J delta is
// dbar^T and each of J y is ybar^T, the means; dtil_t and ytil_t are the rows of P delta and P y.
// G_mean = ||dW_mu||_F, G_ctr = ||dW_c||_F. (As matrices the two are not orthogonal: G_mean^2 +
// G_ctr^2 is not ||dW||^2.) dW_mu has rank one, and grows like T when tokens agree in delta and y.
//
// How large is dW? Square it, and what remains are pairs of tokens:
//
//     ||dW||_F^2 = tr(dW^T dW) = sum_ts <delta_t, delta_s> <y_t, y_s> = sum_ts w_t w_s M_ts,
//     w_t = |delta_t| |y_t|,     M_ts = cos(delta_t, delta_s) cos(y_t, y_s).          (19)-(26)
//
// Against what it would be if no two tokens agreed (M = I) it is larger by the alignment
// amplification
//
//     A = ||dW||_F^2 / sum_t w_t^2 = w^T M w / |w|^2.                                          (6)
//
// <delta_t, delta_s> <y_t, y_s> is the inner product of the matrices delta_t y_t^T and delta_s
// y_s^T, so M is a Gram matrix (of these, each divided by w_t): positive semidefinite, with trace
// T. Its eigenvalues lie between 0 and T, and so does A. M_tt = 1, so the pairs with s = t give 1:
//
//     A - 1 = sum_(s != t) w_t w_s M_ts / sum_t w_t^2.
//
// With equal w_t that is (1/T) sum_(s != t) M_ts = (T - 1) kappa, kappa the mean of M_ts over pairs
// (30). In general let khat be the mean of |M_ts| over pairs with weights w_t w_s. Then
//
//     |A - 1| <= khat sum_(s != t) w_t w_s / sum_t w_t^2 <= (T - 1) khat,                (31)-(32)
//
// as sum_(s != t) w_t w_s = (sum w)^2 - sum w^2 and, by Cauchy-Schwarz, (sum w)^2 <= T sum w^2.
// (The weights matter: two tokens that agree and outweigh the others give A = 2 for every T, while
// the plain mean of |M_ts|, if no other pair agrees, falls like 1/T^2.) Hence two limits, for w_t
// of a given size:
//
//     kappa ~ 0:    A ~ 1,   ||dW|| = |w| = O(sqrt T)        tokens that differ
//     kappa -> 1:   A -> T,  ||dW|| = sqrt(T) |w| = O(T)     tokens alike, and dW = dW_mu
//
// That is the lever of the collapse. When tokens become alike, each writer's gradient grows by up
// to sqrt(T), 16 for 256 tokens, and points in one direction. A step against dW_mu, -eta dW_mu,
// changes F_t = W y_t by -eta T <ybar, y_t> dbar: every token along the same vector, and by nearly
// the same amount when the y_t are alike. So nearly all of the step goes into the mean of F; and
// where that makes the mean larger against the rest, the tokens become more alike still.
//
// MV-Split acts on delta: by (10), delta = beta * P Delta + alpha * J Delta with Delta = dL/dZ.
// With the J and P of the merge, within each segment, row d of dW_mu is scaled by alpha_d and row d
// of dW_c by beta_d, separately. LayerScale scales row d of both by lambda_d, which cannot change
// their ratio in that row; nor can clipping, which multiplies all of dW by one number (App. J).
//
// Which mean? (17) holds for any such pair of projectors. With J_seg, dW_mu is one rank-one term a
// segment. Let dbar_N and dbar_L be the means over the N image and the L text tokens. J J_seg = J:
// the global mean of what J_seg left, N rows dbar_N and L rows dbar_L, is dbar, and (17) splits it
// again. As dbar_N - dbar = (L/T) (dbar_N - dbar_L) and dbar_L - dbar = -(N/T) (dbar_N - dbar_L),
// and so for y, and N (L/T)^2 + L (N/T)^2 = N L / T,
//
//     N dbar_N ybar_N^T + L dbar_L ybar_L^T
//         = T dbar ybar^T + (N L / T) (dbar_N - dbar_L) (ybar_N - ybar_L)^T.
//
// Diagnostics take the global J, as the paper does: they count the second term as centered, though
// alpha governs it and it grows like T. At alpha = 0 the question is moot: J_seg delta = 0, hence J
// delta = J J_seg delta = 0, and G_mean = 0 by both counts, up to the rounding of delta. (Were the
// merge to use the global mean instead, the segment means of delta would only have to cancel, and
// each segment's own mean-coherent gradient would be free.)

// ---------------------------------------------------------------------------------------------
// 6. Measuring the two parts
//
// Of a state. By (3) and orthogonality |X|^2 = |mu(X)|^2 + |c(X)|^2 (Frobenius norms), and most
// numbers that describe a state of tokens are ratios of these two energies.
//
// Of a writer's gradient, for one sequence, without forming dW (D, n). Let K_ts = <y_t, y_s> and
// C_ts = <delta_t, delta_s>, two (T, T) matrices. Then
//
//     |dW|^2 = tr( sum_ts y_t delta_t^T delta_s y_s^T ) = sum_ts K_ts C_ts,
//
// and from centered tokens the same sum is |dW_c|^2. The mean part is a norm of two vectors,
// |dW_mu| = T |dbar| |ybar|; with a mean a segment, dW_mu = sum_s n_s dbar_s ybar_s^T has rank two,
//
//     |dW_mu|^2 = sum_ss' n_s n_s' <dbar_s, dbar_s'> <ybar_s, ybar_s'>.
//
// Centered tokens are made first and K, C from them. To center K itself is the same on paper, but
// takes the small difference of large numbers once the mean dominates, which is what is looked for.
// And once the network has collapsed delta is so small that its squares underflow in fp32: so each
// sequence is taken over a power of two near its largest number, which rounds nothing, and G_ctr
// gets it back in fp64.
//
// Alignment. In section 5's letters w_t w_s M_ts = K_ts C_ts, hence
//
//     A    = sum_ts K_ts C_ts / sum_t K_tt C_tt,                                               (6)
//     khat = sum_(s != t) |K_ts C_ts| / sum_(s != t) w_t w_s,      w_t^2 = K_tt C_tt.    (31)-(32)

// energies (batch, 2): |mu(X)|^2 and |c(X)|^2 of matrices X (T, D) over all T rows, given by their
// elements x(matrix, t, d).
template <class A, class Element>
void split_energies(const Device& device, double* energies, size_t batch, size_t T, size_t D,
                    const Element& x) {
  for_each_team(device, batch, Team::max_size, [=] HD(Team team) {
    double mean_energy = 0, centered = 0;
    for (size_t d = team.rank; d < D; d += team.size) {
      A sum = 0, squares = 0;
      for (size_t t = 0; t < T; ++t) sum += x(team.index, t, d);
      A mean = sum / A(T);
      for (size_t t = 0; t < T; ++t) {
        A rest = x(team.index, t, d) - mean;
        squares += rest * rest;
      }
      mean_energy += double(T) * double(mean) * double(mean);
      centered += double(squares);
    }
    mean_energy = team.sum(mean_energy), centered = team.sum(centered);
    if (team.rank == 0) {
      energies[2 * team.index] = mean_energy;
      energies[2 * team.index + 1] = centered;
    }
  });
}

// Energies (batch, 2) of stored matrices x (batch, n, D).
template <class T>
void matrix_energies(const Device& device, double* energies, const T* x, size_t batch, size_t n,
                     size_t D) {
  using A = Acc<T>;
  split_energies<A>(device, energies, batch, n, D,
                    [=] HD(size_t b, size_t t, size_t d) { return A(x[(b * n + t) * D + d]); });
}

// Of one sequence. |dW_mu| and |dW_c| with the global mean, as in the paper, and with a mean a
// segment, as in the merges; A; khat. A and khat are NaN where delta or y is zero, khat also where
// all but one token are.
struct WriterModes {
  double g_mean, g_ctr, g_mean_seg, g_ctr_seg, amplification, khat;
};

// Scratch for a batch of B sequences: segment means; powers of two; tokens as they are, globally
// centered and centered by segment, over these; their Gram matrices.
template <class A>
struct WriterScratch {
  A *ybar, *dbar;            // (B, 2, n), (B, 2, D)
  A *y_scale, *delta_scale;  // (B)
  A *y, *delta;              // (3, B, T, n), (3, B, T, D)
  A *K, *C;                  // (3, B, T, T)

  void lay(Carver& c, Tokens tokens, size_t n, size_t D) {
    size_t squares = 3 * tokens.rows() * tokens.length();
    ybar = c.take<A>(2 * tokens.batch * n), dbar = c.take<A>(2 * tokens.batch * D);
    y_scale = c.take<A>(tokens.batch), delta_scale = c.take<A>(tokens.batch);
    y = c.take<A>(3 * tokens.rows() * n), delta = c.take<A>(3 * tokens.rows() * D);
    K = c.take<A>(squares), C = c.take<A>(squares);
  }
};

// means (B, 2, n) of x (B, T, n) over each segment's tokens.
template <class T>
void token_means(const Device& device, Acc<T>* means, const T* x, Tokens tokens, size_t n) {
  using A = Acc<T>;
  sum_over_tokens(
      device, tokens, n, quad(A(0)),
      [=] HD(size_t, size_t row, size_t d) { return load<A>(x + row * n + d); },
      [=] HD(size_t segment, size_t d, Quad<A> sum) {
        store(means + segment * n + d, A(1) / A(max_<size_t>(tokens.count(segment % 2), 1)) * sum);
      });
}

// spreads (B, 2, n): the root mean square over each segment's tokens of x (B, T, n) less `means`,
// those of token_means(). By channel it is to c(x) what the mean is to mu(x).
template <class T>
void token_spreads(const Device& device, Acc<T>* spreads, const T* x, const Acc<T>* means,
                   Tokens tokens, size_t n) {
  using A = Acc<T>;
  sum_over_tokens(
      device, tokens, n, quad(A(0)),
      [=] HD(size_t segment, size_t row, size_t d) {
        Quad<A> rest = load<A>(x + row * n + d) - load<A>(means + segment * n + d);
        return rest * rest;
      },
      [=] HD(size_t segment, size_t d, Quad<A> sum) {
        A count = A(max_<size_t>(tokens.count(segment % 2), 1));
        for (int k = 0; k < 4; ++k) sum[k] = std::sqrt(sum[k] / count);
        store(spreads + segment * n + d, sum);
      });
}

// scales (B): the largest number of each sequence of x (B, T, n), down to a power of two.
template <class T>
void token_scales(const Device& device, Acc<T>* scales, const T* x, Tokens tokens, size_t n) {
  using A = Acc<T>;
  size_t count = tokens.length() * n;
  for_each_team(device, tokens.batch, Team::max_size, [=] HD(Team team) {
    A largest = 0;
    for (size_t i = 4 * team.rank; i < count; i += 4 * team.size) {
      Quad<A> v = load<A>(x + team.index * count + i);
      for (int k = 0; k < 4; ++k) largest = max_(largest, A(fabs(v[k])));
    }
    largest = team.max(largest);
    // Within what the scale and one over it can be in fp32.
    int exponent = largest > 0 ? max_(min_(int(ilogb(largest)), 126), -126) : 0;
    if (team.rank == 0) scales[team.index] = A(ldexp(1.0, exponent));
  });
}

// out (3, B, T, n): x (B, T, n) as it is, less the global mean, less its segment's mean; each over
// its sequence's scale.
template <class T>
void center_tokens(const Device& device, Acc<T>* out, const T* x, const Acc<T>* means,
                   const Acc<T>* scales, Tokens tokens, size_t n) {
  using A = Acc<T>;
  size_t rows = tokens.rows();
  A image = A(tokens.image) / A(tokens.length()), text = A(tokens.text) / A(tokens.length());
  for_each(device, rows * n / 4, [=] HD(size_t i) {
    size_t row = i / (n / 4), d = i % (n / 4) * 4, sequence = row / tokens.length();
    const A* mean = means + sequence * 2 * n + d;
    Quad<A> value = load<A>(x + row * n + d);
    Quad<A> global = image * load<A>(mean) + text * load<A>(mean + n);
    Quad<A> own = load<A>(means + tokens.segment_of(row) * n + d);
    A over = A(1) / scales[sequence];
    store(out + row * n + d, over * value);
    store(out + (rows + row) * n + d, over * (value - global));
    store(out + (2 * rows + row) * n + d, over * (value - own));
  });
}

// <a_0, a_0>, <a_0, a_1>, <a_1, a_1> of two vectors a (2, n), times the counts of tokens they stand
// for.
template <class A>
HD Quad<double> mean_products(Team team, const A* a, size_t n, Tokens tokens) {
  double p[3] = {0, 0, 0};
  for (size_t d = team.rank; d < n; d += team.size) {
    double first = double(a[d]), second = double(a[n + d]);
    p[0] += first * first, p[1] += first * second, p[2] += second * second;
  }
  double N = double(tokens.image), L = double(tokens.text);
  return {{N * N * team.sum(p[0]), N * L * team.sum(p[1]), L * L * team.sum(p[2]), 0}};
}

// modes (B) of a writer with input y (B, T, n) and adjoint delta (B, T, D) of its output.
template <class T>
void writer_modes(Device& device, WriterModes* modes, WriterScratch<Acc<T>> scratch, const T* y,
                  const T* delta, Tokens tokens, size_t n, size_t D) {
  using A = Acc<T>;
  size_t length = tokens.length(), squares = length * length;
  auto gram = [&](A* product, A* x, size_t channels) {
    Matrix<A> rows = Matrix<A>(x, channels).batch(length * channels, 0);
    gemm(device, Matrix<A>(product, length).batch(squares, 0), rows, rows.transpose(),
         {length, length, channels, 3 * tokens.batch});
  };
  token_means(device, scratch.ybar, y, tokens, n);
  token_means(device, scratch.dbar, delta, tokens, D);
  token_scales(device, scratch.y_scale, y, tokens, n);
  token_scales(device, scratch.delta_scale, delta, tokens, D);
  center_tokens(device, scratch.y, y, scratch.ybar, scratch.y_scale, tokens, n);
  center_tokens(device, scratch.delta, delta, scratch.dbar, scratch.delta_scale, tokens, D);
  gram(scratch.K, scratch.y, n);
  gram(scratch.C, scratch.delta, D);
  for_each_team(device, tokens.batch, Team::max_size, [=] HD(Team team) {
    size_t b = team.index;
    auto product = [&](size_t part, size_t i) {
      size_t at = (part * tokens.batch + b) * squares + i;
      return double(scratch.K[at]) * double(scratch.C[at]);
    };
    double energy[3] = {0, 0, 0}, magnitudes = 0, w1 = 0, w2 = 0;
    for (size_t i = team.rank; i < squares; i += team.size) {
      for (size_t part = 0; part < 3; ++part) energy[part] += product(part, i);
      magnitudes += fabs(product(0, i));
    }
    for (size_t t = team.rank; t < length; t += team.size) {
      w1 += sqrt(product(0, t * length + t));
      w2 += product(0, t * length + t);
    }
    for (double& e : energy) e = team.sum(e);
    magnitudes = team.sum(magnitudes), w1 = team.sum(w1), w2 = team.sum(w2);
    Quad<double> yy = mean_products(team, scratch.ybar + b * 2 * n, n, tokens);
    Quad<double> dd = mean_products(team, scratch.dbar + b * 2 * D, D, tokens);
    if (team.rank != 0) return;
    // T |dbar| |ybar|, from T ybar = N ybar_image + L ybar_text.
    double y_sum = yy[0] + 2 * yy[1] + yy[2], d_sum = dd[0] + 2 * dd[1] + dd[2];
    // Of the segments' 2 x 2 products each has one factor n_s n_s' too many.
    double N = max_(double(tokens.image), 1.0), L = max_(double(tokens.text), 1.0);
    double by_segment =
        yy[0] * dd[0] / (N * N) + 2 * yy[1] * dd[1] / (N * L) + yy[2] * dd[2] / (L * L);
    double scale = double(scratch.y_scale[b]) * double(scratch.delta_scale[b]);
    double pairs = w1 * w1 - w2;  // what rounding leaves of it, if one token has all, is no weight
    WriterModes m;
    m.g_mean = sqrt(max_(y_sum, 0.0) * max_(d_sum, 0.0)) / double(length);
    m.g_ctr = scale * sqrt(max_(energy[1], 0.0));
    m.g_mean_seg = sqrt(max_(by_segment, 0.0));
    m.g_ctr_seg = scale * sqrt(max_(energy[2], 0.0));
    m.amplification = energy[0] / w2;
    m.khat = pairs > 1e-12 * w1 * w1 ? (magnitudes - w2) / pairs : NAN;
    modes[b] = m;
  });
}
