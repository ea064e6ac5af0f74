// options.h - the options of the command line and of configuration files.
//
// What it is: one struct a subcommand, whose fields' initial values are the defaults, and the flags
// that set them.
// What it is not: what the subcommands do (train.cu).
#pragma once

#include "../dit.cu"

#include <optional>
#include <set>

#include <CLI/CLI.hpp>

// ---------------------------------------------------------------------------------------------
// 1. The options of each subcommand

struct Optimizer {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, decay = 0.1, clip = 1;
  size_t warmup = 100;
};

constexpr size_t automatic = SIZE_MAX;  // --recompute: the memory decides

struct TrainOptions {
  Config model;
  Optimizer optimizer;
  size_t batch = 32, accumulate = 1, steps = 1000, seed = 1;
  size_t recompute = automatic;
  std::string state = "auto";  // of the optimiser: fp32, lean
  double memory = 0;           // GB that may be taken; 0: what is free
  size_t val_images = 256, log_every = 10, val_every = 0, save_every = 0, sample_every = 0;
  size_t columns = 8;  // of a sample grid
  size_t diagnose_every = 0, diagnose_samples = 4;
  std::vector<std::string> diagnose_layers;
  double spike_factor = 5;  // 0: no watch for spikes
  double dropout = 0.1, time_shift = 1, ema = 0;
  std::string data = "fashion-mnist", out = "run", save = "all";
  bool resume = false;

  bool observes() const { return diagnose_every || spike_factor > 0; }
};

// How much of a data set goes to the device: training images, images to validate on, captions.
struct DataSizes {
  size_t images, held_out, captions;
};

struct Machine {
  std::string device = "auto", precision = "auto";

  bool gpu() const { return device == "gpu" || (device == "auto" && Device::gpus() > 0); }
  std::string chosen_precision() const {
    return precision != "auto" ? precision : gpu() ? "bf16" : "fp32";
  }
  // Call function(T{}) with T the storage type.
  template <class Function>
  int with_precision(const Function& function) const {
    std::string p = chosen_precision();
    if (p == "fp64") return function(double{});
    if (p == "fp32") return function(float{});
    return function(bf16{});
  }
};

struct SampleOptions {
  std::string weights, out = "grid.png", data;
  std::vector<std::string> prompts;
  size_t steps = 25, columns = 8, seed = 1, heads = 4, size = 32, text_tokens = 8, batch = 64;
  double guidance = 2, time_shift = 0;
  std::optional<double> norm_eps;
};

struct ForwardOptions {
  std::string weights, inputs, out;
  size_t heads = 4, recompute = 0;
  std::optional<double> norm_eps;
};

struct GradcheckOptions {
  Config model;
  size_t batch = 1, recompute = 32, seed = 1;
  double step = 1.5e-3, tolerance = 1e-7;
};

struct ProbeOptions {
  std::string weights, data = "fashion-mnist", out = "probe.csv";
  size_t images = 4096, seed = 1, batch = 64, heads = 4;
  std::optional<double> norm_eps;
  std::vector<std::string> layers;
};

// ---------------------------------------------------------------------------------------------
// 2. What they may be

// The layers that a flag's words name; by default five, spread from the first to the last.
inline std::vector<size_t> chosen_layers(const char* flag, const std::vector<std::string>& words,
                                         size_t last) {
  std::set<size_t> layers;
  if (words.empty())
    for (size_t i = 0; i < 5; ++i) layers.insert((i * last + 2) / 4);
  for (const std::string& word : words) {
    if (word == "all")
      for (size_t i = 0; i <= last; ++i) layers.insert(i);
    else if (word.empty() || word.size() > 6 ||
             word.find_first_not_of("0123456789") < word.size() || std::stoul(word) > last)
      fail("%s: '%s' is not a layer: give numbers from 0 to %zu with commas, or all", flag,
           word.c_str(), last);
    else
      layers.insert(std::stoul(word));
  }
  return {layers.begin(), layers.end()};
}
inline std::vector<size_t> chosen_layers(const TrainOptions& o) {
  return chosen_layers("--diagnose-layers", o.diagnose_layers, o.model.depth - 1);
}

constexpr size_t longest_log_every = 924;  // the norms of more steps are not kept

inline void check_options(const TrainOptions& o) {
  o.model.check();
  const Optimizer& a = o.optimizer;
  const Config& m = o.model;
  double gates =
      m.alpha + m.beta + m.lambda.value_or(0) + m.writer_std + m.final_std;  // finite if all are
  struct {
    bool good;
    const char* what;
  } rules[] = {
      {o.batch >= 1 && o.accumulate >= 1 && o.batch < 1 << 20 && o.accumulate < 1 << 20,
       "--batch and --accumulate must be from 1 to 1,048,575"},
      {o.log_every >= 1 && o.log_every <= longest_log_every, "--log-every must be from 1 to 924"},
      {!o.out.empty(), "--out must name a folder"},
      {o.dropout >= 0 && o.dropout <= 1, "--dropout must be a probability, from 0 to 1"},
      {o.ema >= 0 && o.ema < 1, "--ema must be at least 0 (off) and below 1"},
      {o.memory >= 0 && std::isfinite(o.memory), "--memory must be at least 0"},
      {o.time_shift > 0 && std::isfinite(o.time_shift), "--time-shift must be positive"},
      {a.lr > 0 && std::isfinite(a.lr), "--lr must be positive"},
      {a.decay >= 0 && std::isfinite(a.decay), "--weight-decay must be at least 0"},
      {a.clip >= 0 && std::isfinite(a.clip), "--clip must be at least 0"},
      {std::isfinite(gates),
       "--alpha, --beta, --lambda, --writer-std and --final-std must be finite"},
      {o.val_images >= 1, "--val-images must be at least 1"},
      {o.diagnose_samples >= 1, "--diagnose-samples must be at least 1"},
      {o.spike_factor == 0 || (o.spike_factor > 1 && std::isfinite(o.spike_factor)),
       "--spike-factor must be 0 (off) or above 1"},
  };
  for (const auto& rule : rules)
    if (!rule.good) fail("%s", rule.what);
  chosen_layers(o);
}

// ---------------------------------------------------------------------------------------------
// 3. The command line

inline void add_model_options(CLI::App* app, Config& m) {
  app->add_option("--depth", m.depth, "blocks");
  app->add_option("--width", m.width, "channels D of a token");
  app->add_option("--heads", m.heads, "attention heads");
  app->add_option("--ffn", m.ffn, "width of the FFN");
  app->add_option("--patch", m.patch, "pixels along a patch");
  app->add_option("--residual", m.residual,
                  "postnorm, prenorm, layerscale, rezero, mvsplit, mvsplit-attention, mvsplit-ffn, "
                  "mvsplit-noleak");
  app->add_option("--means", m.means,
                  "that MV-Split takes: segment, of image and of text tokens; global, of all");
  app->add_option("--alpha", m.alpha, "MV-Split's mean gate at the start");
  app->add_option("--beta", m.beta, "MV-Split's centered gate at the start");
  app->add_option("--lambda", m.lambda, "LayerScale's or ReZero's gate at the start")
      ->default_str("1e-2, 0");
  app->add_option("--writer-std", m.writer_std,
                  "W_O and W2 start as N(0, std^2); -1: the mode's own");
  app->add_option("--final-std", m.final_std, "so does the final projection");
  app->add_flag("!--no-patch-bias", m.patch_bias, "no bias in the patch embedding");
  app->add_option("--norm-eps", m.norm_eps, "epsilon of the RMSNorms");
}

// Sizes that train reads off the data; for the subcommands that have none.
inline void add_data_sizes(CLI::App* app, Config& m) {
  app->add_option("--channels", m.channels, "channels of the image");
  app->add_option("--height", m.height, "pixels");
  app->add_option("--image-width", m.image_width, "pixels");
  app->add_option("--text-tokens", m.text_tokens, "tokens of a caption");
  app->add_option("--text-dim", m.text_dim, "numbers of a text token");
}

inline void add_train_options(CLI::App* app, TrainOptions& o) {
  add_model_options(app, o.model);
  app->add_option("--fix", o.model.fix, "gates that are not trained: alpha, beta, lambda")
      ->delimiter(',');
  app->add_option("--batch", o.batch, "images of a forward pass");
  app->add_option("--accumulate", o.accumulate, "passes of a step");
  app->add_option("--steps", o.steps, "steps, from the start of the run");
  app->add_option("--lr", o.optimizer.lr, "learning rate after warm-up");
  app->add_option("--warmup", o.optimizer.warmup, "steps of warm-up");
  app->add_option("--weight-decay", o.optimizer.decay, "of matrices");
  app->add_option("--clip", o.optimizer.clip, "largest gradient norm; 0: none");
  app->add_option("--recompute", o.recompute,
                  "0: keep all activations; k: a checkpoint every k blocks; auto: as memory allows")
      ->transform(
          [](const std::string& text) { return text == "auto" ? std::to_string(automatic) : text; })
      ->default_str("auto");
  app->add_option("--state", o.state,
                  "of the optimiser: fp32; lean, 10 bytes a parameter; auto: as memory allows")
      ->check(CLI::IsMember({"auto", "fp32", "lean"}));
  app->add_option("--memory", o.memory, "GB that may be taken; 0: what is free");
  app->add_option("--dropout", o.dropout, "share of captions left out");
  app->add_option("--time-shift", o.time_shift, "a in t' = a t / (1 + (a-1) t)");
  app->add_option("--ema", o.ema, "decay of the weights' average; 0: none");
  app->add_option("--seed", o.seed, "of everything random");
  app->add_option("--data", o.data, "fashion-mnist, a .safetensors of latents, a folder of PNGs");
  app->add_option("--diagnose-every", o.diagnose_every, "steps a row of diagnostics.csv; 0: none");
  app->add_option("--diagnose-layers", o.diagnose_layers,
                  "0,99,199 or all; default: five, from the first to the last")
      ->delimiter(',');
  app->add_option("--diagnose-samples", o.diagnose_samples, "of a batch, to measure");
  app->add_option("--spike-factor", o.spike_factor,
                  "report a gradient norm this many times its running median; 0: never");
}

inline void add_machine_options(CLI::App* app, Machine& machine) {
  app->add_option("--device", machine.device, "where")
      ->check(CLI::IsMember({"auto", "cpu", "gpu"}));
  app->add_option("--precision", machine.precision,
                  "of storage; auto: bf16 on a GPU, fp32 on a CPU")
      ->check(CLI::IsMember({"auto", "fp64", "fp32", "bf16"}));
}

inline CLI::App* add_train(CLI::App& app, TrainOptions& o, Machine& machine) {
  CLI::App* sub = app.add_subcommand("train", "train a model");
  add_train_options(sub, o);
  sub->add_option("--out", o.out, "folder of the run");
  sub->add_flag("--resume", o.resume, "go on from --out, if there is a run in it");
  sub->add_option("--val-images", o.val_images, "held-out images");
  sub->add_option("--log-every", o.log_every, "steps a line");
  sub->add_option("--val-every", o.val_every, "steps; 0: at the end");
  sub->add_option("--save-every", o.save_every, "steps; 0: at the end");
  sub->add_option("--save", o.save, "all; weights: without what --resume needs")
      ->check(CLI::IsMember({"all", "weights"}));
  sub->add_option("--sample-every", o.sample_every, "steps; 0: at the end");
  sub->add_option("--columns", o.columns, "images of a row")->check(CLI::Range(1, 1000));
  add_machine_options(sub, machine);
  return sub;
}

inline void add_norm_eps(CLI::App* sub, std::optional<double>& norm_eps) {
  sub->add_option("--norm-eps", norm_eps, "default: as in the weights, or 1e-6");
}

inline CLI::App* add_sample(CLI::App& app, SampleOptions& o, Machine& machine) {
  CLI::App* sub = app.add_subcommand("sample", "draw images, a row a prompt");
  sub->add_option("--weights", o.weights, "a weights.safetensors")->required();
  sub->add_option("--prompt", o.prompts, "what to draw; with --data, a caption's number")
      ->required();
  sub->add_option("--data", o.data, "take captions from this data set");
  sub->add_option("--out", o.out, ".png, or .safetensors for raw numbers");
  sub->add_option("--columns", o.columns, "images of a row")->check(CLI::Range(1, 1000));
  sub->add_option("--steps", o.steps, "Euler steps")->check(CLI::Range(1, 100000));
  sub->add_option("--cfg", o.guidance, "guidance; 1: none");
  sub->add_option("--time-shift", o.time_shift, "default: as trained");
  sub->add_option("--seed", o.seed, "of the noise");
  sub->add_option("--batch", o.batch, "images at once")->check(CLI::Range(1, 100000));
  sub->add_option("--heads", o.heads, "if the file does not say");
  sub->add_option("--size", o.size, "pixels a side, if the file does not say");
  sub->add_option("--text-tokens", o.text_tokens, "if the file does not say");
  add_norm_eps(sub, o.norm_eps);
  add_machine_options(sub, machine);
  return sub;
}

inline void add_forward(CLI::App& app, ForwardOptions& o, Machine& machine) {
  CLI::App* sub = app.add_subcommand("forward", "velocity and gradients for given inputs");
  sub->add_option("--weights", o.weights, "a weights.safetensors")->required();
  sub->add_option("--inputs", o.inputs, "z, text and optionally cotangent")->required();
  sub->add_option("--out", o.out, "velocity, grad.*")->required();
  sub->add_option("--heads", o.heads, "if the weights do not say");
  add_norm_eps(sub, o.norm_eps);
  sub->add_option("--recompute", o.recompute, "a checkpoint every k blocks; 0: keep all");
  add_machine_options(sub, machine);
}

inline CLI::App* add_probe(CLI::App& app, ProbeOptions& o, Machine& machine) {
  CLI::App* sub = app.add_subcommand("probe", "how well the time can be read off the states");
  sub->add_option("--weights", o.weights, "a weights.safetensors")->required();
  sub->add_option("--data", o.data, "fashion-mnist, a .safetensors of latents, a folder of PNGs");
  sub->add_option("--out", o.out, "a csv, a row a layer and kind of features");
  sub->add_option("--images", o.images, "one sample each; a quarter of them held out, to test on");
  sub->add_option("--layers", o.layers,
                  "0,99,199 or all: block inputs, and as layer DEPTH the trunk's output; default: "
                  "five, from the first to the last")
      ->delimiter(',');
  sub->add_option("--seed", o.seed, "of the choice of images, the times and the noise");
  sub->add_option("--batch", o.batch, "images at once")->check(CLI::Range(1, 100000));
  sub->add_option("--heads", o.heads, "if the weights do not say");
  add_norm_eps(sub, o.norm_eps);
  add_machine_options(sub, machine);
  return sub;
}

inline CLI::App* add_gradcheck(CLI::App& app, GradcheckOptions& o, Machine& machine) {
  o.model.depth = 1000, o.model.width = 16, o.model.heads = 2, o.model.ffn = 24;
  o.model.channels = 2, o.model.height = 4, o.model.image_width = 6, o.model.patch = 2;
  o.model.text_tokens = 3, o.model.text_dim = 5;
  o.model.alpha = 0.03, o.model.beta = 0.1, o.model.lambda = 0.1;
  o.model.writer_std = 0.25, o.model.final_std = 0.25;
  CLI::App* sub = app.add_subcommand("gradcheck", "gradients of the whole network by differences");
  add_model_options(sub, o.model);
  sub->get_option("--lambda")->default_str("0.1");
  add_data_sizes(sub, o.model);
  sub->add_option("--batch", o.batch)->check(CLI::Range(1, 1024));
  sub->add_option("--recompute", o.recompute, "a checkpoint every k blocks");
  sub->add_option("--step", o.step, "of the differences, relative to the values");
  sub->add_option("--tolerance", o.tolerance, "largest relative error");
  sub->add_option("--seed", o.seed);
  sub->add_option("--device", machine.device, "where")
      ->check(CLI::IsMember({"auto", "cpu", "gpu"}));
  return sub;
}

inline CLI::App* add_plan(CLI::App& app, TrainOptions& o, DataSizes& sizes, Machine& machine) {
  CLI::App* sub = app.add_subcommand("plan", "bytes and FLOP of a step, without taking them");
  add_train_options(sub, o);
  add_data_sizes(sub, o.model);
  sub->add_option("--images", sizes.images, "training images");
  sub->add_option("--captions", sizes.captions, "different captions");
  sub->add_option("--val-images", o.val_images, "held-out images");
  add_machine_options(sub, machine);
  return sub;
}

// A minus sign before an unsigned number would wrap to 2^64 less it.
inline void refuse_negatives(CLI::App& app) {
  for (CLI::App* sub : app.get_subcommands({}))
    for (CLI::Option* option : sub->get_options())
      if (option->get_type_name() == "UINT")
        option->check([](const std::string& text) {
          return text.find('-') == std::string::npos ? "" : text + " is not a positive integer";
        });
}
