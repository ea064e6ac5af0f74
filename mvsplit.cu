// mvsplit.cu - the residual merges, in token space.
//
// What it is: how a block's branch output F joins the trunk X, forward and backward, each merge
// fused with the RMSNorm that follows it; and the algebra of token means that explains why very
// deep networks need MV-Split. What it is not: the network. Attention, the FFN and the chain of
// blocks are in dit.cu.
//
// The mean here is over TOKENS, never over channels: J X replaces every token of a segment by the
// average token. (LayerNorm's mean, which runs over the channels of one token, plays no part.)
//
// Words. The trunk X is passed from block to block. A branch (attention or FFN) computes F from it;
// its last matrix (W_O, W2) is the residual writer. A merge joins F to X. The adjoint of an array
// is the gradient of the loss by it; that of its output, which a backward is given, its cotangent.
// <U, V> = tr(U^T V), the inner product of all numbers. Mean mode screaming is the paper's name for
// the collapse: the mean part of the writers' gradients bursts, and all tokens become alike.
//
// Letters. T tokens of a sequence, N of image and L of text; D channels of a token; B sequences. J
// the mean over tokens, P = I - J; X, F, Z, X_next the arrays of a merge, G = dL/dX_next, and Delta
// = dL/dZ, dZ in the code (in derivations dZ is a differential). W a writer, y its input, delta the
// adjoint of its output. (n) is the equation's number in the paper.
//
// How to read it: straight through to the appendix. Geometry (1), mechanism (2), method (3 to 5).
#pragma once

#include "math.h"

#include <array>

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
// what is centered in each segment is centered globally, and a gain on the segment means reaches
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
  // 1 / (tokens of a segment). An empty one has no mean and nobody asks: 1 keeps it free of NaN.
  template <class Acc>
  HD Acc one_over(size_t segment) const {
    return Acc(1) / Acc(max_<size_t>(count(segment % 2), 1));
  }

  // What math.h's schedules ask of groups of rows, which are the segments.
  HD size_t groups() const { return 2 * batch; }
  HD size_t longest() const { return max_(image, text); }
  HD size_t begin(size_t segment) const { return segment / 2 * length() + first(segment % 2); }
  HD size_t end(size_t segment) const { return begin(segment) + count(segment % 2); }
  // Pieces of up to n neighbouring rows of one segment lie as the rows of these tokens do.
  HD Tokens pieces(size_t n) const { return {batch, ceil_div(image, n), ceil_div(text, n)}; }
  HD Piece piece(size_t n, size_t index) const {
    Tokens of = pieces(n);
    uint32_t each = uint32_t(of.length()), i = uint32_t(index) % each;
    size_t kind = i < of.image ? 0 : 1, segment = 2 * size_t(uint32_t(index) / each) + kind;
    size_t row = begin(segment) + n * (i - of.first(kind));
    return {segment, row, min_(row + n, end(segment)) - 1};
  }
};

// Segment means of X and of F in one pass: xbar, fbar (B, 2, D) from X, F (B, T, D). Eq. (43).
template <class Real>
void segment_means(const Device& device, AccOf<Real>* xbar, AccOf<Real>* fbar, const Real* X,
                   const Real* F, Tokens tokens, size_t D) {
  using Acc = AccOf<Real>;
  sum_over_rows(
      device, tokens, D, Pair<Quad<Acc>>{quad(Acc(0)), quad(Acc(0))},
      [=] HD(size_t, size_t row, size_t d) {
        return Pair<Quad<Acc>>{load<Acc>(X + row * D + d), load<Acc>(F + row * D + d)};
      },
      [=] HD(size_t segment, size_t d, Pair<Quad<Acc>> sum) {
        store(xbar + segment * D + d, tokens.one_over<Acc>(segment) * sum.a);
        store(fbar + segment * D + d, tokens.one_over<Acc>(segment) * sum.b);
      });
}

// ---------------------------------------------------------------------------------------------
// 2. What a writer's gradient is made of
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
// G_ctr^2 is not ||dW||^2.) dW_mu has rank one. The mean of independent tokens has 1/sqrt(T) of a
// token's length, that of equal ones all of it: when tokens come to agree, in delta and in y,
// G_mean = T |dbar| |ybar| grows up to T times.
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
// all of one size:
//
//     kappa ~ 0:    A ~ 1,   ||dW|| = |w| = O(sqrt T)        tokens that differ
//     kappa -> 1:   A -> T,  ||dW|| = sqrt(T) |w| = O(T)     tokens alike
//
// and in the second, where the delta_t agree and the y_t do (not only the products of their
// cosines), dW = dW_mu.
//
// That is the lever of the collapse. When tokens become alike, a writer's gradient grows up to
// sqrt(T) times, its G_mean up to T times (16 and 256 for 256 tokens). A step -eta dW_mu moves F_t
// = W y_t by -eta T <ybar, y_t> dbar: every token along the same vector, and by nearly the same
// amount when the y_t are alike. So nearly all of the step goes into the mean of F; and where that
// makes the mean larger against the rest, tokens become more alike still. (Clipping and AdamW limit
// how long a step is; AdamW's first, sign(dbar) sign(ybar)^T, has rank one too.)
//
// Which mean? (17) holds for any such pair of projectors. With J_seg, dW_mu is one rank-one term a
// segment. Let dbar_N and dbar_L be the means over the N image and the L text tokens. J J_seg = J:
// the global mean of what J_seg gives, N rows dbar_N and L rows dbar_L, is dbar, and (17) splits it
// again. As dbar_N - dbar = (L/T) (dbar_N - dbar_L) and dbar_L - dbar = -(N/T) (dbar_N - dbar_L),
// and so for y, and N (L/T)^2 + L (N/T)^2 = N L / T,
//
//     N dbar_N ybar_N^T + L dbar_L ybar_L^T
//         = T dbar ybar^T + (N L / T) (dbar_N - dbar_L) (ybar_N - ybar_L)^T.
//
// Diagnostics take the global J, as the paper does: they count the second term as centered, though
// alpha (section 4) governs it and it grows like T. At alpha = 0 the question is moot: J_seg delta
// = 0, hence J delta = J J_seg delta = 0, and G_mean = 0 by both counts, up to the rounding of
// delta. (Were the merge to use the global mean instead, the segment means of delta would only have
// to cancel, and each segment's own mean-coherent gradient would be free.)

// ---------------------------------------------------------------------------------------------
// 3. RMSNorm
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
// length sqrt(D), up to eps, whatever z's is: all that a layer can do to a token is to turn it.

// r for one row, given the sum of its squares.
template <class Acc>
HD Acc inverse_rms(Acc sum_of_squares, size_t D, Acc eps) {
  return rsqrt_(sum_of_squares / Acc(D) + eps);
}

// Image or text tokens alone, (B, n, D), packed; `apart`: where they lie in a (B, T, D) array.
struct Packed {
  size_t batch, n, D, stride;

  HD size_t rows() const { return batch * n; }
  HD size_t apart(size_t row) const { return row / n * stride + row % n * D; }
};

// Y = r X by rows, X packed and Y apart; r (B, n) is kept for the backward.
template <class Real>
void rmsnorm_forward(const Device& device, Real* Y, AccOf<Real>* r, const Real* X, Packed shape,
                     double eps) {
  using Acc = AccOf<Real>;
  size_t D = shape.D;
  for_each_team(device, shape.rows(), threads_for_row(D), [=] HD(Team team) {
    const Real* x = X + team.index * D;
    Real* y = Y + shape.apart(team.index);
    Acc squares = 0;
    for (size_t d = 4 * team.rank; d < D; d += 4 * team.size) {
      Quad<Acc> v = load<Acc>(x + d);
      squares += dot(v, v);
    }
    Acc scale = inverse_rms(team.sum(squares), D, Acc(eps));
    for (size_t d = 4 * team.rank; d < D; d += 4 * team.size)
      store(y + d, scale * load<Acc>(x + d));
    if (team.rank == 0) r[team.index] = scale;
  });
}

// dX (=) from dY by (Delta); X, dX packed, dY apart as Y above.
template <class Real>
void rmsnorm_backward(const Device& device, Real* dX, const Real* dY, const Real* X,
                      const AccOf<Real>* r, Packed shape) {
  using Acc = AccOf<Real>;
  size_t D = shape.D;
  for_each_team(device, shape.rows(), threads_for_row(D), [=] HD(Team team) {
    const Real* x = X + team.index * D;
    const Real* g = dY + shape.apart(team.index);
    Acc scale = r[team.index], gx = 0;
    for (size_t d = 4 * team.rank; d < D; d += 4 * team.size)
      gx += dot(load<Acc>(g + d), load<Acc>(x + d));
    Acc q = scale * scale * scale / Acc(D) * team.sum(gx);
    for (size_t d = 4 * team.rank; d < D; d += 4 * team.size)
      store(dX + team.index * D + d, scale * load<Acc>(g + d) - q * load<Acc>(x + d));
  });
}

// ---------------------------------------------------------------------------------------------
// 4. The merges
//
//     postnorm     Z = X + F
//     layerscale   Z = X + lambda * F        lambda in R^D
//     mvsplit      Z = X + beta * P F + alpha * J (F - X)      alpha, beta in R^D             (7)
//
// and always X_next = RMSNorm(Z)  (8). J and P act within segments; * is by channel.
//
// What MV-Split does: apply P and J to (7), using that they commute with a gain by channel:
//
//     P Z = P X + beta * P F           the centered part is a residual stream with gain beta,
//     J Z = (1 - alpha) * J X + alpha * J F                                                   (9)
//
// while the mean is a leaky integrator: for 0 < alpha < 2 the old mean decays, and what the
// branches write into it comes in with gain alpha. (-alpha * J X is the leaky term.) Over depth,
// with F = 0 and each Z the next X, J Z = prod_l (1 - alpha_l) * J X_0 while P Z = P X_0. At
// alpha = 0, the start, J Z = J X: no branch can write into the mean at all.
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
// For all X and F these are equal only if alpha = 0, since J X appears in one alone; then lambda *
// J F = 0 leaves lambda = 0, and with it beta = 0. The consequence for training: a lambda small
// enough to tame the mean slows what the tokens learn about each other as much.
//
// Backward. With Delta = dL/dZ, dL = <Delta, dZ>, for MV-Split with dZ = dX + beta * P dF + alpha *
// J (dF - dX). J and P are symmetric, so they may move to the other side of <,>; so may a gain,
// which multiplies; and as J and P act on tokens and gains on channels, they commute:
//
//     <Delta, beta * P dF> = <beta * Delta, P dF> = <P (beta * Delta), dF> = <beta * P Delta, dF>,
//
// and alpha * J likewise. What then stands beside dX and dF are their gradients, token by token
// with Dbar_s the mean of Delta over the segment s of token i:
//
//     dL/dX = Delta - alpha * J Delta:             Delta_i - alpha * Dbar_s                (dX)
//     dL/dF = beta * P Delta + alpha * J Delta:
//                                    beta * Delta_i + (alpha - beta) * Dbar_s         (dF), (10)
//
// A gate's gradient is the sum over tokens of Delta times what the gate multiplies:
//
//     dL/dbeta  = sum_i Delta_i * (F_i - Fbar_s)                                          (dbeta)
//     dL/dalpha = sum_i Delta_i * (Fbar_s - Xbar_s)
//               = sum_s n_s Dbar_s * (Fbar_s - Xbar_s)                                   (dalpha)
//
// as what alpha multiplies is the same for all n_s tokens of a segment: dalpha takes no further
// pass.
//
// The consequence of (10) for section 2: delta = dL/dF. With the J and P of the merge, row d of a
// writer's dW_mu is scaled by alpha_d and row d of its dW_c by beta_d, separately; at alpha = 0,
// where training starts, delta = beta * P Delta has no segment mean at all (J P = 0), however large
// Dbar is, and dW_mu is zero. LayerScale scales row d of both by lambda_d, which cannot change
// their ratio in that row; nor can clipping, which multiplies all of dW by one number (App. J).

// A learned gain of a merge, a number a channel, (D), or one for all.
struct Gate {
  const char* name;  // --NAME says where it starts
  const char* file;  // in a checkpoint, behind the block's; # is 1 after attention, 2 after the FFN
  double start;
};
constexpr int most_gates = 2;

// At four channels: the values of a merge's gates, as it lists them; and a token's X and F, and
// their means over its segment (zero without `means`; for token_factor() xbar is always zero).
template <class Acc>
struct Gains {
  Quad<Acc> of[most_gates];
  HD Quad<Acc> operator[](int i) const { return of[i]; }
};
template <class Acc>
struct Joined {
  Quad<Acc> x, f, xbar, fbar;
};

// A merge is a struct as those below, and an entry in the list `Merges` (appendix A). It has a
// name, Z, its gradients {dX, dF} from Delta and its segment's mean (dZ, dZbar), and of each gate
// what it multiplies in Z: without one of these it does not compile (the list sees to it). Here is
// what it may leave out.
struct MergeBase {
  static constexpr std::array<Gate, 0> gates = {};
  // Which gate multiplies something of each token, and which something that a segment's tokens
  // share (then there are `means`); at most one of either sort, -1: none.
  static constexpr int by_token = -1, by_segment = -1;
  template <class Acc>
  HD static Quad<Acc> token_factor(Joined<Acc>) {
    return {};
  }
  template <class Acc>
  HD static Acc segment_factor(Acc /*xbar*/, Acc /*fbar*/) {
    return 0;
  }
  static constexpr bool means = false;        // does it need them, on the way forward or back?
  static constexpr bool trunk_apart = false;  // a matter of Pre-Norm alone (appendix A)
  static constexpr bool one_number = false;   // is its gate one for all channels?
  static constexpr double writer_std = 0;     // writers start as N(0, std^2); at 0, F = 0
};

struct PostNorm : MergeBase {
  static constexpr const char* name = "postnorm";

  template <class Acc>
  HD static Quad<Acc> Z(Gains<Acc>, Joined<Acc> in) {
    return in.x + in.f;
  }
  template <class Acc>
  HD static Pair<Quad<Acc>> gradients(Gains<Acc>, Quad<Acc> dZ, Quad<Acc> /*dZbar*/) {
    return {dZ, dZ};
  }
};

struct LayerScale : MergeBase {
  static constexpr const char* name = "layerscale";
  static constexpr std::array gates = {Gate{"lambda", "layerscale#", 1e-2}};
  static constexpr double writer_std = 0.02;  // the paper's choice (Table 3)
  enum { lambda, by_token = lambda };         // hides the base's

  template <class Acc>
  HD static Quad<Acc> Z(Gains<Acc> g, Joined<Acc> in) {
    return multiply_add(g[lambda], in.f, in.x);
  }
  template <class Acc>
  HD static Pair<Quad<Acc>> gradients(Gains<Acc> g, Quad<Acc> dZ, Quad<Acc>) {
    return {dZ, g[lambda] * dZ};
  }
  template <class Acc>
  HD static Quad<Acc> token_factor(Joined<Acc> in) {
    return in.f;
  }
};

struct MvSplit : MergeBase {
  static constexpr const char* name = "mvsplit";
  static constexpr std::array gates = {Gate{"alpha", "fused_mvsplit_norm#.alpha", 0},
                                       Gate{"beta", "fused_mvsplit_norm#.beta", 1}};
  static constexpr bool means = true;
  enum { alpha, beta, by_segment = alpha, by_token = beta };

  template <class Acc>
  HD static Quad<Acc> Z(Gains<Acc> g, Joined<Acc> in) {  // (7)
    return multiply_add(g[alpha], in.fbar - in.xbar, multiply_add(g[beta], in.f - in.fbar, in.x));
  }
  template <class Acc>
  HD static Pair<Quad<Acc>> gradients(Gains<Acc> g, Quad<Acc> dZ, Quad<Acc> dZbar) {
    return {dZ - g[alpha] * dZbar,                         // (dX)
            g[beta] * dZ + (g[alpha] - g[beta]) * dZbar};  // (dF)
  }
  template <class Acc>
  HD static Quad<Acc> token_factor(Joined<Acc> in) {
    return in.f - in.fbar;  // (dbeta)
  }
  template <class Acc>
  HD static Acc segment_factor(Acc xbar, Acc fbar) {
    return fbar - xbar;  // (dalpha)
  }
};

// ---------------------------------------------------------------------------------------------
// 5. A merge with its RMSNorm, forward and backward: (8) and the paper's (49)-(54)
//
// Forward: the means, if the merge has a use for them, then each token's Z, r and X_next = r Z.
//
// Backward. Given G = dL/dX_next, RMSNorm first: by (Delta), token i of dL/dZ is
//
//     Delta_i = r_i G_i - (r_i^3 / D) <G_i, Z_i> Z_i.
//
// Z is not stored, but r is, and so is X_next = r Z, which the next layer kept as its input. With Z
// = X_next / r the second term is (r / D) <G, X_next> X_next, so
//
//     Delta = r (G - h X_next),      h = <G, X_next> / D,     for each token            (Delta')
//
// A walk over the rows makes h, and with it Delta, for their sums over tokens: Dbar and the gates.
// A second walk makes Delta, not stored, again from h, and (dX), (dF). A merge with neither means
// nor gates needs one walk. So a merge of section 4 reads or writes (B, T, D) arrays: forward 5
// with means, 3 without; backward MV-Split's 7, one walk 4. (Schedules: math.h, end of section 4.)

// Which merge, and its gates (Number = const Real) or their gradients, as it lists them.
struct Merge {
  int index;  // in the list
  bool operator==(Merge other) const { return index == other.index; }
};
template <class Number>
struct Gates {
  Merge merge;
  Number* of[most_gates];
};

// The sizes that all merges of a network share.
struct MergeShape {
  Tokens tokens;
  size_t D;
  double eps;
};

// What the forward leaves for the backward: r (B, T), and the segment means (B, 2, D) if the merge
// needs them. For Pre-Norm there has to be r_X (B, T), what the merge before left; null where X is
// the trunk.
template <class Acc>
struct MergeSaved {
  Acc *r, *xbar, *fbar;
  const Acc* r_X = nullptr;
};

// A merge's gains at channels d to d + 3.
template <class M, class Real>
HD Gains<AccOf<Real>> gains_at(Gates<const Real> gates, size_t d) {
  Gains<AccOf<Real>> gains = {};
  for (int i : {int(M::by_token), int(M::by_segment)})
    if (i >= 0)
      gains.of[i] =
          M::one_number ? quad(AccOf<Real>(gates.of[i][0])) : load<AccOf<Real>>(gates.of[i] + d);
  return gains;
}

// X_next = RMSNorm(Z(X, F)) and what is saved, (7)-(8). X, F, X_next (B, T, D). `again`: a replay
// (dit.cu, 5.1) from the same X and F, with what was saved the first time: one pass, the same bits.
template <class M, class Real>
void merge_forward_as(const Device& device, Real* X_next, MergeSaved<AccOf<Real>> saved,
                      const Real* X, const Real* F, Gates<const Real> gates, MergeShape shape,
                      bool again) {
  using Acc = AccOf<Real>;
  size_t D = shape.D;
  Acc eps = Acc(shape.eps);
  if (M::means && !again) segment_means(device, saved.xbar, saved.fbar, X, F, shape.tokens, D);
  auto Z = [=] HD(size_t segment, size_t row, size_t d) {
    Joined<Acc> in = {load<Acc>(X + row * D + d), load<Acc>(F + row * D + d), {}, {}};
    if (M::trunk_apart && saved.r_X) in.x = Acc(1) / saved.r_X[row] * in.x;
    if (M::means) {
      in.xbar = load<Acc>(saved.xbar + segment * D + d);
      in.fbar = load<Acc>(saved.fbar + segment * D + d);
    }
    return M::Z(gains_at<M>(gates, d), in);
  };
  if (again) {
    map_rows(device, shape.tokens, D, Z, [=] HD(size_t row, size_t d, Quad<Acc> z) {
      store(X_next + row * D + d, saved.r[row] * z);
    });
    return;
  }
  map_rows_by_sum<Acc>(
      device, shape.tokens, D, Z, [=] HD(Quad<Acc> z) { return dot(z, z); },
      [=] HD(size_t row, Acc squares, bool mine) {
        Acc r = inverse_rms(squares, D, eps);
        if (mine) saved.r[row] = r;
        return r;
      },
      [=] HD(size_t row, size_t d, Quad<Acc> z, Acc r) { store(X_next + row * D + d, r * z); });
}

// Scratch of the backward: h (B, T); and (B, 2, D): dZbar, Delta's segment means, and dgate, a
// segment's sums of Delta times what the gate `by_token` multiplies; and partial sums of both.
template <class Acc>
struct MergeScratch {
  Acc *h, *dZbar, *dgate;
  Pair<Quad<Acc>>* partial;

  void lay(Carver& c, Tokens tokens, size_t D) {
    h = c.take<Acc>(tokens.rows());
    dZbar = c.take<Acc>(2 * tokens.batch * D), dgate = c.take<Acc>(2 * tokens.batch * D);
    partial = c.take<Pair<Quad<Acc>>>(partial_sums(tokens, D));
  }
};

// What a merge's backward reads: G = dL/dX_next, and what its forward read and left.
template <class Real>
struct MergeBackwardInputs {
  const Real *G, *X_next, *X, *F;  // (B, T, D)
  Gates<const Real> gates;
  MergeSaved<AccOf<Real>> saved;
  const Real* dF_next = nullptr;  // for Pre-Norm alone: dF of the merge after, zeros after the last
};

// dX (=), dF (=) (B, T, D), and in scratch what the gates' gradients are made of. dX may be G
// itself.
template <class M, class Real>
void merge_backward_as(const Device& device, Real* dX, Real* dF, MergeScratch<AccOf<Real>> scratch,
                       MergeBackwardInputs<Real> in, MergeShape shape) {
  using Acc = AccOf<Real>;
  using Two = Pair<Quad<Acc>>;
  size_t D = shape.D;
  Tokens tokens = shape.tokens;
  auto G_and_X_next = [=] HD(size_t, size_t row, size_t d) {
    return Two{load<Acc>(in.G + row * D + d), load<Acc>(in.X_next + row * D + d)};
  };
  auto dZ = [=] HD(size_t row, Two g_x, Acc h) {
    return in.saved.r[row] * (g_x.a - h * g_x.b);  // (Delta')
  };
  auto gradients = [=] HD(size_t segment, size_t row, size_t d, Quad<Acc> dZ_i) {
    Quad<Acc> dZbar = {};
    if (M::means) dZbar = load<Acc>(scratch.dZbar + segment * D + d);
    if (M::trunk_apart) dZ_i = load<Acc>(in.dF_next + row * D + d) + dZ_i;  // (trunk), appendix A
    Two dX_dF = M::gradients(gains_at<M>(in.gates, d), dZ_i, dZbar);
    if (M::trunk_apart && in.saved.r_X) dX_dF.a = {};  // the trunk's part is in dF alone
    return dX_dF;
  };
  auto put = [=] HD(size_t row, size_t d, Two out) {
    store(dX + row * D + d, out.a), store(dF + row * D + d, out.b);
  };
  if constexpr (M::means || M::by_token >= 0) {
    sum_over_rows_by_sum<Acc>(
        device, tokens, D, Two{quad(Acc(0)), quad(Acc(0))}, scratch.partial,
        [=] HD(size_t row, size_t d) {
          Two g_x = G_and_X_next(0, row, d);
          return dot(g_x.a, g_x.b);
        },
        [=] HD(size_t row, Acc sum) { scratch.h[row] = sum / Acc(D); },
        [=] HD(size_t segment, size_t row, size_t d) {
          Quad<Acc> dZ_i = dZ(row, G_and_X_next(segment, row, d), scratch.h[row]), fbar = {};
          if (M::means) fbar = load<Acc>(in.saved.fbar + segment * D + d);
          Quad<Acc> x = load<Acc>(in.X + row * D + d), f = load<Acc>(in.F + row * D + d);
          return Two{dZ_i, dZ_i * M::token_factor(Joined<Acc>{x, f, {}, fbar})};
        },
        [=] HD(size_t segment, size_t d, Two sum) {
          store(scratch.dZbar + segment * D + d, tokens.one_over<Acc>(segment) * sum.a);
          store(scratch.dgate + segment * D + d, sum.b);
        });
    map_rows(
        device, tokens, D,
        [=] HD(size_t segment, size_t row, size_t d) {
          Quad<Acc> dZ_i = dZ(row, G_and_X_next(segment, row, d), scratch.h[row]);
          return gradients(segment, row, d, dZ_i);
        },
        put);
  } else {
    map_rows_by_sum<Acc>(
        device, tokens, D, G_and_X_next, [=] HD(Two g_x) { return dot(g_x.a, g_x.b); },
        [=] HD(size_t, Acc sum, bool) { return sum / Acc(D); },
        [=] HD(size_t row, size_t d, Two g_x, Acc h) {
          put(row, d, gradients(0, row, d, dZ(row, g_x, h)));
        });
  }
}

// *to = sum, or += if `accumulate`.
template <class Number, class Acc>
HD void set_or_add(Number* to, Acc sum, bool accumulate) {
  *to = Number(accumulate ? Acc(*to) + sum : sum);
}

// The gates' gradients (=, or += if `accumulate`) from the segments' sums: (dbeta), (dalpha).
template <class M, class Real, class Number>
void gate_gradients(const Device& device, Gates<Number> dgates, MergeSaved<AccOf<Real>> saved,
                    MergeScratch<AccOf<Real>> scratch, MergeShape shape, bool accumulate) {
  using Acc = AccOf<Real>;
  size_t D = shape.D;
  Tokens tokens = shape.tokens;
  auto term = [=] HD(size_t segment, size_t d) {
    size_t at = segment * D + d;
    Pair<Acc> sum{scratch.dgate[at], 0};
    if (M::by_segment >= 0) {
      Acc factor = M::segment_factor(saved.xbar[at], saved.fbar[at]);
      sum.b = Acc(tokens.count(segment % 2)) * scratch.dZbar[at] * factor;
    }
    return sum;
  };
  auto finish = [=] HD(size_t d, Pair<Acc> sum) {
    constexpr int one = max_<int>(M::by_token, 0),
                  other = max_<int>(M::by_segment, 0);  // -1 is no place
    if (M::by_token >= 0) set_or_add(dgates.of[one] + d, sum.a, accumulate);
    if (M::by_segment >= 0) set_or_add(dgates.of[other] + d, sum.b, accumulate);
  };
  sum_over_groups(device, tokens.groups(), D, M::one_number, Pair<Acc>{}, term, finish);
}

// dit.cu calls these through merge_forward() and merge_backward() (appendix B).

// Appendix. The straight way ends here. Below: merges for comparison and the list of all (A), what
// the network calls (B), measuring (C).

// ---------------------------------------------------------------------------------------------
// A. Merges for comparison, and the list of all
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
// through the norm it is the Delta of section 3; from the trunk comes dL/dZ_next as it is. So
//
//     dL/dZ = dL/dZ_next + Delta,     dL/dF = dL/dZ,                                      (trunk)
//
// and as Z = Z_prev + F with Z_prev = X / r_X, dL/dZ is the dL/dZ_next of the merge before: which
// reads it as the dF of this one. No norm stands in its way: all of it reaches the first block. So
// dX, what comes back to X other than along the trunk, is zero; but for the first X, which is the
// trunk: dZ.
struct PreNorm : PostNorm {
  static constexpr const char* name = "prenorm";
  static constexpr bool trunk_apart = true;
};

// Z = X + lambda F, lambda a number. DeepNorm is a ReZero whose lambda stays at 1 / a: a X + F = a
// (X + F / a), and RMSNorm takes the factor away (and divides its eps by a^2). DeepNet has a = (2
// depth)^(1/4). ReZero's writers do not start at zero: with lambda = 0 and W = 0, dlambda
// = sum Delta * F and dF = lambda Delta would both be zero for ever.
struct ReZero : LayerScale {
  static constexpr const char* name = "rezero";
  static constexpr std::array gates = {Gate{"lambda", "rezero#", 0}};
  static constexpr bool one_number = true;
};

// MV-Split without the leaky term: Z = X + beta * P F + alpha * J F.
struct MvSplitNoLeak : MvSplit {
  static constexpr const char* name = "mvsplit-noleak";

  template <class Acc>
  HD static Quad<Acc> Z(Gains<Acc> g, Joined<Acc> in) {
    return multiply_add(g[alpha], in.fbar, multiply_add(g[beta], in.f - in.fbar, in.x));
  }
  template <class Acc>
  HD static Pair<Quad<Acc>> gradients(Gains<Acc> g, Quad<Acc> dZ, Quad<Acc> dZbar) {
    return {dZ, MvSplit::gradients(g, dZ, dZbar).b};
  }
  template <class Acc>
  HD static Acc segment_factor(Acc, Acc fbar) {
    return fbar;
  }
};

// Hard centering (App. J): Z = X + P F. The mean of the branch is thrown away and the trunk's kept,
// so dX = Delta and dF = P Delta = Delta - Dbar.
struct Centered : MergeBase {
  static constexpr const char* name = "centered";
  static constexpr bool means = true;

  template <class Acc>
  HD static Quad<Acc> Z(Gains<Acc>, Joined<Acc> in) {
    return in.x + (in.f - in.fbar);
  }
  template <class Acc>
  HD static Pair<Quad<Acc>> gradients(Gains<Acc>, Quad<Acc> dZ, Quad<Acc> dZbar) {
    return {dZ, dZ - dZbar};
  }
};

// MV-Split's leak on both parts: Z = X + alpha * (F - X). dX = (1 - alpha) * Delta, dF = alpha *
// Delta, dalpha = sum_i Delta_i * (F_i - X_i).
struct Leaky : MergeBase {
  static constexpr const char* name = "leaky";
  static constexpr std::array gates = {Gate{"alpha", "leaky#", 0.1}};
  enum { alpha, by_token = alpha };

  template <class Acc>
  HD static Quad<Acc> Z(Gains<Acc> g, Joined<Acc> in) {
    return multiply_add(g[alpha], in.f - in.x, in.x);
  }
  template <class Acc>
  HD static Pair<Quad<Acc>> gradients(Gains<Acc> g, Quad<Acc> dZ, Quad<Acc>) {
    return {dZ - g[alpha] * dZ, g[alpha] * dZ};
  }
  template <class Acc>
  HD static Quad<Acc> token_factor(Joined<Acc> in) {
    return in.f - in.x;
  }
};

// Has M what every merge must have?
template <class M, class = void>
constexpr bool is_merge = false;
template <class M>
constexpr bool
    is_merge<M, std::void_t<decltype(M::name), decltype(M::Z(Gains<float>(), Joined<float>())),
                            decltype(M::gradients(Gains<float>(), Quad<float>(), Quad<float>()))>> =
        true;

// Does it say of each of its gates, and of no other, what the gate multiplies? (Addresses are
// compared as types: under UBSan they are no constants.)
template <auto address>
struct Address {};
template <auto a, auto b>
constexpr bool differ = !std::is_same_v<Address<a>, Address<b>>;
template <class M>
constexpr bool has_factors() {
  using Base = MergeBase;
  bool token = differ<&M::template token_factor<float>, &Base::token_factor<float>>;
  bool segment = differ<&M::template segment_factor<float>, &Base::segment_factor<float>>;
  return token == (M::by_token >= 0) && segment == (M::by_segment >= 0) &&
         M::gates.size() == size_t(token) + size_t(segment);
}

template <class... All>
struct MergeList {
  static_assert((is_merge<All> && ...), "a merge has a name, Z and gradients");
  static_assert((has_factors<All>() && ...), "a merge says what each of its gates multiplies");

  // f(M()) for the merge M in place `index`.
  template <class F>
  static void with(int index, const F& f) {
    int i = 0;
    (void)((i++ == index && (f(All()), true)) || ...);
  }
  // f(M()) for each.
  template <class F>
  static void each(const F& f) {
    (f(All()), ...);
  }
  template <class M>
  static constexpr int index_of() {
    int index = 0;
    (void)((std::is_same_v<M, All> || (++index, false)) || ...);
    return index;
  }
};

// All there are: options, tables of parameters, files, tests and reports follow from this line.
using Merges =
    MergeList<PostNorm, PreNorm, LayerScale, ReZero, MvSplit, MvSplitNoLeak, Centered, Leaky>;

// What the list says of a merge to those who do not compute with it.
struct MergeAbout {
  std::string name;
  std::vector<Gate> gates;
  bool means, trunk_apart, one_number;
  double writer_std;
};
inline const MergeAbout& about(Merge merge) {
  static const std::vector<MergeAbout> all = [] {
    std::vector<MergeAbout> list;
    Merges::each([&](auto m) {
      using M = decltype(m);
      std::vector<Gate> gates(M::gates.begin(), M::gates.end());
      list.push_back({M::name, gates, M::means, M::trunk_apart, M::one_number, M::writer_std});
    });
    return list;
  }();
  return all.at(size_t(merge.index));
}
template <class M>
constexpr Merge merge_of{Merges::index_of<M>()};

// ---------------------------------------------------------------------------------------------
// B. What the network calls: the merge that `gates` names

// merge_forward() and merge_backward() stand at the end: they choose between section 5's kernels
// and the following, for D = 128, four channels for each lane of a warp. There a merge's launches
// cost more than its bytes, so sums over tokens and all that follows from them are one kernel. A
// cluster is a few thread blocks that run at the same time and reach each other's shared memory;
// three of them have a sequence and exchange their sums. A warp has every 48th row, of image and of
// text. Formulas and what is left behind (but for h) are section 5's, the order of sums is another.
// Rows wait in shared memory, forward of two arrays, X and F, backward of three, G, X_next and F:
// read(i, k) is of the k-th that fetch() was given.
// (Three: a batch of 32 then has one of an H200's multiprocessors for each block. A cluster must
// lie within one part of the chip, so of clusters of four only 30 fit at once.)
#ifdef __CUDACC__
template <class Real, int arrays>
struct Cluster {
  static constexpr unsigned D = 128, blocks = 3, warps = 16, threads = 32 * warps;
  static constexpr unsigned tokens_at_most = 512;  // more were not measured
  static_assert(threads == 4 * D, "a thread for each sum: two for each segment and channel");
  static_assert(tokens_at_most <= blocks * warps * 32, "a lane for each row of a warp");
  using Two = Pair<Quad<float>>;
  struct Sums {
    float of_warps[warps][4 * D], of_blocks[blocks][4 * D];
  };

  Tokens tokens;
  unsigned block = blockIdx.x % blocks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned d = 4 * lane, length = unsigned(tokens.length());
  size_t sequence = blockIdx.x / blocks;

  static unsigned grid(Tokens tokens) { return unsigned(tokens.batch) * blocks; }
  static size_t bytes(Tokens tokens) {
    size_t rows = ceil_div(tokens.length(), size_t(blocks * warps)) * warps;
    return sizeof(Sums) + rows * arrays * D * sizeof(Real);
  }
  static bool fits(const Device& device, MergeShape shape) {
    return shape.D == D && shape.tokens.length() <= tokens_at_most &&
           bytes(shape.tokens) <= device.cluster_bytes;
  }
  __device__ static Sums& sums() {
    extern __shared__ __align__(16) char memory[];
    return *reinterpret_cast<Sums*>(memory);
  }

  // This warp's i-th row: its place in the sequence and among all, its kind of segment, and this
  // lane's channels of it, at d, in an array and in shared memory, behind the sums.
  __device__ unsigned place(unsigned i) const { return (i * warps + warp) * blocks + block; }
  __device__ size_t row(unsigned i) const { return sequence * length + place(i); }
  __device__ size_t at(unsigned i) const { return row(i) * D + d; }
  __device__ int kind(unsigned i) const { return place(i) < tokens.image ? 0 : 1; }
  __device__ Real* near(unsigned i, int array) const {
    return reinterpret_cast<Real*>(&sums() + 1) + ((i * warps + warp) * arrays + array) * D + d;
  }
  __device__ Quad<float> read(unsigned i, int array) const { return load<float>(near(i, array)); }
  template <class F>
  __device__ void each_row(const F& f) const {
#pragma unroll 2  // all at once are so many instructions that warps wait for them
    for (unsigned i = 0; place(i) < length; ++i) f(i);
  }

  // Begins to read this lane's channels of all rows. After __pipeline_wait_prior(0) they are there,
  // for this lane: no other reads them, so no barrier is needed.
  template <class... Array>
  __device__ void fetch(const Array*... from) const {
    // Others may write to this block's shared memory once it has begun: meet() waits for that.
    cooperative_groups::this_cluster().barrier_arrive();
    each_row([&](unsigned i) {
      int array = 0;
      (__pipeline_memcpy_async(near(i, array++), from + at(i), 4 * sizeof(Real)), ...);
    });
    __pipeline_commit();
  }

  // Once, after fetch(). mine[kind] are this lane's two sums over the warp's rows of a kind of
  // segment. Each thread adds up one number: over its block's warps, and, told to all blocks, over
  // these. Then sum(kind, 0) is the segment's mean of the first, sum(kind, 1) the second sum, or
  // with `means` its mean; both are stored (B, 2, D).
  __device__ void meet(const Two (&mine)[2], float* first, float* second, bool means) const {
    auto cluster = cooperative_groups::this_cluster();
    unsigned number = threadIdx.x, channel = number % D;
    bool is_first = number / D % 2 == 0;
    size_t segment = 2 * sequence + number / (2 * D);
    float total = 0;
    for (int kind = 0; kind < 2; ++kind)
      store(sum_at(warp, kind, 0), mine[kind].a), store(sum_at(warp, kind, 1), mine[kind].b);
    __syncthreads();
    for (auto& of_warp : sums().of_warps) total += of_warp[number];
    cluster.barrier_wait();
    for (unsigned b = 0; b < blocks; ++b)
      *cluster.map_shared_rank(&sums().of_blocks[block][number], b) = total;
    cluster.sync();  // from here on a block reads its own memory alone, and may end
    total = 0;
    for (auto& of_block : sums().of_blocks) total += of_block[number];
    if (is_first || means) total *= tokens.one_over<float>(segment);
    if (block == 0) (is_first ? first : second)[segment * D + channel] = total;
    sums().of_warps[0][number] = total;
    __syncthreads();
  }
  __device__ Quad<float> sum(int kind, int which) const {
    return load<float>(sum_at(0, kind, which));
  }
  // sums[kind] += x. (By an index they would not stay in registers.)
  __device__ static void add(Two (&sums)[2], int kind, Two x) {
    kind == 0 ? sums[0] = sums[0] + x : sums[1] = sums[1] + x;
  }

 private:
  __device__ float* sum_at(unsigned of_warp, int kind, int which) const {
    return sums().of_warps[of_warp] + (2 * kind + which) * D + d;
  }
};

template <class M, class Real>
__global__ void __launch_bounds__(Cluster<Real, 2>::threads)
    merge_forward_kernel(Real* X_next, MergeSaved<float> saved, const Real* X, const Real* F,
                         Gates<const Real> gates, Tokens tokens, float eps) {
#if __CUDA_ARCH__ >= 900  // older GPUs have no clusters: it is not launched there
  Cluster<Real, 2> here{tokens};
  here.fetch(X, F);
  Gains<float> gains = gains_at<M>(gates, here.d);
  __pipeline_wait_prior(0);
  Pair<Quad<float>> sums[2] = {};
  here.each_row([&](unsigned i) {
    here.add(sums, here.kind(i), {here.read(i, 0), here.read(i, 1)});
  });
  here.meet(sums, saved.xbar, saved.fbar, true);
  here.each_row([&](unsigned i) {
    int kind = here.kind(i);
    Quad<float> Z =
        M::Z(gains, {here.read(i, 0), here.read(i, 1), here.sum(kind, 0), here.sum(kind, 1)});
    // (Of 32 threads a sum asks neither for the team's number nor for the thread's.)
    float r = inverse_rms(Team{0, 0, 32}.sum(dot(Z, Z)), here.D, eps);
    if (here.lane == 0) saved.r[here.row(i)] = r;
    store(X_next + here.at(i), r * Z);
  });
#endif
}

template <class M, class Real>
__global__ void __launch_bounds__(Cluster<Real, 3>::threads)
    merge_backward_kernel(Real* dX, Real* dF, MergeScratch<float> scratch,
                          MergeBackwardInputs<Real> in, Tokens tokens) {
#if __CUDA_ARCH__ >= 900
  Cluster<Real, 3> here{tokens};
  here.fetch(in.G, in.X_next, in.F);
  // Lane i keeps r and h of the warp's i-th row, and tells the others.
  float r = here.place(here.lane) < here.length ? in.saved.r[here.row(here.lane)] : 0, h = 0;
  Gains<float> gains = gains_at<M>(in.gates, here.d);
  Quad<float> fbar[2] = {};
  for (int kind = 0; kind < 2 && M::means; ++kind)
    fbar[kind] = load<float>(in.saved.fbar + (2 * here.sequence + size_t(kind)) * here.D + here.d);
  __pipeline_wait_prior(0);
  auto dZ = [&](unsigned i, float h_i) {  // (Delta')
    return __shfl_sync(~0u, r, int(i)) * (here.read(i, 0) - h_i * here.read(i, 1));
  };
  Pair<Quad<float>> sums[2] = {};
  here.each_row([&](unsigned i) {
    float h_i = Team{0, 0, 32}.sum(dot(here.read(i, 0), here.read(i, 1))) / here.D;
    if (here.lane == i) h = h_i;
    int kind = here.kind(i);
    // X is Leaky's alone: without a use there is no load.
    Quad<float> dZ_i = dZ(i, h_i), x = load<float>(in.X + here.at(i));
    Joined<float> joined{x, here.read(i, 2), {}, kind == 0 ? fbar[0] : fbar[1]};
    here.add(sums, kind, {dZ_i, dZ_i * M::token_factor(joined)});
  });
  here.meet(sums, scratch.dZbar, scratch.dgate, false);
  here.each_row([&](unsigned i) {
    Quad<float> dZ_i = dZ(i, __shfl_sync(~0u, h, int(i)));
    Pair<Quad<float>> dX_dF = M::gradients(gains, dZ_i, here.sum(here.kind(i), 0));
    store(dX + here.at(i), dX_dF.a), store(dF + here.at(i), dX_dF.b);
  });
#endif
}
#endif

// X_next = RMSNorm(Z(X, F)) and what is saved; see merge_forward_as().
template <class Real>
void merge_forward(const Device& device, Real* X_next, MergeSaved<AccOf<Real>> saved, const Real* X,
                   const Real* F, Gates<const Real> gates, MergeShape shape, bool again = false) {
  Merges::with(gates.merge.index, [&](auto m) {
    using M = decltype(m);
#ifdef __CUDACC__
    using Here = Cluster<Real, 2>;
    if constexpr (M::means && !M::trunk_apart && sizeof(Real) <= 4)
      if (!again && Here::fits(device, shape))
        return launch(device, merge_forward_kernel<M, Real>, Here::grid(shape.tokens), Here::blocks,
                      Here::threads, Here::bytes(shape.tokens), X_next, saved, X, F, gates,
                      shape.tokens, float(shape.eps));
#endif
    merge_forward_as<M>(device, X_next, saved, X, F, gates, shape, again);
  });
}

// dX, dF and the gates' gradients (=, or += if `accumulate`); see merge_backward_as(). The gates'
// are made beside what follows: they are there, and `scratch` may be used again, at the end of
// `beside`.
template <class Real, class Number>
void merge_backward(Beside& beside, Real* dX, Real* dF, Gates<Number> dgates,
                    MergeScratch<AccOf<Real>> scratch, MergeBackwardInputs<Real> in,
                    MergeShape shape, bool accumulate) {
  Merges::with(in.gates.merge.index, [&](auto m) {
    using M = decltype(m);
    bool done = false;
#ifdef __CUDACC__
    using Here = Cluster<Real, 3>;
    if constexpr (!M::trunk_apart && (M::means || M::by_token >= 0) && sizeof(Real) <= 4)
      if ((done = Here::fits(beside.device, shape)))
        launch(beside.device, merge_backward_kernel<M, Real>, Here::grid(shape.tokens),
               Here::blocks, Here::threads, Here::bytes(shape.tokens), dX, dF, scratch, in,
               shape.tokens);
#endif
    if (!done) merge_backward_as<M>(beside.device, dX, dF, scratch, in, shape);
    if constexpr (M::by_token >= 0 || M::by_segment >= 0)
      beside([&] {
        gate_gradients<M, Real>(beside.device, dgates, in.saved, scratch, shape, accumulate);
      });
  });
}

// ---------------------------------------------------------------------------------------------
// C. Measuring the two parts of a writer's gradient
//
// Of a state. By (3) and orthogonality |X|^2 = |mu(X)|^2 + |c(X)|^2 (Frobenius norms), and most
// numbers that describe a state of tokens are ratios of these two energies.
//
// Of a writer's gradient, for one sequence, without forming dW (D, n). Let K_ts = <y_t, y_s> and
// C_ts = <delta_t, delta_s>, two (T, T) matrices. Then
//
//     |dW|^2 = tr( sum_ts y_t delta_t^T delta_s y_s^T ) = sum_ts K_ts C_ts,
//
// and from centered tokens the same sum is |dW_c|^2. The mean part is a product of two norms,
// |dW_mu| = T |dbar| |ybar|.
//
// Centered tokens are made first and K, C from them. To center K itself is the same on paper, but
// takes the small difference of large numbers once the mean dominates, which is what is looked for.
// And once the network has collapsed delta is so small that its squares underflow in fp32: so each
// sequence is taken over a power of two near its largest number, which rounds nothing, and G_ctr
// gets it back in fp64.
//
// Alignment. In section 2's letters w_t w_s M_ts = K_ts C_ts, hence
//
//     A    = sum_ts K_ts C_ts / sum_t K_tt C_tt,                                               (6)
//     khat = sum_(s != t) |K_ts C_ts| / sum_(s != t) w_t w_s,      w_t^2 = K_tt C_tt.    (31)-(32)

// energies (batch, 2): |mu(X)|^2 and |c(X)|^2 of matrices X (T, D) over all T rows, given by their
// elements x(matrix, t, d).
template <class Acc, class Element>
void split_energies(const Device& device, double* energies, size_t batch, size_t T, size_t D,
                    const Element& x) {
  for_each_team(device, batch, Team::max_size, [=] HD(Team team) {
    double mean_energy = 0, centered = 0;
    for (size_t d = team.rank; d < D; d += team.size) {
      Acc sum = 0, squares = 0;
      for (size_t t = 0; t < T; ++t) sum += x(team.index, t, d);
      Acc mean = sum / Acc(T);
      for (size_t t = 0; t < T; ++t) {
        Acc rest = x(team.index, t, d) - mean;
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
template <class Real>
void matrix_energies(const Device& device, double* energies, const Real* x, size_t batch, size_t n,
                     size_t D) {
  using Acc = AccOf<Real>;
  split_energies<Acc>(device, energies, batch, n, D,
                      [=] HD(size_t b, size_t t, size_t d) { return Acc(x[(b * n + t) * D + d]); });
}

// Of one sequence. |dW_mu| and |dW_c| with the mean over all tokens; A; khat. And of its image
// tokens alone A, and the plain mean of |M_ts| over s != t, the author's kappa. All but the norms
// are NaN where delta or y is zero, khat also where all but one token are.
struct WriterModes {
  double g_mean, g_ctr, amplification, khat, image_amplification, image_kappa;
};

// Token t's part of the sums over t and s, summed over s: of K_ts C_ts, of the same of centered
// tokens, and of |K_ts C_ts|; of image tokens t and s alone, of K_ts C_ts and, for s != t, of
// |M_ts|.
struct TokenModes {
  double energy, centered, magnitudes, image_energy, cosines;
};
HD inline TokenModes operator+(TokenModes x, TokenModes y) {
  return {x.energy + y.energy, x.centered + y.centered, x.magnitudes + y.magnitudes,
          x.image_energy + y.image_energy, x.cosines + y.cosines};
}

// Scratch for a batch of B sequences, of y and of delta: means over all tokens; powers of two;
// tokens as they are and centered, over these; their Gram matrices, K and C.
template <class Acc>
struct WriterScratch {
  struct Side {
    Acc *means, *scales, *tokens, *gram;  // (B, 2, n), (B), (2, B, T, n), (2, B, T, T)
  } y, delta;                             // (delta with D channels for n)
  TokenModes* of_tokens;                  // (B, T)

  void lay(Carver& c, Tokens tokens, size_t n, size_t D) {
    auto lay_side = [&](Side& side, size_t channels) {
      side.means = c.take<Acc>(2 * tokens.batch * channels);
      side.scales = c.take<Acc>(tokens.batch);
      side.tokens = c.take<Acc>(2 * tokens.rows() * channels);
      side.gram = c.take<Acc>(2 * tokens.rows() * tokens.length());
    };
    lay_side(y, n), lay_side(delta, D);
    of_tokens = c.take<TokenModes>(tokens.rows());
  }
};

// means (B, 2, n) of x (B, T, n) over each segment's tokens.
template <class Real>
void token_means(const Device& device, AccOf<Real>* means, const Real* x, Tokens tokens, size_t n) {
  using Acc = AccOf<Real>;
  sum_over_rows(
      device, tokens, n, quad(Acc(0)),
      [=] HD(size_t, size_t row, size_t d) { return load<Acc>(x + row * n + d); },
      [=] HD(size_t segment, size_t d, Quad<Acc> sum) {
        store(means + segment * n + d, tokens.one_over<Acc>(segment) * sum);
      });
}

// spreads (B, 2, n): the root mean square over each segment's tokens of x (B, T, n) less `means`,
// those of token_means(). By channel it is to c(x) what the mean is to mu(x).
template <class Real>
void token_spreads(const Device& device, AccOf<Real>* spreads, const Real* x,
                   const AccOf<Real>* means, Tokens tokens, size_t n) {
  using Acc = AccOf<Real>;
  sum_over_rows(
      device, tokens, n, quad(Acc(0)),
      [=] HD(size_t segment, size_t row, size_t d) {
        Quad<Acc> rest = load<Acc>(x + row * n + d) - load<Acc>(means + segment * n + d);
        return rest * rest;
      },
      [=] HD(size_t segment, size_t d, Quad<Acc> sum) {
        Acc count = Acc(max_<size_t>(tokens.count(segment % 2), 1));
        for (int k = 0; k < 4; ++k) sum[k] = std::sqrt(sum[k] / count);
        store(spreads + segment * n + d, sum);
      });
}

// scales (B): the largest number of each sequence of x (B, T, n), down to a power of two.
template <class Real>
void token_scales(const Device& device, AccOf<Real>* scales, const Real* x, Tokens tokens,
                  size_t n) {
  using Acc = AccOf<Real>;
  size_t count = tokens.length() * n;
  for_each_team(device, tokens.batch, Team::max_size, [=] HD(Team team) {
    Acc largest = 0;
    for (size_t i = 4 * team.rank, step = 4 * team.size; i < count; i += 8 * step) {
      Quad<Acc> v[8];  // eight loads on the way at once, past the end the last quad again
      UNROLL
      for (int k = 0; k < 8; ++k)
        v[k] = load<Acc>(x + team.index * count + min_(i + size_t(k) * step, count - 4));
      for (int j = 0; j < 32; ++j) largest = max_(largest, Acc(fabs(v[j / 4][j % 4])));
    }
    largest = team.max(largest);
    // Within what the scale and one over it can be in fp32.
    int exponent = largest > 0 ? max_(min_(int(ilogb(largest)), 126), -126) : 0;
    if (team.rank == 0) scales[team.index] = Acc(ldexp(1.0, exponent));
  });
}

// out (2, B, T, n): x (B, T, n) as it is, and less its mean, each over its sequence's scale. means
// (B, 2, n), the mean first.
template <class Real>
void center_tokens(const Device& device, AccOf<Real>* out, const Real* x, const AccOf<Real>* means,
                   const AccOf<Real>* scales, Tokens tokens, size_t n) {
  using Acc = AccOf<Real>;
  size_t rows = tokens.rows();
  for_each_quad(device, rows, n, [=] HD(size_t row, size_t d) {
    size_t sequence = row / tokens.length();
    Quad<Acc> value = load<Acc>(x + row * n + d), mean = load<Acc>(means + sequence * 2 * n + d);
    Acc over = Acc(1) / scales[sequence];
    store(out + row * n + d, over * value);
    store(out + (rows + row) * n + d, over * (value - mean));
  });
}

// modes (B) of a writer with input y (B, T, n) and adjoint delta (B, T, D) of its output.
template <class Real>
void writer_modes(Device& device, WriterModes* modes, WriterScratch<AccOf<Real>> scratch,
                  const Real* y, const Real* delta, Tokens tokens, size_t n, size_t D) {
  using Acc = AccOf<Real>;
  size_t length = tokens.length(), squares = length * length;
  auto prepare = [&](auto side, const Real* x, size_t channels) {
    token_means(device, side.means, x, {tokens.batch, length, 0}, channels);
    token_scales(device, side.scales, x, tokens, channels);
    center_tokens(device, side.tokens, x, side.means, side.scales, tokens, channels);
    Matrix<Acc> rows = Matrix<Acc>(side.tokens, channels).batch(length * channels, 0);
    gemm(device, Matrix<Acc>(side.gram, length).batch(squares, 0), rows, rows.transpose(),
         {length, length, channels, 2 * tokens.batch});
  };
  prepare(scratch.y, y, n), prepare(scratch.delta, delta, D);
  // K_ts C_ts of sequence b, of tokens as they are (part 0) or centered (1).
  auto product = [=] HD(size_t part, size_t b, size_t t, size_t s) {
    size_t at = (part * tokens.batch + b) * squares + t * length + s;
    return double(scratch.y.gram[at]) * double(scratch.delta.gram[at]);
  };
  // A team a token first: teams for sequences alone would leave most of a GPU idle.
  for_each_team(device, tokens.rows(), 32, [=] HD(Team team) {
    size_t b = team.index / length, t = team.index % length;
    double own = product(0, b, t, t);  // w_t^2
    TokenModes sum = {};
    for (size_t s = team.rank; s < length; s += team.size) {
      double p = product(0, b, t, s);
      sum.energy += p, sum.centered += product(1, b, t, s);
      sum.magnitudes += fabs(p);
      if (max_(t, s) >= tokens.image) continue;
      sum.image_energy += p;
      if (double both = own * product(0, b, s, s); t != s && both > 0)
        sum.cosines += fabs(p) / sqrt(both);
    }
    sum = team.sum(sum);
    if (team.rank == 0) scratch.of_tokens[team.index] = sum;
  });
  for_each_team(device, tokens.batch, Team::max_size, [=] HD(Team team) {
    size_t b = team.index;
    auto energy_of = [&](const Acc* mean, size_t channels) {
      double sum = 0;
      for (size_t d = team.rank; d < channels; d += team.size)
        sum += double(mean[d]) * double(mean[d]);
      return team.sum(sum);
    };
    TokenModes sum = {};
    double w1 = 0, w2 = 0, image_w2 = 0;
    for (size_t t = team.rank; t < length; t += team.size) {
      sum = sum + scratch.of_tokens[b * length + t];
      double own = product(0, b, t, t);
      w1 += sqrt(own), w2 += own;
      if (t < tokens.image) image_w2 += own;
    }
    sum = team.sum(sum);
    for (double* x : {&w1, &w2, &image_w2}) *x = team.sum(*x);
    double yy = energy_of(scratch.y.means + b * 2 * n, n);
    double dd = energy_of(scratch.delta.means + b * 2 * D, D);
    if (team.rank != 0) return;
    double scale = double(scratch.y.scales[b]) * double(scratch.delta.scales[b]);
    double pairs = w1 * w1 - w2;  // what rounding leaves of it, if one token has all, is no weight
    double image_pairs = double(tokens.image) * (double(tokens.image) - 1);
    WriterModes m;
    m.g_mean = double(length) * sqrt(yy * dd);
    m.g_ctr = scale * sqrt(max_(sum.centered, 0.0));
    m.amplification = sum.energy / w2;
    m.khat = pairs > 1e-12 * w1 * w1 ? (sum.magnitudes - w2) / pairs : NAN;
    m.image_amplification = sum.image_energy / image_w2;
    m.image_kappa = image_w2 > 0 ? sum.cosines / image_pairs : NAN;
    modes[b] = m;
  });
}
